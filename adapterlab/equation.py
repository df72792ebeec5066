"""One adapter's part of one layer, and a layer that blends several.

LoRA (Hu et al. 2021), AdaLoRA (Zhang et al. 2023) and IA3 (Liu et al. 2022) are one equation:

    y = s_out ⊙ [ W (s_in ⊙ x) + Σ ((x Aᵀ) ⊙ e) Bᵀ ] + c

with e = m·scaling for LoRA, m·λ·alpha/(ranknum + 1e-5) for AdaLoRA, and s = 1 + m(s − 1) for IA3, where m is the
multiplier. The bias inside W's module is scaled by s_out as PEFT's IA3 does; `lora_bias` adds m·scaling·b_B outside.
DoRA (Liu et al. 2024) is LoRA with s_out = magnitude / ‖W + ΔW‖, row by row; it leaves the module's bias b alone, so its c
is b − s_out ⊙ b. It can't be scaled or blended.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from adapterlab.methods import method_label

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Term:
    """What one adapter adds to one layer. A: (r, in), B: (out, r), both views of the parameters; e: a number or (r,)."""

    A: Tensor | None = None
    B: Tensor | None = None
    e: Tensor | float = 1.0
    s_in: Tensor | None = None
    s_out: Tensor | None = None
    bias: Tensor | None = None


def blend_obstacle(layer: nn.Module, name: str) -> str | None:
    """Why `layer` can't follow a multiplier or stand in a blend, or None if it can."""
    return _obstacle(*_types(layer, name))


def multiplier_obstacle(layers: Mapping[str, nn.Module], name: str) -> tuple[str, str] | None:
    """The first of an adapter's layers that can't follow a multiplier: its path, and why; None if all can."""
    for path, layer in layers.items():
        reason = blend_obstacle(layer, name)
        if reason:
            return path, reason
    return None


def multiplier_advice(reason: str) -> str:
    """What `multiplier_obstacle` gives as a reason, with what can be done."""
    return f"{reason}. Run it alone at 0 or 1, in a column of its own."


def _types(layer: Any, name: str) -> tuple[type, type, type]:
    """Of the layer, of adapter `name`'s LoRA variant in it and of the base's module: what the layer does follows."""
    variants, modules = layer.__dict__.get("lora_variant"), layer._modules
    return type(layer), type((variants or {}).get(name)), type(modules.get("base_layer"))


@functools.cache
def _obstacle(kind: type, variant: type, base: type) -> str | None:
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
    from transformers.pytorch_utils import Conv1D

    if issubclass(kind, ModulesToSaveWrapper):
        return "modules_to_save replaces a whole module"
    if issubclass(kind, TrainableTokensWrapper):
        return "trainable tokens replace rows of the embedding"
    if issubclass(kind, ParamWrapper):
        return "target_parameters adapts a bare parameter"
    if issubclass(kind, LoraLayer) and variant is not type(None):
        return f"{_variant_label(variant.__name__)} is no plain ΔW that could be scaled"
    allowed: tuple[type, ...] = (nn.Linear, Conv1D)
    if _method(kind) == "lora":
        allowed = (nn.Linear, Conv1D, nn.Embedding)
    if not issubclass(kind, (LoraLayer, IA3Layer)) or not issubclass(base, allowed):
        method = method_label(kind.__module__.split(".")[-2].upper())
        return f"the lab knows no multiplier for {method} on {base.__name__}"
    return None


def _variant_label(name: str) -> str:
    return "DoRA" if name.startswith("Dora") else name.removesuffix("Variant")


@functools.cache
def _method(kind: type) -> str:
    """Which of the equation's methods PEFT's layers of this type are: "lora", "adalora", "ia3", or "" for none."""
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.lora.layer import LoraLayer

    known = ((AdaLoraLayer, "adalora"), (LoraLayer, "lora"), (IA3Layer, "ia3"))
    return next((method for cls, method in known if issubclass(kind, cls)), "")


def factors(layer: Any, name: str) -> tuple[Tensor | None, Tensor | None]:
    """A: (r, in) and B: (out, r) of adapter `name` in one of PEFT's LoRA-like layers, the parameters themselves."""
    method = _method(layer.__class__)
    if method == "adalora":
        return layer.lora_A[name], layer.lora_B[name]
    if method != "lora":
        return None, None
    modules = layer._modules
    mine = modules["lora_A"]._modules.get(name)
    if mine is None:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return mine.weight, modules["lora_B"]._modules[name].weight


def compute_term(layer: Any, name: str, multiplier: float) -> Term:
    """The term of adapter `name` in one of PEFT's tuner layers; nothing is copied but IA3's scaled vector."""
    method = _method(layer.__class__)
    if method == "ia3":
        scale = 1 + multiplier * (layer.ia3_l[name].flatten() - 1)
        return Term(s_in=scale) if layer.is_feedforward else Term(s_out=scale)
    A, B = factors(layer, name)
    if method == "adalora":
        share = multiplier * layer.scaling[name] / (layer.ranknum[name] + 1e-5)
        return Term(A, B, layer.lora_E[name].flatten() * share)
    scaling = multiplier * layer.scaling[name]
    out = layer._modules["lora_B"]._modules.get(name)  # None on an embedding
    bias = None if out is None else out.bias
    return Term(A, B, scaling, bias=None if bias is None else scaling * bias)


def is_dora(layer: Any, name: str) -> bool:
    """Whether adapter `name` is DoRA in this layer, on a linear module whose equation is known here."""
    return _is_dora(*_types(layer, name))


@functools.cache
def _is_dora(kind: type, variant: type, base: type) -> bool:
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant
    from transformers.pytorch_utils import Conv1D

    return issubclass(kind, LoraLayer) and variant is DoraLinearVariant and issubclass(base, (nn.Linear, Conv1D))


def compute_dora(layer: Any, name: str) -> Term:
    """DoRA's term. Forms ΔW and dequantises W once, so it takes about as long as reading the layer's weight."""
    from peft.utils.integrations import dequantize_module_weight

    base = layer.get_base_layer()
    A, B = factors(layer, name)
    assert A is not None  # `is_dora` holds
    assert B is not None
    weight = base._parameters["weight"]
    W = dequantize_module_weight(base).to(A.dtype)
    base._parameters["weight"] = weight  # on a CPU, PEFT has put another in the place of an 8-bit one (issue 3)
    W = (W.T if layer.fan_in_fan_out else W) + layer.scaling[name] * (B @ A)
    s_out = layer.lora_magnitude_vector[name].weight / W.norm(dim=1)
    return Term(A, B, layer.scaling[name], s_out=s_out, bias=None if base.bias is None else (1 - s_out) * base.bias)


class Blend(nn.Module):
    """Stands in for one module of the base while a blend is mounted; the adapters' parameters stay PEFT's.

    `weight` and `bias` are the base module's (T5 asks `wo` for its weight's dtype).
    """

    def __init__(self, base_layer: nn.Module, parts: list[tuple[nn.Module, str, float]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parts = tuple(parts)  # a tuple is not registered: the parameters are not this module's to own

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        terms = [compute_term(layer, name, multiplier) for layer, name, multiplier in self.parts]
        inner = x
        for term in terms:
            if term.s_in is not None:
                inner = inner * term.s_in
        y = self.base_layer(inner if inner is x else inner.to(x.dtype), *args, **kwargs)
        dtype = y.dtype
        for term in terms:
            if term.A is not None:
                y = y + self._low_rank(x, term)
        for term in terms:
            if term.s_out is not None:
                y = y * term.s_out
        for term in terms:
            if term.bias is not None:
                y = y + term.bias
        return y.to(dtype)

    def _low_rank(self, x: Tensor, term: Term) -> Tensor:
        assert term.A is not None  # the caller asked
        assert term.B is not None
        if isinstance(self.base_layer, nn.Embedding):
            delta = (nn.functional.embedding(x, term.A.T) * term.e) @ term.B.T
            scale = getattr(self.base_layer, "embed_scale", None)
            if scale is None:
                return delta
            # BART's is a number, Gemma's a buffer in which the model's dtype has rounded it
            return delta * (scale.to(delta.dtype) if hasattr(scale, "to") else scale)
        return ((x.to(term.A.dtype) @ term.A.T) * term.e) @ term.B.T


def merge_terms(
    weight: Tensor, bias: Tensor | None, terms: list[Term], *, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the plain layer that computes the equation, in the layer's own layout.

    `weight`: (out, in), or (in, out) when `transposed` (GPT-2's Conv1D, an embedding's table). The sum is made in
    fp32 or better and given back in the weight's dtype. Neither argument is changed.
    """
    import torch

    wide = torch.promote_types(weight.dtype, torch.float32)
    W = (weight.T if transposed else weight).to(wide)
    c = None if bias is None else bias.to(wide)
    extra = None
    for term in terms:
        if term.s_in is not None:
            W = W * term.s_in.to(wide)
    for term in terms:
        if term.A is not None and term.B is not None:
            W = W + (term.B.to(wide) * term.e) @ term.A.to(wide)
    for term in terms:
        if term.s_out is not None:
            W = W * term.s_out.to(wide)[:, None]
            c = None if c is None else c * term.s_out.to(wide)
        if term.bias is not None:
            extra = term.bias.to(wide) if extra is None else extra + term.bias.to(wide)
    if extra is not None:
        c = extra if c is None else c + extra
    merged = (W.T if transposed else W).to(weight.dtype).contiguous()
    return merged, None if c is None else c.to(weight.dtype if bias is None else bias.dtype)
