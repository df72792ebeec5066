"""The tokenizer that belongs to a model: from its folder or repository, or nowhere."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.places import Place, explained, locate
from adapterlab.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without any of these there is no tokenizer, although AutoTokenizer would make an empty one of the config.
TOKENIZER_FILES = {
    "merges.txt",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}


def hub_arguments(place: Place) -> dict[str, Any]:
    return {
        "revision": place.revision,
        "subfolder": place.subfolder,
        "token": place.token,
        "cache_dir": place.cache_dir,
        "local_files_only": place.local_files_only,
    }


def code_arguments(options: dict[str, Any]) -> dict[str, Any]:
    # Always given: without it transformers asks at the keyboard whether to run the repository's code.
    code = {"trust_remote_code": bool(options.get("trust_remote_code"))}
    return code | {name: options[name] for name in ("code_revision", "proxies", "gguf_file") if name in options}


def load_tokenizer(place: Place, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    if not place.names & TOKENIZER_FILES and options.get("gguf_file") is None:
        return None
    with explained(place):
        return AutoTokenizer.from_pretrained(place.target, **hub_arguments(place), **code_arguments(options))


def check_tokenizer(tokenizer: Any, source: dict[str, Any]) -> Any:
    """The tokenizer as an object, or None."""
    from transformers import PreTrainedTokenizerBase

    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if not isinstance(tokenizer, (str, os.PathLike)):
        raise AdapterLabError(
            f"tokenizer= is a {type(tokenizer).__name__}: give a transformers tokenizer, or an id or folder."
        )
    place = locate(tokenizer, **source)
    found = load_tokenizer(place, {})
    if found is None:
        raise AdapterLabError(f"{place.source} holds no tokenizer. {place.holds()}")
    return found


def find_tokenizer(name: str, source: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model of this name: from a folder, the cache, the Hub; None if there is none."""
    attempts = [{**source, "local_files_only": True}]
    if not source["local_files_only"]:
        attempts.append(source)
    for attempt in attempts if name else []:
        try:
            with quiet():
                found = load_tokenizer(locate(name, tell=False, **attempt), {})
        except AdapterLabError:
            continue  # expected: the model in hand may come from nowhere
        if found is not None:
            return found
    return None
