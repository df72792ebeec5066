"""Results → a picture: seconds against the number of columns, a panel for each part. No pyplot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from record import Part, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart; markers tell them apart in grey.
LINES = {
    "in_turn": ("(c) in turn, set_adapter", "#d55e00", "s"),
    "merged": ("(d) in turn, pre-merged", "#e69f00", "D"),
    "peft_batch": ("(e) PEFT adapter_names", "#cc79a7", "^"),
    "lab": ("(f) the lab", "#0072b2", "o"),
    "floor": ("(b) bare batch, the floor", "#7d7d7d", "v"),
}


def draw(results: Results) -> Figure:
    """A figure with an opaque light ground, which can be read on a dark page too."""
    from matplotlib.figure import Figure

    across = min(3, max(1, len(results.parts)))
    down = -(-max(1, len(results.parts)) // across)
    figure = Figure(figsize=(4.2 * across, 3.6 * down + 0.9), dpi=120, layout="constrained", facecolor="white")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, part in zip(panels, results.parts):
        plot_part(part, ax=panel)
    for panel in panels[len(results.parts) :]:
        panel.set_visible(False)
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_part(part: Part, *, ax: Axes) -> Axes:
    """One panel: a line for each contender; a level line for one base generation, which is `(a)`."""
    from matplotlib.ticker import LogLocator

    columns = part.columns
    for contender, (label, colour, marker) in LINES.items():
        points = [(n, timing.median) for n in columns if (timing := part.find(contender, n)) is not None]
        if points:
            width = 2.4 if contender == "lab" else 1.5
            ax.plot(*zip(*points), color=colour, marker=marker, markersize=5, linewidth=width, label=label)
    one = part.find("one")
    if one is not None:
        ax.axhline(one.median, color="#000000", linewidth=1, linestyle=":", label="(a) base once")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.set_xticks(columns, [str(n) for n in columns])
    ax.set_xlabel("columns: base + adapters")
    ax.set_ylabel("seconds")
    ax.set_title(f"{part.model}\n{part.adapters}, {part.dtype}", fontsize=9)
    ax.grid(axis="y", alpha=0.3, linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
