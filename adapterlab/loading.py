"""From what people have (an id, a folder, an object) to a base model, its tokenizer, perhaps an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.base_files import check_base_files, check_base_size, check_loaded
from adapterlab.errors import AdapterLabError
from adapterlab.freeing import give_back_memory
from adapterlab.hub import AdapterFiles, adapter_files, locate_base
from adapterlab.keywords import check_keywords
from adapterlab.notices import say
from adapterlab.places import ADAPTER_CONFIG, MODEL_CONFIG, Place, explained, locate, portable_name
from adapterlab.quantization import (
    keep_4bit_unpacked,
    quantization_of,
    quantization_settings,
    refuse_packed_4bit,
)
from adapterlab.quiet import no_conversion_requests, silence_known_noise
from adapterlab.tokenization import (
    check_tokenizer,
    code_arguments,
    find_tokenizer,
    hub_arguments,
    load_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SUPPORTED = "A lab takes causal language models (GPT, Llama, OPT, …) and sequence-to-sequence ones (T5, BART, …)"
# A subfolder that no repository has, so that transformers finds no adapter to hang on the model by itself.
_NO_ADAPTER = {"subfolder": ".no-adapter"}


@dataclass(frozen=True)
class Origin:
    """Where a base came from. path: a Hub id or a folder, "" for a model that was never a file; revision (a commit, where it
    is known) and subfolder are of the Hub. quantized_here: by a config that was given, not by the checkpoint's own. demo: the
    demo model, which is fetched and not looked up."""

    path: str
    revision: str | None = None
    subfolder: str | None = None
    quantized_here: bool = False
    demo: bool = False


@dataclass
class LoadedBase:
    """A base model, ready for a lab.

    model: the transformers model, in eval mode if it was loaded here; otherwise just as it was handed over.
    tokenizer: None if none was given and none could be found. base_id: what to show, "facebook/opt-350m" or a
    folder's name. base_path: what a saved adapter names as its base. adapter: an adapter to attach and
    select, when an adapter's id or folder was given. owned: False for objects in hand, which stay the
    caller's. quantization: None, "8bit", "4bit" or another quantizer's name. file_bytes: of the files that the weights
    were read from, None where that is not known. origin: where to find it again.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)
    base_id: str
    base_path: str
    adapter: AdapterFiles | None
    owned: bool
    quantization: str | None
    file_bytes: int | None
    origin: Origin


def load_base(
    model: Any,
    *,
    tokenizer: Any = None,
    quantization: str | None = None,
    quantization_config: Any = None,
    dtype: Any = "auto",
    device_map: Any = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    before_weights: Callable[[], None] | None = None,
    **model_kwargs: Any,
) -> LoadedBase:
    """Load a base model, or take one in hand.

    model: a Hub id, a folder, an adapter's Hub id or folder (its base is loaded), a transformers model
        (with native adapters in it or not), or a PeftModel (its base is taken, tuner layers left in it).
    tokenizer: an object, or an id or folder to load it from; default: the one that belongs to the model.
    quantization: "8bit" or "4bit", the shorthands for a `quantization_config`.
    dtype, device_map: default "auto": the checkpoint's own dtype, and wherever there is room.
    before_weights: called when all but the weights is known to be there, just before they are read.
    revision, token, local_files_only, model_kwargs: as for `from_pretrained`, of what `model` names.

    Custom code in a repository never runs unless `trust_remote_code=True` is given. Objects in hand are not
    changed, except that 4-bit layers are told not to repack themselves. Raises `AdapterLabError` for whatever
    can't be had.
    """
    silence_known_noise()
    check_keywords(model_kwargs)
    settings = quantization_settings(quantization, quantization_config, device_map)
    _check_dtype(dtype)
    source = {
        "token": token,
        "local_files_only": local_files_only,
        "cache_dir": model_kwargs.pop("cache_dir", None),
    }
    if not isinstance(model, (str, os.PathLike)):
        given = {**model_kwargs, "quantization": quantization, "quantization_config": quantization_config}
        given |= {
            "dtype": None if dtype == "auto" else dtype,
            "device_map": None if device_map == "auto" else device_map,
        }
        return _take(model, tokenizer, {**given, "revision": revision}, source)
    tokenizer = check_tokenizer(tokenizer, source)
    subfolder = model_kwargs.pop("subfolder", None)
    place = locate(model, revision=revision, subfolder=subfolder, **source)
    return _load(place, tokenizer, {**model_kwargs, "dtype": dtype, "device_map": device_map}, settings, before_weights)


def _load(
    place: Place,
    tokenizer: Any,
    options: dict[str, Any],
    quantization_config: Any,
    before_weights: Callable[[], None] | None,
) -> LoadedBase:
    from_gguf = options.get("gguf_file") is not None
    adapter = None
    base = place
    if place.is_adapter:
        adapter = adapter_files(place)
        base = place if place.is_model else locate_base(place, adapter)
    elif not place.is_model and not from_gguf:
        raise AdapterLabError(
            f"{place.source} is neither a model ({MODEL_CONFIG}) nor an adapter ({ADAPTER_CONFIG}). {place.holds()}"
        )
    with explained(base):
        check_base_files(base)
        config = _read_config(base, options)
        auto_class = _auto_class(config, base.title, bool(options.get("trust_remote_code")))
        check_base_size(base, config, auto_class)
        if quantization_config is not None and getattr(config, "quantization_config", None):
            raise AdapterLabError(
                f"{base.title} is quantized already, as its config says: leave quantization= and "
                "quantization_config= out."
            )
        if tokenizer is None:
            tokenizer = load_tokenizer(base, options) or load_tokenizer(place, options)
        if before_weights is not None:
            before_weights()
        model = _load_model(auto_class, base, config, options, quantization_config)
    give_back_memory()  # what quantizing and conversions took on the way
    keep_4bit_unpacked(model)
    if tokenizer is None:
        say(f"{base.title} comes without a tokenizer: pass tokenizer=… to work with text.")
    path = portable_name(base.target)
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        base_id=base.title,
        base_path=path,
        adapter=adapter,
        owned=True,
        quantization=quantization_of(model),
        file_bytes=None if from_gguf or options.get("variant") else base.weights_bytes(),
        origin=Origin(
            path,
            _commit(model) or base.revision,
            base.subfolder or None,
            quantized_here=quantization_config is not None,
        ),
    )


def _commit(model: PreTrainedModel) -> str | None:
    """The commit that the model's files are of; None for what did not come from the Hub."""
    commit = getattr(model.config, "_commit_hash", None)
    return commit if isinstance(commit, str) else None


def _read_config(place: Place, options: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    config = options.get("config")
    if config is not None:
        return config
    return AutoConfig.from_pretrained(place.target, **hub_arguments(place), **code_arguments(options))


def _load_model(
    auto_class: Any, place: Place, config: PretrainedConfig, options: dict[str, Any], quantization_config: Any
) -> PreTrainedModel:
    arguments = {**options, **hub_arguments(place), **code_arguments(options), "config": config}
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    adapter_arguments = {name: arguments[name] for name in ("cache_dir", "local_files_only")}
    arguments["adapter_kwargs"] = adapter_arguments | (_NO_ADAPTER if place.is_adapter else {})
    target = place.target
    if place.is_adapter and place.folder is not None and _sees_adapter(target):
        target, arguments["subfolder"] = _from_above(place.folder)
    with no_conversion_requests():
        model, info = auto_class.from_pretrained(target, **arguments, output_loading_info=True)
        check_loaded(place.title, info, model)
    if target != place.target:
        model.name_or_path = model.config.name_or_path = place.target
    return model


def _sees_adapter(target: str) -> bool:
    """Whether the installed transformers, as 5.15 does, finds a folder's adapter whatever the subfolder that is named."""
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(target, **_NO_ADAPTER) is not None


def _from_above(folder: Path) -> tuple[str, str]:
    """The same folder as a folder without an adapter and a subfolder of it."""
    above = next((one for one in folder.parents if not (one / ADAPTER_CONFIG).is_file()), folder.parent)
    return str(above), str(folder.relative_to(above))


def _auto_class(config: PretrainedConfig, title: str, trust_remote_code: bool) -> Any:
    """AutoModelForCausalLM or AutoModelForSeq2SeqLM, by the architecture that the config names."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto import modeling_auto as auto

    causal, seq2seq = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    architectures = list(config.architectures or [])
    remote = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    for auto_class, names in ((AutoModelForSeq2SeqLM, seq2seq), (AutoModelForCausalLM, causal)):
        if auto_class.__name__ in remote or set(architectures) & set(names.values()):
            return auto_class
    # Some configs name no head ("BartModel"), or nothing. Tied embeddings are a head all the same.
    bare = auto.MODEL_MAPPING_NAMES.get(config.model_type)
    headless = not architectures or (architectures == [bare] and getattr(config, "tie_word_embeddings", False))
    if headless and config.is_encoder_decoder and config.model_type in seq2seq:
        return AutoModelForSeq2SeqLM
    encoders = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if headless and config.model_type in causal and config.model_type not in encoders:
        return AutoModelForCausalLM
    shown = ", ".join(architectures) or config.model_type
    raise AdapterLabError(f"{title} ({shown}) generates no text. {SUPPORTED}.")


def _check_dtype(dtype: Any) -> None:
    import torch

    known = dtype is None or dtype == "auto" or isinstance(dtype, (torch.dtype, dict))
    if not known and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise AdapterLabError(
            f"dtype={dtype!r} is unknown: use 'auto', 'float32', 'bfloat16', 'float16', or a torch.dtype."
        )


def _take(model: Any, tokenizer: Any, given: dict[str, Any], source: dict[str, Any]) -> LoadedBase:
    base = _plain_model(model)
    unfit = [f"{name}=" for name, value in given.items() if value is not None]
    if unfit:
        raise AdapterLabError(
            f"{', '.join(unfit)} can't be applied to a model in hand: it is loaded already. "
            "Give it when you load the model, or give the lab the model's id or folder instead."
        )
    refuse_packed_4bit(base)
    tokenizer = check_tokenizer(tokenizer, source)
    name = getattr(base, "name_or_path", "") or ""
    if tokenizer is None:
        tokenizer = find_tokenizer(name, source)
    keep_4bit_unpacked(base)
    is_folder = bool(name) and Path(name).is_dir()
    path = portable_name(str(Path(name).resolve()) if is_folder else name)
    return LoadedBase(
        model=base,
        tokenizer=tokenizer,
        base_id=(Path(path).name if path.startswith(os.sep) else path) or type(base).__name__,
        base_path=path,
        adapter=None,
        owned=False,
        quantization=quantization_of(base),
        file_bytes=None,
        origin=Origin(path, _commit(base), quantized_here=quantization_of(base) is not None),
    )


def _plain_model(model: Any) -> PreTrainedModel:
    """The transformers model in `model`; `AdapterLabError` if there is none, or it generates no text."""
    from peft import PeftMixedModel, PeftModel
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel):
        prompts = [str(config.peft_type) for config in model.peft_config.values() if config.is_prompt_learning]
        if prompts:
            method = prompts[0].removeprefix("PeftType.")
            raise AdapterLabError(
                f"A lab can't host {method} adapters: they are prompts, not layers, and can't be switched "
                "inside the model. Use the PeftModel itself: model.generate(…)."
            )
        model = model.get_base_model()
    elif isinstance(model, PeftMixedModel):
        model = model.base_model.model
    if not isinstance(model, PreTrainedModel):
        inner = next(
            (name for name in ("model", "module") if isinstance(getattr(model, name, None), PreTrainedModel)),
            "",
        )
        what = f"The class {model.__name__}" if isinstance(model, type) else f"A {type(model).__name__} object"
        hint = f" Give its .{inner}." if inner else " Give a Hub id, a folder, a transformers model or a PeftModel."
        raise AdapterLabError(f"{what} is no model that a lab can work with.{hint}")
    if not model.can_generate() or model.main_input_name != "input_ids":
        raise AdapterLabError(f"{type(model).__name__} generates no text from text. {SUPPORTED}.")
    return model
