"""Prompts × columns → Comparison. Columns run one after another, each with its adapter alone in the model."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from adapterlab.columns import Column
from adapterlab.comparison import Comparison, Generation, TokenEvent
from adapterlab.errors import AdapterLabError
from adapterlab.fingerprints import adapter_digest, base_digest, column_digest
from adapterlab.sampling import Decoded, Sampler, make_decoder

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


def run_comparison(run: Run) -> Comparison:
    """Generate every column for every prompt. The lab's state, the model's mode and its config are afterwards as before."""
    generations: list[Generation] = []
    with eval_mode(run.adapters.model), neutral_generation_config(run.adapters.model, run.tokenizer):
        with run.adapters.using(None) as model:
            base = base_digest(model)
        for index, prompt in enumerate(run.prompts):
            reference: Tensor | None = None
            for column in sorted(run.columns, key=lambda column: not column.is_base):
                if run.stop.is_set() and generations:
                    break
                with run.adapters.using(column):
                    generation, decoded = _generate(run, index, prompt, column, base)
                if column.is_base:
                    reference = decoded.first_logits
                elif reference is None:
                    reference = _first_logits(run, prompt)
                shift = _shift(decoded.first_logits, reference)
                generations.append(replace(generation, logit_shift=0.0 if column.is_base else shift))
    order = {column.label: place for place, column in enumerate(run.columns)}
    generations.sort(key=lambda g: (g.prompt_index, order[g.column]))
    return Comparison(
        prompts=[prompt.given for prompt in run.prompts],
        rendered=[prompt.rendered for prompt in run.prompts],
        prompt_ids=[prompt.ids for prompt in run.prompts],
        settings=run.settings.as_dict(),
        model={**run.about, "base_digest": base},
        generations=generations,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _generate(run: Run, index: int, prompt: Prompt, column: Column, base: str) -> tuple[Generation, Decoded]:
    import torch

    model, tokenizer = run.adapters.model, run.tokenizer
    standing = run.adapters.mounts.standing()
    digest = (
        column_digest((m, adapter_digest(layers, name)) for name, (m, layers) in standing.items()) if standing else base
    )
    out, stream = Decoded(), _Stream(run, index, column.label)
    sampler = Sampler(run.settings.seed, run.settings.temperature, prompt.ids)
    ids = torch.tensor([prompt.ids], device=_input_device(model))
    stop_strings = {"tokenizer": tokenizer} if "stop_strings" in run.settings.extra else {}
    started = time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        custom_generate=make_decoder(sampler, run.stop, out, lambda token, reason: stream.put(out, reason)),
        **run.settings.for_generate(),
        **stop_strings,
    )
    seconds = time.perf_counter() - started
    text = tokenizer.decode(out.token_ids, skip_special_tokens=True)
    if out.finish_reason == "stopped":
        stream.put(out, "stopped")
    generation = Generation(
        column=column.label,
        asked=column.parts,
        prompt_index=index,
        prompt=prompt.given,
        text=text,
        token_ids=tuple(out.token_ids),
        tokens=tuple(tokenizer.decode([token]) for token in out.token_ids),
        logprobs=tuple(out.logprobs),
        leads=tuple(out.leads),
        finish_reason=out.finish_reason,
        seconds=seconds,
        active_adapters=tuple(standing),
        multipliers=tuple(multiplier for multiplier, _ in standing.values()),
        logit_shift=math.nan,
        weights_digest=digest,
        note="" if column.is_base else "run alone, in turn",
    )
    return generation, out


class _Stream:
    """Tokens in, readable pieces of text out to `on_token`; an incomplete character waits for its rest.

    Decodes from the last piece on, so that the work per token does not grow with the text.
    """

    def __init__(self, run: Run, index: int, label: str) -> None:
        self.run, self.index, self.label = run, index, label
        self.said_from = self.said_to = 0

    def put(self, out: Decoded, reason: str | None) -> None:
        if self.run.on_token is None:
            return
        decode, ids = self.run.tokenizer.decode, out.token_ids
        said = decode(ids[self.said_from : self.said_to], skip_special_tokens=True)
        text = decode(ids[self.said_from :], skip_special_tokens=True)
        piece = ""
        if len(text) > len(said) and (reason is not None or not text.endswith("\ufffd")):
            piece, self.said_from, self.said_to = text[len(said) :], self.said_to, len(ids)
        last = len(ids) - 1
        token = ids[last] if ids else -1
        self.run.on_token(TokenEvent(self.index, self.label, last, token, piece, reason))


def _first_logits(run: Run, prompt: Prompt) -> Tensor:
    """The bare base's logits on the prompt's last position: the reference for logit_shift when base is no column."""
    import torch

    out, never = Decoded(), threading.Event()
    with run.adapters.using(None) as model:
        ids = torch.tensor([prompt.ids], device=_input_device(model))
        decoder = make_decoder(Sampler(0, 0.0, prompt.ids), never, out, lambda token, reason: None)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=decoder,
            max_new_tokens=1,
            do_sample=False,
        )
    assert out.first_logits is not None
    return out.first_logits


def _shift(mine: Tensor | None, reference: Tensor | None) -> float:
    if mine is None or reference is None:  # stopped before the first token
        return math.nan
    return float((mine - reference).abs().max())


def compute_logprobs(model: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> tuple[float, ...]:
    """Log-probability of each token after the same text in one forward of the model as it stands, in nats."""
    import torch

    if not token_ids:
        return ()
    device = _input_device(model)
    with torch.no_grad(), eval_mode(model):
        if model.config.is_encoder_decoder:
            start = decoder_start(model)
            inputs = {
                "input_ids": torch.tensor([list(prompt_ids)], device=device),
                "decoder_input_ids": torch.tensor([[start, *token_ids[:-1]]], device=device),
            }
            logits = model(**inputs).logits[0]
        else:
            ids = torch.tensor([[*prompt_ids, *token_ids[:-1]]], device=device)
            logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 :]
        logprobs = torch.log_softmax(logits.float(), -1)
    return tuple(logprobs[torch.arange(len(token_ids)), torch.tensor(token_ids)].tolist())


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
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def neutral_generation_config(model: Any, tokenizer: Any) -> Iterator[None]:
    """The model's special tokens without its sampling: a published temperature would slip into every column."""
    from transformers import GenerationConfig

    given = model.generation_config
    tokens = {name: getattr(given, name, None) for name in _TOKEN_FIELDS}
    if tokens["eos_token_id"] is None:
        tokens["eos_token_id"] = getattr(model.config, "eos_token_id", None) or tokenizer.eos_token_id
    if tokens["pad_token_id"] is None:
        eos = tokens["eos_token_id"]
        fallback = eos[0] if isinstance(eos, list) else eos
        tokens["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else fallback
    model.generation_config = GenerationConfig(**{name: value for name, value in tokens.items() if value is not None})
    try:
        yield
    finally:
        model.generation_config = given


def check_context(model: Any, prompts: Sequence[Prompt], settings: Settings) -> None:
    """Raise `AdapterLabError` if a prompt and its answer can't fit the model's context."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        return
    for prompt in prompts:
        decoded = 0 if model.config.is_encoder_decoder else settings.max_new_tokens
        if len(prompt.ids) + decoded > limit:
            room = limit - len(prompt.ids)
            remedy = f"set max_new_tokens to {room} or less, or shorten it" if room > 0 and decoded else "shorten it"
            raise AdapterLabError(
                f"The prompt has {len(prompt.ids)} tokens and the answer may have {decoded}, but the model's context is "
                f"{limit}: {remedy}. It begins {prompt.given[:40]!r}."
            )


def _input_device(model: Any) -> Any:
    return model.get_input_embeddings().weight.device if model.device.type == "meta" else model.device
