"""What an adapter does to one layer's weight, method by method: a `Row` of numbers.

LoRA, rsLoRA, AdaLoRA, LoHa, LoKr: from the factors alone (factors.py). IA3, DoRA, whole modules and trained tokens have
formulas of their own. Only for what remains, such as OFT, is ΔW formed: one layer at a time, by PEFT's own merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.quiet import warnings_ignored

if TYPE_CHECKING:
    from torch import Tensor

DORA_NOTE = "singular values are those of DoRA's low-rank part, scaling · BA"
FORMED_NOTE = "no factors: ΔW was formed by PEFT's merge"
UNREAD_NOTE = "W can't be read (offloaded, or in a form that PEFT does not dequantise)"
MODULE_NOTE = "the whole module, saved minus original"
TOKENS_NOTE = "rows of the embedding, trained minus original"
EXPERTS_NOTE = "all experts together: no single matrix"
MOST_FORMED = 1024  # singular values that a formed ΔW may have: their time grows with the cube
_ROUNDING = 1e-12  # of ‖W‖: what float64 leaves of a ΔW that is 0


@dataclass
class Row:
    """What is told of one adapted layer; None is missing."""

    norm: float | None = None
    relative_norm: float | None = None
    effective_rank: float | None = None
    rank: int | None = None
    singular_values: tuple[float, ...] = ()
    scale_min: float | None = None
    scale_mean: float | None = None
    scale_max: float | None = None
    note: str = ""

    def against(self, base: float | None) -> Row:
        """The same row with the norm measured against ‖W‖; None where W can't be read."""
        if base is None:
            self.note = "; ".join(filter(None, (self.note, UNREAD_NOTE)))
        elif base and self.norm is not None:
            self.relative_norm = self.norm / base
        return self

    def having(self, values: Tensor) -> Row:
        """The same row with these singular values."""
        self.singular_values = tuple(values.tolist())
        self.rank, self.effective_rank = len(values), effective_rank(values)
        return self


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of σ² / Σσ² (0 where all are 0): over so many directions ΔW's energy would spread evenly."""
    import torch

    energy = values.square()
    total = energy.sum()
    return 0.0 if not total else float(torch.special.entr(energy / total).sum().exp())


def measure(layer: Any, name: str, path: str, values: Tensor | None) -> Row:
    """One layer's row. values: the singular values of ΔW, or of DoRA's low-rank part, where there are factors."""
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    from adapterlab.equation import is_dora

    why = change_obstacle(layer, name)
    if why is not None:
        raise AdapterLabError(f"{name!r} has no ΔW to show at {path}: {why}")
    if isinstance(layer, ModulesToSaveWrapper):
        return _whole_module(layer, name)
    if isinstance(layer, TrainableTokensWrapper):
        return _tokens(layer.token_adapter, name)
    if isinstance(layer, TrainableTokensLayer):
        return _tokens(layer, name)
    if isinstance(layer, ParamWrapper):
        return _experts(layer, name)
    if isinstance(layer, IA3Layer):
        return _scales(layer, name)
    if values is None:
        return _formed(layer, name, path)
    if is_dora(layer, name):
        return _dora(layer, name, path).having(values)
    return Row(math.hypot(*values.tolist())).having(values).against(_base_norm(layer.get_base_layer()))


def change_obstacle(layer: Any, name: str) -> str | None:
    """Why the ΔW of one of PEFT's layers can be had in no way, or None if it can. Reads no weights."""
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from torch import nn

    from adapterlab.base_weights import can_be_read
    from adapterlab.equation import is_dora
    from adapterlab.factors import has_cores
    from adapterlab.methods import method_label, never_merged

    if isinstance(layer, (AuxiliaryTrainingWrapper, TrainableTokensLayer, ParamWrapper, IA3Layer)):
        return None
    if is_dora(layer, name):
        return None if can_be_read(layer.get_base_layer()) else _needs_weight("DoRA")
    if has_cores(layer, name):
        return None
    base = layer.get_base_layer()
    method = type(layer).__module__.split(".")[-2]
    weight = getattr(base, "weight", None)
    if type(weight) is not nn.Parameter or weight.is_meta:
        return _needs_weight(method_label(method.upper()))
    if hasattr(layer, "beft_bias") and base.bias is None:
        return "PEFT can't merge BEFT into a layer that has no bias."
    never = never_merged(method.upper())
    return None if never is None else f"{never}."


def _base_norm(module: Any) -> float | None:
    from adapterlab.base_weights import base_norms

    norm = base_norms(module)
    return None if norm is None else float(norm)


def _scales(layer: Any, name: str) -> Row:
    """IA3: ΔW = W ∘ (s − 1) by rows or columns, so ‖ΔW‖² = Σ (s_i − 1)² ‖W_i‖²."""
    from adapterlab.base_weights import base_norms
    from adapterlab.factors import wide

    s = wide(layer.ia3_l[name]).flatten()
    axis = int(bool(layer.is_feedforward) != bool(getattr(layer, "fan_in_fan_out", False)))
    norms = base_norms(layer.get_base_layer(), axis)
    row = Row(scale_min=float(s.min()), scale_mean=float(s.mean()), scale_max=float(s.max()))
    if norms is None:  # without W there is no ΔW
        return row.against(None)
    row.norm = float(((s - 1) * norms).norm())
    return row.against(float(norms.norm()))


def _dora(layer: Any, name: str, path: str) -> Row:
    """DoRA: ΔW = s ∘ (W + P) − W by rows, with P = scaling · BA and s = magnitude / ‖W + P‖. Of each row,

    ‖ΔW‖² = (s − 1)² ‖W‖² + 2 s (s − 1) ⟨W, P⟩ + s² ‖P‖²,   ⟨W, P⟩ = scaling · (W Aᵀ) · B,   ‖P‖² = scaling² · B (A Aᵀ) · B
    """
    import torch

    from adapterlab.base_weights import read_weight
    from adapterlab.equation import factors
    from adapterlab.factors import wide

    W = read_weight(layer.get_base_layer())
    if W is None:
        raise AdapterLabError(f"{name!r} has no ΔW to show at {path}: {_needs_weight('DoRA')}")
    found = factors(layer, name)
    assert found[0] is not None  # `is_dora` holds
    assert found[1] is not None
    W = (W.T if layer.fan_in_fan_out else W).to(torch.promote_types(found[0].dtype, torch.float32))
    A, B, scaling = wide(found[0]), wide(found[1]), layer.scaling[name]
    norms = wide(torch.linalg.norm(W, dim=1))  # the way PEFT makes a magnitude: a fresh adapter's s is 1 to the bit
    inner = scaling * (wide(W @ found[0].detach().to(W).T) * B).sum(1)
    squares = scaling**2 * ((B @ (A @ A.T)) * B).sum(1)
    s = wide(layer.lora_magnitude_vector[name].weight) / (norms.square() + 2 * inner + squares).sqrt()
    total = ((s - 1) * norms).square() + 2 * s * (s - 1) * inner + s.square() * squares
    return Row(float(total.sum().clamp_min(0).sqrt()), note=DORA_NOTE).against(float(norms.norm()))


def _whole_module(layer: Any, name: str) -> Row:
    """modules_to_save: the saved module's weights minus the original's."""
    from adapterlab.base_weights import compute_distance, compute_norms

    saved, original = layer.modules_to_save[name], layer.original_module
    pairs = {key: (its, original.get_parameter(key)) for key, its in saved.named_parameters()}
    distances = {key: compute_distance(*pair) for key, pair in pairs.items()}
    base = math.hypot(*(float(compute_norms(its).norm()) for key, (_, its) in pairs.items() if not _is_bias(key)))
    return _of_weights(distances, MODULE_NOTE).against(base)


def _of_weights(distances: dict[str, float], note: str) -> Row:
    """The row of several parameters that are replaced, by name; biases are told apart."""
    if any(distance for key, distance in distances.items() if _is_bias(key)):
        note += "; biases change too, which ΔW leaves out"
    return Row(math.hypot(*(distance for key, distance in distances.items() if not _is_bias(key))), note=note)


def _is_bias(key: str) -> bool:
    return key.rpartition(".")[2] == "bias"


def _tokens(layer: Any, name: str) -> Row:
    """Trained tokens: their rows minus the embedding's own; against the whole table."""
    from adapterlab.base_weights import compute_distance

    rows = layer.trainable_tokens_delta[name]
    originals = layer.get_base_layer().weight[layer.token_indices[name]]
    return Row(compute_distance(rows, originals), note=TOKENS_NOTE).against(_base_norm(layer.get_base_layer()))


def _experts(layer: Any, name: str) -> Row:
    """LoRA on bare parameters (target_parameters), one matrix per expert; several parameters of a module together."""
    from peft.tuners.lora.layer import ParamWrapper

    from adapterlab.base_weights import compute_norms, is_number
    from adapterlab.factors import wide

    norms: list[float] = []
    bases: list[float] | None = []
    while isinstance(layer, ParamWrapper):
        if name in layer.lora_A:
            A, B = wide(layer.lora_A[name].weight), wide(layer.lora_B[name].weight)
            A = A.view(layer.num_experts, -1, A.shape[-1])  # (experts, r, in)
            B = B.reshape(len(B), -1, layer.num_experts).permute(2, 0, 1)  # (experts, out, r)
            square = ((A @ A.mT) * (B.mT @ B)).sum()
            norms.append(abs(layer.scaling[name]) * float(square.clamp_min(0).sqrt()))
            W = layer.get_param()
            bases = None if bases is None or not is_number(W) else [*bases, float(compute_norms(W).norm())]
        layer = layer.base_layer
    return Row(math.hypot(*norms), note=EXPERTS_NOTE).against(None if bases is None else math.hypot(*bases))


def _formed(layer: Any, name: str, path: str) -> Row:
    """Any other method: PEFT merges the adapter into a float64 copy of the layer, which is dropped."""
    import copy

    import torch

    with warnings_ignored():  # PEFT's remarks on merging: this copy is never run
        try:
            twin = copy.deepcopy(layer).double()
            before = {key: p.detach().clone() for key, p in twin.get_base_layer().named_parameters()}
            twin.merge(adapter_names=[name])
        except Exception as error:  # PEFT's own verdict, in its words
            words = " ".join(str(error).split()) or type(error).__name__
            raise AdapterLabError(
                f"{name!r} has no ΔW to show at {path}: PEFT can't merge it there: {words}"
            ) from error
    after = dict(twin.get_base_layer().named_parameters())
    deltas = {key: after[key].detach() - its for key, its in before.items()}
    base = math.hypot(*(float(its.norm()) for key, its in before.items() if not _is_bias(key)))
    row = _of_weights({key: float(delta.norm()) for key, delta in deltas.items()}, FORMED_NOTE)
    if row.norm is not None and row.norm <= _ROUNDING * base:  # reflections that cancel leave some 1e-16
        row.norm, deltas = 0.0, {key: torch.zeros_like(delta) for key, delta in deltas.items()}
    matrices = [delta for delta in deltas.values() if delta.dim() == 2 and bool(delta.isfinite().all())]
    if len(matrices) == 1 and min(matrices[0].shape) <= MOST_FORMED:
        row = row.having(torch.linalg.svdvals(matrices[0]))
    return row.against(base)


def _needs_weight(method: str) -> str:
    return (
        f"with {method} it depends on the layer's weight, which can't be read here (offloaded or quantised). Load the base "
        "whole and in plain precision."
    )
