"""What can be done with the columns: marks, names hidden for an honest look, earlier ones, the code, files to keep."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import ipywidgets as w
from traitlets import link

from adapterlab.pagetext import escape, readable
from adapterlab.render import comparison_page
from adapterlab.widgets.compat import classes, set_tooltip
from adapterlab.widgets.fold import Fold
from adapterlab.widgets.state import PanelState, Shown
from adapterlab.widgets.text import MARKS

MOST_HISTORY = 50  # entries of the list; all are in lab.history


class ResultsBar:
    """Stands above the columns. `on_marks(marks)` is called when other marks are chosen; the rest is in the state."""

    def __init__(self, state: PanelState, on_marks: Callable[[str], object]) -> None:
        self._state, self._on_marks, self._rendering = state, on_marks, False
        self.marks = classes(w.Dropdown(options=list(MARKS.items()), description="Marks"), "alab-short")
        set_tooltip(self.marks, "Words: what base does not say. Likelihood: how much the adapter changed each token")
        self.history = classes(w.Dropdown(options=[("none yet", -1)], description="History"), "alab-wide")
        set_tooltip(self.history, "Show an earlier comparison again, the panel's or one from Python")
        self.blind = w.ToggleButton(description="Blind test")
        set_tooltip(self.blind, "From the next Generate on, shuffle the columns and hide their names until revealed")
        self.reveal = classes(w.Button(description="Reveal names"), "alab-main")
        self.code = classes(w.HTML(), "alab-code")
        self.files = classes(w.HTML(), "alab-files")
        self.code_fold = Fold("Show code", [self.code])
        self.files_fold = Fold("Download", [self.files])
        folds = [self.code_fold, self.files_fold]
        controls = [self.marks, self.history, self.blind, self.reveal, *(fold.button for fold in folds)]
        self.bar = classes(w.HBox(controls), "alab-form")
        self.box = classes(w.VBox([self.bar, *(fold.body for fold in folds)]), "alab-results")
        link((state, "blind"), (self.blind, "value"))
        self.reveal.on_click(lambda _: state.reveal())
        self.marks.observe(self._choose_marks, "value")
        self.history.observe(self._choose, "value")
        for fold in folds:
            fold.button.observe(lambda _: self._render(), "value")
        names = ["history", "shown", "marks", "blind", "hidden", "code", "busy", "closed"]
        state.observe(lambda _: self._render(), names)
        self._render()

    def _choose_marks(self, change: dict[str, Any]) -> None:
        with self._state.lock:  # while another thread draws, a change of the list is not the user's
            chosen = not self._rendering and change["new"] != self._state.marks
        if chosen:
            self._on_marks(change["new"])
            self._render()

    def _choose(self, change: dict[str, Any]) -> None:
        with self._state.lock:
            if not self._rendering and 0 <= change["new"] < len(self._state.history):
                self._state.show(self._state.history[change["new"]])

    def _render(self) -> None:
        with self._state.lock:
            self._draw()

    def _draw(self) -> None:
        state, running = self._state, bool(self._state.busy)
        self._rendering = True
        try:
            first = max(0, len(state.history) - MOST_HISTORY)
            entries = [(i, s) for i, s in enumerate(state.history) if i >= first or s is state.shown]
            options = [(_title(i, shown), i) for i, shown in reversed(entries)] or [("none yet", -1)]
            if tuple(self.history.options) != tuple(options):
                self.history.options = options
            index = next((i for i, shown in entries if shown is state.shown), options[0][1])
            self.history.value = index
            self.marks.value = state.marks
        finally:
            self._rendering = False
        self.history.disabled = running or state.closed or not state.history
        self.marks.disabled = running or state.closed
        self.blind.disabled = running or state.closed
        self.blind.description = "Blind test: on" if state.blind else "Blind test"
        self.reveal.layout.display = None if state.hidden and not running else "none"
        self.code_fold.button.layout.display = None if state.code else "none"
        self.code.value = f"<pre>{escape(state.code)}</pre>" if state.code and self.code_fold.open else ""
        can_keep = state.shown is not None and not state.hidden
        self.files_fold.button.layout.display = None if can_keep else "none"
        self.files_fold.body.layout.display = None if can_keep and self.files_fold.open else "none"
        self.files.value = files_html(state.shown) if can_keep and self.files_fold.open and state.shown else ""


def _title(number: int, shown: Shown) -> str:
    """A line of the list: its place in the history, the prompt's beginning, the columns."""
    prompt = " ".join(shown.prompt.split())
    labels = ", ".join(shown.generations)
    short = [f"{text[:40]}{'…' if len(text) > 40 else ''}" for text in (prompt, labels)]
    return readable(" · ".join([str(number + 1), *short]))


def files_html(shown: Shown) -> str:
    """Links that hold the whole comparison as CSV, JSON and HTML, so that they work wherever the browser is."""
    comparison = shown.comparison
    parts = [
        ("CSV", "text/csv", comparison.to_frame().to_csv(index=False)),
        ("JSON", "application/json", comparison._json()),
        ("HTML", "text/html", comparison_page(comparison)),
    ]
    links = "".join(
        f'<a download="comparison.{kind.lower()}" href="data:{mime};charset=utf-8;base64,'
        f'{base64.b64encode(content.encode(errors="backslashreplace")).decode()}">{kind}</a>'
        for kind, mime, content in parts
    )
    return f'<div class="alab-links"><span class="alab-muted">Download this comparison as</span>{links}</div>'
