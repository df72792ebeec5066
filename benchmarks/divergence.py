"""What `lab.divergence` costs: base and eight adapters over one text in one batch, against nine forwards in turn.

    python benchmarks/divergence.py [--adapters lora|mixed] [--tokens 512] [--rounds 5] [--quick] [--output benchmarks/results]

On the demo model in fp32, with eight adapters that act. Contenders read the same base tensors and the same ids:

- forwards: plain PEFT, `set_adapter` and one forward for each adapter and for the base; nothing is made of the logits
- in turn: the same, with the numbers that the lab gives made of them (logprob, KL, rank), each column's when it has run
- lab: `lab.divergence`

(For adapters of mixed methods, which one PeftModel can't hold, the lab's own model stands in for plain PEFT.) Rounds are
interleaved and each begins with another contender. Before they are timed, all numbers of the lab are held against those
made in turn. Peaks are bytes of tensors above what was there before (tensors.py), from runs of their own. Writes
divergence.json and divergence.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from record import describe_machine
from report import table
from workloads import ADAPTERS, adapter_configs, load_model, quiet_peft, share, write_adapters

HERE = Path(__file__).resolve().parent
COUNT = 8
TOLERANCE = 1e-3  # of logprobs and KL, in nats: fp32 rounding of another order of sums
TITLES = {
    "forwards": "nine forwards, logits only",
    "in turn": "nine forwards with the numbers",
    "lab": "lab.divergence",
}


class WrongNumber(Exception):
    """The contenders do not say the same."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time lab.divergence against forwards in turn.")
    parser.add_argument("--adapters", choices=["lora", "mixed"], default="lora")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round over 64 tokens: does it run?")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.tokens, asked.rounds = 64, 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    results = run(asked.adapters, asked.tokens, asked.rounds)
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "divergence.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (asked.output / "divergence.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def run(adapters: str, tokens: int, rounds: int) -> dict[str, Any]:
    from tensors import StorageCounter

    from adapterlab import AdapterLab

    model, tokenizer = load_model("demo", "float32")
    text = read_text(tokenizer, tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_adapters(model, adapter_configs(adapters, COUNT), Path(scratch))
        lab = AdapterLab(model, tokenizer=tokenizer)
        for name, folder in folders.items():
            lab.load_adapter(folder, name)
        lab.set_adapter(None)
        plain = Plain(lab, folders, one_model=adapters == "lora")
        ids = tokenizer(text)["input_ids"]
        contenders: dict[str, Callable[[], Any]] = {
            "forwards": lambda: plain.run(ids, numbers=False),
            "in turn": lambda: plain.run(ids, numbers=True),
            "lab": lambda: lab.divergence(text),
        }
        error = compare(contenders["in turn"](), contenders["lab"]())
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        names = list(contenders)
        for number in range(rounds):
            for name in names[number % 3 :] + names[: number % 3]:
                started = time.perf_counter()
                contenders[name]()
                seconds[name].append(time.perf_counter() - started)
            print(
                f"round {number + 1} of {rounds}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()),
                flush=True,
            )
        peaks = {}
        for name, contender in contenders.items():
            with StorageCounter() as counter:
                contender()
            peaks[name] = counter.peak - counter.before
    return {
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": describe_machine(),
        "adapters": ADAPTERS[adapters],
        "columns": COUNT + 1,
        "tokens": len(ids),
        "seconds": seconds,
        "peaks": peaks,
        "largest_error": error,
    }


def read_text(tokenizer: Any, tokens: int) -> str:
    """The first so many tokens of this project's own prose, as text that gives as many again."""
    prose = (HERE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    count = tokens
    while True:
        text = tokenizer.decode(tokenizer(prose)["input_ids"][:count])
        found = len(tokenizer(text)["input_ids"])
        if found <= tokens:
            return str(text)
        count -= found - tokens


class Plain:
    """Column after column through plain PEFT, or through the lab's own model where one PeftModel can't hold them."""

    def __init__(self, lab: Any, folders: dict[str, Path], *, one_model: bool) -> None:
        self.lab, self.names, self.peft = lab, list(folders), None
        if one_model:
            from peft import PeftModel

            first, *rest = folders
            with lab.using(None) as model, quiet_peft():
                self.peft = PeftModel.from_pretrained(share(model), folders[first], adapter_name=first)
                for name in rest:
                    self.peft.load_adapter(folders[name], adapter_name=name)
            self.peft.eval()

    def run(self, ids: list[int], *, numbers: bool) -> dict[str, Any]:
        import torch

        inputs = torch.tensor([ids])
        found, base = {}, None
        with torch.no_grad():
            for name in [None, *self.names]:
                logits = self.forward(name, inputs)
                if not numbers:
                    continue
                mine = torch.log_softmax(logits[0, :-1], -1)
                theirs = mine.gather(1, inputs[0, 1:, None])
                if base is None:
                    base = mine
                else:
                    kl = torch.nn.functional.kl_div(base, mine, log_target=True, reduction="none").sum(-1)
                    rank = 1 + (mine > theirs).sum(-1)
                    found[name] = (theirs[:, 0].tolist(), kl.tolist(), rank.tolist())
        return found

    def forward(self, name: str | None, inputs: Any) -> Any:
        if self.peft is None:
            with self.lab.using(name) as model:
                return model(inputs, use_cache=False).logits
        if name is None:
            with self.peft.disable_adapter():
                return self.peft(inputs, use_cache=False).logits
        self.peft.set_adapter(name)
        return self.peft(inputs, use_cache=False).logits


def compare(plain: dict[str, Any], frame: Any) -> float:
    """The largest difference of logprobs and KLs; raises `WrongNumber` beyond rounding."""
    largest = 0.0
    for name, (logprobs, kls, ranks) in plain.items():
        rows = frame[frame["column"] == name]
        for mine, theirs in ((rows["logprob"], logprobs), (rows["kl"], kls)):
            largest = max(largest, float((mine.to_numpy() - theirs).__abs__().max()))
        apart = int((rows["rank"].to_numpy() != ranks).sum())
        if largest > TOLERANCE or apart > 0.02 * len(ranks):  # ranks of near-ties may change places
            raise WrongNumber(f"{name}: {largest:.2e} nats apart, {apart} of {len(ranks)} ranks differ")
    return largest


def markdown(results: dict[str, Any]) -> str:
    seconds = results["seconds"]

    def over(name: str) -> str:
        ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds["in turn"])]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    rows = [
        [TITLES[name], f"{statistics.median(seconds[name]):.2f}", over(name), f"{results['peaks'][name] / 1e6:.0f}"]
        for name in TITLES
    ]
    machine = [f"- {key}: {value}" for key, value in results["machine"].items()]
    return "\n".join(
        [
            "# Divergence: all columns in one batch, or in turn",
            "",
            f"{results['columns']} columns ({results['adapters']}; and the base) over a text of {results['tokens']} tokens, "
            f"SmolLM2-135M-Instruct in fp32. {len(seconds['lab'])} interleaved rounds; medians, ratios within a round with "
            "the lowest and the highest. Largest difference between the lab's numbers and those made in turn: "
            f"{results['largest_error']:.1e} nats.",
            "",
            *table(["", "seconds", "of nine forwards with the numbers", "peak MB of tensors"], rows),
            "",
            f"{results['created']}",
            "",
            *machine,
            "",
        ]
    )


if __name__ == "__main__":
    main()
