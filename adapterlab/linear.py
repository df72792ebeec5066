"""A linear layer for the few rows of a decoding step, by whichever product this machine does fastest.

x Wᵀ, (W xᵀ)ᵀ and x Wᵀ with W cut into one piece per thread are the same product. For one to some dozens of rows a
BLAS may take twice as long for one as for another (a single vector is often multiplied by one thread alone), and which
one depends on the processor and the shape: the first calls of each shape are timed, the rest follow the fastest.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

_FEW = range(1, 65)  # rows
_LARGE = 1 << 16  # weights below this many values are no work to speak of
_TRIES = 5  # timed calls of each product; their median counts


Product = Callable[["Tensor", "Tensor"], "Tensor"]


def usual(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def turned(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ x.T).T.contiguous()


def shared_out(x: Tensor, weight: Tensor) -> Tensor:
    pieces = weight.view(torch.get_num_threads(), -1, weight.shape[1])
    return torch.bmm(x.expand(len(pieces), -1, -1), pieces.mT).transpose(0, 1).reshape(len(x), -1)


class Choice:
    """Which product to take for one shape; takes them in turn and times them until it knows."""

    def __init__(self, products: Iterable[Product]) -> None:
        self.times: dict[Product, list[float]] = {product: [] for product in products}
        self.best: Product | None = None

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.best is not None:
            return self.best(x, weight)
        product = min(self.times, key=lambda p: len(self.times[p]))
        started = time.perf_counter()
        y = product(x, weight)
        self.times[product].append(time.perf_counter() - started)
        if all(len(times) >= _TRIES for times in self.times.values()):
            self.best = min(self.times, key=lambda p: statistics.median(self.times[p]))
        return y


def products_for(weight: Tensor) -> list[Product]:
    """Those that can be: a weight is shared out only evenly, and to more than one."""
    threads = torch.get_num_threads()
    even = threads > 1 and len(weight) % threads == 0 and weight.is_contiguous()
    return [usual, turned, shared_out] if even else [usual, turned]


_choices: dict[tuple[Any, ...], Choice] = {}


def forward(module: nn.Linear, x: Tensor) -> Tensor:
    """What `module.forward(x)` gives, to rounding."""
    weight = module.weight
    rows = x.numel() // x.shape[-1]
    if rows not in _FEW or x.dtype != weight.dtype:
        return nn.functional.linear(x, weight, module.bias)
    key = (rows, weight.shape, weight.dtype, torch.get_num_threads())
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = Choice(products_for(weight))
    y = choice.multiply(x.reshape(rows, -1), weight)
    if module.bias is not None:
        y += module.bias
    return y.view(*x.shape[:-1], -1)


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Linear layers of `model` that lie on the CPU take the fastest product; afterwards they are as they were.

    Left alone: small layers, subclasses of `nn.Linear`, and layers whose `forward` somebody has replaced.
    """
    chosen = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.numel() >= _LARGE
    ]
    for module in chosen:
        module.forward = functools.partial(forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in chosen:
            del module.__dict__["forward"]
