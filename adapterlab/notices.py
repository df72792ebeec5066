"""What the lab tells people while it works: one plain line, where a notebook shows it."""

from __future__ import annotations

import warnings

from adapterlab.errors import printable


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


def say(text: str) -> None:
    """Tell the user about a choice the lab made for them."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Warn at the caller of the lab's public method."""
    warnings.warn(printable(text), AdapterLabWarning, stacklevel=4)
