"""Saving, weighted merges, and merging into plain models: read back by plain PEFT and plain transformers."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import PeftModel
from tiny_adapters import logits_of

from adapterlab import AdapterLab, AdapterLabError

CLOSE = {"atol": 5e-5, "rtol": 1e-4}


@pytest.mark.parametrize("name", ["pirate", "wide", "poet", "ada", "dora"])
def test_a_saved_adapter_is_plain_pefts(full_lab: AdapterLab, name: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """Whatever else the lab holds, the keys are normal and the logits equal in PEFT and in the lab."""
    full_lab.set_adapter(name)
    expected = logits_of(full_lab, ids)
    full_lab.set_adapter("poet" if name != "poet" else "wide")
    folder = full_lab.save_adapter(name, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    plain = PeftModel.from_pretrained(standins.tiny_llama(), folder).eval()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, expected, **CLOSE)
    full_lab.load_adapter(folder, "again")
    assert torch.equal(logits_of(full_lab, ids), expected)
    assert full_lab.adapters["again"].status == "loaded"


@pytest.mark.parametrize(
    ("make", "targets", "feed_forward"),
    [
        (standins.tiny_gpt2, ["c_proj"], None),  # PEFT's own feedforward_modules: mlp.c_proj
        (standins.tiny_gpt2, ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        (standins.tiny_llama, ["self_attn.k_proj", "mlp.down_proj"], None),  # PEFT's own: down_proj
        (standins.tiny_llama, ["k_proj", "down_proj"], []),
    ],
)
def test_ia3_whose_feed_forward_names_are_longer_or_shorter_than_its_targets(
    make: Any, targets: list[str], feed_forward: list[str] | None, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Which layers are scaled before and which behind stands in the config: it has to survive the file."""
    lab = AdapterLab(make(), tokenizer=standins.tiny_tokenizer())
    chosen: dict[str, Any] = {} if feed_forward is None else {"feedforward_modules": feed_forward}
    chosen["fan_in_fan_out"] = make is standins.tiny_gpt2
    lab.add_adapter("ia3", "x", target_modules=targets, init_ia3_weights=False, **chosen)
    for place, (_, tensor) in enumerate(sorted(lab._adapters.state("x")[1].items())):
        tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(place)) + 0.5)
    expected = logits_of(lab, ids)
    folder = lab.save_adapter("x", tmp_path / "x")
    lab.load_adapter(folder, "again")
    assert torch.equal(logits_of(lab, ids), expected)
    plain = PeftModel.from_pretrained(make(), folder).eval()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, expected, **CLOSE)


def test_adapters_with_a_whole_module_save_it(lab: AdapterLab, ids: torch.Tensor, tmp_path: Path) -> None:
    lab.add_adapter("lora", "head", modules_to_save=["lm_head"], init_lora_weights=False)
    for name, p in lab.model.named_parameters():
        if "modules_to_save" in name:
            p.data.mul_(1.5)
    expected = logits_of(lab, ids)
    plain = PeftModel.from_pretrained(standins.tiny_llama(), lab.save_adapter("head", tmp_path / "h")).eval()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # plain PEFT, reading its own file
def test_a_shrunk_adalora_from_plain_peft_loads_and_saves_again(ids: torch.Tensor, tmp_path: Path) -> None:
    """Rank allocation by PEFT itself, then its own save: the file's tensors are smaller than init_r."""
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8, target_modules=["q_proj", "v_proj"])
    plain = get_peft_model(standins.tiny_llama(), config)
    standins.random_adapter_state(plain)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    for step in range(8):
        plain(ids, labels=ids).loss.backward()
        optimizer.step()
        plain.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have invalid shape")  # a triplet pruned to rank 0, which PEFT mistakes
        plain.save_pretrained(tmp_path / "shrunk")
    assert plain.peft_config["default"].rank_pattern
    with torch.no_grad():
        expected = PeftModel.from_pretrained(standins.tiny_llama(), tmp_path / "shrunk").eval()(ids).logits
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    lab.load_adapter(tmp_path / "shrunk", "s")
    assert torch.allclose(logits_of(lab, ids), expected, **CLOSE)
    lab.save_adapter("s", tmp_path / "again")
    with torch.no_grad():
        again = PeftModel.from_pretrained(standins.tiny_llama(), tmp_path / "again").eval()(ids).logits
    assert torch.allclose(again, expected, **CLOSE)
    lab.compare("Hello", ["s", {"s": 0.5}], max_new_tokens=3)
    assert lab.verify()["agrees"].all()


def test_saving_asks_no_hub_and_leaves_the_lab(full_lab: AdapterLab, tmp_path: Path, monkeypatch: Any) -> None:
    """PEFT's save looks the base up on the Hub unless it is told not to."""
    import peft.utils.save_and_load as pefts

    monkeypatch.setattr(pefts, "check_file_exists_on_hf_hub", lambda *a, **k: pytest.fail("asked the Hub"))
    full_lab.set_adapter({"pirate": 0.5})
    full_lab.save_adapter("poet", tmp_path / "p")
    assert full_lab.active_adapters == {"pirate": 0.5}


def test_saving_replaces_an_adapter_and_nothing_else(full_lab: AdapterLab, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    full_lab.save_adapter("pirate", folder)
    full_lab.save_adapter("poet", folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "IA3"
    assert [p.name for p in tmp_path.iterdir()] == ["x"], "nothing is left beside it"
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterLabError, match=r"holds other things \(thesis.txt\)"):
        full_lab.save_adapter("pirate", folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterLabError, match="is a file"):
        full_lab.save_adapter("pirate", tmp_path / "file")
    with pytest.raises(AdapterLabError, match="can't be written"):
        full_lab.save_adapter("pirate", tmp_path / "file" / "deeper")
    with pytest.raises(AdapterLabError, match="No adapter named 'nobody'"):
        full_lab.save_adapter("nobody", tmp_path / "n")
    with pytest.raises(AdapterLabError, match="the model itself"):
        full_lab.save_adapter("base", tmp_path / "n")


def test_a_failed_save_leaves_the_old_adapter(full_lab: AdapterLab, tmp_path: Path, monkeypatch: Any) -> None:
    import safetensors.torch

    folder = full_lab.save_adapter("pirate", tmp_path / "x")
    before = (folder / "adapter_model.safetensors").read_bytes()

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(AdapterLabError, match="No space left on device"):
        full_lab.save_adapter("poet", folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# -- weighted adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [{"pirate": 1.0}, {"pirate": 0.7, "wide": 0.3}, {"wide": -1.0, "ada": 2.0}, {"pirate": 1, "ada": 1, "wide": 1}],
)
def test_cat_is_the_blend(full_lab: AdapterLab, weights: dict[str, float], ids: torch.Tensor, tmp_path: Path) -> None:
    """rsLoRA, rank and alpha patterns and AdaLoRA included, in the lab and in plain PEFT."""
    with full_lab.using(weights) as model, torch.no_grad():
        expected = model(ids).logits
    full_lab.add_weighted_adapter(list(weights), list(weights.values()), "made")
    assert torch.allclose(logits_of(full_lab, ids), expected, **CLOSE)
    assert full_lab.adapters["made"].status == "unsaved"
    assert full_lab.adapters["made"].source.startswith("equals ")
    assert full_lab.selection.label == "made"
    plain = PeftModel.from_pretrained(standins.tiny_llama(), full_lab.save_adapter("made", tmp_path / "m")).eval()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("pruned", ["some layers", "all layers"])
@pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor")  # PEFT takes rank 0 for an incomplete shard
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_cat_of_layers_that_adalora_has_pruned_away(ids: torch.Tensor, tmp_path: Path, pruned: str) -> None:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"])
    plain: Any = get_peft_model(standins.tiny_llama(), config)
    standins.random_adapter_state(plain, 3)
    pattern = {}
    for key, E in plain.named_parameters():
        if ".lora_E." in key:
            keep = pruned == "some layers" and "v_proj" in key
            pattern[key.removeprefix("base_model.model.").removesuffix(".default")] = [keep] * 4
            E.data *= keep
    config = plain.peft_config["default"]
    config.rank_pattern = pattern
    plain.save_pretrained(str(tmp_path / "ada"), save_embedding_layers=False)
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    lab.load_adapter(tmp_path / "ada", "ada")
    if pruned == "all layers":
        with pytest.raises(AdapterLabError, match="ada can't be concatenated: all its triplets are pruned"):
            lab.add_weighted_adapter(["ada"], [1.0], "made")
        assert list(lab.adapters) == ["ada"]
        return
    lab.add_weighted_adapter(["ada"], [1.0], "made")
    with torch.no_grad():
        assert torch.allclose(logits_of(lab, ids), plain.eval()(ids).logits, **CLOSE)


def test_cat_of_what_can_not_be_concatenated_is_refused(full_lab: AdapterLab) -> None:
    before = list(full_lab.adapters)
    with pytest.raises(AdapterLabError, match="'poet' can't be concatenated: IA3 multiplies"):
        full_lab.add_weighted_adapter(["pirate", "poet"], [1, 1], "made")
    with pytest.raises(AdapterLabError, match="'dora' can't be concatenated"):
        full_lab.add_weighted_adapter(["dora"], [1], "made")
    with pytest.raises(AdapterLabError, match="2 adapters and 1 weights"):
        full_lab.add_weighted_adapter(["pirate", "wide"], [1], "made")
    with pytest.raises(AdapterLabError, match="stands twice"):
        full_lab.add_weighted_adapter(["pirate", "pirate"], [1, 1], "made")
    with pytest.raises(AdapterLabError, match="Nothing to combine"):
        full_lab.add_weighted_adapter(["pirate"], [0], "made")
    with pytest.raises(AdapterLabError, match="already"):
        full_lab.add_weighted_adapter(["pirate"], [1], "wide")
    with pytest.raises(AdapterLabError, match="none of PEFT's"):
        full_lab.add_weighted_adapter(["pirate"], [1], "made", combination_type="mean")
    with pytest.raises(AdapterLabError, match="'wide' can't take part in 'linear': it uses use_rslora"):
        full_lab.add_weighted_adapter(["wide"], [1], "made", combination_type="linear")
    assert list(full_lab.adapters) == before


@pytest.mark.parametrize(("kind", "extra"), [("linear", {}), ("svd", {}), ("ties", {"density": 0.5})])
def test_pefts_own_combinations_are_called_approximate(
    lab: AdapterLab, kind: str, extra: dict[str, float], ids: torch.Tensor
) -> None:
    from peft import LoraConfig, set_peft_model_state_dict

    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    lab.add_adapter(config, "a")
    lab.add_adapter(config, "b")
    plain = PeftModel(standins.tiny_llama(), config, adapter_name="a")
    plain.add_adapter("b", config)
    for name in ("a", "b"):
        state = {f"base_model.model.{key}": value for key, value in lab._adapters.state(name)[1].items()}
        set_peft_model_state_dict(plain, state, adapter_name=name)
    plain.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "made", combination_type=kind, **extra)
    plain.set_adapter("made")
    if extra:
        with pytest.raises(AdapterLabError, match=r"density=0\.5"):
            lab.add_weighted_adapter(["a", "b"], [0.5, 0.5], "made", combination_type=kind)
    lab.add_weighted_adapter(["a", "b"], [0.5, 0.5], "made", combination_type=kind, **extra)
    assert lab.adapters["made"].source == f"approximates a × 0.5 + b × 0.5 by {kind}"
    with torch.no_grad():
        assert torch.allclose(logits_of(lab, ids), plain.eval()(ids).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["linear", "svd"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "at lm_head, modules_to_save replaces a whole module"),
        ({"trainable_token_indices": [5, 6]}, "at model.embed_tokens, trainable tokens replace rows"),
        ({"rank_pattern": {"v_proj": 2}}, "it uses rank_pattern"),
        ({"layers_to_transform": [1]}, "it leaves out model.layers.0.self_attn.q_proj"),
        ({"layers_to_transform": [1], "target_modules": ["o_proj"]}, "it finds none of them on a layer"),
    ],
    ids=str,
)
def test_what_pefts_own_combinations_would_lose_is_refused(
    lab: AdapterLab, kind: str, fields: dict[str, Any], words: str
) -> None:
    lab.add_adapter("lora", "odd", **{"r": 4, "target_modules": ["q_proj", "v_proj"], **fields})
    lab.add_adapter("lora", "plain", r=4, target_modules=["q_proj", "v_proj"])
    order = ["plain", "odd"] if "none of them" in words else ["odd", "plain"]
    with pytest.raises(AdapterLabError, match=re.escape(words)):
        lab.add_weighted_adapter(order, [0.5, 0.5], "made", combination_type=kind)
    assert list(lab.adapters) == ["odd", "plain"]


# -- merged models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column", ["pirate", "wide", "ada", "poet", "dora", {"pirate": 0.5, "poet": 2.0}, None], ids=str
)
def test_a_merged_model_is_plain_and_the_lab_is_unchanged(
    full_lab: AdapterLab, column: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    with full_lab.using(column) as model, torch.no_grad():
        expected = model(ids).logits
    base = logits_of(full_lab, ids)
    full_lab.merge_and_unload(column, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, expected, **CLOSE)
    assert torch.equal(logits_of(full_lab, ids), base)
    assert not any("lora" in key or "base_layer" in key for key in plain.state_dict())
    with pytest.raises(AdapterLabError, match="holds other things"):
        full_lab.merge_and_unload(column, tmp_path / "merged")


def test_merging_into_tied_embeddings_unties_them(ids: torch.Tensor) -> None:
    lab = AdapterLab(standins.tiny_llama(tie_word_embeddings=True), tokenizer=standins.tiny_tokenizer())
    lab.add_adapter("lora", "e", target_modules=["embed_tokens"], init_lora_weights=False)
    expected = logits_of(lab, ids)
    merged = lab.merge_and_unload("e")
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, expected, **CLOSE)


def test_merging_with_lora_bias_on_layers_without_bias(ids: torch.Tensor) -> None:
    model = standins.tiny_llama(attention_bias=False)
    lab = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    lab.add_adapter("lora", "b", lora_bias=True, init_lora_weights=False, target_modules=["q_proj"])
    with torch.no_grad():
        for name, p in lab.model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    expected = logits_of(lab, ids)
    with torch.no_grad():
        assert torch.allclose(lab.merge_and_unload("b")(ids).logits, expected, **CLOSE)
