"""Are a config's values of the kinds that PEFT's own fields are declared with? PEFT takes whatever JSON holds, and fails much
later, in words of its insides, or not at all."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

_LARGEST = 3e38  # what float32 holds
_LARGEST_WHOLE = (1 << 63) - 1  # and what torch counts with
_RANKS = ("r", "init_r", "target_r")
_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "a mapping",
}  # fmt: skip


def wrong_values(raw: Mapping[str, Any]) -> dict[str, str]:
    """Field → why its value is not what PEFT's config declares, of a mapping whose peft_type PEFT knows."""
    found = {}
    hints, defaults = _declared(raw["peft_type"])
    for field, value in raw.items():
        if field in ("peft_type", "task_type", "auto_mapping", "peft_version"):
            continue  # looked at elsewhere, or not used
        why = _wrong_number(value) or (_wrong_kind(field, value, hints[field]) if field in hints else "")
        why = why or _wrong_range(field, value, defaults.get(field))
        if field.endswith("_pattern") and raw["peft_type"] != "ADALORA":  # whose pattern is of masks
            why = why or next((wrong for one in _entries(value) if (wrong := _wrong_entry(field, one))), "")
        if field == "rank_pattern" and raw["peft_type"] == "ADALORA":
            why = why or _wrong_masks(value, raw.get("init_r"))
        if why:
            found[field] = why
    return found


def _declared(peft_type: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Field → type, and field → default where it is a plain value."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    hints, declared = typing.get_type_hints(cls), dataclasses.fields(cls)
    return {each.name: hints[each.name] for each in declared}, {each.name: each.default for each in declared}


def _wrong_number(value: Any) -> str:
    """Why a number in it, at whatever depth, can't be reckoned with."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((why for one in value if not isinstance(one, (str, bool)) and (why := _wrong_number(one))), "")
    if isinstance(value, float) and not math.isfinite(value):
        return "no finite number"
    largest = _LARGEST if isinstance(value, float) else _LARGEST_WHOLE
    return "too large a number" if isinstance(value, (int, float)) and abs(value) > largest else ""


def _wrong_range(field: str, value: Any, default: Any) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return ""
    if field.endswith("dropout") and not 0 <= value <= 1:
        return "no share between 0 and 1"
    if field in _RANKS and value < 1 and not (value == 0 == default):  # for OFT 0 is none given
        return "no rank, which is 1 or more"
    return ""


def _entries(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


def _wrong_entry(field: str, value: Any) -> str:
    """Why this can't be one name's rank, alpha or the like."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return f"{str(value)[:40]!r} is no number"
    if field == "rank_pattern" and (not isinstance(value, int) or value < 1):
        return f"{value} is no rank, which is 1 or more"
    return ""


def _wrong_masks(value: Any, init_r: Any) -> str:
    """AdaLoRA's: for each layer, which of its `init_r` triplets were kept."""
    longest = max((len(mask) for mask in _entries(value) if isinstance(mask, list)), default=0)
    return f"a mask of {longest:,} where init_r is {init_r}" if isinstance(init_r, int) and longest > init_r else ""


def _wrong_kind(field: str, value: Any, hint: Any) -> str:
    if _fits(value, hint) or (field.endswith("alpha") and isinstance(value, float)):  # which PEFT divides anyway
        return ""
    if set(_kinds(hint)) <= {int, float}:
        return "no whole number" if isinstance(value, float) else "no number"
    words = [_WORDS.get(kind, "") for kind in _kinds(hint)]
    return "not " + " or ".join(sorted({word for word in words if word})) if any(words) else "no such value"


def _kinds(hint: Any) -> list[Any]:
    """The plain types that a declared type stands for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for one in inner for kind in _kinds(one)]
    if origin is typing.Literal:
        return list(dict.fromkeys(type(one) for one in inner))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [str]
    if dataclasses.is_dataclass(hint) or hint in (dict, typing.Any):
        return [dict]
    kind = origin or hint
    return [list if kind in (list, set, tuple) else dict if _is_mapping(kind) else kind]


def _is_mapping(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Mapping)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of the declared type; what is declared in no way known here, fits."""
    if hint is str:
        return isinstance(value, str)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:  # of other texts PEFT says itself what it knows
        return any(type(value) is type(one) for one in inner)
    if hint is bool:
        return value is None or value in (True, False)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    kind = origin or hint
    if kind in (list, set, tuple):
        return isinstance(value, (list, tuple, set)) and all(_fits(one, inner[0]) for one in value if inner)
    if _is_mapping(kind):
        return isinstance(value, Mapping) and all(_fits(one, inner[1]) for one in value.values() if len(inner) == 2)
    return True
