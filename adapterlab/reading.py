"""Reading the content of tensors fast: where an adapter's lie, and their values as bytes."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

# In one of PEFT's layers: the base's module, and what does nothing outside training.
_NOT_ITS_OWN = ("base_layer", "original_module", "lora_dropout")


class Slot(NamedTuple):
    """Where a tensor hangs: `table[key]`. label: what it is called there, the adapter's name left out."""

    label: str
    table: dict[str, Any]
    key: str


class Step(NamedTuple):
    """On the way to a slot: `table[key]` is `value`, and the table has so many entries."""

    table: dict[str, Any]
    key: str
    value: Any
    entries: int


class Seen(NamedTuple):
    """How a slot's tensor lay when last read: what has to be equal for `buffer` to be its memory, None if it can't be."""

    pointer: int
    dtype: Any
    shape: Any
    stride: tuple[int, ...]
    buffer: Any


class AdapterReader:
    """Reads one adapter's weights again and again.

    Between two readings it remembers where they lie, which takes longer to find out than reading them, and never what is
    in them. Every step to them is looked at anew, so that another module, parameter or memory is found at once.
    """

    def __init__(self, layers: Mapping[str, nn.Module], name: str) -> None:
        self.layers, self.name = layers, name
        self._steps: list[Step] = []
        self._slots: list[Slot] = []
        self._seen: list[Seen] = []  # in the order of the slots
        self._numbers: list[tuple[dict[str, Any], str, Any]] = []  # a layer's attributes, its path, what they say
        self._structure = b""

    def digest(self) -> str:
        """Hex digest of the adapter's tensors, scalings and kinds of layer as they are now; see `adapter_digest`."""
        import xxhash

        if not self._slots or not self._stands():
            self._find()
        content, seen = xxhash.xxh3_128(), self._seen
        for place, (label, table, key) in enumerate(self._slots):
            tensor = table[key]
            pointer, dtype, shape, stride, buffer = seen[place]
            if (
                tensor.data_ptr() != pointer
                or tensor.dtype is not dtype
                or tensor.shape != shape
                or tensor.stride() != stride
            ):
                seen[place], self._structure = look_at(tensor, _by_column(label)), b""
                buffer = seen[place].buffer
            content.update(values(tensor, _by_column(label)) if buffer is None else buffer)
        total = hashlib.blake2b(self._described(), digest_size=16)
        total.update(content.digest())
        return total.hexdigest()

    def _described(self) -> bytes:
        """Names, dtypes, shapes and numbers, as text."""
        numbers = [(own, path, _numbers(own, self.name)) for own, path, _ in self._numbers]
        if not self._structure or numbers != self._numbers:
            self._numbers = numbers
            texts = [f"{slot.label}|{seen.dtype}|{tuple(seen.shape)}" for slot, seen in zip(self._slots, self._seen)]
            texts += [f"{path}|{read!r}" for _, path, read in numbers]
            self._structure = "\n".join(texts).encode()
        return self._structure

    def _stands(self) -> bool:
        for table, key, value, entries in self._steps:
            if table.get(key) is not value or len(table) != entries:
                return False
        return all(table[key] is not None for _, table, key in self._slots)

    def _find(self) -> None:
        self._steps, self._slots, self._numbers, self._structure = [], [], [], b""
        for path in sorted(self.layers):
            layer: Any = self.layers[path]
            found: list[Slot] = []
            _find_owned(layer, self.name, "", found, self._steps)
            self._slots += [slot._replace(label=f"{path}|{slot.label}") for slot in sorted(found, key=_label)]
            self._numbers.append((layer.__dict__, path, None))
        self._seen = [Seen(-1, None, None, (), None)] * len(self._slots)


def adapter_tensors(layer: Any, name: str) -> list[tuple[str, Tensor]]:
    """The tensors that adapter `name` owns in one of PEFT's layers, keyed without the name, in a fixed order."""
    found: list[Slot] = []
    _find_owned(layer, name, "", found, [])
    return [(label, table[key]) for label, table, key in sorted(found, key=_label)]


_label = itemgetter(0)


def _find_owned(module: Any, name: str, prefix: str, found: list[Slot], steps: list[Step]) -> None:
    """PEFT keeps what adapters own in dicts by their names, the layer's own or those of layers inside it."""
    for key, child in module._modules.items():
        if child is None or (key in _NOT_ITS_OWN and not hasattr(type(child), "adapter_layer_names")):
            continue
        count, inner = len(found), child._modules
        if name in inner:
            steps.append(Step(inner, name, inner[name], len(inner)))
            _find_all(inner[name], f"{prefix}{key}.", found, steps)
        elif inner:
            _find_owned(child, name, f"{prefix}{key}.", found, steps)
        tables = (child._parameters, child._buffers)
        found.extend(Slot(prefix + key, table, name) for table in tables if table.get(name) is not None)
        if len(found) > count:
            steps.append(Step(module._modules, key, child, len(module._modules)))


def _find_all(module: Any, prefix: str, found: list[Slot], steps: list[Step]) -> None:
    for table in (module._parameters, module._buffers):
        if table:
            found.extend(Slot(prefix + key, table, key) for key, tensor in table.items() if tensor is not None)
            empty = [key for key, tensor in table.items() if tensor is None]
            steps.extend(Step(table, key, None, len(table)) for key in empty or [""])
    for key, child in module._modules.items():
        if child is not None:
            steps.append(Step(module._modules, key, child, len(module._modules)))
            _find_all(child, f"{prefix}{key}.", found, steps)


def _numbers(own: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """What acts in a layer beside its tensors: the scaling, and whether IA3 scales what comes in or what goes out."""
    scalings = own.get("scaling")
    scaling = scalings.get(name) if isinstance(scalings, dict) else None
    return scaling if isinstance(scaling, float) else repr(scaling), own.get("is_feedforward")


def _by_column(label: str) -> bool:
    """B is read column by column: so it lies in a batch's stacks, where its rows would have to be gathered."""
    return "lora_B." in label


def look_at(tensor: Tensor, by_column: bool) -> Seen:
    """How the tensor lies, with its memory if the values lie there one after another in the order in which they are read.

    The buffer keeps nothing alive, and may be read while a tensor is at hand that lies there.
    """
    stride = tensor.stride()
    in_order = tensor.mT if by_column and tensor.dim() == 2 else tensor
    buffer = None
    if tensor.is_cpu and in_order.is_contiguous() and tensor.numel():
        # numpy's view of it would take longer to make than most adapters' tensors take to read
        buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return Seen(tensor.data_ptr(), tensor.dtype, tensor.shape, stride, buffer)


def values(tensor: Tensor, by_column: bool = False) -> Any:
    """The tensor's content as a buffer, row by row (or column by column), without a copy where it lies so already."""
    import numpy as np

    if not tensor.is_cpu:
        if tensor.is_meta:
            return b"meta"
        tensor = tensor.cpu()
    if tensor.requires_grad:
        tensor = tensor.detach()
    try:
        array = tensor.numpy()
    except TypeError:  # numpy has no bfloat16 and no 8-bit floats
        array = tensor.view(_same_size(tensor)).numpy()
    if by_column and array.ndim == 2:
        array = array.T
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _same_size(tensor: Tensor) -> Any:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
