"""A button that folds a part of the panel away and says in its own words what is inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as w

from adapterlab.widgets.compat import classes, label_text


class Fold:
    """`button` shows or hides `body`; they are apart so that several buttons can stand in one line.

    `summary(text)` changes what the button says, for settings that should be readable while folded.
    """

    def __init__(self, title: str, children: Sequence[Any], *, open: bool = False) -> None:
        self._title = title
        self.button = classes(w.ToggleButton(value=open), "alab-fold")
        self.body = classes(w.VBox(list(children)), "alab-fold-body")
        self.button.observe(lambda _: self._render(), "value")
        self._render()

    def summary(self, title: str) -> None:
        self._title = title
        self._render()

    @property
    def open(self) -> bool:
        return bool(self.button.value)

    @open.setter
    def open(self, value: bool) -> None:
        self.button.value = value

    def _render(self) -> None:
        self.button.description = label_text(("▾ " if self.open else "▸ ") + self._title)
        self.body.layout.display = None if self.open else "none"
