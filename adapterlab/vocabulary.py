"""The vocabulary an adapter was trained with, as its tokenizer's files tell it; read as JSON, nothing is executed.
And the tokens that a base has no rows for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.examples import IGNORED
from adapterlab.strangers import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
MOST_BYTES = 64_000_000  # the largest tokenizer.json in use has some 35 million
MOST_TOKENS = 1 << 31  # ids are 32 bits wide in every tokenizer there is
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Vocabulary:
    """What the files say. `tokens`: the largest id and one; 0 if no file tells. `special`: special tokens' texts.
    `roles`: what eos_token and the like are. `unread`: files that are there and could not be read, with the reason."""

    tokens: int
    special: tuple[str, ...]
    roles: dict[str, str]
    unread: tuple[str, ...]


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of the tokenizer in `folder`; an empty one where there is none. Raises nothing."""
    found: dict[str, Any] = {}
    unread = []
    for name in TOKENIZER_FILES:
        try:
            found[name] = _read_json(folder / name)
        except (OSError, ValueError, RecursionError) as error:
            unread.append(f"{name}: {error}")
    whole, config = found.get("tokenizer.json", {}), found.get("tokenizer_config.json", {})
    added = [token for token in _list(whole.get("added_tokens")) if isinstance(token, dict)]
    decoder = {
        key: token for key, token in _dict(config.get("added_tokens_decoder")).items() if isinstance(token, dict)
    }
    ids = [*_ids(_dict(whole.get("model")).get("vocab")), *_ids(found.get("added_tokens.json"))]
    ids += [token.get("id") for token in added] + [int(key) for key in decoder if key.isdecimal() and len(key) < 10]
    special = [token.get("content") for token in (*added, *decoder.values()) if token.get("special") is True]
    roles: dict[str, str] = {}
    for source in (found.get("special_tokens_map.json", {}), config):
        roles |= {role: _text(source[role]) for role in _ROLES if _text(source.get(role))}
        for field in ("additional_special_tokens", "extra_special_tokens"):
            special += [_text(token) for token in _list(source.get(field))]
    texts = [text for text in (*special, *roles.values()) if isinstance(text, str) and text]
    known = [number for number in ids if type(number) is int and 0 <= number < MOST_TOKENS]
    return Vocabulary(max(known, default=-1) + 1, tuple(dict.fromkeys(texts)), roles, tuple(unread))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return _dict(read_json(path, MOST_BYTES))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _ids(vocab: Any) -> list[Any]:
    """Ids of a mapping token → id, or of a list of [token, score]."""
    return list(vocab.values()) if isinstance(vocab, dict) else list(range(len(_list(vocab))))


def _text(token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def differences(theirs: Vocabulary, tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[str], dict[str, Any]]:
    """(special tokens that `tokenizer` does not know, role → what it is there where theirs is another one)."""
    if tokenizer is None:
        return [], {}
    known = tokenizer.get_vocab()
    unknown = [text for text in theirs.special if text not in known]
    mine = {role: getattr(tokenizer, role, None) for role in theirs.roles}
    return unknown, {role: mine[role] for role, text in theirs.roles.items() if mine[role] != text}


HOW_TO_READ_THEM = (
    "Use the tokenizer of this base, or load the base with transformers, call "
    "model.resize_token_embeddings(len(tokenizer)), and open AdapterLab(model, tokenizer=tokenizer) on it."
)


def token_without_row(model: Any, ids: Iterable[int], labels: Iterable[int] = ()) -> str:
    """One of these ids that the model can't read, or of the labels that it can't foretell, in words; "" if all is well."""
    rows, heads = _rows(model.get_input_embeddings()), _rows(model.get_output_embeddings())
    for found, count, of in ((set(ids), rows, "embeddings"), (set(labels) - {IGNORED}, heads, "the head")):
        wrong = sorted(one for one in found if not 0 <= one < count) if count else []
        if wrong:
            return f"token {wrong[-1]}, where the base has {count} rows of {of} (0 to {count - 1})"
    return ""


def _rows(layer: Any) -> int:
    """How many tokens embeddings or a head are for, whatever stands over them; 0 where that can't be told."""
    # PEFT's tied copy of a head says that it is the other way round
    layer = getattr(layer, "original_module", None) or getattr(layer, "base_layer", layer)
    told = getattr(layer, "num_embeddings", None) or getattr(layer, "out_features", None)
    weight = getattr(layer, "weight", None)
    return told if isinstance(told, int) else 0 if weight is None else int(weight.shape[0])
