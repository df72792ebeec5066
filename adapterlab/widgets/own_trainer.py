"""Training with a Trainer of one's own, in a cell: which adapter learns, and the few lines to paste."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from adapterlab.pagetext import escape
from adapterlab.widgets.compat import classes, set_tooltip
from adapterlab.widgets.fold import Fold
from adapterlab.widgets.state import PanelState

NOBODY = "none"


class OwnTrainer:
    """Folded. Calls `on_trainable(name_or_None)` when another adapter is chosen; what is chosen comes from
    `state.trainable`."""

    def __init__(self, state: PanelState, on_trainable: Callable[[str | None], object]) -> None:
        self._state, self._on_trainable, self._rendering = state, on_trainable, False
        self.name = classes(w.Dropdown(options=[(NOBODY, "")], description="Trainable adapter"), "alab-wide")
        set_tooltip(self.name, "lab.set_trainable: its parameters require gradients, and no others do")
        self.code = classes(w.HTML(), "alab-code")
        self.fold = Fold("With a Trainer of your own", [classes(w.HBox([self.name]), "alab-form"), self.code])
        self.name.observe(self._choose, "value")
        state.observe(lambda _: self._render(), ["rows", "trainable", "busy", "closed"])
        self._render()

    def _choose(self, change: dict[str, Any]) -> None:
        with self._state.lock:
            chosen = not self._rendering and change["new"] != self._state.trainable
        if chosen:
            self._on_trainable(change["new"] or None)
            self._render()  # until the lab has done it

    def _render(self) -> None:
        with self._state.lock:
            self._draw()

    def _draw(self) -> None:
        state = self._state
        options = [(NOBODY, ""), *((name, name) for name in state.adapter_names)]
        self._rendering = True
        try:
            if tuple(self.name.options) != tuple(options):
                self.name.options = options
            self.name.value = state.trainable if state.trainable in state.adapter_names else ""
        finally:
            self._rendering = False
        self.name.disabled = bool(state.busy) or state.closed
        self.code.value = f"<pre>{escape(trainer_code(state.trainable))}</pre>"


def trainer_code(name: str) -> str:
    """Lines to paste that train adapter `name`; without one, what to do first."""
    if not name:
        return "# Choose an adapter above, or add a new one: a new adapter is the trainable one."
    return "\n".join(
        [
            "# The lab's Trainer, to steer yourself",
            f"trainer = lab.trainer({name!r}, [('A prompt', 'its answer')], max_steps=40)",
            "trainer.train()",
            "",
            "# Or any other, on the trainable adapter",
            "from transformers import Trainer, TrainingArguments",
            "",
            f"lab.set_trainable({name!r})",
            'arguments = TrainingArguments("training", max_steps=40, learning_rate=2e-4, report_to="none")',
            f"with lab.using({name!r}) as model:  # the panel waits meanwhile",
            "    Trainer(model=model, args=arguments, train_dataset=...).train()",
        ]
    )
