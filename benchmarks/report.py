"""Results → Markdown. Numbers in, text out; nothing here runs anything."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from record import Part, Results, Timing
from targets import target_rows

TITLES = {
    "one": "(a) base once, plain `generate`",
    "floor": "(b) the bare base in one batch: the floor",
    "in_turn": "(c) in turn: `set_adapter`, `generate`",
    "merged": "(d) in turn: pre-merged plain models",
    "peft_batch": "(e) PEFT's mixed batch: `adapter_names`",
    "lab": "**(f) the lab: `compare`**",
}
SINGLE = {
    "lab_base": "(g) base alone through the lab",
    "lab_one": "(h) one adapter alone through the lab",
    "in_turn_one": "(h) one adapter alone, as in (c)",
    "merged_one": "(h) one adapter alone, as in (d)",
    "one_more": "(i) one adapter more on a finished comparison",
}


def markdown(results: Results) -> str:
    """The whole page: the machine, a section for each part, the targets."""
    lines = ["# Base and N adapters, side by side: what it costs", "", *_machine(results), ""]
    lines += ["![Seconds against columns](compare.png)", ""]
    for part in results.parts:
        lines += [f"## {part.title}", "", *_part(part), ""]
    lines += ["## Targets", "", *_targets(results), ""]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def _machine(results: Results) -> Iterator[str]:
    yield f"Written by `benchmarks/compare.py` on {results.created}; every number is in `compare.json`."
    yield ""
    yield from table(["machine", ""], [[key, text] for key, text in results.machine.items()])


def _part(part: Part) -> Iterator[str]:
    yield (
        f"{part.parameters / 1e6:.0f}M parameters, {part.adapted_layers} adapted layers, {part.prompt_tokens} prompt "
        f"and {part.new_tokens} new tokens, greedy; medians of {part.rounds} interleaved rounds. In brackets: times one "
        "base generation, the median of the ratios within a round."
    )
    yield ""
    columns = part.columns
    head = ["seconds", *(f"base + {n - 1}" for n in columns)]
    one = part.find("one")
    rows = []
    for contender, title in TITLES.items():
        timings = [part.find(contender, 1 if contender == "one" else n) for n in columns]
        if any(timings):
            rows.append([_titled(part, contender, title), *(_seconds(timing, one) for timing in timings)])
    yield from table(head, rows)
    yield ""
    yield from _singles(part, one)
    yield ""
    yield from _memory(part)
    yield ""
    yield from _checks(part)
    yield ""
    yield from _notes(part)


def _titled(part: Part, contender: str, title: str) -> str:
    if contender == "in_turn" and not part.find("peft_batch", part.columns[-1]):
        return "(c) in turn: the lab's `set_adapter`, `lab.model.generate`"
    return title


def _seconds(timing: Timing | None, one: Timing | None) -> str:
    if timing is None:
        return "–"
    mark = "≈ " if timing.estimated else ""
    ratio = f" ({timing.over(one)[0]:.2f})" if one is not None else ""
    return f"{mark}{timing.median:.2f}{ratio}"


def _singles(part: Part, one: Timing | None) -> list[str]:
    found = [(title, part.find(contender)) for contender, title in SINGLE.items()]
    rows = [[title, _seconds(timing, one)] for title, timing in found if timing is not None]
    rerun = part.find("rerun")
    if rerun is not None:
        rows.append(["(j) the same comparison again", f"{1e3 * rerun.median:.1f} ms"])
    for whose, title in (("lab", "the lab's"), ("peft", "PEFT's")):
        if part.switches.get(whose):
            rows.append(
                [
                    f"(k) {title} `set_adapter`, {part.columns[-1] - 1} adapters loaded",
                    f"{statistics.median(part.switches[whose]):.3f} ms",
                ]
            )
    return table(["one at a time", "seconds"], rows)


def _memory(part: Part) -> Iterator[str]:
    memory = part.memory
    rows = [
        ("base weights", memory.base),
        ("adapters", memory.adapters),
        ("KV cache of all columns, from the config", memory.kv_cache),
        ("tensors before the run", memory.before),
        ("at the peak", memory.peak),
        ("after the run", memory.after),
    ]
    yield from table(
        [f"(l) memory, base + {part.columns[-1] - 1}", "MB"], [[what, f"{size / 1e6:.1f}"] for what, size in rows]
    )
    yield ""
    largest = "; ".join(f"{what} {size / 1e6:.1f} MB" for what, size in memory.contributors)
    yield f"The peak is {memory.ratio:.3f} of weights, adapters and cache. The largest at the peak: {largest}."


def _checks(part: Part) -> Iterator[str]:
    titles = {key: title.strip("*")[:3] for key, title in {**TITLES, **SINGLE, "rerun": "(j)"}.items()}
    checks = sorted(part.checks, key=lambda check: titles[check.contender])
    rows = [
        ["texts equal to plain PEFT's", *(f"{check.equal} of {check.texts}" for check in checks)],
        ["near-ties", *(str(check.near_ties) for check in checks)],
        ["largest gap, logits", *(f"{check.largest_gap:.2g}" for check in checks)],
    ]
    yield from table(["tokens", *(titles[check.contender] for check in checks)], rows)
    yield ""
    yield (
        f"Rounding alone makes up to {part.noise:.2g} logits here; the run would have stopped at a token of the lab's that "
        f"plain PEFT puts more than {part.tolerance:.2g} below its own."
    )


def _notes(part: Part) -> Iterator[str]:
    sentences = ["(c) and (d) for fewer adapters are the beginning of the longest sequence; merging is not counted."]
    if any(timing.estimated for timing in part.timings):
        sentences.append(
            "≈: a round times the base and some of the adapters in turn, other ones each round; an adapter that is not "
            "among them counts as the mean of those of its method."
        )
    yield " ".join([*sentences, f"This part took {part.elapsed / 60:.1f} minutes."])
    yield from (f"\n- {note}" for note in part.notes)


def _targets(results: Results) -> list[str]:
    rows = [[row.text, row.wanted, row.measured, row.verdict] for row in target_rows(results)]
    return table(["fp32, demo model", "target", "measured (lowest to highest round)", ""], rows)
