"""The project's targets, held against what was measured. Pure: results in, rows out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from record import Part, Results
from workloads import ADAPTERS, MODELS

LORA, MIXED = ADAPTERS["lora"], ADAPTERS["mixed"]


class Measured(Protocol):
    """A contender's seconds, which can be held against another's."""

    def over(self, other: Any) -> tuple[float, float, float]:
        """Median, smallest and largest ratio over rounds."""


@dataclass(frozen=True)
class Target:
    """What was wanted and what was measured, as text; `met` is None where there is no limit."""

    text: str
    wanted: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return "" if self.met is None else "met" if self.met else "**not met**"


def target_rows(results: Results) -> list[Target]:
    """All targets of base + 8 on the demo model in fp32, as far as this run measured them."""
    parts = {part.adapters: part for part in results.parts if (part.model, part.dtype) == (MODELS["demo"], "float32")}
    rows: list[Target] = []
    if LORA in parts:
        rows += _lora_rows(parts[LORA])
    if MIXED in parts:
        rows += _mixed_rows(parts[MIXED])
    return rows


def _lora_rows(part: Part) -> Iterator[Target]:
    n = part.columns[-1]
    what = f"base + {n - 1} LoRA"
    lab, floor, one = part.find("lab", n), part.find("floor", n), part.find("one")
    yield from at_most(f"{what}: lab / floor", lab, floor, 1.10)
    yield from ratio_row(f"{what}: lab / one base generation", lab, one, "as near the floor as that gives")
    yield from ratio_row(f"{what}: floor / one base generation", floor, one, "")
    yield from _at_least(f"{what}: PEFT `adapter_names` / lab", part.find("peft_batch", n), lab, 2.0)
    yield from _at_least(f"{what}: in turn / lab", part.find("in_turn", n), lab, 5.0)
    yield from _at_least(f"{what}: pre-merged in turn / lab", part.find("merged", n), lab, 4.2)
    yield from at_most("one adapter through the lab / base alone", part.find("lab_one"), one, 1.08)
    yield from ratio_row("one adapter through PEFT / base alone", part.find("in_turn_one"), one, "")
    yield from at_most("one column more on a finished comparison / one generation", part.find("one_more"), one, 1.1)
    rerun = part.find("rerun")
    if rerun is not None:
        spread = f"{1e3 * min(rerun.seconds):.1f} to {1e3 * max(rerun.seconds):.1f}"
        yield Target("unchanged rerun", "< 50 ms", f"{1e3 * rerun.median:.1f} ms ({spread})", rerun.median < 0.05)
    for whose, wanted in (("lab", "≤ 1 ms"), ("peft", "")):
        calls = part.switches.get(whose)
        if calls:
            median = statistics.median(calls)
            name = f"{'`set_adapter`' if wanted else 'PEFT `set_adapter`'}, {n - 1} adapters on {part.adapted_layers} layers"
            spread = f"{min(calls):.3f} to {max(calls):.3f}"
            yield Target(name, wanted, f"{median:.3f} ms ({spread})", median <= 1 if wanted else None)
    yield _memory(f"{what}: ", part)


def _mixed_rows(part: Part) -> Iterator[Target]:
    n = part.columns[-1]
    what = f"base + {n - 1} mixed"
    lab = part.find("lab", n)
    yield from at_most(f"{what}: lab / floor", lab, part.find("floor", n), 1.15)
    yield from ratio_row(f"{what}: lab / one base generation", lab, part.find("one"), "")
    yield from _at_least(f"{what}: in turn / lab", part.find("in_turn", n), lab, 5.0)
    yield from _at_least(f"{what}: pre-merged in turn / lab", part.find("merged", n), lab, 4.2)
    yield _memory(f"{what}: ", part)


def _memory(what: str, part: Part) -> Target:
    ratio = part.memory.ratio
    return Target(
        f"{what}peak tensor bytes / (base weights + adapters + KV cache)", "≤ 1.05", f"{ratio:.3f}", ratio <= 1.05
    )


def at_most(text: str, mine: Measured | None, other: Measured | None, limit: float) -> Iterator[Target]:
    return ratio_row(text, mine, other, f"≤ {limit:.2f}", high=limit)


def _at_least(text: str, mine: Measured | None, other: Measured | None, limit: float) -> Iterator[Target]:
    return ratio_row(text, mine, other, f"≥ {limit:.1f}", low=limit)


def ratio_row(
    text: str,
    mine: Measured | None,
    other: Measured | None,
    wanted: str,
    *,
    low: float = 0.0,
    high: float | None = None,
) -> Iterator[Target]:
    """The ratio's row, if this run measured both; without a limit, it is neither met nor missed."""
    if mine is None or other is None:
        return
    median, least, most = mine.over(other)
    met = None if high is None and not low else low <= median <= (high or median)
    yield Target(text, wanted, f"{median:.3f} ({least:.2f} to {most:.2f})", met)
