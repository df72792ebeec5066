"""Try to catch the lab lying about which adapter spoke."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterlab import AdapterLab, AdapterLabError


def swap_weights(lab: AdapterLab, one: str, other: str) -> None:
    """Exchange two adapters' tensors in place, as a mix-up of rows or a careless cell would."""
    layers = {name: lab._adapters.mounts.adapters[name].layers for name in (one, other)}
    for path, layer in layers[one].items():
        twin: Any = layers[other][path]
        a = {key: p for key, p in layer.named_parameters() if one in key.split(".")}
        for key, parameter in a.items():
            partner = dict(twin.named_parameters())[key.replace(one, other)]
            mine = parameter.detach().clone()
            parameter.data.copy_(partner.detach())
            partner.data.copy_(mine)


@pytest.fixture
def two(lab: AdapterLab, tmp_path: Path) -> AdapterLab:
    """Two LoRA adapters of one shape, from two folders."""
    import standins
    from peft import LoraConfig

    for seed, name in enumerate(["left", "right"], start=1):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        lab.load_adapter(standins.write_adapter(tmp_path / name, standins.tiny_llama(), config, seed=seed), name)
    return lab


def test_an_honest_comparison_agrees_with_plain_peft(full_lab: AdapterLab) -> None:
    blend = {"pirate": 0.5, "wide": 0.3, "ada": 1.0, "poet": 0.7}
    full_lab.compare(["What is the moon?", "Who?"], [None, *full_lab.adapters, blend], max_new_tokens=8)
    frame = full_lab.verify()
    assert len(frame) == 14
    assert frame["agrees"].all(), frame
    assert (frame["logprob_error"] < 1e-4).all()
    assert (frame["note"] == "").all()


def test_swapped_weights_are_noticed_by_digest_and_verify(two: AdapterLab) -> None:
    before = two.compare("What is the moon?", max_new_tokens=8)
    swap_weights(two, "left", "right")
    after = two.compare("What is the moon?", max_new_tokens=8)
    assert after["left"].weights_digest == before["right"].weights_digest != before["left"].weights_digest
    assert after["left"].text == before["right"].text, "the swap really changed who speaks"
    frame = two.verify(after).set_index("column")
    assert frame["agrees"].to_dict() == {"base": True, "left": False, "right": False}
    assert "those of 'right'" in frame.loc["left", "note"]
    assert not frame.loc["left", "tokens_agree"], "plain PEFT, from the file, says something else"


def test_a_swap_after_the_comparison_is_no_lie_of_the_comparison(two: AdapterLab) -> None:
    """The files still say what 'left' is, and the comparison was made with it."""
    comparison = two.compare("What is the moon?", max_new_tokens=4)
    swap_weights(two, "left", "right")
    assert two.verify(comparison)["agrees"].all()


def test_one_number_changed_by_hand_is_noticed(two: AdapterLab) -> None:
    """Through every door that tensor._version overlooks."""
    honest = two.compare("Hello", ["left"], max_new_tokens=2)["left"].weights_digest
    parameter = next(p for n, p in two._adapters.mounts.adapters["left"].layers.items()).lora_B["left"].weight  # type: ignore[union-attr, index]
    edits = [
        lambda: parameter.data.add_(1e-3),
        lambda: parameter.data.__setitem__((0, 0), 0.5),
        lambda: parameter.detach().numpy().__setitem__((1, 1), 0.25),
        lambda: setattr(parameter, "data", parameter.data.flip(0)),
    ]
    seen = {honest}
    for edit in edits:
        edit()
        digest = two.compare("Hello", ["left"], max_new_tokens=2)["left"].weights_digest
        assert digest not in seen
        seen.add(digest)
        assert not two.verify()["weights_agree"].all()
        assert "changed since the lab took them in" in two.verify()["note"][0]


def test_a_changed_base_is_noticed(two: AdapterLab) -> None:
    comparison = two.compare("Hello", [None], max_new_tokens=2)
    weight: Any = two.model.model.layers[0].mlp.up_proj.weight
    rows = weight.data[[1, 0]].clone()
    weight.data[:2] = rows  # a permutation: plain sums would not see it
    frame = two.verify(comparison)
    assert not frame["weights_agree"][0]
    assert not frame["agrees"][0]
    assert "the base's weights have changed" in frame["note"][0]


def test_a_forged_record_is_noticed(two: AdapterLab) -> None:
    from dataclasses import replace

    comparison = two.compare("Hello", max_new_tokens=4)
    left, right = comparison["left"], comparison["right"]
    comparison.generations = [
        replace(left, column="right", asked=right.asked),
        replace(right, token_ids=left.token_ids),
    ]
    frame = two.verify(comparison)
    assert not frame["agrees"].any()
    assert not frame["active_agree"][0]


def test_a_deleted_adapter_can_not_be_verified(two: AdapterLab) -> None:
    two.compare("Hello", max_new_tokens=2)
    two.delete_adapter("left")
    frame = two.verify().set_index("column")
    assert frame.loc["left", "note"] == "left is no longer in the lab"
    assert frame["agrees"].to_dict() == {"base": True, "left": False, "right": True}


def test_training_the_trainable_adapter_is_no_forgery(two: AdapterLab, ids: torch.Tensor) -> None:
    two.set_adapter("left")
    two.set_trainable("left")
    optimizer = torch.optim.AdamW([p for p in two.model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    two.model(ids, labels=ids).loss.backward()
    optimizer.step()
    two.compare("Hello", max_new_tokens=4)
    assert two.adapters["left"].status == "unsaved"
    assert two.verify()["agrees"].all()


def test_nothing_to_verify(full_lab: AdapterLab) -> None:
    with pytest.raises(AdapterLabError, match=r"run lab\.compare"):
        full_lab.verify()
    comparison = full_lab.compare("Hello", [None], max_new_tokens=1)
    comparison.model["name"] = "another"
    with pytest.raises(AdapterLabError, match="made on 'another'"):
        full_lab.verify(comparison)


@pytest.mark.parametrize("kind", ["loha", "dora"])
def test_a_blend_whose_name_another_method_has_now(full_lab: AdapterLab, kind: str) -> None:
    """It ended in an AttributeError, since LoHa has no part in a blend (found by test_stateful.py)."""
    comparison = full_lab.compare("Hi", columns=["wide", {"pirate": 0.5, "wide": 1.0}], max_new_tokens=2)
    full_lab.delete_adapter("pirate")
    method = {"loha": "loha", "dora": "lora"}[kind]
    fields = {"use_dora": True} if kind == "dora" else {}
    full_lab.add_adapter(method, "pirate", target_modules=["q_proj"], **fields)
    frame = full_lab.verify(comparison).set_index("column")
    assert bool(frame.loc["wide", "agrees"])
    row = frame.loc["pirate × 0.5 + wide"]
    assert not row["agrees"]
    assert not row["weights_agree"]
    assert "pirate is another adapter now" in row["note"]
