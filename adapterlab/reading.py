"""Reading the content of tensors fast: where an adapter's lie, and their values as bytes."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, eq, is_, itemgetter
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


class Lie(NamedTuple):
    """How tensors lie in memory, each a list over all of them: while it is equal, so are their buffers."""

    pointers: list[int]
    dtypes: list[Any]
    shapes: list[Any]
    strides: list[tuple[int, ...]]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Lie:
        import torch

        whole = torch.Tensor
        return cls(
            list(map(whole.data_ptr, tensors)),
            list(map(attrgetter("dtype"), tensors)),
            list(map(attrgetter("shape"), tensors)),
            list(map(whole.stride, tensors)),
        )


class AdapterReader:
    """Reads one adapter's weights again and again.

    Between two readings it remembers where they lie, which takes longer to find out than reading them, and never what is
    in them. Every step to them is looked at anew, so that another module, parameter or memory is found at once. `map`
    over builtins does it: at thousands of tensors, Python's own loops took as long as the reading.
    """

    def __init__(self, layers: Mapping[str, nn.Module], name: str) -> None:
        self.layers, self.name = layers, name
        self._steps: list[Sequence[Any]] = []  # Step by Step, turned into one sequence for each field
        self._slots: list[Sequence[Any]] = []  # likewise
        self._known: tuple[Lie, list[Any]] | None = None  # how the tensors lay, and what acts beside them
        self._buffers: list[Any] = []  # the tensors' memory; None where the values don't lie there as they are read
        self._structure = b""

    def digest(self) -> str:
        """Hex digest of the adapter's tensors, scalings and kinds of layer as they are now; see `adapter_digest`."""
        import xxhash

        if not self._stands():
            self._find()
        labels, tables, keys = self._slots
        tensors = list(map(dict.__getitem__, tables, keys))
        known = Lie.of(tensors), [_numbers(layer.__dict__, self.name) for layer in self.layers.values()]
        if known != self._known:
            self._buffers = [memory(tensor, _by_column(label)) for tensor, label in zip(tensors, labels)]
            self._known, self._structure = known, self._describe(*known)
        content = xxhash.xxh3_128()
        for place, buffer in enumerate(self._buffers):
            content.update(values(tensors[place], _by_column(labels[place])) if buffer is None else buffer)
        total = hashlib.blake2b(self._structure, digest_size=16)
        total.update(content.digest())
        return total.hexdigest()

    def nbytes(self) -> int:
        """Bytes of the tensors that `digest` read last, each counted once."""
        tensors = map(dict.__getitem__, *self._slots[1:])
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())

    def _stands(self) -> bool:
        """Whether every step leads where it led, and to a tensor."""
        if not self._slots:
            return False
        tables, keys, found, entries = self._steps
        return (
            all(map(is_, map(dict.get, tables, keys), found))
            and all(map(eq, map(len, tables), entries))
            and not any(map(is_, map(dict.get, *self._slots[1:]), repeat(None)))
        )

    def _describe(self, lie: Lie, numbers: list[Any]) -> bytes:
        """Names, dtypes, shapes and numbers, as text."""
        texts = [
            f"{label}|{dtype}|{tuple(shape)}" for label, dtype, shape in zip(self._slots[0], lie.dtypes, lie.shapes)
        ]
        texts += [f"{path}|{number!r}" for path, number in zip(self.layers, numbers)]
        return "\n".join(sorted(texts)).encode()

    def _find(self) -> None:
        slots: list[Slot] = []
        steps: list[Step] = []
        for path in sorted(self.layers):
            found: list[Slot] = []
            _find_owned(self.layers[path], self.name, "", found, steps)
            slots += [slot._replace(label=f"{path}|{slot.label}") for slot in sorted(found, key=_label)]
        self._steps = list(zip(*steps)) or [()] * len(Step._fields)
        self._slots = list(zip(*slots)) or [()] * len(Slot._fields)
        self._known = None


def adapter_tensors(layers: Iterable[Any], name: str) -> list[tuple[str, Tensor]]:
    """The tensors that adapter `name` owns in PEFT's layers, keyed without the name, layer by layer in a fixed order.

    Each is given once: tokens trained on tied embeddings, Lily's A and RandLora's bases stand in several layers.
    """
    owned: dict[int, tuple[str, Tensor]] = {}
    for layer in layers:
        found: list[Slot] = []
        _find_owned(layer, name, "", found, [])
        for label, table, key in sorted(found, key=_label):
            owned.setdefault(id(table[key]), (label, table[key]))
    return list(owned.values())


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


def _numbers(own: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """What acts in a layer beside its tensors: the scaling, and whether IA3 scales what comes in or what goes out; for
    methods that the equation does not know, whatever the layer keeps for the adapter in plain dicts. Then the same of
    PEFT's layers within: which tokens are trained, and the scaling of a second parameter's."""
    modules = own["_modules"]
    numbers: tuple[Any, ...]
    if "lora_A" not in modules and "ia3_l" not in modules:
        kept = [(k, v[name]) for k, v in sorted(own.items()) if type(v) is dict and k[0] != "_" and name in v]
        numbers = tuple((key, content(value)) for key, value in kept)
    else:
        scalings = own.get("scaling")
        scaling = scalings.get(name) if isinstance(scalings, dict) else None
        numbers = scaling if isinstance(scaling, float) else repr(scaling), own.get("is_feedforward")
    inner = modules.get("base_layer") or modules.get("token_adapter")
    return (*numbers, _numbers(inner.__dict__, name)) if hasattr(type(inner), "adapter_layer_names") else numbers


def content(value: Any) -> str:
    """A tensor by what is in it, anything else as it is written."""
    import torch
    import xxhash

    return xxhash.xxh3_128_hexdigest(values(value)) if isinstance(value, torch.Tensor) else repr(value)


def _by_column(label: str) -> bool:
    """B is read column by column: so it lies in a batch's stacks, where its rows would have to be gathered."""
    return "lora_B." in label


def memory(tensor: Tensor, by_column: bool) -> Any:
    """The tensor's memory as a buffer, if the values lie there one after another in the order in which they are read.

    The buffer keeps nothing alive, and may be read while a tensor is at hand that lies there.
    """
    in_order = tensor.mT if by_column and tensor.dim() == 2 else tensor
    if not (tensor.is_cpu and in_order.is_contiguous() and tensor.numel()):
        return None
    # numpy's view of it would take longer to make than most adapters' tensors take to read
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


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
