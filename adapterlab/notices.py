"""What the lab tells people while it works: one plain line, where a notebook shows it."""

from __future__ import annotations

import warnings

from adapterlab.errors import printable


class AdapterLabWarning(UserWarning):
    """Something is not as the lab left it, or not as one would think; the lab goes on."""


def say(text: str) -> None:
    """Tell the user about a choice the lab made for them."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Warn at the caller of the lab's public method."""
    warnings.warn(printable(text), AdapterLabWarning, stacklevel=4)
