"""What the Inspect tab shows of a lab: its plots as SVG in the page's own colours, and one table. Each is a call of the lab."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.pagetext import escape
from adapterlab.widgets.code import call_code

if TYPE_CHECKING:
    import pandas as pd

    from adapterlab.lab import AdapterLab
    from adapterlab.widgets.state import View

OF_ONE = ("Ranks", "Weights")  # pictures of one adapter
NO_RANKS = "No adapter here allocates ranks: train one of the method AdaLoRA."
NO_ADAPTER = "There is no adapter yet: load or add one."


def _call(view: View) -> tuple[str, tuple[str, ...]]:
    """The lab's method, and its arguments."""
    if view.what == "Weights" and view.other:
        return "plot_subspace_overlap", (view.adapter, view.other)
    methods = {"Sizes": "plot_parameters", "Memory": "plot_memory", "Abilities": "capabilities"}
    if view.what in methods:
        return methods[view.what], ()
    return {"Ranks": "plot_ranks", "Weights": "plot_delta_norms"}[view.what], (view.adapter,)


def picture_code(view: View) -> str:
    """The Python that gives the same, "" where there is nothing to draw."""
    if view.what in OF_ONE and not view.adapter:
        return ""
    method, arguments = _call(view)
    return call_code(f"lab.{method}", *arguments)


def picture_html(lab: AdapterLab, view: View) -> str:
    """The picture; or, in words, why there is none."""
    from adapterlab.plots import draw_svg

    if view.what in OF_ONE and not view.adapter:
        return _words(NO_RANKS if view.what == "Ranks" else NO_ADAPTER)
    method, arguments = _call(view)
    try:
        if view.what == "Abilities":
            return abilities_html(lab.capabilities())
        label = f"{view.what} of {' against '.join(arguments) or 'base and adapters'}"
        return draw_svg(lab._drawing(method, *arguments), label)
    except AdapterLabError as error:
        return _words(str(error))


def abilities_html(frame: pd.DataFrame) -> str:
    """`lab.capabilities()` as a table, adapters by what can be done with them; the reasons stand under it."""
    if not len(frame):
        return _words(NO_ADAPTER)
    heads = list(dict.fromkeys(frame["capability"]))
    lines, reasons = [], []
    for name, rows in frame.groupby("adapter", sort=False):
        cells = []
        for row in rows.to_dict("records"):
            cells.append(_cell(row))
            if row["reason"]:
                reasons.append(
                    f"<li><b>{escape(str(name))}</b>, {escape(row['capability'])}: {escape(row['reason'])}</li>"
                )
        lines.append(f"<tr><th scope='row'>{escape(str(name))}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th scope='col'>{escape(word)}</th>" for word in ("", *heads))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    why = f"<ul class='alab-reasons'>{''.join(reasons)}</ul>" if reasons else ""
    return f"<div class='alab-verdict'>{table}</div>{why}"


def _cell(row: dict[Any, Any]) -> str:
    if row["possible"]:
        return "<td>yes</td>"
    return f"<td class='alab-muted' title='{escape(row['reason'])}'>no</td>"


def _words(text: str) -> str:
    return f'<div class="alab-muted">{escape(text)}</div>'
