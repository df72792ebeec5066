"""What Python has freed, given back: allocators keep it for later, and then it is missing for everybody else."""

from __future__ import annotations

import sys
import traceback


def give_back_memory() -> None:
    """Give memory that nothing uses any more back to the operating system, and a GPU's to whoever else is on it.

    glibc's `malloc` keeps what was freed in pieces below 32 MB (issue 6: of a closed model several hundred megabytes), so a
    process would grow with each model it opens. Tens of milliseconds; on systems with other allocators nothing is done.
    Does not look for garbage: that is `gc.collect`.
    """
    import torch

    from adapterlab.peaks import give_back

    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_last_error() -> None:
    """Let the last error that nobody caught go of what it came through: Python keeps it for a debugger, and so every local
    variable on the way, a model among them, until the next one. Its message and lines stay."""
    error = getattr(sys, "last_value", None)
    seen: set[int] = set()
    while isinstance(error, BaseException) and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
