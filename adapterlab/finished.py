"""Columns that are finished need not run again: what each said is kept under everything that decided it.

Weights are read anew for every comparison (fingerprints.py), so a change of any of them is another key
(circumstances.py), and nothing here has to be told of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterlab.circumstances import has_foreign_forward
from adapterlab.sampling import Row, Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from adapterlab.circumstances import Keys
    from adapterlab.columns import Column
    from adapterlab.comparison import Generation
    from adapterlab.generation import Run

Place = tuple["Column", int]  # a column, and the index of a prompt
LIMIT = 64_000_000  # bytes, about: thousands of generations, and first logits of some hundred prompts
_PER_TOKEN = 250  # bytes that Python takes for a token's id, text, probability and lead
_ENTRY = 4_000  # and for the rest of a generation and its key


class FinishedColumns:
    """Generations and the base's first logits by key, at most `limit` bytes in all; the longest unused goes first.

    Not thread-safe: the lab holds the lock; `size` alone may be asked for at any time.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._kept: dict[str, tuple[Any, int]] = {}  # the longest unused first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes, about. Counted and not kept: a number beside what is kept could be left behind by Ctrl-C."""
        return sum(size for _, size in self._kept.copy().values())

    def get(self, key: str) -> Any:
        """What is kept under `key`, which thereby was used last; None if nothing is."""
        found = self._kept.pop(key, None)
        if found is None:
            return None
        self._kept[key] = found
        return found[0]

    def put_generation(self, key: str, generation: Generation) -> None:
        texts = len(generation.text) + len(generation.prompt)
        self._put(key, generation, _ENTRY + 4 * texts + _PER_TOKEN * generation.new_tokens)

    def put_logits(self, key: str, logits: Tensor) -> None:
        if self.get(key) is not None:
            return
        logits = logits.detach().to("cpu", copy=True)  # not the whole batch that it may be a row of
        self._put(key, logits, _ENTRY + logits.numel() * logits.element_size())

    def clear(self) -> None:
        self._kept.clear()

    def _put(self, key: str, value: Any, size: int) -> None:
        self._kept.pop(key, None)
        if size > self.limit:
            return
        self._kept[key] = (value, size)
        surplus = self.size - self.limit
        while surplus > 0:
            surplus -= self._kept.pop(next(iter(self._kept)))[1]


def recall(run: Run, keys: Keys) -> dict[Place, Generation]:
    """What is kept of this comparison's answers, and of the base's first logits, from earlier ones."""
    known: dict[Place, Generation] = {}
    for index, prompt in enumerate(run.prompts):
        logits = run.finished.get(keys.first_logits(prompt.ids))
        if logits is not None:
            run.references[index] = logits
    for column in run.columns:
        for index, prompt in enumerate(run.prompts):
            kept = run.finished.get(keys.generation(column, prompt.ids))
            if kept is not None and (kept.batched or not _adapters_hooked(run, column)):
                known[column, index] = replace(kept, prompt_index=index, prompt=prompt.given, cached=True)
    return known


def keep(run: Run, keys: Keys, made: Sequence[Generation]) -> None:
    """Keep what has come to its end, if the tensors that spoke are those that the key names."""
    by_label = {column.label: column for column in run.columns}
    for generation in made:
        column, index = by_label[generation.column], generation.prompt_index
        honest = generation.weights_digest == keys.weights(column)
        if column.is_base and not honest:
            run.references.pop(index, None)
        hooked = not generation.batched and _adapters_hooked(run, column)
        if honest and not hooked and generation.finish_reason != "stopped":
            run.finished.put_generation(keys.generation(column, run.prompts[index].ids), generation)
    for index in {generation.prompt_index for generation in made}:
        logits = run.references.get(index)
        if logits is not None:
            run.finished.put_logits(keys.first_logits(run.prompts[index].ids), logits)


def _adapters_hooked(run: Run, column: Column) -> bool:
    """Whether somebody hooked a layer of the column's adapters, which acts where they run in their own layers."""
    layers = [layer for name in column.names for layer in run.adapters.mounts.adapters[name].layers.values()]
    return any(has_foreign_forward(module) for layer in layers for module in layer.modules())


def replay(
    run: Run, known: Mapping[Place, Generation], listener: Callable[[Column, int], Callable[[Row, str | None], None]]
) -> list[Generation]:
    """Tell `on_token` of answers that are known, step by step for all as if they ran, and give them.

    `listener` makes what a run would call for each token of a column. A Stop from there cuts answers as it cuts a run.
    """
    if run.on_token is None or not known:
        return list(known.values())
    rows = [Row(Sampler(0, 0.0, ()), listener(column, index)) for column, index in known]
    for step in range(max(generation.new_tokens for generation in known.values())):
        for row, generation in zip(rows, known.values()):
            if step < generation.new_tokens:
                row.token_ids.append(generation.token_ids[step])
                if step == generation.new_tokens - 1:
                    row.finish_reason = generation.finish_reason
                row.on_step(row, row.finish_reason or None)
        if run.stop.is_set():
            break
    for row in rows:
        if not row.finish_reason:
            row.on_step(row, "stopped")
    return [g if row.finish_reason else _cut(run, g, len(row.token_ids)) for row, g in zip(rows, known.values())]


def _cut(run: Run, generation: Generation, length: int) -> Generation:
    """The first `length` tokens of an answer, as a Stop would have left it."""
    token_ids = generation.token_ids[:length]
    return replace(
        generation,
        text=run.tokenizer.decode(token_ids, skip_special_tokens=True),
        token_ids=token_ids,
        tokens=generation.tokens[:length],
        logprobs=generation.logprobs[:length],
        leads=generation.leads[:length],
        finish_reason="stopped",
        seconds=generation.seconds * length / generation.new_tokens,
    )
