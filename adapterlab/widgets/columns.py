"""The columns: one card each, its text streaming in, with the proof of which adapter spoke."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import ipywidgets as w

from adapterlab.columns import Column
from adapterlab.widgets.compat import classes
from adapterlab.widgets.state import PanelState

if TYPE_CHECKING:
    from adapterlab.comparison import Comparison, Generation, TokenEvent

FLUSH_SECONDS = 0.1
HUES = 6
STATE_WORDS = {"": "not run yet", "waiting": "waiting", "writing": "writing…", "done": ""}
FINISH_WORDS = {
    "eos": "ended by itself",
    "length": "at the limit of new tokens",
    "stopped": "stopped by you",
}


class ColumnCard:
    """One column. Its three HTML widgets stay for its whole life; only what they say changes."""

    def __init__(self, column: Column, hue: int) -> None:
        self.label = column.label
        self._hue = hue
        self.head = classes(w.HTML(), "alab-card-head")
        self.body = classes(w.HTML(), "alab-card-body")
        self.foot = classes(w.HTML(), "alab-card-foot")
        self.box = classes(w.VBox([self.head, self.body, self.foot]), "alab-card", f"alab-hue-{hue}")
        self.clear()

    def clear(self, state: str = "") -> None:
        """Empty, as before a generation; `state`: "waiting" when one is about to fill it."""
        self._text, self._tokens, self._began = "", 0, 0.0
        self._show(state)

    def add(self, event: TokenEvent) -> None:
        """Take in one token without drawing."""
        self._began = self._began or time.perf_counter()
        self._text += event.text
        self._tokens = event.position + 1

    def draw(self) -> None:
        """Show what has come in so far."""
        seconds = time.perf_counter() - self._began
        rate = f" · {(self._tokens - 1) / seconds:.1f} tokens/s" if self._tokens > 2 and seconds > 0 else ""
        self._show("writing", f"{self._tokens} tokens{rate}")

    def finish(self, generation: Generation) -> None:
        """Show the result itself, which is what the kernel has."""
        self._text = generation.text
        self._show("done", result_html(generation))

    def _show(self, state: str, foot: str = "") -> None:
        self.head.value = (
            f'<div class="alab-card-title"><span class="alab-dot" aria-hidden="true"></span>'
            f'<h4>{escape(self.label)}</h4><span class="alab-muted">{STATE_WORDS[state]}</span></div>'
        )
        # An empty answer is an answer: say so, or the card looks unfinished.
        text = escape(self._text) or ('<span class="alab-muted">(empty)</span>' if state == "done" else "")
        self.body.value = (
            f'<div class="alab-text alab-{state or "empty"}" data-column="{escape(self.label)}">{text}</div>'
        )
        self.foot.layout.display = None if foot else "none"
        self.foot.value = f'<div class="alab-result">{foot}</div>' if foot else ""


class ColumnsView:
    """All cards, in the order of the rows. While `running`, the cards are those of the generation.

    `begin`, `token` and `finish` are called by the thread that generates; the rest follows the state.
    """

    def __init__(self, state: PanelState) -> None:
        self._state = state
        self._lock = threading.RLock()
        self._running = False
        self._dirty: set[str] = set()
        self._flushed = 0.0
        self._results: dict[str, Generation] = {}
        self.cards: dict[str, ColumnCard] = {}
        self.title = classes(w.HTML(), "alab-asked")
        self.grid = classes(w.Box(), "alab-columns")
        self.box = classes(w.VBox([self.title, self.grid]), "alab-section")
        state.observe(lambda _: self._follow(), ["rows", "compared", "multipliers"])
        self._follow()

    def begin(self, prompt: str, columns: Sequence[Column]) -> None:
        """Empty the cards of `columns` for a generation that starts now."""
        with self._lock:
            self._running, self._results, self._dirty = True, {}, set()
            self._set_title(prompt)
            self._arrange(columns)
            for card in self.cards.values():
                card.clear("waiting")

    def token(self, event: TokenEvent) -> None:
        """Take in a token; draw at most ten times a second, whatever the number of columns."""
        with self._lock:
            card = self.cards.get(event.column)
            if card is None:
                return
            card.add(event)
            self._dirty.add(event.column)
            now = time.monotonic()
            if now - self._flushed >= FLUSH_SECONDS or event.finish_reason:
                self._flush(now)

    def finish(self, comparison: Comparison | None) -> None:
        """Show the results; None when there are none, since an error came in between."""
        with self._lock:
            self._running = False
            self._results = {g.column: g for g in comparison.generations} if comparison else {}
            for label, card in self.cards.items():
                if label in self._results:
                    card.finish(self._results[label])
                else:
                    card.clear()
            self._follow()

    def _flush(self, now: float) -> None:
        for label in self._dirty:
            self.cards[label].draw()
        self._dirty.clear()
        self._flushed = now

    def _follow(self) -> None:
        """Between generations: a card for every ticked row, with its result if it has one."""
        with self._lock:
            if self._running:
                return
            before = set(self.cards)
            self._arrange(self._state.columns)
            for label in set(self.cards) - before:
                if label in self._results:
                    self.cards[label].finish(self._results[label])

    def _arrange(self, columns: Sequence[Column]) -> None:
        names = [row.name for row in self._state.rows]
        kept = {column.label: self.cards.get(column.label) for column in columns}
        gone = [card for label, card in self.cards.items() if label not in kept]
        self.cards = {
            column.label: kept[column.label] or ColumnCard(column, hue_of(column, names)) for column in columns
        }
        boxes = tuple(card.box for card in self.cards.values())
        if boxes != self.grid.children:
            self.grid.children = boxes
        for card in gone:
            for part in (card.head, card.body, card.foot, card.box):
                part.close()

    def _set_title(self, prompt: str) -> None:
        self.title.value = f'<div class="alab-asked-line"><span class="alab-muted">Asked</span> {escape(prompt)}</div>'


def hue_of(column: Column, names: Sequence[str]) -> int:
    """Which of the palette's hues marks a column: 0 for the base, then the adapters' in the order of the rows."""
    known = [names.index(name) for name in column.names if name in names]
    return 0 if column.is_base or not known else (known[0] - 1) % HUES + 1


def result_html(generation: Generation) -> str:
    """How it ended, how fast it was, and what proves which adapter spoke."""
    finish = FINISH_WORDS.get(generation.finish_reason, generation.finish_reason)
    acting = zip(generation.active_adapters, generation.multipliers, strict=True)
    active = " + ".join(f"{name} × {multiplier:g}" for name, multiplier in acting) or "none"
    rows = [
        ("Finish", f"{finish} ({generation.finish_reason})"),
        ("Speed", f"{generation.new_tokens} tokens, {generation.tokens_per_second:.1f} tokens/s"),
        ("Active adapters", active),
        ("Weights", generation.weights_digest[:12]),
        ("Logit shift", f"{generation.logit_shift:.3g}"),
    ]
    if generation.note:
        rows.append(("Note", generation.note))
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in rows)
    return f"<dl>{items}</dl>"
