"""What a person trains on → rows of ids and labels, with the loss on what the model is to say and on nothing else.

Texts are learned whole. Of pairs and chats the answers are learned, each up to and with the token that ends the turn. A
prompt's ids are those it has when the lab generates, so the model learns to go on from exactly what it will see.
"""

from __future__ import annotations

import numbers
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.examples import (
    IGNORED,
    KINDS,
    WHAT_TO_GIVE,
    Problems,
    Row,
    Unusable,
    checked_ids,
    collected,
    make_turn,
    read_examples,
    read_items,
)
from adapterlab.notices import say

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """Rows for transformers' Trainer, as they are before padding.

    Each row has `input_ids`, `attention_mask` and `labels`. For a decoder labels are as long as `input_ids`, with
    `IGNORED` where nothing is learned; for an encoder-decoder they are the answer's ids. `kind` is "texts", "pairs",
    "chats" or "token ids"; `source` says in words what it was, as in "40 chats from pirate.jsonl".
    """

    rows: list[Row]
    kind: str
    source: str
    encoder_decoder: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """All ids that the model reads, the decoder's too."""
        both = ("input_ids", "labels") if self.encoder_decoder else ("input_ids",)
        return sum(len(row[name]) for row in self.rows for name in both)

    @property
    def learned(self) -> int:
        """How many of them the loss is taken over."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"])

    @property
    def longest(self) -> int:
        """The length of the longest row."""
        return max(map(_length, self.rows))

    def split(self, share: float, seed: int) -> tuple[TrainingData, TrainingData]:
        """Rows to train on and rows held out, each in their order: `share` of them is held out, by this seed.

        There is at least one of either; raises `AdapterLabError` where there can't be, and for a share outside (0, 1).
        """
        if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share < 1:
            raise AdapterLabError(f"{share!r} is no share to hold out: give a number between 0 and 1, as 0.1.")
        if len(self) < 2:
            raise AdapterLabError("One row can't be split: give at least two, one to train on and one to hold out.")
        count = min(max(round(len(self) * share), 1), len(self) - 1)
        held_out = set(random.Random(seed).sample(range(len(self)), count))
        return self._part(set(range(len(self))) - held_out), self._part(held_out)

    def _part(self, places: set[int]) -> TrainingData:
        return replace(
            self, rows=[self.rows[place] for place in sorted(places)], source=f"{len(places)} of {self.source}"
        )


def read_training_data(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    encoder_decoder: bool = False,
    context: int | None = None,
    max_length: int | None = None,
    label: str = "dataset",
) -> TrainingData:
    """Read texts, prompt/completion pairs, chats or token ids, from any of the forms that `WHAT_TO_GIVE` names, and tokenise.

    Pairs go through the chat template where the tokenizer has one, as prompts do; without one they are one text, with a
    space between prompt and answer if there is no white space. context: how many positions the model has. max_length:
    longer rows are cut at their ends, and that is said. label: the parameter's name, for errors.
    Raises one `AdapterLabError` that names the rows with which something is wrong; `dataset` is never changed.
    """
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise AdapterLabError(f"max_length={max_length!r} is no whole number from 1 up.")
    items, origin = read_items(dataset, label)
    if not items:
        raise AdapterLabError(f"{label} has no rows{origin}. {WHAT_TO_GIVE}")
    problems = Problems(label)
    kind, examples = read_examples(items, problems)
    if kind == "token ids":
        rows = collected(examples, partial(checked_ids, encoder_decoder=encoder_decoder), problems)
    elif tokenizer is None:
        raise AdapterLabError("This lab has no tokenizer: give one, as in AdapterLab(model, tokenizer=tokenizer).")
    else:
        rows = _tokenised(kind, examples, tokenizer, encoder_decoder, problems)
    rows = _fitted(rows, context, max_length, encoder_decoder, label)
    words = KINDS[kind] if len(rows) > 1 else KINDS[kind][:-1]
    return TrainingData(rows, kind, f"{len(rows)} {words}{origin}", encoder_decoder)


def make_collator(
    tokenizer: PreTrainedTokenizerBase | None, model: Any = None
) -> Callable[[list[Row]], dict[str, Tensor]]:
    """A data collator: pads at the right to the longest row of the batch; what it pads is masked and not learned.

    Unlike transformers' `DataCollatorForSeq2Seq` it needs no pad token, and it pads at the right where the tokenizer
    pads prompts at the left: in training, models count positions from the first column. model: an encoder-decoder,
    whose `decoder_input_ids` are then there too; the Trainer's label smoothing needs them.
    """
    candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    pad = next((token for token in candidates if token is not None), 0)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return partial(_pad, filling={"input_ids": pad, "attention_mask": 0, "labels": IGNORED}, shift=shift)


def _pad(rows: list[Row], filling: dict[str, int], shift: Callable[..., Tensor] | None) -> dict[str, Tensor]:
    import torch

    batch = {}
    for name, value in filling.items():
        longest = max(len(row[name]) for row in rows)
        batch[name] = torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
    if shift is not None:
        batch["decoder_input_ids"] = shift(labels=batch["labels"])
    return batch


# From an example to a script: the pieces of one text, and which of them are learned


@dataclass(frozen=True)
class _Script:
    """Pieces of one text in their order, each with whether it is learned; `eos`: whether an end of sequence follows."""

    pieces: tuple[tuple[str, bool], ...]
    eos: bool = True
    unlearned: int = 0  # how many answers in it can't be learned


def _tokenised(
    kind: str, examples: list[tuple[int, Any]], tokenizer: Any, encoder_decoder: bool, problems: Problems
) -> list[Row]:
    label, template = problems.label, getattr(tokenizer, "chat_template", None) is not None
    if kind == "chats" and not template:
        advice = "give (prompt, completion) pairs, or set tokenizer.chat_template"
        raise AdapterLabError(f"{label} holds chats, and this tokenizer has no chat template: {advice}.")
    if kind == "texts" and encoder_decoder:
        advice = "give (prompt, completion) pairs"
        raise AdapterLabError(f"{label} holds texts, and an encoder-decoder learns to answer: {advice}.")
    if kind == "pairs" and template:
        examples = [
            (n, ([make_turn("user", prompt), make_turn("assistant", answer)], 1)) for n, (prompt, answer) in examples
        ]
    write: Callable[[Any], _Script] = _write_text
    if kind != "texts":
        write = _Writer(tokenizer, encoder_decoder).write if template else partial(_write_pair, apart=encoder_decoder)
    scripts = collected(examples, write, problems)
    if count := sum(script.unlearned > 0 for script in scripts):
        reason = "an encoder-decoder answers once" if encoder_decoder else "this chat template rewrites earlier turns"
        say(f"{label}: only the last answer is learned of {count} of {len(scripts)} chats, since {reason}.")
    return (_rows_apart if encoder_decoder else _rows)(scripts, tokenizer, not template or kind == "texts")


def _write_text(text: str) -> _Script:
    return _Script(((text, True),))


def _write_pair(pair: tuple[str, str], apart: bool) -> _Script:
    prompt, answer = pair
    between = "" if apart or prompt[-1].isspace() or answer[0].isspace() else " "
    return _Script(((prompt, False), (between + answer, True)))


class _Writer:
    """Writes chats as the chat template does. apart: for an encoder-decoder, whose answer is a text of its own."""

    def __init__(self, tokenizer: Any, apart: bool) -> None:
        self.tokenizer, self.apart = tokenizer, apart
        names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names |= {tokenizer.eos_token} - {None}
        longest_first = sorted(names, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def write(self, example: tuple[list[dict[str, str]], int]) -> _Script:
        """The assistant's turns from number `first` on are learned, or the last alone where they don't all can be."""
        messages, first = example
        answers = [turn for turn in range(first, len(messages)) if messages[turn]["role"] == "assistant"]
        pieces, ended = self.pieces(messages, answers[-1:] if self.apart else answers)
        if not pieces:
            pieces, ended = self.pieces(messages, answers[-1:])
        return _Script(tuple(pieces), eos=not ended, unlearned=len(answers) - len(pieces) // 2)

    def pieces(self, messages: list[dict[str, str]], answers: list[int]) -> tuple[list[tuple[str, bool]], bool]:
        """Prompts and answers in turn, and whether the last ends itself; none where a prompt rewrites what was before."""
        pieces: list[tuple[str, bool]] = []
        written, ended = "", False
        for turn in answers:
            prompt = self.render(messages[:turn], answering=True)
            if not prompt.startswith(written):
                return [], False
            answer, ended = self.answer(prompt, messages[: turn + 1])
            pieces += [(prompt[len(written) :], False), (answer, True)]
            written = prompt + answer
        return pieces, ended

    def answer(self, prompt: str, messages: list[dict[str, str]]) -> tuple[str, bool]:
        """The last turn as the template writes it after the prompt, up to the special token that ends it, if one does."""
        content = messages[-1]["content"]
        whole = "" if self.apart else self.render(messages, answering=False)
        if not prompt or not whole.startswith(prompt):
            return content, False
        rest, content = whole[len(prompt) :], content.strip()
        # Thoughts and channels may stand before the content, so it is the last such text that a special token or nothing
        # follows. The names of those tokens are no text.
        hidden = self.special.sub(lambda token: "\0" * len(token[0]), rest)
        start = hidden.rfind(content)
        while start >= 0 and hidden[start + len(content) :].lstrip()[:1] not in ("", "\0"):
            start = hidden.rfind(content, 0, start + len(content) - 1)
        start = start if start >= 0 else rest.find(content)
        said = start + len(content) if start >= 0 else 0
        if end := self.special.search(rest, said):
            return rest[: end.end()], True
        return (rest[:said] or content), False

    def render(self, messages: list[dict[str, str]], *, answering: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        except Exception as error:  # a template is the model author's program: it refuses roles in its own words
            raise Unusable(f"the model's chat template refuses it ({error})") from error
        return str(text)


# From scripts to rows


def _rows(scripts: list[_Script], tokenizer: Any, special: bool) -> list[Row]:
    """Each piece continues the ids of those before it.

    It has the ids it has in the whole text if those begin with what is there already, and its own otherwise: what comes
    before an answer is what the model will be given, whatever a tokenizer would merge.
    """
    texts = [text for script in scripts for text in accumulate(text for text, _ in script.pieces)]
    wholes = iter(_ids(tokenizer, texts, special))
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for script in scripts:
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in script.pieces:
            whole = next(wholes)
            new = whole[len(ids) :] if whole[: len(ids)] == ids else _ids(tokenizer, [text], False)[0]
            ids += new
            labels += new if learned else [IGNORED] * len(new)
        if script.eos and ids[-1:] != eos:
            ids, labels = ids + eos, labels + eos
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """The ids of each text; with special tokens, but without the end of sequence that some tokenizers put there."""
    found = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    appended = special and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    return [ids[:-1] for ids in found] if appended else list(found)


def _rows_apart(scripts: list[_Script], tokenizer: Any, special: bool) -> list[Row]:
    """For an encoder-decoder: the prompt's ids as they are in generation, and the answer's as labels, with its end."""
    prompts, answers = ([script.pieces[place][0] for script in scripts] for place in (0, 1))
    inputs = tokenizer(prompts, add_special_tokens=special, verbose=False)["input_ids"]
    targets = tokenizer(text_target=answers, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        {
            "input_ids": list(ids),
            "attention_mask": [1] * len(ids),
            "labels": [*labels, *([] if labels[-1:] == end else end)],
        }
        for ids, labels in zip(inputs, targets)
    ]


def _length(row: Row) -> int:
    return max(len(row["input_ids"]), len(row["labels"]))


def _fitted(
    rows: list[Row], context: int | None, max_length: int | None, encoder_decoder: bool, label: str
) -> list[Row]:
    """Rows cut to max_length, which is said; raises for those that are too long, and those that teach nothing."""
    lengths = [_length(row) for row in rows]
    limit = max(lengths) if max_length is None else max_length
    fitted = [{name: values[:limit] for name, values in row.items()} for row in rows]
    problems = Problems(label)
    for number, (row, length) in enumerate(zip(fitted, lengths), 1):
        # A decoder's first token is predicted from nothing, so its label is never used.
        if all(token == IGNORED for token in row["labels"][0 if encoder_decoder else 1 :]):
            read = f"the first {limit} of its" if length > limit else "its"
            problems.add(number, f"nothing to learn in {read} {length} tokens")
    problems.raise_any("Shorten their prompts, or raise max_length." if max(lengths) > limit else "Leave them out.")
    for number, length in enumerate(lengths, 1):
        if context is not None and min(length, limit) > context:
            problems.add(number, f"{length} tokens, where the model has {context} positions")
    problems.raise_any(f"Shorten them, or give max_length={context}, which cuts them.")
    if cut := sum(length > limit for length in lengths):
        say(f"{label}: {cut} of {len(rows)} rows are cut to their first {limit} tokens (max_length).")
    return fitted
