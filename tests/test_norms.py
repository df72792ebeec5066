"""What the weights do. The oracle is the explicit ΔW: plain PEFT's merged weight minus the fresh model's, in float64."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from test_rows_architectures import ARCHITECTURES, adapter_configs, maker, write_plain
from test_rows_architectures import pytestmark as pytestmark  # plain PEFT's remarks, with the reasons
from test_rows_offload import all_on_disk, anatomy
from test_rows_quantised import SIZES, quantisations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapterlab import AdapterLab, AdapterLabError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import norms as benchmark

BUILDERS = ["tiny_opt", "tiny_llama", "tiny_gpt2", "tiny_t5"]
# Norms of W are sums in float32; PEFT's divisor in AdaLoRA and its scaling in LoHa are float32 too. The rest is exact.
CLOSE = {"ia3": 1e-6, "dora": 1e-6, "ada": 1e-7, "cut": 1e-7, "loha": 1e-7, "loha-wide": 1e-7}
COLUMNS = ["layer", "module", "path", "norm", "relative_norm", "effective_rank", "rank", "singular_values"]
COLUMNS += ["scale_min", "scale_mean", "scale_max", "note"]


def all_configs(builder: str) -> dict[str, Any]:
    """An adapter of each kind: those of the equation, and LoHa and LoKr where PEFT has them."""
    from peft import LoHaConfig, LoKrConfig

    where = ARCHITECTURES[builder]
    configs = adapter_configs(where)
    if not where.transposed:  # PEFT has neither for Conv1D
        targets = where.targets
        configs |= {
            "loha": LoHaConfig(r=3, alpha=5, target_modules=targets),
            "loha-wide": LoHaConfig(r=7, alpha=5, target_modules=targets),  # 49 columns, more than the layer's 32
            "lokr": LoKrConfig(r=2, alpha=3, target_modules=targets),
            "lokr-full": LoKrConfig(r=40, alpha=3, target_modules=targets),
            "lokr-both": LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=targets),
        }
    return configs


def explicit(plain: Any, fresh: Any) -> dict[str, torch.Tensor]:
    """ΔW of each layer that an adapter changes, (out, in), float64; `plain` is a PeftModel, `fresh` the same bare model."""
    twin = copy.deepcopy(plain).double()
    for layer in twin.modules():  # T5 has no bias to merge a lora_bias into, and ΔW is the weight's alone
        if isinstance(getattr(layer, "lora_bias", None), dict):
            layer.lora_bias.update(dict.fromkeys(layer.lora_bias, False))
    merged = weights_of(twin.merge_and_unload())
    before, found = weights_of(fresh), {}
    for key, weight in merged.items():
        delta = weight - before[key]
        if key.endswith(".weight") and delta.any():
            path = key.removesuffix(".weight")
            transposed = type(fresh.get_submodule(path)).__name__ in ("Conv1D", "Embedding")
            found[path] = delta.T if transposed else delta
    return found


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {key: parameter.detach().double() for key, parameter in model.named_parameters()}


def opened(builder: str = "tiny_llama", **changes: Any) -> AdapterLab:
    seq2seq = ARCHITECTURES[builder].seq2seq
    return AdapterLab(maker(builder)(**changes), tokenizer=standins.tiny_tokenizer(seq2seq=seq2seq))


def layer_of(lab: AdapterLab, name: str, ending: str) -> Any:
    """PEFT's layer of an adapter, at the path that ends so."""
    layers = lab._adapters.mounts.adapters[name].layers
    return next(layer for path, layer in layers.items() if path.endswith(ending))


def spread(values: torch.Tensor) -> float:
    """The effective rank by its formula."""
    shares = [float(v) for v in values.square() / values.square().sum() if v > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


# ----- norms and singular values -----


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_number_is_that_of_the_explicit_delta(builder: str, tmp_path: Path) -> None:
    lab, expected = opened(builder), {}
    for seed, (name, config) in enumerate(all_configs(builder).items(), start=1):
        mask = name in ("ada", "cut")
        plain = write_plain(tmp_path / name, maker(builder)(), config, seed, mask=mask, cut=name == "cut")
        expected[name] = explicit(plain, maker(builder)())
        lab.load_adapter(tmp_path / name, name)  # so that most layers have several adapters, in stacks
    weights = weights_of(maker(builder)())
    for name, deltas in expected.items():
        frame = lab.delta_norms(name)
        assert list(frame.path) == list(lab._adapters.mounts.adapters[name].layers)
        assert set(frame.path) == set(deltas), name
        assert (frame.norm > 0.01).all(), "they do act"
        assert frame.note.str.contains("formed").all() == (name == "loha-wide")
        for row in frame.itertuples():
            delta = deltas[row.path]
            close = CLOSE.get(name, 1e-11)
            norm = float(delta.norm())
            assert row.norm == pytest.approx(norm, rel=close), name
            assert row.relative_norm == pytest.approx(norm / float(weights[f"{row.path}.weight"].norm()), rel=1e-6)
            if name not in ("ia3", "dora"):
                values = torch.linalg.svdvals(delta)
                assert len(row.singular_values) == row.rank <= len(values)
                ours = torch.tensor(row.singular_values, dtype=torch.float64)
                assert float((ours - values[: row.rank]).abs().max()) < close * float(values[0])
                assert float(values[row.rank :].norm()) < 1e-12 * norm, "nothing is left out"
                assert row.effective_rank == pytest.approx(spread(values), rel=1e-6)


def test_the_columns_and_what_is_missing(full_lab: AdapterLab) -> None:
    frame = full_lab.delta_norms("pirate")
    assert list(frame.columns) == COLUMNS
    assert str(frame.dtypes["layer"]) == str(frame.dtypes["rank"]) == "Int64"
    assert list(zip(frame.layer, frame.module)) == [(0, "q_proj"), (0, "v_proj"), (1, "q_proj"), (1, "v_proj")]
    assert isinstance(frame.singular_values[0], tuple)
    assert all(type(value) is float for value in frame.singular_values[0])
    assert list(frame.singular_values[0]) == sorted(frame.singular_values[0], reverse=True)
    assert frame[["scale_min", "scale_mean", "scale_max"]].isna().all(axis=None)
    assert list(full_lab.delta_norms("wide").set_index("path").loc["model.layers.1.mlp.down_proj", ["rank"]]) == [5]
    ia3 = full_lab.delta_norms("poet")
    assert ia3["rank"].isna().all()
    assert ia3.effective_rank.isna().all()
    assert set(ia3.singular_values) == {()}
    scales = layer_of(full_lab, "poet", "1.mlp.down_proj").ia3_l["poet"]
    row = ia3[ia3.path == "model.layers.1.mlp.down_proj"].iloc[0]
    assert [row.scale_min, row.scale_max] == [float(scales.min()), float(scales.max())]
    assert row.scale_mean == pytest.approx(float(scales.mean()))
    with pytest.raises(AdapterLabError, match="nobody"):
        full_lab.delta_norms("nobody")


def test_adalora_counts_the_triplets_that_are_left(tmp_path: Path) -> None:
    lab, where = opened(), ARCHITECTURES["tiny_llama"]
    write_plain(tmp_path / "ada", maker("tiny_llama")(), adapter_configs(where)["ada"], 1, mask=True)
    lab.load_adapter(tmp_path / "ada", "ada")
    frame = lab.delta_norms("ada")
    assert list(frame["rank"]) == list(lab.ranks("ada")["rank"])
    assert set(frame["rank"]) == {2, 3}
    assert [len(values) for values in frame.singular_values] == list(frame["rank"])


@pytest.mark.parametrize("how", ["graded", "nearly parallel"])
def test_small_singular_values_are_right_too(how: str) -> None:
    lab = opened()
    lab.add_adapter("lora", "x", r=8, lora_alpha=8, target_modules=["up_proj"])
    layer = layer_of(lab, "x", "0.mlp.up_proj")
    generator = torch.Generator().manual_seed(0)
    A, B = layer.lora_A["x"].weight, layer.lora_B["x"].weight
    with torch.no_grad():
        for parameter in (A, B):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if how == "graded":
            B.mul_(torch.logspace(0, -9, 8))
        else:
            A.copy_(A[:1] + 1e-3 * A)
            B.copy_(B[:, :1] + 1e-3 * B)
    expected = torch.linalg.svdvals(B.detach().double() @ A.detach().double())[:8]
    assert float(expected[-1] / expected[0]) < 1e-7, "float32, or Gram matrices, would lose it"
    ours = torch.tensor(lab.delta_norms("x").singular_values[0], dtype=torch.float64)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-14 * float(expected[0]))


def test_more_rank_than_the_layer_is_wide() -> None:
    lab = opened()
    lab.add_adapter("lora", "x", r=50, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    frame = lab.delta_norms("x")
    assert set(frame["rank"]) == {32}
    layer = layer_of(lab, "x", "0.self_attn.q_proj")
    delta = layer.scaling["x"] * (layer.lora_B["x"].weight.double() @ layer.lora_A["x"].weight.double()).detach()
    assert torch.allclose(torch.tensor(frame.singular_values[0]).double(), torch.linalg.svdvals(delta), atol=1e-5)


def test_embeddings(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"])
    plain = write_plain(tmp_path / "e", maker("tiny_llama")(), config, 1)
    lab = opened()
    lab.load_adapter(tmp_path / "e", "e")
    row = lab.delta_norms("e").iloc[0]
    delta = explicit(plain, maker("tiny_llama")())["model.embed_tokens"]
    assert row.norm == pytest.approx(float(delta.norm()), rel=1e-11)
    assert row.relative_norm == pytest.approx(
        row.norm / float(weights_of(maker("tiny_llama")())["model.embed_tokens.weight"].norm()), rel=1e-6
    )
    assert row.singular_values == pytest.approx(torch.linalg.svdvals(delta)[:4].tolist(), rel=1e-9)
    assert lab.delta_norms("e").layer.isna().all()


UNTRAINED = {
    "lora": {},
    "adalora": {"init_r": 4, "target_r": 2},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "dora": {"use_dora": True},
    "loha": {"r": 3},
    "lokr": {"r": 2},
    "oft": {},
    "hra": {"r": 2},
}


@pytest.mark.parametrize(
    ("builder", "method"),
    [("tiny_llama", method) for method in UNTRAINED]
    + [("tiny_gpt2", method) for method in ("lora", "adalora", "ia3", "dora")],  # PEFT has no others for Conv1D
)
def test_an_untrained_adapter_changes_nothing(builder: str, method: str) -> None:
    targets = {"tiny_llama": ["q_proj", "down_proj"], "tiny_gpt2": ["c_attn", "mlp.c_proj"]}[builder]
    given = {"fan_in_fan_out": True} if builder == "tiny_gpt2" else {}
    given |= {key: value if key != "feedforward_modules" else targets[1:] for key, value in UNTRAINED[method].items()}
    lab = opened(builder)
    lab.add_adapter({"dora": "lora"}.get(method, method), "x", target_modules=targets, **given)
    frame = lab.delta_norms("x")
    assert len(frame) == 4
    assert (frame["norm"] == 0).all()
    assert (frame.relative_norm == 0).all()
    if method == "ia3":
        assert (frame[["scale_min", "scale_mean", "scale_max"]] == 1).all(axis=None)
    else:
        assert (frame.effective_rank == 0).all()
        assert all(set(values) == {0.0} for values in frame.singular_values)


def test_weights_that_are_not_finite_are_named() -> None:
    lab = opened()
    lab.add_adapter("lora", "x", target_modules=["q_proj"], init_lora_weights=False)
    with torch.no_grad():
        layer_of(lab, "x", "1.self_attn.q_proj").lora_B["x"].weight[3, 1] = math.inf
    with pytest.raises(
        AdapterLabError, match=r"'x' has weights at model.layers.1.self_attn.q_proj that are not finite"
    ):
        lab.delta_norms("x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    lab = AdapterLab(maker("tiny_llama")().to(dtype), tokenizer=standins.tiny_tokenizer())
    lab.add_adapter("lora", "x", r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    lab.add_adapter("ia3", "i", target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False)
    for name in "xi":
        for layer in lab._adapters.mounts.adapters[name].layers.values():
            layer.to(dtype)  # the adapter's own tensors too
    W = weights_of(maker("tiny_llama")().to(dtype))["model.layers.0.self_attn.q_proj.weight"]
    layer = layer_of(lab, "x", "0.self_attn.q_proj")
    delta = (1.5 * layer.lora_B["x"].weight.double() @ layer.lora_A["x"].weight.double()).detach()
    row = lab.delta_norms("x").iloc[0]
    assert row.norm == pytest.approx(float(delta.norm()), rel=1e-12)
    assert row.relative_norm == pytest.approx(float(delta.norm() / W.norm()), rel=1e-6)
    s = layer_of(lab, "i", "0.self_attn.q_proj").ia3_l["i"].detach().double()
    assert lab.delta_norms("i")["norm"][0] == pytest.approx(float((W * s - W).norm()), rel=1e-6)


def test_a_fresh_dora_on_a_half_precision_base_shows_what_pefts_rounding_does() -> None:
    lab = AdapterLab(maker("tiny_llama")().bfloat16(), tokenizer=standins.tiny_tokenizer())
    lab.add_adapter("lora", "x", use_dora=True, target_modules=["q_proj"])
    W = weights_of(maker("tiny_llama")().bfloat16())["model.layers.0.self_attn.q_proj.weight"]
    rounding = W.norm(dim=1).bfloat16().double() - W.norm(dim=1)  # of each row's magnitude
    row = lab.delta_norms("x").iloc[0]
    assert row["norm"] == pytest.approx(float(rounding.norm()), rel=1e-4)
    assert row.effective_rank == 0


# ----- other ways to change a weight -----


def test_whole_modules_and_trained_tokens() -> None:
    from peft import LoraConfig

    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [3, 9]}
    )
    lab, base = opened(), weights_of(maker("tiny_llama")())
    head_before, table = base["lm_head.weight"], base["model.embed_tokens.weight"]
    lab.add_adapter(config, "x")
    assert (lab.delta_norms("x")["norm"] == 0).all()
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(320, 32, generator=generator)
    rows = torch.randn(2, 32, generator=generator)
    with torch.no_grad():
        layer_of(lab, "x", "lm_head").modules_to_save["x"].weight.copy_(head)
        layer_of(lab, "x", "embed_tokens").token_adapter.trainable_tokens_delta["x"].copy_(rows)
    frame = lab.delta_norms("x").set_index("path")
    expected = {
        "lm_head": (head.double() - head_before, head_before),
        "model.embed_tokens": (rows.double() - table[[3, 9]], table),
    }
    for path, (delta, weight) in expected.items():
        assert frame.norm[path] == pytest.approx(float(delta.norm()), rel=1e-12)
        assert frame.relative_norm[path] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-6)
        assert frame.singular_values[path] == ()
        assert "minus original" in frame.note[path]
    assert len(frame) == 4


def test_a_whole_attention_is_no_product() -> None:
    lab = opened()
    lab.add_adapter("lora", "x", r=2, target_modules=["down_proj"], modules_to_save=["self_attn"])
    frame = lab.delta_norms("x").set_index("path")
    assert (frame["norm"] == 0).all()
    path = "model.layers.1.self_attn"
    with torch.no_grad():
        layer_of(lab, "x", path).modules_to_save["x"].q_proj.weight += 0.5
    assert lab.delta_norms("x").set_index("path").norm[path] == pytest.approx(0.5 * 32)  # of 32 × 32 numbers


OTHERS = {
    "oft": {},
    "hra": {"r": 2},
    "fourierft": {"n_frequency": 30},
    "shira": {"r": 2},
    "road": {"group_size": 8},
    "miss": {"r": 2},
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_measured_by_forming_delta_w(method: str) -> None:
    """The oracle: what the layer makes of the unit vectors, minus what the bare layer makes of them."""
    lab = opened()
    lab.add_adapter(method, "x", target_modules=["q_proj", "down_proj"], **OTHERS[method])
    generator = torch.Generator().manual_seed(0)
    mounted = lab._adapters.mounts.adapters["x"]
    with torch.no_grad():
        for parameter in mounted.trainable:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = anatomy(lab)
    frame = lab.delta_norms("x")
    assert anatomy(lab) == before
    for row, layer in zip(frame.itertuples(), map(copy.deepcopy, mounted.layers.values())):
        layer.eval()
        base = layer.get_base_layer()
        unit, nothing = torch.eye(base.in_features), torch.zeros(1, base.in_features)
        with torch.no_grad():
            delta = ((layer(unit) - layer(nothing)) - (base(unit) - base(nothing))).T
        assert float(delta.norm()) > 0.01
        assert row.norm == pytest.approx(float(delta.norm()), rel=1e-4)
        assert row.relative_norm == pytest.approx(row.norm / float(base.weight.detach().norm()), rel=1e-6)
        values = torch.linalg.svdvals(delta.double())
        assert torch.allclose(torch.tensor(row.singular_values).double(), values, atol=1e-4 * float(values[0]))
        assert "formed" in row.note


def test_a_method_that_can_not_be_merged_says_so() -> None:
    lab = opened()
    lab.add_adapter("lily", "x", target_modules=["q_proj"])
    with pytest.raises(AdapterLabError, match=r"'x' has no ΔW to show at model.layers.0.self_attn.q_proj: PEFT can't"):
        lab.delta_norms("x")


def test_experts(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    plain = write_plain(tmp_path / "x", maker("tiny_mixtral")(), config, 1)
    lab = AdapterLab(maker("tiny_mixtral")(), tokenizer=standins.tiny_tokenizer())
    lab.load_adapter(tmp_path / "x", "x")
    fresh, merged = weights_of(maker("tiny_mixtral")()), weights_of(plain.double().merge_and_unload())
    frame = lab.delta_norms("x").set_index("path")
    paths = [path for path in frame.index if "experts" in path]
    assert len(paths) == 2
    for path in paths:
        keys = [key for key in fresh if key.startswith(path)]
        assert len(keys) == 2
        norm = math.hypot(*(float((merged[key] - fresh[key]).norm()) for key in keys))
        assert frame.norm[path] == pytest.approx(norm, rel=1e-10)
        assert frame.relative_norm[path] == pytest.approx(
            norm / math.hypot(*(float(fresh[key].norm()) for key in keys)), rel=1e-6
        )


# ----- the base's side -----


def dequantised(module: Any) -> torch.Tensor:
    """The weight that a quantised layer stands for, by bitsandbytes' own definition."""
    import bitsandbytes

    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return weight.data.double() * scales.double()[:, None] / 127


def scales_of(lab: AdapterLab) -> list[Any]:
    """Where bitsandbytes holds the row scales of each 8-bit layer: on the weight before its first forward, then beside."""
    originals = [site.original for site in lab._adapters.mounts.sites.values()]
    layers: list[Any] = [module for module in originals if type(module).__name__ == "Linear8bitLt"]
    return [(id(layer.weight), id(layer.weight.SCB), id(layer.state.SCB)) for layer in layers]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("kind", ["8bit", "4bit", "4bit, double"])
@pytest.mark.parametrize("run_before", [False, True])
def test_quantised_bases(kind: str, run_before: bool, tmp_path: Path) -> None:
    standins.write_model(tmp_path / "base", maker("tiny_llama")(**SIZES), standins.tiny_tokenizer())
    lab = AdapterLab(tmp_path / "base", **quantisations()[kind])
    configs = adapter_configs(ARCHITECTURES["tiny_llama"])
    for seed, name in enumerate(["lora", "ia3", "dora"], start=1):
        write_plain(tmp_path / name, maker("tiny_llama")(**SIZES), configs[name], seed)
        lab.load_adapter(tmp_path / name, name)
    if run_before:
        lab.compare("Hello", max_new_tokens=2)
    before, states = anatomy(lab), scales_of(lab)
    first = lab.compare("Hello", max_new_tokens=4) if run_before else None
    for name in ("lora", "ia3", "dora"):
        frame = lab.delta_norms(name)
        for row, layer in zip(frame.itertuples(), lab._adapters.mounts.adapters[name].layers.values()):
            W = dequantised(layer.get_base_layer())
            if name == "ia3":
                s = layer.ia3_l[name].detach().double().flatten()
                delta = W * (s if layer.is_feedforward else s[:, None]) - W
            else:
                A, B = layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()
                delta = layer.scaling[name] * (B @ A)
            if name == "dora":
                changed = W + delta
                magnitude = layer.lora_magnitude_vector[name].weight.detach().double()
                delta = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True) - W
            assert row.norm == pytest.approx(float(delta.norm()), rel=1e-5), name
            assert row.relative_norm == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5), name
    assert anatomy(lab) == before
    assert scales_of(lab) == states
    lab.clear_cache()
    again = lab.compare("Hello", max_new_tokens=4)
    if first is not None:
        assert [g.text for g in again.generations] == [g.text for g in first.generations]


def test_offloaded_layers_have_no_relative_norm(tmp_path: Path) -> None:
    standins.write_model(tmp_path / "base", maker("tiny_llama")(), standins.tiny_tokenizer())
    lab, whole = all_on_disk(tmp_path, tmp_path / "off"), opened()
    configs = adapter_configs(ARCHITECTURES["tiny_llama"])
    for name in ("lora", "ia3"):
        write_plain(tmp_path / name, maker("tiny_llama")(), configs[name], 1)
        for each in (lab, whole):
            each.load_adapter(tmp_path / name, name)
    lora, expected = lab.delta_norms("lora"), whole.delta_norms("lora")
    assert list(lora["norm"]) == list(expected["norm"])
    assert list(lora.singular_values) == list(expected.singular_values)
    ia3, expected = lab.delta_norms("ia3"), whole.delta_norms("ia3")
    assert list(ia3.scale_mean) == list(expected.scale_mean)
    assert ia3["norm"].isna().all()
    for frame in (lora, ia3):
        assert frame.relative_norm.isna().all()
        assert frame.note.str.contains("W can't be read").all()


def test_norms_of_the_base_are_read_once_and_again_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterlab import base_weights

    lab = opened()
    lab.add_adapter("lora", "x", target_modules=["q_proj"], init_lora_weights=False)
    read: list[Any] = []
    reader = base_weights.read_weight
    monkeypatch.setattr(base_weights, "read_weight", lambda module: read.append(module) or reader(module))
    first = lab.delta_norms("x")
    assert len(read) == 2
    assert lab.delta_norms("x").equals(first)
    assert len(read) == 2
    weight = lab._adapters.mounts.sites["model.layers.0.self_attn.q_proj"].original.weight
    for number, change in enumerate(
        [
            lambda: weight[3, 5].fill_(50),  # the version counter tells: one value, which is not in the sample
            lambda: weight.data.mul_(2),  # values tell
            lambda: setattr(weight, "data", weight.data.clone().fill_(0.5)),  # the place tells
        ],
        start=1,
    ):
        with torch.no_grad():
            change()
            expected = first["norm"][0] / float(weight.double().norm())
        assert lab.delta_norms("x").relative_norm[0] == pytest.approx(expected, rel=1e-6)
        assert len(read) == 2 + number


# ----- what is left alone -----


def test_nothing_is_changed_and_several_adapters_do_not_meet(tmp_path: Path) -> None:
    configs = all_configs("tiny_llama")
    lab, alone = opened(), {}
    for seed, (name, config) in enumerate(configs.items(), start=1):
        write_plain(tmp_path / name, maker("tiny_llama")(), config, seed)
        single = opened()
        single.load_adapter(tmp_path / name, "only")
        alone[name] = single.delta_norms("only")
        lab.load_adapter(tmp_path / name, name)
    lab.compare("Hello", max_new_tokens=2)  # factors now lie in stacks
    lab.set_adapter("rs")
    lab.set_trainable("lora")
    lab.model.train()
    before = anatomy(lab)
    tensors = {key: p.clone() for key, p in lab.model.named_parameters()}
    for name in configs:
        assert lab.delta_norms(name).equals(alone[name]), name
    lab.subspace_overlap("lora", "rs")
    assert anatomy(lab) == before
    assert all(torch.equal(p, tensors[key]) for key, p in lab.model.named_parameters())
    with lab.using("dora"):
        assert lab.delta_norms("dora").equals(alone["dora"])


class LargestStorage(TorchDispatchMode):
    """The most values in any tensor that an operator makes and that is no view of what was there before."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.values = known, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.values = max(self.values, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_delta_w_is_never_formed(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    configs = {k: c for k, c in all_configs("tiny_llama").items() if k not in ("loha-wide", "lokr-full")}
    lab = opened(**sizes)
    for seed, (name, config) in enumerate(configs.items(), start=1):
        write_plain(tmp_path / name, maker("tiny_llama")(**sizes), config, seed)
        lab.load_adapter(tmp_path / name, name)
    known = {p.untyped_storage().data_ptr() for m in lab._adapters.mounts.adapters.values() for p in m.trainable}
    known |= {p.untyped_storage().data_ptr() for p in lab._adapters.base.values()}
    for name in configs:
        with LargestStorage(known) as largest:
            lab.delta_norms(name)
        assert 0 < largest.values < 64 * 128 / 2, name  # the smallest layer is 64 × 128


# ----- subspaces -----


def bases(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, _, Vh = torch.linalg.svd(delta)
    return U[:, :rank], Vh[:rank].T


@pytest.mark.parametrize("builder", BUILDERS)
def test_overlap_is_that_of_the_explicit_subspaces(builder: str, tmp_path: Path) -> None:
    lab, expected = opened(builder), {}
    configs = {key: config for key, config in all_configs(builder).items() if key in ("lora", "rs", "cut", "loha")}
    for seed, (name, config) in enumerate(configs.items(), start=1):
        plain = write_plain(tmp_path / name, maker(builder)(), config, seed, mask=name == "cut", cut=name == "cut")
        expected[name] = explicit(plain, maker(builder)())
        lab.load_adapter(tmp_path / name, name)
    for one in configs:
        for two in configs:
            frame = lab.subspace_overlap(one, two)
            assert len(frame) > 3
            for row in frame.itertuples():
                deltas = expected[one][row.path], expected[two][row.path]
                ranks = [int(torch.linalg.matrix_rank(delta, rtol=1e-5)) for delta in deltas]
                assert [row.rank, row.other_rank] == ranks
                for side, (mine, its) in enumerate(zip(*(bases(d, r) for d, r in zip(deltas, ranks)))):
                    overlap = float((mine.T @ its).square().sum()) / min(ranks)
                    assert (row.output_overlap, row.input_overlap)[side] == pytest.approx(overlap, abs=1e-9)
                    assert (row.output_chance, row.input_chance)[side] == max(ranks) / len(mine)
                if one == two:
                    assert row.output_overlap == pytest.approx(1, abs=1e-12)


@pytest.fixture
def pair() -> Iterator[Callable[..., AdapterLab]]:
    """Makes a lab with two LoRAs "a" and "b" of ranks 2 and 3 on q_proj."""
    labs = []

    def make(**fields: Any) -> AdapterLab:
        lab = opened()
        labs.append(lab)
        for name, r in (("a", 2), ("b", 3)):
            lab.add_adapter("lora", name, r=r, **{"target_modules": ["q_proj"], "init_lora_weights": False, **fields})
        return lab

    yield make
    for lab in labs:
        lab.close()


def test_shared_and_orthogonal_directions(pair: Callable[..., AdapterLab]) -> None:
    lab = pair()
    a, b = (layer_of(lab, name, "0.self_attn.q_proj") for name in "ab")
    frame = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    with torch.no_grad():
        b.lora_A["b"].weight.copy_(frame[:3])
        a.lora_A["a"].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) @ frame[:2])  # within b's
        b.lora_B["b"].weight.copy_(frame[:, :3])
        a.lora_B["a"].weight.copy_(frame[:, 2:4])  # one of two within b's
    row = lab.subspace_overlap("a", "b").iloc[0]
    assert row.input_overlap == pytest.approx(1, abs=1e-6)
    assert row.output_overlap == pytest.approx(0.5, abs=1e-6)
    assert (row["rank"], row.other_rank) == (2, 3)


def test_chance_is_what_random_directions_share(pair: Callable[..., AdapterLab]) -> None:
    row = pair().subspace_overlap("a", "b").iloc[0]
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2000, 32, rank, generator=generator, dtype=torch.float64) for rank in (2, 3)]
    one, two = (torch.linalg.qr(draw).Q for draw in draws)
    shares = (one.mT @ two).square().sum((1, 2)) / 2
    error = 4 * float(shares.std()) / 2000**0.5
    assert row.output_chance == pytest.approx(float(shares.mean()), abs=error)
    assert row.output_chance == 3 / 32


def test_directions_that_are_only_rounding_do_not_count(pair: Callable[..., AdapterLab]) -> None:
    lab = pair()
    weight = layer_of(lab, "b", "0.self_attn.q_proj").lora_B["b"].weight
    with torch.no_grad():
        weight[:, 2] = weight[:, 0] * (1 + 1e-7 * torch.randn(32, generator=torch.Generator().manual_seed(0)))
    assert list(lab.subspace_overlap("a", "b").other_rank) == [2, 3]


def test_what_has_no_directions_says_why(pair: Callable[..., AdapterLab], full_lab: AdapterLab) -> None:
    lab = pair(init_lora_weights=True)
    with pytest.raises(AdapterLabError, match=r"'a' has no directions to compare: ΔW = 0 in all 2 layers"):
        lab.subspace_overlap("a", "b")
    lab = pair()
    with torch.no_grad():
        layer_of(lab, "b", "1.self_attn.q_proj").lora_B["b"].weight.zero_()
    frame = lab.subspace_overlap("a", "b")
    assert frame.output_overlap.notna().tolist() == frame.input_chance.notna().tolist() == [True, False]
    lab.add_adapter("lora", "c", target_modules=["down_proj"], init_lora_weights=False)
    with pytest.raises(AdapterLabError, match="'a' and 'c' share no layer: 'a' adapts q_proj, 'c' down_proj"):
        lab.subspace_overlap("a", "c")
    for names in (("poet", "pirate"), ("pirate", "poet")):
        with pytest.raises(AdapterLabError, match=r"'poet' has no directions to compare: IA3 changes weights without"):
            full_lab.subspace_overlap(*names)
    with pytest.raises(AdapterLabError, match="nobody"):
        full_lab.subspace_overlap("pirate", "nobody")


# ----- the benchmark -----


def test_the_benchmark_runs_and_holds_the_lab_against_the_formed_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    model = maker("tiny_opt")()
    results = benchmark.run(model, standins.tiny_tokenizer(), r=2, rounds=2, report=lambda line: None)
    assert results.layers == {"16 × 32": 1, "32 × 16": 1, "32 × 32": 8, "64 × 32": 2, "32 × 64": 2}
    assert {timing.contender: len(timing.seconds) for timing in results.timings} == dict.fromkeys(benchmark.TITLES, 2)
    assert [timing.contender for timing in results.timings if timing.estimated] == ["svd"]
    assert results.peaks["form"] >= 2 * 64 * 32 * 4, "one product and its scaled copy"
    assert benchmark.NormResults.from_json(results.to_json()) == results
    assert all(title in benchmark.markdown(results) for title in benchmark.TITLES.values())
    with pytest.raises(ValueError, match="no adapterlab-norms-benchmark"):
        benchmark.NormResults.from_json(json.dumps({"format": "something else"}))
    form = benchmark.form
    monkeypatch.setattr(benchmark, "form", lambda layer, dtype=None: 1.001 * form(layer, dtype))
    with pytest.raises(benchmark.WrongNumber, match=r"norms are off by 0\.001"):
        benchmark.run(maker("tiny_opt")(), standins.tiny_tokenizer(), r=2, rounds=1, report=lambda line: None)
