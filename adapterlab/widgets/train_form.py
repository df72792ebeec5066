"""What `lab.train` is asked for: which adapter learns, from what, how fast and how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ipywidgets as w

from adapterlab.inspection import people_count
from adapterlab.pagetext import escape
from adapterlab.widgets.code import call_code
from adapterlab.widgets.compat import classes, on_enter, set_tooltip
from adapterlab.widgets.data_form import DataForm, Examples
from adapterlab.widgets.new_adapter import NewAdapter, next_name
from adapterlab.widgets.state import Incomplete, PanelState

NEW = "a new one"
STEPS = 40  # taught the demo model a style


@dataclass(frozen=True)
class TrainingWish:
    """The arguments of `lab.train`. method: PEFT's type of the adapter, which `keywords` have only for a new one."""

    name: str
    method: str
    examples: Examples
    keywords: dict[str, Any]

    @property
    def share(self) -> float | None:
        """The share of the examples to hold out."""
        return self.keywords.get("eval_dataset")

    @property
    def code(self) -> str:
        """The Python that does the same."""
        call = call_code("lab.train", self.name, self.examples.literal, **self.keywords)
        return f"{self.examples.code}\n\n{call}" if self.examples.code else call


class TrainForm:
    """Calls `on_train(asked)`, `on_check(asked)`, which both give a `TrainingWish`, and `on_stop()`."""

    def __init__(
        self,
        state: PanelState,
        on_train: Callable[[Callable[[], TrainingWish]], object],
        on_check: Callable[[Callable[[], tuple[Examples, float | None]]], object],
        on_stop: Callable[[], object],
    ) -> None:
        self._state, self._taken = state, set[str]()
        self.data = DataForm(state, lambda: on_check(self.data_asked))
        self.adapter = classes(w.Dropdown(options=[(NEW, "")], description="Adapter"), "alab-part")
        set_tooltip(self.adapter, "A new one, or one that goes on learning from where it is")
        self.name = classes(w.Text(value="mine", description="Name", continuous_update=False), "alab-part")
        self.new = NewAdapter(state)
        self.known = classes(w.HTML(), "alab-muted")
        self.learning_rate = w.BoundedFloatText(min=0.0, max=100.0, step=None, description="Learning rate")
        set_tooltip(self.learning_rate, "How far each step goes: the largest number at which the loss still falls")
        self.steps = classes(w.BoundedIntText(value=STEPS, min=1, max=10_000_000, description="Steps"), "alab-short")
        self.share = classes(
            w.BoundedFloatText(min=0.0, max=0.9, step=0.05, description="Held-out share"), "alab-short"
        )
        set_tooltip(self.share, "A share of the examples that is not learned but measured on; 0 is none")
        self.train = classes(w.Button(description="Start training", button_style="primary"), "alab-main")
        self.stop = classes(w.Button(description="Stop"), "alab-stop")
        set_tooltip(self.stop, "End the training after the step at work; what was learned stays")
        choices = classes(w.HBox([self.adapter, self.name, *self.new.controls]), "alab-form")
        who = classes(w.VBox([choices, self.new.size, self.known]), "alab-group")
        how = classes(w.HBox([self.learning_rate, self.steps, self.share, self.train, self.stop]), "alab-form")
        self.box = classes(w.VBox([self.data.box, who, how]), "alab-inset", "alab-train")
        self._usual = self.learning_rate.value
        self.train.on_click(lambda _: on_train(self.asked))
        on_enter(self.name, lambda: on_train(self.asked))
        self.stop.on_click(lambda _: on_stop())
        self.share.observe(lambda _: self.data.forget(), "value")  # how many are held out was in what was read
        for control in (self.adapter, self.new.method):
            control.observe(lambda _: self._render(), "value")
        state.observe(lambda _: self._render(), ["rows", "busy", "stoppable", "elsewhere", "closed"])
        self._render()

    def asked(self) -> TrainingWish:
        """What is in the form now; `Incomplete` where something is missing."""
        with self._state.lock:
            chosen, method = self.adapter.value, self.new.method.value
            name = chosen or self.name.value.strip()
            keywords: dict[str, Any] = {} if chosen else {"method": method, **self.new.config()}
            if not name:
                raise Incomplete("What is the adapter to be called? Give a name, such as mine.")
            why = self._obstacle(chosen)
            if why:
                raise Incomplete(f"{name!r} can't be trained: {why}")
            if not chosen and name in self._state.adapter_names:
                raise Incomplete(f"{name!r} is there already: choose it under Adapter to train it on, or another name.")
            method = self._method(chosen) if chosen else method.upper()
        examples, share = self.data_asked()
        keywords |= {"max_steps": self.steps.value, "learning_rate": self.learning_rate.value}
        return TrainingWish(name, method, examples, keywords if share is None else {**keywords, "eval_dataset": share})

    def data_asked(self) -> tuple[Examples, float | None]:
        """The examples, and the share of them to hold out, None for none."""
        return self.data.asked(), self.share.value or None

    def _method(self, name: str) -> str:
        return next((row.method for row in self._state.rows if row.name == name), "")

    def _obstacle(self, name: str) -> str:
        return next((row.obstacle("train") for row in self._state.rows if row.name == name and name), "")

    def _render(self) -> None:
        with self._state.lock:
            self._draw()

    def _draw(self) -> None:
        state, names = self._state, self._state.adapter_names
        options = [(NEW, ""), *((name, name) for name in names)]
        if list(self.adapter.options) != options:
            chosen = self.adapter.value
            self.adapter.options = options
            self.adapter.value = chosen if chosen in names else ""
        self.name.value = next_name(self.name.value, names, self._taken)
        self._taken = set(names)
        chosen = self.adapter.value
        self.new.show(not chosen)
        self.name.layout.display = "none" if chosen else None
        self.known.layout.display = None if chosen else "none"
        row = next((row for row in state.rows if row.name == chosen and chosen), None)
        why = self._obstacle(chosen)
        if row is not None:
            goes = f"it can't be trained: {why}" if why else "it goes on from where it is."
            self.known.value = escape(f"{row.kind}, {people_count(row.parameters)} parameters, {row.status}: {goes}")
        self._draw_rate(self._method(chosen) if chosen else self.new.method.value)
        running = bool(state.busy)
        self.train.disabled = running or state.closed or bool(why)
        set_tooltip(self.train, why or "lab.train: base and other adapters keep every bit")
        self.train.description = "Training…" if state.busy.startswith("Training") else "Start training"
        self.stop.disabled = state.closed or not ((running and state.stoppable) or state.elsewhere)

    def _draw_rate(self, method: str) -> None:
        usual = usual_learning_rate(method)
        if self.learning_rate.value == self._usual:  # nobody has chosen another
            self.learning_rate.value = usual
        self._usual = usual


def usual_learning_rate(method: str) -> float:
    """What `lab.train` takes where nothing is said."""
    from adapterlab.training import DEFAULT_LEARNING_RATE, LEARNING_RATES

    return LEARNING_RATES.get(method.upper(), DEFAULT_LEARNING_RATE)
