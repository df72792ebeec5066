"""The bar of parameters: the base against each adapter, drawn by the page so that it follows the theme."""

from __future__ import annotations

import math
from html import escape

import ipywidgets as w

from adapterlab.inspection import people_bytes, people_count
from adapterlab.widgets.columns import HUES
from adapterlab.widgets.compat import classes
from adapterlab.widgets.state import PanelState, Row, short_share


class SizesView:
    """A bar for each row of the list, on a logarithmic scale, with the exact numbers beside it."""

    def __init__(self, state: PanelState) -> None:
        self._state = state
        self.html = classes(w.HTML(), "alab-sizes", "alab-section")
        state.observe(lambda _: self._render(), "rows")
        self._render()

    def _render(self) -> None:
        self.html.value = sizes_html(tuple(row for row in self._state.rows if row.blend is None))


def sizes_html(rows: tuple[Row, ...]) -> str:
    """The bars as HTML. The scale starts one decade below the smallest row, so that every bar can be seen."""
    counts = [row.parameters for row in rows if row.parameters > 0]
    if not counts:
        return ""
    low = math.floor(math.log10(min(counts))) - (1 if min(counts) >= 10 else 0)
    high = max(math.ceil(math.log10(max(counts))), low + 1)
    bars = "".join(_bar_html(row, index, low, high) for index, row in enumerate(rows))
    ticks = "".join(_tick_html(decade, low, high) for decade in range(low, high + 1))
    return (
        '<div class="alab-title">Parameters<span class="alab-muted"> on a logarithmic scale</span></div>'
        f'<div class="alab-bars">{bars}'
        f'<span></span><div class="alab-ticks" aria-hidden="true">{ticks}</div><span></span></div>'
    )


def _bar_html(row: Row, index: int, low: int, high: int) -> str:
    width = (math.log10(row.parameters) - low) / (high - low) if row.parameters else 0.0
    hue = 0 if row.is_base else (index - 1) % HUES + 1
    share = "" if row.is_base else f" · {short_share(row.share)} of base"
    return (
        f'<span class="alab-bar-name">{escape(row.name)}</span>'
        f'<div class="alab-bar-track" style="--alab-decades:{high - low}">'
        f'<div class="alab-bar alab-hue-{hue}" style="width:{width:.2%}"></div></div>'
        f'<span class="alab-bar-number">{row.parameters:,}'
        f'<span class="alab-muted"> · {people_bytes(row.bytes)}{share}</span></span>'
    )


def _tick_html(decade: int, low: int, high: int) -> str:
    return f'<span style="left:{(decade - low) / (high - low):.2%}">{people_count(10**decade)}</span>'
