"""Where a column first leaves base, and whether rounding could have done it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapterlab import AdapterLab, Comparison, Generation
from adapterlab.quantization import computing_dtype
from adapterlab.ties import QUANTIZED, ROUNDING, first_difference, mark_differences, rounding


def said(token_ids: list[int], leads: list[float], asked: Any = (("a", 1.0),), prompt_index: int = 0) -> Generation:
    """A generation of these tokens, each of which won by that lead."""
    return Generation(
        column="a" if asked else "base",
        asked=asked,
        prompt_index=prompt_index,
        prompt="?",
        text="",
        token_ids=tuple(token_ids),
        tokens=tuple(map(str, token_ids)),
        logprobs=(-1.0,) * len(token_ids),
        leads=tuple(leads),
        finish_reason="length",
        seconds=1.0,
        active_adapters=(),
        multipliers=(),
        logit_shift=0.0,
        weights_digest="",
    )


def judge(base: Generation, column: Generation, dtype: str = "torch.bfloat16", **settings: Any) -> tuple[Any, bool]:
    marked = mark_differences([base, column], settings.pop("quantization", None), dtype, **settings)
    assert marked[0] == base
    return marked[1].first_difference, marked[1].tie


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) is None, "one that was cut has not said otherwise"
    assert first_difference([], [1]) is None
    assert first_difference([1], [2]) == 0


def test_a_tie_is_where_either_side_hardly_led() -> None:
    noise = ROUNDING["bfloat16"]
    firm, loose = 10 * noise, 0.5 * noise
    assert judge(said([1, 2], [firm] * 2, ()), said([1, 3], [firm] * 2)) == (1, False)
    assert judge(said([1, 2], [firm, loose], ()), said([1, 3], [firm] * 2)) == (1, True)
    assert judge(said([1, 2], [firm] * 2, ()), said([1, 3], [firm, loose])) == (1, True)
    assert judge(said([1, 2], [loose] * 2, ()), said([1, 2], [loose] * 2)) == (None, False)
    assert judge(said([1, 2, 4], [firm, firm, loose], ()), said([1, 3, 5], [firm, firm, loose])) == (1, False), (
        "after the first difference the two read different texts"
    )


def test_only_exact_ties_count_in_fp32() -> None:
    base, column = said([1], [1e-6], ()), said([2], [1.0])
    assert judge(base, column, "torch.float32") == (0, True)
    assert judge(said([1], [0.01], ()), column, "torch.float32") == (0, False)
    assert judge(said([1], [0.01], ()), column, "torch.bfloat16") == (0, True)
    assert judge(said([1], [0.01], ()), column, "torch.float32", quantization="4bit") == (0, False)
    assert judge(said([1], [0.01], ()), column, "torch.float16", quantization="4bit") == (0, True)


def test_leads_of_sampling_are_in_units_of_the_temperature() -> None:
    noise = ROUNDING["bfloat16"]
    base, column = said([1], [1.5 * noise], ()), said([2], [100.0])
    assert judge(base, column, temperature=1.0) == (0, False)
    assert judge(base, column, temperature=0.5) == (0, True), "divided by it, the noise is twice as large"
    assert judge(base, column, temperature=2.0) == (0, False)


def test_each_prompt_has_its_own_base() -> None:
    parts = [
        said([1], [9.0], (), 0),
        said([2], [9.0], (), 1),
        said([2], [9.0], prompt_index=0),
        said([2], [9.0], prompt_index=1),
    ]
    assert [g.first_difference for g in mark_differences(parts, None, "torch.float32")] == [None, None, 0, None]
    assert [g.first_difference for g in mark_differences(parts[2:], None, "torch.float32")] == [None, None], "no base"


def test_what_is_unknown_rounds_as_the_worst() -> None:
    worst = max(*ROUNDING.values(), *QUANTIZED.values())
    assert rounding(None, "torch.float8_e4m3fn") == rounding("gptq", "torch.float32") == worst


def test_quantised_weights_round_as_measured() -> None:
    """The leads that benchmarks/deviation.py saw move, in its results, stay below what counts as a tie."""
    page = (Path(__file__).parent.parent / "benchmarks" / "results" / "deviation.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    moved = {row[0]: max(map(float, row[3:5])) for row in rows if row[0] and "does not" not in row[1]}
    assert len(moved) == 7
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    for kind, most in moved.items():
        quantization, _, dtype = kind.rpartition(", ")
        assert most <= rounding(quantization.replace("-", "") or None, f"torch.{names[dtype]}"), kind


@pytest.mark.parametrize(
    ("dtype", "inner", "narrowest"),
    [
        ("float32", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        ("float16", "bfloat16", "bfloat16"),
    ],
)
def test_4bit_weights_round_as_what_they_are_multiplied_in(dtype: str, inner: str, narrowest: str) -> None:
    config = SimpleNamespace(quantization_config=SimpleNamespace(bnb_4bit_compute_dtype=getattr(torch, inner)))
    model: Any = SimpleNamespace(dtype=getattr(torch, dtype), config=config, is_loaded_in_4bit=True)
    assert computing_dtype(model) == f"torch.{narrowest}"
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = False, True
    assert computing_dtype(model) == f"torch.{dtype}"


def test_wider_numbers_round_less() -> None:
    assert 0 < ROUNDING["float64"] < ROUNDING["float32"] < ROUNDING["float16"] < ROUNDING["bfloat16"] < math.inf


@pytest.fixture
def comparison(full_lab: AdapterLab) -> Comparison:
    return full_lab.compare(["What is the moon?", "Who are you?"], [None, "pirate", {"poet": 1e-7}], max_new_tokens=6)


def test_a_comparison_says_it_in_frame_page_and_file(comparison: Comparison, tmp_path: Path) -> None:
    frame = comparison.to_frame()
    for index in range(2):
        base = comparison[None, index]
        for generation in (g for g in comparison.generations if g.prompt_index == index):
            places = [i for i, (a, b) in enumerate(zip(base.token_ids, generation.token_ids)) if a != b]
            assert generation.first_difference == (places[0] if places else None)
    assert comparison["pirate", 0].first_difference is not None
    assert frame["first_difference"].isna().tolist() == [g.first_difference is None for g in comparison.generations]
    assert frame["tie"].tolist() == [False] * 6
    page = comparison._repr_html_()
    assert f"first leaves base at token {comparison['pirate', 0].first_difference + 1}" in page
    assert "tie" not in page
    content = json.loads(comparison.to_json(tmp_path / "c.json").read_text(encoding="utf-8"))
    content["generations"][1]["tie"] = True
    (tmp_path / "tied.json").write_text(json.dumps(content), encoding="utf-8")
    assert "(tie: " in Comparison.from_json(tmp_path / "tied.json")._repr_html_()


def test_files_from_before_it_can_be_read(comparison: Comparison, tmp_path: Path) -> None:
    content = json.loads(comparison.to_json(tmp_path / "new.json").read_text(encoding="utf-8"))
    for generation in content["generations"]:
        for key in ("batch_size", "cached", "first_difference", "tie"):
            del generation[key]
    (tmp_path / "old.json").write_text(json.dumps(content), encoding="utf-8")
    old = Comparison.from_json(tmp_path / "old.json")
    assert [g.text for g in old.generations] == [g.text for g in comparison.generations]
    assert old.to_frame()["first_difference"].isna().all()
    assert not old.to_frame()["cached"].any()


@pytest.mark.parametrize(
    ("key", "value"), [("cached", 1), ("tie", None), ("first_difference", "x"), ("batch_size", 1.5)]
)
def test_damaged_files_are_said_to_be(comparison: Comparison, tmp_path: Path, key: str, value: Any) -> None:
    from adapterlab import AdapterLabError

    content = json.loads(comparison.to_json(tmp_path / "new.json").read_text(encoding="utf-8"))
    content["generations"][0][key] = value
    (tmp_path / "bad.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(AdapterLabError, match="damaged"):
        Comparison.from_json(tmp_path / "bad.json")
