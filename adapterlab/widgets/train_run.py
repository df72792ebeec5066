"""A training to look at: how far it is, its loss, and for AdaLoRA its ranks, while it runs and when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from adapterlab.pagetext import escape
from adapterlab.widgets.charts import loss_chart, ranks_table
from adapterlab.widgets.columns import FLUSH_SECONDS
from adapterlab.widgets.compat import classes, set_tooltip
from adapterlab.widgets.fold import Fold
from adapterlab.widgets.state import PanelState

if TYPE_CHECKING:
    import pandas as pd

    from adapterlab.runs import TrainingRun
    from adapterlab.watching import Progress

PHASES = {
    "ready": "getting ready…",
    "training": "training…",
    "measuring": "measuring the held-out loss…",
    "stopping": "stopping after this step…",
    "done": "done",
    "stopped": "stopped",
    "failed": "ended by an error",
}


@dataclass
class Track:
    """What is known of one training. phase: a key of `PHASES`. trained, held_out: (step, loss), in their order."""

    name: str
    code: str = ""
    phase: str = "ready"
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    trained: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    ranks: pd.DataFrame | None = None

    @property
    def runs(self) -> bool:
        return self.phase in ("ready", "training", "measuring", "stopping")

    def add(self, record: Progress) -> None:
        """Take in where it is now."""
        if self.phase != "stopping":
            self.phase = "measuring" if record.measuring else "training"
        self.step, self.total, self.seconds = record.step, record.total, record.seconds
        self.ranks = record.ranks
        if record.loss is not None:
            self.trained.append((record.step, record.loss))
        if record.eval_loss is not None:
            self.held_out.append((record.step, record.eval_loss))

    def end(self, run: TrainingRun | None) -> None:
        """Take in how it ended; None: by an error."""
        if run is None:
            self.phase = "failed"
            return
        self.phase = "stopped" if run.stopped_early else "done"
        self.step, self.total, self.seconds = run.steps, run.total_steps, run.seconds


class RunView:
    """The training that runs in this panel, else its last one.

    `begin`, `progress` and `finish` are called by the thread that trains. `on_compare()`: look at what was learned.
    """

    def __init__(self, state: PanelState, on_compare: Callable[[], object]) -> None:
        self._state = state
        self._track: Track | None = None
        self._before: Track | None = None
        self._flushed = 0.0
        self._drawn: Any = None  # the ranks on the screen
        self.head = w.HTML()
        self.chart = w.HTML()
        self.ranks = w.HTML()
        self.compare = w.Button(description="See it in Compare")
        set_tooltip(self.compare, "Open Compare, where the adapter has a column")
        self.code = classes(w.HTML(), "alab-code")
        self.code_fold = Fold("Code of this training", [self.code])
        line = classes(w.HBox([self.compare, self.code_fold.button]), "alab-folds")
        self.box = classes(w.VBox([self.head, self.chart, self.ranks, line, self.code_fold.body]), "alab-training")
        self.compare.on_click(lambda _: on_compare())
        state.observe(lambda _: self._render(), ["rows"])
        self._render()

    def begin(self, name: str, code: str) -> None:
        """A training of this adapter is about to start."""
        with self._state.lock:
            self._before, self._track = self._track, Track(name, code)
            self._render()

    def progress(self, record: Progress) -> None:
        """Take in where it is; draw at most ten times a second."""
        with self._state.lock:
            if self._track is None:
                return
            self._track.add(record)
            now = time.monotonic()
            if now - self._flushed >= FLUSH_SECONDS:
                self._flushed = now
                self._render()

    def stopping(self) -> None:
        """Stop was pressed: the step at work is still finished."""
        with self._state.lock:
            if self._track is not None and self._track.runs:
                self._track.phase = "stopping"
                self._render()

    def finish(self, run: TrainingRun | None) -> None:
        """It has ended, with this run or by an error; where it had not begun, what was there before is there again."""
        with self._state.lock:
            track = self._track
            if track is not None and run is None and not track.total:
                self._track = self._before
            elif track is not None:
                track.end(run)
            self._before = None
            self._render()

    def _render(self) -> None:
        with self._state.lock:
            self._draw()

    def _draw(self) -> None:
        track = self._track
        self.box.layout.display = None if track else "none"
        if track is None:
            return
        self.head.value = head_html(track)
        self.chart.value = loss_chart(track.trained, track.held_out, track.total)
        if track.ranks is not self._drawn:
            self._drawn = track.ranks
            self.ranks.value = "" if track.ranks is None else ranks_table(track.ranks)
        self.chart.layout.display = None if self.chart.value else "none"
        self.ranks.layout.display = None if self.ranks.value else "none"
        there = track.name in self._state.adapter_names and not track.runs
        self.compare.layout.display = None if there else "none"
        self.code.value = f"<pre>{escape(track.code)}</pre>"


def head_html(track: Track) -> str:
    """Its name, what it does now, a bar, and the numbers."""
    facts = [("Step", f"{track.step} of {track.total}" if track.total else "–")]
    for label, points in (("Loss", track.trained), ("Held-out loss", track.held_out)):
        if points:
            first = f' <span class="alab-muted">from {points[0][1]:.3f}</span>' if len(points) > 1 else ""
            facts.append((label, f"{points[-1][1]:.3f}{first}"))
    speed = track.step / track.seconds if track.seconds else 0.0
    if track.step and speed:
        facts.append(("Speed", people_speed(speed)))
    if track.runs and speed:
        facts.append(("Time left", people_seconds((track.total - track.step) / speed)))
    elif not track.runs:
        facts.append(("Took", people_seconds(track.seconds)))
    items = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts)
    name = escape(track.name)
    return (
        f'<div class="alab-run" data-phase="{track.phase}" data-step="{track.step}"><div class="alab-run-title"><b>{name}</b> '
        f'<span class="alab-muted">{PHASES[track.phase]}</span></div><progress class="alab-progress" aria-label="Steps of '
        f'{name}" max="{max(track.total, 1)}" value="{track.step}"></progress><dl class="alab-run-facts">{items}</dl></div>'
    )


def run_words(run: TrainingRun) -> str:
    """What came of a training, in a sentence or two."""
    name, took, loss = repr(run.adapter_name), people_seconds(run.seconds), _change(run, "loss")
    column = "It is a column in Compare."
    if run.stopped_early and not run.steps:
        return f"Stopped before the first step: {name} has learned nothing by it. {column}"
    if run.stopped_early:
        return f"Stopped {name} after {run.steps} of {run.total_steps} steps, {took}{loss}. What it learned is kept. {column}"
    steps = "1 step" if run.steps == 1 else f"{run.steps} steps"
    return f"Trained {name}: {steps} in {took}{loss}. {column}"


def _change(run: TrainingRun, column: str) -> str:
    values: Any = run.history[column].dropna().tolist()
    if not values:
        return ""
    return f", {column} {values[0]:.3f}" + (f" → {values[-1]:.3f}" if len(values) > 1 else "")


def people_speed(speed: float) -> str:
    """Steps in a second as people say them: `160 steps/s`, `2.5 steps/s`, `1.5 s a step`."""
    if speed < 1:
        return f"{1 / speed:.1f} s a step"
    return f"{speed:.1f} steps/s" if speed < 9.95 else f"{speed:.0f} steps/s"


def people_seconds(seconds: float) -> str:
    """`40 s`, `12 min`, `1 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
