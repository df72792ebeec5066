"""A `Comparison` as HTML that reads without a kernel, a stylesheet or a script: a table, with words that base did not
say marked by <ins>. Every string that comes from outside is escaped."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterlab.concatenation import counterparts, departure, labs_of, megabytes, split_label
from adapterlab.pagetext import escape, without_maths

if TYPE_CHECKING:
    from adapterlab.comparison import Comparison, Generation

ALIKE = 0.6  # share of the words that two texts have in common
_MOST_PAIRS = (
    100_000  # of equal words, one in each text: half a second at worst; a thousand words of prose have a tenth
)
_FINISH = {"eos": "ended", "length": "cut at the limit", "stopped": "stopped", "stop_string": "stop string"}
_CELL = 'style="text-align:left;vertical-align:top;white-space:pre-wrap;padding:8px 12px;min-width:180px"'
_HEAD = 'style="text-align:left;vertical-align:top;padding:8px 12px"'


def comparison_html(comparison: Comparison) -> str:
    """One table per prompt, one column per column of the comparison; before them, a line for each lab of several."""
    labs = [_lab(label, about) for label, about in labs_of(comparison).items()]
    return without_maths("\n".join([*labs, *(_table(comparison, index) for index in range(len(comparison.prompts)))]))


def comparison_page(comparison: Comparison) -> str:
    """The same as a whole HTML document that follows the reader's light or dark setting. It forbids itself to run scripts
    and to load anything."""
    title = escape(f"AdapterLab: {comparison.model.get('name', '')}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
        '<meta name="color-scheme" content="light dark"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title>"
        "<style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem;overflow-wrap:anywhere}"
        "table{border-collapse:collapse;margin:0 0 2rem}td,th{border:1px solid #8886}"
        "ins{text-decoration:underline;text-decoration-thickness:2px}small{opacity:.75}</style></head>"
        f"<body><h1>{title}</h1>{comparison_html(comparison)}</body></html>\n"
    )


def mark_words(text: str, base: str, *, removed: bool = False, at: int | None = None, sign: str = "") -> str:
    """`text` escaped, with the runs of words that `base` does not have at that place inside <ins>.

    removed: also show, inside <del>, what base said there instead, if the texts are alike; where they are not, that
    would be base's whole answer struck out. at: place in `text` before which `sign`, as it is, is put.
    """
    mine, theirs = re.findall(r"\S+\s*", text), re.findall(r"\S+\s*", base)
    changes = _changes([word.strip() for word in theirs], [word.strip() for word in mine])
    same = sum(until - was for tag, was, until, _, _ in changes if tag == "equal")
    removed = removed and 2 * same >= ALIKE * (len(theirs) + len(mine))
    lead = text[: len(text) - len(text.lstrip())]
    here = len(lead)
    pieces = [_with_sign(lead, at, sign)]
    for tag, was, until, start, end in changes:
        gone = escape("".join(theirs[was:until]).rstrip())
        words = "".join(mine[start:end])
        inside = None if at is None else at - here
        here += len(words)
        if removed and gone and tag in ("replace", "delete"):
            pieces.append(f"<del>{gone} </del>")
        if words and tag in ("replace", "insert"):
            bare = words.rstrip()
            pieces.append(f"<ins>{_with_sign(bare, inside, sign)}</ins>")
            inside, words = None if inside is None else inside - len(bare), words[len(bare) :]
        pieces.append(_with_sign(words, inside, sign))
    return "".join(pieces)


def _changes(theirs: list[str], mine: list[str]) -> Sequence[tuple[str, int, int, int, int]]:
    """What makes `mine` of `theirs`, as difflib's opcodes. Where looking for the shortest way would take seconds, all that
    lies between the common beginning and the common end counts as changed: a model that says one word a thousand times has
    a million pairs of equal words."""
    mine_of = Counter(mine)
    if sum(count * mine_of[word] for word, count in Counter(theirs).items()) <= _MOST_PAIRS:
        return difflib.SequenceMatcher(None, theirs, mine, autojunk=False).get_opcodes()
    shorter = min(len(theirs), len(mine))
    begin = next((place for place in range(shorter) if theirs[place] != mine[place]), shorter)
    end = next((place for place in range(shorter - begin) if theirs[-1 - place] != mine[-1 - place]), shorter - begin)
    there, here = len(theirs), len(mine)
    middle = ("replace", begin, there - end, begin, here - end)
    return [("equal", 0, begin, 0, begin), middle, ("equal", there - end, there, here - end, here)]


def _with_sign(text: str, at: int | None, sign: str) -> str:
    """`text` escaped, with `sign` before its place `at`, if that is one of its own."""
    if at is None or not 0 <= at < len(text):
        return escape(text)
    return escape(text[:at]) + sign + escape(text[at:])


def _lab(label: str, about: dict[str, Any]) -> str:
    kind = " · ".join(str(about[key]) for key in ("name", "dtype", "quantization", "device") if about.get(key))
    names = {"base_bytes": "base {}", "adapter_bytes": "adapters {}", "peak_bytes": "{} more while it ran"}
    sizes = ", ".join(names[key].format(f"{size:,.1f} MB") for key, size in megabytes(about).items())
    words = [escape(part) for part in (kind, sizes, str(about.get("note", ""))) if part]
    return f"<p><b>{escape(label)}</b>: {' · '.join(words)}</p>"


def _table(comparison: Comparison, index: int) -> str:
    leads = counterparts(comparison)
    row = [(g, leads.get(place)) for place, g in enumerate(comparison.generations) if g.prompt_index == index]
    base = {split_label(g.column)[0]: g.text for g, _ in row if split_label(g.column)[1] == "base"}
    heads = "".join(f"<th {_HEAD}>{escape(g.column)}</th>" for g, _ in row)
    cells = "".join(f"<td {_CELL}>{_text(g, base.get(split_label(g.column)[0]))}</td>" for g, _ in row)
    first = next(iter(labs_of(comparison)), "")
    proofs = "".join(f"<td {_HEAD}><small>{_proof(g)}{_leaves(g, lead, first)}</small></td>" for g, lead in row)
    return (
        f"<p><b>{escape(comparison.prompts[index])}</b></p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody><tr>{cells}</tr><tr>{proofs}</tr></tbody></table>"
    )


def _leaves(generation: Generation, lead: Generation | None, first: str) -> str:
    """Where and how far a lab's column leaves the first lab's."""
    if lead is None:
        return ""
    leaves = departure(lead, generation)
    theirs = f"{escape(first)} · {escape(split_label(lead.column)[1])}"
    where = f"as {theirs}" if leaves.place is None else f"first leaves {theirs} at token {leaves.place + 1}"
    return f"<br>{where}" + (f"; mean |Δlogprob| until there {leaves.shift:.2g}" if leaves.shared else "")


def _text(generation: Generation, base: str | None) -> str:
    if base is None or split_label(generation.column)[1] == "base":
        return escape(generation.text)
    return mark_words(generation.text, base)


def _proof(generation: Generation) -> str:
    who = ", ".join(generation.active_adapters) or "no adapter"
    finish = _FINISH.get(generation.finish_reason, generation.finish_reason)
    speed = f"{generation.tokens_per_second:.1f} a second" + (", from the cache" if generation.cached else "")
    return (
        f"acted: {escape(who)} · weights {escape(generation.weights_digest[:8])} · "
        f"largest logit change {generation.logit_shift:.3g}<br>"
        f"{generation.new_tokens} tokens, {speed}, {escape(finish)}{_difference(generation)}"
    )


def _difference(generation: Generation) -> str:
    if generation.first_difference is None:
        return ""
    tie = " (tie: rounding could have done it)" if generation.tie else ""
    return f"<br>first leaves base at token {generation.first_difference + 1}{tie}"
