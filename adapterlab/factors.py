"""ΔW = B diag(e) A from its thin factors: singular values, directions and norms, without ΔW itself.

With QR, B = P R and Aᵀ = Q S, so ΔW = P (R diag(e) Sᵀ) Qᵀ, and the r × r matrix in the middle, the core, has the singular
values of ΔW. In float64 they are right to 1e-15 of the largest. Gram matrices take as long for usual ranks and lose what
lies below 1e-8 of the largest, since they hold squares. A Kronecker product (LoKr) has two cores, and its singular values
are the products of theirs.

Everything here runs on the CPU: factors are thin, small QRs are slow on a GPU, and not every device has float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from adapterlab.equation import Term

TOLERANCE = 1e-5  # of the largest singular value: smaller ones are no directions but rounding of float32 factors


@dataclass(frozen=True)
class Cores:
    """Small float64 matrices whose singular values, multiplied each with each and with `scale`, are those of ΔW.

    count: how many of them the factors allow; the others are zero and left out.
    """

    matrices: tuple[Tensor, ...]
    count: int
    scale: float = 1.0


def wide(tensor: Tensor) -> Tensor:
    """The values in float64 on the CPU."""
    return tensor.detach().cpu().double()


def low_rank(layer: Any, name: str) -> Term | None:
    """A: (r, in), B: (out, r) and e of adapter `name` in one of PEFT's layers; None where it has no such factors.

    DoRA: those of BA, without its magnitude. LoHa: (w1a w1b) ∘ (w2a w2b) has factors of r² columns, made here, as long as
    they are fewer than the layer's own.
    """
    from adapterlab.equation import Term, blend_obstacle, compute_term, factors, is_dora

    if is_dora(layer, name):
        return Term(*factors(layer, name), layer.scaling[name])
    if blend_obstacle(layer, name) is None:
        term = compute_term(layer, name, 1.0)
        return None if term.A is None else term
    if _is_thin_hadamard(layer, name):
        w1a, w1b, w2a, w2b = (wide(getattr(layer, f"hada_{part}")[name]) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        B = (w1a[:, :, None] * w2a[:, None, :]).flatten(1)
        A = (w1b[:, None, :] * w2b[None, :, :]).flatten(0, 1)
        return Term(A, B, layer.scaling[name])
    return None


def _is_thin_hadamard(layer: Any, name: str) -> bool:
    if name not in getattr(layer, "hada_w1_a", ()) or name in layer.hada_t1:
        return False
    w1a, w1b, w2b = (getattr(layer, f"hada_{part}")[name] for part in ("w1_a", "w1_b", "w2_b"))
    return bool(len(w1b) * len(w2b) < min(len(w1a), w1b.shape[1]))


def _is_kronecker(layer: Any, name: str) -> bool:
    return hasattr(layer, "lokr_w1") and name in layer.scaling  # a whole attention's `scaling` is a number


def has_cores(layer: Any, name: str) -> bool:
    """Whether `cores_of` finds any, told from types and shapes alone."""
    from adapterlab.equation import blend_obstacle, factors, is_dora

    if _is_kronecker(layer, name):
        parts = [getattr(layer, f"lokr_{part}") for part in ("w1", "w2")]
        return name not in layer.lokr_t2 and all(name not in part or part[name].dim() == 2 for part in parts)
    if is_dora(layer, name):
        return True
    if blend_obstacle(layer, name) is None:
        return factors(layer, name)[0] is not None
    return _is_thin_hadamard(layer, name)


def cores_of(layer: Any, name: str) -> Cores | None:
    """What the singular values of ΔW can be read from; None where there are no factors."""
    if _is_kronecker(layer, name):
        return _kronecker(layer, name)
    term = low_rank(layer, name)
    if term is None:
        return None
    core = _core(term)
    return Cores((core,), min(_kept(term), *core.shape))


def _kept(term: Term) -> int:
    """The rank; of AdaLoRA's triplets those that are not pruned, or all as long as every λ is zero, as in a fresh one."""
    assert term.A is not None  # the caller asked
    e: Any = term.e
    alive = len(term.A) if isinstance(e, float) else int((e != 0).sum())
    return alive or len(term.A)


def _core(term: Term) -> Tensor:
    import torch

    assert term.A is not None  # the caller asked
    assert term.B is not None
    R, S = (torch.linalg.qr(wide(tall), mode="r").R for tall in (term.B, term.A.T))
    return (R * _scale(term)) @ S.T


def _scale(term: Term) -> Any:
    return term.e if isinstance(term.e, float) else wide(term.e)


def _kronecker(layer: Any, name: str) -> Cores | None:
    from adapterlab.equation import Term

    if name in layer.lokr_t2:
        return None  # a convolution
    matrices = []
    for part in ("w1", "w2"):
        whole = getattr(layer, f"lokr_{part}")
        if name in whole:
            matrices.append(wide(whole[name]))
        else:
            B, A = (getattr(layer, f"lokr_{part}_{side}")[name] for side in "ab")
            matrices.append(_core(Term(A, B)))
    if any(matrix.dim() != 2 for matrix in matrices):
        return None  # a convolution
    count = min(matrices[0].shape) * min(matrices[1].shape)
    return Cores(tuple(matrices), count, layer.scaling[name])


def singular_values(found: Sequence[Cores]) -> list[Tensor]:
    """The singular values of each ΔW, largest first, float64: shape (count,). Cores of one shape go in one batch.

    NaN where a core is not finite.
    """
    import torch

    matrices = [matrix for cores in found for matrix in cores.matrices]
    values: dict[int, Tensor] = {}
    alike: dict[Any, list[Tensor]] = {}
    for matrix in matrices:
        if bool(matrix.isfinite().all()):
            alike.setdefault(matrix.shape, []).append(matrix)
        else:
            values[id(matrix)] = matrix.new_full((min(matrix.shape),), torch.nan)
    for batch in alike.values():
        for matrix, own in zip(batch, torch.linalg.svdvals(torch.stack(batch))):
            values[id(matrix)] = own
    made = []
    for cores in found:
        each = values[id(cores.matrices[0])]
        for matrix in cores.matrices[1:]:
            each = torch.outer(each, values[id(matrix)]).flatten().sort(descending=True).values
        made.append(abs(cores.scale) * each[: cores.count])
    return made


def directions(term: Term) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of ΔW's column space and row space, (out, k) and (in, k), float64.

    k: how many singular values are above `TOLERANCE` of the largest; 0 where ΔW = 0.
    """
    import torch

    assert term.A is not None  # the caller asked
    assert term.B is not None
    P, R = torch.linalg.qr(wide(term.B))
    Q, S = torch.linalg.qr(wide(term.A.T))
    U, values, Vh = torch.linalg.svd((R * _scale(term)) @ S.T, full_matrices=False)
    k = int((values > TOLERANCE * values[0]).sum()) if len(values) else 0
    return P @ U[:, :k], Q @ Vh[:k].T
