"""Common random numbers: columns differ because of the adapter and not because of the dice.

A sample from a softmax is the argmax of logits / temperature + Gumbel noise (Gumbel 1954; Maddison et al. 2014). The
noise here is a function of (seed, the prompt's ids, the row's step) alone, so two columns that give equal logits give
equal tokens, and a column does not depend on which others ran.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    """Chooses a token from processed scores; greedy where `temperature` is 0."""

    seed: int
    temperature: float
    prompt_ids: tuple[int, ...]

    def choose(self, scores: Tensor, step: int) -> tuple[int, float]:
        """The token of `scores` (shape (vocabulary,), fp32, processors and temperature applied) and its lead over the next.

        The lead is in units of the perturbed scores: what rounding has to overcome to change the token.
        """
        import torch

        if self.temperature > 0:
            scores = scores + compute_noise(self.seed, self.prompt_ids, step, scores.shape[-1]).to(scores.device)
        best = torch.topk(scores, min(2, scores.shape[-1]))
        lead = float(best.values[0] - best.values[-1]) if len(best.values) > 1 else float("inf")
        # argmax, not topk's index: among exactly equal scores transformers' greedy search takes argmax's choice.
        return int(torch.argmax(scores)), lead


@dataclass
class Decoded:
    """What one decoding run produced; it grows while the run goes on. Logprobs are of the raw logits, unprocessed."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)
    first_logits: Tensor | None = None
    finish_reason: str = "length"


def make_decoder(
    sampler: Sampler, stop: threading.Event, out: Decoded, on_step: Callable[[int, str | None], None]
) -> Callable[..., Tensor]:
    """A function for `generate(custom_generate=…)` that decodes one row into `out`.

    `generate` hands it the processors, with temperature, top-k and top-p last and in order, which a processor of
    one's own would run before (issue 2). `stop` ends it within a token; `on_step(token_id, finish_reason)` follows each token.
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

        eos = generation_config._eos_token_tensor
        ends = set() if eos is None else set(eos.flatten().tolist())
        is_encoder_decoder = model.config.is_encoder_decoder
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        while not stop.is_set():
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder
            )
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            del outputs
            if out.first_logits is None:
                out.first_logits = logits[0].clone()
            token, lead = sampler.choose(logits_processor(input_ids, logits.clone())[0], len(out.token_ids))
            out.token_ids.append(token)
            out.logprobs.append(float(torch.log_softmax(logits[0], -1)[token]))
            out.leads.append(lead)
            input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], dim=-1)
            reason = _finish_reason(token, ends, input_ids, stopping_criteria)
            on_step(token, reason)
            if reason is not None:
                out.finish_reason = reason
                return input_ids
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if model_kwargs["use_cache"] else None, **model_kwargs
            )
            outputs = model(**inputs, return_dict=True)
        out.finish_reason = "stopped"
        return input_ids

    return decode


def _finish_reason(token: int, ends: set[int], input_ids: Tensor, stopping_criteria: Any) -> str | None:
    if token in ends:
        return "eos"
    if not bool(stopping_criteria(input_ids, None).all()):
        return None
    longest = stopping_criteria.max_length
    return "length" if longest is not None and input_ids.shape[1] >= longest else "stop_string"
