"""What an adapter does to each weight, and how far two of them do it in the same directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.plots.glyphs import drawable, families_for, plain, wrapped
from adapterlab.plots.heatmap import Table, cell_points, draw_cells, label_sides, mark_zeros, tabulate, write_cells
from adapterlab.plots.style import (
    ADAPTER_COLOURS,
    MORE_COLOURS,
    USUAL_TEXT,
    check_columns,
    lay_out,
    make_figure,
    short_number,
    text_colour,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FAR = 30.0  # from the largest norm to the middle one: beyond, colours are logarithmic
_LOGARITHMIC = "logarithmic colours"


def plot_delta_norms(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how much an adapter changes each weight: a heatmap of layers and modules of ‖ΔW‖ / ‖W‖ in percent.

    `frame`: one row per adapted layer with `layer` (may be missing), `module`, `norm` and `relative_norm`, as
    `lab.delta_norms(name)` gives it. Colours start at 0 and are linear; where the largest value is more than 30 times the
    median they are logarithmic, which the colour bar says. Cells that are exactly 0 are hatched; where all are, the title
    says that the adapter changes nothing yet. Where no row has a `relative_norm`, `norm` itself is drawn, which the
    colour bar says; where only some have none, these cells stay without colour, and their norm is written in them.
    The second panel: `effective_rank` cell by cell, or, for an adapter that has scales (IA3: `scale_min`, `scale_mean`,
    `scale_max`), the range of each layer's scales around 1, which changes nothing.

    `ax`: where to draw the heatmap alone; by default a figure of its own with both, sized for the number of layers, which
    displays itself in a notebook (`plot_delta_norms(frame).figure`). Gives the heatmap's Axes. `frame` is unchanged.
    Raises `AdapterLabError` when a column is missing or there is nothing to draw.
    """
    check_columns(frame, ("layer", "module", "norm", "relative_norm"), "plot_delta_norms", "lab.delta_norms(name)")
    if not len(frame) or not frame["norm"].notna().any():
        raise AdapterLabError("There is nothing to draw: no row of the frame has a norm.")
    relative = bool(frame["relative_norm"].notna().any())
    table = tabulate(frame, 100 * frame["relative_norm"] if relative else frame["norm"])
    label = "‖ΔW‖ / ‖W‖ in %" if relative else "‖ΔW‖ (Frobenius; ‖W‖ is not known)"
    beside: Axes | None = None
    untrained = not bool((frame["norm"] > 0).any())
    second = None if ax is not None or untrained else _second_panel(frame)
    if ax is None:
        ax, beside = _figure_for(table, second is not None)
    if untrained:
        ax.set_title("changes nothing yet: ΔW = 0 everywhere", loc="left", fontsize=USUAL_TEXT)
    finish = [_heat(ax, table, label, *_scale(table), short_number, bar=not untrained)]
    if beside is not None and second is not None:
        heat = second(beside, table)
        finish += [heat] if heat is not None else []
    _finish(finish)
    if relative:
        _write_unmeasured(ax, frame, table)
    return ax


def plot_overlap(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how far two adapters work in the same directions: heatmaps of layers and modules, from 0 (none) to 1 (all).

    `frame`: one row per layer that both adapt with `layer`, `module`, `output_overlap`, `input_overlap`, `output_chance`
    and `input_chance`, as `lab.subspace_overlap(name, other)` gives it. The left panel is the output's directions, the right
    one the input's. What random directions would give is named above each, and marked in its colour bar.

    `ax`: where to draw the output's heatmap alone; by default a figure of its own with both, which displays itself in a
    notebook. Gives the output's Axes. `frame` is unchanged. Raises `AdapterLabError` when a column is missing or there is
    nothing to draw.
    """
    from matplotlib.colors import Normalize

    needed = ("layer", "module", "output_overlap", "input_overlap", "output_chance", "input_chance")
    check_columns(frame, needed, "plot_overlap", "lab.subspace_overlap(name, other)")
    if not frame[["output_overlap", "input_overlap"]].notna().any(axis=None):
        raise AdapterLabError("There is nothing to draw: no row of the frame has an overlap.")
    tables = {side: tabulate(frame, frame[f"{side}_overlap"]) for side in ("output", "input")}
    axes: list[Any] = [ax] if ax is not None else list(_figure_for(tables["output"], True))
    finish = []
    for panel, (side, table) in zip(axes, tables.items()):
        chance = frame[f"{side}_chance"].dropna()
        low, high = (float(chance.min()), float(chance.max())) if len(chance) else (0.0, 0.0)
        span = (
            short_number(low)
            if short_number(low) == short_number(high)
            else f"{short_number(low)} to {short_number(high)}"
        )
        label = f"overlap of {side} directions\n(by chance {span})"
        finish.append(
            _heat(panel, table, label, Normalize(0, 1), "", _hundredths, marks=(low, high) if len(chance) else ())
        )
    _finish(finish)
    return axes[0]


def _hundredths(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"


def _figure_for(table: Table, two: bool) -> tuple[Axes, Axes | None]:
    wide, high = table.size(0.62, max(len(module) for module in table.modules))
    figure: Figure = make_figure(
        width=max(1.1 + (2 * wide + 0.5 if two else wide + 0.5), 4.2), height=max(high + 1.6, 3.0)
    )
    if not two:
        return figure.add_subplot(), None
    left, right = figure.subplots(1, 2, sharey=True)
    return left, right


def _scale(table: Table) -> tuple[Any, str]:
    """The norm of the colours, and what the colour bar must say of it."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    values = table.values.compressed()
    positive = values[values > 0]
    if not len(positive):
        return Normalize(0, 1), ""
    if positive.max() > _FAR * np.median(positive):
        return LogNorm(max(positive.min(), positive.max() / 1e6), positive.max(), clip=True), _LOGARITHMIC
    return Normalize(0, positive.max()), ""


@dataclass(frozen=True)
class _Heat:
    """A heatmap that has its cells and its colour bar; labels and numbers wait until all panels have their place."""

    ax: Axes
    table: Table
    mesh: Any
    write: Callable[[float], str]


def _heat(
    ax: Axes,
    table: Table,
    label: str,
    norm: Any,
    remark: str,
    write: Callable[[float], str],
    *,
    bar: bool = True,
    marks: tuple[float, ...] = (),
) -> _Heat:
    """Draw the cells and above them their colour bar, with `marks` as lines across it."""
    mesh = draw_cells(ax, table, norm)
    remarks = ", ".join(filter(None, (remark, "hatched: exactly 0" if mark_zeros(ax, table) else "")))
    if bar:
        figure: Any = ax.get_figure()
        high = ax.get_window_extent().height / figure.dpi  # inches
        label = f"{label}\n({remarks})" if remarks else label
        side = figure.colorbar(mesh, ax=ax, location="top", aspect=30, pad=0.1 / high, label=label)
        side.outline.set_visible(False)
        side.solids.set_rasterized(True)  # seams between its 256 colours would be seen in an SVG
        side.ax.tick_params(labelsize=USUAL_TEXT)
        side.ax.xaxis.label.set_fontsize(USUAL_TEXT)
        if remark == _LOGARITHMIC:
            side.ax.xaxis.set_major_formatter(lambda value, _: short_number(value).removesuffix(".0"))
        for mark in marks:
            side.ax.axvline(mark, color=text_colour(), linewidth=1.5, clip_on=False, ymin=-0.4, ymax=1.4)
    return _Heat(ax, table, mesh, write)


def _finish(heats: Sequence[_Heat]) -> None:
    lay_out(heats[0].ax)
    for heat in heats:
        label_sides(heat.ax, heat.table)
        heat.ax.set_xlabel("module")
    for heat in heats[1:]:
        heat.ax.set_ylabel("")
    lay_out(heats[0].ax)
    for heat in heats:
        write_cells(heat.ax, heat.table, heat.mesh, heat.write)


def _second_panel(frame: pd.DataFrame) -> Callable[[Axes, Table], _Heat | None] | None:
    """What draws the panel beside the heatmap; None where there is neither a rank nor a scale."""
    scales = ("scale_min", "scale_mean", "scale_max")
    if all(column in frame.columns and frame[column].notna().any() for column in scales):
        return lambda ax, table: _draw_scales(ax, frame, table)
    if "effective_rank" in frame.columns and frame["effective_rank"].notna().any():
        return lambda ax, table: _draw_effective_ranks(ax, frame)
    return None


def _draw_effective_ranks(ax: Axes, frame: pd.DataFrame) -> _Heat:
    from matplotlib.colors import Normalize

    table = tabulate(frame, frame["effective_rank"])
    allowed = frame["rank"].dropna() if "rank" in frame.columns else frame["effective_rank"].dropna()
    most = max(float(allowed.max()) if len(allowed) else 0.0, float(table.values.max()), 1.0)
    span = f"{allowed.min():.0f}" if len(allowed) and allowed.min() == allowed.max() else f"at most {most:.0f}"
    label = f"effective rank of ΔW\n(of {span})" if "rank" in frame.columns and len(allowed) else "effective rank of ΔW"
    return _heat(ax, table, label, Normalize(0, most), "", lambda rank: f"{rank:.1f}" if rank else "0")


def _draw_scales(ax: Axes, frame: pd.DataFrame, table: Table) -> None:
    """A line from the smallest to the largest scale of each layer, a dot on the mean; modules in colours."""
    colours = (*ADAPTER_COLOURS, *MORE_COLOURS)
    places = {layer: row for row, layer in enumerate(table.layers)}
    families = families_for(wrapped(module, lines=1) for module in table.modules)
    lanes = len(table.modules)
    for lane, module in enumerate(table.modules):
        rows = frame[(frame["module"].map(str) == module) & frame["scale_mean"].notna()]
        ys = [
            places[int(layer) if has else None] + (lane + 1) / (lanes + 1)
            for layer, has in zip(rows["layer"], rows["layer"].notna())
        ]
        look: dict[str, Any] = {"color": colours[lane % len(colours)]}
        ax.hlines(ys, rows["scale_min"], rows["scale_max"], linewidth=1.6, **look)
        ax.plot(rows["scale_mean"], ys, linestyle="none", marker="os^Dv"[lane % 5], markersize=3.5,
                label=drawable(wrapped(module, lines=1), families), **look)  # fmt: skip
    ax.axvline(1, color=text_colour(), linewidth=0.8, linestyle=":")
    ax.margins(x=0.08)
    ax.set_xlabel("scales, from least to largest\n(1 changes nothing)")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.grid(axis="x", alpha=0.3, linewidth=0.8)
    legend = ax.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=USUAL_TEXT, ncols=min(lanes, 3)
    )
    for text in legend.get_texts():
        text.set(**plain(families))


def _write_unmeasured(ax: Axes, frame: pd.DataFrame, table: Table) -> None:
    """‖ΔW‖ itself, where there is no ‖W‖ to measure it against."""
    rest = frame[frame["relative_norm"].isna() & frame["norm"].notna()]
    if not len(rest) or cell_points(ax, table)[1] < USUAL_TEXT:
        return
    rows = {layer: row for row, layer in enumerate(table.layers)}
    for layer, has, module, norm in zip(rest["layer"], rest["layer"].notna(), rest["module"], rest["norm"]):
        place = table.modules.index(str(module)) + 0.5, rows[int(layer) if has else None] + 0.5
        ax.text(*place, f"({short_number(norm)})", ha="center", va="center", fontsize=USUAL_TEXT - 2, in_layout=False)
    ax.set_xlabel("module (in brackets: ‖ΔW‖, where ‖W‖ is not known)")
