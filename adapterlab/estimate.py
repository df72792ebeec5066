"""What a model and its adapters would take in memory, from configs alone; see `AdapterLab.estimate`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.blueprint import bits_of, buffer_bytes, parameter_sizes, plain_size
from adapterlab.errors import AdapterLabError
from adapterlab.estimate_inputs import (
    USUAL_CONTEXT,
    USUAL_LENGTH,
    Base,
    Circumstances,
    find_base,
    name_all,
    vocabulary_of,
    within,
)
from adapterlab.notices import AdapterLabWarning

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from peft import PeftConfig

    from adapterlab.dryrun import Pass

COLUMNS = ["case", "owner", "kind", "parameters", "bytes", "source"]
_NAME = "adapter"  # what PEFT's layers call every adapter here

Row = tuple[str, str, str, int | None, int | None, str]  # as COLUMNS
RowOfAnyCase = tuple[str, str, int | None, int | None, str]


def estimate_frame(
    model: Any,
    adapters: Any,
    training: bool,
    circumstances: Circumstances,
    *,
    quantization: str | None,
    quantization_config: Any,
    dtype: Any,
    attn_implementation: str | None,
    trust_remote_code: bool,
    **where: Any,
) -> pd.DataFrame:
    """One row per case, owner and kind; see `AdapterLab.estimate`. where: revision, subfolder, token, local_files_only,
    cache_dir."""
    import pandas as pd

    from adapterlab.loading import _check_dtype as check_dtype
    from adapterlab.quantization import quantization_settings
    from adapterlab.quiet import silence_known_noise

    silence_known_noise()
    check_dtype(dtype)
    settings = quantization_settings(quantization, quantization_config)
    options: dict[str, Any] = {"trust_remote_code": bool(trust_remote_code)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    base, own = find_base(model, settings, dtype, options, where)
    circumstances.check(base.config)
    elsewhere = {key: value for key, value in where.items() if key not in ("revision", "subfolder")}
    chosen = name_all(own, adapters, elsewhere)
    injected = {name: _with_adapter(base, config, name) for name, config in chosen.items()}
    there = base.build()
    held = list(_base_rows(there))
    rows = [*_inference(base, there, held, injected, circumstances)]
    if training:
        rows += _full_fine_tuning(base, circumstances)
        for name, config in chosen.items():
            rows += _training(held, injected[name], config, name, circumstances)
    shown = [row for row in rows if row[4] != 0 or row[2] == "gradients"]  # which may all come after the peak
    return pd.DataFrame(shown, columns=COLUMNS).astype({"parameters": "Int64", "bytes": "Int64"})


@dataclass(frozen=True)
class Injected:
    """A base with one adapter in it, on the meta device. tensors: the adapter's own. parameters: how many of it learn."""

    model: Any
    tensors: list[Any]
    parameters: int

    @property
    def bytes(self) -> int:
        return sum(plain_size(tensor).data for tensor in self.tensors)


def _with_adapter(base: Base, config: PeftConfig, name: str) -> Injected:
    from adapterlab.preflight import inject_checked
    from adapterlab.quiet import quiet

    model = base.build()
    before = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        with quiet():
            inject_checked(config, model, _NAME)
    except Exception as error:  # PEFT's own verdict on target_modules, layers or values, in its words
        raise AdapterLabError(f"{name!r} can't be put into {base.title}: {' '.join(str(error).split())}") from error
    parameters = [tensor for tensor in model.parameters() if id(tensor) not in before]
    buffers = [tensor for tensor in model.buffers() if id(tensor) not in before]
    return Injected(model, [*parameters, *buffers], sum(p.numel() for p in parameters if p.requires_grad))


def _base_rows(model: Any) -> Iterator[RowOfAnyCase]:
    sizes = parameter_sizes(model).values()
    yield "base", "weights", sum(size.parameters for size in sizes), sum(size.data for size in sizes), "computed"
    yield "base", "quantization", None, sum(size.statistics for size in sizes), "computed"
    yield "base", "buffers", None, buffer_bytes(model), "computed"


def _inference(
    base: Base, model: Any, held: Iterable[RowOfAnyCase], injected: Mapping[str, Injected], asked: Circumstances
) -> Iterator[Row]:
    """model: the base as it is built, which is used up. held: its rows."""
    from adapterlab.dryrun import Pass
    from adapterlab.generation import cache_bytes

    case = "inference"
    rows = (asked.columns or len(injected) + 1) * asked.prompts
    context = asked.context or within(USUAL_CONTEXT, base.config)
    yield from ((case, *row) for row in held)
    for name, one in injected.items():
        yield case, name, "weights", one.parameters, one.bytes, "computed"
    yield case, "run", "KV cache", None, rows * cache_bytes(model, context), "computed"
    peak = _peak(model, Pass(rows, context), case)
    yield case, "run", "activations", None, None if peak is None else peak["activations"], "computed"
    chosen = 2 * 4 * rows * vocabulary_of(base.config)  # in float32, as they are and as they are processed
    yield case, "run", "logits", None, (peak["logits"] if peak else 0) + chosen, "computed"


def _full_fine_tuning(base: Base, asked: Circumstances) -> Iterator[Row]:
    """Of the plain weights: quantised ones can't learn."""
    case, model = "full fine-tuning", base.build(quantised=False)
    yield from ((case, *row) for row in _base_rows(model))
    trained = [p.requires_grad_(p.is_floating_point()) for p in model.parameters()]
    yield from _learning_rows(case, "base", model, trained, asked)


def _training(
    held: Iterable[RowOfAnyCase], injected: Injected, config: Any, name: str, asked: Circumstances
) -> Iterator[Row]:
    """The adapter alone on its base, whose rows are `held`. Copies of whole modules are float32 while they learn."""
    from adapterlab.methods import train_packed_obstacle
    from adapterlab.sessions import float32

    model, case = injected.model, f"training {name}"
    kind = next((f"{bits_of(module)}bit" for module in model.modules() if bits_of(module)), None)
    why = None if kind is None else train_packed_obstacle(str(getattr(config.peft_type, "value", "")), kind)
    if why is not None:
        raise AdapterLabError(f"{name!r} can't be trained: {why}")
    yield from ((case, *row) for row in held)
    trained = [tensor for tensor in injected.tensors if getattr(tensor, "requires_grad", False)]
    with float32([model], trained):
        yield case, name, "weights", injected.parameters, injected.bytes, "computed"
        yield from _learning_rows(case, name, model, trained, asked)
    if config.peft_type == "ADALORA":
        averages = 2 * 4 * sum(tensor.numel() for tensor in trained)  # of each parameter, in float32
        yield case, name, "allocation", None, averages, "computed"


def _learning_rows(case: str, owner: str, model: Any, trained: list[Any], asked: Circumstances) -> Iterator[Row]:
    """What is there at the peak of a step: AdamW's two averages of every gradient, and of the rest what is most."""
    from adapterlab.dryrun import Pass

    gradients = sum(plain_size(tensor).data for tensor in trained)
    length = asked.length or within(USUAL_LENGTH, model.config)
    what = Pass(asked.batch_size, length, True, asked.gradient_checkpointing, _autocast(model, asked.mixed_precision))
    peak = _peak(model, what, case)
    if peak is not None and peak.total() < gradients:  # all of them are there when the optimizer takes its step
        peak.clear()
        peak["gradients"] = gradients
    yield case, owner, "gradients", None, gradients if peak is None else peak["gradients"], "computed"
    yield case, owner, "optimizer", None, 2 * gradients + 4 * len(trained), "computed"
    yield case, "run", "activations", None, None if peak is None else peak["activations"], "computed"
    yield case, "run", "logits", None, None if peak is None else peak["logits"], "computed"


def _peak(model: Any, what: Pass, case: str) -> Any:
    """`compute_peak`, or None with a warning where this model can't be run on shapes alone."""
    from adapterlab.dryrun import compute_peak

    try:
        return compute_peak(model, what)
    except Exception as error:  # a model may ask its tensors anything
        why = (" ".join(str(error).split()) or type(error).__name__)[:200]
        warnings.warn(
            f"The activations of {case} are not known: {type(model).__name__} can't be run without values ({why}).",
            AdapterLabWarning,
            stacklevel=2,
        )
        return None


def _autocast(model: Any, precision: str) -> torch.dtype | None:
    """The dtype of mixed precision; "auto": what the lab would train in on this machine."""
    import torch

    from adapterlab.training import mixed_precision

    chosen = next(iter(mixed_precision(model, {})), "no") if precision == "auto" else precision
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(chosen)
