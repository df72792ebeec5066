"""What the benchmark writes down: plain data, with JSON to keep it in. Nothing here sees a model."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

FORMAT = "adapterlab-benchmark"
VERSION = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one number a round. columns: how many it generated, the base included.

    estimated: not every adapter was timed in every round; a round's number is its base run plus as many times the mean of
    its adapter runs as there are adapters.
    """

    contender: str
    columns: int
    seconds: tuple[float, ...]
    estimated: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Timing) -> tuple[float, float, float]:
        """Median, smallest and largest of the ratios within one round, so that a slow minute of the machine cancels."""
        ratios = [mine / theirs for mine, theirs in zip(self.seconds, other.seconds)]
        return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class Check:
    """One contender's greedy tokens held against plain PEFT with the adapter alone.

    texts: how many different (column, text) pairs it gave. equal: those that are the text of the same column in turn, or
    greedy token by token. near_ties: tokens that another one leads under plain PEFT's logits after the same text;
    largest_gap: by how much at most, in logits.
    """

    contender: str
    texts: int
    equal: int
    near_ties: int
    largest_gap: float


@dataclass(frozen=True)
class Memory:
    """Bytes of tensor storage, each storage counted once. contributors: the largest at the peak, as (what, bytes)."""

    base: int
    adapters: int
    kv_cache: int
    before: int
    peak: int
    after: int
    contributors: tuple[tuple[str, int], ...]

    @property
    def ratio(self) -> float:
        return self.peak / (self.base + self.adapters + self.kv_cache)


@dataclass(frozen=True)
class Part:
    """One model, one set of adapters, one dtype.

    switches: milliseconds of single `set_adapter` calls, by whose they are. tolerance: the largest gap, in logits, that
    rounding explains here; noise: what one and several equal rows differ by in plain PEFT, which it is taken from.
    """

    model: str
    adapters: str
    dtype: str
    parameters: int
    adapted_layers: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    timings: tuple[Timing, ...]
    switches: dict[str, tuple[float, ...]]
    checks: tuple[Check, ...]
    noise: float
    tolerance: float
    memory: Memory
    notes: tuple[str, ...] = ()
    elapsed: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.model}, {self.adapters}, {self.dtype}"

    @property
    def columns(self) -> list[int]:
        """Numbers of columns that the lab compared, ascending."""
        return sorted(t.columns for t in self.timings if t.contender == "lab")

    def find(self, contender: str, columns: int | None = None) -> Timing | None:
        """The contender's timing for so many columns; without a number, its only one. None where it has none."""
        found = [t for t in self.timings if t.contender == contender and columns in (None, t.columns)]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Results:
    """One run of the benchmark."""

    machine: dict[str, str]
    created: str
    parts: tuple[Part, ...] = ()

    @classmethod
    def started(cls) -> Results:
        return cls(describe_machine(), datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))

    def with_part(self, part: Part) -> Results:
        return replace(self, parts=(*self.parts, part))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what `to_json` wrote; ValueError for anything else."""
        content = json.loads(text)
        if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"this is no {FORMAT} of version {VERSION}")
        return cls(content["machine"], content["created"], tuple(_part(part) for part in content["parts"]))


def _part(raw: dict[str, Any]) -> Part:
    memory = raw["memory"]
    rebuilt = {
        "timings": tuple(Timing(**{**t, "seconds": tuple(t["seconds"])}) for t in raw["timings"]),
        "switches": {whose: tuple(numbers) for whose, numbers in raw["switches"].items()},
        "checks": tuple(Check(**check) for check in raw["checks"]),
        "memory": Memory(**{**memory, "contributors": tuple((w, b) for w, b in memory["contributors"])}),
        "notes": tuple(raw["notes"]),
    }
    return Part(**{**raw, **rebuilt})


def describe_machine() -> dict[str, str]:
    """The machine and the versions that ran, without names of hosts or folders."""
    import psutil
    import torch

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "adapterlab"))
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "instructions": _instructions(),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "versions": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    for line in _cpu_information():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _instructions() -> str:
    """What decides how fast bfloat16 is."""
    import torch

    flags = {flag for line in _cpu_information() if line.startswith("flags") for flag in line.split(":", 1)[1].split()}
    half = sorted(flags & {"avx512_bf16", "amx_bf16", "amx_tile", "avx_ne_convert"})
    return f"{torch.backends.cpu.get_cpu_capability()}, bfloat16 in hardware: {', '.join(half) or 'no'}"


def _cpu_information() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []


def _commit() -> str:
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = [line for line in git("status", "--porcelain").splitlines() if "benchmarks/results" not in line]
        return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
