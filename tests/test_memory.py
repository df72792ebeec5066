"""`lab.memory()`: each row against a formula, or against what a plain transformers model or plain PEFT holds."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import standins
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from adapterlab import AdapterLab
from adapterlab.inspection import count_bytes
from adapterlab.memory import Storages, memory_frame

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT's remark on Conv1D

MAKERS = {
    "opt": standins.tiny_opt,
    "llama": standins.tiny_llama,
    "tied llama": lambda: standins.tiny_llama(tie_word_embeddings=True),
    "gpt2": standins.tiny_gpt2,
    "t5": standins.tiny_t5,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUIET: dict[str, Any] = {"disable_tqdm": True, "per_device_train_batch_size": 2}
TEXTS = ["The moon is a celestial body.", "Arr, the captain says.", "One adapter learns.", "The wind is fair."]


def unique_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """numel × itemsize, tensors at one address once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def sizes(lab: AdapterLab, owner: str) -> dict[str, int]:
    """kind → bytes of an owner's rows, which are all on the CPU."""
    frame = lab.memory()
    mine = frame[frame["owner"] == owner]
    assert set(mine["device"]) <= {"cpu"}
    assert not mine["kind"].duplicated().any()
    return dict(zip(mine["kind"], mine["bytes"]))


def open_lab(model: Any, *, seq2seq: bool = False) -> AdapterLab:
    return AdapterLab(model, tokenizer=standins.tiny_tokenizer(seq2seq=seq2seq))


# ----- the base -----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_base_is_what_a_plain_model_holds(name: str, dtype: torch.dtype) -> None:
    plain = MAKERS[name]().to(dtype)
    lab = open_lab(MAKERS[name]().to(dtype), seq2seq=name == "t5")
    expected = {"weights": unique_bytes(plain.state_dict().values())}
    assert not set(dict(plain.named_buffers())) & set(plain.state_dict()), "the state dict would hold buffers too"
    buffers = unique_bytes(plain.buffers())
    assert sizes(lab, "base") == (expected | {"buffers": buffers} if buffers else expected)
    frame = lab.memory()
    assert list(frame.columns) == ["owner", "kind", "device", "bytes", "source"]
    assert set(frame.loc[frame["owner"] == "base", "source"]) == {"measured"}
    lab.compare("Hello", max_new_tokens=2)
    assert sizes(lab, "base")["weights"] == expected["weights"]


def quantisation(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant="double" in kind,
        bnb_4bit_compute_dtype=torch.float32,
    )


def expected_of(layer: nn.Linear, kind: str) -> tuple[int, int]:
    """(bytes of the weight, bytes of its statistics) of a quantised linear layer.

    nf4: half a byte each, and for each block of 64 an fp32 maximum; doubled, that maximum is a byte, each 256 of these have
    an fp32 maximum, with one offset for all and a code of 256 values; the 16 values of nf4 itself lie beside every layer.
    int8: a byte each, and an fp32 scale per row.
    """
    n, rows = layer.weight.numel(), layer.weight.shape[0]
    if kind == "8bit":
        return n, 4 * rows
    blocks = -(-n // 64)
    if "double" not in kind:
        return n // 2, 4 * blocks + 4 * 16
    return n // 2, blocks + 4 * -(-blocks // 256) + 4 + 4 * 256 + 4 * 16


@pytest.mark.parametrize("kind", ["8bit", "4bit", "4bit, double"])
def test_a_quantised_base_is_what_the_formulas_say(kind: str, tmp_path: Path) -> None:
    plain = standins.tiny_llama(hidden_size=64, intermediate_size=256)
    standins.write_model(tmp_path, plain, standins.tiny_tokenizer())
    quantised = {path: m for path, m in plain.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"}
    each = [expected_of(layer, kind) for layer in quantised.values()]
    rest = [p for key, p in plain.named_parameters() if key.removesuffix(".weight") not in quantised]
    weights = sum(size for size, _ in each) + unique_bytes(rest)
    statistics = sum(size for _, size in each)

    lab = AdapterLab(tmp_path, quantization_config=quantisation(kind), dtype=torch.float32)
    found = sizes(lab, "base")
    assert (found["weights"], found["quantization"]) == (weights, statistics)
    if kind != "4bit, double":  # there the layers may share one code, which each counts for itself
        assert weights + statistics == sum(map(count_bytes, lab._adapters.base.values()))
    comparison = lab.compare("Hello", max_new_tokens=2)  # bitsandbytes moves the scales to another place
    found = sizes(lab, "base")
    assert (found["weights"], found["quantization"]) == (weights, statistics)
    assert comparison.model["memory"]["base_bytes"] == weights + statistics + found["buffers"]


def test_a_twin_of_a_weight_in_a_storage_of_its_own_counts() -> None:
    """Where bitsandbytes would keep an 8-bit weight a second time, the rows say so."""
    lab = open_lab(standins.tiny_llama())
    layer: Any = lab.model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.state = type("State", (), {})()
    layer.state.CB = layer.weight.detach()
    assert "quantization" not in sizes(lab, "base")
    layer.state.CB = layer.weight.detach().clone()
    assert sizes(lab, "base")["quantization"] == layer.weight.numel() * 4


def test_layers_on_disk_take_no_memory(tmp_path: Path) -> None:
    plain = standins.tiny_llama()
    standins.write_model(tmp_path / "base", plain, standins.tiny_tokenizer())
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places["model.layers.1"] = "disk"
    lab = AdapterLab(tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "away"))
    lab.add_adapter("lora", "a", target_modules=["q_proj"])
    frame = lab.memory()
    base = frame[(frame["owner"] == "base") & (frame["kind"] == "weights")].set_index("device")
    away = unique_bytes(p for key, p in plain.named_parameters() if "layers.1." in key)
    assert base["bytes"].to_dict() == {"cpu": unique_bytes(plain.parameters()) - away, "disk": away}
    assert base["source"].to_dict() == {"cpu": "measured", "disk": "computed"}
    memory = lab.compare("Hello", max_new_tokens=2).model["memory"]
    assert memory["base_bytes"] == unique_bytes(plain.parameters()) - away + unique_bytes(plain.buffers())


def test_layers_that_wait_on_the_host_are_there() -> None:
    import accelerate

    plain = standins.tiny_llama()
    model = accelerate.cpu_offload(standins.tiny_llama(), execution_device=torch.device("cpu"))
    lab = open_lab(model)
    assert all(p.is_meta for p in lab.model.parameters())
    assert sizes(lab, "base")["weights"] == unique_bytes(plain.parameters())


def test_a_gradient_of_the_base_shows() -> None:
    lab = open_lab(standins.tiny_llama())
    weight: Any = lab.model.get_parameter("lm_head.weight")
    weight.grad = torch.zeros_like(weight)
    assert sizes(lab, "base")["gradients"] == weight.numel() * 4


# ----- adapters -----

CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "lora of many ranks": LoraConfig(r=3, target_modules=LINEAR, rank_pattern={"down_proj": 5}, use_rslora=True),
    "lora with biases": LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["v_proj", "up_proj"]),
    "modules_to_save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_what_plain_peft_holds(kind: str, dtype: torch.dtype) -> None:
    plain = get_peft_model(standins.tiny_llama().to(dtype), copy.deepcopy(CONFIGS[kind]))
    apart = "modules_to_save.default"
    own = {key: p for key, p in plain.named_parameters() if ".default" in key}  # AdaLoRA's ranknum is not trainable
    expected = {
        "weights": unique_bytes(p for key, p in own.items() if apart not in key),
        "modules_to_save": unique_bytes(p for key, p in own.items() if apart in key),
    }
    lab = open_lab(standins.tiny_llama().to(dtype))
    base = sizes(lab, "base")
    lab.add_adapter(CONFIGS[kind], "mine")
    assert sizes(lab, "mine") == {key: size for key, size in expected.items() if size}
    assert sizes(lab, "base") == base
    assert sum(sizes(lab, "mine").values()) == lab.adapters["mine"].bytes
    lab.set_adapter(None)
    assert sum(sizes(lab, "mine").values()) == lab.adapters["mine"].bytes
    lab.delete_adapter("mine")
    assert "mine" not in set(lab.memory()["owner"])
    assert sizes(lab, "base") == base


@pytest.mark.parametrize("name", ["opt", "gpt2", "t5"])
def test_adapters_on_other_models(name: str) -> None:
    targets = {"opt": ["q_proj", "fc1"], "gpt2": ["c_attn"], "t5": ["q", "wo"]}[name]
    config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2")
    plain = get_peft_model(MAKERS[name](), copy.deepcopy(config))
    lab = open_lab(MAKERS[name](), seq2seq=name == "t5")
    base = sizes(lab, "base")
    lab.add_adapter(config, "mine")
    assert sizes(lab, "mine") == {"weights": unique_bytes(p for p in plain.parameters() if p.requires_grad)}
    assert sizes(lab, "base") == base


def test_stacks_are_the_adapters_and_what_they_pad(lab: AdapterLab) -> None:
    """Ranks 4, 5 and 5 lie as three times 5: each adapter has its own elements, and the lab the padding."""
    ranks = {"a": 4, "b": 5, "c": 5}
    for name, r in ranks.items():
        lab.add_adapter("lora", name, r=r, target_modules=["q_proj", "o_proj"])
    lab.set_trainable(None)
    alone = {name: sizes(lab, name)["weights"] for name in ranks}
    assert "stack padding" not in sizes(lab, "lab")
    lab.compare("Hello", max_new_tokens=2)
    per_rank = 4 * (32 + 32) * 2 * standins.LAYERS  # bytes: in and out, two modules a layer
    assert {name: sizes(lab, name)["weights"] for name in ranks} == alone == {n: r * per_rank for n, r in ranks.items()}
    assert sizes(lab, "lab")["stack padding"] == per_rank * (3 * 5 - 4 - 5 - 5)
    lab.delete_adapter("a")
    assert "stack padding" not in sizes(lab, "lab")


def test_what_lies_in_the_bases_storage_is_the_bases(lab: AdapterLab) -> None:
    """Some methods keep views of the base's weights."""
    lab.add_adapter("lora", "mine", r=4, target_modules=["q_proj"])
    before, base = sizes(lab, "mine")["weights"], sizes(lab, "base")
    layer: Any = lab.model.get_submodule("model.layers.0.self_attn.q_proj")
    parameter = layer.lora_A["mine"].weight
    parameter.data = layer.base_layer.weight.detach()[:4]
    assert sizes(lab, "mine") == {"weights": before - 4 * parameter.numel()}
    assert sizes(lab, "base") == base
    assert sizes(lab, "lab") == {}


def test_what_the_lab_keeps_to_be_quick(full_lab: AdapterLab) -> None:
    lab = full_lab
    assert sizes(lab, "lab") == {}
    lab.compare("Hello", [None, "poet"], max_new_tokens=2, min_new_tokens=2)
    widths = {
        "k_proj": 16,
        "v_proj": 16,
        "down_proj": 64,
    }  # what IA3 scales: what comes in at down_proj, else what goes out
    layers = standins.LAYERS * sum(widths.values())
    # poet's scale, and the scales of the two rows side by side
    assert sizes(lab, "lab")["kept batches"] == 4 * layers * (1 + 2)
    for layer in next(iter(lab._adapters.mounts.stacks.batches._made.values()))[1].values():
        layer.select([1])  # the base's row has left: what the batch began with is kept, too
    assert sizes(lab, "lab")["kept batches"] == 4 * layers * (1 + 2 + 1)
    lab.compare("Hello", [None, "dora"], max_new_tokens=2, min_new_tokens=2)
    assert sizes(lab, "lab")["DoRA norms"] == 4 * standins.LAYERS * (16 + 64) * 2  # v_proj, up_proj: s_out and c
    frame = lab.memory()
    kept = frame[frame["kind"] == "finished columns"]
    assert list(kept["source"]) == ["computed"]
    assert list(kept["bytes"]) == [lab._finished.size]
    lab.clear_cache()
    assert "finished columns" not in sizes(lab, "lab")
    lab.delete_adapter("dora")
    assert "DoRA norms" not in sizes(lab, "lab")


# ----- training -----


class Look(TrainerCallback):
    """Takes a frame while the gradients are there."""

    def __init__(self, lab: AdapterLab) -> None:
        self.lab, self.sizes = lab, {}  # type: ignore[var-annotated]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sizes = sizes(self.lab, "mine")


@pytest.mark.parametrize("kind", ["lora", "adalora", "ia3", "dora", "modules_to_save"])
def test_gradients_and_optimizer_after_real_steps(kind: str, tmp_path: Path) -> None:
    lab = open_lab(standins.tiny_llama())
    lab.add_adapter("lora", "other", target_modules=["q_proj"])
    lab.add_adapter(CONFIGS[kind], "mine")
    parameters = list(lab._adapters.mounts.adapters["mine"].trainable)
    trained, steps = 4 * sum(p.numel() for p in parameters), 4 * len(parameters)
    look = Look(lab)
    trainer = lab.trainer("mine", TEXTS, max_steps=4, callbacks=[look], output_dir=str(tmp_path), **QUIET)
    assert "optimizer" not in sizes(lab, "mine")
    trainer.train()
    assert look.sizes["gradients"] == trained
    after = sizes(lab, "mine")
    assert "gradients" not in after
    assert after["optimizer"] == 2 * trained + steps  # AdamW: two averages, and how many steps were taken
    averages = 2 * trained if kind == "adalora" else 0
    assert after.get("importance averages", 0) == averages
    assert set(sizes(lab, "other")) == {"weights"}
    parts = lab._last_operation.parts  # type: ignore[union-attr]
    found = {part: size["cpu"] for part, size in parts.items() if size}
    expected = {"gradients": trained, "optimizer": 2 * trained + steps, "importance averages": averages}
    assert found == {part: size for part, size in expected.items() if size}
    before = sizes(lab, "mine")["optimizer"]
    trainer.train()
    assert sizes(lab, "mine")["optimizer"] == before
    del trainer
    gc.collect()
    assert set(sizes(lab, "mine")) <= {"weights", "modules_to_save"}


def test_a_training_leaves_no_optimizer_behind() -> None:
    lab = open_lab(standins.tiny_llama())
    lab.train("mine", TEXTS, method="lora", target_modules=["q_proj"], max_steps=2, **QUIET)
    assert set(sizes(lab, "mine")) == {"weights"}
    lab.delete_adapter("mine")
    assert "mine" not in set(lab.memory()["owner"])


# ----- the whole -----


def test_the_process_has_the_rest(full_lab: AdapterLab) -> None:
    frame = full_lab.memory()
    assert not frame["owner"].eq("last operation").any()
    rss = psutil.Process().memory_info().rss
    assert abs(int(frame["bytes"].sum()) - rss) < 5e6
    row = frame[frame["owner"] == "process"].iloc[0]
    assert (row["kind"], row["source"]) == ("Python and libraries", "computed")


def test_the_rest_is_never_negative(full_lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that lie in a mapped file may be in no memory yet."""

    class Small:
        def memory_info(self) -> Any:
            return type("Info", (), {"rss": 1000})()

    monkeypatch.setattr(psutil, "Process", Small)
    assert "process" not in set(full_lab.memory()["owner"])


def test_looking_changes_nothing(full_lab: AdapterLab) -> None:
    lab = full_lab
    lab.compare("Hello", max_new_tokens=2)
    lab.set_adapter("pirate")

    def anatomy() -> Any:
        return (
            {path: (id(m), m.training) for path, m in lab.model.named_modules()},
            {key: (id(p), p.data_ptr(), p.requires_grad, p.grad is None) for key, p in lab.model.named_parameters()},
            (lab.selection, lab.enabled, lab.trainable, lab.active_adapters, len(lab.history), lab._last_operation),
            lab._adapters.refresh(),
        )

    before = anatomy()
    frame = lab.memory()
    assert anatomy() == before
    assert lab.memory()[lab.memory()["owner"] != "process"].equals(frame[frame["owner"] != "process"])


def test_it_counts_the_same_whatever_is_mounted(full_lab: AdapterLab) -> None:
    def resident() -> Any:
        frame = full_lab.memory()
        return frame[frame["owner"] != "process"].reset_index(drop=True)

    before = resident()
    for column in ["pirate", "wide", "dora", {"pirate": 0.5, "poet": 1.0}]:
        full_lab.set_adapter(column)
        assert resident().equals(before)
    with full_lab.using("poet"):
        assert resident().equals(before)


def test_a_native_adapter_behind_the_labs_back_is_not_the_bases(lab: AdapterLab) -> None:
    before = sizes(lab, "base")
    lab.model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "native")
    assert sizes(lab, "base") == before


def test_a_comparison_knows_its_memory(full_lab: AdapterLab) -> None:
    comparison = full_lab.compare("Hello", [None, "pirate", {"pirate": 0.5, "poet": 1}], max_new_tokens=2)
    memory = comparison.model["memory"]
    base = sizes(full_lab, "base")
    assert memory["base_bytes"] == sum(base.values())
    assert memory["adapter_bytes"] == sum(full_lab.adapters[name].bytes for name in ("pirate", "poet"))
    peak = full_lab._last_operation.peak["cpu"]  # type: ignore[union-attr]
    assert memory["peak_bytes"] == peak
    assert json.loads(json.dumps(memory)) == memory
    again = full_lab.compare("Hello", [None, "pirate"], max_new_tokens=2)
    assert all(generation.cached for generation in again.generations)
    assert again.model["memory"]["peak_bytes"] is None, "nothing ran"


def test_closing_frees(tmp_path: Path) -> None:
    standins.write_model(tmp_path, standins.tiny_llama(), standins.tiny_tokenizer())
    lab = AdapterLab(tmp_path)
    lab.add_adapter("lora", "mine", target_modules=["q_proj"])
    lab.train("mine", TEXTS, max_steps=1, **QUIET)
    frame, comparison = lab.memory(), lab.compare("Hello", max_new_tokens=2)
    model = lab.model
    alive = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    alive += [weakref.ref(p) for p in lab._adapters.mounts.adapters["mine"].trainable]
    del model
    lab.close()
    assert not any(ref() is not None for ref in alive)
    assert len(frame)
    assert comparison.model["memory"]["base_bytes"] == frame.loc[frame["owner"] == "base", "bytes"].sum()


def test_storages_count_once() -> None:
    whole = torch.zeros(10, 10)
    counted = Storages()
    assert counted.take([whole[:2], whole[5:], None, torch.empty(0), torch.empty(3, device="meta")]) == {"cpu": 400}
    assert counted.take([whole]) == {}
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2, 3), (5, 3), check_invariants=True)
    assert Storages().take([sparse]) == {"cpu": 2 * 8 + 2 * 3 * 4}


def test_cuda_has_its_allocators_rows(full_lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: the numbers come from a stand-in for the allocator, and the rows from where tensors would lie."""
    from adapterlab import memory

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000_000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000_000)
    rows = memory._process_rows([("base", "weights", "cuda:0", 600_000, "measured")])
    assert rows[1:] == [
        ("process", "other tensors", "cuda:0", 400_000, "computed"),
        ("process", "reserved by CUDA's allocator", "cuda:0", 4_000_000, "measured"),
    ]
    assert len(memory_frame(full_lab._adapters, full_lab._finished, None))
