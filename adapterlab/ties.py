"""Where a column leaves the base: is it the adapter's doing, or could rounding have done it?

The shape of a batch changes the order in which sums are made, and so the last bits of every logit. Where the winner of
a step led by less than that, base or column might have said the other word in another batch: a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterlab.comparison import Generation

# By how much rounding alone moves the lead of a logit over another: the most that benchmarks/deviation.py saw, and a little
# more. Over 8-bit weights a last bit can tip an activation into the next of 255 steps, and that goes through the model.
ROUNDING = {"float64": 1e-9, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
QUANTIZED = {("8bit", "float32"): 1.5, ("8bit", "half"): 3.0, ("4bit", "float32"): 1e-3, ("4bit", "half"): 1.1}
WORST = max(*ROUNDING.values(), *QUANTIZED.values())


def rounding(quantization: str | None, dtype: str) -> float:
    """By how much rounding moves a lead, in logits: `quantization` as the lab names it, `dtype` as torch does."""
    dtype = dtype.removeprefix("torch.")
    if quantization is None:
        return ROUNDING.get(dtype, WORST)
    return QUANTIZED.get((quantization, dtype if dtype == "float32" else "half"), WORST)


def mark_differences(
    generations: Sequence[Generation], quantization: str | None, dtype: str, temperature: float = 0.0
) -> list[Generation]:
    """The same with `first_difference` and `tie` against the base's answer to the same prompt, where there is one.

    `temperature`: what leads were divided by, 0 for greedy. Only the first difference is judged: after it the two read
    different texts.
    """
    noise = rounding(quantization, dtype) / (temperature or 1.0)
    bases = {g.prompt_index: g for g in generations if not g.asked}
    return [_marked(g, bases.get(g.prompt_index), noise) for g in generations]


def _marked(generation: Generation, base: Generation | None, noise: float) -> Generation:
    place = None if base is None else first_difference(base.token_ids, generation.token_ids)
    if base is None or place is None:
        return generation
    tie = min(base.leads[place], generation.leads[place]) <= noise
    return replace(generation, first_difference=place, tie=tie)


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """The first place at which both have something and not the same; None if there is none."""
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), None)
