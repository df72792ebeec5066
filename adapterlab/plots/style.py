"""What all plots share: figures without pyplot, colours, units, and how they stand on light, dark and paper."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart; grey is the base everywhere in the lab.
BASE_COLOUR = "#7d7d7d"
ADAPTER_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
# Six more for those who have more adapters: Paul Tol's muted ones, darker than the first six.
MORE_COLOURS = ("#999933", "#882255", "#44aa99", "#aa4499", "#117733", "#bb6655")
# Blue, grey, yellow: for colour-blind eyes, and ever lighter, so that it survives a grey print.
CELL_COLOURS = RANK_COLOURS = "cividis"
INK = "#0a0b0d"  # stands for "the page's own colour" while a picture for a page is drawn: see svg.py
SCREEN_DPI = 96
SMALLEST_TEXT, USUAL_TEXT = 6.0, 9.0  # in points


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


def check_columns(frame: pd.DataFrame, needed: tuple[str, ...], function: str, source: str) -> None:
    """Raise `AdapterLabError` with the names of the columns that `frame` lacks."""
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        names = ", ".join(map(repr, needed[:-1]))
        raise AdapterLabError(
            f"{function} needs the columns {names} and {needed[-1]!r} as {source} gives them; "
            f"missing: {', '.join(map(repr, missing))}."
        )


def owner_colours(owners: Sequence[str]) -> list[str]:
    """Grey for "base" and, in their order, a colour for each adapter; they come again after twelve."""
    colours = (*ADAPTER_COLOURS, *MORE_COLOURS)
    adapters = list(dict.fromkeys(owner for owner in owners if owner != "base"))
    return [BASE_COLOUR if owner == "base" else colours[adapters.index(owner) % len(colours)] for owner in owners]


def text_colour() -> Any:
    """The colour of text in the style that matplotlib has now."""
    from matplotlib import rcParams

    return rcParams["text.color"]


def for_a_page() -> bool:
    """Whether the picture that is being drawn becomes part of a page, which has its own colours and fonts."""
    return bool(text_colour() == INK)


def readable_on(colour: Any) -> str:
    """Black or white, whichever has more contrast on `colour`."""
    from matplotlib.colors import to_rgb

    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#010101" if luminance > 0.179 else "white"  # not "black", which an SVG leaves to the page to say


def percent(share: float) -> str:
    """0.00475 → `0.47 %`, 0.5 → `50 %`."""
    return f"{share * 100:.2g} %" if share < 0.1 else f"{share * 100:,.0f} %"


def people_count(number: float) -> str:
    """1000000 → `1 M`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def people_bytes(number: float) -> str:
    """6291456 → `6.29 MB`, in 10⁶ bytes."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= 0.9995 * size:
            digits = 2 if number < 9.995 * size else 1
            return f"{number / size:,.{digits}f} {unit}"
    return f"{number:.0f} B"


def short_number(value: float) -> str:
    """Two digits that tell: 0, 0.0012, 0.34, 5.0, 78, 910, 2e-7."""
    if value == 0 or value >= 99.5:
        return f"{value:.0f}"
    if value >= 0.00095:
        return f"{value:#.2g}".removesuffix(".")
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"


def whole_numbers(most: int) -> Any:
    """A locator of at most so many ticks, all on whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True)


def lay_out(ax: Axes) -> None:
    """Give the axes of a figure their places, where a layout engine does that, so that they can be measured."""
    figure: Any = ax.get_figure(root=True)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)


def make_room(ax: Axes, ends: Sequence[float], texts: Sequence[Any]) -> float:
    """How far an axis from 0 must reach so that each of `texts`, beginning at its `ends` + 6 points, stays inside `ax`."""
    figure: Any = ax.get_figure(root=True)
    lay_out(ax)
    wide, gap = ax.get_window_extent().width, 8 * figure.dpi / 72
    left = [max(1 - (text.get_window_extent().width + gap) / wide, 0.2) for text in texts]
    return max([end / share for end, share in zip(ends, left)], default=0.0)


def quiet_bars(ax: Axes) -> None:
    """A frame for horizontal bars: names at the left, a grid of faint lines behind."""
    ax.invert_yaxis()
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3, linewidth=0.8)
    ax.set_axisbelow(True)
