"""Loading an adapter from a folder or the Hub, adding a new one, blending several, saving one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from adapterlab.pagetext import escape, readable
from adapterlab.widgets.compat import classes, close_all, label_text, on_enter, set_tooltip
from adapterlab.widgets.fold import Fold
from adapterlab.widgets.new_adapter import NewAdapter, next_name
from adapterlab.widgets.state import PanelState, Row

EXAMPLE_ID = "ybelkada/opt-350m-lora"


class LoadForm:
    """Calls `on_load(asked)`, `on_check(asked)` and `on_find()`; what the Hub has comes back in `state.found`."""

    def __init__(
        self,
        state: PanelState,
        on_load: Callable[[Callable[[], tuple[str, str | None]]], object],
        on_check: Callable[[Callable[[], tuple[str, str | None]]], object],
        on_find: Callable[[], object],
    ) -> None:
        self._state = state
        self.source = classes(
            _text(description="Folder or Hub id", placeholder=f"for example {EXAMPLE_ID}"), "alab-wide"
        )
        self.name = _text(description="Name", placeholder="from the folder or id")
        self.button = w.Button(description="Load")
        set_tooltip(self.button, "lab.load_adapter: read it, check it against this base, and hang it on")
        self.check = classes(w.Button(description="Check first"), "alab-quiet")
        set_tooltip(self.check, "lab.check_adapter: would it load here? Reads the config and the file's header only")
        self.find = classes(w.Button(description="Find on the Hub"), "alab-quiet")
        set_tooltip(self.find, "lab.find_adapters: the Hub's adapters for this base, most downloaded first")
        self.found = classes(w.Dropdown(options=[], description="Found on the Hub"), "alab-wide")
        controls = [self.source, self.name, self.button, self.check, self.find, self.found]
        self.fold = _form("Load an adapter", "gets a row and a column; lab.model stays as it is", controls)
        self.button.on_click(lambda _: on_load(self.asked))
        for box in (self.source, self.name):
            on_enter(box, lambda: on_load(self.asked))
        self.check.on_click(lambda _: on_check(self.asked))
        self.find.on_click(lambda _: on_find())
        self.found.observe(self._choose, "value")
        state.observe(lambda _: self._render(), ["busy", "closed", "found"])
        self._render()

    def asked(self) -> tuple[str, str | None]:
        """The source, and the name or None."""
        return self.source.value.strip(), self.name.value.strip() or None

    def _choose(self, change: dict[str, Any]) -> None:
        if change["new"]:
            self.source.value = change["new"]

    def _render(self) -> None:
        options = [("choose one", ""), *((readable(text), repo_id) for repo_id, text in self._state.found)]
        if list(self.found.options) != options:
            self.found.options = options
        self.found.layout.display = None if self._state.found else "none"
        for button in (self.button, self.check, self.find):
            _lock(button, self._state)


class AddForm:
    """Calls `on_add(asked)`, which gives method, name and a config that has rank and modules only where given."""

    def __init__(
        self, state: PanelState, on_add: Callable[[Callable[[], tuple[str, str, dict[str, Any]]]], object]
    ) -> None:
        self._state, self._taken = state, set(state.adapter_names)
        self.new = NewAdapter(state)
        self.name = _text(value=next_name("default", self._taken, ()), description="Name")
        self.button = w.Button(description="Add")
        set_tooltip(self.button, "lab.add_adapter: a new adapter, untrained, so that it changes nothing yet")
        method, *shape = self.new.controls
        controls = [method, self.name, *shape, self.button]
        self.fold = _form("Add a new adapter", "untrained: it changes nothing until it is trained", controls)
        self.fold.body.children = (*self.fold.body.children, self.new.size)
        self.button.on_click(lambda _: on_add(self.asked))
        on_enter(self.name, lambda: on_add(self.asked))
        state.observe(lambda _: _lock(self.button, state), ["busy", "closed"])
        state.observe(lambda _: self._propose(), "rows")

    def _propose(self) -> None:
        with self._state.lock:
            names = self._state.adapter_names
            self.name.value = next_name(self.name.value, names, self._taken)
            self._taken = set(names)

    def asked(self) -> tuple[str, str, dict[str, Any]]:
        """Method, name, config."""
        return self.new.method.value, self.name.value.strip(), self.new.config()


class BlendForm:
    """Calls `on_blend(asked)`, which gives adapter → multiplier of those above 0. What can't blend says why."""

    def __init__(self, state: PanelState, on_blend: Callable[[Callable[[], dict[str, float]]], object]) -> None:
        self._state = state
        self.numbers: dict[str, w.BoundedFloatText] = {}
        self.grid = classes(w.HBox(), "alab-form")
        self.button = w.Button(description="Add blend")
        self.fold = _form("Blend adapters", "a column in which several act at once", [self.button])
        heading, line = self.fold.body.children
        self.fold.body.children = (heading, self.grid, line)
        self.button.on_click(lambda _: on_blend(self.asked))
        state.observe(lambda _: self._render(), ["rows", "busy", "closed"])
        self.fold.button.observe(lambda _: self._render(), "value")
        self._render()

    def asked(self) -> dict[str, float]:
        with self._state.lock:
            return {name: number.value for name, number in self.numbers.items() if number.value and not number.disabled}

    def _render(self) -> None:
        with self._state.lock:
            self._draw()

    def _draw(self) -> None:
        rows = {row.name: row for row in self._state.rows if row.is_adapter}
        names = list(rows)
        if names != list(self.numbers):
            old = self.numbers
            self.numbers = {name: old.get(name) or self._number(name) for name in names}
            self.grid.children = tuple(self.numbers.values())
            for name in old.keys() - self.numbers.keys():
                close_all(old[name])
        for name, row in rows.items():
            self._draw_number(self.numbers[name], row)
        enough = len(names) > 1
        self.fold.button.layout.display = None if enough else "none"
        self.fold.body.layout.display = None if enough and self.fold.open else "none"
        _lock(self.button, self._state)
        few = sum(not row.fixed for row in rows.values()) < 2
        self.button.disabled = self.button.disabled or few
        does = "A row and a column in which these adapters act together, each at its multiplier"
        set_tooltip(self.button, "A blend takes two adapters that can be in one" if few else does)

    def _draw_number(self, number: w.BoundedFloatText, row: Row) -> None:
        was = number.disabled
        number.disabled = bool(row.fixed) or self._state.closed
        meaning = f"How strongly {row.name} acts in the blend; 0 leaves it out"
        set_tooltip(number, f"{row.name} can't be in a blend: {row.fixed}" if row.fixed else meaning)
        if row.fixed:
            number.value = 0.0
        elif was and not self._state.closed:  # another adapter has the name now
            number.value = 0.5

    @staticmethod
    def _number(name: str) -> w.BoundedFloatText:
        number = w.BoundedFloatText(value=0.5, min=0.0, max=2.0, step=0.05)
        number.description = label_text(f"{name} ×")
        return classes(number, "alab-part")


class SaveForm:
    """Opened for one adapter by `open_for(name)`. Calls `on_save(asked)`, which gives the adapter and the folder."""

    def __init__(self, state: PanelState, on_save: Callable[[Callable[[], tuple[str, str]]], object]) -> None:
        self._state, self.name = state, ""
        self.heading = w.HTML()
        self.folder = classes(_text(description="Folder", placeholder="for example adapters/pirate"), "alab-wide")
        self.button = w.Button(description="Save")
        self.cancel = classes(w.Button(description="Close"), "alab-quiet")
        set_tooltip(self.cancel, "Close this form")
        controls = classes(w.HBox([self.folder, self.button, self.cancel]), "alab-form")
        self.box = classes(w.VBox([self.heading, controls]), "alab-fold-body", "alab-inset")
        self.button.on_click(lambda _: on_save(self.asked))
        on_enter(self.folder, lambda: on_save(self.asked))
        self.cancel.on_click(lambda _: self.open_for(""))
        state.observe(lambda _: self._render(), ["rows", "busy", "closed"])
        self._render()

    def open_for(self, name: str) -> None:
        """Ask where to save this adapter; "" closes the form."""
        self.name = name
        self.folder.value = f"adapters/{name}" if name else ""
        self._render()

    def asked(self) -> tuple[str, str]:
        """The adapter, and the folder."""
        return self.name, self.folder.value.strip()

    def _render(self) -> None:
        self.box.layout.display = None if self.name in self._state.adapter_names else "none"
        self.heading.value = (
            f'<div class="alab-form-title">Save {escape(self.name)}'
            '<span class="alab-muted"> in PEFT\'s own format, weights and config</span></div>'
        )
        _lock(self.button, self._state)
        why = next((row.obstacle("save") for row in self._state.rows if row.name == self.name), "")
        self.button.disabled = self.button.disabled or bool(why)
        set_tooltip(self.button, why or "lab.save_adapter: weights and config in PEFT's own format")


class LabForm:
    """Calls `on_save(asked)`, which gives the folder for the whole lab."""

    def __init__(self, state: PanelState, on_save: Callable[[Callable[[], str]], object]) -> None:
        self._state = state
        self.folder = classes(_text(description="Folder", placeholder="for example my-lab"), "alab-wide")
        self.button = w.Button(description="Save")
        self.fold = _form(
            "Save the lab",
            "adapters, trainings, blends and every comparison, in one folder",
            [self.folder, self.button],
        )
        self.button.on_click(lambda _: on_save(self.asked))
        on_enter(self.folder, lambda: on_save(self.asked))
        set_tooltip(self.button, "lab.save: everything but the base's weights; AdapterLab(folder) opens it again")
        state.observe(lambda _: _lock(self.button, state), ["busy", "closed"])

    def asked(self) -> str:
        return self.folder.value.strip()


def _form(title: str, hint: str, controls: list[Any]) -> Fold:
    heading = w.HTML(f'<div class="alab-form-title">{title}<span class="alab-muted"> {hint}</span></div>')
    fold = Fold(title, [heading, classes(w.HBox(controls), "alab-form")])
    classes(fold.body, "alab-inset")
    return fold


def _text(**traits: Any) -> w.Text:
    # Sent when the focus leaves it: a click on the button then always comes after the last letter.
    return w.Text(continuous_update=False, **traits)


def _lock(button: w.Button, state: PanelState) -> None:
    button.disabled = bool(state.busy) or state.closed
