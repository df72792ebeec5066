"""Base against each adapter: parameters, bytes in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.plots.glyphs import drawable, families_for, plain, wrapped
from adapterlab.plots.style import (
    USUAL_TEXT,
    check_columns,
    lay_out,
    make_figure,
    make_room,
    owner_colours,
    people_bytes,
    people_count,
    percent,
    quiet_bars,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_BAR, _THIN = 0.62, 0.24  # how high a bar is, an owner having 1
_LEAST = 1.2  # inches for the bars
_DECADE = 48  # points between two ticks, at least


@dataclass(frozen=True)
class _Bar:
    """One bar: where it lies (from the top, an owner taking 1), how long and how high it is, what stands beside it."""

    place: float
    count: int
    height: float
    text: str
    colour: str


def plot_parameters(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how large the base and each adapter are, as bars of their parameters on a logarithmic scale.

    `frame`: rows with `owner` ("base" or an adapter's name) and `parameters`, as `lab.parameters()` gives them; rows of
    one owner are added up. Beside each bar stand the exact number and its share of the base, since a logarithmic scale
    makes numbers that differ by a hundred both visible and hard to compare by eye; and below it, where the frame has
    these columns, `bytes` (in memory, with the `dtype`s, the largest first) and `bytes_on_disk`, in units of 10⁶.
    Two thin bars below an adapter's are parts of it: what lies in `modules_to_save` (of that `kind`, hatched), and what
    is `effective`, where AdaLoRA has pruned. An owner without parameters gets no bar, and its zero written out.

    `ax`: where to draw; by default a figure of its own, sized for the number of bars, which displays itself in a
    notebook (`plot_parameters(frame).figure`). Text and background follow matplotlib's style. `frame` is unchanged.
    Raises `AdapterLabError` when a column is missing or there is nothing to draw.
    """
    check_columns(frame, ("owner", "parameters"), "plot_parameters", "lab.parameters()")
    if not (frame["parameters"] > 0).any():
        raise AdapterLabError("There is nothing to draw: no row of the frame has parameters.")
    owners = list(dict.fromkeys(frame["owner"]))
    bars = _bars(frame, owners)
    own = ax is None
    if ax is None:
        two_lines = any("\n" in bar.text for bar in bars)
        ax = make_figure(height=0.8 + (0.5 if two_lines else 0.42) * (bars[-1].place + 1)).add_subplot()
    low = 10.0 ** floor(log10(min(bar.count for bar in bars if bar.count) / 3))  # so that the smallest has a bar too
    names = [wrapped(str(owner)) for owner in owners]
    families = families_for(names)
    places = [bar.place for bar in bars if bar.height == _BAR]
    size = USUAL_TEXT - 1 if any("\n" in name for name in names) else None
    ax.set_yticks(places, [drawable(name, families) for name in names], fontsize=size, **plain(families))
    ax.set_xscale("log")
    ax.set_xlim(low, max(bar.count for bar in bars))
    texts = [_draw(ax, bar, low) for bar in bars]
    quiet_bars(ax)
    ax.set_xlabel("parameters (logarithmic scale)")
    ax.set_ylim(bars[-1].place + 0.6, -0.6)
    ax.minorticks_off()
    if own:
        _widen(ax, texts)
    ends = [log10(max(bar.count, low) / low) for bar in bars]
    reach = max(make_room(ax, ends, texts), 0.5)
    ax.set_xlim(low, low * 10**reach)
    decades = range(ceil(log10(low)), ceil(log10(low) + max(ends)) + 1)
    step = ceil(_DECADE * reach / max(_width(ax), 1))
    ticks = [10.0**decade for decade in decades[::step] if decade <= log10(low) + reach]
    ax.set_xticks(ticks, [people_count(tick) for tick in ticks])
    return ax


def _bars(frame: pd.DataFrame, owners: list[str]) -> list[_Bar]:
    """The bars from the top down: for each owner one, and a thin one for each part of it that is told apart."""
    base = int(frame.loc[frame["owner"] == "base", "parameters"].sum())
    bars, place = [], 0.0
    for owner, colour in zip(owners, owner_colours(owners)):
        rows = frame[frame["owner"] == owner]
        count = int(rows["parameters"].sum())
        share = f" · {percent(count / base)} of base" if base and owner != "base" else ""
        text = f"{count:,}{share}" + "".join(f"\n{line}" for line in [_bytes(rows)] if line)
        bars.append(_Bar(place, count, _BAR, text, colour))
        for label, part in _parts(rows, count) if owner != "base" else []:
            place += 0.62
            bars.append(_Bar(place, part, _THIN, label, colour))
        place += 1.0 if bars[-1].height == _BAR else 0.85
    return bars


def _parts(rows: pd.DataFrame, count: int) -> list[tuple[str, int]]:
    """(what is written beside it, its parameters) of the parts of an adapter that are worth a bar."""
    found = []
    if "kind" in rows.columns:
        whole = rows[rows["kind"] == "modules_to_save"]
        part = int(whole["parameters"].sum())
        if part:
            size = f" · {people_bytes(whole['bytes'].sum())}" if "bytes" in rows.columns else ""
            found.append((f"{part:,} of these in modules_to_save{size}", part))
    effective = int(rows["effective"].sum()) if "effective" in rows.columns else count
    if effective < count:
        found.append((f"{effective:,} of these effective, the rest is pruned", effective))
    return found


def _bytes(rows: pd.DataFrame) -> str:
    """`6.29 MB in memory (float32) · 6.30 MB on disk`, or what of it is known."""
    parts = []
    if "bytes" in rows.columns:
        dtypes: list[str] = []
        if "dtype" in rows.columns:
            dtypes = list(rows.groupby("dtype", sort=False)["bytes"].sum().sort_values(ascending=False).index)
        named = [wrapped(str(dtype), lines=1) for dtype in dtypes[:2]]
        kinds = f" ({', '.join(named)}{', …' if len(dtypes) > 2 else ''})" if dtypes else ""
        parts.append(f"{people_bytes(rows['bytes'].sum())} in memory{kinds}")
    if "bytes_on_disk" in rows.columns and rows["bytes_on_disk"].notna().any():
        parts.append(f"{people_bytes(rows['bytes_on_disk'].sum())} on disk")
    return " · ".join(parts)


def _draw(ax: Axes, bar: _Bar, low: float) -> Any:
    """Draw one bar; gives the text beside it."""
    end = max(bar.count, low)
    look: dict[str, Any] = {"color": bar.colour}
    if bar.height == _THIN:
        look = {
            "facecolor": "none",
            "edgecolor": bar.colour,
            "hatch": "/////" if "modules_to_save" in bar.text else None,
        }
    ax.barh(bar.place, end, height=bar.height, **look)
    size = USUAL_TEXT if bar.height == _BAR else USUAL_TEXT - 1
    families = families_for([bar.text])
    beside = ax.annotate(
        drawable(bar.text, families),
        (end, bar.place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=size,
        linespacing=1.25,
        **plain(families),
    )
    beside.set_in_layout(False)
    return beside


def _widen(ax: Axes, texts: list[Any]) -> None:
    """Make the figure wider where names and numbers leave no room for bars."""
    figure: Any = ax.get_figure(root=True)
    lay_out(ax)
    needed = max(text.get_window_extent().width for text in texts) / figure.dpi + _LEAST
    figure.set_figwidth(figure.get_figwidth() + max(needed - _width(ax) / 72, 0))


def _width(ax: Axes) -> float:
    """Of the axes, in points."""
    figure: Any = ax.get_figure(root=True)
    return float(ax.get_window_extent().width * 72 / figure.dpi)
