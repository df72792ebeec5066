"""Keep third-party chatter out of people's notebooks, and nothing else: real warnings stay visible."""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

from adapterlab.guards import put_back

# What each logger says again and again, though there is nothing that the reader could do about it.
KNOWN_NOISE = {
    # once, when bitsandbytes is imported on a CPU with AVX512: it has a slower kernel of its own
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # once per layer and token with 8-bit weights: the cast is how it works
    "bitsandbytes.autograd._functions": ("MatMul8bitLt: inputs will be cast",),
}
# The same for warnings, as regular expressions.
KNOWN_WARNINGS = (
    # once per `generate` of an offloaded model, with the advice to put the ids on "meta": accelerate moves them to where
    # the layers compute
    r"You are calling \.generate\(\) with the `input_ids` being on a device type different .* the model is on meta\.",
)
_LOUD_LOGGERS = ("accelerate", "bitsandbytes", "huggingface_hub", "peft", "torch", "transformers")
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"
_FILTERS = threading.RLock()  # one of the lab's threads at a time goes over the list of warning filters

T = TypeVar("T")


class _NoiseFilter(logging.Filter):
    """Drops the records whose message begins with one of `beginnings`."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


def silence_known_noise() -> None:
    """Filter the lines of `KNOWN_NOISE` and `KNOWN_WARNINGS` out, for good.

    Imports nothing, and calling it again changes nothing. Each filter sits on the one logger that says the line, or
    knows the warning's words, so everything else still comes through. Nothing is put back afterwards: another thread
    may have changed the warning filters meanwhile.
    """
    for name, beginnings in KNOWN_NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _NoiseFilter) for known in logger.filters):
            logger.addFilter(_NoiseFilter(beginnings))
    first = [getattr(words, "pattern", "") for _, words, *_ in warnings.filters[: len(KNOWN_WARNINGS)]]
    for pattern in KNOWN_WARNINGS:
        if pattern not in first:  # what was set later comes before it
            warnings.filterwarnings("ignore", pattern, UserWarning)


class _Shared(Generic[T]):
    """A setting of the whole process, changed while anybody is in its block: the first in notes what was there, the last out
    puts it back. Had each noted it for itself, the second of two threads would note, and put back, what the first had set.

    look: what is there now. put: make it so. change: what it becomes, from what was there.
    """

    def __init__(self, look: Callable[[], T], put: Callable[[T], object], change: Callable[[T], T]) -> None:
        self._look, self._put, self._change = look, put, change
        self._lock, self._inside, self._before = threading.RLock(), set[object](), list[T]()

    @contextmanager
    def changed(self) -> Iterator[None]:
        me = object()

        def undo() -> None:
            with self._lock:
                self._inside.discard(me)
                if not self._inside and self._before:
                    self._put(self._before[0])
                    self._before.clear()

        with put_back(undo):
            with self._lock:
                if not self._inside:
                    self._before[:] = [self._look()]
                self._inside.add(me)
                self._put(self._change(self._before[0]))
            yield


def _look_at_levels() -> list[int]:
    return [logging.getLogger(name).level for name in _LOUD_LOGGERS]


def _put_levels(levels: list[int]) -> None:
    for name, level in zip(_LOUD_LOGGERS, levels, strict=True):
        logging.getLogger(name).setLevel(level)


_levels = _Shared(_look_at_levels, _put_levels, lambda before: [logging.ERROR] * len(before))


@contextmanager
def quiet() -> Iterator[None]:
    """In the block, the loggers of the libraries underneath say errors only, and warnings are ignored.

    For attempts whose failure is expected. Levels and warning filters are as before afterwards, also after an exception and
    when other threads are in such a block too. Progress bars are left alone.
    """
    with _levels.changed(), warnings_ignored():
        yield


@contextmanager
def warnings_ignored(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """In the block, warnings of `category` whose text matches the expression `message` are ignored.

    One filter is put in, and that one is taken out again. `warnings.catch_warnings` exchanges the whole list: of two
    threads that overlap, the second would leave behind what the first had set.
    """
    filters, mine = _filters(), ("ignore", re.compile(message, re.IGNORECASE), category, None, 0)

    def undo() -> None:
        with _FILTERS:
            for known in (filters, _filters()):  # somebody else's `catch_warnings` may have put a copy in its place
                known[:] = [one for one in known if one is not mine]

    with put_back(undo):
        with _FILTERS:
            filters.insert(0, mine)
        yield


def _filters() -> list[Any]:
    return cast(list[Any], warnings.filters)  # declared a Sequence, since nobody else should change it


def _look_at_conversion() -> str | None:
    return os.environ.get(_NO_CONVERSION)


def _put_conversion(value: str | None) -> None:
    if value is None:
        os.environ.pop(_NO_CONVERSION, None)
    else:
        os.environ[_NO_CONVERSION] = value


_no_conversion: _Shared[str | None] = _Shared(
    _look_at_conversion, _put_conversion, lambda before: "1" if before is None else before
)


@contextmanager
def no_conversion_requests() -> Iterator[None]:
    """In the block, transformers does not ask the Hub from a background thread to convert pickled weights.

    It would open a pull request on someone's repository, and talk about it in the middle of the notebook.
    Whoever has set the variable is obeyed.
    """
    with _no_conversion.changed():
        yield
