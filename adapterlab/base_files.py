"""A base model's files, looked at before anything is made of them: the shards of its index lie beside it, its numbers are
numbers, and its config describes no model that is far larger than its weights."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.notices import warn
from adapterlab.places import MODEL_CONFIG, Place
from adapterlab.strangers import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_GENERATION = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_SIZE = re.compile(r"size|dim|heads|hidden|inner|width|rank|n_embd|d_model|d_ff|ffn")
_NUMBER = re.compile(r"layer|block|depth|expert")
_SPARE = 64  # modules of a kind on top of four for each tensor: some models share their layers' weights
_HARMLESS = 10**8  # parameters that any machine has room for
_MOST_FOR_A_BYTE = 16  # parameters; the smallest packed weights have four


def check_base_files(place: Place) -> None:
    """Raise `AdapterLabError` if the JSON files of a model can't be read or say what can't be, or an index names files
    elsewhere. Of the Hub's repositories only what is small is looked at; huggingface_hub keeps their shards where they belong.
    """
    if MODEL_CONFIG in place.names:
        _check_ids(place, MODEL_CONFIG, _read(place, MODEL_CONFIG))
    if _GENERATION in place.names:
        _check_ids(place, _GENERATION, _read(place, _GENERATION))
    if place.folder is not None:
        for name in sorted(place.names):
            if name.endswith(".index.json"):
                _check_shards(place, name, _read(place, name))


def check_base_size(place: Place, config: PretrainedConfig, auto_class: Any) -> None:
    """Raise `AdapterLabError` if the config is of a model far larger than its weights: to build it would take any memory and
    time. Says nothing where the weights are not here yet."""
    raw = _read(place, MODEL_CONFIG) if MODEL_CONFIG in place.names else {}
    held = place.weights_bytes()
    if held is None or place.folder is None:
        return
    tensors = _tensors(place) or held // 64
    for field, number in _numbers(raw):
        if _NUMBER.search(field) and number > 4 * tensors + _SPARE:
            raise AdapterLabError(
                f"The {MODEL_CONFIG} of {place.source} says {field}={number:,}, where its weights are {tensors:,} tensors: "
                "config and weights don't belong together."
            )
    sizes = sorted(number for field, number in _numbers(raw) if _SIZE.search(field))
    if math.prod(sizes[-2:]) <= held:
        return  # as in every model that was ever saved whole
    parameters = _count(config, auto_class)
    if parameters > max(_MOST_FOR_A_BYTE * held, _HARMLESS):
        raise AdapterLabError(
            f"The {MODEL_CONFIG} of {place.source} describes a model of {parameters:.2g} parameters, where its weights have "
            f"{held / 1e6:.1f} MB: config and weights don't belong together."
        )


def check_loaded(title: str, info: Mapping[str, Any], model: Any) -> None:
    """Raise `AdapterLabError` if none of the model's weights came out of its files, and warn if some did not: transformers
    fills them with random numbers."""
    missing = sorted(info.get("missing_keys") or ())
    if not missing:
        return
    total = len(dict(model.named_parameters()))
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if len(missing) >= total:
        raise AdapterLabError(
            f"None of the weights of {title} is in its files ({shown}): they are of another model, or damaged."
        )
    warn(f"{len(missing)} of {total} weights of {title} are not in its files, so they are random numbers: {shown}.")


def _read(place: Place, name: str) -> dict[str, Any]:
    try:
        content = read_json(place.fetch(name))
    except (OSError, ValueError) as error:
        raise AdapterLabError(f"{place.source} could not be loaded: its {name} can't be read: {error}.") from error
    if not isinstance(content, dict):
        raise AdapterLabError(f"The {name} of {place.source} holds a {type(content).__name__}, not an object.")
    return content


def _check_ids(place: Place, name: str, content: Mapping[str, Any]) -> None:
    for field in _IDS:
        value = content.get(field)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and (not isinstance(one, int) or isinstance(one, bool)):
                raise AdapterLabError(
                    f"The {name} of {place.source} says {field}={str(value)[:80]!r}, which is no token's id."
                )


def _check_shards(place: Place, name: str, index: Mapping[str, Any]) -> None:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise AdapterLabError(f"The {name} of {place.source} has no weight_map of names to files.")
    elsewhere = sorted({shard[:80] for shard in shards.values() if shard not in place.names})
    if elsewhere:
        raise AdapterLabError(
            f"The {name} of {place.source} names weights that are not beside it: {', '.join(map(repr, elsewhere[:3]))}."
        )


def _tensors(place: Place) -> int:
    """How many tensors its safetensors files hold; 0 where that is not known."""
    from safetensors import safe_open

    with contextlib.suppress(Exception):  # a damaged file is for the loader to tell
        if "model.safetensors" in place.names:
            with safe_open(str(place.fetch("model.safetensors")), framework="pt") as file:
                return len(list(file.keys()))
        if "model.safetensors.index.json" in place.names:
            return len(_read(place, "model.safetensors.index.json")["weight_map"])
    return 0


def _numbers(value: Any, field: str = "") -> Iterator[tuple[str, int]]:
    """(field, number) of all whole numbers, at whatever depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, field)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield field, value


def _count(config: PretrainedConfig, auto_class: Any) -> float:
    import torch

    from adapterlab.blueprint import build

    try:
        return float(sum(parameter.numel() for parameter in build(config, auto_class, torch.float32).parameters()))
    except Exception as error:  # code of its own, or numbers of which 64 bits can't count the product
        return math.inf if "overflow" in str(error).lower() else 0.0
