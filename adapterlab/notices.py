"""What the lab tells people while it works: one plain line, where a notebook shows it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

from adapterlab.errors import printable

_here = threading.local()  # .told: the list of who listens in this thread


class AdapterLabWarning(UserWarning):
    """Something is not as the lab left it, or not as one would think; the lab goes on.

    >>> import warnings
    >>> lab.set_adapter("pirate")
    >>> lab.model.disable_adapters()  # behind the lab's back
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     said = lab.generate("What is the moon?", max_new_tokens=1)
    >>> caught[0].category.__name__, lab.active_adapters
    ('AdapterLabWarning', {'pirate': 1.0})
    """


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """What the lab says and warns of in this thread within the block, one text each; it is printed and warned of as ever."""
    before = getattr(_here, "told", None)
    _here.told = told = list[str]()
    try:
        yield told
    finally:
        _here.told = before


def _note(text: str) -> str:
    text, told = printable(text), getattr(_here, "told", None)
    if told is not None:
        told.append(text)
    return text


def say(text: str) -> None:
    """Tell the user about a choice the lab made for them."""
    print(_note(text), flush=True)


def say_meanwhile(text: str) -> None:
    """Tell the user what is true only now: who listens would pass it on too late."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Warn at the caller of the lab's public method."""
    warnings.warn(_note(text), AdapterLabWarning, stacklevel=4)
