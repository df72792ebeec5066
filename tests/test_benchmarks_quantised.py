"""What benchmarks/quantised.py makes of numbers; no model is loaded."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_concatenation import comparison, said

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from quantised import REFERENCE, Found, kinds, page, parse

MEMORY = {"base_bytes": 538_000_000, "adapter_bytes": 0, "peak_bytes": 20_000_000}
FIRST = Found(
    (-1.0, -2.0, -3.0),
    comparison(said("base", [5, 6, 7], [-1.0] * 3), said("base", [8, 9], [-1.0] * 2, 1), memory=MEMORY),
    (5, 6, 7, 8, 9),
)


def test_against_fp32() -> None:
    other = replace(FIRST, logprobs=(-1.5, -2.0, -2.0), choices=(5, 6, 8, 8, 8))
    assert FIRST.nll == 2.0
    assert other.change(FIRST) == pytest.approx((0.5 + 0 + 1) / 3)
    assert other.agreement(FIRST) == 3 / 5
    assert FIRST.agreement(FIRST) == 1


def test_the_page() -> None:
    answers = comparison(said("base", [5, 6, 8], [-1.0] * 3), said("base", [8, 9], [-1.0] * 2, 1), quantization="4bit")
    other = Found((-1.5, -2.0, -2.0), answers, (5, 6, 8, 8, 9))
    text = page({REFERENCE: FIRST, "4-bit nf4": other}, 3)
    assert f"| fp32 | 538.0 | 20 | 2.0000 | {math.exp(2):.2f} |  |  |  |  |" in text
    assert f"| 4-bit nf4 | nan |  | 1.8333 | {math.exp(5.5 / 3):.2f} | 0.5000 | 80.0% | 1 of 2 | 3 |" in text
    assert "3 tokens of 4 texts, and 2 short prompts" in text


def test_every_kind_can_be_asked_for() -> None:
    assert parse([]).kinds == list(kinds())
    assert len({repr(settings) for settings in kinds().values()}) == 6
    with pytest.raises(SystemExit):
        parse(["--prompts", "0"])
