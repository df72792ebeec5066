"""What texts are worth to several columns at once: all of them rows of one batch (rows.py), read piece by piece.

Logits of nine columns over 512 tokens are most of a gigabyte. So a text goes through the model in pieces, with the cache of
what came before, and each piece's logits are turned into a few numbers per token before the next piece is read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterlab.columns import Column
from adapterlab.errors import AdapterLabError, StoppedError
from adapterlab.fingerprints import base_digest
from adapterlab.generation import cache_bytes, decoder_start, eval_mode, free_memory, input_device
from adapterlab.peaks import cache_tensors, note
from adapterlab.quiet import silence_known_noise
from adapterlab.rows import Rows, RowsError, model_obstacle, row_obstacle

if TYPE_CHECKING:
    from torch import Tensor

    from adapterlab.adapters import Adapters

_PIECE_BYTES = 256_000_000  # of one piece's logits in fp32
_PIECE_TOKENS = 2048  # rows × positions of one piece: more are not quicker, and take memory for their activations


@dataclass(frozen=True)
class Passage:
    """A text to score. ids: what a decoder reads, prompt included; scored: for each id, whether it counts (the first never
    does: nothing foretells it). source: what an encoder reads, for encoder-decoder models."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    source: tuple[int, ...] = ()

    @property
    def places(self) -> list[int]:
        """The indices of the ids that count."""
        return [i for i in range(1, len(self.ids)) if self.scored[i]]

    @classmethod
    def of_row(cls, model: Any, row: dict[str, list[int]]) -> Passage:
        """A row as `training_data` makes it; for an encoder-decoder, labels after the id that starts the decoder."""
        labels = row["labels"]
        if model.config.is_encoder_decoder:
            return cls((decoder_start(model), *labels), (False, *[True] * len(labels)), tuple(row["input_ids"]))
        return cls(tuple(row["input_ids"]), tuple(label != -100 for label in labels))


@dataclass
class Score:
    """Of one passage under one column, one number for each of its `places`: logprob in nats; rank (1: the most likely); kl:
    KL(column‖base) over the vocabulary in nats, where it was asked for."""

    logprob: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


Scores = dict[tuple[Column, int], Score]


def score_passages(
    adapters: Adapters, columns: Sequence[Column], passages: Sequence[Passage], *, kl: bool, stop: threading.Event
) -> Scores:
    """Every passage under every column, by (column, index of the passage). With `kl`, base must be the first column.

    Columns that can be rows of a batch share it with all passages that fit beside one another; the others run in turn.
    The lab's state and the model's modes are afterwards as before. `stop` ends it with a `StoppedError`, between two pieces.
    """
    import torch

    from adapterlab.vocabulary import HOW_TO_READ_THEM, token_without_row

    for passage in passages:
        if wrong := token_without_row(adapters.model, (*passage.source, *passage.ids)):
            raise AdapterLabError(f"The text holds {wrong}. {HOW_TO_READ_THEM}")
    names = dict.fromkeys(name for column in columns for name in column.names)
    scores: Scores = {(column, i): Score() for column in columns for i in range(len(passages))}
    with torch.no_grad(), eval_mode(adapters.model):
        digests = adapters.refresh(names)
        with adapters.using(None) as model:
            base = base_digest(model)
        for group in _batches(adapters, columns, passages):
            batch = _Batch(adapters, [passages[i] for i in group], base, digests, stop)
            try:
                found = batch.score(columns, kl, together=True)
            except RowsError:
                found = batch.score(columns, kl, together=False)
            scores.update({(column, group[i]): score for (column, i), score in found.items()})
    return scores


def _batches(adapters: Adapters, columns: Sequence[Column], passages: Sequence[Passage]) -> list[list[int]]:
    """Indices of passages, those of like length together, as many as fit into half of the free memory and one piece."""
    order = sorted(range(len(passages)), key=lambda i: len(passages[i].ids))
    groups: list[list[int]] = []
    for i in order:
        longest = max(len(passages[i].ids), len(passages[i].source))
        most = free_memory(adapters.model) // 2 // cache_bytes(adapters.model, longest)
        rows = min(most, _PIECE_TOKENS // longest) // len(columns)
        if groups and len(groups[-1]) < rows:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class _Batch:
    """Some passages, padded at the right: what comes after a token never acts on it."""

    def __init__(
        self,
        adapters: Adapters,
        passages: list[Passage],
        base: str,
        digests: dict[str, str],
        stop: threading.Event,
    ) -> None:
        import torch

        self.adapters, self.passages, self.base, self.digests, self.stop = adapters, passages, base, digests, stop
        self.width = max(len(passage.ids) for passage in passages)
        device = input_device(adapters.model)
        pad = adapters.model.generation_config.pad_token_id or 0
        self.ids = torch.tensor([_padded(p.ids, self.width, pad) for p in passages], device=device)
        self.mask = torch.tensor([_padded([1] * len(p.ids), self.width, 0) for p in passages], device=device)
        longest = max(len(p.source) for p in passages)
        self.source = torch.tensor([_padded(p.source, longest, pad) for p in passages], device=device)
        self.source_mask = torch.tensor([_padded([1] * len(p.source), longest, 0) for p in passages], device=device)

    def score(self, columns: Sequence[Column], kl: bool, *, together: bool) -> Scores:
        import torch

        lanes = self._lanes(columns, together)
        piece = self._piece(max(len(lane.columns) for lane in lanes))
        scores: Scores = {(column, i): Score() for column in columns for i in range(len(self.passages))}
        for start in range(0, self.width, piece):
            end = min(start + piece, self.width)
            wanted = [(i, p) for i, passage in enumerate(self.passages) for p in passage.places if start < p <= end]
            rows = torch.tensor([i for i, _ in wanted], device=self.ids.device, dtype=torch.long)
            places = torch.tensor([p for _, p in wanted], device=self.ids.device, dtype=torch.long)
            targets, base = self.ids[rows, places], None
            for lane in lanes:
                if self.stop.is_set():
                    raise StoppedError("Stopped before all was read, and a part of it is no result: run it again.")
                logits = lane.read(start, end)
                for place, column in enumerate(lane.columns):
                    if not wanted:
                        break
                    mine = torch.log_softmax(logits[place][rows, places - 1 - start].float(), -1)
                    base = mine if base is None and kl else base
                    _note(scores, column, wanted, mine, targets.to(mine.device), base)
        return scores

    def _piece(self, columns: int) -> int:
        """How many positions are read at once: all of them where the model can't go on from a cache."""
        model = self.adapters.model
        if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
            return self.width
        rows = columns * len(self.passages)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        return max(1, min(self.width, _PIECE_TOKENS // rows, _PIECE_BYTES // (4 * rows * vocabulary)))

    def _lanes(self, columns: Sequence[Column], together: bool) -> list[_Lane]:
        """The columns of one batch, base first; then each of the others by itself."""
        adapters, mounts = self.adapters, self.adapters.mounts
        blocked = model_obstacle(adapters.model)
        shared = [c for c in columns if together and not blocked and row_obstacle(mounts, c) is None]
        alone = [column for column in columns if column not in shared]
        lanes = [_Lane(self, [column], self._alone(column)) for column in alone]
        if shared:
            piece = self._piece(len(shared))
            lengths = {piece, self.width % piece, self.source.shape[1]} - {0}
            layout = Rows(mounts, shared, len(self.passages), lengths, self.base, self.digests)
            lanes.append(_Lane(self, shared, self._shared(layout)))
        return sorted(lanes, key=lambda lane: not lane.columns[0].is_base)

    def _alone(self, column: Column) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        return lambda: self.adapters.using(column)

    def _shared(self, layout: Rows) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        @contextlib.contextmanager
        def mounted() -> Iterator[None]:
            with self.adapters.using(None), layout.mounted(self.adapters.mounts):
                yield

        return mounted


class _Lane:
    """Columns that go through the model together, with their cache."""

    def __init__(
        self, batch: _Batch, columns: list[Column], mounted: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        self.batch, self.columns, self.mounted = batch, columns, mounted
        self.cache: Any = None

    def read(self, start: int, end: int) -> Tensor:
        """The logits of the positions from `start` to `end`: (columns, passages, positions, vocabulary)."""
        batch, count = self.batch, len(self.columns)
        model = batch.adapters.model
        ids = batch.ids[:, start:end].repeat(count, 1)
        silence_known_noise()
        with self.mounted():
            if model.config.is_encoder_decoder:
                given = {"input_ids": batch.source, "attention_mask": batch.source_mask}
                given = {key: value.repeat(count, 1) for key, value in given.items()}
                out = model(**given, decoder_input_ids=ids, use_cache=False)  # FSMT's decoder looks ahead with a cache
            else:
                mask = batch.mask[:, :end].repeat(count, 1)
                keep = {"use_cache": True, "past_key_values": self.cache} if end - start < batch.width else {}
                out = model(input_ids=ids, attention_mask=mask, **(keep or {"use_cache": False}))
                self.cache = getattr(out, "past_key_values", None)
            note("KV cache", lambda: cache_tensors({"cache": self.cache}))
        return out.logits.view(count, len(batch.passages), end - start, -1)


def _note(
    scores: Scores, column: Column, wanted: list[tuple[int, int]], mine: Tensor, targets: Tensor, base: Tensor | None
) -> None:
    """Put what this column's log-probabilities, (tokens, vocabulary), say of the target tokens into `scores`."""
    theirs = mine.gather(1, targets[:, None])
    logprobs, ranks = theirs[:, 0].tolist(), (1 + (mine > theirs).sum(1)).tolist()
    kls = None
    if base is not None:
        gap = (mine - base.to(mine.device)).masked_fill_(mine == -float("inf"), 0.0)
        kls = gap.mul_(mine.exp()).sum(1).clamp_(min=0).tolist()
    for place, (i, _) in enumerate(wanted):
        score = scores[column, i]
        score.logprob.append(logprobs[place])
        score.rank.append(ranks[place])
        if kls is not None:
            score.kl.append(kls[place])


def _padded(values: Sequence[int], width: int, filling: int) -> list[int]:
    return [*values, *[filling] * (width - len(values))]
