"""What the training benchmark writes down: plain data, with JSON to keep it in. Nothing here sees a model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

from record import describe_machine

FORMAT = "adapterlab-training-benchmark"
VERSION = 1


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one contender: each round's steps, one after another."""

    contender: str
    rounds: tuple[tuple[float, ...], ...]

    @property
    def median(self) -> float:
        """The median over rounds of a round's median step."""
        return statistics.median(statistics.median(steps) for steps in self.rounds)

    @property
    def epoch(self) -> float:
        """The median over rounds of a round's steps together."""
        return statistics.median(map(sum, self.rounds))

    def over(self, other: StepTimes) -> tuple[float, float, float]:
        """Median, smallest and largest over rounds of the median ratio of a step to the other's on the same batch."""
        ratios = [
            statistics.median(mine / theirs for mine, theirs in zip(*both)) for both in zip(self.rounds, other.rounds)
        ]
        return statistics.median(ratios), min(ratios), max(ratios)

    def epoch_over(self, other: StepTimes) -> tuple[float, float, float]:
        """Median, smallest and largest over rounds of the ratio of all steps together: their batches may differ."""
        ratios = [sum(mine) / sum(theirs) for mine, theirs in zip(self.rounds, other.rounds)]
        return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class Work:
    """Seconds of one piece of AdaLoRA's own work in each step of all rounds. whose: the contender's."""

    whose: str
    what: str
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Agreement:
    """How many of `what` were equal to the bit, of how many; in the round where the fewest were."""

    what: str
    equal: int
    of: int

    @classmethod
    def fewest(cls, what: str, counts: Sequence[tuple[int, int]]) -> Agreement:
        return cls(what, *min(counts))


@dataclass(frozen=True)
class Race:
    """Contenders that took the same steps on the same batches. widths: positions in a row of each timed batch.

    equal: tensors of the lab's LoRA and plain Trainer's, triplets that the lab and PEFT kept.
    """

    layers: int
    r: int
    target_r: int
    batch: int
    warm: int
    widths: tuple[int, ...]
    times: tuple[StepTimes, ...]
    work: tuple[Work, ...]
    equal: tuple[Agreement, ...]

    @property
    def rounds(self) -> int:
        return len(self.times[0].rounds)

    def find(self, contender: str) -> StepTimes:
        return next(times for times in self.times if times.contender == contender)


@dataclass(frozen=True)
class Padding:
    """How rows are ordered. shares: order → share of all positions that is padding, in each of many epochs.

    times: of one epoch in the lab, by order; each round draws anew. lengths: shortest, mean and longest row.
    """

    rows: int
    batch: int
    lengths: tuple[int, float, int]
    shares: dict[str, tuple[float, ...]]
    times: tuple[StepTimes, ...]

    def find(self, order: str) -> StepTimes:
        return next(times for times in self.times if times.contender == order)


@dataclass(frozen=True)
class Footprint:
    """One training in a process of its own, on the longest rows; bytes of tensors, each storage counted once.

    base: of the model as it was loaded. parameters, gradients, optimizer: of what is trained. allocation: AdaLoRA's
    averages. peak: of all tensors alive at the most. largest: at that peak, as (what, bytes). resident: by how much the
    process's resident memory grew at the most from the loaded model on. checkpoint: of the saved weights on disk.
    """

    method: str
    trained: int
    base: int
    parameters: int
    gradients: int
    optimizer: int
    allocation: int
    peak: int
    resident: int
    checkpoint: int
    largest: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class TrainResults:
    """One run of the benchmark: what of it was asked for."""

    machine: dict[str, str]
    created: str
    model: str
    race: Race | None = None
    padding: Padding | None = None
    memory: tuple[Footprint, ...] = ()

    @classmethod
    def started(cls, model: str) -> TrainResults:
        return cls(describe_machine(), datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), model)

    def having(self, **parts: Any) -> TrainResults:
        return replace(self, **parts)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainResults:
        """Read what `to_json` wrote; ValueError for anything else."""
        content = json.loads(text)
        if not isinstance(content, dict) or (content.pop("format", 0), content.pop("version", 0)) != (FORMAT, VERSION):
            raise ValueError(f"this is no {FORMAT} of version {VERSION}")
        race, padding, memory = (content.pop(part) for part in ("race", "padding", "memory"))
        return cls(
            **content,
            race=race and _race(race),
            padding=padding and _padding(padding),
            memory=tuple(
                Footprint(**{**one, "largest": tuple((what, size) for what, size in one["largest"])}) for one in memory
            ),
        )


def _race(raw: dict[str, Any]) -> Race:
    rebuilt = {
        "widths": tuple(raw["widths"]),
        "times": _times(raw["times"]),
        "work": tuple(Work(**{**work, "seconds": tuple(work["seconds"])}) for work in raw["work"]),
        "equal": tuple(Agreement(**one) for one in raw["equal"]),
    }
    return Race(**{**raw, **rebuilt})


def _padding(raw: dict[str, Any]) -> Padding:
    rebuilt = {
        "lengths": tuple(raw["lengths"]),
        "shares": {order: tuple(shares) for order, shares in raw["shares"].items()},
        "times": _times(raw["times"]),
    }
    return Padding(**{**raw, **rebuilt})


def _times(raw: list[dict[str, Any]]) -> tuple[StepTimes, ...]:
    return tuple(StepTimes(one["contender"], tuple(map(tuple, one["rounds"]))) for one in raw)
