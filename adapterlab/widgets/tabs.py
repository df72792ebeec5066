"""The frame: one body at a time under a line of names, so that the first screen stays calm and all is within reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as w

from adapterlab.widgets.compat import classes


class Tabs:
    """`bodies`: name → the widgets under it; the first is open. `open` is the name of the one that is.

    Made of buttons, which ipywidgets 7.7 and 8.1 draw alike and a keyboard reaches. Bodies stay in the page while hidden,
    so nothing in them is lost.
    """

    def __init__(self, bodies: Mapping[str, Sequence[Any]]) -> None:
        self.buttons = classes(w.ToggleButtons(options=list(bodies)), "alab-tabs")
        self.bodies = {name: classes(w.VBox(list(parts)), "alab-tab") for name, parts in bodies.items()}
        self.box = classes(w.VBox([self.buttons, *self.bodies.values()]), "alab-section")
        self.buttons.observe(lambda _: self._render(), "value")
        self._render()

    @property
    def open(self) -> str:
        return str(self.buttons.value)

    @open.setter
    def open(self, name: str) -> None:
        self.buttons.value = name

    def _render(self) -> None:
        for name, body in self.bodies.items():
            body.layout.display = None if name == self.open else "none"
