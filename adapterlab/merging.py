"""Adapters become weights: a weighted adapter made of several, or a plain model with a column merged in."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterlab.columns import Column
from adapterlab.equation import blend_obstacle, compute_term, factors, merge_terms, multiplier_obstacle
from adapterlab.errors import AdapterLabError
from adapterlab.methods import never_merged
from adapterlab.mounts import adapter_state, plain_peft, prefixed, skeleton

if TYPE_CHECKING:
    from peft import PeftConfig

    from adapterlab.adapters import Adapters

APPROXIMATE = (
    "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


def concatenate_obstacle(layers: Mapping[str, Any], name: str) -> str | None:
    """Why an adapter with these layers can't be a part of one LoRA, or None if it can."""
    for layer in layers.values():
        reason = blend_obstacle(layer, name)
        if reason is not None:
            return f"{reason}, so no LoRA equals it. Give it a column of its own instead."
        if factors(layer, name)[0] is None:
            return (
                "IA3 multiplies instead of adding, so no LoRA equals it. A blend, as a column of lab.compare, is exact."
            )
        if _adds_bias(layer, name):
            return (
                "it has lora_bias, which the sum of several can't keep. A blend, as a column of lab.compare, is exact."
            )
    return None


def _adds_bias(layer: Any, name: str) -> bool:
    """Whether the layer adds a vector of the adapter's own to what the base's module gives."""
    out = getattr(layer, "lora_B", None)
    biased = out is not None and name in out and getattr(out[name], "bias", None) is not None
    return biased or name in getattr(layer, "beft_bias", ())


def concatenated(adapters: Adapters, column: Column) -> tuple[PeftConfig, dict[str, Any]]:
    """A LoRA that equals the blend W + Σ mᵢΔWᵢ: B = [B₁ B₂ …], A = [e₁A₁; e₂A₂; …], scaling 1, rank the sum of ranks.

    Ranks may differ by layer, scalings may be rsLoRA's or patterns: all of that is in the tensors. Raises
    `AdapterLabError` for adapters that are no plain ΔW.
    """
    import torch
    from peft import LoraConfig

    for name in column.names:
        why = concatenate_obstacle(adapters.mounts.adapters[name].layers, name)
        if why is not None:
            raise AdapterLabError(f"{name!r} can't be concatenated: {why}")
    terms: dict[str, list[Any]] = {}
    for name, multiplier in column.parts:
        for path, layer in adapters.mounts.adapters[name].layers.items():
            terms.setdefault(path, []).append(compute_term(layer, name, multiplier))
    state: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    for path, here in terms.items():
        if not sum(len(t.A) for t in here):
            continue  # AdaLoRA has pruned all triplets, and PEFT has no LoRA of rank 0
        embedding = type(adapters.mounts.sites[path].original).__name__ == "Embedding"
        A = torch.cat([(t.A.T * t.e).T for t in here]).detach().clone()
        B = torch.cat([t.B for t in here], dim=1).detach().clone()
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        state[f"{path}.{names[0]}"], state[f"{path}.{names[1]}"] = A, B
        ranks[path] = A.shape[0]
    if not ranks:
        raise AdapterLabError(
            f"{column.label} can't be concatenated: all its triplets are pruned, so it changes nothing."
        )
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {re.escape(path): rank for path, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=sorted(ranks),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=any(getattr(adapters.mounts.adapters[n].config, "fan_in_fan_out", False) for n in column.names),
        task_type=adapters.mounts.adapters[column.names[0]].config.task_type,
        base_model_name_or_path=adapters.base_path,
        inference_mode=True,
    )
    return config, state


def approximated(
    adapters: Adapters, column: Column, name: str, combination_type: str, density: float | None
) -> tuple[PeftConfig, dict[str, Any]]:
    """What PEFT's own `add_weighted_adapter` makes of the column: not the blend, but one of its approximations.

    Plain LoRA only, in a structure of its own; the model is left alone. Raises `AdapterLabError` with PEFT's reason.
    """
    from peft import set_peft_model_state_dict

    if density is None and not combination_type.startswith(("linear", "svd")):
        raise AdapterLabError(
            f"{combination_type!r} prunes: say how much to keep, as in density=0.5 (above 0, at most 1)."
        )
    for other in column.names:
        config: Any = adapters.mounts.adapters[other].config
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        flags = ("use_rslora", "use_dora", "lora_bias", "rank_pattern")
        hidden = [flag for flag in flags if getattr(config, flag, False)]
        lost = multiplier_obstacle(adapters.mounts.adapters[other].layers, other)
        if kind != "LORA" or hidden or lost:
            why = f"it is {kind}"
            if hidden:
                why = f"it uses {', '.join(hidden)}, which PEFT silently gets wrong there"
            elif kind == "LORA" and lost:
                why = f"at {lost[0]}, {lost[1]}, and PEFT would leave that out"
            raise AdapterLabError(
                f"{other!r} can't take part in {combination_type!r}: {why}. 'cat' is exact where it applies."
            )
    with adapters.using(None) as model, skeleton(model) as twin:
        plain: Any = None
        for other in column.names:
            config, state = adapters.state(other)
            if plain is None:
                plain = plain_peft(twin, config, state, other)
            else:
                plain.add_adapter(other, config)
                set_peft_model_state_dict(plain, prefixed(state), adapter_name=other)
        try:
            plain.base_model.add_weighted_adapter(
                list(column.names),
                [multiplier for _, multiplier in column.parts],
                name,
                combination_type=combination_type,
                density=density,
            )
        except (ValueError, KeyError, IndexError) as error:
            theirs = isinstance(error, ValueError) and "No matching LoRAs" not in str(error)
            why = str(error) if theirs else f"it finds none of them on a layer. {_BY_THE_FIRST}"
            raise AdapterLabError(f"PEFT can't combine them by {combination_type!r}: {why}") from error
        wanted = {path for other in column.names for path in adapters.mounts.adapters[other].layers}
        left_out = sorted(wanted - _paths_of(plain, name))
        if left_out:
            raise AdapterLabError(
                f"PEFT can't combine them by {combination_type!r}: it leaves out {left_out[0]}. {_BY_THE_FIRST}"
            )
        state = adapter_state(plain, name)
        made = copy.deepcopy(plain.peft_config[name])
    made.base_model_name_or_path, made.inference_mode = adapters.base_path, True
    return made, {key: value.detach().clone() for key, value in state.items()}


_BY_THE_FIRST = "It takes the choice of layers from the first adapter alone. 'cat' is exact where it applies."


def _paths_of(plain: Any, name: str) -> set[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = plain.get_base_model().named_modules()
    layers = {path: layer for path, layer in modules if isinstance(layer, BaseTunerLayer)}
    return {path for path, layer in layers.items() if name in layer._get_available_adapters()}


_SAVE_INSTEAD = "save the adapter instead, with lab.save_adapter."


def merge_obstacle(adapters: Adapters, column: Column, *, to_disk: bool) -> str | None:
    """Why `column` can't become weights of a plain model of its own, or None if it can. to_disk: the model is to be saved.
    Reads no weights."""
    why = base_merge_obstacle(adapters)
    for name in column.names if why is None else ():
        layers = adapters.mounts.adapters[name].layers
        why = why or adapter_merge_obstacle(adapters, name, layers)
        why = why or (adapter_file_obstacle(adapters, name, layers) if to_disk else None)
    return why


def base_merge_obstacle(adapters: Adapters) -> str | None:
    """Why nothing can be merged into this base, or None if it can."""
    model = adapters.model
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        return (
            "merging into quantised weights rounds the adapter away and changes the outputs. Open the lab without "
            "quantization and merge there, or save the adapter with lab.save_adapter."
        )
    if any(parameter.is_meta for parameter in adapters.base.values()):
        return (
            "accelerate keeps weights of the base on disk or on the host, where nothing can be merged into them. Load the "
            f"base without offload, or {_SAVE_INSTEAD}"
        )
    return None


def adapter_merge_obstacle(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    """Why these layers of an adapter can't become weights, or None if they can."""
    config = adapters.mounts.adapters[name].config
    tied = adapters.tied if adapters.model.config.is_encoder_decoder else {}
    never = never_merged(str(getattr(config.peft_type, "value", config.peft_type)))
    if never is not None:
        return f"{never}. Plain PEFT runs it: {_SAVE_INSTEAD}"
    for path, layer in layers.items():
        if _keeps_ties(layer):
            lonely = [
                other for other in adapters.tied.get(path, ()) if other not in adapters.mounts.adapters[name].layers
            ]
            if lonely:
                return f"{path} shares its weight with {', '.join(lonely)}, where its tokens are not trained: {_SAVE_INSTEAD}"
        elif path in tied:
            return (
                f"{path} shares its weight with {', '.join(tied[path])}, and a saved encoder-decoder model ties them "
                f"again: {_SAVE_INSTEAD}"
            )
        if hasattr(layer, "beft_bias") and _has_no_bias(adapters, path):
            return f"PEFT can't merge BEFT into {path}, which has no bias: {_SAVE_INSTEAD}"
    return None


def adapter_file_obstacle(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    """Why a model with these layers merged into it would not be the same when it is loaded again, or None if it would."""
    for path, layer in layers.items():
        if _adds_bias(layer, name) and _has_no_bias(adapters, path):
            return (
                f"{path} would get a bias, which {type(adapters.model).__name__} has not there, and from_pretrained "
                f"leaves it out: keep the merged model in memory, or {_SAVE_INSTEAD}"
            )
    return None


def _has_no_bias(adapters: Adapters, path: str) -> bool:
    return getattr(adapters.mounts.sites[path].original, "bias", None) is None


def _keeps_ties(layer: Any) -> bool:
    """Trained tokens go into the shared weight itself, through PEFT's own care for tied modules."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    return isinstance(layer, (TrainableTokensLayer, TrainableTokensWrapper))


def merged_model(adapters: Adapters, column: Column, *, to_disk: bool = False) -> Any:
    """A plain transformers model of its own with the column merged into its weights; the lab's model is left alone.

    Takes the memory of a second base. Raises `AdapterLabError` with what `merge_obstacle` says.
    """
    why = merge_obstacle(adapters, column, to_disk=to_disk)
    if why is not None:
        raise AdapterLabError(f"{column.label} can't be merged: {why}")
    with adapters.using(None) as bare:
        plain = copy.deepcopy(bare)
    plain.__dict__.pop("_adapterlab", None)
    plain._hf_peft_config_loaded = False
    mounted = {name: adapters.mounts.adapters[name].layers for name in column.names}
    if all(multiplier_obstacle(layers, name) is None for name, layers in mounted.items()):
        _merge_by_equation(adapters, column, plain)
    else:
        _merge_by_peft(adapters, column, plain)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    return plain.eval()


def _merge_by_equation(adapters: Adapters, column: Column, plain: Any) -> None:
    import torch
    from torch import nn

    parts: dict[str, list[Any]] = {}
    for name, multiplier in column.parts:
        for path, layer in adapters.mounts.adapters[name].layers.items():
            parts.setdefault(path, []).append(compute_term(layer, name, multiplier))
    with torch.no_grad():
        for path, terms in parts.items():
            module: Any = plain.get_submodule(path)
            transposed = not isinstance(module, nn.Linear)
            weight, bias = merge_terms(module.weight, getattr(module, "bias", None), terms, transposed=transposed)
            _untie(plain, module)
            module.weight = nn.Parameter(weight)
            if bias is not None:
                module.bias = nn.Parameter(bias)


def _untie(plain: Any, module: Any) -> None:
    """A merged lm_head must not change the input embeddings that share its tensor, nor the other way round."""
    ends = (plain.get_input_embeddings(), plain.get_output_embeddings())
    if module in ends and ends[0] is not None and ends[1] is not None and ends[0].weight is ends[1].weight:
        plain.config.tie_word_embeddings = False


def _merge_by_peft(adapters: Adapters, column: Column, plain: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    name = column.names[0]
    for path, layer in adapters.mounts.adapters[name].layers.items():
        if path in adapters.tied and isinstance(layer, BaseTunerLayer) and not _keeps_ties(layer):
            module: Any = plain.get_submodule(path)  # PEFT would add to the weight of those that share it, too
            _untie(plain, module)
            module.weight = nn.Parameter(module.weight.detach().clone())
    config, state = adapters.state(name)
    wrapped = plain_peft(plain, config, state, name)
    try:
        wrapped.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise AdapterLabError(f"PEFT can't merge {name!r} ({config.peft_type.value}): {error}") from error
    plain.__dict__.pop("peft_config", None)
