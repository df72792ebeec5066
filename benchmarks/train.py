"""What training costs: the lab against plain Trainer, AdaLoRA against LoRA and PEFT's own allocator, padding, memory.

    python benchmarks/train.py [--part steps padding memory] [--rounds 5] [--steps 8] [--model demo|opt-350m] [--quick]
                               [--output benchmarks/results] [--render]

Without arguments, everything on the demo model. Writes train.json and train.md, after each part anew; `--render` makes
the page again from the JSON. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from train_record import TrainResults
from train_report import markdown
from workloads import MODELS

if TYPE_CHECKING:
    from train_steps import TrainPlan

HERE = Path(__file__).resolve().parent
PARTS = ("steps", "padding", "memory")


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    if asked.render:
        write(TrainResults.from_json((asked.output / "train.json").read_text(encoding="utf-8")), asked.output)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from train_memory import run_memory
    from train_steps import load, run_padding, run_race

    def report(line: str) -> None:
        print(line, flush=True)

    plan = plan_of(asked)
    results = TrainResults.started(MODELS[plan.model])
    if "memory" in asked.part:  # before this process takes memory itself
        report("memory")
        results = results.having(memory=run_memory(plan.model, report))
        write(results, asked.output)
    if {"steps", "padding"} & set(asked.part):
        lessons = load(plan.model)
    if "steps" in asked.part:
        report("steps")
        results = results.having(race=run_race(plan, *lessons, report))
        write(results, asked.output)
    if "padding" in asked.part:
        report("padding")
        results = results.having(padding=run_padding(plan, *lessons, report))
        write(results, asked.output)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training, and count its bytes.")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--model", choices=list(MODELS), default="demo")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="that count, in each round")
    parser.add_argument("--quick", action="store_true", help="one round of two steps: does it run?")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--render", action="store_true", help="only the page, from train.json")
    asked = parser.parse_args(arguments)
    if any(number is not None and number < 1 for number in (asked.rounds, asked.steps)):
        parser.error("--rounds and --steps start at 1")
    return asked


def plan_of(asked: argparse.Namespace) -> TrainPlan:
    from train_steps import TrainPlan

    changes = {"rounds": 1, "steps": 2} if asked.quick else {}
    changes |= {key: getattr(asked, key) for key in ("rounds", "steps") if getattr(asked, key) is not None}
    return replace(TrainPlan(asked.model), **changes)


def write(results: TrainResults, folder: Path) -> None:
    """train.json and train.md; what is there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(results.to_json(), encoding="utf-8")
    (folder / "train.md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
