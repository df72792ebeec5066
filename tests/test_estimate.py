"""What `AdapterLab.estimate` computes from configs, held against models that are really loaded, run and trained."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from standins import (
    OPT_350M,
    OPT_350M_FULL,
    OPT_350M_LORA,
    StandinHub,
    hub_environment,
    opt_config,
    tiny_bert,
    tiny_llama,
    tiny_mixtral,
    write_adapter,
    write_opt_350m,
    write_opt_350m_lora,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from adapterlab import AdapterLab, AdapterLabError
from adapterlab.blueprint import buffer_bytes, build, parameter_sizes, without_values
from adapterlab.inspection import count_bytes
from adapterlab.mounts import inject
from adapterlab.notices import AdapterLabWarning
from adapterlab.quantization import keep_4bit_unpacked

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from tensors import StorageCounter, storage_bytes

LAYERS = 5  # more than are run for an estimate
ROWS, LENGTH = 3, 40


def configs() -> dict[str, Any]:
    """Small, but with layers that outweigh their headers; five of each kind."""
    from transformers import GPT2Config, LlamaConfig, T5Config

    llama = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": False}
    t5 = {"num_decoder_layers": LAYERS - 1, "num_heads": 4, "decoder_start_token_id": 0, "vocab_size": 600}
    return {
        "opt": opt_config(
            hidden_size=64, ffn_dim=256, word_embed_proj_dim=32, vocab_size=600, num_hidden_layers=LAYERS
        ),
        "llama": LlamaConfig(
            hidden_size=64, intermediate_size=180, num_hidden_layers=LAYERS, vocab_size=600, pad_token_id=0, **llama
        ),
        "gpt2": GPT2Config(
            n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=600, n_positions=128, bos_token_id=1, eos_token_id=2
        ),
        "t5": T5Config(d_model=64, d_kv=16, d_ff=256, num_layers=LAYERS, **t5),
    }


CONFIGS = configs()
QUANTIZATIONS: dict[str, Any] = {
    "plain": None,
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "nf4, all": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["fc1", "q_proj"]},
}


def settings_of(name: str) -> Any:
    return None if QUANTIZATIONS[name] is None else BitsAndBytesConfig(**QUANTIZATIONS[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of random weights, saved by transformers."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        auto_class = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        auto_class.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def load(folder: Path, **keywords: Any) -> Any:
    """The model as transformers loads it."""
    auto_class = AutoModelForSeq2SeqLM if folder.name == "t5" else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, device_map="cpu", **keywords)
    keep_4bit_unpacked(model)
    return model


def size(frame: Any, case: str = "inference", owner: str | None = None, kind: str | None = None) -> int:
    """Bytes of a case, of one owner and kind if given."""
    here = frame["case"] == case
    here &= (frame["owner"] == owner) if owner else True
    here &= (frame["kind"] == kind) if kind else True
    return int(frame.loc[here, "bytes"].sum())


def count(frame: Any, owner: str, case: str = "inference") -> int:
    here = (frame["case"] == case) & (frame["owner"] == owner) & (frame["kind"] == "weights")
    (number,) = frame.loc[here, "parameters"]
    return int(number)


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


# ----- weights -----


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", "plain"), ("float16", "nf4"), *(("bfloat16", how) for how in QUANTIZATIONS)],
)
@pytest.mark.parametrize("family", list(CONFIGS))
def test_weights_take_what_the_loaded_model_takes(
    folders: dict[str, Path], family: str, dtype: str, quantization: str
) -> None:
    model = load(folders[family], dtype=dtype, quantization_config=settings_of(quantization))
    auto_class = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    plan = build(CONFIGS[family], auto_class, getattr(torch, dtype), settings_of(quantization))
    sizes = parameter_sizes(plan).values()
    data = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(size.data for size in sizes) == data
    assert sum(size.data + size.statistics for size in sizes) == sum(map(count_bytes, model.parameters()))
    assert buffer_bytes(plan) == sum(buffer.nbytes for buffer in model.buffers())
    assert plan.dtype == model.dtype  # which the KV cache goes by


@pytest.mark.parametrize(("quantization", "settings"), [(None, None), ("8bit", "int8"), ("4bit", "nf4")])
def test_the_shorthands_mean_what_they_mean_for_a_lab(
    folders: dict[str, Path], quantization: Any, settings: str | None
) -> None:
    frame = AdapterLab.estimate(folders["llama"], quantization=quantization, context=8)
    model = load(folders["llama"], quantization_config=settings_of(settings or "plain"))
    assert size(frame, owner="base", kind="weights") == sum(p.nbytes for p in model.parameters())
    statistics = sum(count_bytes(p) - p.nbytes for p in model.parameters())
    assert size(frame, owner="base", kind="quantization") == statistics
    assert (size(frame, owner="base", kind="quantization") > 0) is (quantization is not None)


def test_parameters_are_those_of_the_plain_model_whatever_the_quantization(folders: dict[str, Path]) -> None:
    plain = sum(p.numel() for p in load(folders["llama"]).parameters())
    for quantization in (None, "8bit", "4bit"):
        assert count(AdapterLab.estimate(folders["llama"], quantization=quantization, context=8), "base") == plain


def test_the_dtype_is_that_of_the_config_or_the_one_given(folders: dict[str, Path]) -> None:
    plain = sum(p.numel() for p in load(folders["opt"]).parameters())
    config = copy.deepcopy(CONFIGS["opt"])
    for dtype, given, width in ((None, "auto", 4), (torch.bfloat16, "auto", 2), (torch.bfloat16, "float32", 4)):
        config.dtype = dtype
        assert size(AdapterLab.estimate(config, dtype=given, context=8), kind="weights") == plain * width


def test_a_config_of_weights_that_are_quantised_already(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["opt"], dtype="bfloat16", quantization_config=settings_of("nf4 twice"))
    model.save_pretrained(tmp_path)
    frame = AdapterLab.estimate(tmp_path, context=8)
    measured = sum(map(count_bytes, load(tmp_path).parameters()))
    assert size(frame, owner="base") - size(frame, owner="base", kind="buffers") == measured
    assert size(AdapterLab.estimate(model, context=8), owner="base") == size(frame, owner="base")
    with pytest.raises(AdapterLabError, match="quantized already"):
        AdapterLab.estimate(tmp_path, quantization="4bit")


def test_another_quantizer_is_refused() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(AdapterLabError, match="quantised by gptq"):
        AdapterLab.estimate(config)


# ----- adapters -----


def adapter_configs() -> dict[str, Any]:
    from peft import AdaLoraConfig, IA3Config, LoHaConfig

    return {
        "lora": lora(),
        "patterned": lora(target_modules=["q_proj", "fc2"], rank_pattern={"fc2": 7}, layers_to_transform=[1, 3]),
        "dora": lora(use_dora=True),
        "head": lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "ia3": IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
        "ada": AdaLoraConfig(init_r=6, target_r=3, total_step=20, target_modules=["q_proj", "v_proj"]),
        "loha": LoHaConfig(r=3, target_modules=["q_proj"]),
    }


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "float32") for kind in adapter_configs()), ("lora", "bfloat16"), ("head", "bfloat16")]
)
def test_an_adapter_takes_what_peft_makes(folders: dict[str, Path], kind: str, dtype: str) -> None:
    config = adapter_configs()[kind]
    model = load(folders["opt"], dtype=dtype)
    before = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    inject(config, model, "one")
    parameters = [p for p in model.parameters() if id(p) not in before]
    buffers = [b for b in model.buffers() if id(b) not in before]
    frame = AdapterLab.estimate(folders["opt"], {"one": config}, dtype=dtype, context=8)
    assert count(frame, "one") == sum(p.numel() for p in parameters if p.requires_grad) > 0
    assert size(frame, owner="one") == sum(t.nbytes for t in (*parameters, *buffers))


def test_lora_by_the_formula(folders: dict[str, Path]) -> None:
    sizes = {"q_proj": (64, 64), "v_proj": (64, 64), "fc1": (64, 256)}
    frame = AdapterLab.estimate(folders["opt"], [lora(target_modules=list(sizes))], quantization="4bit", context=8)
    expected = LAYERS * sum(4 * (n_in + n_out) for n_in, n_out in sizes.values())
    assert count(frame, "lora") == expected
    assert size(frame, owner="lora") == 4 * expected  # float32 whatever the base is in


def test_names_are_made_from_methods_and_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "pirate", load(folders["opt"]), lora())
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    (folder / "adapter_model.safetensors").unlink()  # it is not looked at
    frame = AdapterLab.estimate(folders["opt"], ["lora", lora(), "lora", folder, str(folder)], context=8)
    owners = [owner for owner in dict.fromkeys(frame["owner"]) if owner not in ("base", "run")]
    assert owners == ["lora", "lora-2", "lora-3", "pirate", "pirate-2"]
    assert count(frame, "pirate") == count(frame, "lora-2")
    assert list(dict.fromkeys(AdapterLab.estimate(folders["opt"], lora(), context=8)["owner"])) == [
        "base",
        "lora",
        "run",
    ]


# ----- while it generates -----


def test_the_kv_cache_has_a_row_for_each_column_and_prompt() -> None:
    one = 2 * LAYERS * 2 * 16 * 4  # keys and values, layers, key heads, their width, float32
    for asked, rows in (
        ({"columns": 1}, 1),
        ({}, 3),
        ({"columns": 5, "prompts": 2}, 10),
    ):
        frame = AdapterLab.estimate(CONFIGS["llama"], {"a": lora(), "b": lora()}, context=50, **asked)
        assert size(frame, owner="run", kind="KV cache") == rows * 50 * one


@pytest.mark.parametrize(
    ("family", "attention"), [("opt", "sdpa"), ("llama", "sdpa"), ("llama", "eager"), ("gpt2", "eager"), ("t5", "sdpa")]
)
def test_a_prefill_takes_what_is_measured(folders: dict[str, Path], family: str, attention: str) -> None:
    model = load(folders[family], attn_implementation=attention)
    ids = torch.randint(5, 600, (ROWS, 100))
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    inputs |= {"decoder_input_ids": ids[:, :1]} if family == "t5" else {"logits_to_keep": 1}
    with torch.no_grad():
        model(**inputs)
        with StorageCounter() as counter:
            model(**inputs)
    frame = AdapterLab.estimate(folders[family], columns=ROWS, context=100, attn_implementation=attention)
    assert size(frame, kind="activations") == pytest.approx(counter.peak - counter.before, rel=0.02)
    assert size(frame, kind="logits") == 2 * 4 * ROWS * 600


# ----- while it learns -----


def measure_step(model: Any, *, checkpointing: bool = False, autocast: Any = None) -> tuple[int, int]:
    """(bytes of the optimizer's state, bytes at the peak of a step beyond what was there before) of a plain loop."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(5, 600, (ROWS, LENGTH))

    def step() -> None:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    states = storage_bytes(value for state in optimizer.state.values() for value in state.values())
    with StorageCounter() as counter:
        step()
    return states, counter.peak - counter.before


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "checkpointing"), [("opt", False), ("llama", True), ("gpt2", False), ("t5", False)])
def test_full_fine_tuning_takes_what_is_measured(folders: dict[str, Path], family: str, checkpointing: bool) -> None:
    states, peak = measure_step(load(folders[family]).requires_grad_(True), checkpointing=checkpointing)
    asked = {"batch_size": ROWS, "length": LENGTH, "gradient_checkpointing": checkpointing, "context": 8}
    frame = AdapterLab.estimate(folders[family], training=True, **asked)
    case = "full fine-tuning"
    assert size(frame, case, "base", "optimizer") == states
    found = size(frame, case, "run") + size(frame, case, "base", "gradients")
    assert found == pytest.approx(peak, rel=0.03)


TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "8-bit": {"quantization": "8bit"},
    "4-bit": {"quantization": "4bit"},
    "4-bit, checkpointing": {"quantization": "4bit", "checkpointing": True},
    "half": {"dtype": "bfloat16"},
    "mixed": {"dtype": "bfloat16", "autocast": torch.bfloat16},
}
TRAINED = [("llama", how) for how in TRAININGS if how not in ("4-bit", "checkpointing")] + [
    ("opt", "plain"),
    ("opt", "4-bit, checkpointing"),
    ("gpt2", "mixed"),
    ("gpt2", "8-bit"),
    ("t5", "4-bit"),
]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize(("family", "how"), TRAINED)
def test_training_a_lora_takes_what_is_measured(folders: dict[str, Path], family: str, how: str) -> None:
    asked = TRAININGS[how]
    dtype, autocast = asked.get("dtype", "float32"), asked.get("autocast")
    settings = {"8bit": settings_of("int8"), "4bit": settings_of("nf4")}.get(asked.get("quantization", ""))
    model = load(folders[family], dtype=dtype, quantization_config=settings).requires_grad_(False)
    inject(lora(lora_dropout=0.1), model, "one")
    states, peak = measure_step(model, checkpointing=asked.get("checkpointing", False), autocast=autocast)
    frame = AdapterLab.estimate(
        folders[family],
        {"one": lora(lora_dropout=0.1)},
        quantization=asked.get("quantization"),
        training=True,
        dtype=dtype,
        batch_size=ROWS,
        length=LENGTH,
        gradient_checkpointing=asked.get("checkpointing", False),
        mixed_precision="no" if autocast is None else "bf16",
        context=8,
    )
    case = "training one"
    assert size(frame, case, "one", "optimizer") == states
    found = size(frame, case, "run") + size(frame, case, "one", "gradients")
    assert found == pytest.approx(peak, rel=0.04)
    assert size(frame, case, "base") == size(frame, "inference", "base")


@pytest.mark.parametrize("kind", ["patterned", "dora", "ia3", "ada"])
def test_training_other_adapters_takes_what_is_measured(folders: dict[str, Path], kind: str) -> None:
    config = adapter_configs()[kind]
    model = load(folders["opt"]).requires_grad_(False)
    inject(config, model, "one")
    states, peak = measure_step(model)
    frame = AdapterLab.estimate(
        folders["opt"], {"one": config}, training=True, batch_size=ROWS, length=LENGTH, context=8
    )
    found = size(frame, "training one", "run") + size(frame, "training one", "one", "gradients")
    assert size(frame, "training one", "one", "optimizer") == states
    assert found == pytest.approx(peak, rel=0.04)
    averages = 2 * 4 * count(frame, "one", "training one") if kind == "ada" else 0
    assert size(frame, "training one", "one", "allocation") == averages


def test_the_step_itself_is_the_peak_where_gradients_outweigh_the_rest(folders: dict[str, Path]) -> None:
    frame = AdapterLab.estimate(folders["opt"], training=True, batch_size=1, length=1, context=8)
    case = "full fine-tuning"
    assert size(frame, case, "base", "gradients") >= size(frame, case, "base", "weights")


def test_copies_of_modules_learn_in_float32(folders: dict[str, Path]) -> None:
    config = adapter_configs()["head"]
    frame = AdapterLab.estimate(
        folders["opt"], {"one": config}, training=True, dtype="bfloat16", batch_size=1, length=8, context=8
    )
    copied, learnt = 600 * 32, LAYERS * 4 * (64 + 64)
    assert count(frame, "one") == copied + learnt
    assert size(frame, "inference", "one") == 2 * copied + 4 * learnt
    assert size(frame, "training one", "one", "weights") == 4 * (copied + learnt)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_a_few_layers_tell_of_all(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as if every layer had run, also where layers differ from each other."""
    from adapterlab import dryrun

    settings: dict[str, Any] = {"training": True, "batch_size": 2, "length": 24, "context": 24}
    targets = ["q", "wo"] if family == "t5" else ["q_proj", "v_proj"]
    uneven = lora(target_modules=targets, layers_to_transform=None if family == "t5" else [0, 2, 3, 4])
    few = AdapterLab.estimate(CONFIGS[family], [uneven], **settings)
    monkeypatch.setattr(dryrun, "_FEW", 100)
    every = AdapterLab.estimate(CONFIGS[family], [uneven], **settings)
    learning = few["case"] != "inference"
    assert few.loc[learning, "bytes"].tolist() == pytest.approx(every.loc[learning, "bytes"].tolist(), rel=0.01)


def test_experts_are_estimated_too() -> None:
    attention = lora(target_modules=["q_proj", "v_proj"])
    frame = AdapterLab.estimate(tiny_mixtral().config, attention, training=True, batch_size=2, length=16, context=16)
    assert frame["bytes"].notna().all()
    assert size(frame, "training lora", "run", "activations") > 0


def test_a_model_that_needs_values_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.opt.modeling_opt import OPTForCausalLM

    forward = OPTForCausalLM.forward

    def asks(self: Any, input_ids: Any = None, **keywords: Any) -> Any:
        return forward(self, input_ids=input_ids, **keywords) if int(input_ids.sum()) == 0 else None

    monkeypatch.setattr(OPTForCausalLM, "forward", asks)
    with pytest.warns(AdapterLabWarning, match="The activations of .* are not known: OPTForCausalLM can't be run"):
        frame = AdapterLab.estimate(CONFIGS["opt"], training=True, context=8)
    assert frame.loc[frame["kind"] == "activations", "bytes"].isna().all()
    everything = size(frame, "full fine-tuning", "base", "weights")
    assert size(frame, "full fine-tuning", "base", "gradients") == everything


# ----- nothing is fetched, made or changed -----


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    repos = {
        OPT_350M: write_opt_350m(tmp_path / "opt"),
        OPT_350M_LORA: write_opt_350m_lora(tmp_path / "lora"),
    }
    with StandinHub(repos) as hub, hub_environment(tmp_path / "cache", url=hub.url):
        yield hub


def fetched(hub: Any) -> set[str]:
    return {request.rsplit("/", 1)[1] for request in hub.requests if "/resolve/" in request}


def test_only_the_config_of_a_hub_model_is_fetched(hub: Any, tmp_path: Path) -> None:
    frame = AdapterLab.estimate(OPT_350M, [OPT_350M_LORA], context=8, training=True, length=8)
    assert fetched(hub) == {"config.json", "adapter_config.json"}
    lab = AdapterLab(OPT_350M_LORA, device_map="cpu")
    (name,) = lab.adapters
    sizes = lab.parameters()
    base = int(sizes.loc[sizes["owner"] == "base", "bytes"].sum())
    assert size(frame, owner="base", kind="weights") == base
    assert count(frame, name) == lab.adapters[name].parameters
    lab.close()


def test_an_adapters_id_stands_for_its_base_and_itself(hub: Any) -> None:
    named = AdapterLab.estimate(OPT_350M_LORA, context=8)
    assert fetched(hub) == {"config.json", "adapter_config.json"}
    assert named.equals(AdapterLab.estimate(OPT_350M, [OPT_350M_LORA], context=8))
    with pytest.raises(AdapterLabError, match="no revision 'v9'"):
        AdapterLab.estimate(OPT_350M, revision="v9")
    with pytest.raises(AdapterLabError, match=r"no 'facebook/opt-350\(m\)'|neither a folder here nor a Hub id"):
        AdapterLab.estimate("facebook/opt-350(m)")


def test_offline_the_cache_answers(tmp_path: Path) -> None:
    with (
        hub_environment(tmp_path / "cache", offline=True),
        pytest.raises(AdapterLabError, match="HF_HUB_OFFLINE is set"),
    ):
        AdapterLab.estimate(OPT_350M)


def test_what_is_given_stays_as_it_was(folders: dict[str, Path]) -> None:
    model, adapter, config = tiny_llama(), lora(), copy.deepcopy(CONFIGS["llama"])
    config.dtype = torch.bfloat16
    before = [copy.deepcopy(thing.to_dict()) for thing in (model.config, adapter, config)]
    modules = dict(model.named_modules())
    for given in (model, config):
        AdapterLab.estimate(given, [adapter], training=True, quantization="4bit", length=8, context=8)
    assert [thing.to_dict() for thing in (model.config, adapter, config)] == before
    assert dict(model.named_modules()) == modules
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())
    assert torch.get_default_dtype() == torch.float32


class RealStorages(StorageCounter):
    """Of tensors that say they lie on the CPU, those that do."""

    def _count(self, tensor: torch.Tensor, label: str) -> None:
        if tensor.untyped_storage().device.type != "meta":
            super()._count(tensor, label)


def test_no_weights_are_made() -> None:
    """Of the full opt-350m, 1.3 GB in float32, no more than what is drawn for small tables."""
    config = opt_config(**OPT_350M_FULL)
    with RealStorages() as counter:
        frame = AdapterLab.estimate(config, ["lora"], "4bit", True, length=64, context=64)
    assert count(frame, "base") == 331_196_416
    assert count(frame, "lora") == 24 * 2 * 8 * (1024 + 1024)
    assert counter.peak - counter.before < 1_000_000


def test_the_transformers_that_others_see_is_put_back() -> None:
    from transformers import masking_utils

    before = dict(vars(masking_utils))
    AdapterLab.estimate(CONFIGS["llama"], training=True, length=8, context=8)
    assert dict(vars(masking_utils)) == before


# ----- what can't be -----


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"context": 0, "batch_size": 2.5}, "context=0 is no whole number.*batch_size=2.5 is no whole number"),
        ({"context": 4096, "length": 129}, "context=4096 is more than the 128.*length=129 is more"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8' is none of"),
        ({"quantization": "3bit"}, "quantization='3bit' is unknown"),
        ({"quantization": "4bit", "quantization_config": object()}, "give one of them"),
        ({"quantization_config": object()}, "quantization_config= is a object"),
        ({"dtype": "float7"}, "dtype='float7' is unknown"),
        ({"revision": "main"}, "revision= belongs to a model's id"),
        ({"adapters": ["lorra"]}, "'lorra' is no PEFT method"),
        ({"adapters": [lora(target_modules=["nowhere"])]}, "'lora' can't be put into OPTConfig: .*nowhere"),
        ({"adapters": 5}, "adapters=5 names none: give a method's name"),
        ({"adapters": {"": "lora"}}, "can't be an adapter's name"),
        ({"adapters": ["prompt_tuning"]}, "PromptTuningConfig|PROMPT_TUNING"),
        ({"attn_implementation": "nonsense"}, "OPTConfig can't be built from its config: .*nonsense"),
    ],
)
def test_mistakes_are_said(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterLabError, match=said):
        AdapterLab.estimate(CONFIGS["opt"], **keywords)


def test_no_adapters_in_whatever_words() -> None:
    pd.testing.assert_frame_equal(
        AdapterLab.estimate(CONFIGS["opt"], adapters=None), AdapterLab.estimate(CONFIGS["opt"], adapters=[])
    )


def test_an_encoder_and_a_plain_module_are_refused() -> None:
    with pytest.raises(AdapterLabError, match="generates no text"):
        AdapterLab.estimate(tiny_bert().config)
    with pytest.raises(AdapterLabError, match="no model that a lab can work with"):
        AdapterLab.estimate(nn.Linear(2, 2))


def test_code_of_a_repository_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(AdapterLabError, match="contains custom code"):
        AdapterLab.estimate(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_stand_over_packed_weights_is_said() -> None:
    from peft import LoHaConfig

    with pytest.raises(AdapterLabError, match=r"'loha' can't be put into OPTConfig: .*4-bit weights are packed"):
        AdapterLab.estimate(CONFIGS["opt"], [LoHaConfig(r=3, target_modules=["q_proj"])], "4bit")


def test_without_values_nothing_is_drawn_and_afterwards_it_is() -> None:
    before = torch.get_rng_state()
    with without_values():
        layer = nn.Linear(3, 4)
        assert nn.init.kaiming_uniform_(tensor=layer.weight, a=5**0.5) is layer.weight
        assert nn.init.normal_(layer.bias, 0.0, 1.0) is layer.bias
    assert layer.weight.is_meta
    assert layer.bias.is_meta
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    found = nn.Linear(3, 4).weight
    torch.manual_seed(0)
    expected = torch.empty(4, 3).uniform_(-(3**-0.5), 3**-0.5)  # what torch documents for a linear layer
    assert torch.equal(found, expected)
