"""PEFT's methods as the lab sees them: which can hang on a base, under which configs, and when one does nothing yet."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

from adapterlab.columns import as_plain
from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftConfig

    from adapterlab.mounts import Mounted

# AdaLoRA wants to know how long training will be; training replaces this by the Trainer's own count.
PROVISIONAL_TOTAL_STEP = 1000

_PRETTY = {
    "LORA": "LoRA", "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "RANDLORA": "RandLora", "FOURIERFT": "FourierFT",
    "GRALORA": "GraLoRA", "HIRA": "HiRA", "LILY": "Lily", "MISS": "MiSS", "PEANUT": "PEANuT", "ROAD": "RoAd",
    "SHIRA": "SHiRA", "WAVEFT": "WaveFT", "DELORA": "DeLoRA", "GLORA": "GLoRA", "LN_TUNING": "LN tuning",
}  # fmt: skip
_BITS = {"8bit": "8-bit", "4bit": "4-bit"}
_LOADED_CALL = "Plain PEFT runs it: PeftModel.from_pretrained(model, {source!r})."
_FRESH_CALL = "Plain PEFT makes one: get_peft_model(model, config)."
_PROMPT_LEARNING = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT",
)  # fmt: skip
# Those that say so by `uses_shared_state` since PEFT 0.21
_SHARED_STATE = ("FROD", "PVERA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
_GENERATING_TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
_NEEDS_MORE_THAN_LAYERS = {
    "kasa_config": "KaSA rewrites the base weights, and base must stay base",
    "layer_replication": "layer_replication rebuilds the base with more layers, and base must stay base",
    "alora_invocation_tokens": "aLoRA looks for its invocation tokens outside the layers, in PeftModel's own forward",
    "arrow_config": "Arrow routes between adapters, and the lab runs each by itself",
}
_BASE_CHANGING_INIT = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")
# Methods that were held against dequantised weights, one by one (tests/test_capabilities.py). Of the others some fail over
# packed weights, and some (HRA, PEANuT) take the packed numbers for the weights without a word.
_OVER_8BIT = frozenset({
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "FOURIERFT", "GRALORA", "HIRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR",
    "LORA", "MISS", "OFT", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "WAVEFT",
})  # fmt: skip
_TAKE_THE_SHAPE = frozenset({"DEFT", "LOHA", "LOKR"})  # of the weight, which 4-bit weights don't have
_WRITE_IN_PLACE = frozenset({"C3A", "GRALORA"})  # into what the base's layer gives
_NEVER_MERGED = frozenset({"LILY"})


def method_label(method: str) -> str:
    """PEFT's type as its paper spells it: `LORA` → `LoRA`."""
    return _PRETTY.get(method, method)


def make_config(config_or_method: Any, **config: Any) -> PeftConfig:
    """A `PeftConfig` of its own (never the caller's object) from a config or a method's name with its fields.

    AdaLoRA without `total_step` gets a provisional one, and with `init_r` alone half of it as `target_r`: PEFT's own
    8 need not be below it. NumPy's numbers become Python's, since a config is written as JSON. Raises `AdapterLabError`
    for an unknown method, an unknown field or values PEFT refuses.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if isinstance(config_or_method, PeftConfig):
        if config:
            raise AdapterLabError(
                f"{', '.join(map(repr, config))} given beside a {type(config_or_method).__name__}: set them in the config."
            )
        own = copy.deepcopy(config_or_method)
        for each in dataclasses.fields(own):
            setattr(own, each.name, as_plain(getattr(own, each.name)))
        return own
    if not isinstance(config_or_method, str):
        raise AdapterLabError(f"{config_or_method!r} is neither a method's name such as 'lora' nor a PeftConfig.")
    known = {str(getattr(kind, "value", kind)): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    cls = known.get(config_or_method.upper())
    if cls is None:
        usable = ", ".join(sorted(kind.lower() for kind in known if unsupported_reason(kind) is None))
        raise AdapterLabError(f"{config_or_method!r} is no PEFT method. Methods the lab can add: {usable}.")
    fields = as_plain(config)
    if cls.__name__ == "AdaLoraConfig":
        fields.setdefault("total_step", PROVISIONAL_TOTAL_STEP)
        if isinstance(fields.get("init_r"), int):
            fields.setdefault("target_r", max(1, fields["init_r"] // 2))
    try:
        return cls(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise AdapterLabError(f"{cls.__name__} can't be made of {fields}: {error}") from error


def _plain_call(source: str, fresh: bool) -> str:
    return _FRESH_CALL if fresh else _LOADED_CALL.format(source=source)


def unsupported_reason(method: str, source: str = "folder", *, fresh: bool = False) -> str | None:
    """Why adapters of this PEFT type can't hang on a bare base, with the plain call that runs them; None if they can."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    call = _plain_call(source, fresh)
    if method in _PROMPT_LEARNING:
        return f"{method} puts virtual tokens or prompts before the text instead of adapting layers. {call}"
    tuners = {str(getattr(kind, "value", kind)): cls for kind, cls in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    if method not in tuners:
        return f"{method!r} is no method that the installed PEFT knows."
    if method in ("SHADOW", "XLORA", "POLY"):
        return f"{method} steers the whole model from outside its layers. {call}"
    if method == "OSF":
        return f"{method} takes the base weights apart, and base must stay base. {call}"
    if method in _SHARED_STATE or getattr(tuners[method], "uses_shared_state", False):
        return f"{method} shares one state among all its layers, which PEFT can't inject into a bare model. {call}"
    return None


def check_config(config: PeftConfig | Mapping[str, Any], source: str, *, fresh: bool = False) -> None:
    """Raise `AdapterLabError` if an adapter with this config can't live in a lab; all reasons in one message.

    Takes a config object or the raw mapping from an `adapter_config.json`, of which nothing is executed. fresh: it is to be
    made, and `source` is its name; else that is where its files are.
    """
    reasons = config_obstacles(config, source, fresh=fresh)
    if reasons:
        raise AdapterLabError(f"{source!r} can't be used in the lab: " + " Also, ".join(reasons.values()))


def config_obstacles(config: PeftConfig | Mapping[str, Any], source: str, *, fresh: bool = False) -> dict[str, str]:
    """Why an adapter with this config can't live in a lab: field of the config → reason; empty if it can."""
    get = config.get if hasattr(config, "get") else lambda key, default=None: getattr(config, key, default)
    reasons = {}
    reason = unsupported_reason(_plain(get("peft_type", None)), source, fresh=fresh)
    if reason:
        reasons["peft_type"] = reason
    task = _plain(get("task_type", None))
    if task not in _GENERATING_TASKS:
        reasons["task_type"] = (
            f"its task is {task}, and the lab compares generated text (CAUSAL_LM, SEQ_2_SEQ_LM). "
            + _plain_call(source, fresh)
        )
    bias = get("bias", "none")
    if bias not in (None, "none"):
        reasons["bias"] = f"bias={bias!r} trains the base's own biases, and base must stay base: use bias='none'."
    init = get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INIT):
        reasons["init_lora_weights"] = (
            f"init_lora_weights={init!r} changes the base weights, and base must stay base: convert the adapter with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…), or use True or 'gaussian'."
        )
    return reasons | {field: f"{why}." for field, why in _NEEDS_MORE_THAN_LAYERS.items() if get(field, None)}


def over_packed_obstacle(method: str, quantization: str) -> str | None:
    """Why this PEFT type's layers can't stand over weights of this quantization ("8bit" or "4bit"), or None if they can."""
    label, bits = method_label(method), _BITS[quantization]
    if method not in _OVER_8BIT:
        return (
            f"{label} works with the base's weights themselves, and PEFT has no layers of it for {bits} weights: open the "
            "base without quantization."
        )
    if quantization == "4bit" and method in _TAKE_THE_SHAPE:
        return (
            f"PEFT's {label} goes by the shape of the base's weights, and 4-bit weights are packed into another: open the "
            "base in 8-bit or without quantization."
        )
    if method == "OFT" and importlib.util.find_spec("peft.tuners.oft.bnb") is not None:
        return f"PEFT 0.20 can't make its OFT layers for {bits} weights: use PEFT 0.21, or a base without quantization."
    return None


def train_packed_obstacle(method: str, quantization: str) -> str | None:
    """Why adapters of this PEFT type learn nothing over weights of this quantization, or None if they do."""
    if method not in _WRITE_IN_PLACE:
        return None
    return (
        f"{method_label(method)} writes into what the base's layers give back, which autograd forbids over "
        f"{_BITS[quantization]} layers: train it on a base without quantization."
    )


def never_merged(method: str) -> str | None:
    """Why adapters of this PEFT type have no ΔW that could be put into a weight, or None if they have."""
    if method in _NEVER_MERGED:
        return f"PEFT can't merge {method_label(method)}: it has no ΔW of its own for each layer"
    return None


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def rank_of(config: PeftConfig) -> int | None:
    """The rank a config asks for (`init_r` for AdaLoRA), or None where the method has none."""
    for field in ("init_r", "r"):
        value = getattr(config, field, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value or None  # OFT's is 0 where its block size decides
    return None


def is_noop(mounted: Mounted, name: str, *, fresh: bool = True) -> bool:
    """True if the adapter changes nothing: all B (or an embedding's A) or λ zero, all IA3 scales one.

    For methods whose tensors can't tell, a `fresh` adapter is a no-op unless its config asked for random numbers.
    """
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.lora.layer import LoraLayer

    for layer in mounted.layers.values():
        if isinstance(layer, IA3Layer):
            if bool((layer.ia3_l[name] != 1).any()):
                return False
        elif isinstance(layer, AdaLoraLayer):
            if bool((layer.lora_E[name] != 0).any()):
                return False
        elif isinstance(layer, LoraLayer) and not layer.lora_variant.get(name):
            inner: Any = layer
            if name in inner.lora_embedding_B:  # where PEFT draws B, and A starts at zero
                if all(bool((side[name] != 0).any()) for side in (inner.lora_embedding_A, inner.lora_embedding_B)):
                    return False
            elif any(bool((tensor != 0).any()) for tensor in inner.lora_B[name].parameters()):
                return False
        else:
            return fresh and not is_drawn(mounted.config)
    return True


def is_drawn(config: PeftConfig) -> bool:
    """True if a fresh adapter of this config starts from random numbers instead of from doing nothing."""
    fields = ("init_lora_weights", "init_ia3_weights", "init_weights")
    return any(getattr(config, field, True) is not True for field in fields)
