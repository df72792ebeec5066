"""The Inspect tab: one picture at a time of what base and adapters are, drawn when it is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from adapterlab.pagetext import escape
from adapterlab.widgets.compat import classes, needs_foreground, set_tooltip, soon
from adapterlab.widgets.pictures import OF_ONE
from adapterlab.widgets.state import PanelState, View

ABOUT = {
    "Sizes": "parameters and bytes of base and adapters",
    "Memory": "what is resident now, and the peak of the last operation",
    "Ranks": "where AdaLoRA has put its ranks",
    "Weights": "how much an adapter changes each weight",
    "Abilities": "what can be done with each adapter here and now",
}
ALONE = "alone"


class InspectView:
    """`on_look(begin)` calls `begin()` and draws `state.view`; what comes of it is `state.picture`, HTML.

    Nothing is drawn while the tab is closed (see `show`) or while the panel works; then it is drawn later.
    """

    def __init__(self, state: PanelState, on_look: Callable[[Callable[[], object]], object]) -> None:
        self._state, self._on_look = state, on_look
        self._open, self._stale, self._rendering = False, True, False
        self.what = classes(w.ToggleButtons(options=list(ABOUT)), "alab-views")
        self.adapter = classes(w.Dropdown(options=[], description="Adapter"), "alab-short")
        self.other = classes(w.Dropdown(options=[ALONE], description="Against"), "alab-short")
        set_tooltip(self.other, "Another adapter: how far the two work in the same directions of each weight")
        self.about = classes(w.HTML(), "alab-muted")
        self.picture = classes(w.HTML(), "alab-picture")
        bar = classes(w.HBox([self.what, self.adapter, self.other]), "alab-form")
        self.box = classes(w.VBox([bar, self.about, self.picture]), "alab-section")
        for control in (self.what, self.adapter, self.other):
            control.observe(self._choose, "value")
        state.observe(lambda _: self._list(), "view")
        state.observe(lambda _: self._render(), ["view", "picture", "closed"])
        state.observe(lambda _: self._list(), "rows")
        state.observe(lambda _: self.refresh(stale=True), "view")
        state.observe(lambda _: self.refresh(), ["busy", "elsewhere"])
        self._list()
        self._render()

    def show(self, is_open: bool) -> None:
        """The tab is opened or closed."""
        self._open = is_open
        self.refresh(stale=self._state.view.what == "Memory")  # which changes with whatever the notebook does

    def note(self, kind: str) -> None:
        """The lab tells of a change of this kind: what is drawn may not be true any more."""
        what = self._state.view.what
        touched = {"adapters": True, "history": True, "state": what not in OF_ONE, "memory": what == "Memory"}
        with self._state.lock:
            self._stale = self._stale or touched.get(kind, False)
        later = needs_foreground() and soon(self.refresh)  # once for a cell, and not for each change
        if not later:
            self.refresh()

    def refresh(self, *, stale: bool = False) -> None:
        """Draw anew if what is shown is no longer true. stale: it is not."""
        state = self._state
        with state.lock:
            self._stale = self._stale or stale
            waits = state.elsewhere and state.view.what == "Weights"  # they are read while nobody changes them
            due = self._stale and self._open and not (state.busy or state.closed or waits)
        if due:
            self._on_look(self._begin)

    def _begin(self) -> None:
        with self._state.lock:
            self._stale = False  # whatever has changed until now is in this one picture

    def _choose(self, _: Any) -> None:
        with self._state.lock:
            if not self._rendering:
                other = self.other.value if self.other.value != ALONE else ""
                self._state.view = View(self.what.value, self.adapter.value or "", other or "")

    def _list(self) -> None:
        """The adapters that can be chosen, and the choice that is left of what was chosen."""
        state = self._state
        with state.lock:
            self._rendering = True
            try:
                view = state.view
                names = [row.name for row in state.rows if row.is_adapter]
                if view.what == "Ranks":
                    names = [row.name for row in state.rows if row.method == "ADALORA"]
                name = view.adapter if view.adapter in names else next(iter(names), None)
                self.adapter.options, self.adapter.value = names, name
                others = [ALONE, *(other for other in names if other != name)]
                self.other.options, self.other.value = others, view.other if view.other in others else ALONE
            finally:
                self._rendering = False
        self._choose(None)

    def _render(self) -> None:
        state = self._state
        with state.lock:
            view = state.view
            self.about.value = escape(ABOUT[view.what])
            self.adapter.layout.display = None if view.what in OF_ONE else "none"
            self.other.layout.display = None if view.what == "Weights" and len(self.other.options) > 1 else "none"
            for control in (self.what, self.adapter, self.other):
                control.disabled = state.closed
            self.picture.value = state.picture
