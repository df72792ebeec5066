"""The Python of what was just clicked, ready to paste into a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterlab.columns import Column

_OF_SAMPLING_ONLY = ("top_p", "top_k", "seed")  # at temperature 0 they do nothing
_WIDTH = 100


def compare_code(prompt: Any, columns: Sequence[Column], settings: dict[str, Any]) -> str:
    """`lab.compare(…)` for these columns. What has no effect at temperature 0 is left out."""
    greedy = not settings.get("temperature")
    kept = {k: v for k, v in settings.items() if not (greedy and (k in _OF_SAMPLING_ONLY or k == "temperature"))}
    return call_code("lab.compare", prompt, columns=[column_literal(column) for column in columns], **kept)


def call_code(function: str, *arguments: Any, **keywords: Any) -> str:
    """A call with these arguments as literals, on one line if it is short."""
    parts = [repr(argument) for argument in arguments] + [f"{key}={value!r}" for key, value in keywords.items()]
    line = f"{function}({', '.join(parts)})"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{function}(", *(f"    {part}," for part in parts), ")"])


def column_literal(column: Column) -> Any:
    """The shortest way to write the column: None, its adapter's name, or a mapping of multipliers."""
    if column.is_base:
        return None
    return column.single if column.single is not None else column.as_dict()


class Name(str):
    """What stands in the code as it is: a variable's name, not a text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
