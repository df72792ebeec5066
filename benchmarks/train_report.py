"""Training results → Markdown. Numbers in, text out; nothing here runs anything."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from report import table
from targets import Target, at_most, ratio_row
from train_record import Agreement, Footprint, Padding, Race, TrainResults

CONTENDERS = {
    "plain_lora": "(a) LoRA: plain `Trainer` on a `PeftModel`",
    "plain_lora_again": "(a) once more, which shows what the machine's moods make",
    "lab_lora": "**(b) LoRA: `lab.trainer`**",
    "lab_adalora": "**(c) AdaLoRA: `lab.trainer`**",
    "peft_adalora": "(d) AdaLoRA: plain `Trainer`, PEFT's own term and allocator",
}
WORKERS = {"lab_adalora": "(c) the lab", "peft_adalora": "(d) PEFT"}
ORDERS = {
    "random": "random, transformers' default",
    "transformers": "transformers' `group_by_length`",
    "group_by_length": "**rows of like length together, the lab's default**",
}
METHODS = {"lora": "LoRA", "adalora": "AdaLoRA", "ia3": "IA3", "full": "full fine-tuning, plain `Trainer`"}


def markdown(results: TrainResults) -> str:
    """The whole page: the targets, the machine, a section for each part."""
    lines = ["# Training: what the lab adds", ""]
    lines += [f"Written by `benchmarks/train.py` on {results.created}; every number is in `train.json`.", ""]
    lines += [*table(["machine", ""], [[key, text] for key, text in results.machine.items()]), ""]
    targets = list(target_rows(results))
    if targets:
        rows = [[row.text, row.wanted, row.measured, row.verdict] for row in targets]
        head = [f"{results.model}, fp32", "target", "measured (lowest to highest round)", ""]
        lines += ["## Targets", "", *table(head, rows), ""]
    if results.race is not None:
        lines += ["## Seconds per step", "", *_race(results.race), ""]
    if results.padding is not None:
        lines += ["## Padding", "", *_padding(results.padding), ""]
    if results.memory:
        lines += ["## Memory", "", *_memory(results.memory), ""]
    return "\n".join(lines)


def target_rows(results: TrainResults) -> Iterator[Target]:
    """The targets, as far as this run measured them, with what they are to be read against."""
    if results.race is not None:
        yield from _race_rows(results.race)
    if results.padding is not None:
        for order, title in ORDERS.items():
            shares = results.padding.shares[order]
            spread = f"{100 * min(shares):.1f} to {100 * max(shares):.1f}"
            name = f"padding, order: {title.strip('*')}"
            yield Target(name, "", f"{100 * statistics.mean(shares):.1f} % ({spread}, epochs)", None)
    for footprint in results.memory:
        above = (footprint.peak - footprint.base) / 1e6
        yield Target(
            f"peak memory above the model: {METHODS[footprint.method]}", "", f"{above:.0f} MB of tensors", None
        )


def _race_rows(race: Race) -> Iterator[Target]:
    plain, again, lab, adalora, peft = (
        race.find(name) for name in ("plain_lora", "plain_lora_again", "lab_lora", "lab_adalora", "peft_adalora")
    )
    tensors, triplets = race.equal
    yield from at_most("LoRA step: lab / plain `Trainer`", lab, plain, 1.02)
    yield from ratio_row("LoRA step: plain `Trainer` once more / plain `Trainer`", again, plain, "")
    yield _all_equal("LoRA weights after the run: lab and plain `Trainer` equal to the bit", tensors)
    yield from at_most(f"AdaLoRA step / LoRA step, both in the lab, r = {race.r}", adalora, lab, 1.10)
    yield from ratio_row("AdaLoRA step by PEFT's own / LoRA step by plain `Trainer`", peft, plain, "")
    yield from ratio_row("AdaLoRA step: lab / PEFT's own", adalora, peft, "")
    yield _all_equal("AdaLoRA after the run: lab and PEFT keep the same triplets", triplets)


def _all_equal(text: str, found: Agreement) -> Target:
    return Target(text, "all", f"{found.equal} of {found.of} {found.what}", found.equal == found.of)


def _race(race: Race) -> Iterator[str]:
    yield (
        f"Rank {race.r} on {race.layers} layers, batches of {race.batch} rows and {min(race.widths)} to "
        f"{max(race.widths)} positions, the same ones for all. {race.rounds} interleaved rounds of {len(race.widths)} steps, "
        f"after {race.warm} that do not count; AdaLoRA prunes in each, towards a mean rank of {race.target_r}. A round's ratio "
        "is the median of the ratios step by step."
    )
    yield ""
    plain = race.times[0]
    rows = []
    for contender, title in CONTENDERS.items():
        times = race.find(contender)
        middle, least, most = times.over(plain)
        rows.append([title, f"{times.median:.3f}", f"{middle:.3f} ({least:.2f} to {most:.2f})"])
    yield from table(["medians", "seconds", "times (a)"], rows)
    yield ""
    yield from table(
        ["AdaLoRA's own work in a step, medians", "ms", "of the step"],
        [
            [
                f"{WORKERS[work.whose]}: {work.what}",
                f"{1e3 * statistics.median(work.seconds):.1f}",
                f"{100 * statistics.median(work.seconds) / race.find(work.whose).median:.1f} %",
            ]
            for work in race.work
        ],
    )
    yield ""
    yield (
        "PEFT's term is part of the model's forward and backward; here it is timed by itself, after each step. The paper "
        "(arXiv 2303.10512) reports 1.11 to 1.18 times LoRA's time."
    )


def _padding(padding: Padding) -> Iterator[str]:
    shortest, mean, longest = padding.lengths
    yield (
        f"{padding.rows} rows of {shortest} to {longest} tokens, {mean:.1f} on average, in batches of {padding.batch}. Shares "
        f"are means over {len(padding.shares['random'])} epochs, seconds of an epoch of LoRA in the lab medians of "
        f"{len(padding.times[0].rounds)} interleaved rounds."
    )
    yield ""
    timed = {times.contender: times for times in padding.times}
    rows = []
    for order, title in ORDERS.items():
        times = timed.get(order)
        cells = ["–", "–"]
        if times is not None:
            middle, least, most = times.epoch_over(padding.find("random"))
            cells = [f"{times.epoch:.2f}", f"{middle:.3f} ({least:.2f} to {most:.2f})"]
        rows.append([title, f"{100 * statistics.mean(padding.shares[order]):.1f} %", *cells])
    yield from table(["order", "padding", "seconds an epoch", "times random"], rows)


def _memory(memory: Sequence[Footprint]) -> Iterator[str]:
    yield (
        f"Megabytes of 10⁶ bytes. Each method in a process of its own, AdamW in fp32, batches of the longest rows; the model "
        f"itself has {memory[0].base / 1e6:.0f} MB of weights. Tensors are counted exactly, each storage once; resident memory "
        "is the process's, from the loaded model on."
    )
    yield ""
    owners = {
        "trained parameters, millions": lambda one: f"{one.trained / 1e6:.2f}",
        "parameters": lambda one: _megabytes(one.parameters),
        "gradients": lambda one: _megabytes(one.gradients),
        "optimizer state": lambda one: _megabytes(one.optimizer),
        "AdaLoRA's averages": lambda one: _megabytes(one.allocation),
        "all tensors at the peak": lambda one: _megabytes(one.peak),
        "of these above the model": lambda one: _megabytes(one.peak - one.base),
        "resident memory, growth at the most": lambda one: _megabytes(one.resident),
        "weights on disk": lambda one: _megabytes(one.checkpoint),
    }
    head = ["MB", *(METHODS[one.method] for one in memory)]
    yield from table(head, [[what, *map(cell, memory)] for what, cell in owners.items()])
    for one in memory:
        largest = "; ".join(f"{what} {size / 1e6:.0f} MB" for what, size in one.largest)
        yield f"\nThe largest at the peak, {METHODS[one.method]}: {largest}."


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
