"""Pictures of the lab's frames: a DataFrame goes in, matplotlib Axes come out. Nothing here sees a model.

No pyplot: figures belong to whoever asked for them, and nothing stays open behind their back.
"""

from __future__ import annotations

from functools import cache
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart; grey is the base everywhere in the lab.
BASE_COLOUR = "#7d7d7d"
ADAPTER_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
SCREEN_DPI = 96
BAR_SHARE = 0.62
RANK_COLOURS = (
    "cividis"  # blue, grey, yellow: for colour-blind eyes, and ever lighter, so that it survives a grey print
)
_SMALLEST_TEXT, _LARGEST_TEXT = 6.0, 9.0  # in points, inside the cells of a heatmap


def plot_parameters(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how many parameters the base and each adapter have, as bars on a logarithmic scale.

    `frame`: one row per `owner` ("base" or an adapter's name) with `parameters` and, optionally, `share_of_base`
    (0 to 1), as `lab.parameters()` gives it. Rows with the same owner are added up. An owner without
    parameters gets no bar, and its zero written out. The exact number stands beside each bar, since a
    logarithmic scale makes numbers that differ by a hundred both visible and hard to compare by eye.

    `ax`: where to draw; by default a figure of its own, sized for the number of bars, which displays itself in a
    notebook (`plot_parameters(frame).figure`). Text and background follow matplotlib's style. `frame` is unchanged.
    Raises `AdapterLabError` when a column is missing or there is nothing to draw.
    """
    _check_columns(frame, ("owner", "parameters"), "plot_parameters", "lab.parameters()")
    if not (frame["parameters"] > 0).any():
        raise AdapterLabError("There is nothing to draw: no row of the frame has parameters.")
    counts = frame.groupby("owner", sort=False)["parameters"].sum()
    base = counts.get("base")
    if ax is None:
        ax = make_figure(height=0.9 + 0.42 * len(counts)).add_subplot()
    low, high = _lowest_decade(counts), float(counts.max())
    ax.barh(
        [str(owner) for owner in counts.index],
        [max(count, low) for count in counts],
        color=_colours(list(counts.index)),
        height=0.62,
    )
    ax.set_xscale("log")
    # The longest bar takes this much of the width; its number needs the rest. Exponents, the scale being logarithmic.
    ax.set_xlim(low, low * (high / low) ** (1 / BAR_SHARE))
    ax.set_xticks([low * 10.0**k for k in range(int(log10(high / low)) + 1)])
    ax.minorticks_off()
    for index, count in enumerate(counts):
        text = f"{count:,}" + (
            "" if counts.index[index] == "base" or not base else f"  ({_percent(count / base)} of base)"
        )
        ax.annotate(text, (max(count, low), index), xytext=(6, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.set_xlabel("parameters (logarithmic scale)")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3, linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def plot_training(history: pd.DataFrame, *, title: str = "") -> Figure:
    """Draw a training: its loss and held-out loss over the steps; for AdaLoRA below them the ranks, planned and kept.

    `history`: one row per logged step, as `TrainingRun.history` has it: `step` and `loss`, and where they are there
    `eval_loss`, `budget` and `total_rank`. What is NaN or infinite is left out, and a column of nothing else is not
    drawn. The figure displays itself in a notebook; its first Axes are the loss, its second the ranks. `history` is
    unchanged. Raises `AdapterLabError` when a column is missing or there is no loss of either kind.
    """
    _check_columns(history, ("step", "loss"), "plot_training", "TrainingRun.history")
    loss, held_out, budget, kept = (
        _points(history, column) for column in ("loss", "eval_loss", "budget", "total_rank")
    )
    if not len(loss) and not len(held_out):
        raise AdapterLabError("There is nothing to draw: no row of the history has a loss.")
    figure = make_figure(height=5.4 if len(kept) else 3.6)
    axes = figure.subplots(2, sharex=True, height_ratios=(3, 2)) if len(kept) else [figure.subplots()]
    top = axes[0]
    _line(top, loss, "training loss", color=ADAPTER_COLOURS[0], linewidth=1.4)
    _line(top, held_out, "held-out loss", color=ADAPTER_COLOURS[5], linewidth=1.8, marker="o")
    top.set_ylabel("loss (nats per token)")
    if len(kept):
        _line(axes[1], kept, "kept", color=ADAPTER_COLOURS[4], linewidth=3, drawstyle="steps-post")
        dashes: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2, "drawstyle": "steps-post"}
        _line(axes[1], budget, "planned", color=_text_colour(), **dashes)
        axes[1].set_ylabel("ranks, all layers")
        axes[1].set_ylim(0, 1.08 * max(kept.max(), budget.max() if len(budget) else 0, 1))
    for ax in axes:
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.xaxis.set_major_locator(_whole_numbers(10))
    axes[-1].set_xlabel("step")
    if len(set(loss.index) | set(held_out.index)) == 1:
        middle = (loss if len(loss) else held_out).index[0]
        axes[-1].set_xlim(middle - 1, middle + 1)
    if title:
        top.set_title(title, loc="left", parse_math=False)
    return figure


def plot_ranks(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw where the ranks are, as a heatmap of layers (from the bottom up) and modules.

    `frame`: one row per layer and module with `layer` (missing for what stands in no layer, drawn on top), `module`,
    `rank` and `init_r`, as `lab.ranks(name)` gives it. Colours go from 0 to `init_r`, and their middle is the mean: the
    rank that all would have without allocation. The rank is written into each cell where it fits, the sums below the
    modules and beside the layers. Combinations that the adapter does not have stay blank.

    `ax`: where to draw; by default a figure of its own, sized for the number of layers, which displays itself in a
    notebook (`plot_ranks(frame).figure`). `frame` is unchanged. Raises `AdapterLabError` when a column is missing or
    there is nothing to draw.
    """
    _check_columns(frame, ("layer", "module", "rank", "init_r"), "plot_ranks", "lab.ranks(name)")
    if not len(frame):
        raise AdapterLabError("There is nothing to draw: the frame has no rows.")
    modules, layers, ranks = _rank_table(frame)
    below = [module.replace(".", ".\n") + f"\n({ranks[:, column].sum():.0f})" for column, module in enumerate(modules)]
    longest = max(len(line) for label in below for line in label.split("\n"))
    if ax is None:
        width, height = 2.9 + max(0.78, 0.08 * longest) * len(modules), 1.4 + 0.22 * len(layers)
        ax = make_figure(width=min(width, 12), height=min(max(height, 2.8), 14)).add_subplot()
    mean, most = float(frame["rank"].mean()), float(frame["init_r"].max())
    mesh = ax.pcolormesh(
        ranks, cmap=RANK_COLOURS, norm=_around(mean, most), edgecolors=ax.get_facecolor(), linewidth=0.6
    )
    wide, high = _cell_size(ax, len(layers), len(modules))
    _write_cells(ax, ranks, mesh.norm, min(0.62 * high, wide / (0.75 * len(f"{ranks.max():.0f}")), _LARGEST_TEXT))
    rows = range(0, len(layers), ceil(_SMALLEST_TEXT / (0.8 * high)))  # all of them, where there is room
    small = min(0.8 * high * rows.step, _LARGEST_TEXT)
    names, places = ["–" if layer is None else str(layer) for layer in layers], [row + 0.5 for row in rows]
    ax.set_yticks(places, [names[row] for row in rows], fontsize=small)
    beside = ax.secondary_yaxis("right")
    beside.set_yticks(places, [f"({ranks[row].sum():.0f})" for row in rows], fontsize=small)
    turned: dict[str, Any] = {"rotation": 90} if 0.5 * _LARGEST_TEXT * longest > wide else {}
    ax.set_xticks([column + 0.5 for column in range(len(modules))], below, fontsize=_LARGEST_TEXT, **turned)
    for side in (ax, beside):
        side.tick_params(length=0)
        side.spines[:].set_visible(False)
    ax.set(ylabel="layer", xlabel="module (sum over its layers)")
    beside.set_ylabel("(sum over its modules)")
    figure: Any = ax.get_figure()
    room = {} if figure.get_layout_engine() else {"pad": 0.2}  # a layout engine makes room by itself
    label = f"rank kept\n(uniform would be {mean:.1f})"
    bar = figure.colorbar(mesh, ax=ax, ticks=_whole_numbers(6), label=label, **room)
    bar.ax.set_ylim(0, most)
    bar.ax.axhline(mean, color="white", linewidth=1.5)
    bar.outline.set_visible(False)
    return ax


def make_figure(width: float = 7.2, height: float = 4.0) -> Figure:
    """An empty figure of `width` × `height` inches that shows itself as a cell's result, without pyplot.

    It keeps its background when the page is dark: text on an opaque ground can be read in every theme.
    """
    return _figure_class()(figsize=(width, height), dpi=SCREEN_DPI, layout="constrained")


@cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A `Figure` that a fresh kernel can show: IPython learns of plain ones only when pyplot is imported."""

        def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
            from io import BytesIO

            image = BytesIO()
            # Twice the screen's dots and half their size, so that it is sharp on every screen.
            self.savefig(image, format="png", dpi=2 * SCREEN_DPI)
            width, height = self.get_size_inches()
            return image.getvalue(), {
                "width": round(width * SCREEN_DPI),
                "height": round(height * SCREEN_DPI),
            }

    return NotebookFigure


def _lowest_decade(counts: pd.Series[int]) -> float:
    """Where the scale starts: a power of ten clearly below the smallest count, so that it has a bar."""
    return 10.0 ** floor(log10(min(int(count) for count in counts if count > 0) / 3))


def _colours(owners: list[str]) -> list[str]:
    adapters = [owner for owner in owners if owner != "base"]
    return [
        BASE_COLOUR if owner == "base" else ADAPTER_COLOURS[adapters.index(owner) % len(ADAPTER_COLOURS)]
        for owner in owners
    ]


def _percent(share: float) -> str:
    return f"{share * 100:.2g} %" if share < 0.1 else f"{share * 100:,.0f} %"


def _check_columns(frame: pd.DataFrame, needed: tuple[str, ...], function: str, source: str) -> None:
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        names = ", ".join(map(repr, needed[:-1]))
        raise AdapterLabError(
            f"{function} needs the columns {names} and {needed[-1]!r} as {source} gives them; "
            f"missing: {', '.join(map(repr, missing))}."
        )


def _points(history: pd.DataFrame, column: str) -> pd.Series[float]:
    """The finite values of a column by their step; none where there is no such column."""
    import numpy as np
    import pandas as pd

    if column not in history.columns:
        return pd.Series(dtype=float)
    values = pd.Series(history[column].to_numpy(dtype=float, na_value=np.nan), index=history["step"].to_numpy())
    return values[np.isfinite(values)]


def _line(ax: Axes, values: pd.Series[float], label: str, **look: Any) -> None:
    if len(values):
        if len(values) < 3:  # a line of one point is not to be seen
            look.setdefault("marker", "o")
        ax.plot(values.index, values, label=label, **look)


def _rank_table(frame: pd.DataFrame) -> tuple[list[str], list[int | None], Any]:
    """Modules in the frame's order, layers ascending with those of no number last, and a masked array of ranks."""
    import numpy as np

    modules = list(dict.fromkeys(frame["module"]))
    numbered = frame["layer"].notna()
    layers: list[int | None] = [*sorted({int(layer) for layer in frame.loc[numbered, "layer"]})]
    if not numbered.all():
        layers.append(None)
    ranks = np.ma.masked_all((len(layers), len(modules)))
    for layer, has, module, rank in zip(frame["layer"], numbered, frame["module"], frame["rank"]):
        ranks[layers.index(int(layer) if has else None), modules.index(module)] = rank
    return modules, layers, ranks


def _cell_size(ax: Axes, rows: int, columns: int) -> tuple[float, float]:
    """(width, height) in points that a cell of the heatmap will about have: labels and the colour bar take their part."""
    box, points = ax.get_window_extent(), 72 / ax.get_figure(root=True).dpi  # type: ignore[union-attr]
    return 0.75 * box.width * points / columns, 1.1 * box.height * points / rows


def _write_cells(ax: Axes, ranks: Any, norm: Any, size: float) -> None:
    if size < _SMALLEST_TEXT:
        return
    centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size}
    for row, column in zip(*(~ranks.mask).nonzero()):
        rank = ranks[row, column]
        colour = "black" if norm(rank) > 0.47 else "white"  # whichever is easier to read on it
        ax.text(column + 0.5, row + 0.5, f"{rank:.0f}", color=colour, **centred)


def _around(middle: float, most: float) -> Any:
    """A norm from 0 to `most` with `middle` in its middle; where `middle` is at an end, that end is in the middle."""
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(middle, 0 if middle > 0 else -max(most, 1), most if middle < most else 2 * middle)


def _whole_numbers(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True)


def _text_colour() -> Any:
    from matplotlib import rcParams

    return rcParams["text.color"]
