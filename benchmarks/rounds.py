"""Rounds: every contender once, one after another, so that the machine's bad minutes hit all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from checks import Checker
from contenders import BASE, Stage, Texts, Turn, make_chains
from record import Timing
from workloads import Plan, method_of

WARM_TOKENS = 4
IN_TURN = ("in_turn", "merged")


@dataclass(frozen=True)
class Timed:
    """A turn as it went: `label` is the column of contenders that run their columns one after another."""

    contender: str
    columns: int
    label: str
    seconds: float


@contextmanager
def settled_memory() -> Iterator[None]:
    """Python's collector leaves alone what is loaded by now: walking all of it takes 0.3 s, in whoever's turn it falls."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def warm_up(stage: Stage, plan: Plan) -> None:
    """Every contender once, with few tokens and the most columns."""
    stage.new_tokens = min(WARM_TOKENS, plan.new_tokens)
    for chain in make_chains(stage, (plan.most,), [BASE, *stage.names]):
        run_chain(chain, lambda contender, texts: None)
    stage.new_tokens = plan.new_tokens


def time_rounds(stage: Stage, plan: Plan, checker: Checker, report: Callable[[str], None]) -> list[list[Timed]]:
    """All rounds, each beginning with another contender; every text is checked."""
    rounds = []
    for number in range(plan.rounds):
        chains = make_chains(stage, plan.columns, [BASE, *in_turn(stage.names, plan.timed_in_turn, number)])
        first = number * len(chains) // plan.rounds
        rounds.append([timed for c in (*chains[first:], *chains[:first]) for timed in run_chain(c, checker.add)])
        if number == 0:
            checker.judge()  # a wrong token stops the run now, not when all is timed
        report(f"  round {number + 1} of {plan.rounds}: {sum(timed.seconds for timed in rounds[-1]):.0f} s")
    return rounds


def in_turn(names: list[str], count: int, number: int) -> list[str]:
    """The adapters that round `number` times one after another: `count` of each method, going on where it ended last."""
    chosen = set()
    for method in {method_of(name) for name in names}:
        alike = [name for name in names if method_of(name) == method]
        chosen |= {alike[(number * count + i) % len(alike)] for i in range(min(count, len(alike)))}
    return [name for name in names if name in chosen]


def run_chain(chain: list[Turn], hear: Callable[[str, Texts], None]) -> list[Timed]:
    """Run and time the turns; `hear` gets what each said."""
    gc.collect()
    timed = []
    for turn in chain:
        if turn.before is not None:
            turn.before()
        started = time.perf_counter()
        said = turn.run()
        seconds = time.perf_counter() - started
        if turn.after is not None:
            turn.after()
        hear(turn.contender, said)
        timed.append(Timed(turn.contender, turn.columns, next(iter(said)), seconds))
    return timed


def summarise(rounds: list[list[Timed]], names: list[str], columns: tuple[int, ...]) -> tuple[Timing, ...]:
    """One `Timing` for each contender and number of columns; those in turn are added up to every number asked for."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for timed in rounds:
        for turn in timed:
            if turn.contender not in IN_TURN:
                seconds[turn.contender, turn.columns].append(turn.seconds)
        for contender in IN_TURN:
            runs = {turn.label: turn.seconds for turn in timed if turn.contender == contender}
            alike: dict[str, list[float]] = defaultdict(list)
            for name in runs.keys() - {BASE}:
                alike[method_of(name)].append(runs[name])
            each = [runs.get(name, statistics.mean(alike[method_of(name)])) for name in names]
            seconds[f"{contender}_one", 1].append(statistics.mean(alike[method_of(names[0])]))
            for n in columns:
                seconds[contender, n + 1].append(runs[BASE] + sum(each[:n]))
    always = set.intersection(*({turn.label for turn in timed if turn.contender in IN_TURN} for timed in rounds))
    return tuple(
        Timing(contender, n, tuple(numbers), contender in IN_TURN and not {BASE, *names[: n - 1]} <= always)
        for (contender, n), numbers in seconds.items()
    )
