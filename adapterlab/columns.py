"""What to run: the base, one adapter, or a blend of several, in one form everywhere."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Union

from adapterlab.errors import AdapterLabError

ColumnLike = Union["Column", None, str, Iterable[str], Mapping[str, float]]

BASE = "base"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Column:
    """The adapters that act in one column, with their multipliers: `()` is the base model alone.

    Multiplier 0 is base and 1 is the adapter, so parts at 0 are left out. The order of the parts is the
    order in which they were given; it changes the label and nothing else.

    >>> Column.of({"pirate": 0.7, "robot": 0.3}).parts
    (('pirate', 0.7), ('robot', 0.3))
    """

    parts: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, value: ColumnLike) -> Column:
        """Read `None`, `"base"`, `"name"`, `["a", "b"]` or `{"a": 0.7, "b": 0.3}`.

        Raises `AdapterLabError` for anything else, a name given twice or a multiplier that is no finite number.
        Whether the names exist is for the lab to say: see `Column.check`.

        >>> Column.of(["pirate", "robot"]) == Column.of({"pirate": 1, "robot": 1})
        True
        >>> Column.of("base").parts
        ()
        """
        if isinstance(value, Column):
            return cls(_checked_parts(list(value.parts)))
        if value is None:
            return cls()
        if isinstance(value, str):
            return cls() if value == BASE else cls(((value, 1.0),))
        if isinstance(value, Mapping):
            pairs = list(value.items())
        elif isinstance(value, Iterable):
            pairs = [(name, 1.0) for name in value]
        else:
            raise AdapterLabError(
                f"{value!r} is no column: use None or 'base', a name, a list of names, or a dict of name → multiplier."
            )
        return cls(_checked_parts(pairs))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters that act.

        >>> Column.of({"pirate": 0.7, "robot": 0.3}).names
        ('pirate', 'robot')
        """
        return tuple(name for name, _ in self.parts)

    @property
    def is_base(self) -> bool:
        """Whether nothing acts but the base.

        >>> Column.of({"pirate": 0}).is_base
        True
        """
        return not self.parts

    @property
    def single(self) -> str | None:
        """The adapter's name if one adapter acts alone at multiplier 1: what PEFT itself can run.

        >>> Column.of("pirate").single, Column.of({"pirate": 0.5}).single
        ('pirate', None)
        """
        return self.parts[0][0] if len(self.parts) == 1 and self.parts[0][1] == 1.0 else None

    @property
    def label(self) -> str:
        """What a person reads: `base`, `pirate`, `pirate × 0.5`, `a + b`, `a × 0.7 + b × 0.3`.

        >>> Column.of({"pirate": 0.7, "robot": 1}).label
        'pirate × 0.7 + robot'
        """
        if self.is_base:
            return BASE
        return " + ".join(name if m == 1.0 else f"{name} × {m:g}" for name, m in self.parts)

    def as_dict(self) -> dict[str, float]:
        """Name → multiplier, as `lab.active_adapters` has it; empty for base.

        >>> Column.of(["pirate", "robot"]).as_dict()
        {'pirate': 1.0, 'robot': 1.0}
        """
        return dict(self.parts)

    def check(self, known: Iterable[str]) -> Column:
        """Itself, if every name is one of `known`; otherwise an `AdapterLabError` that names those that are not.

        >>> Column.of("pirat").check(lab.adapters)
        Traceback (most recent call last):
            ...
        adapterlab.errors.AdapterLabError: No adapter named 'pirat'; the lab has 'pirate', 'robot', 'bard'. ...
        """
        known = list(known)
        missing = [name for name in self.names if name not in known]
        if missing:
            has = "; the lab has " + ", ".join(map(repr, known)) if known else "; the lab has no adapters yet"
            raise AdapterLabError(
                f"No adapter named {', '.join(map(repr, missing))}{has}. Load one with lab.load_adapter(…) "
                "or make one with lab.add_adapter(…)."
            )
        return self

    def __str__(self) -> str:
        return self.label


def _checked_parts(pairs: list[tuple[Any, Any]]) -> tuple[tuple[str, float], ...]:
    parts: list[tuple[str, float]] = []
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise AdapterLabError(f"{pair!r} is no part of a column: it takes pairs of name and multiplier.")
        name, multiplier = pair
        if not isinstance(name, str):
            raise AdapterLabError(f"{name!r} is no adapter name: a column names adapters by strings.")
        if name == BASE:
            raise AdapterLabError("'base' acts in every column: leave it out of a blend, or use None for base alone.")
        if any(name == other for other, _ in parts):
            raise AdapterLabError(
                f"{name!r} stands twice in one column: give it one multiplier, as in {{{name!r}: 2}}."
            )
        if not is_finite(multiplier):
            raise AdapterLabError(
                f"{name!r} × {repr(multiplier)[:40]}: a multiplier is a finite number (0 is base, 1 the adapter)."
            )
        parts.append((name, float(multiplier)))
    return tuple((name, m) for name, m in parts if m != 0.0)


def is_finite(value: Any) -> bool:
    """A finite real number, numpy's included, that fits a float; True and False are none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def as_plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's own, which JSON has; in lists, tuples, sets and mappings too."""
    import numpy as np

    if type(value) is dict:
        return {as_plain(key): as_plain(one) for key, one in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(as_plain, value))
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def check_name(name: Any, taken: Iterable[str], forbidden: Iterable[str] = ()) -> str:
    """The name, if an adapter may be called so.

    `taken`: adapters that exist. `forbidden`: words that stand in the model's own parameter names, which would
    make saved keys ambiguous. Raises `AdapterLabError` with the reason and a name that would do.
    """
    if not isinstance(name, str) or not name:
        raise AdapterLabError(f"{name!r} is no adapter name: use letters, digits, '-' and '_'.")
    if name == BASE:
        raise AdapterLabError("'base' is the model itself: call the adapter something else, for example 'base-2'.")
    if not _NAME.fullmatch(name):
        raise AdapterLabError(
            f"{name!r} can't be an adapter's name: PEFT and torch need letters, digits, '-' and '_' only, "
            f"64 at most. {make_safe_name(name)!r} would do."
        )
    if name in set(taken):  # before the words: what is mounted stands in the names of the model's parameters
        raise AdapterLabError(
            f"There is an adapter named {name!r} already: choose another adapter_name, or lab.delete_adapter({name!r}) first."
        )
    if name in set(forbidden) or any(prefix in name for prefix in _tuner_prefixes()):
        raise AdapterLabError(
            f"{name!r} stands in the names of this model's or PEFT's own parameters, and saved keys would be "
            f"ambiguous. {('my-' + name).replace('_', '-')!r} would do."
        )
    return name


def make_safe_name(text: str) -> str:
    """An adapter name made from a repo's or folder's last part: `user/opt-350m.lora_v2` → `opt-350m-lora-v2`."""
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_")[:64] or "adapter"
    for prefix in _tuner_prefixes():
        name = name.replace(prefix, prefix.replace("_", "-"))
    return f"{name}-adapter" if name == BASE else name


def _tuner_prefixes() -> tuple[str, ...]:
    # PEFT tells its own parameters by these; kept as literals so that naming a column imports no torch.
    return ("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_", "ln_tuning_", "modules_to_save")
