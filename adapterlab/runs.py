"""`TrainingRun`: what a training did, as data that outlives it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from adapterlab.columns import is_finite
from adapterlab.layers import layer_and_module

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_COLUMNS = ("step", "loss", "eval_loss", "learning_rate", "seconds")
_OF_ADALORA = ("orthogonality", "budget", "total_rank")
_OF_RANKS = ("step", "layer", "module", "rank", "score")
_FRAMES = ("history", "ranks")


@dataclass(eq=False, repr=False)
class TrainingRun:
    """One run of `lab.train`.

    history: one row per logged step: step (from 1; 0 is before the first), loss (nats per token of a step, the mean
        over the steps since the row before; the orthogonal term not in it), eval_loss (nats per token, the mean over all tokens
        of the held-out data; NaN where nothing was evaluated), learning_rate, seconds (since the start);
        for AdaLoRA also orthogonality (mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F), budget (planned) and total_rank (kept).
    ranks: for AdaLoRA one row per pruning and layer: step, layer, module, rank, score; empty otherwise.
    steps, total_steps: done and planned. stopped_early: by Stop or Ctrl-C. error: what ended it otherwise, "" if nothing.
    settings: the training arguments that were given or chosen. data, eval_data: what it learned from and was measured
        on, in words. padding: share of the positions of all batches that were padding.

    >>> run = lab.train("mine", pairs, method="adalora", init_r=4, target_r=2, max_steps=8)
    >>> run.method, run.steps, run.stopped_early
    ('AdaLoRA', 8, False)
    >>> run.history["step"].tolist()
    [1, 2, 3, 4, 5, 6, 7, 8]
    """

    adapter_name: str
    method: str
    history: pd.DataFrame
    ranks: pd.DataFrame
    steps: int
    total_steps: int
    seconds: float
    stopped_early: bool = False
    error: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    eval_data: str = ""
    padding: float = 0.0

    @property
    def loss(self) -> float | None:
        """The last training loss; None before the first step.

        >>> run = lab.train("mine", pairs, method="lora", max_steps=4)
        >>> run.loss == float(run.history["loss"].iloc[-1])
        True
        """
        return _last(self.history, "loss")

    @property
    def eval_loss(self) -> float | None:
        """The last loss on held-out data; None if there was none.

        >>> run = lab.train("mine", pairs[:3], method="lora", max_steps=4, eval_dataset=pairs[3:])
        >>> run.eval_loss == float(run.history["eval_loss"].iloc[-1])
        True
        """
        return _last(self.history, "eval_loss")

    def plot(self) -> Figure:
        """Loss and held-out loss over the steps; for AdaLoRA also the ranks, planned and kept.

        >>> figure = lab.train("mine", pairs, method="adalora", max_steps=8).plot()
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss (nats per token)', 'ranks, all layers']
        """
        from adapterlab.plots import plot_training

        return plot_training(self.history, title=self.adapter_name)

    def to_dict(self) -> dict[str, Any]:
        """The run as plain values that JSON has: frames as lists of rows, numbers that are missing or not finite as None.

        >>> import json
        >>> run = lab.train("mine", pairs, method="lora", max_steps=4)
        >>> written = (folder / "run.json").write_text(json.dumps(run.to_dict()))
        >>> json.loads((folder / "run.json").read_text())["steps"]
        4
        """
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        settings = {name: _finite_or_none(value) for name, value in self.settings.items()}
        return {**plain, "settings": settings, **{name: _rows(plain[name]) for name in _FRAMES}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingRun:
        """What `to_dict` gave. Raises TypeError, ValueError or KeyError for anything else.

        >>> run = lab.train("mine", pairs, method="lora", max_steps=4)
        >>> TrainingRun.from_dict(run.to_dict()).describe() == run.describe()
        True
        """
        frames = {name: _frame(values[name], name) for name in _FRAMES}
        run = cls(**{**values, **frames})
        texts = (run.adapter_name, run.method, run.error, run.data, run.eval_data)
        numbers = (run.steps, run.total_steps, run.seconds, run.padding)
        if not all(isinstance(text, str) for text in texts) or not isinstance(run.settings, dict):
            raise TypeError("a text or the settings of a run are of another type")
        if not all(is_finite(number) for number in numbers) or not isinstance(run.stopped_early, bool):
            raise TypeError("a number of a run is none")
        return run

    def __repr__(self) -> str:
        return f"TrainingRun({self.describe()})"

    def describe(self) -> str:
        """The run in one line of words.

        >>> lab.train("mine", pairs, method="lora", max_steps=4).describe()
        "'mine' (LoRA) · 4 steps in ... s · loss ... → ..."
        """
        done = f"{self.steps} of {self.total_steps} steps" if self.steps < self.total_steps else f"{self.steps} steps"
        parts = [f"{self.adapter_name!r} ({self.method})", f"{done} in {self.seconds:.0f} s"]
        for label, column in (("loss", "loss"), ("held-out loss", "eval_loss")):
            values = self.history[column].dropna()
            if len(values):
                change = (
                    f"{values.iloc[0]:.3f} → {values.iloc[-1]:.3f}" if len(values) > 1 else f"{values.iloc[-1]:.3f}"
                )
                parts.append(f"{label} {change}")
        if "total_rank" in self.history and self.history["total_rank"].notna().any():
            parts.append(f"ranks {int(self.history['total_rank'].dropna().iloc[-1])} in all")
        if self.error:
            parts.append(f"ended by an error: {self.error}")
        elif self.stopped_early:
            parts.append("stopped")
        return " · ".join(parts)

    def _repr_html_(self) -> str:
        from adapterlab.pagetext import escape, table_html, without_maths

        return without_maths(f"<p>{escape(self.describe())}</p>{table_html(self.history.tail(10), border=0)}")


def history_frame(log: list[dict[str, Any]]) -> pd.DataFrame:
    """transformers' `log_history` as one row per step: training and evaluation of one step in one row."""
    import pandas as pd

    rows: dict[int, dict[str, Any]] = {}
    for entry in log:
        if "loss" in entry or "eval_loss" in entry:
            row = rows.setdefault(int(entry["step"]), {"step": int(entry["step"])})
            row.update({key: entry[key] for key in (*_COLUMNS[1:], *_OF_ADALORA) if key in entry})
    extra = [key for key in _OF_ADALORA if any(key in row for row in rows.values())]
    frame = pd.DataFrame([rows[step] for step in sorted(rows)], columns=[*_COLUMNS, *extra])
    return frame.astype({key: float for key in frame.columns if key != "step"})


def ranks_frame(paths: list[str], pruned: list[dict[str, Any]]) -> pd.DataFrame:
    """The long frame of prunings: step, layer, module, rank, score."""
    import pandas as pd

    where = layer_and_module(paths)
    rows = [
        {"step": one["step"], "layer": layer, "module": module, "rank": rank, "score": score}
        for one in pruned
        for (layer, module), rank, score in zip(where, one["ranks"], one["scores"])
    ]
    return pd.DataFrame(rows, columns=list(_OF_RANKS))


def _rows(frame: pd.DataFrame) -> dict[str, Any]:
    rows = [[_finite_or_none(value) for value in row] for row in frame.astype(object).to_numpy().tolist()]
    return {"columns": list(frame.columns), "rows": rows}


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _frame(table: Any, name: str) -> pd.DataFrame:
    import pandas as pd

    columns, rows = table["columns"], table["rows"]
    known = [*_COLUMNS, *_OF_ADALORA] if name == "history" else list(_OF_RANKS)
    if not isinstance(columns, list) or [one for one in known if one in columns] != columns or known[0] not in columns:
        raise ValueError(f"the columns of {name} are {repr(columns)[:80]}")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        raise TypeError(f"the rows of {name} are no table of {len(columns)} columns")
    frame = pd.DataFrame(rows, columns=columns)
    if name == "ranks" and not rows:  # as `ranks_frame` leaves it
        return frame
    whole = {"step": "int64", "rank": "int64"}
    return frame.astype({key: whole.get(key, "float64") for key in columns if key not in ("layer", "module")})


def _last(frame: pd.DataFrame, column: str) -> float | None:
    values = frame[column].dropna()
    return float(values.iloc[-1]) if len(values) else None
