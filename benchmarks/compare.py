"""Base and N adapters side by side: every way to get it, timed in one run.

    python benchmarks/compare.py [--model demo|opt-350m] [--dtype float32|bfloat16] [--adapters lora|mixed|lora-qv]
                                 [--columns 1 2 4 8] [--rounds 5] [--new-tokens 64] [--quick]
                                 [--output benchmarks/results] [--render]

Without arguments, everything. Writes compare.json, compare.md and compare.png, after each part anew; `--render` makes
the page and the picture again from the JSON. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from record import Results
from workloads import Plan

HERE = Path(__file__).resolve().parent
# The targets are set for the demo model in float32, so there every column in turn is timed in every round. Elsewhere the
# two that a round times stand for the others, which keeps the whole near 40 minutes on two cores.
EVERYTHING = (
    Plan("demo", "lora", "float32"),
    Plan("demo", "mixed", "float32"),
    Plan("opt-350m", "lora-qv", "float32", timed_in_turn=2),
    Plan("demo", "lora", "bfloat16", timed_in_turn=2),
    Plan("opt-350m", "lora-qv", "bfloat16", timed_in_turn=2),
)
EXTRA = (Plan("demo", "mixed", "bfloat16", new_tokens=16, timed_in_turn=1),)  # only where asked for by name


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    if asked.render:
        write(Results.from_json((asked.output / "compare.json").read_text(encoding="utf-8")), asked.output)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from measure import run_part

    results = Results.started()
    for plan in plans(asked):
        print(f"{plan.model}, {plan.adapters}, {plan.dtype}", flush=True)
        results = results.with_part(run_part(plan, report=lambda line: print(line, flush=True)))
        write(results, asked.output)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time base + N adapters, every way there is.")
    parser.add_argument("--model", choices=sorted({plan.model for plan in EVERYTHING}))
    parser.add_argument("--adapters", choices=sorted({plan.adapters for plan in EVERYTHING}))
    parser.add_argument("--dtype", choices=sorted({plan.dtype for plan in EVERYTHING}))
    parser.add_argument("--columns", type=int, nargs="+", metavar="N", help="numbers of adapters, 1 to 8")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--quick", action="store_true", help="one round, 8 tokens, 1 and 2 adapters: does it run?")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--render", action="store_true", help="only the page and the picture, from compare.json")
    asked = parser.parse_args(arguments)
    if asked.columns and not all(1 <= n <= 8 for n in asked.columns):
        parser.error(f"--columns {' '.join(map(str, asked.columns))}: give numbers of adapters from 1 to 8")
    if any(number is not None and number < 1 for number in (asked.rounds, asked.new_tokens)):
        parser.error("--rounds and --new-tokens start at 1")
    return asked


def plans(asked: argparse.Namespace) -> list[Plan]:
    """The parts that were asked for, with the changes that were asked for."""
    keys = ("model", "adapters", "dtype")

    def wanted(plan: Plan) -> bool:
        return all(getattr(asked, key) in (None, getattr(plan, key)) for key in keys)

    chosen = [plan for plan in EVERYTHING if wanted(plan)] or [plan for plan in EXTRA if wanted(plan)]
    if not chosen:
        sys.exit(f"There is no part with model {asked.model}, adapters {asked.adapters}, dtype {asked.dtype}.")
    changes: dict[str, object] = {"rounds": 1, "new_tokens": 8, "columns": (1, 2)} if asked.quick else {}
    changes |= {key: getattr(asked, key) for key in ("rounds", "new_tokens") if getattr(asked, key) is not None}
    if asked.columns:
        changes["columns"] = tuple(sorted(set(asked.columns)))
    return [replace(plan, **changes) for plan in chosen]  # type: ignore[arg-type]


def write(results: Results, folder: Path) -> None:
    """compare.json, compare.md and compare.png; what is there is replaced."""
    from picture import draw
    from report import markdown

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(results.to_json(), encoding="utf-8")
    (folder / "compare.md").write_text(markdown(results), encoding="utf-8")
    draw(results).savefig(folder / "compare.png", bbox_inches="tight")  # the legend may be wider than one part


if __name__ == "__main__":
    main()
