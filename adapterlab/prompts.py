"""What a person typed → what the model sees: chat template or plain completion, and the ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
PromptLike = Union[str, Messages, Sequence[Union[str, Messages]]]


@dataclass(frozen=True)
class Prompt:
    """One prompt: `given` as it was typed (messages joined), `rendered` as the model sees it, `ids` unpadded."""

    given: str
    rendered: str
    ids: tuple[int, ...]


def render_prompts(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Any, chat: bool | Literal["auto"] = "auto"
) -> list[Prompt]:
    """Read a string, a list of strings, chat messages, or a list of chats.

    `chat="auto"`: a string goes through the chat template as the user's turn where the tokenizer has one, and is
    completed plainly otherwise; True insists on the template, False never uses it. Raises `AdapterLabError` for an
    empty prompt and for messages where there is no template.
    """
    if tokenizer is None:
        raise AdapterLabError("This lab has no tokenizer: give one, as in AdapterLab(model, tokenizer=tokenizer).")
    if chat not in (True, False, "auto"):
        raise AdapterLabError(f"chat={chat!r}: use 'auto', True or False.")
    if isinstance(prompt, str) or _is_chat(prompt):
        return [_render(tokenizer, prompt, chat)]
    if not isinstance(prompt, Sequence) or not prompt:
        raise AdapterLabError(f"{prompt!r} is no prompt: give a text, a list of texts, or chat messages.")
    return [_render(tokenizer, one, chat) for one in prompt]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(turn, Mapping) for turn in prompt)


def _render(tokenizer: Any, prompt: Any, chat: bool | Literal["auto"]) -> Prompt:
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if isinstance(prompt, str):
        if not prompt.strip():
            raise AdapterLabError("The prompt is empty: write something for the model to answer or continue.")
        if chat is False or (chat == "auto" and not has_template):
            return _tokenized(tokenizer, prompt, prompt, add_special_tokens=True)
        messages: list[dict[str, str]] = [{"role": "user", "content": prompt}]
        given = prompt
    elif _is_chat(prompt):
        messages = [_turn(turn) for turn in prompt]
        given = "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
        if chat is False:
            raise AdapterLabError("Chat messages need a chat template: leave out chat=False, or give plain text.")
    else:
        raise AdapterLabError(f"{prompt!r} is no prompt: give a text, or messages with 'role' and 'content'.")
    if not has_template:
        raise AdapterLabError(
            "This tokenizer has no chat template, so it can't take chat messages: give plain text, with chat='auto'."
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is the model author's program: it refuses roles in its own words
        raise AdapterLabError(f"The model's chat template refuses these messages: {error}") from error
    return _tokenized(tokenizer, given, text, add_special_tokens=False)


def _turn(turn: Mapping[str, Any]) -> dict[str, str]:
    if set(turn) != {"role", "content"} or not all(isinstance(value, str) for value in turn.values()):
        raise AdapterLabError(f"{dict(turn)!r} is no chat message: it needs 'role' and 'content', both text.")
    if not turn["content"].strip():
        raise AdapterLabError(f"The {turn['role']} turn is empty: write something or leave it out.")
    return dict(turn)


def _tokenized(tokenizer: Any, given: str, text: str, *, add_special_tokens: bool) -> Prompt:
    try:
        ids = tuple(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    except (TypeError, ValueError, UnicodeError) as error:  # lone surrogates, by tokenizer
        raise AdapterLabError(f"The tokenizer can't read {given[:40]!r}: {error}") from error
    if not ids:
        raise AdapterLabError(f"{given!r} has no tokens for this tokenizer: write something else.")
    return Prompt(given, text, ids)
