"""`TrainingRun`: what a training did, as data that outlives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterlab.layers import layer_and_module

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_COLUMNS = ("step", "loss", "eval_loss", "learning_rate", "seconds")
_OF_ADALORA = ("orthogonality", "budget", "total_rank")


@dataclass(eq=False, repr=False)
class TrainingRun:
    """One run of `lab.train`.

    history: one row per logged step: step (from 1; 0 is before the first), loss (mean per token since the row before, the
        orthogonal term not in it), eval_loss (NaN where nothing was evaluated), learning_rate, seconds (since the start);
        for AdaLoRA also orthogonality (mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F), budget (planned) and total_rank (kept).
    ranks: for AdaLoRA one row per pruning and layer: step, layer, module, rank, score; empty otherwise.
    steps, total_steps: done and planned. stopped_early: by Stop or Ctrl-C. error: what ended it otherwise, "" if nothing.
    settings: the training arguments that were given or chosen. data, eval_data: what it learned from and was measured
        on, in words. padding: share of the positions of all batches that were padding.
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
        """The last training loss; None before the first step."""
        return _last(self.history, "loss")

    @property
    def eval_loss(self) -> float | None:
        """The last loss on held-out data; None if there was none."""
        return _last(self.history, "eval_loss")

    def plot(self) -> Figure:
        """Loss and held-out loss over the steps; for AdaLoRA also the ranks, planned and kept."""
        from adapterlab.plots import plot_training

        return plot_training(self.history, title=self.adapter_name)

    def __repr__(self) -> str:
        return f"TrainingRun({self.describe()})"

    def describe(self) -> str:
        """The run in one line of words."""
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
        from html import escape

        return f"<p>{escape(self.describe())}</p>{self.history.tail(10).to_html(index=False, border=0)}"


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
    return pd.DataFrame(rows, columns=["step", "layer", "module", "rank", "score"])


def _last(frame: pd.DataFrame, column: str) -> float | None:
    values = frame[column].dropna()
    return float(values.iloc[-1]) if len(values) else None
