"""A `Comparison` as HTML that reads without a kernel, a stylesheet or a script: a table, with words that base did not
say marked by <ins>. Every string that comes from outside is escaped."""

from __future__ import annotations

import difflib
import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterlab.comparison import Comparison, Generation

ALIKE = 0.6  # share of the words that two texts have in common
_FINISH = {"eos": "ended", "length": "cut at the limit", "stopped": "stopped", "stop_string": "stop string"}
_CELL = 'style="text-align:left;vertical-align:top;white-space:pre-wrap;padding:8px 12px;min-width:180px"'
_HEAD = 'style="text-align:left;vertical-align:top;padding:8px 12px"'


def comparison_html(comparison: Comparison) -> str:
    """One table per prompt, one column per column of the comparison."""
    return "\n".join(_table(comparison, index) for index in range(len(comparison.prompts)))


def comparison_page(comparison: Comparison) -> str:
    """The same as a whole HTML document that follows the reader's light or dark setting."""
    title = escape(f"AdapterLab: {comparison.model.get('name', '')}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
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
    plain = difflib.SequenceMatcher(None, [w.strip() for w in theirs], [w.strip() for w in mine], autojunk=False)
    removed = removed and plain.ratio() >= ALIKE
    lead = text[: len(text) - len(text.lstrip())]
    here = len(lead)
    pieces = [_with_sign(lead, at, sign)]
    for tag, was, until, start, end in plain.get_opcodes():
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


def _with_sign(text: str, at: int | None, sign: str) -> str:
    """`text` escaped, with `sign` before its place `at`, if that is one of its own."""
    if at is None or not 0 <= at < len(text):
        return escape(text)
    return escape(text[:at]) + sign + escape(text[at:])


def _table(comparison: Comparison, index: int) -> str:
    row = [g for g in comparison.generations if g.prompt_index == index]
    base = {g.column.rpartition(" · ")[0]: g.text for g in row if g.column.rpartition(" · ")[2] == "base"}
    heads = "".join(f"<th {_HEAD}>{escape(g.column)}</th>" for g in row)
    cells = "".join(f"<td {_CELL}>{_text(g, base.get(g.column.rpartition(' · ')[0]))}</td>" for g in row)
    proofs = "".join(f"<td {_HEAD}><small>{_proof(g)}</small></td>" for g in row)
    return (
        f"<p><b>{escape(comparison.prompts[index])}</b></p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody><tr>{cells}</tr><tr>{proofs}</tr></tbody></table>"
    )


def _text(generation: Generation, base: str | None) -> str:
    if base is None or generation.column.rpartition(" · ")[2] == "base":
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
