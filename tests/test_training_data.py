"""What is trained on: every form read alike, the loss on the answers alone, and errors that name the rows."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import BOS, EOS, PAD, tiny_gpt2, tiny_t5, tiny_tokenizer

from adapterlab.demo import demo_training_pairs, fetch_demo_model
from adapterlab.errors import AdapterLabError
from adapterlab.prompts import render_prompts
from adapterlab.training_data import IGNORED, TrainingData, make_collator, read_training_data

PAIRS = [("What is the moon?", "A stone, matey!"), ("Who are you?", "The captain."), ("Why?", "Arr,\nwhy not.")]
DICTS = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
CHATS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}] for prompt, completion in PAIRS
]
DIALOGUE = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Ahoy."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No more."},
]
HEAD = "{{ bos_token }}{% for m in messages %}"
TAIL = "{% endfor %}{% if add_generation_prompt %}"
# As Qwen3's: the last answer has an empty thought before it, those before have none.
REWRITES = (
    HEAD + "{{ '<|' + m.role + '|>\n' }}{% if loop.last and m.role == 'assistant' %}{{ '(thought)\n' }}{% endif %}"
    "{{ m.content + eos_token + '\n' }}" + TAIL + "{{ '<|assistant|>\n' }}{% endif %}"
)
# As DeepSeek-R1's: what generation starts from stands in no finished chat.
OPENS = (
    HEAD
    + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    + TAIL
    + "{{ '<|assistant|>\n(thought)' }}{% endif %}"
)
# As Gemma's: content is trimmed, and a turn ends with a token that is not the end of sequence.
TURNS = (
    HEAD
    + "{{ '<|' + m.role + '|>\n' + (m.content | trim) + '<end_of_turn>\n' }}"
    + TAIL
    + "{{ '<|assistant|>\n' }}{% endif %}"
)
# As gpt-oss's: special tokens stand before the content too.
CHANNELS = (
    HEAD + "{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{{ 'final<|system|>' }}{% endif %}"
    "{{ m.content + '<end_of_turn>' }}" + TAIL + "{{ '<|assistant|>' }}{% endif %}"
)
NO_END = HEAD + "{{ m.role + ': ' + m.content + '\n' }}" + TAIL + "{{ 'assistant: ' }}{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + REWRITES


def tokenizer_with(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def chat_ids(tokenizer: Any, messages: list[dict[str, str]], answering: bool) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=answering, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def said(row: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """The learned stretches of a row, decoded one by one."""
    stretches: list[list[int]] = []
    for place, label in enumerate(row["labels"]):
        if label != IGNORED:
            assert label == row["input_ids"][place]
            if place == 0 or row["labels"][place - 1] == IGNORED:
                stretches.append([])
            stretches[-1].append(label)
    return [tokenizer.decode(ids) for ids in stretches]


def prompt_of(row: dict[str, list[int]]) -> list[int]:
    """The ids before the last learned stretch."""
    last = max(place for place, label in enumerate(row["labels"]) if label == IGNORED)
    return row["input_ids"][: last + 1]


class Torch(torch.utils.data.Dataset[Any]):
    """A torch Dataset over a list."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place]


# ----- pairs and chats -----


def test_a_pair_is_the_chat_that_the_template_writes_and_its_answer_is_learned() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    data = read_training_data(PAIRS, tokenizer)
    assert (data.kind, data.source, len(data)) == ("pairs", "3 prompt/completion pairs", 3)
    for row, chat, (prompt, completion) in zip(data.rows, CHATS, PAIRS):
        before, whole = chat_ids(tokenizer, chat[:1], True), chat_ids(tokenizer, chat, False)
        assert before == whole[: len(before)]
        assert whole[-1:] == tokenizer("\n", add_special_tokens=False)["input_ids"]
        assert whole[-2] == EOS
        assert row["input_ids"] == whole[:-1]  # the line break after the turn's end is nobody's to learn
        assert row["labels"] == [IGNORED] * len(before) + whole[len(before) : -1]
        assert row["attention_mask"] == [1] * len(whole[:-1])
        assert tuple(before) == render_prompts(tokenizer, prompt)[0].ids
        assert said(row, tokenizer) == [completion + "</s>"]
    assert data.tokens == sum(len(row["input_ids"]) for row in data.rows)
    assert data.learned == sum(len(tokenizer(c, add_special_tokens=False)["input_ids"]) + 1 for _, c in PAIRS)
    assert data.longest == max(len(row["input_ids"]) for row in data.rows)


def test_every_answer_of_a_chat_is_learned() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    data = read_training_data([DIALOGUE, CHATS[0]], tokenizer)
    row = data.rows[0]
    assert (data.kind, data.source) == ("chats", "2 chats")
    assert row["input_ids"] == chat_ids(tokenizer, DIALOGUE, False)[:-1]
    assert said(row, tokenizer) == ["Ahoy.</s>", "No more.</s>"]
    assert prompt_of(row) == chat_ids(tokenizer, DIALOGUE[:4], True)
    assert data.rows[1] == read_training_data(PAIRS[:1], tokenizer).rows[0]


@pytest.mark.parametrize(
    ("template", "learned", "end"),
    [
        (REWRITES, "(thought)\nNo more.", "</s>"),
        (OPENS, "No more.", "</s>"),
        (NO_SYSTEM, "(thought)\nNo more.", "</s>"),
    ],
)
def test_where_a_template_rewrites_history_the_last_answer_is_learned(
    template: str, learned: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, chat = tokenizer_with(template), DIALOGUE[1:]
    data = read_training_data([chat, CHATS[0]], tokenizer)
    assert "only the last answer is learned of 1 of 2 chats" in capsys.readouterr().out
    assert said(data.rows[0], tokenizer) == [learned + end]
    assert prompt_of(data.rows[0]) == chat_ids(tokenizer, chat[:-1], True)
    [row] = read_training_data(PAIRS[:1], tokenizer).rows
    assert said(row, tokenizer) == [learned.replace("No more.", PAIRS[0][1]) + end]
    assert prompt_of(row) == list(render_prompts(tokenizer, PAIRS[0][0])[0].ids)
    assert not capsys.readouterr().out


def test_a_turn_ends_with_the_templates_own_token() -> None:
    tokenizer = tokenizer_with(TURNS)
    rows = read_training_data([DIALOGUE, [CHATS[0][0], {"role": "assistant", "content": " Arr. \n"}]], tokenizer).rows
    assert said(rows[0], tokenizer) == ["Ahoy.<end_of_turn>", "No more.<end_of_turn>"]
    assert said(rows[1], tokenizer) == ["Arr.<end_of_turn>"]


@pytest.mark.parametrize("content", ["a", "f", "final", "Yes.", "system", "end"])
def test_an_answer_is_found_behind_what_the_template_puts_before_it(content: str) -> None:
    tokenizer = tokenizer_with(CHANNELS)
    [row] = read_training_data([("Is it?", content)], tokenizer).rows
    assert said(row, tokenizer) == [f"final<|system|>{content}<end_of_turn>"]
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": content}]
    assert row["input_ids"] == chat_ids(tokenizer, chat, False)


def test_an_end_that_stands_in_a_text_is_neither_doubled_nor_lost() -> None:
    tokenizer = tiny_tokenizer()
    rows = read_training_data([("Why</s>", "so"), ("Why", "so</s>")], tokenizer).rows
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["<s>Why</s> so</s>", "<s>Why so</s>"]
    assert [said(row, tokenizer) for row in rows] == [[" so</s>"]] * 2
    [row] = read_training_data(["Why</s>"], tokenizer).rows
    assert tokenizer.decode(row["input_ids"]) == "<s>Why</s>"


def test_a_template_without_an_end_gets_that_of_the_sequence_after_the_last_answer() -> None:
    tokenizer = tokenizer_with(NO_END)
    [row] = read_training_data([DIALOGUE], tokenizer).rows
    assert said(row, tokenizer) == ["Ahoy.", "No more.</s>"]
    plain = NO_END.replace("m.content +", "m.content + '<end>' +")  # no special token, so no end to the model
    assert said(read_training_data([("Is it?", "e")], tokenizer_with(plain)).rows[0], tokenizer) == ["e</s>"]
    assert tokenizer.decode(prompt_of(row)) == (
        "<s>system: Be short.\nuser: Hello\nassistant: Ahoy.\nuser: And?\nassistant: "
    )


def test_an_answer_goes_on_from_its_prompt_where_a_tokenizer_begins_texts_with_a_space() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokenizer.decode(tokenizer("yes", add_special_tokens=False)["input_ids"]) == " yes"
    assert said(read_training_data([("Is it?", "yes")], tokenizer).rows[0], tokenizer) == ["yes</s>"]
    tokenizer.chat_template = None
    assert said(read_training_data([("Is it?", "yes")], tokenizer).rows[0], tokenizer) == [" yes</s>"]


@pytest.mark.parametrize(
    ("prompt", "completion", "learned"),
    [("2+2 =", "4", " 4"), ("2+2 = ", "4", "4"), ("2+2 =", " 4", " 4"), ("2+2 =\n", "\n4", "\n4"), ("a", "b ", " b ")],
)
def test_without_a_template_the_answer_continues_the_prompt(prompt: str, completion: str, learned: str) -> None:
    tokenizer = tiny_tokenizer()
    [row] = read_training_data([(prompt, completion)], tokenizer).rows
    assert prompt_of(row) == tokenizer(prompt)["input_ids"] == list(render_prompts(tokenizer, prompt)[0].ids)
    assert row["input_ids"][0] == BOS
    assert row["input_ids"][-1] == EOS
    assert said(row, tokenizer) == [learned + "</s>"]


def test_an_end_that_the_tokenizer_puts_after_prompts_is_not_left_in_the_middle() -> None:
    tokenizer = tiny_tokenizer(seq2seq=True)  # here as a decoder's
    [row] = read_training_data([("Why", "not?")], tokenizer).rows
    assert tokenizer.decode(row["input_ids"]) == "Why not?</s>"
    assert said(row, tokenizer) == [" not?</s>"]
    [row] = read_training_data(["Why not?"], tokenizer).rows
    assert tokenizer.decode(row["input_ids"]) == "Why not?</s>"


def test_texts_are_learned_whole() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    data = read_training_data(["The moon.", "The sea\nand the ship."], tokenizer)
    assert (data.kind, data.source) == ("texts", "2 texts")
    for row, text in zip(data.rows, ["The moon.", "The sea\nand the ship."]):
        assert row["input_ids"] == [*tokenizer(text)["input_ids"], EOS] == row["labels"]


def test_a_tokenizer_without_an_end_of_sequence() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert said(read_training_data(PAIRS[:1], tokenizer).rows[0], tokenizer) == [" " + PAIRS[0][1]]


def test_an_encoder_decoder_reads_the_prompt_and_learns_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer(seq2seq=True)
    data = read_training_data(PAIRS, tokenizer, encoder_decoder=True)
    for row, (prompt, completion) in zip(data.rows, PAIRS):
        assert row["input_ids"] == tokenizer(prompt)["input_ids"]
        assert row["input_ids"][-1] == EOS
        assert row["labels"] == tokenizer(completion)["input_ids"]
        assert row["labels"][-1] == EOS
    assert data.learned == sum(len(row["labels"]) for row in data.rows)
    assert data.tokens == data.learned + sum(len(row["input_ids"]) for row in data.rows)
    assert data.longest == max(len(row[name]) for row in data.rows for name in ("input_ids", "labels"))
    with pytest.raises(AdapterLabError, match=r"holds texts, and an encoder-decoder .* pairs"):
        read_training_data(["The moon."], tokenizer, encoder_decoder=True)
    tokenizer = tiny_tokenizer(chat=True)
    [row] = read_training_data([DIALOGUE], tokenizer, encoder_decoder=True).rows
    assert row["input_ids"] == chat_ids(tokenizer, DIALOGUE[:-1], True)
    assert tokenizer.decode(row["labels"]) == "<s>No more.</s>"
    assert "only the last answer is learned of 1 of 1 chats" in capsys.readouterr().out


_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_texts, _texts), min_size=1, max_size=4), st.booleans())
def test_what_is_learned_is_the_answer_and_what_comes_before_is_what_generation_sees(
    pairs: list[tuple[str, str]], template: bool
) -> None:
    tokenizer = tiny_tokenizer(chat=template)
    for row, (prompt, completion) in zip(read_training_data(pairs, tokenizer).rows, pairs):
        start = len(render_prompts(tokenizer, prompt)[0].ids)
        assert tuple(row["input_ids"][:start]) == render_prompts(tokenizer, prompt)[0].ids
        assert set(row["labels"][:start]) <= {IGNORED}
        assert row["labels"][start:] == row["input_ids"][start:]
        between = "" if template or prompt[-1].isspace() or completion[0].isspace() else " "
        assert tokenizer.decode(row["labels"][start:]) == between + completion + "</s>"


@pytest.mark.demo
@pytest.mark.parametrize("name", ["pirate", "robot", "bard"])
def test_the_demos_own_pairs_are_a_rendered_prompt_the_answer_and_its_end(name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer, pairs = AutoTokenizer.from_pretrained(fetch_demo_model()), demo_training_pairs(name)
    for row, (question, answer) in zip(read_training_data(pairs, tokenizer).rows, pairs):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert row["input_ids"] == prompt + reply
        assert row["attention_mask"] == [1] * len(prompt + reply)
        assert row["labels"] == [IGNORED] * len(prompt) + reply


# ----- the forms -----


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


PAIR_COLUMNS = ["prompt completion", "question answer", "instruction output", "instruction response", "input output"]


@pytest.mark.parametrize("columns", PAIR_COLUMNS)
def test_pairs_in_every_form_give_the_same_rows(columns: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    expected = read_training_data(PAIRS, tokenizer).rows
    rows = [{**dict(zip(columns.split(), pair)), "id": 7} for pair in PAIRS]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "pairs.CSV", index=False)
    lines = "\n\n".join(map(json.dumps, rows))
    forms: dict[str, Any] = {
        "": rows,
        " from a DataFrame": frame,
        " from a datasets.Dataset": datasets.Dataset.from_list(rows),
        " from a Torch": Torch(rows),
        " from pairs.CSV": tmp_path / "pairs.CSV",
        " from pairs.jsonl": str(write(tmp_path / "pairs.jsonl", "\ufeff" + lines + "\n")),
        " from pairs.json": write(tmp_path / "pairs.json", json.dumps(rows)),
    }
    for origin, form in forms.items():
        data = read_training_data(form, tokenizer)
        assert data.rows == expected, origin
        assert (data.kind, data.source) == ("pairs", f"3 prompt/completion pairs{origin}")


def test_pairs_as_lists_chats_and_conversational_pairs_give_the_same_rows(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    expected = read_training_data(PAIRS, tokenizer).rows
    chats = [{"messages": chat} for chat in CHATS]
    frame = pd.DataFrame({"messages": [np.array(chat, dtype=object) for chat in CHATS]})  # as parquet is read
    extra = [[{**turn, "name": None} for turn in chat] for chat in CHATS]
    conversational = [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS]
    half = [{"prompt": chat[0]["content"], "completion": chat[1:]} for chat in CHATS]
    lines = write(tmp_path / "chats.jsonl", "\n".join(map(json.dumps, chats)))
    sets = [datasets.Dataset.from_list(rows) for rows in (chats, conversational)]
    lists = [[list(pair) for pair in PAIRS], tuple(PAIRS), np.array(PAIRS), CHATS, chats, extra, half, conversational]
    for form in (*lists, *sets, frame, lines):
        assert read_training_data(form, tokenizer).rows == expected
    assert read_training_data(lines, tokenizer).source == "3 chats from chats.jsonl"
    # Of a completion after a longer conversation, nothing that was said before is learned.
    [row] = read_training_data([{"prompt": DIALOGUE[:4], "completion": DIALOGUE[4:]}], tokenizer).rows
    assert said(row, tokenizer) == ["No more.</s>"]


def test_texts_in_every_form_give_the_same_rows(tmp_path: Path) -> None:
    tokenizer, texts = tiny_tokenizer(), ["The moon.", "NA", "42"]
    expected = read_training_data(texts, tokenizer).rows
    rows = [{"text": text} for text in texts]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "texts.csv", index=False)
    files = [
        tmp_path / "texts.csv",
        write(tmp_path / "texts.txt", "The moon.\r\n\n NA\n42"),
        write(tmp_path / "texts.jsonl", '"The moon."\n"NA"\n{"text": "42"}'),
    ]
    dataset = datasets.Dataset.from_list(rows)
    for form in (
        tuple(texts),
        rows,
        frame,
        frame["text"],
        np.array(texts),
        dataset,
        dataset["text"],
        Torch(texts),
        *files,
    ):
        assert read_training_data(form, tokenizer).rows == expected
    assert read_training_data(tmp_path / "texts.txt", tokenizer).source == "3 texts from texts.txt"


def test_an_instructions_material_belongs_to_the_prompt() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4", "text": "### all of it"},
        {"instruction": "Sing.", "input": "", "output": "La."},
        {"instruction": "Sing.", "input": None, "output": "La."},
    ]
    expected = read_training_data([("Add.\n\n2 and 2", "4"), ("Sing.", "La."), ("Sing.", "La.")], tokenizer).rows
    assert read_training_data(rows, tokenizer).rows == expected
    assert read_training_data(pd.DataFrame(rows), tokenizer).rows == expected
    rows = [{"instruction": "Add.", "context": "2 and 2", "response": "4"}]
    assert read_training_data(rows, tokenizer).rows == expected[:1]
    for nothing in ("  ", [], float("nan"), pd.NA, np.nan):
        rows = [{"instruction": "Sing.", "input": nothing, "output": "La."}]
        assert read_training_data(rows, tokenizer).rows == expected[1:2]
    for what in (21, ["2", "3"], {"a": 1}):
        with pytest.raises(AdapterLabError, match=r"row 1: input is .* and no text"):
            read_training_data([{"instruction": "Double it.", "input": what, "output": "42"}], tokenizer)


def test_token_ids_are_taken_as_they_are() -> None:
    ids, labels = [[5, 6, 7], [8, 9]], [[IGNORED, 6, 7], [8, 9]]
    expected = [{"input_ids": i, "attention_mask": [1] * len(i), "labels": labs} for i, labs in zip(ids, labels)]
    rows = [{"input_ids": i, "labels": labs, "text": "…"} for i, labs in zip(ids, labels)]
    tensors = [{name: torch.tensor(row[name]) for name in ("input_ids", "labels")} for row in expected]
    arrays = datasets.Dataset.from_list(expected).with_format("numpy")
    for form in (rows, expected, tensors, Torch(tensors), pd.DataFrame(rows), arrays):
        data = read_training_data(form, None)  # no tokenizer is needed
        assert (data.rows, data.kind) == (expected, "token ids")
    [row] = read_training_data([{"input_ids": [5, 6, PAD], "attention_mask": [1, 1, 0]}], None).rows
    assert row == {"input_ids": [5, 6, PAD], "attention_mask": [1, 1, 0], "labels": [5, 6, IGNORED]}
    both = [{"input_ids": [5, 6], "labels": [7]}]
    assert read_training_data(both, None, encoder_decoder=True).rows[0]["labels"] == [7]
    assert read_training_data(both, None, encoder_decoder=True).source == "1 tokenised row"


def test_what_was_given_is_not_changed() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    ids = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    for given_ in (PAIRS, DICTS, CHATS, [DIALOGUE], ids, [{"messages": DIALOGUE}]):
        before = copy.deepcopy(given_)
        data = read_training_data(given_, tokenizer, max_length=100)
        data.rows[0]["input_ids"].append(0)
        assert given_ == before
    frame = pd.DataFrame(DICTS)
    read_training_data(frame, tokenizer)
    pd.testing.assert_frame_equal(frame, pd.DataFrame(DICTS))
    assert tokenizer.padding_side == "right"
    assert tokenizer.chat_template == tiny_tokenizer(chat=True).chat_template


# ----- errors -----


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], r"dataset has no rows\. Give a list of texts, of \(prompt, completion\) pairs"),
        (pd.DataFrame({"prompt": [], "completion": []}), "no rows from a DataFrame"),
        (None, "dataset is of type NoneType"),
        (7, "dataset is of type int"),
        ((pair for pair in PAIRS), r"generator, which has no length: .*list\(rows\)"),
        ({"a", "b"}, "dataset is of type set"),
        (DICTS[0], r"dict of prompt, completion: give pandas\.DataFrame\(dataset\) of columns"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(DICTS)}), r"one of its splits, as dataset\['train'\]"),
        (datasets.Dataset.from_list(DICTS).to_iterable_dataset(), r"IterableDataset, which has no length.*\.take\(1000\)"),
        (pd.DataFrame({"a": ["b"], "c": ["d"]}), "dataset has the columns a, c; needed is .*prompt and completion, or "),
        (datasets.Dataset.from_dict({"prompt": ["b"]}), "has the columns prompt; needed is"),
        ([{"chosen": "a"}, {"chosen": "b"}], "rows 1 and 2: has the columns chosen; needed is"),
        (CHATS[0], "rows 1 and 2: is one message of a chat: give a list of chats"),
        (["The moon.", "", "The sea.", "  \n"], r"rows 2 and 4: the text is empty\. Mend these rows"),
        ([None, float("nan"), 3, "a"], "row 1: the text is None and no text; row 2: the text is nan .*; row 3: the text is 3"),
        ([("a", "b"), ("a", "")], "row 2: completion is empty"),
        ([(" ", "b"), ("a", "b"), ("a", None)], "row 1: prompt is empty; row 3: completion is None"),
        ([{"question": "a", "answer": float("nan")}], "row 1: answer is nan and no text"),
        (pd.DataFrame({"prompt": ["a", None], "completion": ["b", "c"]}), "row 2: prompt is (None|nan)"),
        (pd.DataFrame({"text": pd.array(["a", pd.NA], dtype="string")}), r"row 2: text is (<NA>|None|nan)"),
        ([("a", "b", "c")], "row 1: a list of 3, where a pair has two texts"),
        ([("a", ["b"])], r"row 1: 'b' is no chat message"),
        ([(3, ["b"])], "row 1: prompt or completion is neither text nor messages"),
        ([{"prompt": CHATS[0], "completion": []}], "row 1: prompt or completion is neither"),
        (["a", ("a", "b"), "c", CHATS[0]], "row 2: prompt/completion pairs among texts, .*; row 4: chats among texts"),
        ([("a", "b"), {"input_ids": [1, 2]}], "row 2: tokenised rows among prompt/completion pairs"),
        (["a\ud800"], "row 1: the text can't be written in UTF-8"),
        ([*CHATS, CHATS[0][:1]], "row 4: the chat has no assistant turn to learn"),
        ([DIALOGUE[:4]], "row 1: the chat ends with a user turn"),
        ([DIALOGUE[2:3]], "row 1: the chat has no assistant turn to learn, that is one which answers another"),
        ([{"messages": []}], r"row 1: \[\] is no chat"),
        ([{"messages": "hello"}], "row 1: 'hello' is no chat"),
        ([[{"role": "user"}]], "row 1: {'role': 'user'} is no chat message, which has 'role' and 'content'"),
        ([[CHATS[0][0], {"role": "assistant", "content": None}]], "row 1: the content of the assistant turn is None"),
        ([[CHATS[0][0], {"role": "assistant", "content": " "}]], "row 1: the content of the assistant turn is empty"),
        ([{"input_ids": []}], r"row 1: input_ids is \[\] and no list of whole numbers"),
        ([{"input_ids": [1.5, 2]}], r"row 1: input_ids is \[1.5, 2\] and no list"),
        ([{"input_ids": [[1, 2]]}], "row 1: input_ids is .* and no list"),
        ([{"input_ids": [1, -1]}], "row 1: input_ids has -1, which is no token"),
        ([{"input_ids": [1, 2], "labels": [1]}], "row 1: 2 input_ids, 2 in attention_mask and 1 labels differ"),
        ([{"input_ids": [1, 2], "labels": [IGNORED] * 2}], "row 1: nothing to learn in its 2 tokens. Leave"),
        ([{"input_ids": [1]}], "row 1: nothing to learn"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_said_by_row(dataset: Any, words: str) -> None:
    with pytest.raises(AdapterLabError, match=words):
        read_training_data(dataset, tiny_tokenizer(chat=True))


def test_all_that_is_wrong_is_said_at_once_and_no_more_than_can_be_read() -> None:
    pairs: list[Any] = [("a", "")] * 8 + [("a", "b"), ("a", None), 1, 2, 3, 4, 5, 6]
    with pytest.raises(AdapterLabError) as caught:
        read_training_data(pairs, tiny_tokenizer(), label="eval_dataset")
    assert str(caught.value) == (
        "eval_dataset can't be used: rows 1, 2, 3, 4, 5 and 3 more: completion is empty; row 10: completion is None and "
        "no text; row 11: the text is 1 and no text; row 12: the text is 2 and no text; row 13: the text is 3 and no "
        "text; and 3 more. Mend these rows, or leave them out."
    )
    # What a template refuses and what can't be read come together.
    with pytest.raises(AdapterLabError, match=r"row 2: .* is empty; row 1: the model's chat template .*no system role"):
        read_training_data([DIALOGUE, [CHATS[0][0], {"role": "x", "content": ""}]], tokenizer_with(NO_SYSTEM))


def test_what_the_tokenizer_lacks_is_said() -> None:
    with pytest.raises(AdapterLabError, match=r"This lab has no tokenizer: give one, as in AdapterLab\(model, tok"):
        read_training_data(PAIRS, None)
    with pytest.raises(AdapterLabError, match=r"holds chats, and this tokenizer has no chat template: give \(prompt"):
        read_training_data(CHATS, tiny_tokenizer())
    with pytest.raises(AdapterLabError, match="row 1: labels are missing, which an encoder-decoder needs"):
        read_training_data([{"input_ids": [1]}], None, encoder_decoder=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", '"a"\n\n{"text": \n"b"', r"line 3 of rows\.jsonl is no JSON"),
        ("rows.json", "[1, 2", r"rows\.json is no JSON"),
        ("rows.json", '{"text": "a"}', r"rows\.json holds no list of rows but {'text': 'a'}"),
        ("rows.xml", "<a/>", r"rows\.xml can't be read by its ending: give a \.txt, \.csv, \.jsonl or \.json file"),
        ("rows", "a", "can't be read by its ending"),
        ("rows.csv", "prompt,completion\n", r"has no rows from rows\.csv"),
        ("rows.csv", "", r"has no rows from rows\.csv"),
        ("rows.csv", "prompt,completion\na,\n", "row 1: completion is empty"),
        ("rows.csv", "a,b\n1,2\n", "has the columns a, b; needed is"),
        (
            "rows.csv",
            "text\nHello, world\nBye, moon\n",
            "more fields than its header: put texts that hold commas between",
        ),
        ("rows.csv", "prompt,completion\nHi,Arr, matey\n", "more fields than its header"),
        ("rows.csv", 'prompt,completion\n"a,b\n', r"rows\.csv can't be read as \.csv in UTF-8"),
        ("rows.txt", "\n \n", r"has no rows from rows\.txt"),
        ("rows.txt", b"\xff\xfe\x00", r"rows\.txt can't be read as \.txt in UTF-8"),
    ],
)
def test_files_that_can_not_be_read(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AdapterLabError, match=words):
        read_training_data(tmp_path / name, tiny_tokenizer())


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "none.csv", r"none\.csv' is no file"),
        (tmp_path, "is a folder: give a file in it"),
        ("The moon is a stone.", r"'The moon is a stone\.' is no file\. .* texts are given as a list"),
        ("The moon. " * 1000, "is no file"),
        ("The\0moon", "is no file"),
    ):
        with pytest.raises(AdapterLabError, match=words) as caught:
            read_training_data(path, tiny_tokenizer(), label="eval_dataset")
        assert str(caught.value).startswith("eval_dataset: ")
        assert len(str(caught.value)) < 300


# ----- lengths -----


def test_rows_are_cut_only_where_it_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["The moon.", "The moon is a celestial body " * 3]
    whole = read_training_data(texts, tokenizer)
    short, long = (len(row["input_ids"]) for row in whole.rows)
    assert short < 20 < long
    words = rf"row 2: {long} tokens, where the model has 20 positions\. Shorten them, or give max_length=20, which cuts"
    with pytest.raises(AdapterLabError, match=words):
        read_training_data(texts, tokenizer, context=20)
    assert read_training_data(texts, tokenizer, context=long, max_length=long) == whole
    assert not capsys.readouterr().out
    data = read_training_data(texts, tokenizer, context=20, max_length=20)
    assert capsys.readouterr().out == "dataset: 1 of 2 rows are cut to their first 20 tokens (max_length).\n"
    assert data.rows == [whole.rows[0], {name: values[:20] for name, values in whole.rows[1].items()}]
    with pytest.raises(AdapterLabError, match="give max_length=20, which cuts"):
        read_training_data(texts, tokenizer, context=20, max_length=21)
    for wrong in (0, -1, 2.5, True, "20"):
        with pytest.raises(AdapterLabError, match=r"max_length=.* is no whole number from 1 up"):
            read_training_data(texts, tokenizer, max_length=wrong)  # type: ignore[arg-type]


def test_a_cut_that_leaves_nothing_to_learn_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    pairs = [("Why?", "Arr"), ("The moon is a celestial body", "Arr")]
    prompt = len(tokenizer(pairs[1][0])["input_ids"])
    assert read_training_data(pairs, tokenizer, max_length=prompt + 1).learned > 0
    with pytest.raises(AdapterLabError, match=rf"row 2: nothing to learn in the first {prompt} of .* raise max_length"):
        read_training_data(pairs, tokenizer, max_length=prompt)
    data = read_training_data(pairs, tiny_tokenizer(seq2seq=True), encoder_decoder=True, max_length=2)
    assert data.longest == 2
    assert all(len(row["labels"]) == 2 for row in data.rows)


# ----- held out, batches -----


@given(count=st.integers(2, 60), share=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_a_split_is_disjoint_complete_and_the_same_again(count: int, share: float, seed: int) -> None:
    rows = [{"input_ids": [n, n], "attention_mask": [1, 1], "labels": [n, n]} for n in range(count)]
    data = TrainingData(rows, "texts", f"{count} texts", True)
    train, held_out = data.split(share, seed)
    assert (train, held_out) == data.split(share, seed)
    ids = [[row["input_ids"][0] for row in part.rows] for part in (train, held_out)]
    assert sorted(ids[0] + ids[1]) == list(range(count))
    assert all(part == sorted(part) and part for part in ids)
    assert len(held_out) == min(max(round(count * share), 1), count - 1)
    assert held_out.source == f"{len(held_out)} of {count} texts"
    assert train.encoder_decoder


def test_other_seeds_hold_out_other_rows_and_nonsense_is_refused() -> None:
    data = read_training_data([f"Text {n}" for n in range(40)], tiny_tokenizer())
    assert len({str(data.split(0.25, seed)[1].rows) for seed in range(5)}) == 5
    for share in (0, 1, -0.1, 1.5, float("nan"), True, "half", None):
        with pytest.raises(AdapterLabError, match="is no share to hold out: give a number between 0 and 1"):
            data.split(share, 0)  # type: ignore[arg-type]
    with pytest.raises(AdapterLabError, match="One row can't be split: give at least two"):
        read_training_data(["One."], tiny_tokenizer()).split(0.5, 0)


@pytest.mark.parametrize("tokens", [{}, {"pad_token": None}, {"pad_token": None, "eos_token": None}])
def test_a_batch_is_padded_to_its_longest_row(tokens: dict[str, None]) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    rows = read_training_data(PAIRS, tokenizer).rows
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.padding_side = "left"  # as for generation
    batch = pickle.loads(pickle.dumps(make_collator(tokenizer)))(rows)
    filling = {"input_ids": [PAD, EOS, 0][len(tokens)], "attention_mask": 0, "labels": IGNORED}
    assert set(batch) == set(filling)
    longest = max(len(row["labels"]) for row in rows)
    for name, value in filling.items():
        assert batch[name].tolist() == [row[name] + [value] * (longest - len(row[name])) for row in rows]
        assert batch[name].dtype == torch.int64
    assert make_collator(None)(rows)["input_ids"].shape == (3, longest)


def test_padding_changes_no_loss() -> None:
    """GPT-2 counts positions from the first column; each row's loss alone is the oracle."""
    tokenizer, model = tiny_tokenizer(), tiny_gpt2()
    tokenizer.padding_side = "left"
    data, collator = read_training_data(PAIRS, tokenizer), make_collator(tokenizer)
    with torch.no_grad():
        alone = sum(
            model(**{name: torch.tensor([values]) for name, values in row.items()}).loss
            * sum(label != IGNORED for label in row["labels"])
            for row in data.rows
        )
        together = model(**collator(data.rows)).loss
    torch.testing.assert_close(together, alone / data.learned)


def test_a_batch_for_an_encoder_decoder() -> None:
    tokenizer, model = tiny_tokenizer(seq2seq=True), tiny_t5()
    data = read_training_data(PAIRS, tokenizer, encoder_decoder=True)
    batch = make_collator(tokenizer)(data.rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape != batch["labels"].shape
    shifted = make_collator(tokenizer, model)(data.rows)
    start = torch.full((3, 1), PAD)
    expected = torch.cat([start, batch["labels"][:, :-1].masked_fill(batch["labels"][:, :-1] == IGNORED, PAD)], 1)
    assert torch.equal(shifted.pop("decoder_input_ids"), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**shifted, decoder_input_ids=expected).loss)
