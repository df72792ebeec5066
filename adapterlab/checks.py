"""What a preflight compares, one check after the other. Each tells all it finds, and none keeps the next from looking."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterlab.config_values import wrong_values
from adapterlab.errors import AdapterLabError
from adapterlab.file_checks import Shapes, check_tensors, check_vocabulary, leave_copies, listed, read_shapes
from adapterlab.methods import PROVISIONAL_TOTAL_STEP, config_obstacles
from adapterlab.mounts import PREFIX
from adapterlab.patterns import pattern_objections
from adapterlab.preflight import Preflight, expected_shapes, make_known_config, shown

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

    from adapterlab.hub import AdapterFiles

_MOST_WRONG = 3  # fields that PEFT refuses at once, and that are still told one by one
_PROBE = "preflight"


def examine(
    model: Any, files: AdapterFiles, base_path: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PeftConfig | None, Preflight]:
    """The adapter's config, None where it can't be used, and the verdict. `model` must be bare and is left as it was.

    Reads the config, the header of a safetensors file, and a tokenizer's JSON beside it; of the tensors only those that may be
    copies of the base's. Raises nothing for a bad adapter.
    """
    raw = files.config
    flight = Preflight(files.source, str(raw.get("peft_type")))
    try:
        config = check_options(flight, raw)
        check_base(flight, model, raw, base_path)
        shapes = read_shapes(flight, files)
        expected = None if config is None else check_targets(flight, model, config)
        if shapes is not None:
            own = leave_copies(flight, model, files, expected, shapes)
            check_tensors(flight, model, config, expected, own)
        check_vocabulary(flight, model, raw, shapes or {}, files, tokenizer)
    except Exception as error:  # a config may hold whatever JSON can: that it can't be examined is a verdict, too
        flight.tell(f"it can't be examined any further: {_words(error)}.", [], problem=True)
        return None, flight
    return (config if flight.ok else None), flight


def check_options(flight: Preflight, raw: Mapping[str, Any]) -> PeftConfig | None:
    """Method, task and options; gives the config without what is refused, None where there is none to be had."""
    reasons = config_obstacles(raw, flight.source)
    for field, reason in reasons.items():
        check = "method" if field in ("peft_type", "task_type") else "option"
        flight.tell(reason, [(check, field, raw.get(field), "what a lab can host")], problem=True)
    if "peft_type" in reasons:
        return None
    usable = {field: value for field, value in raw.items() if field not in reasons}
    strange = _unknown_fields(usable)
    if strange:
        written = raw.get("peft_version")
        flight.tell(
            f"Options that the installed PEFT does not know are left out: {listed(strange)}"
            + (f" (the file is of PEFT {written})" if isinstance(written, str) else "")
            + ".",
            [("option", field, usable[field], "an option that PEFT knows") for field in strange],
            problem=False,
        )
    wrong = wrong_values(usable)
    usable = {field: value for field, value in usable.items() if field not in wrong}
    config, refused = _make_config(usable)
    wrong |= refused
    if wrong:
        flight.tell(
            "its adapter_config.json has values that PEFT does not take: "
            + "; ".join(
                f"{field}={shown(repr(raw.get(field)), 80)} ({why})" if field else why for field, why in wrong.items()
            )
            + ".",
            [("option", field, raw.get(field), why) for field, why in wrong.items()],
            problem=True,
        )
    return config


def _unknown_fields(raw: Mapping[str, Any]) -> list[str]:
    """Fields with a value that PEFT would leave out; those that say nothing are how a newer PEFT writes its defaults."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[raw["peft_type"]]
    known = {each.name for each in dataclasses.fields(cls)} | {"auto_mapping", "peft_version"}
    return [field for field, value in raw.items() if field not in known and value not in (None, False, "", [], {})]


def _make_config(raw: dict[str, Any]) -> tuple[PeftConfig | None, dict[str, str]]:
    """PEFT's config without the fields that it refuses, and what it says of these."""
    try:
        return make_known_config(raw), {}
    except Exception as error:  # a config's own checks raise whatever its values provoke
        first = _words(error)
    fields = [field for field in raw if field != "peft_type"]
    for count in range(1, _MOST_WRONG + 1):
        for culprits in itertools.combinations(fields, count):
            rest = {field: value for field, value in raw.items() if field not in culprits}
            if raw["peft_type"] == "ADALORA":  # which takes no config without it
                rest.setdefault("total_step", PROVISIONAL_TOTAL_STEP)
            try:
                config = make_known_config(rest)
            except Exception:
                continue  # another one is wrong, too
            return config, {field: _objection({**rest, field: raw[field]}) or first for field in culprits}
    return None, {"": first}


def _objection(raw: dict[str, Any]) -> str:
    try:
        make_known_config(raw)
    except Exception as error:
        return _words(error)
    return ""


def check_base(flight: Preflight, model: Any, raw: Mapping[str, Any], base_path: str) -> None:
    """The base that the config names, and its class where the config has that."""
    theirs = raw.get("base_model_name_or_path")
    if isinstance(theirs, str) and theirs and base_path and theirs.rstrip("/") != base_path.rstrip("/"):
        flight.tell(
            f"It names {theirs!r} as its base, this lab's is {base_path!r}.",
            [("base model", "base_model_name_or_path", theirs, base_path)],
            problem=False,
        )
    mapping = raw.get("auto_mapping")
    cls = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(cls, str) and cls and cls not in {each.__name__ for each in type(model).__mro__}:
        flight.tell(
            f"It was made on a {cls}, this lab's base is a {type(model).__name__}.",
            [("base model", "architecture", cls, type(model).__name__)],
            problem=False,
        )


def check_targets(flight: Preflight, model: Any, config: Any) -> Shapes | None:
    """What the config wants to adapt against the modules there are; gives the tensors of those that can be adapted, shape by
    key, None if there are none."""
    objections = pattern_objections(config, model)
    if objections:
        told = "; ".join(f"{field}: {why}" for field, why in objections.items())
        flight.tell(
            f"PEFT would not end, or fail, with {told}.",
            [("option", field, getattr(config, field), why) for field, why in objections.items()],
            problem=True,
        )
        return None
    modules = [path for path, _ in model.named_modules() if path]
    parameters = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    has = ", ".join(sorted({path.rpartition(".")[2] for path, module in model.named_modules() if _has_weight(module)}))
    parameters_too = bool(getattr(config, "target_parameters", None))  # for them alone is enough for PEFT
    for field, paths in (("target_modules", modules), ("modules_to_save", modules), ("target_parameters", parameters)):
        names = _names(getattr(config, field, None))
        lacking = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in paths)]
        if lacking:
            flight.tell(
                f"{len(lacking)} of its {len(names)} {field} name nothing in this model ({listed(lacking)}), which has {has}.",
                [("target modules", name, field, has) for name in lacking],
                problem=field == "target_modules" and len(lacking) == len(names) and not parameters_too,
            )
    _check_layers(flight, modules, config)
    targets = getattr(config, "target_modules", None)
    there = [name for name in _names(targets) if any(f".{path}".endswith(f".{name}") for path in modules)]
    if isinstance(targets, (list, set, tuple)) and targets and not there and not parameters_too:
        return None
    try:
        return expected_shapes(model, config, _PROBE)
    except Exception as error:  # whatever PEFT says of modules, ranks or layers is the verdict
        check = "quantization" if isinstance(error, AdapterLabError) and "-bit" in str(error) else "target modules"
        flight.tell(
            f"PEFT can't put it into {type(model).__name__}: {_words(error)}",
            [(check, flight.method, _words(error), "layers that PEFT has for them")],
            problem=True,
        )
    return _of_those_that_work(model, config, there)


def _of_those_that_work(model: Any, config: Any, names: list[str]) -> Shapes | None:
    """The tensors of those target modules that PEFT can adapt, each tried alone."""
    import copy

    fitting, found = copy.deepcopy(config), {}
    for name in names if len(names) > 1 else ():
        fitting.target_modules = {name}
        with contextlib.suppress(Exception):  # it has been told with the whole config's error
            found.update(expected_shapes(model, fitting, _PROBE))
    return found or None


def _check_layers(flight: Preflight, modules: list[str], config: Any) -> None:
    """`layers_to_transform` against the layers there are."""
    wanted = getattr(config, "layers_to_transform", None)
    wanted = [wanted] if isinstance(wanted, int) else wanted
    if not isinstance(wanted, list):
        return
    numbers = {int(part) for path in modules for part in path.split(".") if part.isdecimal()}
    beyond = [number for number in wanted if number not in numbers]
    if beyond:
        flight.tell(
            f"It adapts layers that this model has not ({listed(map(str, beyond))}): there are {max(numbers, default=-1) + 1}.",
            [("target modules", f"layer {number}", "layers_to_transform", sorted(numbers)) for number in beyond],
            problem=False,
        )


def _names(value: Any) -> list[str]:
    """Names out of a config's list of modules; a single text is a pattern or "all-linear"."""
    return sorted(name for name in value if isinstance(name, str)) if isinstance(value, (list, set, tuple)) else []


def _has_weight(module: Any) -> bool:
    return module._parameters.get("weight") is not None


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()).removeprefix(PREFIX) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"
