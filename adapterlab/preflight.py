"""Does this adapter fit this model? Read from the config and the weights file's header, before anything is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.methods import check_config, is_drawn
from adapterlab.mounts import MAGNITUDE, PREFIX, adapter_state, inject, skeleton, unwrap

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

_LISTED = 4  # how many keys a message names before it counts the rest


@dataclass
class Preflight:
    """The verdict on one adapter: `problems` forbid loading it, `notes` are worth knowing.

    `tensors` is how many of the layers' tensors the file holds, `expected` how many there are.
    """

    source: str
    method: str
    tensors: int = 0
    expected: int = 0
    parameters: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise one `AdapterLabError` that lists all problems, if there are any."""
        if self.problems:
            raise AdapterLabError(f"{self.source!r} does not fit this model: " + " Also, ".join(self.problems))


def read_config(raw: dict[str, Any], source: str) -> PeftConfig:
    """A `PeftConfig` of the raw JSON mapping; nothing that it names is imported or executed.

    Raises `AdapterLabError` for a method, task or option that can't live in a lab, or values that PEFT refuses.
    """
    import warnings

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    check_config(raw, source)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[raw["peft_type"]]
    known = {key: value for key, value in raw.items() if key not in ("auto_mapping", "peft_version")}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # newer PEFT wrote this file
            config: Any = cls.from_peft_type(**known)
    except (TypeError, ValueError, KeyError) as error:
        raise AdapterLabError(
            f"{source!r}: its adapter_config.json is not what {cls.__name__} takes: {error}"
        ) from error
    config.inference_mode = True
    return config


def header_shapes(weights_file: Path) -> dict[str, tuple[int, ...]]:
    """Shape by key in an adapter's weights file (keys without PEFT's prefix), reading no tensor of a safetensors file."""
    try:
        if weights_file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(weights_file), framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return _unprefixed(shapes, weights_file)
        return {key: tuple(tensor.shape) for key, tensor in read_weights(weights_file).items()}
    except AdapterLabError:
        raise
    except Exception as error:  # safetensors raises its own types, by version
        raise AdapterLabError(f"{str(weights_file)!r} can't be read as adapter weights: {error}") from error


def read_weights(weights_file: Path) -> dict[str, Any]:
    """The tensors of an adapter's file on the CPU, keys without PEFT's prefix. A `.bin` is unpickled as weights only."""
    import torch

    try:
        if weights_file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(str(weights_file))
        else:
            state = torch.load(weights_file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its format's reader raises
        raise AdapterLabError(f"{str(weights_file)!r} can't be read as adapter weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise AdapterLabError(f"{str(weights_file)!r} holds no plain mapping of names to tensors.")
    return _unprefixed(state, weights_file)


def _unprefixed(state: dict[str, Any], weights_file: Path) -> dict[str, Any]:
    # DoRA's magnitudes, as the lab saves them so that transformers finds them too (storage.py)
    plain = {key.removeprefix(PREFIX).replace(f"{MAGNITUDE}.weight", MAGNITUDE): value for key, value in state.items()}
    if len(plain) != len(state):
        raise AdapterLabError(
            f"{str(weights_file)!r} holds tensors twice, with and without {PREFIX!r} or '.weight': which are meant?"
        )
    return plain


def expected_shapes(model: nn.Module, config: PeftConfig, name: str) -> dict[str, tuple[int, ...]]:
    """Shape by key that an adapter with this config would save, as `expected_tensors`, pruned triplets left out."""
    return _shrunk({key: tuple(tensor.shape) for key, tensor in expected_tensors(model, config, name).items()}, config)


def expected_tensors(model: nn.Module, config: PeftConfig, name: str) -> dict[str, Any]:
    """The tensors, without memory, of a fresh adapter with this config by the keys it would save, found in a skeleton.

    `model` must be bare; it is left as it was, and no memory is taken for the adapter. Raises what PEFT raises.
    """
    with skeleton(model) as twin:
        inject_without_memory(config, twin, name)
        return {key: tensor.to("meta") for key, tensor in adapter_state(twin, name).items()}


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
    import torch

    try:
        with torch.device("meta"):
            return inject(config, twin, name, empty=True)
    except (NotImplementedError, RuntimeError):
        unwrap(twin)
        twin.__dict__.pop("peft_config", None)
        return inject(config, twin, name)


def compute_preflight(
    model: Any, config: PeftConfig, shapes: dict[str, tuple[int, ...]], source: str, base_path: str
) -> Preflight:
    """Compare what the file holds with what the model's layers would take; every mismatch is listed.

    A key that no layer of this config owns is a problem, not a curiosity: PEFT would write it into the base.
    """
    method = str(getattr(config.peft_type, "value", config.peft_type))
    flight = Preflight(source, method, expected=0)
    try:
        expected = expected_shapes(model, config, "preflight")
    except Exception as error:  # whatever PEFT says of target_modules, ranks or layers is the verdict
        flight.problems.append(f"PEFT can't put it into {type(model).__name__}: {_first_sentence(error)}")
        return flight
    flight.expected = len(expected)
    foreign = [key for key in shapes if key not in expected]
    matched = [key for key in shapes if key in expected]
    flight.tensors = len(matched)
    flight.parameters = sum(math.prod(shapes[key]) for key in matched)
    if foreign:
        flight.problems.append(
            f"{len(foreign)} of its {len(shapes)} tensors belong to no layer of its own config and would land in the "
            f"base or nowhere: {_listed(foreign)}."
        )
    wrong = [key for key in matched if shapes[key] != expected[key]]
    if wrong:
        details = [f"{key} is {list(shapes[key])}, the model needs {list(expected[key])}" for key in wrong]
        flight.problems.append(
            f"{len(wrong)} tensors have another shape ({_listed(details)}): it was made for another base."
        )
    if not matched:
        flight.problems.append("none of its tensors matches a layer of this model.")
    missing = len(expected) - len(matched)
    if matched and missing:
        gone = [key for key in expected if key not in shapes]
        said = f"{len(matched)} of {len(expected)} tensors loaded; missing from the file: {_listed(gone)}."
        # A missing LoRA pair starts as zero and adds nothing, unless the config asks for random numbers.
        (flight.problems if is_drawn(config) else flight.notes).append(said)
    theirs = getattr(config, "base_model_name_or_path", None)
    if isinstance(theirs, str) and theirs and base_path and theirs.rstrip("/") != base_path.rstrip("/"):
        flight.notes.append(f"It names {theirs!r} as its base, this lab's is {base_path!r}.")
    return flight


def _listed(items: list[str]) -> str:
    rest = len(items) - _LISTED
    return "; ".join(items[:_LISTED]) + (f"; and {rest} more" if rest > 0 else "")


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"
