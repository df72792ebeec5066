"""The Train tab: the form, the training to look at, and below them how one's own Trainer does it."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as w

from adapterlab.widgets.compat import classes
from adapterlab.widgets.data_form import Examples
from adapterlab.widgets.own_trainer import OwnTrainer
from adapterlab.widgets.state import PanelState
from adapterlab.widgets.train_form import TrainForm, TrainingWish
from adapterlab.widgets.train_run import RunView


class TrainView:
    """The functions are those of the form's and the fold's buttons."""

    def __init__(
        self,
        state: PanelState,
        run: RunView,
        on_train: Callable[[Callable[[], TrainingWish]], object],
        on_check: Callable[[Callable[[], tuple[Examples, float | None]]], object],
        on_stop: Callable[[], object],
        on_trainable: Callable[[str | None], object],
    ) -> None:
        self.form = TrainForm(state, on_train, on_check, on_stop)
        self.run = run
        self.own = OwnTrainer(state, on_trainable)
        title = w.HTML(
            '<div class="alab-title">Train<span class="alab-muted"> '
            "an adapter on examples of yours; base and the others keep every bit</span></div>"
        )
        parts = [title, self.form.box, run.box, self.own.fold.button, self.own.fold.body]
        self.box = classes(w.VBox(parts), "alab-section")
