"""What stands before the lab's public methods: one call at a time, on an open lab, and nothing left half done.

Ctrl-C comes at any moment, in a `finally` too. So whatever is set for a while is written down first (`put_back`), and the
call at work (`Work`) goes over what is still written down when it ends; what even that has missed, because Ctrl-C came just
then, the next call of the lab does before anything else.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from adapterlab.errors import AdapterLabError

F = TypeVar("F", bound=Callable[..., Any])
Undo = Callable[[], object]

_here = threading.local()  # .undo: what the innermost call at work in this thread has to put back


@contextlib.contextmanager
def put_back(undo: Undo) -> Iterator[None]:
    """Run `undo` after the block, however that ends. It is run again if Ctrl-C cuts it short, so it must give the same from
    wherever it begins: say what things are to be, and not what is to be done to them."""
    pending: list[Undo] | None = getattr(_here, "undo", None)
    if pending is None:
        pending = []
    mark = len(pending)
    pending.append(undo)
    try:
        yield
    finally:
        # Not when this is a generator that the garbage collector ends, long after its call has put everything back.
        if len(pending) > mark and pending[mark] is undo:
            _back_to(pending, mark)


def _back_to(pending: list[Undo], mark: int) -> None:
    """Put back what was written down after `mark`, the last first."""
    failed: Exception | None = None
    while len(pending) > mark:
        undo = pending[-1]
        try:
            undo()
        except Exception as error:  # the others are to be put back all the same
            failed = failed or error
        pending.pop()
    if failed is not None:
        raise failed


_training: dict[str, tuple[int, object]] = {}  # "by": the thread that trains now, and the block in which it does


@contextlib.contextmanager
def one_training() -> Iterator[None]:
    """Make a trainer, or train, in the block. Raises `AdapterLabError` while another thread does, with whatever lab.

    Trainer stands on accelerate, whose AcceleratorState and GradientState are one for the process: who makes a trainer takes
    the first from under the one at work, and of two at work each counts the other's steps (issue 7).
    """
    mine = threading.get_ident(), object()

    def leave() -> None:
        if _training.get("by") is mine:
            del _training["by"]

    with put_back(leave):
        if _training.setdefault("by", mine)[0] != mine[0]:
            raise AdapterLabError(
                "Another lab of this process is training, and two trainings at once would count each other's steps. Wait "
                "until that has ended, or stop it, and call this again."
            )
        yield


class Lent:
    """Lives as long as the variables of the generator that holds it."""


class Work:
    """One call of a lab at work, as a context manager within the lab's lock: at its end everything is put back.

    lent: for a generator, which lends the model to somebody: a variable of its; a function tells by itself whether it still
    runs.
    """

    def __init__(self, lab: Any, lent: Lent | None = None) -> None:
        self.lab, self.undo = lab, list[Undo]()
        self.thread = threading.get_ident()
        self.frame: FrameType | None = None
        self.lent = None if lent is None else weakref.ref(lent)
        self.outer: list[Undo] | None = None

    def __enter__(self) -> Work:
        finish_left_over(self.lab)
        if self.lent is None:
            self.frame = sys._getframe(1)
            self._remember_gradients()
        self.outer = getattr(_here, "undo", None)
        try:
            self.lab._works.append(self)
            _here.undo = self.undo
            return self
        except BaseException:  # Ctrl-C, before there is a block whose end would end it
            self.finish()
            raise

    def __exit__(self, *error: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Put everything back; twice is once."""
        try:
            _back_to(self.undo, 0)
        finally:
            if not self.undo and self in self.lab._works:
                self.lab._works.remove(self)
            if self.thread == threading.get_ident():
                _here.undo = self.outer
        self.frame = None

    def goes_on(self) -> bool:
        """Whether it is still at work. Asked by who holds the lab's lock."""
        if self.thread != threading.get_ident():
            return False  # it would hold the lock
        if self.lent is not None:
            return self.lent() is not None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def _remember_gradients(self) -> None:
        """torch's `no_grad` is no safer from Ctrl-C than anything else."""
        torch = sys.modules.get("torch")
        if torch is None:
            return
        enabled = torch.is_grad_enabled()

        def undo() -> None:
            if self.thread == threading.get_ident() and torch.is_grad_enabled() is not enabled:
                torch.set_grad_enabled(enabled)

        self.undo.append(undo)


def finish_left_over(lab: Any) -> None:
    """Put back what calls that are no longer at work have left. The caller holds the lab's lock."""
    while lab._works and not lab._works[-1].goes_on():
        lab._works[-1].finish()


def changes_state(method: F) -> F:
    """One call at a time, on an open lab, and not from inside `using` or a running comparison."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turn(), Work(self):
            self._check_open()
            self._adapters.check_idle()
            return method(self, *args, **kwargs)

    return guarded  # type: ignore[return-value]


def exclusive(method: F) -> F:
    """One call at a time, on an open lab."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turn(), Work(self):
            self._check_open()
            self._check_no_run()
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]
