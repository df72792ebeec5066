"""Regular expressions out of a config are tried where they can be stopped, before PEFT tries them here.

PEFT matches them with Python's `re` against every module's name. An expression such as `(a+)+$` can need longer than a life
for that, and nothing else runs meanwhile. Whether one does can't be told from how it looks: choices without any star can, and
nested stars need not. Another matcher with a time limit would tell nothing of `re`. So each is tried in a small process that
is ended after a second of its own time. What ends there ends here: it is the same matcher over the same names.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterlab.errors import AdapterLabError

_SECONDS = 0.5
_SECONDS_EACH = 2e-5  # on top, for each name and expression: large models have 100,000 modules
_MOST_MEMORY = 1_000_000_000
_SPARE = 100  # entries of a list on top of one for each name that a model has
_PLAIN = re.compile(r"[\w.-]*")  # such names can't take long, whatever PEFT puts round them
_WHOLE = ("target_modules", "exclude_modules", "feedforward_modules")  # expressions when they are texts
_COUNTED = (*_WHOLE, "modules_to_save", "target_parameters", "layers_to_transform", "layers_pattern")
# PEFT's own expressions round an entry (tuners_utils.py, other.py, and the models of methods)
_ROUND_KEYS = (r"(.*\.)?({0})$", r".*\.{0}$")
_ROUND_NAMES = (r"(^|.*\.){0}($|\..*)",)
_ROUND_LAYERS = (r"(?:^|.*?\.){0}\.(?P<idx>\d+)\.", r".*\.{0}\.(?P<idx>\d+)\.")

# Prints the number of each expression before it tries it, so that the last one is the one that did not end.
_TRIAL = r"""
import json, re, sys
seconds, memory, names, expressions = json.load(sys.stdin)
try:
    import resource, signal
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.setitimer(signal.ITIMER_PROF, seconds)
except (ImportError, AttributeError, ValueError, OSError):
    pass  # not on this system: then the one who waits ends it
for number, (expression, whole) in enumerate(expressions):
    print(number, flush=True)
    try:
        match = re.compile(expression).fullmatch if whole else re.compile(expression).match
        for name in names:
            match(name)
    except Exception as error:
        print("wrong", str(error) or type(error).__name__, flush=True)
print("end", flush=True)
"""


def pattern_objections(config: Any, model: Any) -> dict[str, str]:
    """Field of the config → what is wrong with its expressions or its number of entries, for this model's names."""
    names = _names(model)
    found = {}
    for field in _fields(config):
        value = getattr(config, field, None)
        if isinstance(value, (list, tuple, set, dict)) and len(value) > len(names) + _SPARE:
            found[field] = f"it has {len(value):,} entries, where this model has {len(names):,} modules and parameters"
    return found or _tried(tuple(_expressions(config)), names)


def check_patterns(config: Any, model: Any, name: str) -> None:
    """Raise `AdapterLabError` if PEFT should not be given this config; what was tried once for these names is known."""
    found = pattern_objections(config, model)
    if found:
        raise AdapterLabError(
            f"{name!r} can't be used: " + "; ".join(f"{field}: {why}" for field, why in found.items()) + "."
        )


def _names(model: Any) -> tuple[str, ...]:
    modules = [name for name, _ in model.named_modules()]
    return tuple(dict.fromkeys([*modules, *(name for name, _ in model.named_parameters(remove_duplicate=False))]))


def _fields(config: Any) -> list[str]:
    return [
        *_COUNTED,
        *(field for field in sorted(vars(config)) if field.endswith("_pattern") and field not in _COUNTED),
    ]


def _expressions(config: Any) -> Iterator[tuple[str, str, bool]]:
    """(field, expression, whether it must match the whole name) of all that is more than a plain name."""
    for field in _fields(config):
        value = getattr(config, field, None)
        if isinstance(value, str) and field in _WHOLE:
            if not _PLAIN.fullmatch(value):
                yield field, value, True
            continue
        entries = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple, set, dict)) else []
        if field == "layers_pattern":
            around: Sequence[str] = _ROUND_LAYERS
        else:
            around = _ROUND_KEYS if isinstance(value, Mapping) else _ROUND_NAMES
        for entry in entries:
            if isinstance(entry, str) and not _PLAIN.fullmatch(entry):
                yield from ((field, form.replace("{0}", entry), False) for form in around)


@functools.lru_cache(maxsize=32)
def _tried(expressions: tuple[tuple[str, str, bool], ...], names: tuple[str, ...]) -> dict[str, str]:
    if not expressions:
        return {}
    seconds = _SECONDS + _SECONDS_EACH * len(names) * len(expressions)
    content = json.dumps([seconds, _MOST_MEMORY, names, [(text, whole) for _, text, whole in expressions]])
    try:
        # -I -S: nothing of the user's environment or site is read, so that it starts in a few milliseconds
        trial = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise AdapterLabError(
            f"The regular expressions of this config can't be tried out, since no process can be started ({error}): "
            "name the modules one by one in target_modules."
        ) from error
    with trial:
        try:
            heard, _ = trial.communicate(content, timeout=_patience(seconds))
        except subprocess.TimeoutExpired:
            trial.kill()
            heard, _ = trial.communicate()
        finally:
            trial.kill()
    return _verdict(heard.splitlines(), expressions)


def _patience(seconds: float) -> float:
    """How long to wait: where the process ends itself by its own time, a busy machine may make it longer."""
    import signal

    return 10 * seconds if hasattr(signal, "setitimer") else seconds


def _verdict(lines: list[str], expressions: tuple[tuple[str, str, bool], ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    at = 0
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "wrong":
            found[expressions[at][0]] = f"{_short(expressions[at][1])} is no regular expression ({rest})"
        elif word.isdecimal():
            at = int(word)
    if lines[-1:] != ["end"]:
        field, text, _ = expressions[at]
        found[field] = f"the regular expression {_short(text)} takes too long on this model's module names"
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")
