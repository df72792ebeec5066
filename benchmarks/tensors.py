"""How many bytes of tensors are alive, and at most, while something runs: an exact count of storages.

Every operator that torch dispatches passes `StorageCounter`, which counts each new storage once and is told by a
finalizer when it goes. What a kernel allocates within itself, out of the dispatcher's sight, is not counted.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESIDENT = "there before the run"


class StorageCounter(TorchDispatchMode):
    """`current`, `peak` and `at_peak` (label → bytes) of the storages on real devices; used as a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.sums: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._seen: set[int] = set()
        for tensor in live_tensors():
            self._count(tensor, RESIDENT)
        self.before = self.current

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf, f"{operator.overloadpacket} {tuple(leaf.shape)} {str(leaf.dtype)[6:]}")
        return result

    def _count(self, tensor: torch.Tensor, label: str) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.current += size
        self.sums[label] += size
        weakref.finalize(storage, self._gone, key, size, label).atexit = False
        if self.current > self.peak:
            self.peak = self.current
            self.at_peak = self.sums.copy()

    def _gone(self, key: int, size: int, label: str) -> None:
        self._seen.discard(key)
        self.current -= size
        self.sums[label] -= size


def live_tensors() -> Iterable[torch.Tensor]:
    """Every tensor that Python knows of."""
    gc.collect()
    # By type and not isinstance, which would ask each object for its class and wake the lazy ones.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"}
    return sum(storages.values())
