"""What `AdapterLab.estimate` is asked: a model by whatever names it, adapters likewise, and what they are used for. Only
configs are fetched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.blueprint import build, stored_settings
from adapterlab.errors import AdapterLabError
from adapterlab.places import ADAPTER_CONFIG, MODEL_CONFIG, Place, explained, locate

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PretrainedConfig

USUAL_CONTEXT, USUAL_LENGTH, USUAL_BATCH = 1024, 512, 8
_PRECISIONS = ("auto", "no", "bf16", "fp16")


@dataclass(frozen=True)
class Circumstances:
    """What the model would be used for. None: what is usual, within the model's context."""

    context: int | None = None
    columns: int | None = None
    prompts: int = 1
    batch_size: int = USUAL_BATCH
    length: int | None = None
    gradient_checkpointing: bool = False
    mixed_precision: str = "auto"

    def check(self, config: PretrainedConfig) -> None:
        """`AdapterLabError` with everything that is wrong."""
        most = limit_of(config)
        wrong = []
        for name in ("context", "columns", "prompts", "batch_size", "length"):
            value = getattr(self, name)
            if value is None and name in ("context", "columns", "length"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                wrong.append(f"{name}={value!r} is no whole number from 1 up")
            elif name in ("context", "length") and most is not None and value > most:
                wrong.append(f"{name}={value} is more than the {most} tokens of the model's context")
        if self.mixed_precision not in _PRECISIONS:
            wrong.append(f"mixed_precision={self.mixed_precision!r} is none of {', '.join(map(repr, _PRECISIONS))}")
        if wrong:
            raise AdapterLabError("This can't be estimated: " + "; ".join(wrong) + ".")


@dataclass(frozen=True)
class Base:
    """A model that is not there: how to build it. dtype: of what is not quantised. settings: of the quantization."""

    config: PretrainedConfig
    title: str
    auto_class: Any
    dtype: torch.dtype
    settings: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, *, quantised: bool = True) -> Any:
        try:
            settings = self.settings if quantised else None
            return build(self.config, self.auto_class, self.dtype, settings, **self.options)
        except (ImportError, ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise AdapterLabError(f"{self.title} can't be built from its config: {said}") from error


def find_base(
    model: Any, settings: Any, dtype: Any, options: dict[str, Any], where: dict[str, Any]
) -> tuple[Base, dict[str, PeftConfig]]:
    """The base, and the adapter that was named in its place, if one was."""
    from transformers import PretrainedConfig

    from adapterlab.loading import _auto_class as auto_class_of
    from adapterlab.loading import _plain_model as plain_model
    from adapterlab.loading import _read_config as read_model_config

    own: dict[str, PeftConfig] = {}
    if isinstance(model, (str, os.PathLike)):
        place = locate(model, **where)
        if place.is_adapter:
            name, own[name] = _read_adapter(place)
        place = _place_of_base(place)
        with explained(place):
            config, title = read_model_config(place, options), place.title
    else:
        given = [key for key in ("revision", "subfolder") if where.get(key) is not None]
        if given:
            raise AdapterLabError(
                f"{given[0]}= belongs to a model's id, and a model or config in hand is there already."
            )
        if isinstance(model, PretrainedConfig):
            config, title = model, model.name_or_path or type(model).__name__
        else:
            there = plain_model(model)
            config, title = there.config, there.config.name_or_path or type(there).__name__
            dtype = there.dtype if dtype == "auto" else dtype
    stored = stored_settings(config, title)
    if stored is not None and settings is not None:
        raise AdapterLabError(
            f"{title} is quantized already, as its config says: leave quantization= and quantization_config= out."
        )
    auto_class = auto_class_of(config, title, options["trust_remote_code"])
    return Base(config, title, auto_class, _dtype_of(dtype, config), _checked(stored or settings), options), own


def _place_of_base(place: Place) -> Place:
    from adapterlab.hub import adapter_files, locate_base

    if place.is_adapter and not place.is_model:
        return locate_base(place, adapter_files(place, config_only=True))
    if not place.is_model:
        raise AdapterLabError(
            f"{place.source} is neither a model ({MODEL_CONFIG}) nor an adapter ({ADAPTER_CONFIG}). {place.holds()}"
        )
    return place


def _checked(settings: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if settings is None or isinstance(settings, BitsAndBytesConfig):
        return settings
    raise AdapterLabError(
        f"quantization_config= is a {type(settings).__name__}: only a BitsAndBytesConfig can be estimated."
    )


def _dtype_of(dtype: Any, config: PretrainedConfig) -> torch.dtype:
    """What `from_pretrained` would load in; "auto" without a dtype in the config is float32, as the weights aren't read."""
    import torch

    if isinstance(dtype, dict):
        dtype = dtype.get("")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype or torch.float32


def name_all(own: dict[str, PeftConfig], adapters: Any, where: dict[str, Any]) -> dict[str, PeftConfig]:
    """Name → config of every adapter, names made where none are given."""
    from peft import PeftConfig

    found = dict(own)
    if isinstance(adapters, Mapping):
        for name, one in adapters.items():
            if not isinstance(name, str) or not name.strip() or name in found:
                raise AdapterLabError(f"{name!r} can't be an adapter's name: give each a name of its own.")
            found[name] = _find_adapter(one, where)[1]
        return found
    listed = [adapters] if isinstance(adapters, (str, os.PathLike, PeftConfig)) else adapters or []
    if not isinstance(listed, Iterable):
        raise AdapterLabError(
            f"adapters={adapters!r:.80} names none: give a method's name, a config, a folder, a Hub id, or a list of them."
        )
    for one in listed:
        stem, config = _find_adapter(one, where)
        name, count = stem, 1
        while name in found:
            count += 1
            name = f"{stem}-{count}"
        found[name] = config
    return found


def _find_adapter(one: Any, where: dict[str, Any]) -> tuple[str, PeftConfig]:
    """(what to call it, its config) of a config, a method's name, or an adapter's id or folder."""
    from adapterlab.methods import check_config, make_config

    is_place = isinstance(one, os.PathLike) or (isinstance(one, str) and ("/" in one or Path(one).is_dir()))
    if is_place:
        return _read_adapter(locate(one, **where))
    config = make_config(one)
    name = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    check_config(config, name, fresh=True)
    return name, config


def _read_adapter(place: Place) -> tuple[str, PeftConfig]:
    from adapterlab.hub import adapter_files
    from adapterlab.preflight import read_config

    files = adapter_files(place, config_only=True)
    return files.default_name, read_config(files.config, files.source)


def limit_of(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def within(usual: int, config: PretrainedConfig) -> int:
    return min(usual, limit_of(config) or usual)


def vocabulary_of(config: PretrainedConfig) -> int:
    return int(config.get_text_config(decoder=True).vocab_size)
