"""Generation settings, checked before the model is asked: nonsense is refused by name."""

from __future__ import annotations

import difflib
import json
import numbers
from dataclasses import dataclass, field
from typing import Any

from adapterlab.columns import is_finite
from adapterlab.errors import AdapterLabError

# Fields of transformers' GenerationConfig that act through logits processors or stopping criteria: one row, no search.
_PASSED_ON = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "eos_token_id", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "renormalize_logits", "repetition_penalty", "sequence_bias", "stop_strings",
    "suppress_tokens", "typical_p",
})  # fmt: skip
_COLDEST = 1e-3  # below, logits / temperature leave the range in which fp32 can tell tokens apart
# Processors that look at the ids so far: padding is text to them.
READ_THE_TEXT = frozenset({
    "bad_words_ids", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "repetition_penalty", "sequence_bias",
})  # fmt: skip
_SAMPLING_ONLY = frozenset(["min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"])
_REFUSED = {
    "num_beams": "beam search gives no comparable columns: leave it at 1",
    "num_return_sequences": "one column is one text: compare with several seeds instead",
    "do_sample": "set temperature above 0 to sample, 0 for the most likely token",
    "max_length": "set max_new_tokens, which does not count the prompt",
    "min_length": "set min_new_tokens, which does not count the prompt",
    "streamer": "set on_token to follow the text as it grows",
    "logits_processor": "use lab.model.generate for processors of your own",
    "stopping_criteria": "use stop_strings or max_new_tokens, or lab.model.generate for criteria of your own",
    "generation_config": "give its settings by name",
    "use_cache": "the lab always generates with the cache",
}


@dataclass(frozen=True)
class Settings:
    """What steers the decoding of every column alike. `temperature` 0 takes the most likely token; `top_k` 0 is off."""

    seed: int = 0
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        *,
        seed: Any = 0,
        max_new_tokens: Any = 64,
        temperature: Any = 0.0,
        top_p: Any = 1.0,
        top_k: Any = 0,
        **extra: Any,
    ) -> Settings:
        """Check everything and raise one `AdapterLabError` that names each thing that is wrong."""
        wrong = []
        if not _whole(seed):
            wrong.append(f"seed={seed!r} is no whole number")
        if not _whole(max_new_tokens) or max_new_tokens < 1:
            wrong.append(f"max_new_tokens={max_new_tokens!r} is no whole number from 1 up")
        if not is_finite(temperature) or temperature < 0 or 0 < temperature < _COLDEST:
            wrong.append(
                f"temperature={_short(temperature)} is no number from {_COLDEST:g} up, nor 0, which takes the most likely token"
            )
        if not is_finite(top_p) or not 0 < top_p <= 1:
            wrong.append(f"top_p={top_p!r} is not above 0 and at most 1 (1 is off)")
        if not _whole(top_k) or top_k < 0:
            wrong.append(f"top_k={top_k!r} is no whole number from 0 up (0 is off)")
        kept = {}
        for name, value in extra.items():
            if name in ("num_beams", "num_return_sequences") and value == 1:
                continue
            if name in _REFUSED:
                wrong.append(f"{name}: {_REFUSED[name]}")
            elif name not in _PASSED_ON:
                near = difflib.get_close_matches(name, [*_PASSED_ON, *cls.__dataclass_fields__, "chat"], n=1)
                wrong.append(f"{name!r} is no generation setting" + (f" (did you mean {near[0]!r}?)" if near else ""))
            else:
                kept[name] = value
        if wrong:
            raise AdapterLabError("These settings can't be used: " + "; ".join(wrong) + ".")
        return cls(int(seed), int(max_new_tokens), float(temperature), float(top_p), int(top_k), kept)

    def for_generate(self) -> dict[str, Any]:
        """As keyword arguments of `model.generate`; sampling itself is the lab's (see sampling.py)."""
        if self.temperature == 0:
            passed = {name: value for name, value in self.extra.items() if name not in _SAMPLING_ONLY}
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, **passed}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_new_tokens": self.max_new_tokens, **sampling, **self.extra}

    def as_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("seed", "max_new_tokens", "temperature", "top_p", "top_k")}
        return {**plain, **{name: _jsonable(value) for name, value in self.extra.items()}}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _jsonable(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return repr(value)
