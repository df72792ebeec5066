"""Pictures that change while one looks: the loss as lines, the ranks as a table of shades. Functions of data, as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterlab.pagetext import escape

if TYPE_CHECKING:
    import pandas as pd

Points = Sequence[tuple[int, float]]  # (step, loss)

_WIDE, _HIGH = (
    1000,
    200,
)  # of the drawing, which is stretched to its place; lines keep their width and words stand beside it
_TICKS = 5


def loss_chart(trained: Points, held_out: Points, total: int) -> str:
    """The loss over the steps as lines, of the training and of the data held out; "" where there is no point yet.

    The axes reach from step 0 to `total`, and from a round number below the least loss to one above the largest.
    """
    kinds = [("training", "trained", _finite(trained)), ("held out", "held", _finite(held_out))]
    kinds = [kind for kind in kinds if kind[2]]
    if not kinds:
        return ""
    losses = [loss for _, _, points in kinds for _, loss in points]
    ys = _round_ticks(min(losses), max(losses))
    xs = _step_ticks(max(total, *(step for _, _, points in kinds for step, _ in points), 1))
    low, high, last = ys[0], ys[-1], max(total, xs[-1])

    def place(step: float, loss: float) -> tuple[float, float]:
        return step / last * _WIDE, (high - loss) / (high - low) * _HIGH

    grid = "".join(f'<path class="alab-grid" d="M0 {place(0, y)[1]:.1f}H{_WIDE}"/>' for y in ys)
    lines = "".join(_line(name, [place(*point) for point in points]) for _, name, points in kinds)
    legend = "".join(
        f'<span class="alab-key alab-{name}"><svg viewBox="0 0 24 8" aria-hidden="true">{_line(name, [(2, 4), (22, 4)])}'
        f"</svg>{label} <b>{points[-1][1]:.3f}</b></span>"
        for label, name, points in kinds
    )
    beside = "".join(f'<span style="top:{place(0, y)[1] / _HIGH:.2%}">{y:g}</span>' for y in ys)
    below = "".join(f'<span style="left:{x / last:.2%}">{x}</span>' for x in xs)
    said = "; ".join(f"{label} {_told(points)}" for label, _, points in kinds)
    return (
        f'<div class="alab-chart"><div class="alab-legend"><span class="alab-muted">Loss, nats per token</span>{legend}</div>'
        f'<div class="alab-plot"><div class="alab-beside" aria-hidden="true">{beside}</div>'
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"Loss over {total} steps: {said}")}">{grid}{lines}</svg>'
        f'<div class="alab-below" aria-hidden="true">{below}</div></div>'
        '<div class="alab-axis alab-muted" aria-hidden="true">step</div></div>'
    )


def ranks_table(frame: pd.DataFrame) -> str:
    """Where an AdaLoRA adapter's ranks are: modules down, layers across, the shade of a cell its share of the rank at the
    start. The rank stands in each cell, the sums beside and below. `frame`: layer, module, rank, init_r."""
    rows = frame.to_dict("records")
    modules = list(dict.fromkeys(str(row["module"]) for row in rows))
    layers = sorted({_layer(row["layer"]) for row in rows})
    ranks = {(str(row["module"]), _layer(row["layer"])): int(row["rank"]) for row in rows}
    first = max((int(row["init_r"]) for row in rows), default=1)
    heads = "".join(f'<th scope="col">{_layer_name(layer)}</th>' for layer in layers)
    body = "".join(
        f'<tr><th scope="row">{escape(module)}</th>'
        + "".join(_cell(ranks.get((module, layer)), first) for layer in layers)
        + f"<td>{sum(ranks.get((module, layer), 0) for layer in layers)}</td></tr>"
        for module in modules
    )
    below = "".join(f"<td>{sum(ranks.get((module, layer), 0) for module in modules)}</td>" for layer in layers)
    kept, all_of_them = sum(ranks.values()), sum(int(row["init_r"]) for row in rows)
    return (
        f'<div class="alab-legend"><span class="alab-muted">Ranks kept</span> <span><b>{kept}</b> of {all_of_them}, '
        f"{kept / max(len(rows), 1):.1f} in a layer on average</span>"
        f'<span class="alab-muted">the stronger the shade, the more of {first}</span></div>'
        '<div class="alab-ranks" tabindex="0" role="region" aria-label="Ranks kept, by module and layer">'
        f'<table style="--alab-layers:{len(layers)}">'
        f'<thead><tr><th scope="col">layer</th>{heads}<th scope="col">sum</th></tr></thead><tbody>{body}</tbody>'
        f'<tfoot><tr><th scope="row">sum</th>{below}<td>{kept}</td></tr></tfoot></table></div>'
    )


def _finite(points: Points) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]


def _told(points: Points) -> str:
    step, loss = points[-1]
    if len(points) == 1:
        return f"{loss:.3f} at step {step}"
    return f"from {points[0][1]:.3f} at step {points[0][0]} to {loss:.3f} at step {step}"


def _line(name: str, points: Sequence[tuple[float, float]]) -> str:
    """A line; a dot on each point where these are few, or far apart as those of held-out data are."""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    drawn = f'<path class="alab-line alab-{name}" d="{path}"/>'
    if name == "held" or len(points) < 3:
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        drawn += f'<path class="alab-dots alab-{name}" d="{dots}"/>'
    return drawn


def _round_ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, of which the first is at most `low` and the last at least `high`."""
    step = _round_step(max(high - low, abs(high) * 0.01, 1e-6) / (_TICKS - 1))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _step_ticks(total: int) -> list[int]:
    step = max(1, round(_round_step(total / _TICKS)))
    return list(range(0, total + 1, step))


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, … that is `least` or more."""
    decade = 10.0 ** math.floor(math.log10(least))
    return next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= least * (1 - 1e-9))


def _layer(value: Any) -> float:
    """Its number; those without one come last."""
    try:
        return int(value)
    except (TypeError, ValueError):  # pandas' own word for what is missing
        return math.inf


def _layer_name(layer: float) -> str:
    return "–" if math.isinf(layer) else f"{layer:.0f}"


def _cell(rank: int | None, first: int) -> str:
    if rank is None:
        return "<td></td>"
    return f'<td class="alab-rank" style="--alab-shade:{min(rank / max(first, 1), 1):.2f}">{rank}</td>'
