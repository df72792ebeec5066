"""The list of adapters: one row each, with everything that can be done to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from adapterlab.inspection import people_bytes, people_count
from adapterlab.pagetext import escape
from adapterlab.widgets.compat import classes, close_all, label_text, set_tooltip
from adapterlab.widgets.state import PanelState, Row

_CONFIRM = {"unsaved": "Not saved: delete?"}  # by status


class AdapterRow:
    """One row: writes `state.compared` and `state.multipliers`, calls `on_use(name)`, `on_save(name)` and
    `on_delete(name)`."""

    def __init__(
        self,
        row: Row,
        state: PanelState,
        on_use: Callable[[str], object],
        on_save: Callable[[str], object],
        on_delete: Callable[[str], object],
    ) -> None:
        self.row, self._state, self._on_delete = row, state, on_delete
        name = row.name
        self.compare = classes(w.Checkbox(indent=False, description=label_text(name)), "alab-compare")
        self.facts = classes(w.HTML(), "alab-row-facts")
        # A number and not a slider, whose handle has no name that a screen reader could say.
        self.multiplier = w.BoundedFloatText(min=0.0, max=2.0, step=0.05, description="multiplier")
        classes(self.multiplier, "alab-multiplier")
        self.use = classes(w.Button(), "alab-quiet")
        self.save = classes(w.Button(description="Save…"), "alab-quiet")
        self._forget = "Remove" if row.blend is not None else "Delete"
        self.delete = classes(w.Button(description=self._forget), "alab-quiet")
        set_tooltip(self.delete, f"Take {name} out of the {'list' if row.blend is not None else 'lab'}")
        self._armed = False
        tools = [self.use] if row.is_base else [self.use, self.delete]
        if row.is_adapter:
            tools = [self.multiplier, self.use, self.save, self.delete]
        self.tools = classes(w.HBox(tools), "alab-row-tools")
        self.box = classes(w.HBox([self.compare, self.facts, self.tools]), "alab-row")
        self.compare.observe(self._on_compare, "value")
        if (
            row.is_adapter
        ):  # the others have none to move, and setting theirs would draw the list within its own drawing
            self.multiplier.observe(self._on_multiplier, "value")
        self.use.on_click(lambda _: on_use(name))
        self.save.on_click(lambda _: on_save(name))
        self.delete.on_click(lambda _: self._on_delete_click())
        self.update(row)

    def update(self, row: Row) -> None:
        """Show `row` and the state as they are now."""
        self.row = row
        state, name = self._state, row.name
        self.disarm()
        self.compare.value = state.compared.get(name, True)
        self.multiplier.value = state.multipliers.get(name, 1.0)
        current = state.acts(row)
        self.facts.value = facts_html(row, current)
        off = "" if state.enabled or row.is_base else " (off)"
        self.use.description = f"✓ In lab.model{off}" if current else "Use in lab.model"
        set_tooltip(self.use, f"lab.set_adapter: let {name} act in lab.model, at the multiplier of this row")
        locked = bool(state.busy) or state.closed
        self.use.disabled = locked or current
        self.delete.disabled = locked
        self.save.disabled = locked or bool(row.obstacle("save"))
        saves = f"lab.save_adapter: {name} into a folder, as plain PEFT reads it"
        set_tooltip(self.save, row.obstacle("save") or saves)
        turn = f". It runs in turn: {row.obstacle('batch')}" if row.obstacle("batch") else ""
        set_tooltip(self.compare, f"Give {name} a column in the comparison{turn}")
        self.compare.disabled = state.closed
        self.multiplier.disabled = state.closed or bool(row.fixed)
        meaning = f"How strongly {name} acts in its column: 0 is the base, 1 the adapter"
        set_tooltip(self.multiplier, f"Always 1: {row.fixed}" if row.fixed else meaning)  # facts_html has it in full
        self.multiplier.description = "fixed at" if row.fixed else "multiplier"

    def _on_compare(self, change: dict[str, Any]) -> None:
        with self._state.lock:  # several threads tick and load
            self._state.compared = {**self._state.compared, self.row.name: change["new"]}

    def _on_multiplier(self, change: dict[str, Any]) -> None:
        with self._state.lock:
            self._state.multipliers = {**self._state.multipliers, self.row.name: change["new"]}
            self.update(self.row)

    def _on_delete_click(self) -> None:
        # Every adapter asks: one that was trained in a cell looks as it did before until the next comparison.
        if self.row.is_adapter and not self._armed:
            self._armed = True
            self.delete.description = _CONFIRM.get(self.row.status, "Really delete?")
            self.delete.add_class("alab-danger")
            return
        self.disarm()
        self._on_delete(self.row.name)

    def close(self) -> None:
        """Close its widgets, those too that this kind of row does not show."""
        for widget in (self.box, self.multiplier, self.use, self.save, self.delete):
            close_all(widget)

    def disarm(self) -> None:
        """Forget a first click on Delete."""
        self._armed = False
        self.delete.description = self._forget
        self.delete.remove_class("alab-danger")


class AdapterRows:
    """All rows. A row's widgets live as long as its adapter does, so that the focus and the page stay put."""

    def __init__(
        self,
        state: PanelState,
        on_use: Callable[[str], object],
        on_save: Callable[[str], object],
        on_delete: Callable[[str], object],
    ) -> None:
        self._state, self._calls = state, (on_use, on_save, on_delete)
        self.by_name: dict[str, AdapterRow] = {}
        self.box = classes(w.VBox(), "alab-rows")
        state.observe(lambda _: self._render(), ["rows", "compared", "multipliers", "enabled", "busy", "closed"])
        self._render()

    def _render(self) -> None:
        rows = {row.name: row for row in self._state.rows}
        gone = [self.by_name.pop(name) for name in list(self.by_name) if name not in rows]
        for name, row in rows.items():
            if name not in self.by_name:
                self.by_name[name] = AdapterRow(row, self._state, *self._calls)
            self.by_name[name].update(row)
        boxes = tuple(self.by_name[name].box for name in rows)
        if boxes != self.box.children:
            self.box.children = boxes
        for row in gone:
            row.close()

    def close(self) -> None:
        """Close all rows."""
        for row in self.by_name.values():
            row.close()


def facts_html(row: Row, current: bool) -> str:
    """Method, size and status of a row; how it acts in `lab.model` where the button can't say it."""
    badge = f'<span class="alab-badge">{escape(row.status)}</span>' if row.status else ""
    why = row.fixed.partition(". ")[0]  # the rest says what to do instead
    fixed = f'<span class="alab-muted">multiplier always 1: {escape(why)}</span>' if why else ""
    acts = ""
    if row.in_model is not None and not current:
        acts = f'<span class="alab-badge alab-acts">in lab.model × {row.in_model:g}</span>'
    return (
        f'<div class="alab-facts-line"><span class="alab-kind">{escape(row.kind)}</span><span class="alab-size">'
        f"{people_count(row.parameters)} parameters · {people_bytes(row.bytes)}</span><span>{badge}{acts}</span>{fixed}</div>"
    )
