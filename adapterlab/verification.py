"""Did the adapter that is named really speak? Each column again, through plain PEFT and one forward, on its own.

A second structure over the same base tensors gets the adapter through PEFT's public calls: no mount, no lab state, no
decode loop. For adapters that came from a folder, the weights are read from that folder again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterlab.columns import Column
from adapterlab.equation import multiplier_obstacle
from adapterlab.fingerprints import base_digest, column_digest
from adapterlab.generation import compute_logprobs
from adapterlab.mounts import plain_peft, skeleton
from adapterlab.quantization import keep_quantized_dtype

if TYPE_CHECKING:
    import pandas as pd

    from adapterlab.adapters import Adapters
    from adapterlab.comparison import Comparison, Generation

# Nats. Plain PEFT over 8-bit weights is itself up to 0.8 off, and 0.16 on the average, when it reads a text at once instead
# of token by token: a last bit tips an activation into the next of 255 steps. Another adapter is 5 and 1.3 off.
TOLERANCE = {"float32": 1e-3, "float64": 1e-6, "8bit": 1.5}
MEAN_TOLERANCE = {"8bit": 0.4}
_PLAIN = "plain"
HALF_TOLERANCE = 0.3  # nats: half precision and 4-bit layers round differently in a longer batch


def verify_comparison(adapters: Adapters, comparison: Comparison, dtype: str) -> pd.DataFrame:
    """One row per prompt and column: what was recorded, what plain PEFT finds now, and whether they agree.

    dtype: of the base, or how it is quantised ("8bit", "4bit", …): it decides how much rounding is allowed for.

    Columns: prompt, column, weights_agree (digest of this run against the weights the lab took in under that name),
    active_agree, logprob_error (largest |Δ| in nats over the text's tokens), tokens_agree, agrees, note. Changes nothing.
    """
    import pandas as pd

    expected = {name: record.reference for name, record in adapters.records.items()}
    with adapters.using(None) as model:
        base = base_digest(model)
    rows = [_verify_one(adapters, comparison, g, dtype, expected, base) for g in comparison.generations]
    return pd.DataFrame(rows)


def _verify_one(
    adapters: Adapters,
    comparison: Comparison,
    generation: Generation,
    dtype: str,
    expected: Mapping[str, str],
    base: str,
) -> dict[str, Any]:
    wanted = Column(generation.asked)
    row: dict[str, Any] = {"prompt": generation.prompt, "column": generation.column}
    gone = [name for name in wanted.names if name not in adapters.records]
    notes = [f"{', '.join(gone)} is no longer in the lab"] if gone else _other_methods(adapters, wanted)
    if notes:
        return {**row, "weights_agree": False, "active_agree": False, "logprob_error": float("nan"),
                "tokens_agree": False, "agrees": False, "note": "; ".join(notes)}  # fmt: skip
    digest = column_digest((m, expected[name]) for name, m in wanted.parts) if wanted.parts else adapters.base_reference
    weights_agree = generation.weights_digest == digest and base == adapters.base_reference
    if not weights_agree:
        base_changed = base != adapters.base_reference
        notes.append("the base's weights have changed" if base_changed else _whose(generation, wanted, expected))
    active_agree = tuple(sorted(generation.active_adapters)) == tuple(sorted(wanted.names))
    ids = comparison.prompt_ids[generation.prompt_index]
    logprobs = _plain_logprobs(adapters, wanted, ids, generation.token_ids)
    errors = [abs(a - b) for a, b in zip(logprobs, generation.logprobs)]
    error = max(errors, default=0.0)
    limit = TOLERANCE.get(dtype, HALF_TOLERANCE)
    together = MEAN_TOLERANCE.get(dtype, limit) * len(errors) + limit  # a few tokens have no average to speak of
    alike = all(e <= limit for e in errors) and sum(errors) <= together  # no NaN is
    tokens_agree = alike and len(logprobs) == len(generation.logprobs)
    if not tokens_agree:
        where = next((i for i, e in enumerate(errors) if not e <= limit), 0)
        notes.append(f"from token {where} on, plain PEFT gives other probabilities")
    agrees = weights_agree and active_agree and tokens_agree
    return {**row, "weights_agree": weights_agree, "active_agree": active_agree, "logprob_error": error,
            "tokens_agree": tokens_agree, "agrees": agrees, "note": "; ".join(notes)}  # fmt: skip


def _other_methods(adapters: Adapters, column: Column) -> list[str]:
    """Names of a blend that have since been given to adapters which follow no multiplier, in words."""
    if column.single is not None:
        return []
    layers = {name: adapters.mounts.adapters[name].layers for name in column.names}
    others = [name for name, own in layers.items() if multiplier_obstacle(own, name) is not None]
    return [f"{', '.join(others)} is another adapter now, which has no part in a blend"] if others else []


def _plain_logprobs(
    adapters: Adapters, column: Column, ids: Sequence[int], token_ids: Sequence[int]
) -> tuple[float, ...]:
    """Logprobs of the recorded tokens under `column`, in a second structure in which PEFT has put the adapters itself."""
    with adapters.using(None) as model, contextlib.ExitStack() as twins:
        twin = twins.enter_context(skeleton(model))
        if column.is_base:
            return compute_logprobs(twin, ids, token_ids)
        made: list[tuple[Any, float]] = []
        for name, multiplier in column.parts:
            config, state = adapters.plain(name)
            own = twins.enter_context(skeleton(model))
            plain = plain_peft(own, config, state, _PLAIN).eval()
            keep_quantized_dtype(plain)
            made.append((plain, multiplier))
        if column.single is not None:
            return compute_logprobs(made[0][0], ids, token_ids)  # PeftModel's own forward, which some methods need
        _put_explicit(twin, made)
        return compute_logprobs(twin, ids, token_ids)


def _put_explicit(twin: Any, made: list[tuple[Any, float]]) -> None:
    """Stand ΔW = Σ mᵢΔWᵢ, as PEFT's `get_delta_weight` forms it, and IA3's scales beside each of the twin's modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts: dict[str, list[tuple[Any, float]]] = {}
    for plain, multiplier in made:
        for path, layer in plain.get_base_model().named_modules():
            if isinstance(layer, BaseTunerLayer):
                parts.setdefault(path, []).append((layer, multiplier))
    for path, here in parts.items():
        parent, _, child = path.rpartition(".")
        owner = twin.get_submodule(parent)
        owner._modules[child] = _explicit(owner._modules[child], here)


def _explicit(module: Any, parts: list[tuple[Any, float]]) -> Any:
    from torch import nn

    class Explicit(nn.Module):
        weight = property(lambda self: module.weight)
        bias = property(lambda self: module.bias)

        def forward(self, x: Any) -> Any:
            inner, outer = x, 1.0
            delta: Any = 0.0
            late: Any = 0.0
            for layer, multiplier in parts:
                if hasattr(layer, "ia3_l"):
                    scale = 1 + multiplier * (layer.ia3_l[_PLAIN].flatten() - 1)
                    inner, outer = (inner * scale, outer) if layer.is_feedforward else (inner, outer * scale)
                    continue
                dense = multiplier * layer.get_delta_weight(_PLAIN)
                if isinstance(module, nn.Embedding):
                    delta = delta + nn.functional.embedding(x, dense) * getattr(module, "embed_scale", 1.0)
                else:
                    delta = delta + x.to(dense.dtype) @ (dense if getattr(layer, "fan_in_fan_out", False) else dense.T)
                    bias = getattr(layer.lora_B[_PLAIN], "bias", None)
                    late = late if bias is None else late + multiplier * layer.scaling[_PLAIN] * bias
            y = module(inner if inner is x else inner.to(x.dtype))
            return (outer * (y + delta) + late).to(y.dtype)

    return Explicit()


def _whose(generation: Generation, wanted: Column, expected: Mapping[str, str]) -> str:
    owners = [name for name, digest in expected.items() if digest == generation.weights_digest]
    if owners:
        return f"the weights that spoke are those of {owners[0]!r}"
    what = "the base's weights have" if wanted.is_base else f"the weights of {', '.join(map(repr, wanted.names))} have"
    return f"{what} changed since the lab took them in, or since this comparison"
