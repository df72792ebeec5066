"""Other people's strings, made fit for a page: they are text and nothing else there, and all of them can be seen."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

NO_MATHS = "tex2jax_ignore mathjax_ignore"
"""CSS classes of what MathJax, old and new, leaves alone: to a notebook "$5 or $6" is a formula otherwise."""

# Control characters, halves of characters, what Unicode has no character for, and what turns the order of all that follows
# it in a line: with one of those in a name, the numbers of the proof beside it would read otherwise.
_UNFIT = re.compile(
    "\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
    + "".join(chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(1, 17))
    + "]"
)


def readable(text: object) -> str:
    """`text` as a page can hold it, and with all of it to be seen.

    Newlines of all three kinds are \\n, and tabs stay. Other control characters are shown as their pictures (␀ for NUL).
    What has none, lone surrogates, what Unicode calls no character, and the marks that embed, isolate or override the
    direction of writing, are shown as U+FFFD. Everything else is as it was.
    """
    return _UNFIT.sub(_sign, str(text))


def escape(text: object) -> str:
    """`readable(text)` as HTML text, or as an attribute's value within quotes of either kind."""
    return html.escape(readable(text))


def without_maths(content: str) -> str:
    """HTML in a box in which no `$` begins a formula."""
    return f'<div class="{NO_MATHS}">{content}</div>'


def table_html(frame: pd.DataFrame, *, longest: int | None = None, **options: Any) -> str:
    """A frame as an HTML table; `options` as in pandas' `to_html`. longest: letters of a cell before the rest is cut."""
    import pandas as pd

    shown = frame.rename(columns=readable).map(lambda value: readable(value) if isinstance(value, str) else value)
    with pd.option_context("display.max_colwidth", longest):
        return str(shown.to_html(index=False, escape=True, classes=NO_MATHS, **options))


def _sign(found: re.Match[str]) -> str:
    code = ord(found[0][0])
    if code == 0x0D:
        return "\n"
    if code == 0x7F:
        return "\u2421"
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
