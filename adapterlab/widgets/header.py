"""The top of the panel: one line on what is loaded and what acts, the switch for all adapters; notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from adapterlab.pagetext import escape
from adapterlab.widgets.compat import classes, set_tooltip
from adapterlab.widgets.state import Notice, PanelState


class Header:
    """The status line and the on/off switch. `on_enabled(bool)` is called when the user turns the switch."""

    def __init__(self, state: PanelState, on_enabled: Callable[[bool], object]) -> None:
        self._state = state
        self._on_enabled, self._rendering = on_enabled, False
        self.line = classes(w.HTML(), "alab-status")
        self.switch = classes(w.ToggleButton(), "alab-switch")
        set_tooltip(self.switch, "All adapters on or off in lab.model. The columns below do not depend on it.")
        self.box = classes(w.HBox([self.line, self.switch]), "alab-header")
        self.switch.observe(self._on_switch, "value")
        state.observe(lambda _: self._render(), ["status", "enabled", "busy", "closed", "rows"])
        self._render()

    def _on_switch(self, change: dict[str, Any]) -> None:
        with self._state.lock:  # while another thread draws, a change of the switch is not the user's
            turned = not self._rendering and change["new"] != self._state.enabled
        if turned:
            self._on_enabled(change["new"])
            self._render()

    def _render(self) -> None:
        with self._state.lock:
            self._rendering = True
            try:
                self._draw()
            finally:
                self._rendering = False

    def _draw(self) -> None:
        state = self._state
        self.line.value = status_html(state.status)
        self.switch.value = state.enabled
        self.switch.description = "Adapters on" if state.enabled else "Adapters off"
        self.switch.disabled = bool(state.busy) or state.closed
        self.switch.layout.display = None if state.adapter_names else "none"


def status_html(status: str) -> str:
    """The lab's line with its ends, the model and what acts now, set off; every word of it stays."""
    name, *facts = map(escape, status.split(" · "))
    if facts:
        facts[-1] = f'<span class="alab-now">{facts[-1]}</span>'
    rest = "".join(f" · {fact}" for fact in facts)
    return f'<div role="status" class="alab-status-line"><b>{name}</b><span class="alab-facts">{rest}</span></div>'


_ELSEWHERE = Notice("info", "A comparison or a training runs that a cell or another panel has started. Stop ends it.")


class NoticeBar:
    """What runs now, what went wrong: one line in words, the traceback folded under it."""

    def __init__(self, state: PanelState) -> None:
        self._state = state
        self.html = classes(w.HTML(), "alab-notice")
        self.dismiss = classes(w.Button(description="Dismiss"), "alab-quiet")
        set_tooltip(self.dismiss, "Take this message away")
        self.box = classes(w.HBox([self.html, self.dismiss]), "alab-notice-line")
        self.dismiss.on_click(lambda _: self._forget())
        state.observe(lambda _: self._render(), ["notice", "elsewhere"])
        self._render()

    def _forget(self) -> None:
        self._state.notice = None

    def _render(self) -> None:
        notice = self._state.notice or (_ELSEWHERE if self._state.elsewhere else None)
        for part in (self.html, self.box):
            part.layout.display = None if notice else "none"
        self.dismiss.layout.display = "none" if self._state.notice is None or self._state.notice.passing else None
        self.html.value = notice_html(notice) if notice else ""


def notice_html(notice: Notice) -> str:
    """A notice as HTML, everything in it as text."""
    word = "Error" if notice.kind == "error" else "Note"
    role = "alert" if notice.kind == "error" else "status"
    detail = ""
    if notice.detail:
        detail = f"<details><summary>{escape(notice.about)}</summary><pre>{escape(notice.detail)}</pre></details>"
    return (
        f'<div class="alab-notice-box alab-{escape(notice.kind)}" role="{role}">'
        f"<b>{word}</b> <span>{escape(notice.text)}</span>{detail}</div>"
    )
