"""Pictures of the lab's frames: a DataFrame goes in, matplotlib Axes come out. Nothing here sees a model.

No pyplot: figures belong to whoever asked for them, and nothing stays open behind their back.
"""

from __future__ import annotations

from functools import cache
from math import floor, log10
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
    missing = [name for name in ("owner", "parameters") if name not in frame.columns]
    if missing:
        raise AdapterLabError(
            f"plot_parameters needs the columns 'owner' and 'parameters' as lab.parameters() gives them; "
            f"missing: {', '.join(map(repr, missing))}."
        )
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
