"""A heatmap of layers (from the bottom up) and modules: what ranks, norms and overlaps have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from adapterlab.plots.glyphs import drawable, families_for, plain, wrapped
from adapterlab.plots.style import CELL_COLOURS, SMALLEST_TEXT, USUAL_TEXT, readable_on

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Table:
    """Numbers by layer and module. values: masked array (layers, modules), masked where the adapter has nothing.

    modules: in the frame's order. layers: ascending, and None last, for what stands in no layer.
    """

    modules: list[str]
    layers: list[int | None]
    values: Any

    def size(self, cell: float, longest: int) -> tuple[float, float]:
        """(width, height) in inches for the cells alone, `cell` or the longest label wide where that is not too much."""
        width = max(cell, 0.08 * longest if longest < 16 else 0) * len(self.modules)
        return min(max(width, 1.2), 9.5), min(max(0.22 * len(self.layers), 1.4), 12.6)


def tabulate(frame: pd.DataFrame, values: Sequence[float] | pd.Series[Any]) -> Table:
    """`values`, one for each row of `frame`, by its `layer` (may be missing) and `module`. What is missing is masked."""
    import numpy as np

    modules = list(dict.fromkeys(map(str, frame["module"])))
    numbered = frame["layer"].notna()
    layers: list[int | None] = [*sorted({int(layer) for layer in frame.loc[numbered, "layer"]})]
    if not numbered.all():
        layers.append(None)
    rows = {layer: row for row, layer in enumerate(layers)}
    columns = {module: column for column, module in enumerate(modules)}
    found = np.ma.masked_all((len(layers), len(modules)))
    for layer, has, module, value in zip(frame["layer"], numbered, frame["module"], np.asarray(values, dtype=float)):
        if np.isfinite(value):
            found[rows[int(layer) if has else None], columns[str(module)]] = value
    return Table(modules, layers, found)


def draw_cells(ax: Axes, table: Table, norm: Any) -> Any:
    """The coloured cells; gives matplotlib's mesh, for a colour bar."""
    return ax.pcolormesh(table.values, cmap=CELL_COLOURS, norm=norm, edgecolors=ax.get_facecolor(), linewidth=0.6)


def label_sides(ax: Axes, table: Table, sums: Any = None) -> None:
    """Layers at the left, modules below; with `sums` (along, below) their numbers beside and below too.

    Labels of layers are thinned out, and those of modules turned, where there is no room for them as they are.
    """
    wide, high = cell_points(ax, table)
    rows = range(0, len(table.layers), ceil(SMALLEST_TEXT / (0.8 * high)))
    size = min(0.8 * high * rows.step, USUAL_TEXT)
    names, places = ["–" if layer is None else str(layer) for layer in table.layers], [row + 0.5 for row in rows]
    ax.set_yticks(places, [names[row] for row in rows], fontsize=size)
    below = [".\n".join(wrapped(part, 16) for part in module.split(".")) for module in table.modules]
    sides = [ax]
    if sums is not None:
        beside = ax.secondary_yaxis("right")
        beside.set_yticks(places, [f"({sums[0][row]:.0f})" for row in rows], fontsize=size)
        beside.set_ylabel("(sum over its modules)")
        sides.append(beside)  # type: ignore[arg-type]
        below = [f"{label}\n({number:.0f})" for label, number in zip(below, sums[1])]
    longest = max(len(line) for label in below for line in label.split("\n"))
    turned: dict[str, Any] = {"rotation": 90} if 0.6 * USUAL_TEXT * longest > wide else {}
    families = families_for(below)
    labels = [drawable(label, families) for label in below]
    places = [column + 0.5 for column in range(len(labels))]
    ax.set_xticks(places, labels, fontsize=min(USUAL_TEXT, 0.9 * wide / max(label.count("\n") + 1 for label in labels))
                  if turned else USUAL_TEXT, **turned, **plain(families))  # fmt: skip
    for side in sides:
        side.tick_params(length=0)
        side.spines[:].set_visible(False)
    ax.set_ylabel("layer")


def write_cells(ax: Axes, table: Table, mesh: Any, write: Callable[[float], str]) -> None:
    """Each number into its cell, all in one size, where that can be read. Call it when all else has its place."""
    wide, high = cell_points(ax, table)
    rows, columns = (~_mask(table)).nonzero()
    texts = [write(float(table.values[row, column])) for row, column in zip(rows, columns)]
    size = min(0.62 * high, wide / (0.75 * max(map(len, texts), default=1)), USUAL_TEXT)
    if size < SMALLEST_TEXT:
        return
    for row, column, text in zip(rows, columns, texts):
        colour = readable_on(mesh.cmap(mesh.norm(table.values[row, column])))
        ax.text(column + 0.5, row + 0.5, text, color=colour, ha="center", va="center", fontsize=size, in_layout=False)


def mark_zeros(ax: Axes, table: Table) -> bool:
    """Hatch the cells that are exactly 0, so that no small number is taken for one; says whether there are any."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    rows, columns = ((table.values == 0).filled(False)).nonzero()
    boxes = [Rectangle((column, row), 1, 1) for row, column in zip(rows, columns)]
    if boxes:
        marks = PatchCollection(boxes, facecolor="none", edgecolor="#ffffff80", linewidth=0, hatch="////")
        ax.add_collection(marks, autolim=False)
    return bool(boxes)


def cell_points(ax: Axes, table: Table) -> tuple[float, float]:
    """(width, height) of a cell in points, as the axes are now."""
    figure: Any = ax.get_figure(root=True)
    box, points = ax.get_window_extent(), 72 / figure.dpi
    return box.width * points / len(table.modules), box.height * points / len(table.layers)


def _mask(table: Table) -> Any:
    import numpy as np

    return np.ma.getmaskarray(table.values)
