"""What stands before the lab's public methods: one call at a time, on an open lab."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def changes_state(method: F) -> F:
    """One call at a time, on an open lab, and not from inside `using` or a running comparison."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self._check_open()
            self._adapters.check_idle()
            return method(self, *args, **kwargs)

    return guarded  # type: ignore[return-value]


def exclusive(method: F) -> F:
    """One call at a time, on an open lab."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self._check_open()
            self._check_no_run()
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]
