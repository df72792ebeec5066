"""Common random numbers: columns differ because of the adapter and not because of the dice.

A sample from a softmax is the argmax of logits / temperature + Gumbel noise (Gumbel 1954; Maddison et al. 2014). The
noise here is a function of (seed, the prompt's ids, the row's step) alone, never of the row's place in the batch, so
two columns that give equal logits give equal tokens, and a column does not depend on which others ran.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


def compute_noise(seed: int, prompt_ids: Sequence[int], step: int, size: int) -> Tensor:
    """Gumbel noise for one row and step: shape (size,), fp32, on the CPU. Draws from no global generator."""
    import torch

    key = hashlib.blake2b(f"{seed}|{step}|{','.join(map(str, prompt_ids))}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    exponential = torch.empty(size, dtype=torch.float32).exponential_(generator=generator)
    return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens from processed scores; greedy where `temperature` is 0."""

    seed: int
    temperature: float
    prompt_ids: tuple[int, ...]

    def noise(self, step: int, size: int) -> Tensor:
        return compute_noise(self.seed, self.prompt_ids, step, size)


@dataclass
class Row:
    """One row of the batch: how it chooses, whom it tells, and what came of it; it grows while the run goes on.

    logprobs are of the raw logits, unprocessed. leads: by how much each token won, in units of the perturbed scores:
    what rounding has to overcome to change it.
    """

    sampler: Sampler
    on_step: Callable[[Row, str | None], None]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)
    first_logits: Tensor | None = None
    finish_reason: str = ""
    ended: float = 0.0  # perf_counter() when it finished


class Layout(Protocol):
    """What knows how rows may leave the batch."""

    def keep(self, done: Sequence[bool]) -> list[int] | None: ...


def choose(scores: Tensor, rows: Sequence[Row], logits: Tensor | None = None) -> tuple[list[int], list[float]]:
    """Tokens and leads for `scores` (rows, vocabulary), fp32, processors applied; rows of one prompt share their noise.

    Where top-k or top-p has left one token, its lead is over what they have put aside, by `logits`: rounding may have
    decided who stays.
    """
    import torch

    drawn: dict[tuple[Sampler, int], Tensor] = {}
    for i, row in enumerate(rows):
        if row.sampler.temperature > 0:
            key = (row.sampler, len(row.token_ids))
            if key not in drawn:
                drawn[key] = row.sampler.noise(key[1], scores.shape[-1]).to(scores.device)
            scores[i] += drawn[key]
    best = torch.topk(scores, min(2, scores.shape[-1])).values
    leads = (best[:, 0] - best[:, -1]).tolist() if best.shape[-1] > 1 else [float("inf")] * len(rows)
    # argmax, not topk's index: among exactly equal scores transformers' greedy search takes argmax's choice.
    tokens = scores.argmax(-1).tolist()
    for i in range(len(rows) if logits is not None else 0):
        if leads[i] == float("inf"):
            assert logits is not None  # the range would be empty
            others = logits[i].clone()
            others[tokens[i]] = -float("inf")
            lead = float(logits[i, tokens[i]] - others.max()) / (rows[i].sampler.temperature or 1.0)
            leads[i] = max(lead, 0.0)
    return tokens, leads


def make_decoder(rows: list[Row], stop: threading.Event, layout: Layout | None = None) -> Callable[..., Tensor]:
    """A function for `generate(custom_generate=…)` that decodes a batch into `rows`, in their order.

    `generate` hands it the processors, with temperature, top-k and top-p last and in order, which a processor of
    one's own would run before (issue 2). `stop` ends it within a token. Finished rows leave as `layout` allows.
    """

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        import torch

        from adapterlab.kvcache import let_grow
        from adapterlab.peaks import cache_tensors, note

        longest = stopping_criteria.max_length
        let_grow(model_kwargs.get("past_key_values"), longest and longest - 1)  # the last token is not read any more
        eos = generation_config._eos_token_tensor
        ends = set() if eos is None else set(eos.flatten().tolist())
        is_encoder_decoder = model.config.is_encoder_decoder
        live = list(rows)
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        while not stop.is_set():
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder
            )
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            del outputs
            tokens, leads = choose(logits_processor(input_ids, logits.clone()), live, logits)
            picked = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
            logprobs = (picked - logits.logsumexp(-1)).tolist()
            input_ids = torch.cat([input_ids, input_ids.new_tensor(tokens)[:, None]], dim=-1)
            halted = stopping_criteria(input_ids, None).tolist()
            full = longest is not None and input_ids.shape[1] >= longest
            for i, row in enumerate(live):
                if row.finish_reason:
                    continue
                if row.first_logits is None:
                    row.first_logits = logits[i].clone()
                row.token_ids.append(tokens[i])
                row.logprobs.append(logprobs[i])
                row.leads.append(leads[i])
                row.finish_reason = (
                    "eos" if tokens[i] in ends else "length" if full else "stop_string" if halted[i] else ""
                )
                row.ended = time.perf_counter()
                row.on_step(row, row.finish_reason or None)
            done = [bool(row.finish_reason) for row in live]
            if all(done):
                break
            leaving = layout is not None and any(done) and _can_shrink(model_kwargs, logits_processor)
            keep = layout.keep(done) if layout is not None and leaving else None
            if keep is not None:
                note("KV cache", functools.partial(cache_tensors, model_kwargs))  # before it shrinks
                live = [live[i] for i in keep]
                input_ids, model_kwargs = _select(input_ids, model_kwargs, keep)
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if model_kwargs["use_cache"] else None, **model_kwargs
            )
            outputs = model(**inputs, return_dict=True)
        note("KV cache", functools.partial(cache_tensors, model_kwargs))
        for row in rows:
            if not row.finish_reason:
                row.finish_reason, row.ended = "stopped", time.perf_counter()
                row.on_step(row, "stopped")
        return input_ids

    return decode


def _can_shrink(model_kwargs: dict[str, Any], processors: Iterable[Any]) -> bool:
    """Whether rows can leave: transformers' layers for linear attention keep states of all rows, and the processors that
    compare with the prompts keep all prompts."""
    if any(hasattr(one, "encoder_input_ids") or hasattr(one, "generated_ngrams") for one in processors):
        return False
    caches = [model_kwargs.get(name) for name in ("past_key_values", "cache_params")]
    caches += [getattr(cache, "self_attention_cache", None) for cache in caches]
    layers = [layer for cache in caches for layer in getattr(cache, "layers", ())]
    return all(hasattr(layer, "batch_select_indices") and not hasattr(layer, "conv_states") for layer in layers)


def _select(input_ids: Tensor, model_kwargs: dict[str, Any], keep: list[int]) -> tuple[Tensor, dict[str, Any]]:
    """The same batch with these rows only: ids, masks, positions, encoder outputs and the cache."""
    import torch
    from transformers.modeling_outputs import ModelOutput

    rows, index = input_ids.shape[0], torch.tensor(keep, device=input_ids.device)
    kept = {}
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows:
            value = value[index]
        elif isinstance(value, ModelOutput):
            value = type(value)(
                **{k: v[index] if isinstance(v, torch.Tensor) and v.shape[0] == rows else v for k, v in value.items()}
            )
        elif hasattr(value, "batch_select_indices"):
            value.batch_select_indices(index)
        kept[name] = value
    return input_ids[index], kept
