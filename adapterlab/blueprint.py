"""A model without memory: built from its config on the meta device and quantised by transformers' own rule, and what the
real one would take."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterlab.errors import AdapterLabError
from adapterlab.quiet import quiet, warnings_ignored

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_CODE = 4 * 16  # bytes of the table of a 4-bit type's values, which every layer has of its own
_NESTED_BLOCK = 256  # blocks whose statistics are quantised together


class Size(NamedTuple):
    """What one parameter takes. data: bytes of its values. statistics: bytes of what dequantises them."""

    parameters: int
    data: int
    statistics: int = 0


def build(
    config: PretrainedConfig, auto_class: Any, dtype: torch.dtype, settings: Any = None, **options: Any
) -> PreTrainedModel:
    """The model of this config on the meta device, its parameters in the dtypes that `from_pretrained` would give them.

    settings: a `BitsAndBytesConfig`; then bitsandbytes' layers stand where transformers would put them. options: for
    `from_config`. The config is copied. Raises what transformers raises.
    """
    config = copy.deepcopy(config)
    stored = config.__dict__.pop("quantization_config", None)
    with without_values(), quiet():
        model = auto_class.from_config(config, dtype=dtype, **options)
        if settings is not None:
            _quantise(model, dtype, settings, pre_quantized=stored is not None)
            model.tie_weights()  # what is tied is not quantised after all
    _keep_in_float32(model, dtype)
    return model.eval()


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """In the block tensors are made on the meta device, and torch's initialisers, which take a quarter of the time that a
    model without values takes, leave them as they are."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Uninitialised(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if getattr(function, "__module__", None) == torch.nn.init.__name__:
                return given["tensor"] if "tensor" in given else args[0]
            return function(*args, **given)

    with torch.device("meta"), Uninitialised():
        yield


def _quantise(model: PreTrainedModel, dtype: torch.dtype, settings: Any, pre_quantized: bool) -> None:
    """transformers' own quantizer does it, so that it leaves out what it leaves out when it loads."""
    import torch
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=pre_quantized)
    quantizer.preprocess_model(
        model=model, dtype=dtype, device_map={"": "cpu"}, checkpoint_files=None, use_kernels=False
    )
    for module in model.modules():
        if (
            bits_of(module) and module.bias is not None
        ):  # made in torch's default dtype, which loading sets and we do not
            module.bias = torch.nn.Parameter(torch.empty_like(module.bias, dtype=dtype), requires_grad=False)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What transformers keeps in float32 in a model of half precision (T5's `wo`)."""
    import torch
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, by_group, _ = build_glob_alternation(list(plan))
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            found = pattern.search(f"{path}.{key}") if parameter is not None else None
            if found and parameter.is_floating_point() and not (bits_of(module) and key == "weight"):
                wide = torch.empty_like(parameter, dtype=plan[by_group[str(found.lastgroup)]])
                module._parameters[key] = torch.nn.Parameter(wide, parameter.requires_grad)


def bits_of(module: nn.Module) -> int:
    """8 or 4 for bitsandbytes' layers, 0 for any other."""
    return {"Linear8bitLt": 8, "Linear4bit": 4}.get(type(module).__name__, 0)


def parameter_sizes(model: nn.Module) -> dict[int, Size]:
    """id → size of every parameter of a model on the meta device, as it will be when it is loaded; a tied one once."""
    found: dict[int, Size] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in found:
                packed = bits_of(module) and type(parameter).__name__ in ("Params4bit", "Int8Params")
                found[id(parameter)] = _quantised_size(module) if packed else plain_size(parameter)
    return found


def plain_size(tensor: torch.Tensor) -> Size:
    return Size(tensor.numel(), tensor.numel() * tensor.element_size())


def _quantised_size(module: Any) -> Size:
    """8 bits: a byte each, and a float32 scale for each row. 4 bits: half a byte each, a float32 maximum for each block and a
    table of 16 values; doubly quantised, a byte for each block's maximum, a float32 maximum for each 256 of those, their mean
    and another table, of 256 values."""
    rows, columns = module.out_features, module.in_features
    count = rows * columns
    if bits_of(module) == 8:
        return Size(count, 2 * count) if module.state.has_fp16_weights else Size(count, count, 4 * rows)
    packed = math.ceil(count / 2)
    blocks = math.ceil(count / (module.weight.blocksize or 64))
    if not module.weight.compress_statistics:
        return Size(count, packed, 4 * blocks + _CODE)
    nested = 4 * math.ceil(blocks / _NESTED_BLOCK) + 4 * 256
    return Size(count, packed, blocks + _CODE + nested + 4)


def buffer_bytes(model: nn.Module) -> int:
    return sum(plain_size(buffer).data for buffer in model.buffers())


def stored_settings(config: PretrainedConfig, title: str) -> Any:
    """The `BitsAndBytesConfig` of a config whose weights are quantised already; None if they are plain.

    Raises `AdapterLabError` for another quantizer: what its tensors take is its own secret.
    """
    from transformers import BitsAndBytesConfig

    stored = getattr(config, "quantization_config", None)
    if stored is None or isinstance(stored, BitsAndBytesConfig):
        return stored
    raw = stored if isinstance(stored, dict) else stored.to_dict()
    method = raw.get("quant_method") or ("bitsandbytes" if raw.get("load_in_8bit") or raw.get("load_in_4bit") else "?")
    if str(getattr(method, "value", method)) != "bitsandbytes":
        raise AdapterLabError(
            f"{title} is quantised by {method}: only plain weights and bitsandbytes' can be estimated. Open it, and look at "
            "lab.memory()."
        )
    with warnings_ignored():  # fields of other versions
        return BitsAndBytesConfig.from_dict(raw)
