"""What a person has to train on, in whatever form → a list of examples of one kind: texts, (prompt, answer) pairs, chats or
token ids. What is wrong with which row is collected and said at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from adapterlab.errors import AdapterLabError

_LARGEST = (1 << 63) - 1
IGNORED = -100  # what the loss skips, in transformers
Row = dict[str, list[int]]

# The first line whose columns are all there says what a row is; columns of the last entry are read where there are any.
_COLUMNS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("token ids", ("input_ids",), ("labels", "attention_mask")),
    ("chats", ("messages",), ()),
    ("pairs", ("prompt", "completion"), ()),
    ("pairs", ("question", "answer"), ()),
    ("pairs", ("instruction", "output"), ("input",)),
    ("pairs", ("instruction", "response"), ("input", "context")),
    ("pairs", ("input", "output"), ()),
    ("texts", ("text",), ()),
)
KINDS = {"texts": "texts", "pairs": "prompt/completion pairs", "chats": "chats", "token ids": "tokenised rows"}
_ENDINGS = ".txt, .csv, .jsonl or .json"
WHAT_TO_GIVE = (
    "Give a list of texts, of (prompt, completion) pairs or of chats, a DataFrame, a datasets.Dataset, "
    f"or the path of a {_ENDINGS} file."
)
_LISTED = 5  # so many problems, and rows of each, are named in an error


# What is wrong, collected


class Unusable(Exception):
    """What is wrong with one row."""


class Problems:
    """What is wrong with which rows, to be raised at once."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.found: dict[str, list[int]] = {}

    def add(self, number: int, what: str) -> None:
        self.found.setdefault(what, []).append(number)

    def raise_any(self, advice: str = "Mend these rows, or leave them out.") -> None:
        if self.found:
            listed = [f"{_named(rows)}: {what}" for what, rows in islice(self.found.items(), _LISTED)]
            if more := sum(len(rows) for rows in islice(self.found.values(), _LISTED, None)):
                listed.append(f"and {more} more")
            raise AdapterLabError(f"{self.label} can't be used: " + "; ".join(listed) + f". {advice}")


def _named(rows: list[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    if len(rows) > _LISTED:
        return f"rows {', '.join(map(str, rows[:_LISTED]))} and {len(rows) - _LISTED} more"
    return f"rows {', '.join(map(str, rows[:-1]))} and {rows[-1]}"


def collected(examples: list[tuple[int, Any]], read: Callable[[Any], Any], problems: Problems) -> list[Any]:
    """`read` of every example; raises everything that was wrong, with what had been found before."""
    done = []
    for number, example in examples:
        try:
            done.append(read(example))
        except Unusable as problem:
            problems.add(number, str(problem))
    problems.raise_any()
    return done


# From the caller's object to a list


def read_items(dataset: Any, label: str) -> tuple[list[Any], str]:
    """The rows as they were given, of tables only the columns that are needed; and " from …", or nothing."""
    import pandas as pd

    if isinstance(dataset, (str, os.PathLike)):
        path = Path(dataset).expanduser()
        return read_items(_read_file(path, label), label)[0], f" from {path.name}"
    if isinstance(dataset, pd.DataFrame):
        return dataset[_needed(dataset.columns, label)].to_dict("records"), " from a DataFrame"
    if isinstance(dataset, Mapping):
        choice = f"{label}[{next(iter(dataset), '…')!r}]"
        advice = f"pandas.DataFrame({label}) of columns" if _form(dataset) else f"one of its splits, as {choice}"
        raise AdapterLabError(f"{label} is a {type(dataset).__name__} of {_list_names(dataset)}: give {advice}.")
    if not hasattr(dataset, "__len__"):
        advice = "give rows that can be counted, as list(rows), or list(stream.take(1000)) of a streamed dataset"
        raise AdapterLabError(
            f"{label} is of type {type(dataset).__name__}, which has no length: {advice}. {WHAT_TO_GIVE}"
        )
    origin = "" if isinstance(dataset, (list, tuple)) else f" from a {type(dataset).__name__}"
    if hasattr(dataset, "column_names"):
        return list(dataset.select_columns(_needed(dataset.column_names, label))), " from a datasets.Dataset"
    if isinstance(dataset, pd.Series):
        return dataset.tolist(), origin
    if not hasattr(dataset, "__getitem__"):
        raise AdapterLabError(f"{label} is of type {type(dataset).__name__}. {WHAT_TO_GIVE}")
    return [dataset[place] for place in range(len(dataset))], origin


def _read_file(path: Path, label: str) -> Any:
    import pandas as pd

    ending = path.suffix.lower()
    if not os.path.isfile(path):  # unlike Path's own, quiet about names that no file could have
        what = "is a folder: give a file in it." if os.path.isdir(path) else "is no file."
        advice = f'A path is that of a {_ENDINGS} file; texts are given as a list, as ["A text."].'
        raise AdapterLabError(f"{label}: {_short(str(path), 120)} {what} {advice}")
    if ending not in (".txt", ".csv", ".jsonl", ".json"):
        raise AdapterLabError(f"{label}: {path.name} can't be read by its ending: give a {_ENDINGS} file.")
    try:
        if ending == ".csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            if not isinstance(frame.index, pd.RangeIndex):  # pandas has taken the first fields for row labels
                raise ValueError("its rows have more fields than its header: put texts that hold commas between quotes")
            return frame
        text = path.read_text(encoding="utf-8-sig")
    except pd.errors.EmptyDataError:
        return []
    except (OSError, ValueError) as error:  # wrong encodings and what pandas' parser says are ValueErrors
        raise AdapterLabError(f"{label}: {path} can't be read as {ending} in UTF-8: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if ending == ".txt":
        return [line.strip() for _, line in lines]
    if ending == ".jsonl":
        return [_parsed(line, f"line {number} of {path.name}", label) for number, line in lines]
    content = _parsed(text, path.name, label)
    if not isinstance(content, list):
        raise AdapterLabError(f"{label}: {path.name} holds no list of rows but {_short(content)}.")
    return content


def _parsed(text: str, where: str, label: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise AdapterLabError(f"{label}: {where} is no JSON: {why}. Mend it, or leave it out.") from error


def _form(columns: Collection[Any]) -> tuple[str, tuple[str, ...], tuple[str, ...]] | None:
    """The kind of rows with these columns, those they are read from, and those beside them that are there."""
    for kind, needed, beside in _COLUMNS:
        if all(name in columns for name in needed):
            return kind, needed, tuple(name for name in beside if name in columns)
    return None


def _needed(columns: Collection[Any], label: str) -> list[str]:
    form = _form(columns)
    if form is None:
        raise AdapterLabError(f"{label} {_no_form(columns)}. Rename its columns, or make such rows of it.")
    return [*form[1], *form[2]]


def _no_form(columns: Collection[Any]) -> str:
    if {"role", "content"} <= set(columns):
        return "is one message of a chat: give a list of chats, each a list of messages, as [[…], […]]"
    choices = ", or ".join(" and ".join(needed) for _, needed, _ in _COLUMNS)
    return f"has the columns {_list_names(columns)}; needed is {choices}"


def _list_names(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "nothing"


# From an item to an example: a text, a (prompt, answer), (messages, the first that may be learned), or columns of ids


def read_examples(items: list[Any], problems: Problems) -> tuple[str, list[tuple[int, Any]]]:
    """The one kind of all items, and those that can be read, with their numbers from 1; raises when none can be."""
    kinds: list[str] = []
    examples: list[tuple[int, Any]] = []
    for number, item in enumerate(items, 1):
        try:
            kind, example = _example(item)
            if kind not in (kinds or [kind]):
                raise Unusable(f"{KINDS[kind]} among {KINDS[kinds[0]]}, where one kind at a time can be given")
        except Unusable as problem:
            problems.add(number, str(problem))
        else:
            kinds = [kind]
            examples.append((number, example))
    if not kinds:
        problems.raise_any()
    return kinds[0], examples


def _example(item: Any) -> tuple[str, Any]:
    if isinstance(item, Mapping):
        return _example_of_columns(item)
    item = _plain(item)
    if isinstance(item, (list, tuple)):
        if item and all(isinstance(turn, Mapping) for turn in item):
            return "chats", (_chat(item), 1)
        if len(item) != 2:
            raise Unusable(f"a list of {len(item)}, where a pair has two texts and a chat has messages")
        return _pair("prompt", item[0], "completion", item[1])
    return "texts", _text("the text", item)


def _example_of_columns(item: Mapping[str, Any]) -> tuple[str, Any]:
    form = _form(item)
    if form is None:
        raise Unusable(_no_form(item))
    kind, needed, beside = form
    if kind == "token ids":
        return kind, {name: item[name] for name in (*needed, *beside)}
    if kind == "chats":
        return kind, (_chat(item[needed[0]]), 1)
    if kind == "texts":
        return kind, _text(needed[0], item[needed[0]])
    prompt, completion = (item[name] for name in needed)
    for name in beside:  # an instruction's own material; most rows have none
        if not _is_nothing(_plain(item[name])):
            prompt = f"{_text(needed[0], prompt)}\n\n{_text(name, item[name])}"
    return _pair(needed[0], prompt, needed[1], completion)


def _is_nothing(value: Any) -> bool:
    """Blank, empty, or what pandas has where nothing is."""
    import pandas as pd

    blank = isinstance(value, str) and not value.strip()
    return blank or value == [] or pd.isna(value) is True


def _pair(prompt_name: str, prompt: Any, completion_name: str, completion: Any) -> tuple[str, Any]:
    """Two texts; or, where one of them is messages, a chat in which only those of the completion are learned."""
    prompt, completion = _plain(prompt), _plain(completion)
    if not any(isinstance(value, (list, tuple)) for value in (prompt, completion)):
        return "pairs", (_text(prompt_name, prompt), _text(completion_name, completion))
    if isinstance(prompt, str):
        prompt = [make_turn("user", prompt)]
    if isinstance(completion, str):
        completion = [make_turn("assistant", completion)]
    if not all(isinstance(value, (list, tuple)) and value for value in (prompt, completion)):
        raise Unusable(f"{prompt_name} or {completion_name} is neither text nor messages")
    return "chats", (_chat([*prompt, *completion], len(prompt)), len(prompt))


def _chat(messages: Any, first: int = 1) -> list[dict[str, str]]:
    """Checked messages that end with the assistant's; what it says before number `first` does not count as an answer."""
    messages = _plain(messages)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise Unusable(f"{_short(messages)} is no chat, which is a list of messages")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise Unusable(f"{_short(message)} is no chat message, which has 'role' and 'content'")
        role = _text("a message's role", message["role"])
        turns.append(make_turn(role, _text(f"the content of the {role} turn", message["content"])))
    if not any(turn["role"] == "assistant" for turn in turns[first:]):
        raise Unusable("the chat has no assistant turn to learn, that is one which answers another")
    if turns[-1]["role"] != "assistant":
        raise Unusable(f"the chat ends with a {turns[-1]['role']} turn, where its last has to be the assistant's")
    return turns


def make_turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name} is {_short(value)} and no text")
    if not value.strip():
        raise Unusable(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{name} can't be written in UTF-8 ({error.reason})") from error
    return str(value)


def _plain(value: Any) -> Any:
    """Arrays, tensors and numpy's numbers as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def _short(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def checked_ids(columns: Mapping[str, Any], encoder_decoder: bool) -> Row:
    ids = _whole_numbers("input_ids", columns["input_ids"])
    mask = [1] * len(ids)
    if columns.get("attention_mask") is not None:
        mask = _whole_numbers("attention_mask", columns["attention_mask"])
    if columns.get("labels") is not None:
        labels = _whole_numbers("labels", columns["labels"])
    elif encoder_decoder:
        raise Unusable("labels are missing, which an encoder-decoder needs")
    else:
        labels = [token if seen else IGNORED for token, seen in zip(ids, mask)]
    if min(ids) < 0:
        raise Unusable(f"input_ids has {min(ids)}, which is no token")
    if len(mask) != len(ids) or (not encoder_decoder and len(labels) != len(ids)):
        raise Unusable(f"{len(ids)} input_ids, {len(mask)} in attention_mask and {len(labels)} labels differ in length")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _whole_numbers(name: str, values: Any) -> list[int]:
    values = _plain(values)
    if not isinstance(values, (list, tuple)) or not values:
        raise Unusable(f"{name} is {_short(values)} and no list of whole numbers")
    values = [_plain(value) for value in values]
    if not all(isinstance(value, int) for value in values):
        raise Unusable(f"{name} is {_short(values)} and no list of whole numbers")
    if any(not -_LARGEST <= value <= _LARGEST for value in values):
        raise Unusable(f"{name} is {_short(values)}, with a number beyond what torch counts with")
    return [int(value) for value in values]
