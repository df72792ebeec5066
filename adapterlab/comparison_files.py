"""A comparison read back from its file, which anybody may have edited: every value is of its kind, or the file is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.strangers import read_json

if TYPE_CHECKING:
    from adapterlab.comparison import Generation

MOST_BYTES = 256_000_000  # in memory it is some ten times as large
_TEXTS = ("column", "text", "prompt", "finish_reason", "weights_digest", "note")
_SWITCHES = ("batched", "cached", "tie")


def read_parts(path: Path, form: str, version: int) -> dict[str, Any]:
    """The parts of the comparison in a file, as `Comparison` takes them; `AdapterLabError` for all else."""
    try:
        content = read_json(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise AdapterLabError(f"{str(path)!r} can't be read as a comparison: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise AdapterLabError(f"{str(path)!r} is no comparison saved by Comparison.to_json.")
    if content.get("version") != version or isinstance(content["version"], bool):
        found = repr(content.get("version"))[:40]
        raise AdapterLabError(f"{str(path)!r} has format version {found}, this AdapterLab reads {version}: update it.")
    try:
        return _parts(content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        words = " ".join(str(error).split())[:400]
        raise AdapterLabError(f"{str(path)!r} is damaged: {type(error).__name__}: {words}.") from error


def _parts(content: Mapping[str, Any]) -> dict[str, Any]:
    prompts, rendered = _texts("prompts", content["prompts"]), _texts("rendered", content["rendered"])
    if not isinstance(content["model"], dict) or not isinstance(content["settings"], dict):
        raise TypeError("model and settings are mappings")
    if not isinstance(content["created"], str):
        raise TypeError("created is no text")
    generations = [_generation(row) for row in _list("generations", content["generations"])]
    if any(g.prompt_index >= len(prompts) for g in generations):
        raise ValueError("a generation names a prompt that is not there")
    if len(prompts) != len(rendered) or len(prompts) != len(_list("prompt_ids", content["prompt_ids"])):
        raise ValueError("prompts, rendered and prompt_ids differ in length")
    return {
        "prompts": prompts,
        "rendered": rendered,
        "prompt_ids": [_whole_numbers("prompt_ids", row) for row in content["prompt_ids"]],
        "settings": content["settings"],
        "model": content["model"],
        "generations": generations,
        "created": content["created"],
    }


def _generation(row: Any) -> Generation:
    from adapterlab.comparison import Generation

    if not isinstance(row, dict):
        raise TypeError("a generation is a mapping")
    known = {each.name for each in fields(Generation)}
    if not set(row) <= known:
        raise ValueError(f"unknown fields {sorted(set(row) - known)}")
    generation = Generation(**{key: _READERS[key](key, value) for key, value in row.items()})
    count = len(generation.token_ids)
    for key in ("tokens", "logprobs", "leads", "base_logprobs"):
        value = getattr(generation, key)
        if value is not None and len(value) != count:
            raise ValueError(f"token_ids and {key} differ in length")
    if len(generation.active_adapters) != len(generation.multipliers):
        raise ValueError("active_adapters and multipliers differ in length")
    if generation.first_difference is not None and generation.first_difference > count:
        raise ValueError("first_difference lies behind the last token")
    return generation


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{key} is no text")
    return value


def _switch(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{key} is neither true nor false")
    return value


def _number(key: str, value: Any) -> float:
    """JSON has no NaN: what was none is null."""
    if value is None:
        return math.nan
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{key} is no number")
    return float(value)


def _duration(key: str, value: Any) -> float:
    seconds = _number(key, value)
    if seconds < 0 or math.isinf(seconds):
        raise ValueError(f"{key} is no time")
    return seconds


def _whole_number(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{key} is no whole number")
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{key} is {str(value)[:20]}, which can't be")
    return value


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{key} is no list")
    return value


def _texts(key: str, value: Any) -> list[str]:
    return [_text(f"one of {key}", one) for one in _list(key, value)]


def _whole_numbers(key: str, value: Any) -> tuple[int, ...]:
    return tuple(_whole_number(f"one of {key}", one) for one in _list(key, value))


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    return tuple(_number(f"one of {key}", one) for one in _list(key, value))


def _asked(key: str, value: Any) -> tuple[tuple[str, float], ...]:
    pairs = [_list(f"one of {key}", pair) for pair in _list(key, value)]
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"{key} holds pairs of a name and a multiplier")
    return tuple((_text(f"a name in {key}", name), _number(f"a multiplier in {key}", m)) for name, m in pairs)


_READERS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(_TEXTS, _text),
    **dict.fromkeys(_SWITCHES, _switch),
    "asked": _asked,
    "prompt_index": _whole_number,
    "batch_size": _whole_number,
    "first_difference": lambda key, value: None if value is None else _whole_number(key, value),
    "token_ids": _whole_numbers,
    "tokens": lambda key, value: tuple(_texts(key, value)),
    "active_adapters": lambda key, value: tuple(_texts(key, value)),
    "logprobs": _numbers,
    "leads": _numbers,
    "multipliers": _numbers,
    "base_logprobs": lambda key, value: None if value is None else _numbers(key, value),
    "seconds": _duration,
    "logit_shift": _number,
}
