"""A prompt as chat messages: the system turn, and what was said before the prompt."""

from __future__ import annotations

from typing import Any

import ipywidgets as w
from traitlets import link

from adapterlab.widgets.compat import classes, close_all, set_tooltip
from adapterlab.widgets.fold import Fold
from adapterlab.widgets.state import PanelState

_HINT = "Said before the prompt, in the model's own chat template. An empty turn is left out."


class ChatTurns:
    """The system turn and earlier turns of `state`, folded; hidden for models without a chat template."""

    def __init__(self, state: PanelState) -> None:
        self._state = state
        self.system = classes(w.Textarea(description="System turn", rows=2, continuous_update=False), "alab-wide")
        self.add = classes(w.Button(description="Add an earlier turn"), "alab-quiet")
        set_tooltip(self.add, "Somebody's words before the prompt: the user's and the assistant's take turns")
        self.turns = classes(w.VBox(), "alab-turns")
        self._boxes: list[tuple[w.Dropdown, w.Textarea]] = []
        self._drawn: tuple[tuple[str, str], ...] = ()
        hint = w.HTML(f'<span class="alab-muted">{_HINT}</span>')
        first = classes(w.HBox([self.system, self.add]), "alab-form")
        self.fold = Fold("Chat", [first, self.turns, hint])
        link((state, "system"), (self.system, "value"))
        self.add.on_click(lambda _: self._add())
        state.observe(lambda _: self._render(), ["system", "turns", "has_chat", "closed"])
        self._render()

    def _add(self) -> None:
        with self._state.lock:
            turns = self._typed()
            role = "assistant" if turns and turns[-1][0] == "user" else "user"
            self._state.turns = (*turns, (role, ""))

    def _turn(self, place: int) -> tuple[w.Box, w.Dropdown, w.Textarea]:
        role = classes(w.Dropdown(options=["user", "assistant"], description=f"Turn {place + 1}"), "alab-short")
        words = classes(
            w.Textarea(description=f"Words of turn {place + 1}", rows=2, continuous_update=False), "alab-wide"
        )
        gone = classes(w.Button(description="Remove"), "alab-quiet")
        set_tooltip(gone, f"Take turn {place + 1} out of the chat")
        for box in (role, words):
            box.observe(lambda _: self._read(), "value")
        gone.on_click(lambda _: self._remove(place))
        return classes(w.HBox([role, words, gone]), "alab-form"), role, words

    def _typed(self) -> tuple[tuple[str, str], ...]:
        return tuple((role.value, words.value) for role, words in self._boxes)

    def _read(self) -> None:
        with self._state.lock:
            if not self._writing:
                self._state.turns = self._typed()

    def _remove(self, place: int) -> None:
        with self._state.lock:
            self._state.turns = tuple(turn for i, turn in enumerate(self._typed()) if i != place)

    _writing = False

    def _render(self) -> None:
        with self._state.lock:
            self._draw()

    def _draw(self) -> None:
        state = self._state
        self.fold.button.layout.display = None if state.has_chat else "none"
        self.fold.body.layout.display = None if state.has_chat and self.fold.open else "none"
        self._writing = True  # the boxes tell of every single change, and the state has them all already
        try:
            self._show_turns(state.turns)
        finally:
            self._writing = False
        self.system.disabled = self.add.disabled = state.closed
        said = len([words for _, words in state.turns if words.strip()])
        parts = ["system turn"] if state.system.strip() else []
        parts += [f"{said} earlier turn{'s' if said > 1 else ''}"] if said else []
        self.fold.summary(f"Chat: {', '.join(parts)}" if parts else "Chat")

    def _show_turns(self, turns: tuple[tuple[str, str], ...]) -> None:
        rows: list[Any] = list(self.turns.children)
        while len(rows) < len(turns):
            row, role, words = self._turn(len(rows))
            rows.append(row)
            self._boxes.append((role, words))
        gone, rows = rows[len(turns) :], rows[: len(turns)]
        del self._boxes[len(turns) :]
        drawn = (*self._drawn, *[None] * len(turns))
        for (role, words), turn, before in zip(self._boxes, turns, drawn):
            if turn != before:  # what is being typed elsewhere stays
                role.value, words.value = turn
        self._drawn = turns
        if tuple(rows) != self.turns.children:
            self.turns.children = tuple(rows)
        for row in gone:
            close_all(row)
