"""What is in memory, and what would be: `lab.memory()` and `AdapterLab.estimate(…)` as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.plots.bars import HIGH, finish_bars, key, paint
from adapterlab.plots.estimates import plot_estimate
from adapterlab.plots.glyphs import drawable, families_for, plain, wrapped
from adapterlab.plots.style import (
    USUAL_TEXT,
    check_columns,
    lay_out,
    make_figure,
    owner_colours,
    people_bytes,
    text_colour,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

OPERATION = "last operation"  # the owner of what is there no more
_BIG = ("base", "process")  # owners that the second panel leaves out
_OWN = {"process": "#a8a8a8", "lab": "#f0e442", OPERATION: "#6f5fc0"}
_SHADES = (1.0, 0.62, 0.4, 0.28)  # of an owner's colour, for its kinds
_LINE, _LETTER, _SWATCH = 0.19, 0.082, 0.3  # inches that a line, a character and the colour of the table take
_NAMES = 1.6  # inches beside the bars, for their names
_LONGEST = 44  # characters of a name in the table


@dataclass(frozen=True)
class _Part:
    """One segment of a bar, and one line of the table."""

    bar: str
    device: str
    owner: str
    kind: str
    size: float
    computed: bool
    look: tuple[str, float, bool]  # colour, shade, whether it is hatched


def plot_memory(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw what is in memory, or what would be, as stacked bars on a linear scale.

    `frame`, as `lab.memory()` gives it: rows with `owner`, `kind`, `device`, `bytes` and, optionally, `source` ("measured"
    or "computed"). One bar per device for what is resident, and one for what the last operation had on top of it at its
    peak (rows of the owner "last operation"), which begins where the resident bar ends. Owners have colours and their kinds
    shades of it, the largest first. Where what is neither base nor process is small beside them, a second panel shows it
    alone, on a scale of its own. A table below has every part with its bytes, in the order of the bars.

    Or as `AdapterLab.estimate(…)` gives it: rows with `case`, `kind`, `bytes`. One bar per case, its segments by kind, all
    owners together, the total at its end.

    What was computed is hatched where other parts were measured; where all of an estimate is computed, its axis says so.
    `ax`: where to draw the bars alone, with their legend beside them; by default a figure of its own, which displays itself
    in a notebook (`plot_memory(frame).figure`). Gives the Axes of the bars. `frame` is unchanged. Raises `AdapterLabError`
    when a column is missing or there is nothing to draw.
    """
    if "case" in frame.columns:
        check_columns(frame, ("case", "kind", "bytes"), "plot_memory", "AdapterLab.estimate(…)")
    else:
        check_columns(frame, ("owner", "kind", "device", "bytes"), "plot_memory", "lab.memory()")
    if not (frame["bytes"] > 0).any():
        raise AdapterLabError("There is nothing to draw: no row of the frame has bytes.")
    if "case" in frame.columns:
        return plot_estimate(frame[frame["bytes"] > 0], ax)
    return _plot_memory(frame[frame["bytes"] > 0], ax)


def _plot_memory(frame: pd.DataFrame, ax: Axes | None) -> Axes:
    parts = _parts(frame)
    total = _sums(parts)
    starts = {part.bar: total.get(part.device, 0.0) if part.owner == OPERATION else 0.0 for part in parts}
    if ax is not None:
        _draw_bars(ax, parts, starts)
        _legend_beside(ax, parts)
        return ax
    small = [part for part in parts if part.owner not in _BIG]
    close = dict.fromkeys(_sums(small), 0.0)
    zoom = bool(small) and max(_sums(small).values()) < 0.4 * max(starts[bar] + total[bar] for bar in total)
    columns = _columns(parts)
    heights = [0.75 + 0.42 * len(total), *([0.75 + 0.42 * len(close)] if zoom else []), _LINE * (len(parts) + 1)]
    wide = sum(map(_column_width, columns)) + _SWATCH + _NAMES
    figure = make_figure(width=max(7.2, wide), height=sum(heights) + 0.3)
    axes = figure.subplots(len(heights), height_ratios=heights)
    if zoom:
        without = [owner for owner in _BIG if any(part.owner == owner for part in parts)]
        axes[0].set_title("everything", loc="left", fontsize=USUAL_TEXT)
        axes[1].set_title(f"the same without {' and '.join(without)}", loc="left", fontsize=USUAL_TEXT)
        _draw_bars(axes[1], small, close)
    _draw_bars(axes[0], parts, starts)
    _draw_table(axes[-1], parts, columns)
    return axes[0]


def _sums(parts: Sequence[_Part]) -> dict[str, float]:
    """Bar → bytes of its parts."""
    sums: dict[str, float] = {}
    for part in parts:
        sums[part.bar] = sums.get(part.bar, 0.0) + part.size
    return sums


def _parts(frame: pd.DataFrame) -> list[_Part]:
    """The segments, bar by bar; in each the owner with most first, and of each owner its largest part."""
    source = frame["source"] if "source" in frame.columns else frame["bytes"].map(lambda _: "measured")
    wanted = frame.assign(source=source, device=frame["device"].map(str), owner=frame["owner"].map(str))
    mixed = wanted["source"].nunique() > 1
    owners, devices = (list(dict.fromkeys(wanted[column])) for column in ("owner", "device"))
    adapters = [owner for owner in owners if owner not in _OWN]
    colours = {**dict(zip(adapters, owner_colours(adapters))), **_OWN}
    by_owner = wanted.groupby(["device", "owner"])["bytes"].sum()
    sums = wanted.groupby(["device", "owner", "kind", "source"], sort=False)["bytes"].sum()
    rows: list[Any] = [(*place, float(size)) for place, size in sums.items()]
    rows.sort(key=lambda r: (devices.index(r[0]), r[1] == OPERATION, -by_owner[r[0], r[1]], owners.index(r[1]), -r[4]))
    kinds: dict[str, list[str]] = {}
    for _, owner, kind, _, _ in sorted(rows, key=lambda row: row[2] != "weights"):
        kinds.setdefault(owner, []).append(kind)
    found = []
    for device, owner, kind, how, size in rows:
        shade = _SHADES[min(list(dict.fromkeys(kinds[owner])).index(kind), len(_SHADES) - 1)]
        bar, kind = _bar_of(device, owner, str(kind))
        look = (colours[owner], shade, how == "computed" and mixed)
        found.append(_Part(bar, device, owner, kind, size, how == "computed", look))
    return found


def _bar_of(device: str, owner: str, kind: str) -> tuple[str, str]:
    """(bar, kind). The last operation's kinds may say which one it was: `peak of compare: KV cache`."""
    if owner != OPERATION:
        return device, kind
    what, told, its = kind.partition(": ")
    return f"{what if told else OPERATION}\non {device}", its if told else kind


def _draw_bars(ax: Axes, parts: Sequence[_Part], starts: dict[str, float]) -> None:
    """The stacked bars with their sums at their ends. starts: where each begins; before it is only a shade."""
    bars, ends = list(starts), dict(starts)
    ghost: dict[str, Any] = {"color": text_colour(), "alpha": 0.1, "linewidth": 0}
    for place, bar in enumerate(bars):
        if starts[bar]:
            ax.barh(place, starts[bar], height=HIGH, **ghost)
    for part in parts:
        ax.barh(bars.index(part.bar), part.size, left=ends[part.bar], height=HIGH, **paint(*part.look))
        ends[part.bar] += part.size
    ax.set_xlim(0, max(ends.values()))
    labels = [("+ " if starts[bar] else "") + people_bytes(ends[bar] - starts[bar]) for bar in bars]
    finish_bars(ax, bars, list(ends.values()), labels)


def _columns(parts: Sequence[_Part]) -> list[list[str]]:
    """The table's words, column by column: owner, kind, device, bytes, and how they are known."""
    return [
        [wrapped(part.owner, _LONGEST, 1) for part in parts],
        [wrapped(part.kind, _LONGEST, 1) for part in parts],
        [wrapped(part.device, lines=1) for part in parts],
        [people_bytes(part.size) for part in parts],
        ["computed" if part.computed else "measured" for part in parts],
    ]


def _column_width(column: list[str]) -> float:
    return _LETTER * (max(map(len, column)) + 2)


def _draw_table(ax: Axes, parts: Sequence[_Part], columns: list[list[str]]) -> None:
    """A line for each part: a swatch of its colour, and the words; numbers stand one below the other."""
    families = families_for(text for column in columns for text in column)
    look: dict[str, Any] = {"va": "center", "fontsize": USUAL_TEXT, **plain(families)}
    ax.set_axis_off()
    lay_out(ax)
    figure: Any = ax.get_figure(root=True)
    ax.set(xlim=(0, ax.get_window_extent().width / figure.dpi), ylim=(len(parts) + 1, 0))  # inches, lines
    for row, part in enumerate(parts):
        ax.add_patch(key((0, row + 0.15), (0.2, 0.7), **paint(*part.look)))
    left = _SWATCH
    for number, column in enumerate(columns):
        width = _column_width(column)
        place, align = (left + width - 2 * _LETTER, "right") if number == 3 else (left, "left")
        for row, text in enumerate(column):
            ax.text(place, row + 0.5, drawable(text, families), ha=align, **look)
        left += width


def _legend_beside(ax: Axes, parts: Sequence[_Part]) -> None:
    keys = [key((0, 0), (1, 1), **paint(*part.look)) for part in parts]
    words = [f"{people_bytes(part.size)}  {owner} · {kind}" for part, owner, kind in zip(parts, *_columns(parts)[:2])]
    families = families_for(words)
    look: dict[str, Any] = {"frameon": False, "fontsize": USUAL_TEXT - 1, "loc": "upper left"}
    legend = ax.legend(keys, [drawable(text, families) for text in words], bbox_to_anchor=(1.02, 1), **look)
    for text in legend.get_texts():
        text.set(**plain(families))
