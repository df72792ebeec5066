"""Comparisons of several labs as one: which lab said what, and where and how far it leaves the first lab.

A concatenation is a `Comparison` whose `model["labs"]` holds what each lab said of itself, by label; the label stands
before each column's own name. All else is computed from the data when it is asked for, so no lab has to be open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.ties import first_difference

if TYPE_CHECKING:
    from adapterlab.comparison import Comparison, Generation

SEPARATOR = " · "  # no adapter's name has one, so the last in a label ends the lab's
MEMORY = ("base_bytes", "adapter_bytes", "peak_bytes")
_READ = ("rendered", "prompt_ids")  # how the prompts were read, and by what settings answered: kept where it differs
_OTHER_PROMPT = "the prompts were read otherwise than in the first lab (another tokenizer or chat template)"


@dataclass(frozen=True)
class Share:
    """One lab's share of a concatenation."""

    label: str
    about: dict[str, Any]  # the lab, as `Comparison.model` has it
    read: dict[str, Any]  # rendered, prompt_ids, settings
    generations: list[Generation]  # their columns without the lab's label


@dataclass(frozen=True)
class Departure:
    """How one lab's column stands to the same column of the first lab, for one prompt.

    place: the first token that is another, counted from 0, None if there is none. shared: how many tokens both said
    before it, after the same text. shift: mean |Δlogprob| of those, in nats; NaN without any.
    """

    place: int | None
    shared: int
    shift: float


def split_label(column: str) -> tuple[str, str]:
    """A column's label as (the lab's label, the column's own); the first is "" outside concatenations."""
    lab, _, own = column.rpartition(SEPARATOR)
    return lab, own


def labs_of(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """What each lab said of itself, by label; empty for a comparison of one lab."""
    return comparison.model.get("labs") or {}


def checked_labels(comparisons: Sequence[Comparison], labels: Any) -> list[str]:
    """The label of each lab: `labels`, or each lab's quantization or dtype. Raises `AdapterLabError` for comparisons that
    can't stand side by side."""
    own = [share.label for comparison in comparisons for share in _shares(comparison)]
    listed = isinstance(labels, Iterable) and not isinstance(labels, str)
    given = own if labels is None else list(labels) if listed else []
    texts = all(isinstance(label, str) and label.strip() for label in given)
    if len(given) != len(own) or len(set(given)) != len(own) or not texts:
        raise AdapterLabError(
            f"{len(own)} comparisons need as many different labels, not {own if labels is None else labels!r}: "
            "give labels=[…], a text for each."
        )
    if any(other.prompts != comparisons[0].prompts for other in comparisons[1:]):
        raise AdapterLabError("Only comparisons of the same prompts stand side by side.")
    return given


def make_concatenation(comparisons: Sequence[Comparison], labels: Sequence[str]) -> dict[str, Any]:
    """The parts of the concatenation, as `Comparison` takes them; `labels` are checked."""
    shares = [share for comparison in comparisons for share in _shares(comparison)]
    shares = [replace(share, label=label) for share, label in zip(shares, labels)]
    leader = shares[0]
    return {
        "prompts": list(comparisons[0].prompts),
        "rendered": list(leader.read["rendered"]),
        "prompt_ids": [tuple(ids) for ids in leader.read["prompt_ids"]],
        "settings": leader.read["settings"],
        "model": {
            "name": " | ".join(dict.fromkeys(str(share.about.get("name")) for share in shares)),
            "labs": {share.label: _record(share, leader) for share in shares},
        },
        "generations": [
            replace(g, column=f"{share.label}{SEPARATOR}{g.column}") for share in shares for g in share.generations
        ],
        "created": comparisons[0].created,
    }


def _shares(comparison: Comparison) -> Iterator[Share]:
    """The labs of a comparison: itself, or, of a concatenation, each that it was made of."""
    read = {"rendered": comparison.rendered, "prompt_ids": comparison.prompt_ids, "settings": comparison.settings}
    labs = labs_of(comparison)
    if not labs:
        about = {**comparison.model, "created": comparison.created}
        yield Share(str(about.get("quantization") or about.get("dtype")), about, read, comparison.generations)
    for label, record in labs.items():
        about = {key: value for key, value in record.items() if key not in (*read, "note")}
        mine = [(split_label(g.column), g) for g in comparison.generations]
        generations = [replace(g, column=own) for (lab, own), g in mine if lab == label]
        yield Share(label, about, {key: record.get(key, value) for key, value in read.items()}, generations)


def _record(share: Share, leader: Share) -> dict[str, Any]:
    """What is kept of a lab; how it read and answered only where that is not as in the first one, with a note."""
    record, notes = dict(share.about), []
    ids = [list(row) for row in share.read["prompt_ids"]]
    if ids != [list(row) for row in leader.read["prompt_ids"]]:
        record |= {"rendered": list(share.read["rendered"]), "prompt_ids": ids}
        notes.append(_OTHER_PROMPT)
    mine, theirs = share.read["settings"], leader.read["settings"]
    if mine != theirs:
        record["settings"] = mine
        other = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        notes.append("other settings than in the first lab: " + ", ".join(f"{key}={mine.get(key)!r}" for key in other))
    return {**record, "note": "; ".join(notes)} if notes else record


def counterparts(comparison: Comparison) -> dict[int, Generation]:
    """What the first lab's same column answered, for the generations of all other labs, by their place in `generations`.

    Left out is what has no counterpart there, and what answers a prompt that was read otherwise.
    """
    labs = labs_of(comparison)
    first, found = next(iter(labs), ""), {}
    theirs: dict[tuple[int, str], Generation] = {}
    for g in comparison.generations:
        lab, own = split_label(g.column)
        if lab == first:
            theirs[g.prompt_index, own] = g
    for place, g in enumerate(comparison.generations):
        lab, own = split_label(g.column)
        lead = theirs.get((g.prompt_index, own))
        if lab != first and lead is not None and _same_prompt(comparison, labs[lab], g.prompt_index):
            found[place] = lead
    return found


def _same_prompt(comparison: Comparison, about: Mapping[str, Any], index: int) -> bool:
    ids = about.get("prompt_ids")
    return ids is None or list(ids[index]) == list(comparison.prompt_ids[index])


def departure(lead: Generation, other: Generation) -> Departure:
    """Where and how far `other` leaves `lead`, both answers to one prompt."""
    place = first_difference(lead.token_ids, other.token_ids)
    shared = min(lead.new_tokens, other.new_tokens) if place is None else place
    moves = [abs(a - b) for a, b in zip(lead.logprobs[:shared], other.logprobs[:shared])]
    return Departure(place, shared, sum(moves) / shared if shared else math.nan)


def lab_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """What a concatenation's frame has beyond a comparison's, one row for each generation; empty for one lab's."""
    labs = labs_of(comparison)
    if not labs:
        return []
    leads = counterparts(comparison)
    rows = []
    for place, g in enumerate(comparison.generations):
        lab = split_label(g.column)[0]
        leaves = departure(leads[place], g) if place in leads else Departure(None, 0, math.nan)
        memory = megabytes(labs[lab])
        rows.append(
            {
                "lab": lab,
                "lab_first_difference": leaves.place,
                "lab_logprob_change": leaves.shift,
                **{key.replace("bytes", "megabytes"): memory.get(key, math.nan) for key in MEMORY},
                "lab_note": labs[lab].get("note", ""),
            }
        )
    return rows


def token_columns(comparison: Comparison) -> dict[str, list[Any]]:
    """What a concatenation's frame of tokens has beyond a comparison's; empty for one lab's."""
    if not labs_of(comparison):
        return {}
    leads = counterparts(comparison)
    labs: list[str] = []
    logprobs: list[float] = []
    for place, g in enumerate(comparison.generations):
        lead = leads.get(place)
        same = () if lead is None else lead.logprobs[: departure(lead, g).shared]
        labs += [split_label(g.column)[0]] * g.new_tokens
        logprobs += [*same, *(math.nan,) * (g.new_tokens - len(same))]
    return {"lab": labs, "first_lab_logprob": logprobs}


def megabytes(about: Mapping[str, Any]) -> dict[str, float]:
    """What is known of a lab's memory, in 10⁶ bytes, by `MEMORY`'s names."""
    memory = about.get("memory") or {}
    return {key: memory[key] / 1e6 for key in MEMORY if memory.get(key) is not None}


def check_labs(comparison: Comparison) -> None:
    """Raise TypeError or ValueError, in words, if a file's `model["labs"]` is not what `make_concatenation` makes."""
    labs = comparison.model.get("labs")
    if labs is None:
        return
    if not isinstance(labs, dict) or not labs or not all(isinstance(about, dict) for about in labs.values()):
        raise TypeError("model's labs are mappings by label")
    for about in labs.values():
        memory = about.get("memory")
        if not isinstance(memory, (dict, type(None))):
            raise TypeError("a lab's memory is a mapping")
        if not all(isinstance((memory or {}).get(key), (int, float, type(None))) for key in MEMORY):
            raise TypeError("a lab's bytes are numbers")
        if not isinstance(about.get("note", ""), str) or not isinstance(about.get("settings", {}), dict):
            raise TypeError("a lab's note is a text and its settings a mapping")
        if not all(len(about.get(key, comparison.prompts)) == len(comparison.prompts) for key in _READ):
            raise ValueError("a lab has not as many prompts as there are")
    if any(split_label(g.column)[0] not in labs for g in comparison.generations):
        raise ValueError("a column names a lab that is not there")
