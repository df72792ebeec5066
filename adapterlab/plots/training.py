"""A training over its steps: losses, and for AdaLoRA the ranks that were planned and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.plots.glyphs import drawable, families_for, plain, wrapped
from adapterlab.plots.style import ADAPTER_COLOURS, check_columns, make_figure, text_colour, whole_numbers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_training(history: pd.DataFrame, *, title: str = "") -> Figure:
    """Draw a training: its loss and held-out loss over the steps; for AdaLoRA below them the ranks, planned and kept.

    `history`: one row per logged step, as `TrainingRun.history` has it: `step` and `loss`, and where they are there
    `eval_loss`, `budget` and `total_rank`. What is NaN or infinite is left out, and a column of nothing else is not
    drawn. The figure displays itself in a notebook; its first Axes are the loss, its second the ranks. `history` is
    unchanged. Raises `AdapterLabError` when a column is missing or there is no loss of either kind.
    """
    check_columns(history, ("step", "loss"), "plot_training", "TrainingRun.history")
    loss, held_out = points(history, "loss"), points(history, "eval_loss")
    if not len(loss) and not len(held_out):
        raise AdapterLabError("There is nothing to draw: no row of the history has a loss.")
    has_ranks = len(points(history, "total_rank")) > 0
    figure = make_figure(height=5.4 if has_ranks else 3.6)
    axes = figure.subplots(2, sharex=True, height_ratios=(3, 2)) if has_ranks else [figure.subplots()]
    top = axes[0]
    _line(top, loss, "training loss", color=ADAPTER_COLOURS[0], linewidth=1.4)
    _line(top, held_out, "held-out loss", color=ADAPTER_COLOURS[5], linewidth=1.8, marker="o")
    top.set_ylabel("loss (nats per token)")
    _over_steps(top)
    if has_ranks:
        draw_ranks_over_steps(axes[1], history)
    axes[-1].set_xlabel("step")
    if len(set(loss.index) | set(held_out.index)) == 1:
        middle = (loss if len(loss) else held_out).index[0]
        axes[-1].set_xlim(middle - 1, middle + 1)
    if title:
        shown = wrapped(title, 64, 1)
        families = families_for([shown])
        top.set_title(drawable(shown, families), loc="left", **plain(families))
    return figure


def draw_ranks_over_steps(ax: Axes, history: pd.DataFrame) -> None:
    """The sum of all ranks over the steps, `total_rank` as it was kept and `budget` as it was planned, into `ax`."""
    kept, budget = points(history, "total_rank"), points(history, "budget")
    _line(ax, kept, "kept", color=ADAPTER_COLOURS[4], linewidth=3, drawstyle="steps-post")
    dashes: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2, "drawstyle": "steps-post"}
    _line(ax, budget, "planned", color=text_colour(), **dashes)
    ax.set_ylabel("ranks, all layers")
    ax.set_ylim(0, 1.08 * max(kept.max(), budget.max() if len(budget) else 0, 1))
    _over_steps(ax)


def points(history: pd.DataFrame, column: str) -> pd.Series[float]:
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


def _over_steps(ax: Axes) -> None:
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(whole_numbers(10))
