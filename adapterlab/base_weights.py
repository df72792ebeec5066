"""The base's weights as ΔW is measured against them: read as numbers, one layer at a time, and their norms."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

_PIECE = 1 << 22  # values that are widened at a time
_SAMPLE = 64  # values of a weight that tell whether it is still the same

# Norms of plain weights by axis (None: of the whole), and what the weight was like then, by the layer. They go with it.
_known: weakref.WeakKeyDictionary[nn.Module, dict[int | None, tuple[Any, Tensor]]] = weakref.WeakKeyDictionary()


def can_be_read(module: Any) -> bool:
    """Whether the layer's weight is here, in a form that PEFT may dequantise."""
    from torch import nn

    own = module._parameters.get("weight")
    here = hasattr(module, "W_q") or isinstance(getattr(module, "weight", None), nn.Parameter)
    return here and not (own is not None and own.is_meta)


def read_weight(module: Any) -> Tensor | None:
    """The layer's weight as floating-point numbers in its own layout, dequantised by PEFT's own function.

    None where it can't be read: offloaded by accelerate, or in a form that PEFT does not dequantise. `module` is left as it
    is.
    """
    from peft.utils.integrations import dequantize_module_weight

    if not can_be_read(module):
        return None
    own = module._parameters.get("weight")
    state = getattr(module, "state", None)
    scales = getattr(state, "SCB", None)
    try:
        weight: Any = dequantize_module_weight(module).detach()
    finally:
        if own is not None:  # on a CPU, PEFT has put another in the place of an 8-bit one
            module._parameters["weight"] = own
        if state is not None and hasattr(state, "SCB"):
            state.SCB = scales
    return weight if is_number(weight) else None


def is_number(weight: Tensor) -> bool:
    """Whether the values are here and mean what they say: 8-bit floats and integers want scales that stand elsewhere."""
    import torch

    plain = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return weight.dtype in plain and not weight.is_meta


def compute_norms(weight: Tensor, axis: int = 0) -> Tensor:
    """The norm of each slice along `axis` (0: rows), float64 on the CPU; of slices of some thousand values float32 sums are
    right to 1e-7. No copy of a float32 weight is made, and of others a piece at a time."""
    import torch

    others = [dim for dim in range(weight.dim()) if dim != axis]
    if not others:
        return weight.detach().abs().cpu().double()
    pieces = [torch.linalg.vector_norm(piece, dim=others).cpu().double() for piece in _widened(weight)]
    return torch.cat(pieces) if axis == 0 else torch.stack(pieces).square_().sum(0).sqrt_()


def _widened(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in float32 or wider: itself, or a few rows at a time."""
    import torch

    tensor = tensor.detach()
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.dtype == dtype:
        yield tensor
        return
    rows = max(1, _PIECE * len(tensor) // max(1, tensor.numel()))
    for piece in tensor.split(rows):
        yield piece.to(dtype)


def compute_distance(tensor: Tensor, other: Tensor) -> float:
    """‖tensor − other‖ in float64, a few rows at a time."""
    import math

    rows = max(1, _PIECE * len(tensor) // max(1, tensor.numel())) if tensor.dim() else 1
    pairs = zip(tensor.detach().split(rows), other.detach().split(rows)) if tensor.dim() else [(tensor, other)]
    return math.hypot(*(float((mine.cpu().double() - its.cpu().double()).norm()) for mine, its in pairs))


def base_norms(module: Any, axis: int | None = None) -> Tensor | None:
    """`compute_norms` of the layer's weight, or the norm of all of it: shape (); None where it can't be read.

    Those of plain weights are kept as long as the weight lies where it lay, torch's version counter stands still and 64 of
    its values, spread over it, are the same. That tells a merge, an optimizer's step and an exchanged tensor; a single value
    that is edited through `.data` may go unseen. To read every byte for a digest would take as long as the norms.
    """
    mark = _mark(module)
    known = _known.get(module, {}).get(axis)
    if mark is not None and known is not None and known[0] == mark:
        return known[1]
    weight = read_weight(module)
    if weight is None:
        return None
    norms = compute_norms(weight).norm() if axis is None else compute_norms(weight, axis)
    if mark is not None:
        _known.setdefault(module, {})[axis] = (mark, norms)
    return norms


def _mark(module: Any) -> Any:
    """What stays the same as long as the weight does; None for weights that are read anew each time."""
    import torch

    weight = module._parameters.get("weight")
    if type(weight) is not torch.nn.Parameter or not weight.is_contiguous() or weight.is_inference() or weight.is_meta:
        return None
    step = max(1, weight.numel() // _SAMPLE) | 1  # odd, so that not all samples lie in one column
    sample = weight.detach().view(-1)[::step].tolist()
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape, sample
