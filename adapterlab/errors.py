"""What the lab raises when a person can put it right."""

from __future__ import annotations


class AdapterLabError(Exception):
    """Something a user can mend: the message says what was wrong, which name or path, and what to do.

    The call that raised it has changed nothing.
    """
