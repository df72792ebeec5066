"""The most memory that an operation took, above what was there when it began; measured while it runs.

On a GPU the allocator counts. On the host Linux keeps the process's highest RSS ("VmHWM"), and sets it back when it is
asked to. What malloc keeps of memory that was freed would hide in there: after a training of the demo model it kept 1.8 of
2.4 GB, and the next one seemed to take 0.7. So glibc is made to give it back before and after. That takes some 70 ms per
gigabyte, after work that has taken far longer to fill it; where there is nothing to give back, half a millisecond in all.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.guards import put_back

if TYPE_CHECKING:
    from torch import Tensor

MEASURED, COMPUTED = "measured", "computed"
REST = "activations and temporaries"
_PROCESS = Path("/proc/self")
_RESET_THE_PEAK = "5"  # to clear_refs, see proc_pid_clear_refs(5)
_LITTLE = 2_000_000  # bytes that malloc may keep: asking for less is not worth the time
_NOISE = 16_000_000  # bytes by which Linux's own counts may be apart on machines with many processors


@dataclass(frozen=True)
class Operation:
    """What an operation of the lab took at most, above what was resident when it began.

    name: "compare", "generate", "train", "divergence" or "evaluate". seconds: wall time. peak: device → bytes; a device is
    missing where that can't be measured, so it is never 0 for want of knowledge. parts: "KV cache", "gradients",
    "optimizer", … → device → bytes of the tensors themselves at their largest; a kind that was not seen is missing.

    On a CPU the peak is the process's: what other threads allocated meanwhile and libraries loaded when they were first
    used are in it, to some hundred kilobytes. With another malloc than glibc's, one operation after another shows less,
    but never less than its parts.
    """

    name: str
    seconds: float
    peak: Mapping[str, int]
    parts: Mapping[str, Mapping[str, int]]

    def rows(self) -> list[tuple[str, str, int, str]]:
        """(kind, device, bytes, source) of what the peak consists of: where it is known, they add up to it."""
        found: list[tuple[str, str, int, str]] = []
        for device in dict.fromkeys([*self.peak, *(device for sizes in self.parts.values() for device in sizes)]):
            known = {kind: sizes[device] for kind, sizes in self.parts.items() if sizes.get(device)}
            found += [(kind, device, size, MEASURED) for kind, size in known.items()]
            if device in self.peak:
                rest = self.peak[device] - sum(known.values())
                found.append((REST, device, rest, COMPUTED if known else MEASURED))
        return [(f"peak of {self.name}: {kind}", device, size, source) for kind, device, size, source in found]


class Watch:
    """An operation that runs now. `operation`: what came of it, None until it has ended well."""

    def __init__(self, name: str, devices: Iterable[str]) -> None:
        self.name, self.devices = name, list(dict.fromkeys(["cpu", *devices]))
        self.thread, self.started = threading.get_ident(), time.perf_counter()
        self.resident: dict[str, int] = {}
        self.parts: dict[str, dict[str, int]] = {}
        self.operation: Operation | None = None

    def begin(self) -> None:
        with _lock:
            # The counters are the process's: one that runs within another leaves them to that one, and is not measured.
            alone = not _running
            _running.add(self)
            if alone:
                give_back()
                self.resident = {d: size for d in self.devices if (size := _start_anew(d)) is not None}

    def peaks(self) -> dict[str, int]:
        """The peak until now, by device."""
        peaks = {d: peak - size for d, size in self.resident.items() if (peak := _highest(d)) is not None}
        for device in peaks:
            known = sum(sizes.get(device, 0) for sizes in self.parts.values())
            peaks[device] = max(peaks[device], known, 0)
        return peaks

    def end(self) -> None:
        """Stop watching; twice is once."""
        with _lock:
            _running.discard(self)
            if not _running:
                give_back()


_lock = threading.RLock()
_running: weakref.WeakSet[Watch] = weakref.WeakSet()  # of all labs and threads; an interrupted one goes by itself


@contextlib.contextmanager
def watch(name: str, devices: Iterable[str], done: Callable[[Operation], None]) -> Iterator[Watch]:
    """In the block an operation runs; how much it took is told to `done` if it ends well.

    devices: where it may allocate, beside "cpu". One that runs within another, or beside another in a second thread, is
    recorded without a peak, and spoils nothing. Sets back the process's peaks: VmHWM (and with it Python's `ru_maxrss`) and
    `torch.cuda.max_memory_allocated` of `devices`.
    """
    watched = Watch(name, devices)
    with put_back(watched.end):
        watched.begin()
        yield watched
        peaks = watched.peaks()
    seconds = time.perf_counter() - watched.started
    watched.operation = Operation(name, seconds, peaks, watched.parts)
    done(watched.operation)


def note(kind: str, tensors: Callable[[], Iterable[Tensor]]) -> None:
    """Tell the operation that runs in this thread, if one does, of tensors that are there now; the largest time counts."""
    from adapterlab.memory import Storages

    here = threading.get_ident()
    with _lock:  # another thread's may begin just now
        mine = [watched for watched in _running if watched.thread == here]
    if mine:
        innermost = max(mine, key=lambda watched: watched.started)
        for device, size in Storages().take(tensors()).items():
            known = innermost.parts.setdefault(kind, {})
            known[device] = max(size, known.get(device, 0))


def cache_tensors(model_kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Keys, values and states in the caches among what `generate` hands from step to step."""
    import torch

    values = list(model_kwargs.values())
    for side in ("self_attention_cache", "cross_attention_cache"):  # an encoder-decoder's cache is two
        values += [getattr(value, side, None) for value in model_kwargs.values()]
    for layer in (layer for value in values for layer in getattr(value, "layers", None) or ()):
        for held in getattr(layer, "__dict__", {}).values():
            inner = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else [held]
            yield from (one for one in inner if isinstance(one, torch.Tensor))


def optimizer_tensors(optimizer: Any, parameters: Iterable[Any] | None = None) -> list[Tensor]:
    """The state that an optimizer keeps, of these parameters or of all; nothing before its first step."""
    import torch

    state = getattr(optimizer, "state", None) or {}
    chosen = list(state) if parameters is None else [p for p in parameters if p in state]
    return [value for p in chosen for value in state[p].values() if isinstance(value, torch.Tensor)]


# -- what the system counts ------------------------------------------------------------------------------------------


def _start_anew(device: str) -> int | None:
    """Set the device's peak back to what is there now, and give that; None where this can't be done."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        try:
            (_PROCESS / "clear_refs").write_text(_RESET_THE_PEAK)
            peak, resident = _counts()
        except (OSError, LookupError, ValueError):  # no Linux, or one that does not let us
            return None
        return resident if peak - resident < _NOISE else None
    try:
        _allocator(kind).reset_peak_memory_stats(int(index or 0))
    except (AttributeError, RuntimeError):
        return None
    return _allocated(device, "current")


def _highest(device: str) -> int | None:
    """The peak since `_start_anew`."""
    if device != "cpu":
        return _allocated(device, "peak")
    try:
        return _counts()[0]
    except (OSError, LookupError, ValueError):
        return None


def _counts() -> tuple[int, int]:
    """(highest, present) RSS of this process, in bytes."""
    lines = (_PROCESS / "status").read_text().splitlines()
    table = dict(line.split(":", 1) for line in lines if line.startswith(("VmHWM:", "VmRSS:")))
    highest, present = (int(table[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS"))
    return highest, present


def _allocator(kind: str) -> Any:
    import torch

    return getattr(torch, kind)


def _allocated(device: str, which: str) -> int | None:
    kind, _, index = device.partition(":")
    try:
        return int(_allocator(kind).memory_stats(int(index or 0))[f"allocated_bytes.all.{which}"])
    except (AttributeError, LookupError, RuntimeError):  # an accelerator that counts nothing, or one that has failed
        return None


def give_back() -> None:
    """Give memory that was freed, and that malloc has kept, back to the system. Does nothing where malloc is not glibc's."""
    functions = _glibc()
    if functions is not None and functions[0]().fordblks > _LITTLE:
        functions[1](0)


@functools.cache
def _glibc() -> tuple[Any, Any] | None:
    """(mallinfo2, malloc_trim), if there are."""
    import ctypes
    import sys

    if not sys.platform.startswith("linux"):
        return None
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    counts = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names.split()]})
    try:
        library = ctypes.CDLL(None)
        functions = library.mallinfo2, library.malloc_trim
    except (OSError, AttributeError):  # another libc, or a glibc before 2.33
        return None
    functions[0].restype, functions[1].argtypes = counts, [ctypes.c_size_t]
    return functions
