"""The columns: one card each, its text streaming in, with the proof of which adapter spoke."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ipywidgets as w

from adapterlab.columns import BASE, Column
from adapterlab.pagetext import escape
from adapterlab.widgets.compat import classes, close_all
from adapterlab.widgets.state import PanelState, Shown
from adapterlab.widgets.text import result_html, sampling_words, text_html, tokens_html

if TYPE_CHECKING:
    from adapterlab.comparison import Generation, TokenEvent

FLUSH_SECONDS = 0.1
HUES = 6
STATE_WORDS = {"": "not run yet", "waiting": "waiting", "writing": "writing…", "done": ""}


class ColumnCard:
    """One column. Its three HTML widgets stay for its whole life; only what they say changes.

    `alias`: what it is called while its name is hidden, else "".
    """

    def __init__(self, column: Column, hue: int, alias: str = "") -> None:
        self.label = column.label
        self._hue, self.alias = hue, alias
        self.head = classes(w.HTML(), "alab-card-head")
        self.body = classes(w.HTML(), "alab-card-body")
        self.foot = classes(w.HTML(), "alab-card-foot")
        self.box = classes(w.VBox([self.head, self.body, self.foot]), "alab-card", f"alab-hue-{0 if alias else hue}")
        self.clear()

    def name(self, alias: str) -> None:
        """Hide the column's name and colour behind `alias`, or show them again ("")."""
        if alias == self.alias:
            return
        self.alias = alias
        shown, other = f"alab-hue-{self._hue}", "alab-hue-0"
        self.box.remove_class(shown if alias else other)
        self.box.add_class(other if alias else shown)

    def clear(self, state: str = "") -> None:
        """Empty, as before a generation; `state`: "waiting" when one is about to fill it."""
        self._text, self._tokens, self._began = "", 0, 0.0
        self._show(state, "")

    def veil(self) -> None:
        """Show that something is being written, and neither what nor when it began, which would tell a name."""
        self._show("writing", "")

    def add(self, event: TokenEvent) -> None:
        """Take in one token without drawing."""
        self._began = self._began or time.perf_counter()
        self._text += event.text
        self._tokens = event.position + 1

    def draw(self) -> None:
        """Show what has come in so far."""
        seconds = time.perf_counter() - self._began
        rate = f" · {(self._tokens - 1) / seconds:.1f} tokens/s" if self._tokens > 2 and seconds > 0 else ""
        self._show("writing", escape(self._text), f"{self._tokens} tokens{rate}")

    def finish(self, generation: Generation, base: Generation | None, marks: str) -> None:
        """Show the result itself, which is what the kernel has."""
        if self.alias:
            self._show("done", escape(generation.text), result_html(generation, blind=True))
        else:
            if marks == "likelihood" and generation.base_logprobs is None:
                marks = "words"  # base has not read it yet
            text = text_html(generation, base, marks)
            tokens = tokens_html(generation) if marks == "likelihood" else ""
            self._show("done", text, result_html(generation) + tokens)

    def _show(self, state: str, text: str, foot: str = "") -> None:
        name = self.alias or self.label
        self.head.value = (
            f'<div class="alab-card-title"><span class="alab-dot" aria-hidden="true"></span>'
            f'<h4>{escape(name)}</h4><span class="alab-muted">{STATE_WORDS[state]}</span></div>'
        )
        # An empty answer is an answer: say so, or the card looks unfinished.
        text = text or ('<span class="alab-muted">(empty)</span>' if state == "done" else "")
        self.body.value = f'<div class="alab-text alab-{state or "empty"}" data-column="{escape(name)}">{text}</div>'
        self.foot.layout.display = None if foot else "none"
        self.foot.value = f'<div class="alab-result">{foot}</div>' if foot else ""


class ColumnsView:
    """All cards. While `running`, they are those of the generation; then those of `state.shown`, until other rows are
    ticked.

    `begin`, `token` and `finish` are called by the thread that generates; the rest follows the state.
    """

    def __init__(self, state: PanelState) -> None:
        self._state = state
        self._lock = state.lock  # two locks would wait for each other
        self._running = False
        self._dirty: set[str] = set()
        self._aliases: dict[str, str] = {}  # column → what it is called while names are hidden
        self._flushed = 0.0
        self._ticked: tuple[Column, ...] = ()
        self.cards: dict[str, ColumnCard] = {}
        self.title = classes(w.HTML(), "alab-asked")
        self.grid = classes(w.Box(), "alab-columns")
        self.box = classes(w.VBox([self.title, self.grid]), "alab-section")
        state.observe(lambda _: self._follow(), ["rows", "compared", "multipliers"])
        state.observe(lambda _: self._render(arrange=True), ["shown"])
        state.observe(lambda _: self._render(), ["marks", "scored"])
        state.observe(lambda _: self._reveal(), "hidden")
        self._follow()

    def begin(self, prompt: str, columns: Sequence[Column]) -> None:
        """Empty the cards of `columns` for a generation that starts now; `state.blind` shuffles and hides them."""
        with self._lock:
            self._running, self._dirty = True, set()
            blind = self._state.blind
            columns = random.sample(list(columns), len(columns)) if blind else columns
            self._aliases = {column.label: f"Column {place + 1}" for place, column in enumerate(columns)}
            self._state.hidden = blind
            self._set_title(prompt)
            self._arrange(columns)
            for card in self.cards.values():
                card.veil() if blind else card.clear("waiting")

    def token(self, event: TokenEvent) -> None:
        """Take in a token; draw at most ten times a second, whatever the number of columns."""
        with self._lock:
            card = self.cards.get(event.column)
            if card is None or self._state.hidden:
                return
            card.add(event)
            self._dirty.add(event.column)
            now = time.monotonic()
            if now - self._flushed >= FLUSH_SECONDS or event.finish_reason:
                self._flush(now)

    def finish(self) -> None:
        """The generation has ended; `state.shown` has what it made, or what there was before if an error came."""
        with self._lock:
            self._running = False
            self._render()
            self._follow()  # other rows may have been ticked meanwhile

    def _flush(self, now: float) -> None:
        for label in self._dirty:
            self.cards[label].draw()
        self._dirty.clear()
        self._flushed = now

    def _follow(self) -> None:
        """Between generations: a card for every ticked row, with its result if it has one."""
        with self._lock:
            # While names are hidden the cards stay: which of them goes with a row would tell its name.
            if self._running or self._state.hidden or self._state.columns == self._ticked:
                return
            self._arrange(self._state.columns)
            self._render()

    def _reveal(self) -> None:
        if not self._state.hidden:
            self._render()
            self._follow()

    def _render(self, *, arrange: bool = False) -> None:
        """Show `state.shown` on the cards; `arrange`: on cards of its own columns."""
        with self._lock:
            if self._running:
                return
            shown: Shown | None = self._state.shown
            found = {} if shown is None else shown.generations
            if shown is None:
                self.title.value = ""
            else:
                history = self._state.history
                number = history.index(shown) + 1 if shown in history else None  # somebody may have cleared it
                self._set_title(shown.prompt, sampling_words(shown.comparison.settings), number)
                if arrange:
                    columns = [Column(generation.asked) for generation in found.values()]
                    if self._state.hidden:  # one of earlier whose names are still to be revealed
                        columns = random.sample(columns, len(columns))
                        self._aliases = {column.label: f"Column {place + 1}" for place, column in enumerate(columns)}
                    self._arrange(columns)
            self._name()
            for label, card in self.cards.items():
                if label in found:
                    card.finish(found[label], found.get(BASE), self._state.marks)
                else:
                    card.clear()

    def _arrange(self, columns: Sequence[Column]) -> None:
        self._ticked = self._state.columns
        names, hidden = [row.name for row in self._state.rows], self._state.hidden
        kept = {column.label: self.cards.get(column.label) for column in columns}
        gone = [card for label, card in self.cards.items() if label not in kept]
        self.cards = {
            column.label: kept[column.label] or ColumnCard(column, hue_of(column, names), "…" if hidden else "")
            for column in columns
        }
        if hidden:  # nothing that could tell a name is on a card while it is moved
            for card in self.cards.values():
                card.name("…")
                card.clear()
        boxes = tuple(card.box for card in self.cards.values())
        if boxes != self.grid.children:
            self.grid.children = boxes
        self._name()
        for card in gone:
            close_all(card.box)

    def _name(self) -> None:
        """Give the cards their aliases, or take them away."""
        for label, card in self.cards.items():
            card.name(self._alias(label))

    def _alias(self, label: str) -> str:
        return self._aliases.get(label, "…") if self._state.hidden else ""

    def _set_title(self, prompt: str, settings: str = "", number: int | None = None) -> None:
        """`settings`: the sampling, in words. `number`: which of the history is shown, from 1; None while it is made."""
        place = f' data-shown="{number}"' if number else ""
        settings = f'<span class="alab-muted"> · {escape(settings)}</span>' if settings else ""
        self.title.value = (
            f'<div class="alab-asked-line"{place}><span class="alab-muted">Asked</span> '
            f'<span class="alab-asked-prompt">{escape(prompt)}</span>{settings}</div>'
        )


def hue_of(column: Column, names: Sequence[str]) -> int:
    """Which of the palette's hues marks a column: 0 for the base, then the rows' in their order; a column that has no row
    of its own takes its first adapter's."""
    known = [names.index(name) for name in (column.label, *column.names) if name in names]
    return 0 if column.is_base or not known else (known[0] - 1) % HUES + 1
