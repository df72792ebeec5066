"""A training as it goes on: what transformers' Trainer calls back → `Progress` records, handed to a plain function."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from adapterlab.adalora import AdaLoraCallback
from adapterlab.layers import layer_and_module

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a training is.

    step: optimizer steps done, of total. seconds: since it began. loss, eval_loss: those that were measured just now, None
    where none was. measuring: the held-out data is being read.
    ranks: for AdaLoRA layer, module, rank (kept) and init_r, one row per layer, as `lab.ranks` has them; None otherwise.
    The very same frame comes again as long as no rank has changed.
    """

    step: int
    total: int
    seconds: float
    loss: float | None = None
    eval_loss: float | None = None
    measuring: bool = False
    ranks: pd.DataFrame | None = None


def watching(adapter_name: str, method: str, tell: Callable[[Progress], object]) -> list[TrainerCallback]:
    """Callbacks for `lab.train(…, callbacks=…)` that call `tell` in the thread that trains: when it begins, after each step
    and each measured loss, and for each batch of held-out data.

    method: the adapter's, in any case. What `tell` raises ends the training, as with any callback of the Trainer's.
    """
    if method.upper() != "ADALORA":
        return [_Watcher(adapter_name, tell)]
    allocation = AdaLoraCallback(adapter_name)
    return [allocation, _Watcher(adapter_name, tell, allocation)]  # in this order: its ranks are those of the step


class _Watcher(TrainerCallback):
    def __init__(
        self, name: str, tell: Callable[[Progress], object], allocation: AdaLoraCallback | None = None
    ) -> None:
        self._name, self._tell, self._allocation = name, tell, allocation
        self._began = time.perf_counter()
        self._init_r = 0
        self._ranks: list[int] = []
        self._frame: pd.DataFrame | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        self._began = time.perf_counter()
        if self._allocation is not None:
            self._init_r = model.peft_config[self._name].init_r
        self._say(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log:  # the loss of this step comes in a moment
            self._say(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say(state, measuring=True)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **kwargs: Any) -> None:
        found = {key: logs[key] for key in ("loss", "eval_loss") if key in (logs or {})}
        if found:
            self._say(state, **found)

    def _say(self, state: Any, **more: Any) -> None:
        seconds = time.perf_counter() - self._began
        self._tell(Progress(state.global_step, state.max_steps, seconds, ranks=self._now(), **more))

    def _now(self) -> pd.DataFrame | None:
        """The ranks that are kept now; the frame of before if they are the same."""
        allocator = self._allocation.allocator if self._allocation is not None else None
        if allocator is None:
            return None
        ranks = allocator.ranks
        if ranks != self._ranks:
            import pandas as pd

            self._ranks = ranks
            rows = [
                (layer, module, rank, self._init_r)
                for (layer, module), rank in zip(layer_and_module(allocator.paths), ranks)
            ]
            frame = pd.DataFrame(rows, columns=["layer", "module", "rank", "init_r"])
            self._frame = frame.astype({"layer": "Int64"})
        return self._frame
