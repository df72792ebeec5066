"""Does this adapter fit this model? Read from the config and the weights file's header, before anything is touched.

The verdict is a `Preflight`; what is compared stands in checks.py. Here are the readers, and what an adapter would hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterlab.config_values import wrong_values
from adapterlab.errors import AdapterLabError, printable
from adapterlab.methods import check_config, method_label
from adapterlab.mounts import PREFIX, adapter_state, inject, skeleton, unwrap
from adapterlab.pagetext import escape, table_html, without_maths
from adapterlab.quantization import base_module, packed_as, packed_objection, packed_obstacle
from adapterlab.quiet import warnings_ignored
from adapterlab.weights import header_shapes as header_shapes
from adapterlab.weights import read_weights as read_weights

if TYPE_CHECKING:
    import pandas as pd
    from peft import PeftConfig
    from torch import nn

_COLUMNS = ("check", "item", "found", "expected", "problem")
_SHOWN = 40  # rows of the table before the rest is only counted
_LONGEST = 300  # letters of a cell: a stranger's file may hold names of any length
_LONGEST = 1000  # letters of a sentence: what stands in a file may be of any length
_MOST_TOLD = 4000  # letters of all sentences in one error


@dataclass(frozen=True)
class Mismatch:
    """One thing that is otherwise than this lab has it. `check`: method, option, base model, target modules, quantization,
    tensors, shapes or vocabulary. `problem`: whether it forbids loading."""

    check: str
    item: str
    found: str
    expected: str
    problem: bool


@dataclass
class Preflight:
    """The verdict on one adapter: `problems` forbid loading it, `notes` are worth knowing; both are sentences.

    `tensors` is how many of the layers' tensors the file holds, `expected` how many there are, `parameters` how many
    values those in the file have. `left_out`: tensors of the base itself, copied into the file and equal to the base's, which
    are not loaded. `mismatches` has one entry for each thing that differs, however many the sentences name; `to_frame()`
    gives them as a table.

    >>> saved = lab.save_adapter("pirate", folder / "pirate")
    >>> preflight = lab.check_adapter(saved)
    >>> preflight.problems, preflight.tensors == preflight.expected
    ([], True)
    """

    source: str
    method: str
    tensors: int = 0
    expected: int = 0
    parameters: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list, repr=False)
    left_out: list[str] = field(default_factory=list, repr=False)

    @property
    def ok(self) -> bool:
        """Whether it would load: nothing stands in `problems`.

        >>> lab.check_adapter(adapter_for_opt).ok
        False
        """
        return not self.problems

    @property
    def verdict(self) -> str:
        """One line: whether it fits, and how large it is or how much is wrong.

        >>> lab.check_adapter(adapter_for_opt).verdict
        '... does not fit: ...'
        """
        if self.ok:
            size = f"{self.tensors} of {self.expected} tensors, {self.parameters:,} parameters"
            return f"{self.source} fits: {method_label(self.method)}, {size}."
        count = len(self.problems)
        return f"{self.source} does not fit: {count} problem{'s' if count > 1 else ''}."

    def to_frame(self) -> pd.DataFrame:
        """One row per mismatch: check, item, found, expected (texts), problem (whether it forbids loading).

        >>> frame = lab.check_adapter(adapter_for_opt).to_frame()
        >>> frame.query("check == 'target modules'")["item"].tolist()
        ['fc1', 'fc2']
        """
        import pandas as pd

        rows = [(each.check, each.item, each.found, each.expected, each.problem) for each in self.mismatches]
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def raise_for_problems(self) -> None:
        """Raise one `AdapterLabError` that lists all problems, if there are any.

        >>> lab.check_adapter(adapter_for_opt).raise_for_problems()
        Traceback (most recent call last):
            ...
        adapterlab.errors.AdapterLabError: '...' does not fit this model: ...
        """
        if self.problems:
            kind = any(each.problem and each.check in ("method", "option") for each in self.mismatches)
            what = "can't be used in the lab" if kind else "does not fit this model"
            raise AdapterLabError(f"{self.source!r} {what}: " + _joined(self.problems))

    def tell(self, text: str, mismatches: list[tuple[str, str, Any, Any]], *, problem: bool) -> None:
        """Add a sentence, and (check, item, found, expected) of each thing it is about.

        >>> preflight = Preflight("mine", "LORA")
        >>> preflight.tell("Its rank is 0.", [("option", "r", 0, "1 or more")], problem=True)
        >>> preflight.problems
        ['Its rank is 0.']
        """
        (self.problems if problem else self.notes).append(shown(text, _LONGEST))
        self.mismatches += [
            Mismatch(check, shown(item), shown(found), shown(expected), problem)
            for check, item, found, expected in mismatches
        ]

    def details(self) -> str:
        """All mismatches as lines of text; "" if there are none.

        >>> print(lab.check_adapter(adapter_for_opt).details())
        base model · base_model_name_or_path: facebook/opt-350m; expected HuggingFaceTB/SmolLM2-135M-Instruct
        base model · architecture: OPTForCausalLM; expected LlamaForCausalLM
        ...
        """
        return "\n".join(f"{m.check} · {m.item}: {m.found}; expected {m.expected}" for m in self.mismatches)

    def __str__(self) -> str:
        lines = [self.verdict, *(f"- {text}" for text in self.problems), *(f"- Note: {text}" for text in self.notes)]
        return "\n".join([*lines, *(["", self.details()] if self.mismatches else [])])

    def _repr_html_(self) -> str:
        items = [*self.problems, *(f"Note: {text}" for text in self.notes)]
        said = "".join(f"<li>{escape(item)}</li>" for item in items)
        table = ""
        if self.mismatches:
            frame = self.to_frame()
            more = f"<p>and {len(frame) - _SHOWN} more, in to_frame()</p>" if len(frame) > _SHOWN else ""
            rows = table_html(frame.head(_SHOWN), longest=_LONGEST)
            table = f"<details><summary>{len(frame)} mismatches</summary>{rows}{more}</details>"
        return without_maths(f"<p><b>{escape(self.verdict)}</b></p>" + (f"<ul>{said}</ul>" if said else "") + table)


def shown(value: Any, most: int = 300) -> str:
    """What a file says, as text to be read: not too long, and without letters that act on the text around it."""
    text = str(value)
    if len(text) <= most and text.isprintable() and text.isascii():
        return text
    return printable(text if len(text) <= most else f"{text[: most - 1]}…")


def _joined(problems: list[str]) -> str:
    """As many of them as an error can hold that somebody reads, and how many more there are."""
    said = problems[0]
    for place, problem in enumerate(problems[1:], 1):
        if len(said) + len(problem) > _MOST_TOLD:
            return f"{said} And {len(problems) - place} more: lab.check_adapter(…) tells all."
        said += f" Also, {problem}"
    return said


def read_config(raw: dict[str, Any], source: str) -> PeftConfig:
    """A `PeftConfig` of the raw JSON mapping; nothing that it names is imported or executed.

    Raises `AdapterLabError` for a method, task or option that can't live in a lab, or values that PEFT refuses.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    check_config(raw, source)
    wrong = wrong_values(raw)
    if wrong:
        listed = "; ".join(f"{field}={shown(repr(raw[field]), 80)} ({why})" for field, why in wrong.items())
        raise AdapterLabError(f"{source!r}: its adapter_config.json has values that PEFT does not take: {listed}.")
    try:
        return make_known_config(raw)
    except Exception as error:  # a config's own checks raise whatever its values provoke
        name = PEFT_TYPE_TO_CONFIG_MAPPING[raw["peft_type"]].__name__
        raise AdapterLabError(f"{source!r}: its adapter_config.json is not what {name} takes: {error}") from error


def make_known_config(raw: dict[str, Any]) -> PeftConfig:
    """PEFT's config of a mapping whose method it knows, fields that it does not know left out. Raises what PEFT raises."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {key: value for key, value in raw.items() if key not in ("auto_mapping", "peft_version")}
    with warnings_ignored("Unexpected keyword arguments"):  # newer PEFT wrote this file
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[raw["peft_type"]].from_peft_type(**known)
    config.inference_mode = True
    return config


def expected_shapes(model: nn.Module, config: PeftConfig, name: str) -> dict[str, tuple[int, ...]]:
    """Shape by key that an adapter with this config would save, as `expected_tensors`, pruned triplets left out."""
    return _shrunk({key: tuple(tensor.shape) for key, tensor in expected_tensors(model, config, name).items()}, config)


def expected_tensors(model: nn.Module, config: PeftConfig, name: str) -> dict[str, Any]:
    """The tensors, without memory, of a fresh adapter with this config by the keys it would save, found in a skeleton.

    `model` must be bare; it is left as it was, and no memory is taken for the adapter. Raises what PEFT raises, and
    `AdapterLabError` for what can't stand over 8-bit or 4-bit weights.
    """
    with skeleton(model) as twin:
        inject_checked(config, twin, name)
        return {key: tensor.to("meta") for key, tensor in adapter_state(twin, name).items()}


def inject_checked(config: PeftConfig, model: Any, name: str) -> None:
    """`inject_without_memory` into `model`; `AdapterLabError` for what can't stand over 8-bit or 4-bit weights. Raises what
    PEFT raises."""
    kind = next((found for module in model.modules() if (found := packed_as(module))), None)
    try:
        inject_without_memory(config, model, name)
    except Exception as error:
        why = None if kind is None else _packed_objection(model, config, kind)
        if why is not None:
            raise AdapterLabError(why) from error
        raise
    if kind is not None:
        why = packed_obstacle(_over_packed(model), str(getattr(config.peft_type, "value", config.peft_type)), kind)
        if why is not None:
            raise AdapterLabError(why)


def _over_packed(twin: Any) -> list[Any]:
    """PEFT's layers and wrappers over 8-bit or 4-bit weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in twin.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    return [layer for layer in layers if packed_as(base_module(layer)) is not None]


def _packed_objection(model: Any, config: Any, quantization: str) -> str | None:
    """What is known to go wrong over packed weights, after PEFT has failed and left no layers to look at."""
    names = getattr(config, "modules_to_save", None) or ()
    paths = [path for path, module in model.named_modules() if packed_as(module)]
    whole = any(f".{path}".endswith(f".{name}") for path in paths for name in names)
    return packed_objection(str(getattr(config.peft_type, "value", config.peft_type)), quantization, whole=whole)


def _shrunk(shapes: dict[str, tuple[int, ...]], config: Any) -> dict[str, tuple[int, ...]]:
    """AdaLoRA's saved shapes: `rank_pattern` names each lora_E with a mask of the triplets that were kept."""
    if not hasattr(config, "init_r"):
        return shapes
    for key, mask in (config.rank_pattern or {}).items():
        path = key.removeprefix(PREFIX).partition(".lora_E")[0]
        if not isinstance(mask, list) or f"{path}.lora_E" not in shapes:
            raise AdapterLabError(f"its rank_pattern names {key!r}, which is no AdaLoRA layer of this model.")
        kept = sum(bool(item) for item in mask)
        shapes[f"{path}.lora_E"] = (kept, 1)
        shapes[f"{path}.lora_A"] = (kept, shapes[f"{path}.lora_A"][1])
        shapes[f"{path}.lora_B"] = (shapes[f"{path}.lora_B"][0], kept)
    return shapes


def inject_without_memory(config: PeftConfig, twin: Any, name: str) -> Any:
    """PEFT's tuner around `twin`, its weights on the meta device.

    PEFT's `low_cpu_mem_usage` alone makes each tensor for real and throws it away, so an absurd rank would take the
    memory; and IA3 over quantised layers can't stay on meta at all: its few vectors are made for real (issue 2).
    """
    from adapterlab.blueprint import without_values

    try:
        with without_values():
            return inject(config, twin, name, empty=True)
    except (NotImplementedError, RuntimeError):
        unwrap(twin)
        twin.__dict__.pop("peft_config", None)
        return inject(config, twin, name)
