"""What the lab raises when a person can put it right."""

from __future__ import annotations

import re

# What acts on a terminal, turns the text after it round, or can't be written at all
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text, odd letters in it written as escapes: what files are called and say is not the lab's own."""
    return _ODD.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


class AdapterLabError(Exception):
    """Something a user can mend: the message says what was wrong, which name or path, and what to do.

    The call that raised it has changed nothing.

    >>> try:
    ...     lab.set_adapter("pirat")
    ... except AdapterLabError as error:
    ...     print(error)
    No adapter named 'pirat'; the lab has 'pirate', 'robot', 'bard'. ...
    """

    def __init__(self, *said: object) -> None:
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in said))


class StoppedError(AdapterLabError):
    """`lab.stop()` has ended what gives all of its result or nothing."""
