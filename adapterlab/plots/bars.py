"""Horizontal stacked bars of bytes: what memory and estimates have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterlab.plots.glyphs import drawable, families_for, plain, wrapped
from adapterlab.plots.style import USUAL_TEXT, make_room, people_bytes, quiet_bars, text_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

HIGH = 0.62  # of a bar, which has 1
_ROUND = re.compile(r"\.0+(?= )|(?<=\.\d)0(?= )")  # 20.0 MB and 1.50 GB on an axis are 20 MB and 1.5 GB


def paint(colour: str, shade: float, computed: bool) -> dict[str, Any]:
    """How a part looks, in its bar and in its key: hatched where it was computed."""
    from matplotlib.colors import to_rgba

    look: dict[str, Any] = {"facecolor": to_rgba(colour, shade), "linewidth": 0}
    if computed:
        look |= {"hatch": "////", "edgecolor": text_colour()}
    return look


def key(place: tuple[float, float], size: tuple[float, float], **look: Any) -> Rectangle:
    """A swatch for a legend."""
    from matplotlib.patches import Rectangle

    return Rectangle(place, *size, **look)


def finish_bars(ax: Axes, names: Sequence[str], ends: Sequence[float], labels: Sequence[str]) -> None:
    """Name the bars (from the top down; a name may have lines of its own), and write their labels at their ends."""
    names = ["\n".join(map(wrapped, name.split("\n"))) for name in names]
    families = families_for(names)
    size = USUAL_TEXT if any("\n" in name for name in names) else None
    ax.set_yticks(range(len(names)), [drawable(name, families) for name in names], fontsize=size, **plain(families))
    texts = []
    for place, (end, label) in enumerate(zip(ends, labels)):
        look: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": USUAL_TEXT}
        texts.append(ax.annotate(label, (end, place), **look))
        texts[-1].set_in_layout(False)
    quiet_bars(ax)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.xaxis.set_major_formatter(lambda value, _: _ROUND.sub("", people_bytes(value)) if value else "0")
    ax.locator_params(axis="x", nbins=6)
    ax.set_xlim(0, make_room(ax, ends, texts) or 1)
