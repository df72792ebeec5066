"""What a new adapter is to be: its method, rank and target modules, and what it would weigh. For the forms that make one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from typing import Any

import ipywidgets as w

from adapterlab.inspection import count_new_parameters, people_bytes, people_count
from adapterlab.pagetext import escape
from adapterlab.widgets.compat import classes, set_tooltip
from adapterlab.widgets.state import PanelState, short_share

METHODS = {"LoRA": "lora", "IA3": "ia3", "AdaLoRA": "adalora"}


class NewAdapter:
    """`controls` to put into a form, and `size`, the line that says what it would weigh."""

    def __init__(self, state: PanelState) -> None:
        self._state = state
        self.method = classes(w.Dropdown(options=list(METHODS.items()), description="Method"), "alab-short")
        self.r = classes(w.BoundedIntText(value=8, min=1, max=4096, description="Rank"), "alab-short")
        self.target_r = classes(w.BoundedIntText(value=4, min=1, max=4096, description="Kept rank"), "alab-short")
        set_tooltip(self.target_r, "AdaLoRA prunes to this many ranks per layer on average, and chooses where")
        self.targets = classes(w.SelectMultiple(rows=4, description="Target modules"), "alab-targets")
        set_tooltip(self.targets, "This model's linear layers. None picked: PEFT's own choice for this model")
        self.size = classes(w.HTML(), "alab-muted")
        self.controls = [self.method, self.r, self.target_r, self.targets]
        self._half = self.target_r.value
        self._hidden = False
        for control in self.controls:
            control.observe(lambda _: self._render(), "value")
        state.observe(lambda _: self._render(), ["targets", "rows"])
        self._render()

    def show(self, shown: bool) -> None:
        """Show all of it, or nothing: for a form that does not always make an adapter."""
        self._hidden = not shown
        self._render()

    def config(self) -> dict[str, Any]:
        """Keywords of `lab.add_adapter` beside the method and the name: rank and modules only where given."""
        config: dict[str, Any] = {}
        if self.method.value == "adalora":
            config = {"init_r": self.r.value, "target_r": self.target_r.value}
        elif self.method.value == "lora":
            config = {"r": self.r.value}
        if self.targets.value:
            config["target_modules"] = list(self.targets.value)
        return config

    def _render(self) -> None:
        with self._state.lock:
            self._draw()

    def _draw(self) -> None:
        method = self.method.value
        half = max(1, self.r.value // 2)
        if self.target_r.value == self._half:  # nobody has chosen another
            self._half = self.target_r.value = half
        self.r.description = "Starting rank" if method == "adalora" else "Rank"
        names = tuple(self._state.targets)
        if self.targets.options != names:
            self.targets.options = names
        shown = {self.r: method != "ia3", self.target_r: method == "adalora"}
        for control in (*self.controls, self.size):
            control.layout.display = None if shown.get(control, True) and not self._hidden else "none"
        self.size.value = escape(self._size())

    def _size(self) -> str:
        picked, method = self.targets.value, self.method.value
        if method == "adalora" and self.target_r.value >= self.r.value:
            return "The kept rank has to be below the starting rank: AdaLoRA starts with more ranks than it keeps."
        if not picked:
            return "Pick target modules to see the size; without, PEFT takes those it knows for this model."
        rank = "" if method == "ia3" else f"r={self.r.value} on "
        shapes = [shape for name in picked for shape in self._state.targets[name]]
        count = count_new_parameters(method, self.r.value, shapes)
        base = next((row.parameters for row in self._state.rows if row.is_base), 0)
        share = f", {short_share(count / base)} of base" if base else ""
        return (
            f"{rank}{', '.join(picked)}: {people_count(count)} parameters in {len(shapes)} layers, "
            f"{people_bytes(4 * count)}{share}"
        )


def next_name(name: str, taken: Collection[str], before: Collection[str]) -> str:
    """The name to propose: another one if an adapter has just been made under this."""
    if name not in set(taken) - set(before):
        return name
    stem = re.sub(r"-\d+$", "", name)
    return next(other for i in itertools.count(2) if (other := f"{stem}-{i}") not in taken)
