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
from adapterlab.widgets.state import Incomplete, PanelState, short_share

METHODS = {"LoRA": "lora", "IA3": "ia3", "AdaLoRA": "adalora"}
KEEPS_TOO_MUCH = "The kept rank has to be below the starting rank: AdaLoRA starts with more ranks than it keeps."


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
        """Keywords of `lab.add_adapter` beside the method and the name: rank and modules only where given. `Incomplete` for
        an AdaLoRA that would have nothing to prune."""
        config: dict[str, Any] = {}
        if self._keeps_too_much():
            raise Incomplete(KEEPS_TOO_MUCH)
        if self.method.value == "adalora":
            config = {"init_r": self.r.value, "target_r": self.target_r.value}
        elif self.method.value == "lora":
            config = {"r": self.r.value}
        if self.targets.value:
            config["target_modules"] = list(self.targets.value)
            if self.method.value == "ia3" and not self._state.knows_feedforward:
                config["feedforward_modules"] = []  # PEFT asks for them where it has none of its own
        return config

    def _keeps_too_much(self) -> bool:
        return self.method.value == "adalora" and self.target_r.value >= self.r.value

    def _render(self) -> None:
        with self._state.lock:
            self._draw()

    def _draw(self) -> None:
        method = self.method.value
        self.r.min = 2 if method == "adalora" else 1
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
        if self._keeps_too_much():
            return KEEPS_TOO_MUCH
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


def knows_feedforward(model: Any) -> bool:
    """Whether PEFT has by itself which modules of this model IA3 takes for feed-forward."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

    return getattr(model.config, "model_type", "") in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING


def next_name(name: str, taken: Collection[str], before: Collection[str]) -> str:
    """The name to propose: another one if an adapter has just been made under this."""
    if name not in set(taken) - set(before):
        return name
    stem = re.sub(r"-\d+$", "", name)
    return next(other for i in itertools.count(2) if (other := f"{stem}-{i}") not in taken)
