"""What a forward, or a forward and its backward, holds in memory at the most: the model runs on tensors without values.

torch's fake tensors have shapes, dtypes and lifetimes, and go through the same operators and the same autograd as real ones
on a CPU. `Ledger` keeps the bytes of every storage that comes and goes. Of layers that are alike only a few run, since every
further one adds the same: what it keeps for its backward, or its gradients.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adapterlab.quiet import quiet
from adapterlab.valueless import EveryLayer, plain_rows, take_values_away, unnoticed

# Layers of a kind that run in a training: two at the ends, which have other neighbours, and one that stands for the rest.
_FEW = 3

Bytes = Counter[str]  # by kind: activations, logits, gradients


@dataclass(frozen=True)
class Pass:
    """One pass through the model. rows × length: the ids' shape. autocast: the dtype of mixed precision, if any."""

    rows: int
    length: int
    training: bool = False
    checkpointing: bool = False
    autocast: torch.dtype | None = None


def compute_peak(model: Any, what: Pass) -> Bytes:
    """Bytes at the peak beyond what the model itself takes: activations (temporaries included), logits, gradients.

    model: on the meta device, with `requires_grad` as it will be; it is used up. Raises whatever the model or torch raise
    where shapes alone can't tell what is computed.
    """
    model.train(what.training)
    if what.training and what.checkpointing:
        with quiet():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Elsewhere nothing adds up; but the second layer has the first one's input beside it.
    few = _FEW if what.training else 2
    kinds = _kinds_of_layers(model)
    with _only(kinds, few):
        fake = FakeTensorMode()
        take_values_away(model, fake)
        run = _run(model, what, fake)
    for layers in kinds.values() if what.training else ():
        further = max(len(layers) - few, 0)
        if further:
            run.forward["activations"] += further * run.kept[id(layers[few - 1].layer)]
            run.backward["gradients"] += further * _bytes_to_learn(layers[few - 1].layer)
    return +max(run.forward, run.backward, key=Counter.total)


def _bytes_to_learn(layer: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad)


# ----- layers that are alike -----


@dataclass(frozen=True)
class _Place:
    parent: nn.ModuleList
    layer: nn.Module


def _kinds_of_layers(model: nn.Module) -> dict[Any, list[_Place]]:
    """The members of the model's outermost lists of layers, by list and by what they are made of."""
    kinds: dict[Any, list[_Place]] = {}
    inner: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inner:
            inner.update(id(one) for one in module.modules())
            for layer in module:
                kinds.setdefault((path, _makeup(layer)), []).append(_Place(module, layer))
    return kinds


def _makeup(layer: nn.Module) -> tuple[Any, ...]:
    parts = tuple((name, type(module)) for name, module in layer.named_modules())
    return parts + tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())


@contextlib.contextmanager
def _only(kinds: dict[Any, list[_Place]], few: int) -> Iterator[None]:
    """In the block the lists hold the first few layers of each kind."""
    lists = {id(place.parent): place.parent for places in kinds.values() for place in places}
    before = {key: dict(one._modules) for key, one in lists.items()}
    kept = {id(place.layer) for places in kinds.values() for place in places[:few]}
    try:
        for key, one in lists.items():
            here = [layer for layer in before[key].values() if id(layer) in kept]
            one._modules.clear()
            one._modules.update({str(i): layer for i, layer in enumerate(here)})
        yield
    finally:
        for key, one in lists.items():
            one._modules.clear()
            one._modules.update(before[key])


# ----- one run -----


class Ledger(TorchDispatchMode):
    """When each storage came and went, and its bytes. Those of `known` tensors are not counted."""

    def __init__(self, known: Sequence[Tensor], vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.clock = self.bytes = 0
        self.came: list[tuple[int, int, str]] = []  # clock, bytes, kind
        self.went: dict[int, int] = {}  # index in `came` → clock
        self.places: dict[int, int] = {tensor.untyped_storage()._cdata: -1 for tensor in known}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            half = [torch.empty_like(arg, dtype=torch.bfloat16) for arg in args[:2]]  # its fake takes no other
            result = torch.empty_like(operator(*half, *args[2:], **(kwargs or {})), dtype=args[0].dtype)
        else:
            result = operator(*args, **(kwargs or {}))
        self.clock += 1
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.places:
            logits = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
            self.places[key] = len(self.came)
            self.came.append((self.clock, storage.nbytes(), "logits" if logits else "activations"))
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._gone, key, storage.nbytes()).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.bytes -= size
        self.went[self.places.pop(key)] = self.clock

    def peak(self, start: int, end: int, gradients: Sequence[Tensor]) -> Bytes:
        """Bytes by kind at the moment between `start` and `end` when they were most. gradients: those that came of it."""
        kept = {self.places[g.untyped_storage()._cdata] for g in gradients}
        change = [0] * (self.clock + 2)
        for index, (clock, size, _) in enumerate(self.came):
            change[clock] += size
            change[self.went.get(index, self.clock) + 1] -= size
        total, most, when = 0, -1, 0
        for clock in range(end + 1):
            total += change[clock]
            if clock >= start and total > most:
                most, when = total, clock
        found: Bytes = Counter()
        for index, (clock, size, kind) in enumerate(self.came):
            if clock <= when <= self.went.get(index, self.clock):
                found["gradients" if index in kept else kind] += size
        return found


@dataclass
class _Run:
    """The bytes at the peak of the two parts of a training in which it can lie: up to the last layer's backward, and from
    the first layer's backward on. Between them layer after layer gives up activations and gets gradients, so that one of
    the ends is higher. Other passes have one part. kept: by a layer's id, what it kept for its backward."""

    forward: Bytes
    backward: Bytes
    kept: dict[int, int]


def _run(model: Any, what: Pass, fake: FakeTensorMode) -> _Run:
    known = [*model.parameters(), *model.buffers()]
    ledger = Ledger(known, int(model.config.get_text_config(decoder=True).vocab_size))
    watch = _Watch(ledger)
    hooks = watch.over(model)
    try:
        with fake, unnoticed(), plain_rows(), EveryLayer():
            inputs = _inputs(model, what)
            with ledger, torch.autocast("cpu", dtype=what.autocast, enabled=what.autocast is not None):
                if not what.training:
                    with torch.no_grad():
                        model(**inputs)
                    peak = ledger.peak(0, ledger.clock, ())
                    return _Run(peak, peak, {})
                loss = _loss(model, inputs, what)
            with ledger:
                loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        turn = watch.turns[1] if len(watch.turns) > 1 else ledger.clock
        first = watch.turns[-1] if len(watch.turns) > 1 else 0
        return _Run(ledger.peak(0, turn, gradients), ledger.peak(first, ledger.clock, gradients), watch.kept)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in model.parameters():
            parameter.grad = None


def _inputs(model: Any, what: Pass) -> dict[str, Any]:
    ids = torch.zeros((what.rows, what.length), dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if what.training:
        inputs["labels"] = torch.zeros_like(ids)
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :1]
    elif "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    return inputs


def _loss(model: Any, inputs: dict[str, Any], what: Pass) -> Any:
    output = model(**inputs)
    if what.autocast is not None:
        output.logits = output.logits.float()  # as accelerate gives them back
    return output.loss


class _Watch:
    """Follows the layers of a run. kept: by how much the bytes grew from one layer's end to the next's. turns: when each
    layer's backward began, the last layer's first."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.kept: dict[int, int] = {}
        self.turns: list[int] = []
        self._before = 0

    def over(self, model: nn.Module) -> list[Any]:
        places = [place for places in _kinds_of_layers(model).values() for place in places]
        return [place.layer.register_forward_hook(self._note) for place in places]

    def _note(self, layer: nn.Module, args: Any, output: Any) -> None:
        if id(layer) in self.kept:
            return  # checkpointing runs it once more, in its backward
        self.kept[id(layer)], self._before = self.ledger.bytes - self._before, self.ledger.bytes
        given = output[0] if isinstance(output, tuple) else output
        if isinstance(given, Tensor) and given.requires_grad:
            given.register_hook(lambda gradient: self.turns.append(self.ledger.clock))
