"""Where an adapter leaves the base, token by token, and how well base and columns foresee texts."""

from __future__ import annotations

import numbers
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterlab.columns import Column
from adapterlab.comparison import Comparison
from adapterlab.errors import AdapterLabError
from adapterlab.generation import decoder_start, token_texts
from adapterlab.prompts import render_prompts
from adapterlab.scoring import Passage, Score, score_passages

if TYPE_CHECKING:
    import pandas as pd

    from adapterlab.adapters import Adapters

RESAMPLES = 2000  # of the bootstrap
_NAMES = [
    "column", "prompt_index", "position", "token", "token_id", "logprob", "base_logprob", "kl", "rank", "base_rank",
    "first_difference",
]  # fmt: skip


def divergence_frame(
    adapters: Adapters, tokenizer: Any, text: Any, columns: Any, prompt: Any, chat: Any, stop: threading.Event
) -> pd.DataFrame:
    """See `AdapterLab.divergence`."""
    import pandas as pd

    if tokenizer is None:
        raise AdapterLabError("This lab has no tokenizer: give one, as in AdapterLab(model, tokenizer=tokenizer).")
    if isinstance(text, Comparison):
        if prompt is not None:
            raise AdapterLabError("A Comparison brings its prompts: leave prompt= out.")
        rows = _own_answers(adapters, text, columns, stop)
    elif isinstance(text, str):
        wanted = _without_base(adapters, columns)
        passage, first = _passage(adapters.model, tokenizer, text, prompt, chat)
        scores = score_passages(adapters, [Column(), *wanted], [passage], kl=True, stop=stop)
        tokens = token_texts(tokenizer.decode, passage.ids[first:])
        rows = [
            row
            for column in wanted
            for row in _rows(column, 0, passage, first, tokens, scores[column, 0], scores[Column(), 0], None)
        ]
    else:
        raise AdapterLabError(f"{text!r:.80} is neither a text nor a Comparison: give a string, or what compare gave.")
    return pd.DataFrame(rows, columns=_NAMES)


def _rows(
    column: Column,
    prompt_index: int,
    passage: Passage,
    first: int,
    tokens: Sequence[str],
    mine: Score,
    base: Score,
    difference: int | None,
) -> list[tuple[Any, ...]]:
    """One line per scored token; `first`: the index of the text's first token among the ids."""
    return [
        (
            column.label,
            prompt_index,
            place - first,
            tokens[place - first],
            passage.ids[place],
            mine.logprob[i],
            base.logprob[i],
            mine.kl[i],
            mine.rank[i],
            base.rank[i],
            difference == place - first,
        )
        for i, place in enumerate(passage.places)
    ]


def _without_base(adapters: Adapters, columns: Any) -> list[Column]:
    wanted = [column for column in adapters.columns(columns) if not column.is_base]
    if not wanted:
        raise AdapterLabError(
            "There is no column to hold against base: load or add an adapter."
            if columns is None
            else f"columns={columns!r} names no adapter: base is always there, name what to hold against it."
        )
    return wanted


def _passage(model: Any, tokenizer: Any, text: str, prompt: Any, chat: Any) -> tuple[Passage, int]:
    """The text behind its prompt, and the index of its first token."""
    if not text:
        raise AdapterLabError("The text is empty: give something to read.")
    if model.config.is_encoder_decoder:
        if prompt is None:
            raise AdapterLabError(
                "An encoder-decoder reads a prompt and answers: give both, as in "
                "lab.divergence('Das Haus.', prompt='translate English to German: The house.')."
            )
        source = _one_prompt(tokenizer, prompt, chat)
        ids = (decoder_start(model), *tokenizer(text_target=text, verbose=False)["input_ids"])
        return _checked(model, Passage(ids, (False, *[True] * (len(ids) - 1)), source)), 1
    if prompt is None:
        found = tokenizer(text, return_special_tokens_mask=True, verbose=False)
        ids, special = tuple(found["input_ids"]), found["special_tokens_mask"]
        first = next((i for i, mark in enumerate(special) if not mark), 0)
    else:
        before = _one_prompt(tokenizer, prompt, chat)
        ids = (*before, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        first = len(before)
    return _checked(model, Passage(ids, tuple(i >= max(first, 1) for i in range(len(ids))))), first


def _one_prompt(tokenizer: Any, prompt: Any, chat: Any) -> tuple[int, ...]:
    prompts = render_prompts(tokenizer, prompt, chat)
    if len(prompts) > 1:
        raise AdapterLabError(f"{len(prompts)} prompts for one text: give the one that it answers.")
    return prompts[0].ids


def _checked(model: Any, passage: Passage) -> Passage:
    if not passage.places:
        raise AdapterLabError("The text is one token, and nothing foretells it: give a longer one, or a prompt.")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(len(passage.ids), len(passage.source))
    if limit is not None and longest > limit:
        raise AdapterLabError(f"The text has {longest} tokens, but the model's context is {limit}: shorten it.")
    return passage


def _own_answers(
    adapters: Adapters, comparison: Comparison, columns: Any, stop: threading.Event
) -> list[tuple[Any, ...]]:
    """Each column reads what it said itself, and base reads it too."""
    from adapterlab.fingerprints import column_digest

    answers: dict[Column, list[Any]] = {}
    for g in comparison.generations:
        if g.asked and g.token_ids:
            answers.setdefault(Column.of(dict(g.asked)), []).append(g)
    wanted = [column for column in answers if columns is None or column in adapters.columns(columns)]
    if not wanted:
        raise AdapterLabError("This comparison has no answer of such a column: compare base with an adapter first.")
    rows = []
    for column in wanted:
        missing = [name for name in column.names if name not in adapters.records]
        digests = {} if missing else adapters.refresh(dict.fromkeys(column.names))
        if missing or answers[column][0].weights_digest != column_digest((m, digests[n]) for n, m in column.parts):
            raise AdapterLabError(
                f"{column.label!r} spoke in this comparison with other weights than it has now: compare again."
            )
        passages = [_answer(adapters.model, comparison.prompt_ids[g.prompt_index], g) for g in answers[column]]
        scores = score_passages(adapters, [Column(), column], passages, kl=True, stop=stop)
        for i, (g, passage) in enumerate(zip(answers[column], passages)):
            first = len(passage.ids) - len(g.token_ids)
            mine, base = scores[column, i], scores[Column(), i]
            rows += _rows(column, g.prompt_index, passage, first, g.tokens, mine, base, g.first_difference)
    return rows


def _answer(model: Any, prompt: Sequence[int], generation: Any) -> Passage:
    said = generation.token_ids
    if model.config.is_encoder_decoder:
        return Passage((decoder_start(model), *said), (False, *[True] * len(said)), tuple(prompt))
    return Passage((*prompt, *said), (*[False] * len(prompt), *[True] * len(said)))


def evaluate_frame(
    adapters: Adapters,
    tokenizer: Any,
    data: Any,
    columns: Any,
    max_length: int | None,
    confidence: float,
    seed: int,
    stop: threading.Event,
) -> pd.DataFrame:
    """See `AdapterLab.evaluate`."""
    import numpy as np
    import pandas as pd

    from adapterlab.training import read_lessons

    if isinstance(confidence, bool) or not isinstance(confidence, numbers.Real) or not 0 < confidence < 1:
        raise AdapterLabError(
            f"confidence={confidence!r} is no share between 0 and 1: use 0.95 for the usual interval."
        )
    wanted = adapters.columns(columns)
    rows = read_lessons(adapters.model, tokenizer, data, None, max_length, seed).train.rows
    passages = [Passage.of_row(adapters.model, row) for row in rows]
    scores = score_passages(adapters, wanted, passages, kl=False, stop=stop)
    counts = np.array([len(passage.places) for passage in passages])
    sums = {c: np.array([-sum(scores[c, i].logprob) for i in range(len(passages))]) for c in wanted}
    draws = _resampled(sums, counts, seed)
    base = Column() if Column() in sums else None
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    lines = []
    for column in wanted:
        nll = float(sums[column].sum() / counts.sum())
        low, high = np.percentile(draws[column], tails)
        line = {"column": column.label, "texts": len(passages), "tokens": int(counts.sum()), "nll": nll}
        line |= {
            "perplexity": float(np.exp(nll)),
            "perplexity_low": float(np.exp(low)),
            "perplexity_high": float(np.exp(high)),
        }
        line |= dict.fromkeys(("delta_nll", "delta_low", "delta_high"), np.nan)
        if base is not None:
            low, high = np.percentile(draws[column] - draws[base], tails)
            line |= {"delta_nll": nll - float(sums[base].sum() / counts.sum()), "delta_low": low, "delta_high": high}
        lines.append(line)
    return pd.DataFrame(lines)


def _resampled(sums: dict[Column, Any], counts: Any, seed: int) -> dict[Column, Any]:
    """The mean per token of each column over RESAMPLES draws of the texts, the same draws for all; missing for one text,
    of which no spread can be told."""
    import numpy as np

    if len(counts) < 2:
        return {column: np.full(RESAMPLES, np.nan) for column in sums}
    random = np.random.default_rng(seed)
    draws: dict[Column, list[float]] = {column: [] for column in sums}
    for _ in range(RESAMPLES):
        chosen = random.integers(0, len(counts), len(counts))
        tokens = counts[chosen].sum()
        for column, total in sums.items():
            draws[column].append(total[chosen].sum() / tokens)
    return {column: np.array(values) for column, values in draws.items()}
