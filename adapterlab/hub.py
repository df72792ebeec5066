"""Adapter repositories and folders, resolved to local files; nothing in them is imported or executed."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterlab.columns import make_safe_name
from adapterlab.errors import AdapterLabError
from adapterlab.labfiles import MANIFEST
from adapterlab.places import ADAPTER_CONFIG, MODEL_CONFIG, Place, is_file, is_folder, locate
from adapterlab.strangers import read_json

# In order of preference: a .bin is a pickle.
_LONGEST_NAME = 1000  # letters of what a base is called
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter repository or folder, resolved to local files; nothing in it has been executed.

    folder: the local folder, or the Hub cache's snapshot folder.
    config_file, weights_file: `adapter_config.json` and the weights (safetensors preferred, else the pickle).
    source: what the user typed, with subfolder and revision if there are any.
    default_name: the last part of the repository's, folder's or subfolder's name, made a safe adapter name.
    config: the parsed config; a dict with a `peft_type`.
    """

    folder: Path
    config_file: Path
    weights_file: Path
    source: str
    default_name: str
    config: dict[str, Any] = field(repr=False)


def resolve_adapter(
    repo_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> AdapterFiles:
    """Resolve an adapter's Hub id or folder to its files, downloading the config and the weights if need be.

    `revision`, `subfolder`: as for `from_pretrained`. With `local_files_only=True`, or HF_HUB_OFFLINE set,
    the Hub is not asked. Raises `AdapterLabError` if it isn't there, isn't an adapter, or its files are
    broken.
    """
    place = locate(
        repo_or_path,
        revision=revision,
        subfolder=subfolder,
        token=token,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    return adapter_files(place)


def files_to_check(repo_or_path: str | os.PathLike[str], **where: Any) -> tuple[AdapterFiles | None, str]:
    """The files of an adapter that may be broken, and "", or None and what is wrong with its config. Weights may be missing;
    a tokenizer's files beside it are fetched too. Raises `AdapterLabError` only where there is no adapter."""
    from adapterlab.vocabulary import TOKENIZER_FILES

    place = locate(repo_or_path, **where)
    try:
        files = adapter_files(place, without_weights=True)
    except AdapterLabError as error:
        if not place.is_adapter:
            raise
        return None, str(error)
    for name in place.names.intersection(TOKENIZER_FILES):
        with contextlib.suppress(AdapterLabError):  # then it is not compared
            place.fetch(name)
    return files, ""


def adapter_files(place: Place, *, without_weights: bool = False, config_only: bool = False) -> AdapterFiles:
    """The adapter in a place; `AdapterLabError` if there is none, or its files are not right. without_weights: the weights'
    file may be missing. config_only: it is not fetched, and may be missing too."""
    if not place.is_adapter:
        if place.is_model:
            raise AdapterLabError(
                f"{place.source} is a model, not an adapter ({MODEL_CONFIG}, but no {ADAPTER_CONFIG}): "
                f"open it as AdapterLab({place.typed!r})."
            )
        if MANIFEST in place.names:
            raise AdapterLabError(f"{place.source} is a saved lab: open it as AdapterLab({place.typed!r}).")
        raise AdapterLabError(f"{place.source} holds no adapter (no {ADAPTER_CONFIG}). {place.holds()}")
    config_file = place.fetch(ADAPTER_CONFIG)
    config = _read_config(config_file, place.source)
    weights = [name for name in ADAPTER_WEIGHTS if name in place.names]
    if not weights and not (without_weights or config_only):
        raise AdapterLabError(
            f"The adapter {place.source} has no weights ({' or '.join(ADAPTER_WEIGHTS)} is missing). {place.holds()}"
        )
    return AdapterFiles(
        folder=config_file.parent,
        config_file=config_file,
        weights_file=place.fetch(weights[0])
        if weights and not config_only
        else config_file.parent / ADAPTER_WEIGHTS[0],
        source=place.source,
        default_name=make_safe_name(place.subfolder or place.title),
        config=config,
    )


def locate_base(place: Place, files: AdapterFiles) -> Place:
    """The base model that the adapter in `place` names: a Hub id, or a folder (also relative to its).

    Raises `AdapterLabError` if it names none, or one that isn't there or is itself an adapter.
    """
    name = files.config.get("base_model_name_or_path")
    remedy = f"open its base model yourself, lab = AdapterLab(…), then lab.load_adapter({place.typed!r})."
    if not isinstance(name, str) or not name.strip():
        raise AdapterLabError(
            f"The adapter {files.source} doesn't say which model it is for (base_model_name_or_path in "
            f"{ADAPTER_CONFIG} is {name!r}): {remedy}"
        )
    if len(name) > _LONGEST_NAME:
        raise AdapterLabError(
            f"The adapter {files.source} is for a model whose name has {len(name):,} letters (base_model_name_or_path in "
            f"{ADAPTER_CONFIG} is {name[:60]!r}…), which can't be: {remedy}"
        )
    candidates = [Path(name)]
    with contextlib.suppress(RuntimeError):  # it begins with ~ and somebody's name who is not here
        candidates = [Path(name).expanduser()]
    if place.folder is not None:
        candidates += [files.folder.parent / name, files.folder / name]
    folders = [folder for folder in candidates if is_folder(folder)]
    models = [folder for folder in folders if is_file(folder / MODEL_CONFIG)]
    folder = next(iter([*models, *folders]), None)
    try:
        base = locate(
            folder or name,
            revision=None if folder else files.config.get("revision"),
            token=place.token,
            local_files_only=place.local_files_only,
            cache_dir=place.cache_dir,
        )
    except AdapterLabError as error:
        raise AdapterLabError(
            f"The adapter {files.source} is for the model {name!r}, which could not be found. {error} "
            f"If you have that model elsewhere, {remedy}"
        ) from error
    if not base.is_model:
        what = (
            "is an adapter itself: merge it into its model first" if base.is_adapter else f"is no model. {base.holds()}"
        )
        raise AdapterLabError(f"The adapter {files.source} is for {name!r}, but that {what}")
    return base


def _read_config(path: Path, source: str) -> dict[str, Any]:
    remedy = "download or save the adapter again."
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise AdapterLabError(f"The {ADAPTER_CONFIG} of {source} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(config, dict):
        raise AdapterLabError(
            f"The {ADAPTER_CONFIG} of {source} holds a {type(config).__name__}, not an object: {remedy}"
        )
    if not isinstance(config.get("peft_type"), str):
        raise AdapterLabError(
            f"The {ADAPTER_CONFIG} of {source} has no peft_type, so it isn't a PEFT adapter's: {remedy}"
        )
    return config
