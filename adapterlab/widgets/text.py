"""What a card says, as HTML: the text with its marks, the numbers of its tokens, and the proof of who spoke."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterlab.pagetext import escape
from adapterlab.render import mark_words

if TYPE_CHECKING:
    from adapterlab.comparison import Generation

MARKS = {"Words": "words", "Likelihood": "likelihood", "None": "none"}
FINISH_WORDS = {
    "eos": "ended by itself",
    "length": "at the limit of new tokens",
    "stopped": "stopped by you",
}
_STRONG = 8.0  # nats: from here on a token is shaded fully


def text_html(generation: Generation, base: Generation | None, marks: str) -> str:
    """The text. marks: "words" sets off what base does not say (<ins>) and what it says there instead (<del>);
    "likelihood" shades each token by how much likelier or less likely the adapter made it; "none" leaves it plain. Both
    put a sign before the first token that is not base's.

    base: the base's answer in the same comparison, or None.
    """
    if marks == "likelihood" and not _is_base(generation) and generation.base_logprobs is not None:
        return "".join(_token_html(generation, place) for place in range(generation.new_tokens))
    if marks == "words" and base is not None and not _is_base(generation):
        at = leaving_place(generation)
        return mark_words(generation.text, base.text, removed=True, at=at, sign=_sign(generation))
    return escape(generation.text)


def leaving_place(generation: Generation) -> int | None:
    """Where in the text the word stands whose first token is not base's; None if there is none, or the tokens on their own
    do not spell the text."""
    if generation.first_difference is None:
        return None
    text, before = generation.text, "".join(generation.tokens[: generation.first_difference])
    rest = text[len(before) :].lstrip()
    return len(text) - len(rest) if text.startswith(before) and rest else None


def _sign(generation: Generation) -> str:
    """What stands before the first token that is not base's."""
    number = (generation.first_difference or 0) + 1
    words = f"Leaves base here, at token {number}" + (": a tie, rounding could have done it" if generation.tie else "")
    return f'<span class="alab-leaves" role="img" aria-label="{words}" title="{words}">▸</span>'


def _is_base(generation: Generation) -> bool:
    return not generation.asked


def _token_html(generation: Generation, place: int) -> str:
    assert generation.base_logprobs is not None  # the caller asked
    token, mine, theirs = generation.tokens[place], generation.logprobs[place], generation.base_logprobs[place]
    sign = _sign(generation) if place == generation.first_difference else ""
    change = mine - theirs
    if not math.isfinite(change):
        return sign + escape(token)
    kind = "likelier" if change > 0 else "rarer"
    shade = min(abs(change) / _STRONG, 1.0)
    title = f"{change:+.2f} nats: {mine:.2f} here, {theirs:.2f} under base"
    return f'{sign}<span class="alab-{kind}" style="--alab-shade:{shade:.2f}" title="{title}">{escape(token)}</span>'


def tokens_html(generation: Generation) -> str:
    """A folded table of the tokens: position, token, log-probability here and under base, and the difference."""
    if generation.base_logprobs is None:
        return ""
    rows = "".join(
        f"<tr><td>{place + 1}</td><td><code>{escape(repr(token)[1:-1])}</code></td>"
        f"<td>{mine:.2f}</td><td>{theirs:.2f}</td><td>{mine - theirs:+.2f}</td></tr>"
        for place, (token, mine, theirs) in enumerate(
            zip(generation.tokens, generation.logprobs, generation.base_logprobs)
        )
    )
    return (
        "<details class='alab-tokens'><summary>Tokens and log-probabilities, in nats</summary><table><thead><tr>"
        "<th scope='col'>#</th><th scope='col'>token</th><th scope='col'>here</th><th scope='col'>base</th>"
        f"<th scope='col'>change</th></tr></thead><tbody>{rows}</tbody></table></details>"
    )


def result_html(generation: Generation, *, blind: bool = False) -> str:
    """How it ended, how fast it was, and what proves which adapter spoke. blind: only what tells nobody's name."""
    finish = FINISH_WORDS.get(generation.finish_reason, generation.finish_reason)
    speed = f"{generation.new_tokens} tokens, {generation.tokens_per_second:.1f} tokens/s"
    rows = [("Finish", f"{finish} ({generation.finish_reason})")]
    if not blind:
        acting = zip(generation.active_adapters, generation.multipliers, strict=True)
        active = " + ".join(f"{name} × {multiplier:g}" for name, multiplier in acting) or "none"
        rows += [
            ("Speed", speed + (", from the cache" if generation.cached else "")),
            ("Active adapters", active),
            ("Weights", generation.weights_digest[:12]),
            ("Logit shift", f"{generation.logit_shift:.3g}"),
        ]
        if generation.first_difference is not None:
            tie = " (tie: rounding could have done it)" if generation.tie else ""
            place = generation.first_difference
            word = repr(generation.tokens[place]) if place < len(generation.tokens) else "the end"
            rows.append(("▸ Leaves base at", f"token {place + 1}, {word}{tie}"))
        if generation.note:
            rows.append(("Note", generation.note))
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in rows)
    return f"<dl>{items}</dl>"


def sampling_words(settings: Mapping[str, Any]) -> str:
    """The settings in a line: `64 new tokens, always the likeliest token` or `…, temperature 0.8, top-p 0.9, seed 3`."""
    words = [f"{_number(settings['max_new_tokens'])} new tokens"] if "max_new_tokens" in settings else []
    if not settings.get("temperature"):
        return ", ".join([*words, "always the likeliest token"])
    words.append(f"temperature {_number(settings['temperature'])}")
    if settings.get("top_p", 1.0) not in (1, None):
        words.append(f"top-p {_number(settings['top_p'])}")
    if settings.get("top_k"):
        words.append(f"top-k {_number(settings['top_k'])}")
    return ", ".join([*words, f"seed {_number(settings.get('seed', 0))}"])


def _number(value: Any) -> str:
    """0.8 → `0.8`; what somebody wrote into a file instead, as it is."""
    return f"{value:g}" if isinstance(value, float) else str(value)
