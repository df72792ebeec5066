"""What is in memory, by owner: the storages that tensors really have, counted once each. Bytes are bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterlab.peaks import COMPUTED, MEASURED, Operation, optimizer_tensors
from adapterlab.reading import adapter_tensors

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from adapterlab.adapters import Adapters
    from adapterlab.finished import FinishedColumns
    from adapterlab.mounts import Mounted, Mounts

COLUMNS = ["owner", "kind", "device", "bytes", "source"]
_OF_THE_BASE = ("weights", "buffers", "quantization")
_ELSEWHERE = ("disk", "meta")  # where nothing is in memory

Row = tuple[str, str, str, int, str]
Sizes = dict[str, int]  # device → bytes


def memory_frame(adapters: Adapters, finished: FinishedColumns, operation: Operation | None) -> pd.DataFrame:
    """What is in memory now and what the last operation took at most; see `AdapterLab.memory`."""
    import pandas as pd

    counted = Storages()
    rows = [*_base_rows(adapters.mounts, counted)]
    for name, mounted in list(adapters.mounts.adapters.items()):
        rows += _adapter_rows(adapters, name, mounted, counted)
    rows += _lab_rows(adapters.mounts, finished, counted)
    rows += _process_rows(rows)
    if operation is not None:
        rows += [("last operation", *row) for row in operation.rows()]
    shown = [row for row in rows if row[3] > 0 or row[:2] == ("base", "weights")]
    return pd.DataFrame(shown, columns=COLUMNS).astype({"bytes": "int64"})


def memory_summary(adapters: Adapters, names: Iterable[str], operation: Operation | None) -> dict[str, int | None]:
    """For a comparison: base_bytes (quantization included), adapter_bytes (of `names`, whose weights were just read),
    peak_bytes (on the devices where the base lies; None where it was not measured)."""
    base = adapters.base_bytes
    if not base:  # it is frozen: once is enough
        for _, kind, device, size, _ in _base_rows(adapters.mounts, Storages()):
            if kind in _OF_THE_BASE and device not in _ELSEWHERE:
                base[device] = base.get(device, 0) + size
    peak = {} if operation is None else operation.peak
    readers = [adapters.records[name].reader for name in names]
    return {
        "base_bytes": sum(base.values()),
        "adapter_bytes": sum(reader.nbytes() for reader in readers if reader is not None),
        "peak_bytes": sum(peak[device] for device in base) if set(base) <= set(peak) else None,
    }


class Storages:
    """Sizes of tensors' storages by device. Each counts once, for whoever asks first; what is not in memory counts nothing."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, int]] = set()

    def take(self, tensors: Iterable[Tensor | None]) -> Sizes:
        sizes: Sizes = {}
        for tensor in tensors:
            for key, size in storages_of(tensor):
                if key not in self._seen:
                    self._seen.add(key)
                    sizes[key[0]] = sizes.get(key[0], 0) + size
        return sizes

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._seen


def storages_of(tensor: Any) -> Iterator[tuple[tuple[str, int], int]]:
    """((device, address), bytes) of what lies in memory for a tensor: several for one that is made of others."""
    if tensor is None or tensor.is_meta:
        return
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor of tensors, as some quantizers have them
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages_of(getattr(tensor, name))
    elif tensor.is_sparse:
        yield from storages_of(tensor._values())
        yield from storages_of(tensor._indices())
    else:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            yield (str(tensor.device), storage.data_ptr()), storage.nbytes()


# -- the base ----------------------------------------------------------------------------------------------------------


def base_modules(mounts: Mounts) -> Iterator[nn.Module]:
    """The base's own modules, whatever is mounted in it now; and the lab's own layers in it, which have no tensors."""
    todo, seen = [mounts.model], set()
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            todo += [_unwrapped(inner) for inner in reversed(list(module._modules.values()))]


def _unwrapped(module: Any) -> Any:
    """What stands in one of PEFT's layers, or the module itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        inner = getattr(module, "base_layer", None)
        module = module.original_module if inner is None else inner
    return module


def _base_rows(mounts: Mounts, counted: Storages) -> list[Row]:
    weights: list[Any] = []
    buffers: list[Any] = []
    gradients: list[Any] = []
    statistics: list[Any] = []
    away: dict[tuple[str, str], Sizes] = {}
    known: set[int] = set()
    for module in base_modules(mounts):
        for kind, found, table in (
            ("weights", weights, module._parameters),
            ("buffers", buffers, module._buffers),
        ):
            for name, tensor in list(table.items()):
                if tensor is None or id(tensor) in known:
                    continue
                known.add(id(tensor))
                place, kept = _kept_elsewhere(module, name) if tensor.is_meta else ("", tensor)
                found.append(kept)
                gradients.append(tensor.grad if kind == "weights" else None)
                if kept is None:
                    sizes = away.setdefault((kind, COMPUTED), {})
                    sizes[place] = sizes.get(place, 0) + tensor.numel() * tensor.element_size()
        statistics += _statistics(module)
    return [
        *_rows("base", "weights", counted.take(weights) or {str(mounts.model.device): 0}),
        *_rows("base", "weights", away.get(("weights", COMPUTED), {}), COMPUTED),
        *_rows("base", "buffers", counted.take(buffers)),
        *_rows("base", "buffers", away.get(("buffers", COMPUTED), {}), COMPUTED),
        *_rows("base", "quantization", counted.take(statistics)),
        *_rows("base", "gradients", counted.take(gradients)),
    ]


def _statistics(module: Any) -> Iterator[Any]:
    """What bitsandbytes keeps beside a layer's weight: of 4 bits in its `quant_state`, of 8 bits on the weight and, after
    the first forward, in the layer's `state`, where the weight itself is once more (which is no second storage)."""
    import torch

    for parameter in list(module._parameters.values()):
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (getattr(part, label, None) for label in ("absmax", "code", "offset"))
        yield from (getattr(parameter, label, None) for label in ("SCB", "CB"))
    for holder in (module.__dict__.get("state"), module.__dict__.get("quant_state")):
        own = list(getattr(holder, "__dict__", {}).values())
        yield from (value for value in own if isinstance(value, torch.Tensor))


def _kept_elsewhere(module: Any, name: str) -> tuple[str, Any]:
    """Where accelerate keeps the values of a meta tensor: ("cpu", the tensor), ("disk", None), or ("meta", None) where it
    does not say."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        weights: Any = getattr(one, "weights_map", None)
        key = name
        while hasattr(weights, "prefix"):
            weights, key = weights.dataset, weights.prefix + key
        held = weights if isinstance(weights, dict) else getattr(weights, "state_dict", {})
        if key in held and not held[key].is_meta:
            return str(held[key].device), held[key]
        if key in getattr(weights, "index", ()):
            return "disk", None
    return "meta", None


# -- adapters ----------------------------------------------------------------------------------------------------------


def _own(mounted: Mounted, name: str) -> Iterator[tuple[str, Any, int]]:
    """(kind, tensor, bytes of its own elements) of an adapter: stacks.py lets its tensors lie in storages of several."""
    for label, tensor in adapter_tensors(list(mounted.layers.values()), name):
        kind = "modules_to_save" if label.startswith("modules_to_save.") else "weights"
        yield kind, tensor, 0 if tensor.is_meta else tensor.numel() * tensor.element_size()


def _adapter_rows(adapters: Adapters, name: str, mounted: Mounted, counted: Storages) -> list[Row]:
    kinds: dict[str, Sizes] = {"weights": {}, "modules_to_save": {}}
    tensors = [own for own in _own(mounted, name) if not any(key in counted for key, _ in storages_of(own[1]))]
    for kind, tensor, size in tensors:
        device = str(tensor.device)
        kinds[kind][device] = kinds[kind].get(device, 0) + size
    rows = [row for kind, sizes in kinds.items() for row in _rows(name, kind, sizes)]
    parameters = [tensor for _, tensor, _ in tensors]
    rows += _rows(name, "gradients", counted.take(tensor.grad for tensor in parameters if tensor.is_leaf))
    state: list[Any] = []
    averages: list[Any] = []
    for trainer in list(adapters.trainers):
        mine = optimizer_tensors(trainer.optimizer, parameters)
        state += mine
        averages += trainer.averages() if mine else []
    rows += _rows(name, "optimizer", counted.take(state))
    return rows + _rows(name, "importance averages", counted.take(averages))


# -- the lab, and the process ------------------------------------------------------------------------------------------


def _lab_rows(mounts: Mounts, finished: FinishedColumns, counted: Storages) -> list[Row]:
    """What the lab keeps to be quick."""
    stacks = mounts.stacks
    lent: dict[tuple[str, int], int] = {}  # storage → bytes that are no adapter's
    everything = [(t, size) for name, m in list(mounts.adapters.items()) for _, t, size in _own(m, name)]
    shared = [side for here in list(stacks._at.values()) for stack in here for side in (stack.A, stack.B)]
    for tensor, own in [*everything, *((side, 0) for side in shared)]:
        for key, size in storages_of(tensor):
            if key not in counted:
                lent[key] = lent.get(key, size) - own
    padding: Sizes = {}
    for (device, _), size in lent.items():
        padding[device] = padding.get(device, 0) + max(size, 0)
    counted.take([tensor for tensor, _ in everything] + shared)
    batches = [list(layers.values()) for _, layers in list(stacks.batches._made.values())]
    kept = [
        {key: value for key, value in layer.__dict__.items() if not key.startswith("_") or key == "_whole"}
        for layers in batches
        for layer in layers
    ]
    return [
        *_rows("lab", "stack padding", padding),
        *_rows("lab", "DoRA norms", counted.take(_tensors_in(list(stacks.norms.values())))),
        *_rows("lab", "kept batches", counted.take(_tensors_in(kept))),
        *_rows("lab", "finished columns", {"cpu": finished.size}, COMPUTED),
    ]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples, dicts and dataclasses."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in list(value.values()):
            yield from _tensors_in(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in list(value):
            yield from _tensors_in(inner)
    elif dataclasses.is_dataclass(value):
        yield from _tensors_in(vars(value))


def _process_rows(rows: list[Row]) -> list[Row]:
    """What the process holds beside the tensors in `rows`; below 0 where those are not all in memory yet."""
    import psutil

    known: Sizes = {}
    for _, _, device, size, _ in rows:
        known[device] = known.get(device, 0) + size
    rest = psutil.Process().memory_info().rss - known.get("cpu", 0)
    found = [("process", "Python and libraries", "cpu", rest, COMPUTED)]
    for device in sorted(known):
        if device.startswith("cuda"):
            found += _cuda_rows(device, known[device])
    return found


def _cuda_rows(device: str, known: int) -> list[Row]:
    import torch

    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return [
        ("process", "other tensors", device, allocated - known, COMPUTED),
        ("process", "reserved by CUDA's allocator", device, reserved - allocated, MEASURED),
    ]


def _rows(owner: str, kind: str, sizes: Mapping[str, int], source: str = MEASURED) -> list[Row]:
    return [(owner, kind, device, size, source) for device, size in sizes.items()]
