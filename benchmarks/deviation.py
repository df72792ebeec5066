"""What rounding alone does: a row in a batch of nine against the same row alone, over the same tokens.

    python benchmarks/deviation.py [--kinds fp32 bf16 …] [--steps 60] [--column-steps 60] [--output benchmarks/results]

Writes deviation.md. First the bare base through plain transformers, nine equal rows against one: the noise of batching
itself. Then nine columns of the demo adapters in one batch of the lab against each column mounted alone. Every column is
fed the tokens that it chose alone, so that texts never part and each step compares the same context.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from record import describe_machine

from adapterlab import AdapterLab, Column
from adapterlab.linear import few_rows
from adapterlab.rows import Rows

HERE = Path(__file__).resolve().parent
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "8-bit, fp32": {"quantization": "8bit", "dtype": "float32"},
    "8-bit, bf16": {"quantization": "8bit", "dtype": "bfloat16"},
    "4-bit, fp32": {"quantization": "4bit", "dtype": "float32"},
    "4-bit, bf16": {"quantization": "4bit", "dtype": "bfloat16"},
}
PROMPTS = (
    "Why is the sky blue? Answer in one sentence.",
    "Tell me how to bake bread.",
    "Write a short poem about a harbour at night.",
)
COLUMNS: tuple[Any, ...] = (
    None, "pirate", "robot", {"pirate": 0.5}, {"robot": 0.5}, {"pirate": 0.5, "robot": 0.5}, {"pirate": 0.75},
    {"robot": 0.75}, {"pirate": 0.3, "robot": 0.7},
)  # fmt: skip
BATCH = len(COLUMNS)


@dataclass
class Deviation:
    """Over all steps: how far logits moved, how far the two best moved against each other, and whose order changed.

    overturned: the largest lead, alone, of a token that another one beat in the batch.
    """

    steps: int = 0
    logit: float = 0.0
    lead: float = 0.0
    flips: int = 0
    overturned: float = 0.0

    def add(self, alone: Any, batched: Any) -> None:
        """Take in two runs of one row: (steps, vocabulary) each, fp32."""
        best = alone.topk(2, dim=-1).indices
        leads, others = (x.gather(1, best)[:, 0] - x.gather(1, best)[:, 1] for x in (alone, batched))
        flipped = batched.argmax(-1) != best[:, 0]
        self.steps += len(alone)
        self.logit = max(self.logit, float((batched - alone).abs().max()))
        self.lead = max(self.lead, float((others - leads).abs().max()))
        self.flips += int(flipped.sum())
        self.overturned = max([self.overturned, *leads[flipped].tolist()])


def run(model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Any:
    """Logits of each step, (rows, steps, vocabulary) in fp32, when the rows are fed these answers token by token."""
    import torch

    logits, cache = [], None
    with torch.no_grad():
        inputs = torch.tensor([list(prompt)] * len(answers))
        for step in range(len(answers[0])):
            out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1].float())
            cache, inputs = out.past_key_values, torch.tensor([[answer[step]] for answer in answers])
    return torch.stack(logits, dim=1)


def run_alone(model: Any, prompt: Sequence[int], steps: int) -> tuple[list[int], Any]:
    """What the model as it stands says greedily, exactly so many tokens, and its logits, (steps, vocabulary) in fp32."""
    import torch

    end, logits, answer, cache = model.config.eos_token_id, [], [], None
    with torch.no_grad():
        inputs = torch.tensor([list(prompt)])
        for _ in range(steps):
            out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            logits.append(out.logits[0, -1].float())
            best = logits[-1].topk(2).indices.tolist()
            answer.append(best[best[0] == end])  # it goes on where it would end
            cache, inputs = out.past_key_values, torch.tensor([answer[-1:]])
    return answer, torch.stack(logits)


@contextmanager
def batch_of(lab: AdapterLab, columns: Sequence[Column], prompt: Sequence[int]) -> Iterator[Any]:
    """The model with each column as one row of a batch, as the lab decodes it."""
    mounts = lab._adapters.mounts
    with lab.using(None) as model, Rows(mounts, columns, 1, {len(prompt), 1}).mounted(mounts), few_rows(model):
        yield model


def measure(lab: AdapterLab, steps: int, column_steps: int) -> tuple[Deviation, Deviation]:
    """(the bare base in a batch of nine equal rows, the lab's nine columns in one batch), each against alone."""
    bare, lab_rows = Deviation(), Deviation()
    columns = [Column.of(column) for column in COLUMNS]
    lab.model.eval()
    for prompt in lab.compare(list(PROMPTS), [None], max_new_tokens=1).prompt_ids:
        answers, alone = [], []
        for column in columns:
            with lab.using(column) as model:
                answer, logits = run_alone(model, prompt, steps if column.is_base else column_steps)
            answers.append(answer)
            alone.append(logits)
        with lab.using(None) as model:
            for row in run(model, prompt, answers[:1] * BATCH):
                bare.add(alone[0], row)
        with batch_of(lab, columns, prompt) as model:
            for mine, row in zip(alone, run(model, prompt, [answer[:column_steps] for answer in answers])):
                lab_rows.add(mine[:column_steps], row)
    return bare, lab_rows


def page(found: dict[str, tuple[Deviation, Deviation] | str], steps: int, column_steps: int) -> str:
    """The table as Markdown, with the machine and the versions."""
    machine = {**describe_machine(), "bitsandbytes": metadata.version("bitsandbytes")}
    lines = [
        "# What rounding alone does",
        "",
        f"Logits of SmolLM2-135M-Instruct in a batch of {BATCH} rows against the same row alone, {len(PROMPTS)} prompts, "
        f"teacher-forced. *base*: nine equal rows of the bare base, plain transformers, {steps} steps. *lab*: nine columns "
        f"(base, the demo's trained LoRA and IA3, multipliers and blends of them) in one batch of the lab, "
        f"{column_steps} steps.",
        "",
        "| | max abs Δlogit: base | lab | max abs Δlead of the two best: base | lab | other token: base | lab "
        "| largest lead overturned: base | lab |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, measured in found.items():
        if isinstance(measured, str):
            lines.append(f"| {kind} | {measured} | | | | | | | |")
            continue
        cells: list[str] = []
        for attribute in ("logit", "lead"):
            cells += [f"{getattr(one, attribute):.2g}" for one in measured]
        cells += [f"{one.flips} of {one.steps}" for one in measured]
        cells += [f"{one.overturned:.2g}" if one.flips else "none" for one in measured]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += ["", "; ".join(f"{key}: {value}" for key, value in machine.items()) + ".", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found: dict[str, tuple[Deviation, Deviation] | str] = {}
    for kind in asked.kinds:
        lab = AdapterLab.demo(**KINDS[kind])
        try:
            found[kind] = measure(lab, asked.steps, asked.column_steps)
        except RuntimeError as error:  # a kernel that this processor lacks
            found[kind] = f"does not run here: {error}"
        lab.close()
        print(kind, found[kind], flush=True)
        asked.output.mkdir(parents=True, exist_ok=True)
        (asked.output / "deviation.md").write_text(page(found, asked.steps, asked.column_steps), encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what rounding alone does to logits in a batch.")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--steps", type=int, default=60, help="of the bare base")
    parser.add_argument("--column-steps", type=int, default=60, help="of each of the lab's columns; at most --steps")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    asked = parser.parse_args(arguments)
    if not 1 <= asked.column_steps <= asked.steps:
        parser.error(f"--column-steps {asked.column_steps}: give a number from 1 to --steps, {asked.steps}")
    return asked


if __name__ == "__main__":
    main()
