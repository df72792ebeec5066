"""Digests are of content: every byte counts, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import IA3Config, LoraConfig, PeftModel
from tiny_adapters import adapter_configs
from torch import nn

from adapterlab import fingerprints
from adapterlab.fingerprints import adapter_digest, base_digest, tensors_digest
from adapterlab.mounts import Mounts
from adapterlab.reading import AdapterReader, adapter_tensors

WEIGHT = "model.layers.0.mlp.up_proj"


def layers_of(config: Any, name: str = "a", seed: int = 0, model: Any = None) -> dict[str, nn.Module]:
    """PEFT's layers of one adapter with random weights, by path."""
    mounted = Mounts(model if model is not None else standins.tiny_llama()).inject(config, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mounted.trainable:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mounted.layers


@pytest.fixture
def layers() -> dict[str, nn.Module]:
    return layers_of(adapter_configs()["wide"])


@pytest.fixture
def several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


# ----- adapters -----


@pytest.mark.parametrize("kind", ["pirate", "wide", "poet", "ada", "dora"])
def test_every_value_of_an_adapter_counts(kind: str) -> None:
    layers = layers_of(adapter_configs()[kind])
    reader = AdapterReader(layers, "a")
    seen = {reader.digest()}
    for _, tensor in adapter_tensors(layers.values(), "a"):
        flat = tensor.detach().view(-1)  # of the same memory
        for place in (0, len(flat) - 1):
            before = flat[place].clone()
            flat[place] += 1
            changed = reader.digest()
            assert changed not in seen
            assert adapter_digest(layers, "a") == changed
            flat[place] = before
    assert reader.digest() in seen, "taken back, it is the first again"


def test_the_name_and_the_base_are_no_part_of_it() -> None:
    config = adapter_configs()["wide"]
    digest = adapter_digest(layers_of(config, "a"), "a")
    assert adapter_digest(layers_of(config, "zebra"), "zebra") == digest
    assert adapter_digest(layers_of(config, model=standins.tiny_llama(seed=9)), "a") == digest
    assert adapter_digest(layers_of(config, seed=1), "a") != digest


def test_how_the_values_lie_in_memory_does_not_count(layers: dict[str, nn.Module]) -> None:
    reader = AdapterReader(layers, "a")
    digest = reader.digest()
    for layer in layers.values():
        own: Any = layer
        A, B = own.lora_A["a"].weight, own.lora_B["a"].weight
        B.data = B.data.T.contiguous().T
        stack = torch.zeros(3, 7, A.shape[1] + 2)
        stack[1, : len(A), 1:-1] = A.data
        A.data = stack[1, : len(A), 1:-1]
        assert not A.is_contiguous()
    assert reader.digest() == adapter_digest(layers, "a") == digest


def test_shape_and_dtype_count(layers: dict[str, nn.Module]) -> None:
    reader = AdapterReader(layers, "a")
    own: Any = layers[WEIGHT]
    A = own.lora_A["a"].weight.requires_grad_(False)
    before, shape = A.data, A.shape
    seen = {reader.digest()}
    for other in (before.reshape(shape[1], shape[0]), before.view(torch.int32), before.bfloat16(), before[None]):
        A.data = other
        assert reader.digest() not in seen
        seen.add(reader.digest())
    assert len(seen) == 5


def put_scaling(layer: Any) -> None:
    layer.scaling["a"] *= 2


def put_scalings(layer: Any) -> None:
    layer.scaling = {"a": 7.0}


def put_parameter(layer: Any) -> None:
    layer.lora_A["a"].weight = nn.Parameter(layer.lora_A["a"].weight.detach() + 1)


def put_module(layer: Any) -> None:
    new = nn.Linear(layer.lora_A["a"].in_features, len(layer.lora_A["a"].weight), bias=False)
    new.weight.data.fill_(0.5)
    layer.lora_A["a"] = new


def put_dict(layer: Any) -> None:
    other = nn.ModuleDict({"a": nn.Linear(layer.lora_A["a"].in_features, 3, bias=False)})
    other["a"].weight.data.fill_(0.25)
    layer.lora_A = other


def put_bias(layer: Any) -> None:
    layer.lora_B["a"].bias = nn.Parameter(torch.ones(layer.lora_B["a"].out_features))


def take_tensor(layer: Any) -> None:
    layer.lora_A["a"].weight = None


def take_module(layer: Any) -> None:
    del layer.lora_A["a"]


DOORS: list[Callable[[Any], None]] = [
    put_scaling, put_scalings, put_parameter, put_module, put_dict, put_bias, take_tensor, take_module,
]  # fmt: skip


@pytest.mark.parametrize("change", DOORS, ids=lambda change: change.__name__)
def test_a_reader_remembers_places_and_never_what_is_there(
    layers: dict[str, nn.Module], change: Callable[[Any], None]
) -> None:
    reader = AdapterReader(layers, "a")
    before = reader.digest()
    change(layers[WEIGHT])
    after = reader.digest()
    assert after != before
    assert after == AdapterReader(layers, "a").digest()


def test_ia3_on_the_way_in_is_not_ia3_on_the_way_out() -> None:
    """A square layer: the same vector of the same length, scaling what comes in or what goes out."""
    square = {"target_modules": ["q_proj"]}
    inside = layers_of(IA3Config(**square, feedforward_modules=["q_proj"]))
    outside = layers_of(IA3Config(**square, feedforward_modules=[]))
    for one, other in zip(inside.values(), outside.values()):
        flat = torch.linspace(0.5, 1.5, standins.HIDDEN)
        for layer in (one, other):
            own: Any = layer
            own.ia3_l["a"].data = flat[None].clone()
    assert adapter_digest(inside, "a") != adapter_digest(outside, "a")


def test_both_adapters_of_nested_expert_layers_count() -> None:
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )  # PEFT puts one layer around the other
    layers = layers_of(config, model=standins.tiny_mixtral())
    assert any("base_layer" in key for key, _ in adapter_tensors(layers.values(), "a"))
    digest = adapter_digest(layers, "a")
    for _, tensor in adapter_tensors(layers.values(), "a"):
        tensor.data.view(-1)[0] += 1
        changed = adapter_digest(layers, "a")
        assert changed != digest
        digest = changed


def test_the_scalings_of_nested_expert_layers_count() -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    layers = layers_of(config, model=standins.tiny_mixtral())
    seen = {adapter_digest(layers, "a")}
    for layer in layers.values():
        outer: Any = layer
        for one in (outer, outer.base_layer):
            one.scaling["a"] *= 3
            seen.add(adapter_digest(layers, "a"))
    assert len(seen) == 1 + 2 * len(layers)


def test_which_tokens_are_trained_counts() -> None:
    layers = layers_of(LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6]))
    before = adapter_digest(layers, "a")
    wrapper: Any = layers["model.embed_tokens"]
    wrapper.token_adapter.token_indices["a"] = [6, 5]
    assert adapter_digest(layers, "a") != before
    wrapper.token_adapter.token_indices["a"] = [5, 6]
    assert adapter_digest(layers, "a") == before


def test_a_digest_is_that_of_the_file_through_plain_peft(tmp_path: Path) -> None:
    """The lab's layers and PeftModel's, wrapped otherwise, hold the same tensors."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = adapter_configs()["wide"]
    folder = standins.write_adapter(tmp_path / "x", standins.tiny_llama(), config, seed=4)
    plain = PeftModel.from_pretrained(standins.tiny_llama(), folder, adapter_name="mine").get_base_model()
    theirs = {path: layer for path, layer in plain.named_modules() if isinstance(layer, BaseTunerLayer)}
    from adapterlab import AdapterLab

    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    lab.load_adapter(folder, "yours")
    assert adapter_digest(theirs, "mine") == lab.compare("Hi", ["yours"], max_new_tokens=1)["yours"].weights_digest


# ----- the base -----


def test_every_value_of_the_base_counts() -> None:
    model = standins.tiny_llama()
    before = base_digest(model)
    seen = {before}
    for tensor in [*model.parameters(), *model.buffers()]:
        flat = tensor.detach().view(-1)
        for place in (0, len(flat) - 1):
            kept = flat[place].clone()
            flat[place] += 1
            changed = base_digest(model)
            assert changed not in seen
            seen.add(changed)
            flat[place] = kept
    assert base_digest(model) == before


def test_exchanges_that_keep_every_sum_are_seen() -> None:
    model = standins.tiny_llama()
    weight = model.lm_head.weight.data
    before = base_digest(model)
    weight[:2, :2] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    one = base_digest(model)
    weight[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert len({before, one, base_digest(model)}) == 3


def test_names_and_ties_count() -> None:
    model, tied = standins.tiny_llama(), standins.tiny_llama()
    digest = base_digest(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert base_digest(model) != digest
    tied.model.embed_tokens.weight.data.copy_(tied.lm_head.weight)
    apart = base_digest(tied)
    tied.model.embed_tokens.weight = tied.lm_head.weight
    assert base_digest(tied) != apart


def test_threads_change_nothing(several_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [standins.tiny_llama(), standins.tiny_t5(), standins.tiny_gpt2().bfloat16()]
    shared = [base_digest(model) for model in models]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [base_digest(model) for model in models] == shared


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64],
)
def test_tensors_of_any_kind(dtype: torch.dtype) -> None:
    values = torch.arange(24).remainder(2).reshape(4, 6).to(dtype)
    digest = tensors_digest([values])
    assert tensors_digest([values.T.contiguous().T]) == digest
    assert tensors_digest([values.T]) != digest, "another shape"
    other = values.clone()
    other.view(torch.uint8)[-1, -1] ^= 1
    assert tensors_digest([other]) != digest
    assert tensors_digest([values.reshape(-1)[:0]]) != tensors_digest([values.reshape(-1)[0]])


def test_what_lies_elsewhere_counts_by_its_shape() -> None:
    with torch.device("meta"):
        one, other = nn.Linear(2, 3), nn.Linear(3, 2)
    assert base_digest(one) != base_digest(other)
    assert base_digest(one) == base_digest(nn.Linear(2, 3, device="meta"))


def test_block_sums_see_changes_and_most_exchanges() -> None:
    """What stands for the content on a GPU, computed here on the CPU."""
    values = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))

    def sums() -> list[list[int]]:
        return [part.tolist() for part in fingerprints._block_sums(values)]

    before = sums()
    values[[0, 1]] = values[[1, 0]]
    exchanged = sums()
    assert exchanged != before
    values[299, 699] += 1e-6
    assert sums() != exchanged
