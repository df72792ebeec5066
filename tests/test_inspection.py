"""What the panel says before anything is made: the layers that can be adapted, and the size of an adapter on them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from adapterlab import AdapterLab, Comparison
from adapterlab.inspection import count_new_parameters, linear_shapes, people_bytes, people_count

CONFIGS: dict[str, Any] = {
    "lora": lambda targets, r: LoraConfig(r=r, target_modules=targets),
    "adalora": lambda targets, r: AdaLoraConfig(init_r=r, target_modules=targets, total_step=10),
    "ia3": lambda targets, r: IA3Config(target_modules=targets),  # PEFT says which of them are feed-forward layers
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT's remark on Conv1D
@pytest.mark.parametrize(
    "make", [standins.tiny_llama, standins.tiny_gpt2, standins.tiny_falcon, standins.tiny_t5, standins.tiny_opt]
)
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3"])
def test_the_count_is_what_peft_makes_trainable(make: Any, method: str) -> None:
    shapes = linear_shapes(make())
    names = [name for name in shapes if name != "lm_head"]
    for targets in (names, *([name] for name in names)):
        model: Any = get_peft_model(make(), CONFIGS[method](targets, 5))
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count_new_parameters(method, 5, [shape for name in targets for shape in shapes[name]]) == expected


def test_every_linear_layer_is_there_once_whatever_is_mounted() -> None:
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    modules = dict(lab.model.named_modules())
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    before = linear_shapes(lab.model)
    assert sum(map(len, before.values())) == len(linear)
    for path in linear:
        assert (modules[path].in_features, modules[path].out_features) in [
            (shape.n_in, shape.n_out) for shape in before[path.rpartition(".")[2]]
        ]
    for method in ("lora", "ia3", "adalora"):
        lab.add_adapter(method, f"my-{method}", target_modules=["q_proj", "down_proj"])
        assert linear_shapes(lab.model) == before


MOUNTED: dict[str, Any] = {
    "whole modules": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"]),
    "tokens": lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]),
    "LoKr": lambda: LoKrConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "DoRA": lambda: LoraConfig(use_dora=True, target_modules=["q_proj", "lm_head"]),
}
for _kind in sorted({"LILY", "PEANUT"} & set(PEFT_TYPE_TO_CONFIG_MAPPING)):  # with linear layers of their own
    MOUNTED[_kind] = partial(PEFT_TYPE_TO_CONFIG_MAPPING[_kind], r=2, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize("kind", MOUNTED)
def test_no_module_of_an_adapter_is_a_target(kind: str) -> None:
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    before = linear_shapes(lab.model)
    lab.add_adapter(MOUNTED[kind](), "mine")
    assert lab.active_adapters == {"mine": 1.0}
    assert linear_shapes(lab.model) == before


def test_a_blend_and_a_batch_stand_in_for_the_layers_they_are_mounted_on(full_lab: AdapterLab) -> None:
    before = linear_shapes(full_lab.model)
    full_lab.set_adapter({"pirate": 0.5, "poet": 0.5})
    assert linear_shapes(full_lab.model) == before
    seen = []
    full_lab.compare("Hi", max_new_tokens=1, on_token=lambda _: seen.append(linear_shapes(full_lab.model)))
    assert seen
    assert all(one == before for one in seen)


@pytest.mark.parametrize(
    ("number", "count", "size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1 k", "1 kB"),
        (999_499, "999 k", "999 kB"),
        (999_600, "1 M", "1 MB"),
        (1_572_864, "1.57 M", "1.57 MB"),
        (331_196_416, "331 M", "331 MB"),
        (999_999_999, "1 B", "1 GB"),
        (1_234_000_000_000, "1234 B", "1234 GB"),
    ],
)
def test_numbers_as_people_say_them(number: int, count: str, size: str) -> None:
    assert (people_count(number), people_bytes(number)) == (count, size)


# ----- lab.parameters() -----


def of(frame: Any, owner: str, kind: str = "weights") -> Any:
    rows = frame[(frame["owner"] == owner) & (frame["kind"] == kind)]
    assert len(rows) == 1
    return rows.iloc[0]


SIZED: dict[str, Any] = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
    "rs": LoraConfig(r=3, use_rslora=True, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 5}),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["v_proj"]),
    "biased": LoraConfig(r=2, lora_bias=True, target_modules=["v_proj"]),
    "words": LoraConfig(r=2, target_modules=["embed_tokens"]),
    "tokens": LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[5, 6]),
    "ada": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
    "lokr": LoKrConfig(r=2, target_modules=["q_proj"]),
}


def untied() -> Any:
    return standins.tiny_llama(tie_word_embeddings=False)


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_an_adapter_are_plain_pefts_and_its_file(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain: Any = get_peft_model(untied().to(dtype), SIZED[method])
    learns = [(name, p) for name, p in plain.named_parameters() if p.requires_grad]
    apart = sum(p.numel() for name, p in learns if "modules_to_save" in name)
    lab = AdapterLab(untied().to(dtype), tokenizer=standins.tiny_tokenizer())
    lab.add_adapter(SIZED[method], "mine")
    frame = lab.parameters()
    mine = frame[frame["owner"] == "mine"]
    for column in ("parameters", "trainable", "effective"):
        assert mine[column].sum() == sum(p.numel() for _, p in learns), column
    assert (of(frame, "mine", "modules_to_save")["parameters"] if apart else 0) == apart
    base = sum(p.numel() for p in untied().parameters())
    assert mine["share_of_base"].sum() == pytest.approx(sum(p.numel() for _, p in learns) / base)
    file = lab.save_adapter("mine", tmp_path / "mine") / "adapter_model.safetensors"
    assert mine["bytes_on_disk"].tolist() == [file.stat().st_size, *[0] * (len(mine) - 1)]
    lab.set_trainable(None)
    assert lab.parameters()["trainable"].sum() == 0
    lab.delete_adapter("mine")
    name = lab.load_adapter(tmp_path / "mine")
    again = lab.parameters()
    assert again.loc[again["owner"] == name, "bytes_on_disk"].iloc[0] == file.stat().st_size
    assert again.loc[again["owner"] == name, "parameters"].sum() == sum(p.numel() for _, p in learns)


@pytest.mark.parametrize("make", [standins.tiny_opt, standins.tiny_llama, standins.tiny_gpt2, standins.tiny_t5])
def test_sizes_of_a_base_are_its_tensors_and_its_files(make: Any, tmp_path: Path) -> None:
    folder = standins.write_model(tmp_path / "base", make().to(torch.float16), standins.tiny_tokenizer())
    frame = AdapterLab(folder).parameters()
    plain = list(type(make()).from_pretrained(folder, dtype="auto").parameters())  # T5's has some in float32
    for dtype, rows in frame.groupby("dtype"):
        own = [p for p in plain if str(p.dtype) == f"torch.{dtype}"]
        assert rows["parameters"].tolist() == rows["effective"].tolist() == [sum(p.numel() for p in own)]
        assert rows["bytes"].tolist() == [sum(p.numel() * p.element_size() for p in own)]
    assert set(frame["dtype"]) == {str(p.dtype).removeprefix("torch.") for p in plain}
    assert (set(frame["trainable"]), frame["share_of_base"].sum()) == ({0}, 1.0)
    assert frame["bytes_on_disk"].sum() == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert AdapterLab(make(), tokenizer=standins.tiny_tokenizer()).parameters()["bytes_on_disk"].isna().all()


def test_the_file_of_a_base_in_shards(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    standins.tiny_llama().save_pretrained(folder, max_shard_size="60KB")
    standins.tiny_tokenizer().save_pretrained(folder)
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert len(files) > 1
    assert of(AdapterLab(folder).parameters(), "base")["bytes_on_disk"] == sum(files)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_has_a_row_for_each_dtype(quantization: Any, tmp_path: Path) -> None:
    folder = standins.write_model(tmp_path / "base", standins.tiny_llama(), standins.tiny_tokenizer())
    lab = AdapterLab(folder, quantization=quantization)
    frame, status = lab.parameters().set_index("dtype"), lab.status()
    plain = standins.tiny_llama()
    inner = [m.weight for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    count = sum(weight.numel() for weight in inner)
    if quantization == "8bit":
        small, expected = "int8", count + 4 * sum(len(weight) for weight in inner)
    else:  # half a byte each, one absmax for 64 of them, and the table of 16 values of each layer
        small, expected = "nf4", count // 2 + sum(4 * -(-weight.numel() // 64) + 4 * 16 for weight in inner)
    assert frame.loc[small, "parameters"] == count
    assert frame.loc[small, "bytes"] == expected
    assert frame["parameters"].sum() == sum(p.numel() for p in plain.parameters())
    assert frame["bytes_on_disk"].sum() == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lab.generate("Hi", max_new_tokens=1)
    assert lab.parameters().set_index("dtype").equals(frame), "the first forward moves the 8-bit scales to the layers"
    assert lab.status() == status
    lab.add_adapter("lora", "mine", target_modules=["q_proj"])  # PEFT's layers around them have the same names
    again = lab.parameters()
    assert again[again["owner"] == "base"].set_index("dtype").equals(frame)


SHARED = {
    "tokens": TrainableTokensConfig(token_indices=[1, 2, 7], target_modules=["embed_tokens"]),
    "lora and tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2, 7]),
    "randlora": RandLoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("method", SHARED)
def test_what_several_layers_share_is_counted_once(method: str) -> None:
    """Tokens trained on tied embeddings stand at both ends, RandLora's random bases in every layer."""
    plain: Any = get_peft_model(standins.tiny_llama(tie_word_embeddings=True), SHARED[method])
    named = [*plain.named_parameters(), *plain.named_buffers()]  # each once
    own = {tensor.data_ptr(): tensor.nbytes for name, tensor in named if "default" in name}
    learned = plain.get_nb_trainable_parameters()[0]
    lab = AdapterLab(standins.tiny_llama(tie_word_embeddings=True), tokenizer=standins.tiny_tokenizer())
    lab.add_adapter(SHARED[method], "mine")
    frame = lab.parameters()
    mine = frame[frame["owner"] == "mine"]
    assert mine["trainable"].sum() == learned
    assert mine["bytes"].sum() == sum(own.values())
    assert lab.adapters["mine"].parameters == learned
    assert lab.adapters["mine"].bytes == sum(own.values())
    memory = lab.memory()
    assert memory.loc[(memory["owner"] == "mine") & (memory["source"] == "measured"), "bytes"].sum() == sum(
        own.values()
    )
    compared = lab.compare("Hello", ["mine"], max_new_tokens=2)
    assert Comparison.concat([compared]).to_frame()["adapter_megabytes"].tolist() == [sum(own.values()) / 1e6]


def test_effective_leaves_out_what_adalora_pruned() -> None:
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    lab.add_adapter(SIZED["ada"], "ada")
    whole = of(lab.parameters(), "ada")
    assert whole["effective"] == whole["parameters"], "a fresh one has every λ at zero, and none taken away"
    gone = 0
    for index, module in enumerate(m for m in lab.model.modules() if hasattr(m, "lora_E")):
        with torch.no_grad():
            module.lora_E["ada"].copy_(torch.tensor([[1.0], [2.0], [0.0], [3.0]]) if index else torch.ones(4, 1))
        gone += bool(index) * (1 + module.in_features + module.out_features)  # type: ignore[operator]
    pruned = of(lab.parameters(), "ada")
    assert (pruned["parameters"], pruned["effective"]) == (whole["parameters"], whole["parameters"] - gone)
