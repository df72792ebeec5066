"""A model on tensors without values: torch's fake tensors, which have shapes, dtypes and lifetimes, and what makes
transformers' models and bitsandbytes' layers run on them."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from adapterlab.blueprint import bits_of
from adapterlab.quiet import quiet

_PATCHING = threading.RLock()
# What looks for padding or for several texts in a row, by its first argument, and whether it decides on something else too.
_LOOKS = {
    "find_packed_sequence_indices": False,
    "_ignore_causal_mask_sdpa": True,
    "_ignore_bidirectional_mask_sdpa": True,
}


def take_values_away(model: nn.Module, fake: FakeTensorMode) -> None:
    """Put fake tensors in the place of the model's, in place; bitsandbytes' layers get a forward that needs no values."""
    made: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            plain = torch.empty(tensor.shape, dtype=tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(plain, requires_grad=tensor.requires_grad) if parameter else plain
        return made[id(tensor)]

    with fake:
        for module in model.modules():
            for table in (module._parameters, module._buffers, module.__dict__):
                here: dict[str, Any] = {key: empty(value) for key, value in table.items() if isinstance(value, Tensor)}
                table.update(here)
            if bits_of(module):
                module.forward = _Dequantising(module)


class _Dequantising:
    """The forward of a quantised layer, as far as memory goes."""

    def __init__(self, layer: Any) -> None:
        self.dtype = layer.compute_dtype if bits_of(layer) == 4 else None
        self.keeps = bits_of(layer) == 8  # bitsandbytes' 8-bit backward has its input at hand, needed or not
        self.shape, self.bias = (layer.out_features, layer.in_features), layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        inner = x if self.dtype is None else x.to(self.dtype)
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        y: Tensor = _Product.apply(inner, bias, self.shape, self.keeps)
        return y.to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ with W made anew in the forward and in the backward, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], keeps: bool) -> Tensor:
        ctx.shape, ctx.x = shape, x if keeps else None
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        return grad @ grad.new_empty(ctx.shape), None, None, None


class EveryLayer(TorchFunctionMode):
    """In the block no layer is dropped by chance, as OPT's and BART's may be in training: the number drawn has a value."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.rand and args == ([],):
            return torch.tensor(1.0)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def plain_rows() -> Iterator[None]:
    """In the block, transformers takes rows without values for one text each, without padding, as it finds of real ones by
    looking. Unknown, they would get masks for both, and with them slower kernels. Real rows are looked at."""
    from transformers import masking_utils

    looks = {name: getattr(masking_utils, name) for name in _LOOKS if hasattr(masking_utils, name)}
    with _PATCHING:
        try:
            for name, look in looks.items():
                setattr(masking_utils, name, functools.partial(_unless_fake, look, _LOOKS[name]))
            yield
        finally:
            for name, look in looks.items():
                setattr(masking_utils, name, look)


def _unless_fake(look: Callable[..., Any], within: bool, tensor: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(tensor, FakeTensor):
        return look(tensor, *args, **kwargs)
    return look(None, *args, **kwargs) if within else None


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """In the block torch does not print what fake tensors can't do: it is raised too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    try:
        logger.disabled = True
        with quiet():
            yield
    finally:
        logger.disabled = before
