"""Prompts × columns → Comparison. Columns share one batch where they can (rows.py) and run in turn where they can't."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from adapterlab.circumstances import Keys
from adapterlab.columns import Column
from adapterlab.comparison import Comparison, Generation, TokenEvent
from adapterlab.errors import AdapterLabError
from adapterlab.fingerprints import adapter_digest, base_digest, column_digest, no_ones_digest
from adapterlab.finished import FinishedColumns, keep, recall, replay
from adapterlab.guards import put_back
from adapterlab.linear import few_rows
from adapterlab.methods import rank_of
from adapterlab.notices import warn
from adapterlab.quantization import computing_dtype
from adapterlab.quiet import silence_known_noise
from adapterlab.rows import Rows, RowsError, model_obstacle, row_obstacle
from adapterlab.sampling import Row, Sampler, make_decoder
from adapterlab.settings import READ_THE_TEXT
from adapterlab.ties import mark_differences

if TYPE_CHECKING:
    from torch import Tensor

    from adapterlab.adapters import Adapters
    from adapterlab.prompts import Prompt
    from adapterlab.settings import Settings

OnToken = Callable[[TokenEvent], None]
_TOKEN_FIELDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


@dataclass
class Run:
    """Everything one comparison needs, gathered and checked before the model is touched."""

    adapters: Adapters
    tokenizer: Any
    prompts: list[Prompt]
    columns: list[Column]
    settings: Settings
    stop: threading.Event
    on_token: OnToken | None
    about: dict[str, Any]
    digests: dict[str, str] = field(default_factory=dict)  # of the adapters that take part
    finished: FinishedColumns = field(default_factory=FinishedColumns)
    references: dict[int, Tensor | None] = field(default_factory=dict)  # the base's first logits, by prompt


def run_comparison(run: Run) -> Comparison:
    """Generate every column for every prompt. The lab's state, the model's mode and its config are afterwards as before."""
    with eval_mode(run.adapters.model), neutral_generation_config(run.adapters.model, run.tokenizer):
        with run.adapters.using(None) as model:  # around `replay` too: no callback may change the state
            base = base_digest(model)
            if base != run.adapters.base_reference:
                warn(
                    "The base's weights are no longer those that this lab opened: every column stands on the changed ones."
                )
            keys = Keys.of(run.adapters, run.tokenizer, run.settings, base, run.digests)
            known = {} if keys is None else recall(run, keys)
            parts = replay(run, known, lambda column, index: _Stream(run, index, column.label).put)
        missing = [(c, i) for c in run.columns for i in range(len(run.prompts)) if (c, i) not in known]
        for group in plan_groups(run, missing):
            if run.stop.is_set() and parts:
                break
            made = run_group(run, group, base)
            if keys is not None:
                keep(run, keys, made)
            parts.extend(made)
    order = {column.label: place for place, column in enumerate(run.columns)}
    parts.sort(key=lambda g: (g.prompt_index, order[g.column]))
    dtype = computing_dtype(run.adapters.model)
    parts = mark_differences(parts, run.about["quantization"], dtype, run.settings.temperature)
    return Comparison(
        prompts=[prompt.given for prompt in run.prompts],
        rendered=[prompt.rendered for prompt in run.prompts],
        prompt_ids=[prompt.ids for prompt in run.prompts],
        settings=run.settings.as_dict(),
        model={**run.about, "base_digest": base},
        generations=parts,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True)
class Group:
    """Columns × prompts that go through the model in one `generate` call; `note` says why they are alone, if so."""

    columns: tuple[Column, ...]
    prompts: tuple[int, ...]
    batched: bool = True
    note: str = ""


def plan_groups(run: Run, missing: Sequence[tuple[Column, int]] | None = None) -> list[Group]:
    """Columns that can be rows of one batch, with as many prompts as the memory takes; then the others, in turn.

    `missing`: what is to run, by default all. Columns that miss the same prompts share batches.
    """
    if missing is None:
        missing = [(column, index) for column in run.columns for index in range(len(run.prompts))]
    if not missing:
        return []
    wanted: dict[Column, tuple[int, ...]] = {}
    for column, index in missing:
        wanted[column] = (*wanted.get(column, ()), index)
    mounts = run.adapters.mounts
    blocked = model_obstacle(run.adapters.model)
    reasons = {column: blocked or row_obstacle(mounts, column) for column in wanted}
    shared: dict[tuple[int, ...], list[Column]] = {}
    for column in sorted((c for c in wanted if reasons[c] is None), key=lambda c: _row_order(run, c)):
        shared.setdefault(wanted[column], []).append(column)
    groups = []
    for indices, columns in shared.items():
        most = _most_rows(run, indices)
        for i in range(0, len(columns), most):
            some = tuple(columns[i : i + most])
            groups += [Group(some, prompts) for prompts in _prompt_batches(run, indices, most // len(some))]
    for column, reason in reasons.items():
        if reason is not None:
            note = f"run in turn: {reason}"
            groups.extend(Group((column,), (index,), False, note) for index in wanted[column])
    return groups


def _row_order(run: Run, column: Column) -> tuple[int, ...]:
    """Where a column stands in the batch: base, then scales, then factors, those that share a stack (stacks.py) in its
    order, so that each layer reads few spans."""
    mounted = [run.adapters.mounts.adapters[name] for name in column.names]
    if not mounted:
        return (0,)
    if all(adapter.config.peft_type == "IA3" for adapter in mounted):
        return (1,)
    first = column.names[0]
    return (2, len(mounted), rank_of(mounted[0].config) or 0, list(run.adapters.mounts.adapters).index(first))


def _most_rows(run: Run, indices: Sequence[int]) -> int:
    """How many rows of these prompts' lengths a batch may have, so that its KV cache takes half of the free memory."""
    longest = max(len(run.prompts[index].ids) for index in indices)
    one = cache_bytes(run.adapters.model, longest + run.settings.max_new_tokens)
    return max(1, free_memory(run.adapters.model) // 2 // one)


def _prompt_batches(run: Run, indices: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """These prompts, at most so many to a batch; only those of one length share it where padding would be read as text.

    So it would by processors such as repetition_penalty, by layers that carry a state from position to position, and by
    a forced first token, which is for prompts of one token.
    """
    alone = bool(READ_THE_TEXT & set(run.settings.extra)) or _reads_padding(run.adapters.model)
    buckets: dict[int, list[int]] = {}
    for index in indices:
        length = len(run.prompts[index].ids)
        buckets.setdefault(length if alone else 0, []).append(index)
    return [tuple(b[i : i + most]) for b in buckets.values() for i in range(0, len(b), most)]


def _reads_padding(model: Any) -> bool:
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ()
    forced = model.generation_config.forced_bos_token_id is not None and not model.config.is_encoder_decoder
    return bool(getattr(model, "_is_stateful", False)) or "linear_attention" in kinds or forced


def run_group(run: Run, group: Group, base: str) -> list[Generation]:
    """Generate one group; `base` is the base's digest. Columns whose rows a layer can't tell apart go in turn instead."""
    places = [(column, index) for column in group.columns for index in group.prompts]
    rows = [
        Row(
            Sampler(run.settings.seed, run.settings.temperature, run.prompts[index].ids),
            _Stream(run, index, c.label).put,
        )
        for c, index in places
    ]
    try:
        if group.batched:
            proofs, started = _decode_batch(run, group, rows, base)
        else:
            proofs, started = _decode_alone(run, group.columns[0], group.prompts[0], rows, base)
    except RowsError as error:
        alone = [Group((c,), (index,), False, f"run in turn: {error}") for c, index in places]
        return [generation for one in alone for generation in run_group(run, one, base)]
    for (column, index), row in zip(places, rows):
        if column.is_base:
            run.references[index] = row.first_logits
    return [
        _generation(run, group, column, index, row, proofs[column], row.ended - started)
        for (column, index), row in zip(places, rows)
    ]


@dataclass(frozen=True)
class Proof:
    """Who acted in a column: adapter → multiplier, read off the modules in the model, and the digest of their tensors."""

    acting: dict[str, float]
    digest: str


def _decode_alone(
    run: Run, column: Column, index: int, rows: list[Row], base: str
) -> tuple[dict[Column, Proof], float]:
    with run.adapters.using(column):
        standing = run.adapters.mounts.standing()
        digests = [(m, adapter_digest(layers, name)) for name, (m, layers) in standing.items()]
        acting = {name: m for name, (m, _) in standing.items()}
        proof = Proof(acting, column_digest(digests) if digests else base)
        started = _decode(run, [run.prompts[index]], rows)
    with run.adapters.using(None):
        return _still_true(run, {column: proof}, base), started


def _decode_batch(run: Run, group: Group, rows: list[Row], base: str) -> tuple[dict[Column, Proof], float]:
    mounts = run.adapters.mounts
    prompts = [run.prompts[index] for index in group.prompts]
    with run.adapters.using(None):
        lengths = {max(len(p.ids) for p in prompts), 1}
        layout = Rows(mounts, group.columns, len(prompts), lengths, base, run.digests)
        with layout.mounted(mounts):
            proofs = {c: Proof(*layout.proof(i, mounts)) for i, c in enumerate(group.columns)}
            started = _decode(run, prompts * len(group.columns), rows, layout)
        return _still_true(run, proofs, base), started


def _still_true(run: Run, proofs: dict[Column, Proof], base: str) -> dict[Column, Proof]:
    """The same, but for columns whose weights somebody changed while they ran: their digest is nobody's."""
    names = dict.fromkeys(name for column in proofs for name in column.names)
    now = run.adapters.refresh(names)
    changed = {name for name in names if now[name] != run.digests[name]}
    all_changed = base_digest(run.adapters.model) != base
    return {
        column: replace(proof, digest=no_ones_digest(proof.digest))
        if all_changed or changed & set(column.names)
        else proof
        for column, proof in proofs.items()
    }


def _generation(
    run: Run, group: Group, column: Column, index: int, row: Row, proof: Proof, seconds: float
) -> Generation:
    decode = run.tokenizer.decode
    return Generation(
        column=column.label,
        asked=column.parts,
        prompt_index=index,
        prompt=run.prompts[index].given,
        text=decode(row.token_ids, skip_special_tokens=True),
        token_ids=tuple(row.token_ids),
        tokens=token_texts(decode, row.token_ids),
        logprobs=tuple(row.logprobs),
        leads=tuple(row.leads),
        finish_reason=row.finish_reason,
        seconds=seconds,
        active_adapters=tuple(proof.acting),
        multipliers=tuple(proof.acting.values()),
        logit_shift=0.0 if column.is_base else _shift(run, row, index),
        weights_digest=proof.digest,
        batched=group.batched and len(group.columns) * len(group.prompts) > 1,
        batch_size=len(group.columns) * len(group.prompts) if group.batched else 1,
        note=group.note,
    )


def _decode(run: Run, prompts: list[Prompt], rows: list[Row], layout: Rows | None = None) -> float:
    """One `generate` call on the model as it stands, a row for each of `prompts`; gives the time at which it began."""
    import torch

    model = run.adapters.model
    width = max(len(prompt.ids) for prompt in prompts)
    pad = model.generation_config.pad_token_id or 0
    ids, mask = [], []
    for prompt in prompts:
        gap = width - len(prompt.ids)
        left = 0 if model.config.is_encoder_decoder else gap  # a decoder goes on where the prompt ends
        ids.append([pad] * left + [*prompt.ids] + [pad] * (gap - left))
        mask.append([0] * left + [1] * len(prompt.ids) + [0] * (gap - left))
    device = input_device(model)
    settings = run.settings.for_generate()
    silence_known_noise()  # again: warning filters that were set since come first
    started = time.perf_counter()
    try:
        with few_rows(model):
            model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                use_cache=True,
                custom_generate=make_decoder(rows, run.stop, layout),
                stopping_criteria=_stop_strings(run.tokenizer, settings.pop("stop_strings", None)),
                **settings,
            )
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if run.settings.extra and not any(row.token_ids for row in rows):
            extra = ", ".join(f"{name}={value!r}" for name, value in run.settings.extra.items())
            raise AdapterLabError(f"transformers can't generate with {extra[:200]}: {error}") from error
        raise
    return started


def _stop_strings(tokenizer: Any, strings: Any) -> Any:
    """transformers keeps the tokenizer from a custom decoding function, so the criterion is made here (issue 2)."""
    from transformers import StoppingCriteriaList
    from transformers.generation import StopStringCriteria

    return StoppingCriteriaList([StopStringCriteria(tokenizer, strings)] if strings else [])


class Pieces:
    """What each further token adds to a text; a character that is spread over several comes with its last.

    A token decoded on its own would not do: some tokenizers drop the space before it. Decodes from the last piece on, so
    that the work per token does not grow with the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.said_from = self.said_to = 0

    def next(self, token_ids: Sequence[int], final: bool) -> str:
        """The piece that the last of `token_ids` makes readable, "" for none; `final`: no further token will come."""
        said, text = self.decode(token_ids[self.said_from : self.said_to]), self.decode(token_ids[self.said_from :])
        if len(text) <= len(said) or (text.endswith("\ufffd") and not final):
            return ""
        self.said_from, self.said_to = self.said_to, len(token_ids)
        return text[len(said) :]


def token_texts(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token: joined, they are the whole text, special tokens included."""
    pieces, count = Pieces(decode), len(token_ids)
    return tuple(pieces.next(token_ids[: i + 1], i + 1 == count) for i in range(count))


class _Stream:
    """Tokens in, readable pieces of text out to `on_token`."""

    def __init__(self, run: Run, index: int, label: str) -> None:
        self.run, self.index, self.label = run, index, label
        self.pieces = Pieces(functools.partial(run.tokenizer.decode, skip_special_tokens=True))

    def put(self, row: Row, reason: str | None) -> None:
        if self.run.on_token is None:
            return
        ids = row.token_ids
        piece = self.pieces.next(ids, reason is not None)
        last = len(ids) - 1
        token = ids[last] if ids else -1
        self.run.on_token(TokenEvent(self.index, self.label, last, token, piece, reason))


def _shift(run: Run, row: Row, index: int) -> float:
    """Largest |Δlogit| against the bare base on the prompt's last position, which is computed if it is not yet known."""
    if row.first_logits is None:  # stopped before the first token
        return math.nan
    reference = run.references.get(index)
    if reference is None:
        reference = run.references[index] = _first_logits(run, run.prompts[index])
    return float((row.first_logits - reference.to(row.first_logits.device)).abs().max())


def _first_logits(run: Run, prompt: Prompt) -> Tensor:
    import torch

    row = Row(Sampler(0, 0.0, prompt.ids), lambda row, reason: None)
    with run.adapters.using(None) as model:
        ids = torch.tensor([prompt.ids], device=input_device(model))
        decoder = make_decoder([row], threading.Event())
        silence_known_noise()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=decoder,
            max_new_tokens=1,
            do_sample=False,
        )
    assert row.first_logits is not None  # nobody can stop this one
    return row.first_logits


def compute_logprobs(model: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> tuple[float, ...]:
    """Log-probability of each token after the same text in one forward of the model as it stands, in nats."""
    import torch

    if not token_ids:
        return ()
    logprobs = torch.log_softmax(_next_logits(model, prompt_ids, token_ids[:-1]).float(), -1)
    return tuple(logprobs[torch.arange(len(token_ids)), torch.tensor(token_ids)].tolist())


def compute_last_logits(model: Any, prompt_ids: Sequence[int]) -> Tensor:
    """The logits of what comes first after `prompt_ids`, in one forward of the model as it stands: (vocabulary,)."""
    return _next_logits(model, prompt_ids, ())[0]


def _next_logits(model: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Tensor:
    """Logits after the prompt and after each token that follows it: (1 + tokens, vocabulary)."""
    import torch

    device = input_device(model)
    with torch.no_grad(), eval_mode(model):
        if model.config.is_encoder_decoder:
            inputs = {
                "input_ids": torch.tensor([list(prompt_ids)], device=device),
                "decoder_input_ids": torch.tensor([[decoder_start(model), *token_ids]], device=device),
            }
            return model(**inputs, use_cache=False).logits[0]  # with a cache, FSMT's decoder looks ahead
        ids = torch.tensor([[*prompt_ids, *token_ids]], device=device)
        return model(input_ids=ids).logits[0, len(prompt_ids) - 1 :]


def decoder_start(model: Any) -> int:
    """The id that starts a decoder, as `generate` would choose it."""
    config = model.generation_config
    for value in (
        config.decoder_start_token_id,
        getattr(model.config, "decoder_start_token_id", None),
        config.bos_token_id,
    ):
        if value is not None:
            return int(value)
    raise AdapterLabError(f"{type(model).__name__} names no decoder_start_token_id: set it in model.generation_config.")


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Dropout off; every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]

    def undo() -> None:
        for module in training:
            module.training = True

    with put_back(undo):
        for module in training:
            module.training = False
        yield


@contextlib.contextmanager
def neutral_generation_config(model: Any, tokenizer: Any) -> Iterator[None]:
    """The model's special tokens without its sampling: a published temperature would slip into every column."""
    from transformers import GenerationConfig

    given = model.generation_config
    tokens = {name: getattr(given, name, None) for name in _TOKEN_FIELDS}
    if tokens["eos_token_id"] is None:
        tokens["eos_token_id"] = getattr(model.config, "eos_token_id", None) or tokenizer.eos_token_id
    if tokens["pad_token_id"] is None:
        eos = tokens["eos_token_id"] or tokenizer.eos_token_id
        fallback = eos[0] if isinstance(eos, list) else eos
        tokens["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else fallback
    neutral = GenerationConfig(**{name: value for name, value in tokens.items() if value is not None})
    with put_back(lambda: setattr(model, "generation_config", given)):
        model.generation_config = neutral
        yield


def cache_bytes(model: Any, positions: int) -> int:
    """Bytes of KV cache that one row of `positions` takes, from the config: keys and values of every layer."""
    config = model.config.get_text_config(decoder=True)
    layers: int = getattr(config, "num_hidden_layers", 0) or getattr(config, "num_layers", 1)
    heads: int = getattr(config, "num_attention_heads", 1)
    groups: int = getattr(config, "num_key_value_heads", None) or heads
    width: int = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    size = model.dtype.itemsize
    return max(1, 2 * layers * groups * width * positions * size * (2 if model.config.is_encoder_decoder else 1))


def free_memory(model: Any) -> int:
    """Bytes that are free where the model computes: on its GPU, or on the host."""
    import psutil
    import torch

    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    return int(psutil.virtual_memory().available)


def check_context(model: Any, prompts: Sequence[Prompt], settings: Settings) -> None:
    """Raise `AdapterLabError` if a prompt and its answer can't fit the context, or the model lacks one of its tokens."""
    from adapterlab.vocabulary import HOW_TO_READ_THEM, token_without_row

    for prompt in prompts:
        if wrong := token_without_row(model, prompt.ids):
            raise AdapterLabError(f"The prompt {prompt.given[:40]!r} holds {wrong}. {HOW_TO_READ_THEM}")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        return
    if model.config.is_encoder_decoder and settings.max_new_tokens > limit:
        raise AdapterLabError(
            f"The answer may have {settings.max_new_tokens} tokens, but the decoder's context is {limit}: set "
            f"max_new_tokens to {limit} or less."
        )
    for prompt in prompts:
        decoded = 0 if model.config.is_encoder_decoder else settings.max_new_tokens
        if len(prompt.ids) + decoded > limit:
            room = limit - len(prompt.ids)
            remedy = f"set max_new_tokens to {room} or less, or shorten it" if room > 0 and decoded else "shorten it"
            raise AdapterLabError(
                f"The prompt has {len(prompt.ids)} tokens and the answer may have {decoded}, but the model's context is "
                f"{limit}: {remedy}. It begins {prompt.given[:40]!r}."
            )


def input_device(model: Any) -> Any:
    """Where ids belong: beside the embeddings, or where those compute if accelerate has offloaded them."""
    embeddings = model.get_input_embeddings()
    if embeddings is None or not embeddings.weight.is_meta:
        return model.device if embeddings is None or model.device.type != "meta" else embeddings.weight.device
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return "cpu" if device is None else device
