"""What `lab.delta_norms` costs: from the factors, against forming every ΔW.

    python benchmarks/norms.py [--rounds 7] [--r 16] [--quick] [--output benchmarks/results] [--render]

One LoRA on all linear layers of the full opt-350m geometry, random weights, fp32. Contenders:

- lab, first call: `lab.delta_norms(name)` with no ‖W‖ kept: norms, ‖ΔW‖ / ‖W‖, singular values, effective ranks
- lab, later calls: the same, with ‖W‖ of before
- weights: ‖W‖ of every adapted layer by torch.linalg.norm, which ‖ΔW‖ / ‖W‖ needs in any way
- (a) formed: ΔW = scaling · B @ A of every layer and its norm, and nothing else
- (b) formed, SVD: the same quantities as the lab: ΔW, its norm, torch.linalg.svdvals of it, and ‖W‖. It takes minutes, so a
  round does one layer of each shape, another one each round, and counts it for all of that shape: an estimate
- (c) PEFT: `get_delta_weight` of every layer and its norm

Rounds are interleaved and each begins with another contender. Before, the lab's norms are held against all formed ones, and
its singular values against float64 SVDs of one layer of each shape. Peaks are bytes of tensors above what was there before
(tensors.py), from runs of their own. Writes norms.json and norms.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from record import Timing, describe_machine
from report import table
from targets import ratio_row

HERE = Path(__file__).resolve().parent
FORMAT, VERSION = "adapterlab-norms-benchmark", 1
NAME = "all-linear"
CLOSE = 1e-5  # of the norm, and of the largest singular value: what float32 products may be off by
TITLES = {
    "lab_first": "**`lab.delta_norms`, first call**",
    "lab": "**`lab.delta_norms`, later calls**",
    "weights": "‖W‖ alone, `torch.linalg.norm`",
    "form": "(a) ΔW formed, its norm alone",
    "svd": "(b) ΔW formed, norm, `svdvals`, ‖W‖: the lab's quantities",
    "peft": "(c) PEFT's `get_delta_weight`, its norm alone",
}


class WrongNumber(Exception):
    """The lab and the formed ΔW do not say the same."""


@dataclass(frozen=True)
class NormResults:
    """One run. layers: how many of each shape, (out, in) as text. peaks: bytes by contender; of (b), of a single layer.

    norm_error, value_error: largest relative differences from the formed ΔW.
    """

    machine: dict[str, str]
    created: str
    parameters: int
    r: int
    layers: dict[str, int]
    timings: tuple[Timing, ...]
    peaks: dict[str, int]
    norm_error: float
    value_error: float

    def find(self, contender: str) -> Timing:
        return next(timing for timing in self.timings if timing.contender == contender)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> NormResults:
        """Read what `to_json` wrote; ValueError for anything else."""
        content = json.loads(text)
        if not isinstance(content, dict) or (content.pop("format", 0), content.pop("version", 0)) != (FORMAT, VERSION):
            raise ValueError(f"this is no {FORMAT} of version {VERSION}")
        timings = tuple(Timing(**{**one, "seconds": tuple(one["seconds"])}) for one in content.pop("timings"))
        return cls(**content, timings=timings)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time lab.delta_norms against forming every ΔW.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="two rounds: does it run?")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--render", action="store_true", help="only the page, from norms.json")
    asked = parser.parse_args(arguments)
    if asked.rounds < 1 or asked.r < 1:
        parser.error("--rounds and --r start at 1")
    if asked.render:
        results = NormResults.from_json((asked.output / "norms.json").read_text(encoding="utf-8"))
    else:
        from workloads import random_opt, word_tokenizer

        model = random_opt().eval()
        results = run(model, word_tokenizer(model.config.vocab_size), asked.r, 2 if asked.quick else asked.rounds)
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "norms.json").write_text(results.to_json(), encoding="utf-8")
    (asked.output / "norms.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def run(model: Any, tokenizer: Any, r: int, rounds: int, report: Callable[[str], None] = print) -> NormResults:
    """Make the adapter, check the lab's numbers, time the rounds, and count the bytes."""
    import torch
    from peft import LoraConfig

    from adapterlab import AdapterLab

    lab = AdapterLab(model, tokenizer=tokenizer)
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", init_lora_weights=False)
    lab.add_adapter(config, NAME)
    lab.set_trainable(None)
    lab.set_adapter(None)
    stage = Stage(lab)
    with torch.no_grad():
        norm_error, value_error = stage.check()
        timings = stage.time(rounds, report)
        peaks = stage.peaks()
    results = NormResults(
        machine=describe_machine(),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        r=r,
        layers={" × ".join(map(str, shape)): len(layers) for shape, layers in stage.shapes.items()},
        timings=timings,
        peaks=peaks,
        norm_error=norm_error,
        value_error=value_error,
    )
    lab.close()
    return results


class Stage:
    """The lab, PEFT's layers of its adapter, and the contenders."""

    def __init__(self, lab: Any) -> None:
        self.lab = lab
        self.layers: list[Any] = list(lab._adapters.mounts.adapters[NAME].layers.values())
        self.shapes: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)  # places of the layers of a shape
        for place, layer in enumerate(self.layers):
            self.shapes[tuple(layer.get_base_layer().weight.shape)].append(place)
        self.contenders: dict[str, Callable[[], Any]] = {
            "lab_first": self.first_call,
            "lab": lambda: lab.delta_norms(NAME),
            "weights": lambda: [base_norm(layer) for layer in self.layers],
            "form": lambda: [form(layer).norm() for layer in self.layers],
            "peft": lambda: [layer.get_delta_weight(NAME).norm() for layer in self.layers],
        }

    def first_call(self) -> Any:
        from adapterlab import base_weights

        base_weights._known.clear()
        return self.lab.delta_norms(NAME)

    def check(self) -> tuple[float, float]:
        """Largest relative differences of norms, and of singular values in terms of the largest; `WrongNumber` beyond
        rounding."""
        import torch

        frame = self.first_call()
        norms = [(row, float(form(layer).double().norm())) for row, layer in zip(frame["norm"], self.layers)]
        error = max(abs(mine / its - 1) for mine, its in norms)
        value_error = 0.0
        for places in self.shapes.values():
            layer, ours = self.layers[places[0]], torch.tensor(frame["singular_values"][places[0]]).double()
            values = torch.linalg.svdvals(form(layer, torch.float64))[: len(ours)]
            value_error = max(value_error, float((ours - values).abs().max() / values[0]))
        if max(error, value_error) > CLOSE:
            raise WrongNumber(f"norms are off by {error:.2g}, singular values by {value_error:.2g}")
        return error, value_error

    def time(self, rounds: int, report: Callable[[str], None]) -> tuple[Timing, ...]:
        for contender in self.contenders.values():
            contender()
        seconds: dict[str, list[float]] = {name: [] for name in (*self.contenders, "svd")}
        names = list(seconds)
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if name == "svd":
                    seconds[name].append(self.estimate_svd(number))
                    continue
                started = time.perf_counter()
                self.contenders[name]()
                seconds[name].append(time.perf_counter() - started)
            took = ", ".join(f"{name} {each[-1]:.3f}" for name, each in seconds.items())
            report(f"round {number + 1} of {rounds}, seconds: {took}")
        return tuple(Timing(name, 1, tuple(each), name == "svd") for name, each in seconds.items())

    def estimate_svd(self, number: int) -> float:
        """Seconds of (b) for all layers, from one of each shape."""
        total = 0.0
        for places in self.shapes.values():
            started = time.perf_counter()
            self.svd(self.layers[places[number % len(places)]])
            total += len(places) * (time.perf_counter() - started)
        return total

    def svd(self, layer: Any) -> Any:
        import torch

        delta = form(layer)
        return delta.norm(), torch.linalg.svdvals(delta), base_norm(layer)

    def peaks(self) -> dict[str, int]:
        from tensors import StorageCounter

        def largest_svd() -> None:
            for places in self.shapes.values():
                self.svd(self.layers[places[0]])

        found = {}
        for name, contender in {**self.contenders, "svd": largest_svd}.items():
            with StorageCounter() as counter:
                contender()
            found[name] = counter.peak - counter.before
        return found


def form(layer: Any, dtype: Any = None) -> Any:
    """ΔW of one layer, (out, in)."""
    A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return layer.scaling[NAME] * (B.to(dtype or B.dtype) @ A.to(dtype or A.dtype))


def base_norm(layer: Any) -> Any:
    import torch

    return torch.linalg.norm(layer.get_base_layer().weight)


def markdown(results: NormResults) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: NormResults) -> Iterator[str]:
    lab = results.find("lab")
    shapes = ", ".join(f"{count} of {shape}" for shape, count in results.layers.items())
    yield "# Norms and singular values of ΔW: from the factors, or by forming it"
    yield ""
    yield f"Written by `benchmarks/norms.py` on {results.created}; every number is in `norms.json`."
    yield ""
    yield from table(["machine", ""], [[key, text] for key, text in results.machine.items()])
    yield ""
    yield (
        f"opt-350m geometry, {results.parameters:,} parameters, random weights, fp32. LoRA r = {results.r} on all linear "
        f"layers: {shapes}. {len(lab.seconds)} interleaved rounds: medians, and the median of the ratios within a round "
        "with the lowest and the highest."
    )
    yield ""
    rows = []
    for contender, title in TITLES.items():
        timing = results.find(contender)
        middle, least, most = timing.over(lab)
        mark = "≈ " if timing.estimated else ""
        peak = results.peaks[contender]
        rows.append(
            [
                title,
                f"{mark}{1e3 * timing.median:.1f}",
                f"{mark}{middle:.1f} ({least:.1f} to {most:.1f})",
                f"{peak / 1e6:.2f}",
            ]
        )
    yield from table(["", "ms", "times the lab's later calls", "peak MB of tensors"], rows)
    yield ""
    yield (
        "≈: each round does one layer of each shape and counts it for all of that shape; its peak is that of the largest "
        "layer. (a) and (c) give the norm alone. Peaks lie on top of base and adapter, and leave out what LAPACK allocates "
        "within itself."
    )
    yield ""
    targets = []
    for name, title in (("lab_first", "first call"), ("lab", "later calls")):
        mine = results.find(name)
        targets += ratio_row(f"the same quantities: (b) / lab, {title}", results.find("svd"), mine, "≥ 20", low=20)
        targets += ratio_row(f"the norm alone: (a) / lab, {title}", results.find("form"), mine, "")
        targets += ratio_row(f"the norm alone: (c) / lab, {title}", results.find("peft"), mine, "")
    yield from table(
        ["", "target", "measured (lowest to highest round)", ""],
        [[row.text, row.wanted, row.measured, row.verdict] for row in targets],
    )
    yield ""
    yield (
        f"Against the formed ΔW: norms of all layers within {results.norm_error:.1e}, singular values within "
        f"{results.value_error:.1e} of the largest."
    )


if __name__ == "__main__":
    main()
