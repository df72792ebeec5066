"""Where AdaLoRA's ranks are."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.plots.glyphs import drawable, families_for, plain, visible
from adapterlab.plots.heatmap import draw_cells, label_sides, tabulate, write_cells
from adapterlab.plots.style import USUAL_TEXT, check_columns, lay_out, make_figure, whole_numbers
from adapterlab.plots.training import draw_ranks_over_steps, points

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_LONGEST = 400  # letters of the note
_HISTORY = 1.9  # inches for the panel below


def plot_ranks(
    frame: pd.DataFrame, *, history: pd.DataFrame | None = None, note: str = "", ax: Axes | None = None
) -> Axes:
    """Draw where the ranks are, as a heatmap of layers (from the bottom up) and modules.

    `frame`: one row per layer and module with `layer` (missing for what stands in no layer, drawn on top), `module`,
    `rank` and `init_r`, as `lab.ranks(name)` gives it. Colours go from 0 to `init_r`, and their middle is the mean: the
    rank that all would have without allocation. The rank is written into each cell where it fits, the sums below the
    modules and beside the layers. Combinations that the adapter does not have stay blank.
    `history`: the run's, as `TrainingRun.history`: where it has `step` and `total_rank`, a second panel below shows
    the sum of all ranks, planned (`budget`) and kept, over the steps. `note`: a line above the heatmap.

    `ax`: where to draw the heatmap, and nothing of the history; by default a figure of its own, sized for the number of
    layers, which displays itself in a notebook (`plot_ranks(frame).figure`). Gives the heatmap's Axes. `frame` and
    `history` are unchanged. Raises `AdapterLabError` when a column is missing or there is nothing to draw.
    """
    check_columns(frame, ("layer", "module", "rank", "init_r"), "plot_ranks", "lab.ranks(name)")
    if not len(frame):
        raise AdapterLabError("There is nothing to draw: the frame has no rows.")
    if history is not None:
        check_columns(history, ("step",), "plot_ranks' history", "TrainingRun.history")
    table = tabulate(frame, frame["rank"])
    if ax is None:
        has_history = history is not None and len(points(history, "total_rank")) > 0
        longest = max(len(line) for module in table.modules for line in module.split("."))
        wide, high = table.size(0.78, longest)
        width, height = max(wide + 2.9, 5 if has_history else 0), max(high + 1.4, 2.8)
        figure = make_figure(width=width, height=height + _HISTORY * has_history)
        if has_history and history is not None:
            ax, below = figure.subplots(2, height_ratios=(height, _HISTORY))
            draw_ranks_over_steps(below, history)
            below.set_xlabel("step")
        else:
            ax = figure.add_subplot()
    mean, most = float(frame["rank"].mean()), float(frame["init_r"].max())
    mesh = draw_cells(ax, table, _around(mean, most))
    _colour_bar(ax, mesh, mean, most)
    _title(ax, note)
    lay_out(ax)
    label_sides(ax, table, (table.values.sum(axis=1), table.values.sum(axis=0)))
    ax.set_xlabel("module (sum over its layers)")
    lay_out(ax)
    write_cells(ax, table, mesh, lambda rank: f"{rank:.0f}")
    return ax


def _colour_bar(ax: Axes, mesh: Any, mean: float, most: float) -> None:
    figure: Any = ax.get_figure()
    room = {} if figure.get_layout_engine() else {"pad": 0.2}  # a layout engine makes room by itself
    label = f"rank kept\n(uniform would be {mean:.1f})"
    bar = figure.colorbar(mesh, ax=ax, ticks=whole_numbers(6), label=label, **room)
    bar.ax.set_ylim(0, most)
    bar.ax.axhline(mean, color="white", linewidth=1.5)
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)  # seams between its 256 colours would be seen in an SVG


def _title(ax: Axes, note: str) -> None:
    if note:
        figure: Any = ax.get_figure(root=True)
        note = visible(" ".join(note.split())[:_LONGEST])
        families = families_for([note])
        text = textwrap.fill(note, max(int((figure.get_figwidth() - 0.8) * 72 / (0.55 * USUAL_TEXT)), 20))
        ax.set_title(drawable(text, families), loc="left", fontsize=USUAL_TEXT, **plain(families))


def _around(middle: float, most: float) -> Any:
    """A norm from 0 to `most` with `middle` in its middle; where `middle` is at an end, that end is in the middle."""
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(middle, 0 if middle > 0 else -max(most, 1), most if middle < most else 2 * middle)
