"""The question and the buttons that put it to the columns; the sampling settings, folded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w
from traitlets import link

from adapterlab.widgets.chat import ChatTurns
from adapterlab.widgets.compat import classes, label_text, set_tooltip
from adapterlab.widgets.fold import Fold
from adapterlab.widgets.state import Notice, PanelState
from adapterlab.widgets.text import sampling_words

_TOO_MANY_LINES = "One line can't hold the prompt's line breaks: take them out first."


class PromptBox:
    """Prompt, examples, Generate and Stop; `on_generate()` and `on_stop()` are called by the buttons.

    The prompt reaches the kernel when Enter is pressed or the focus leaves it, so that a slow connection never
    holds its last letters back when Generate is clicked.
    """

    def __init__(
        self,
        state: PanelState,
        examples: Sequence[str],
        on_generate: Callable[[], object],
        on_stop: Callable[[], object],
    ) -> None:
        self._state = state
        self.text = w.Text(description="Prompt", placeholder="Ask the model something", continuous_update=False)
        self.lines = w.Textarea(description="Text", rows=5, continuous_update=False)
        for box in (self.text, self.lines):
            classes(box, "alab-prompt")
        self.several = classes(w.ToggleButton(description="Several lines"), "alab-quiet")
        set_tooltip(self.several, "A prompt of more than one line; Enter then starts a new one")
        self.chat = ChatTurns(state)
        self.generate = classes(w.Button(description="Generate", button_style="primary"), "alab-main")
        self.stop = classes(w.Button(description="Stop"), "alab-stop")
        set_tooltip(self.generate, "Run the prompt through every ticked row (Enter in the prompt does the same)")
        set_tooltip(self.stop, "End the running generation after this token; what is there stays")
        self.examples = [self._example(text) for text in examples]
        self.sampling = Sampling(state)
        first = classes(w.HBox([self.text, self.lines, self.generate, self.stop]), "alab-prompt-line")
        chips = classes(w.HBox([w.HTML('<span class="alab-muted">Try</span>'), *self.examples]), "alab-chips")
        chips.layout.display = None if examples else "none"
        folds = [self.sampling.fold, self.chat.fold]
        buttons = classes(w.HBox([*(fold.button for fold in folds), self.several]), "alab-folds")
        self.box = classes(w.VBox([first, chips, buttons, *(fold.body for fold in folds)]), "alab-section")
        link((state, "prompt"), (self.lines, "value"))
        state.observe(lambda _: self._show_prompt(), "prompt")
        self.text.observe(self._on_text, "value")
        self.several.observe(self._on_several, "value")
        self._show_prompt()
        self.generate.on_click(lambda _: on_generate())
        self.stop.on_click(lambda _: on_stop())
        state.observe(lambda _: self._render(), ["busy", "stoppable", "elsewhere", "closed"])
        self._render()

    def _on_text(self, change: dict[str, Any]) -> None:
        self._state.prompt = change["new"]

    def _on_several(self, change: dict[str, Any]) -> None:
        if not change["new"] and "\n" in self._state.prompt:
            self._state.notice = Notice("info", _TOO_MANY_LINES)
        self._show_prompt()

    def _show_prompt(self) -> None:
        """In the one line, unless it has several: a line's box would drop their breaks."""
        if "\n" in self._state.prompt and not self.several.value:
            self.several.value = True  # which comes back here
            return
        several = self.several.value
        if not several:
            self.text.value = self._state.prompt
        self.text.layout.display = "none" if several else None
        self.lines.layout.display = None if several else "none"

    def _example(self, text: str) -> w.Button:
        # Buttons set their text as text in both versions of ipywidgets, so no escaping here.
        button = classes(w.Button(description=text), "alab-chip")
        set_tooltip(button, "Put this into the prompt")

        def choose(_: Any) -> None:
            self._state.prompt = text

        button.on_click(choose)
        return button

    def _render(self) -> None:
        closed, running = self._state.closed, bool(self._state.busy)
        self.generate.disabled = running or closed
        self.generate.description = self._state.busy.split(" ")[0].rstrip("…") + "…" if running else "Generate"
        self.stop.disabled = closed or not ((running and self._state.stoppable) or self._state.elsewhere)
        self.text.disabled = self.lines.disabled = closed


class Sampling:
    """How tokens are chosen. Folded, the button says the settings in words."""

    def __init__(self, state: PanelState) -> None:
        self._state = state
        self.max_new_tokens = w.BoundedIntText(min=1, max=100_000, description="New tokens")
        self.temperature = w.BoundedFloatText(min=0.0, max=100.0, step=0.1, description="Temperature")
        self.top_p = w.BoundedFloatText(min=0.01, max=1.0, step=0.05, description="Top-p")
        self.top_k = w.BoundedIntText(min=0, max=1_000_000, description="Top-k")
        self.seed = w.BoundedIntText(min=0, max=2**31 - 1, description="Seed")
        tips = {
            "max_new_tokens": "At most this many new tokens in each column",
            "temperature": "0 always takes the likeliest token; higher takes more chances",
            "top_p": "Choose among the likeliest tokens that together have this probability; 1 is off",
            "top_k": "Choose among this many likeliest tokens; 0 is off",
            "seed": "The dice. Every column gets the same ones, so that columns differ because of the adapter",
        }
        for name, tip in tips.items():
            set_tooltip(getattr(self, name), tip)
            link((state, name), (getattr(self, name), "value"))
        hint = w.HTML(
            '<span class="alab-muted">At temperature 0 the likeliest token is always taken: '
            "top-p, top-k and seed have no effect.</span>"
        )
        controls = [self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed]
        self.fold = Fold("Sampling", [classes(w.HBox(controls), "alab-form"), hint])
        self._hint = hint
        state.observe(lambda _: self._render(), list(tips))
        self._render()

    def _render(self) -> None:
        state = self._state
        greedy = state.temperature == 0
        for control in (self.top_p, self.top_k, self.seed):
            control.disabled = greedy
        self._hint.layout.display = None if greedy else "none"
        self.fold.summary(label_text(f"Sampling: {sampling_words(state.sampling)}"))
