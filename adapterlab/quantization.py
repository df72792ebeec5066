"""8-bit and 4-bit weights: the settings behind the two shorthands, and what keeps them right on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle
    from transformers import BitsAndBytesConfig, PreTrainedModel

SHORTHANDS = ("8bit", "4bit")
_PACKED = {"Linear8bitLt": "8bit", "Linear4bit": "4bit"}


def quantization_settings(quantization: str | None, quantization_config: Any, device_map: Any = "auto") -> Any:
    """What to give to `from_pretrained` as `quantization_config`; None for none.

    `"8bit"`: LLM.int8 with threshold 0, because with the default of 6 the outlier columns are looked for in
    the whole batch, and so what one row says depends on its neighbours. `"4bit"`: nf4. Raises
    `AdapterLabError` for another word, or when both are given.
    """
    if quantization is not None and quantization_config is not None:
        raise AdapterLabError(
            "quantization= is a shorthand for quantization_config=: give one of them, not both "
            f"(got quantization={quantization!r})."
        )
    if quantization is None:
        return quantization_config
    if quantization not in SHORTHANDS:
        raise AdapterLabError(
            f"quantization={quantization!r} is unknown: use '8bit' or '4bit', or pass a quantization_config=."
        )
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return _nf4(BitsAndBytesConfig, device_map)


def _nf4(config_class: type[BitsAndBytesConfig], device_map: Any) -> BitsAndBytesConfig:
    return config_class(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_compute_dtype(device_map))


def _compute_dtype(device_map: Any) -> torch.dtype:
    """What to multiply in: bfloat16 where the GPU has it, else float16; on a CPU float32, as fast there."""
    import torch

    on_cpu = str(device_map) == "cpu"
    if torch.cuda.is_available() and not on_cpu:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if hasattr(torch, "xpu") and torch.xpu.is_available() and not on_cpu:
        return torch.bfloat16
    return torch.float32


def quantization_of(model: PreTrainedModel) -> str | None:
    """`"8bit"`, `"4bit"`, another quantizer's name, or None for plain weights."""
    if getattr(model, "is_loaded_in_8bit", False):
        return "8bit"
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method) or "quantized")
    return None if name == "gguf" else name  # GGUF weights are dequantized while they are read


def packed_as(module: Any) -> str | None:
    """ "8bit" or "4bit" for a layer of bitsandbytes', None for any other module."""
    return _PACKED.get(type(module).__name__)


def base_module(layer: Any) -> Any:
    """The base's module under one of PEFT's layers or wrappers."""
    original = getattr(layer, "original_module", None)
    return layer.get_base_layer() if original is None and hasattr(layer, "get_base_layer") else original


def stay_whole(model: Any) -> frozenset[str]:
    """Paths of the bare model's linear layers that transformers would not pack: its head, tied ones, those kept in fp32."""
    from transformers.quantizers.base import get_keys_to_not_convert

    keys = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    around = [f".{key}." for key in keys]
    return frozenset(
        path
        for path, module in model.named_modules()
        if hasattr(module, "weight") and any(key in f".{path}." for key in around)
    )


def would_pack(module: Any) -> bool:
    """Whether bitsandbytes has packed weights for such a module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def packed_obstacle(over: Iterable[Any], method: str, quantization: str) -> str | None:
    """Why an adapter of this PEFT type can't have weights of this quantization under it, or None if it can.

    over: those of its layers whose weights are packed, or would be.
    """
    from peft.utils.other import ModulesToSaveWrapper

    over = list(over)
    whole = any(isinstance(layer, ModulesToSaveWrapper) for layer in over)
    return packed_objection(method, quantization, whole=whole) if over else None


def packed_objection(method: str, quantization: str, *, whole: bool) -> str | None:
    """The same by what is asked for. whole: `modules_to_save` names some of the packed layers."""
    from adapterlab.methods import over_packed_obstacle

    if whole:
        return (
            "modules_to_save copies whole layers, and packed weights can't be trained: leave those layers out of "
            "modules_to_save, or open the base without quantization."
        )
    return over_packed_obstacle(method, quantization)


def computing_dtype(model: PreTrainedModel) -> str:
    """The narrowest dtype that a forward goes through: the model's own, or what its 4-bit layers multiply in."""
    import torch

    inner = None
    if quantization_of(model) == "4bit":
        inner = getattr(model.config.quantization_config, "bnb_4bit_compute_dtype", None)
    return str(max((model.dtype, inner or model.dtype), key=lambda dtype: torch.finfo(dtype).eps))


def keep_4bit_unpacked(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack the model's 4-bit weights on a CPU; call it before the first forward.

    With AVX512-BF16 `Linear4bit` reorders its weights in place at the first forward in eval mode, for a
    faster kernel that has no backward: gradients through it vanish, and dequantizing gives garbage, without
    an error.
    """
    for _, layer in _linear_4bit(model):
        layer.support_avx512bf16_for_cpu = False


def refuse_packed_4bit(model: nn.Module) -> None:
    """`AdapterLabError` if bitsandbytes has repacked its 4-bit weights already (see `keep_4bit_unpacked`)."""
    packed = [name for name, layer in _linear_4bit(model) if _is_packed(layer)]
    if packed:
        raise AdapterLabError(
            f"{len(packed)} 4-bit layers of this model ({packed[0]}, …) were repacked by bitsandbytes when "
            "first run on the CPU: gradients and merged weights would be silently wrong. Load it again "
            "and hand it over before its first forward, or give the lab its id and quantization='4bit'."
        )


def keep_8bit_scales(layer: nn.Module) -> Kept8bitScales:
    """Let an 8-bit layer run after PEFT has read its weights, as DoRA does in each forward.

    On a CPU PEFT's `dequantize_module_weight` then puts another parameter in the weight's place. Once bitsandbytes has
    moved the scales to the layer's state, that one is without, and the next forward would look for them there (issue 3).
    """
    return Kept8bitScales(layer, layer.register_forward_pre_hook(_look_in_the_state))


@dataclass(frozen=True)
class Kept8bitScales:
    """What `keep_8bit_scales` did to a layer. `remove()` takes it back and leaves a layer that runs without it."""

    layer: nn.Module
    hook: RemovableHandle

    def remove(self) -> None:
        _look_in_the_state(self.layer, ())  # the last forward may have been DoRA's
        self.hook.remove()


def _look_in_the_state(layer: Any, args: Any) -> None:
    if layer.weight.SCB is None and layer.state.SCB is not None:
        layer.weight.CB = None  # "already moved", in bitsandbytes' language


def keep_quantized_dtype(model: nn.Module) -> None:
    """Let PEFT's layers over 8-bit and 4-bit weights give back the dtype that they were given.

    Adapters are fp32, as PEFT loads them, and over half precision so is what its IA3 and AdaLoRA make of the result; the
    layers behind refuse it, in plain PEFT too (0.20, 0.21; issue 3).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and type(layer).__module__.endswith(".bnb") and not layer._forward_hooks:
            layer.register_forward_hook(_as_it_came)


def _as_it_came(layer: Any, args: Any, output: Any) -> Any:
    return output.to(args[0].dtype)


def _linear_4bit(model: nn.Module) -> Iterator[tuple[str, Any]]:
    # Where bitsandbytes was never imported there are no layers of it; importing it takes a second.
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None:
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                yield name, module


def _is_packed(layer: Any) -> bool:
    states = (getattr(layer.weight, "quant_state", None), getattr(layer, "quant_state", None))
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)
