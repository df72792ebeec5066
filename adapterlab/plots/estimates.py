"""What models would take in memory, case by case: `AdapterLab.estimate(…)` as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterlab.plots.bars import HIGH, finish_bars, key, paint
from adapterlab.plots.glyphs import drawable, families_for, plain, wrapped
from adapterlab.plots.style import BASE_COLOUR, MORE_COLOURS, USUAL_TEXT, make_figure, people_bytes, readable_on

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_KINDS = {  # in the order in which they lie in a bar
    "weights": BASE_COLOUR,
    "quantization": "#56b4e9",
    "gradients": "#e69f00",
    "optimizer": "#0072b2",
    "KV cache": "#009e73",
    "activations": "#cc79a7",
    "logits": "#d55e00",
}

Segment = tuple[int, float, float, str]  # (bar, where it begins, bytes, colour)


def plot_estimate(frame: pd.DataFrame, ax: Axes | None) -> Axes:
    """One bar per case, its segments by kind, the total at its end; see `plot_memory`. All `bytes` are above 0."""
    cases = list(dict.fromkeys(map(str, frame["case"])))
    kinds = [kind for kind in _KINDS if (frame["kind"] == kind).any()]
    others = [str(kind) for kind in dict.fromkeys(frame["kind"]) if kind not in _KINDS]
    colours = {kind: _KINDS[kind] for kind in kinds}
    colours |= {kind: MORE_COLOURS[place % len(MORE_COLOURS)] for place, kind in enumerate(others)}
    sources = frame["source"] if "source" in frame.columns else frame["kind"].map(lambda _: "computed")
    if ax is None:
        rows = -(-len(colours) // 4)
        ax = make_figure(height=0.9 + 0.2 * rows + 0.45 * len(cases)).add_subplot()
    totals = [float(frame.loc[frame["case"].map(str) == case, "bytes"].sum()) for case in cases]
    ax.set_xlim(0, max(totals))
    segments = _draw_segments(ax, frame, cases, colours, sources == "computed")
    keys = [key((0, 0), (1, 1), **paint(colour, 1, False)) for colour in colours.values()]
    look: dict[str, Any] = {"frameon": False, "fontsize": USUAL_TEXT, "borderaxespad": 0.2}
    names = [wrapped(kind, lines=1) for kind in colours]
    families = families_for(names)
    labels = [drawable(name, families) for name in names]
    legend = ax.legend(keys, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(keys), 4), **look)
    for text in legend.get_texts():
        text.set(**plain(families))
    ax.set_xlabel("memory, computed" if set(sources) == {"computed"} else "memory")
    finish_bars(ax, cases, totals, [people_bytes(total) for total in totals])
    _write_segments(ax, segments)
    return ax


def _draw_segments(
    ax: Axes, frame: pd.DataFrame, cases: list[str], colours: dict[str, str], computed: pd.Series[bool]
) -> list[Segment]:
    sums = frame["bytes"].groupby([frame["case"].map(str), frame["kind"].map(str), computed.rename("computed")]).sum()
    sizes: dict[Any, float] = {place: float(size) for place, size in sums.items()}
    segments: list[Segment] = []
    ends = dict.fromkeys(cases, 0.0)
    for case, kind, how in sorted(sizes, key=lambda place: (list(colours).index(place[1]), place[2])):
        size, bar = sizes[case, kind, how], cases.index(case)
        look = paint(colours[kind], 1, how and not computed.all())
        ax.barh(bar, size, left=ends[case], height=HIGH, **look)
        segments.append((bar, ends[case], size, colours[kind]))
        ends[case] += size
    return segments


def _write_segments(ax: Axes, segments: Sequence[Segment]) -> None:
    """The bytes of a segment into it, where there is room."""
    figure: Any = ax.get_figure(root=True)
    unit = ax.get_window_extent().width * 72 / figure.dpi / ax.get_xlim()[1]
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": USUAL_TEXT - 1, "in_layout": False}
    for bar, start, size, colour in segments:
        text = people_bytes(size)
        if 0.62 * (USUAL_TEXT - 1) * (len(text) + 1) < size * unit:
            ax.text(start + size / 2, bar, text, color=readable_on(colour), **look)
