"""A linear layer for the few rows of a decoding step, by whichever product this machine does fastest.

x Wᵀ, (W xᵀ)ᵀ and x Wᵀ with W cut into one piece per thread are the same product. For one to some dozens of rows a
BLAS may take twice as long for one as for another (a single vector is often multiplied by one thread alone), and which
one depends on the processor and the shape: the first calls of each shape are timed, the rest follow the fastest. Now
and then a call is timed again, so that a bad moment of the machine is not believed for ever.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adapterlab.guards import put_back

if TYPE_CHECKING:
    from torch import Tensor

_FEW = range(1, 65)  # rows
_LARGE = 1 << 16  # weights below this many values are no work to speak of
_TRIES = 5  # timed calls of each product before one is chosen; the median counts
_KEPT = 25  # and of so many calls later on
_AGAIN = 32  # every so many calls of a layer one is timed

Product = Callable[["Tensor", "Tensor", "Tensor | None"], "Tensor"]  # x: (…, in), weight: (out, in), bias → (…, out)
usual: Product = nn.functional.linear


def turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = (weight @ x.reshape(-1, x.shape[-1]).T).T.contiguous()
    return _finished(y, x, bias)


def shared_out(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    count = _pieces(weight)
    rows = x.reshape(1, -1, x.shape[-1])
    y = torch.bmm(rows.expand(count, -1, -1), weight.view(count, -1, weight.shape[1]).mT)
    y = y.transpose(0, 1).reshape(rows.shape[1], -1)
    return _finished(y, x, bias)


def _finished(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], -1)


def _pieces(weight: Tensor) -> int:
    """One for each thread, or 1 if the weight can't be cut evenly."""
    threads = torch.get_num_threads()
    return threads if weight.shape[0] % threads == 0 and weight.is_contiguous() else 1


class Choice:
    """Which product to take for one shape: `best`, None until each was tried. `try_next` times them in turn."""

    def __init__(self, products: Iterable[Product]) -> None:
        self.times: dict[Product, deque[float]] = {product: deque(maxlen=_KEPT) for product in products}
        self.best: Product | None = None
        self._turn = itertools.cycle(self.times)

    def try_next(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = next(self._turn)
        started = time.perf_counter()
        y = product(x, weight, bias)
        self.times[product].append(time.perf_counter() - started)
        if all(len(times) >= _TRIES for times in self.times.values()):
            self.best = min(self.times, key=lambda p: statistics.median(self.times[p]))
        return y


def products_for(weight: Tensor) -> list[Product]:
    """Those that differ: a weight is shared out only evenly, and to more than one."""
    return [usual, turned, shared_out] if _pieces(weight) > 1 else [usual, turned]


_choices: dict[tuple[Any, ...], Choice] = {}


class FewRows:
    """Stands in for the `forward` of one `nn.Linear`: what that gives, to rounding."""

    def __init__(self, module: nn.Linear) -> None:
        self.parameters = module._parameters
        self.choices: dict[int, Choice] = {}  # by number of rows: those that this layer has met
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        weight: Any = self.parameters["weight"]
        bias: Any = self.parameters["bias"]
        rows = x.numel() // x.shape[-1]
        if rows not in _FEW or x.dtype != weight.dtype:
            return usual(x, weight, bias)
        choice = self.choices.get(rows)
        if choice is None:
            key = (rows, weight.shape, weight.dtype, torch.get_num_threads())
            choice = self.choices[rows] = _choices.setdefault(key, Choice(products_for(weight)))
        self.calls += 1
        product = choice.best if self.calls % _AGAIN else None
        return (product or choice.try_next)(x, weight, bias)


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Linear layers of `model` that lie on the CPU take the fastest product; afterwards they are as they were.

    Left alone: small layers, subclasses of `nn.Linear`, layers whose `forward` somebody has replaced, and half precision,
    where the products differ by enough to change a token, so that the clock would have a say in the text.
    """
    chosen = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.numel() >= _LARGE
    ]

    def undo() -> None:
        for module in chosen:
            module.__dict__.pop("forward", None)

    with put_back(undo):
        for module in chosen:
            module.forward = FewRows(module)  # type: ignore[method-assign, assignment]
        yield
