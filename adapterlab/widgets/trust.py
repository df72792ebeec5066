"""Plain PEFT's second opinion on the columns that are shown, at the press of a button."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w

from adapterlab.pagetext import escape
from adapterlab.widgets.compat import classes, set_tooltip
from adapterlab.widgets.state import PanelState


class TrustView:
    """Calls `on_verify()`; the verdict comes back in `state.verdict`, one mapping for each column."""

    def __init__(self, state: PanelState, on_verify: Callable[[], object]) -> None:
        self._state = state
        self.button = w.Button(description="Verify the columns")
        set_tooltip(self.button, "lab.verify: each column again through plain PEFT, alone, from the adapter's own file")
        self.table = classes(w.HTML(), "alab-verdict")
        title = w.HTML(
            '<div class="alab-title">Who spoke?<span class="alab-muted"> '
            "each column shown under Compare, again through plain PEFT on its own</span></div>"
        )
        self.box = classes(w.VBox([title, classes(w.HBox([self.button]), "alab-form"), self.table]), "alab-section")
        self.button.on_click(lambda _: on_verify())
        state.observe(lambda _: self._forget(), "shown")
        state.observe(lambda _: self._render(), ["shown", "verdict", "busy", "closed", "hidden"])
        self._render()

    def _forget(self) -> None:
        self._state.verdict = ()

    def _render(self) -> None:
        state = self._state
        self.button.disabled = bool(state.busy) or state.closed or state.shown is None or state.hidden
        self.table.layout.display = None if state.verdict else "none"
        self.table.value = verdict_html(state.verdict) if state.verdict else ""


def verdict_html(rows: Sequence[dict[str, Any]]) -> str:
    """The frame of `lab.verify` as a table, in words."""
    lines = []
    for row in rows:
        error = row["logprob_error"]
        if error != error:  # not a number: the adapter has gone, and nothing was computed
            name, why = escape(str(row["column"])), escape(str(row["note"]))
            lines.append(f"<tr><th scope='row'>{name}</th><td colspan='5'>not checked: {why}</td></tr>")
            continue
        cells = [
            f"<th scope='row'>{escape(str(row['column']))}</th>",
            f"<td>{_word(row['weights_agree'])}</td><td>{_word(row['active_agree'])}</td>",
            f"<td>{_word(row['tokens_agree'])}</td><td>{error:.1e}</td>",
            f"<td><b>{_word(row['agrees'])}</b> {escape(str(row['note'] or ''))}</td>",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = ("column", "weights", "adapter", "tokens", "largest |Δlogprob|, nats", "agrees")
    head = "".join(f"<th scope='col'>{word}</th>" for word in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _word(agrees: Any) -> str:
    return "yes" if agrees else "no"
