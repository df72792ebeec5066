"""`AdapterTrainer`: transformers' Trainer on one adapter of a lab. It mounts the adapter while it works, saves and resumes
adapters natively, and stops before a step that would ruin the weights."""

from __future__ import annotations

import functools
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from adapterlab.adalora import AdaLoraCallback
from adapterlab.errors import AdapterLabError, StoppedError
from adapterlab.examples import IGNORED
from adapterlab.guards import one_training, put_back
from adapterlab.peaks import note, optimizer_tensors
from adapterlab.sessions import interrupt_stops

if TYPE_CHECKING:
    from adapterlab.adapters import Adapters


class NonFiniteError(AdapterLabError):
    """A loss or a gradient is NaN or infinite: the step was not taken."""


@dataclass(frozen=True)
class Before:
    """What a step changes, as it was before it: an exception in the middle of one would leave half of it."""

    step: int
    weights: list[tuple[torch.nn.Parameter, torch.Tensor]]
    kept: list[torch.Tensor]  # AdaLoRA's triplets


@dataclass(frozen=True)
class Session:
    """A lab, as its trainer sees it: `training()` and `using()` lend the model with the adapter mounted, and put back
    everything else afterwards."""

    name: str
    adapters: Adapters
    training: Callable[[], AbstractContextManager[Any]]
    using: Callable[[], AbstractContextManager[Any]]
    stop: threading.Event


class AdapterTrainer(Trainer):
    """transformers' `Trainer`, whose model is a lab's with one adapter mounted while it trains or evaluates.

    Made by `lab.trainer`. Everything else is transformers': arguments, callbacks, checkpoints, resuming. Checkpoints hold
    the adapter in PEFT's format. An AdaLoRA adapter gets an `AdaLoraCallback`. A loss or gradient that is not finite ends
    the training before it reaches the weights, with an `AdapterLabError`.
    """

    def __init__(self, session: Session, **trainer: Any) -> None:
        self.session = session
        self._inside = False
        self._started = time.perf_counter()
        self.took = 0.0
        self._positions, self._filled = 0, torch.zeros((), dtype=torch.int64)
        self._measured: list[
            tuple[float, int]
        ] = []  # of each batch that was evaluated: the sum of its loss, its tokens
        self.allocation: AdaLoraCallback | None = None
        self.before: Before | None = None  # while a step is taken
        with session.using() as model:
            super().__init__(model=model, **trainer)
            here = session.adapters  # a new set, and not before this one is whole: somebody may be counting the old one
            here.trainers = weakref.WeakSet([*here.trainers, self])
            for callback in (PrinterCallback, transformers.trainer.DEFAULT_PROGRESS_CALLBACK):
                self.remove_callback(callback)
            self._watch = _Watch(session.stop, self)
            self.add_callback(self._watch)
            if not self.args.disable_tqdm:
                self.add_callback(_Bar(session.name))
            config = session.adapters.mounts.adapters[session.name].config
            self.method = str(getattr(config.peft_type, "value", config.peft_type))
            if self.method == "ADALORA":
                given = [c for c in self.callback_handler.callbacks if isinstance(c, AdaLoraCallback)]
                self.allocation = given[0] if given else AdaLoraCallback(session.name)
                if not given:
                    self.add_callback(self.allocation)

    @property
    def padding(self) -> float:
        """Share of the positions of all batches trained on that were padding."""
        return 1 - int(self._filled) / self._positions if self._positions else 0.0

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, as transformers does; the lab's state is afterwards what it was, and the adapter has learned. `lab.stop()`
        and the first Ctrl-C end it after the step at work."""
        resume = self._checkpoint(resume_from_checkpoint)
        with one_training(), self.session.training(), interrupt_stops(self.session.stop):
            old = {id(tensor) for tensor in optimizer_tensors(self.optimizer)}  # an earlier training's: no news
            with put_back(functools.partial(self._leave, old)):
                self.model.config.use_cache = bool(getattr(self.args, "use_cache", False))
                self.before = None
                self._inside, self._started = True, time.perf_counter()
                try:
                    return super().train(resume_from_checkpoint=resume, **kwargs)
                except StoppedError:
                    if not self.session.stop.is_set():
                        raise
                    losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
                    return TrainOutput(self.state.global_step, sum(losses) / max(len(losses), 1), {})

    def _leave(self, old: set[int]) -> None:
        """End the training, wherever it is; twice is once. old: ids of the optimizer's tensors that were there before."""
        if self._inside:
            self._inside = False
            self.took = time.perf_counter() - self._started
        note("optimizer", lambda: [t for t in optimizer_tensors(self.optimizer) if id(t) not in old])
        note("importance averages", self.averages)
        self._take_back_half_a_step()
        if self.allocation is not None:
            self.allocation.finish()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, _Bar):
                callback.close()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _take_back_half_a_step(self) -> None:
        """A step that was begun and is not counted did not happen."""
        before = self.before
        if before is None or before.step != self.state.global_step:
            return
        for parameter, weights in before.weights:
            parameter.copy_(weights)
        if self.allocation is not None:
            self.allocation.forget_step(before.step + 1, before.kept)

    def averages(self) -> list[torch.Tensor]:
        """What AdaLoRA's allocation keeps from step to step, as large as the optimizer's state; empty for other methods."""
        allocator = None if self.allocation is None else self.allocation.allocator
        return [] if allocator is None else allocator.averages()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the adapter, as transformers does, whatever is selected in the lab."""
        if self._inside:
            return super().evaluate(*args, **kwargs)
        with self.session.using():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict with the adapter, as transformers does, whatever is selected in the lab."""
        with self.session.using():
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter in PEFT's format, whatever is selected in the lab."""
        if self._inside:
            super().save_model(output_dir, _internal_call)
            return
        with self.session.using():
            super().save_model(output_dir, _internal_call)

    # -- where transformers' own steps do not fit an adapter of a lab --------------------------------------------

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        if mask is not None:
            self._positions += mask.numel()
            self._filled = self._filled.to(mask.device) + mask.sum()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"The loss became {float(loss)} at step {self.state.global_step + 1}, and that step was not taken. Lower the "
                "learning rate, or look into the data."
            )
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; notes how many tokens the batch's loss is the mean of."""
        found = super().prediction_step(model, inputs, *args, **kwargs)
        labels = inputs.get("labels")
        if found[0] is not None and labels is not None:
            counted = labels if getattr(self.model.config, "is_encoder_decoder", False) else labels[:, 1:]
            tokens = int((counted != IGNORED).sum())
            self._measured.append((float(found[0]) * tokens, tokens))
        return found

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As transformers' own; its loss is the mean over the tokens. Theirs weighs the batches' means by rows, so it changes
        with the batch size."""
        self._measured.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        tokens = sum(count for _, count in self._measured)
        if f"{metric_key_prefix}_loss" in output.metrics and tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = sum(loss for loss, _ in self._measured) / tokens
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "eval_loss" in logs:
            logs["seconds"] = time.perf_counter() - self._started
        if "loss" in logs and self.allocation is not None:
            logs.update(self.allocation.last())
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """transformers' "group_by_length" groups nothing in sets of less than eight batches, and can't be resumed in the
        middle of an epoch (issue 5)."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LikeLengths([len(row["input_ids"]) for row in rows], batch, self.args.seed)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        from safetensors import SafetensorError

        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
        there = folder.exists()
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # what Python, torch and safetensors say of a full disk
            if not there:
                shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint would be resumed from
            raise AdapterLabError(
                f"The checkpoint {str(folder)!r} can't be written: {' '.join(str(error).split())}. Make room, or name another "
                "output_dir."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """transformers' own writes what is mounted too, but asks the Hub about the base (issue 5)."""
        from adapterlab.storage import write_files

        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config, state = self.session.adapters.state(self.session.name)
        write_files(folder, config, state, self.session.adapters.base_path)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """transformers' own takes a native adapter for a sharded model (transformers issue 34660)."""
        self._take(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._take(Path(self.state.best_model_checkpoint))

    @torch.no_grad()
    def _take(self, folder: Path) -> None:
        from adapterlab.mounts import PREFIX
        from adapterlab.preflight import read_weights

        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise AdapterLabError(f"{str(folder)!r} is no checkpoint of an adapter: it has no {file.name}.")
        stored = {key.removeprefix(PREFIX): value for key, value in read_weights(file).items()}
        here = self.session.adapters.state(self.session.name)[1]
        strange = sorted(
            key
            for key in stored.keys() | here.keys()
            if key not in stored or key not in here or stored[key].shape != here[key].shape
        )
        if strange:
            raise AdapterLabError(
                f"{str(folder)!r} is a checkpoint of another adapter: {len(strange)} tensors differ, such as {strange[0]}."
            )
        for key, tensor in here.items():
            tensor.copy_(stored[key])

    def _checkpoint(self, given: str | os.PathLike[str] | bool | None) -> str | None:
        from adapterlab.checkpoints import find_checkpoint

        folder = find_checkpoint(given, self.args.output_dir)
        if folder is None:
            return None
        self.args.resume_from_checkpoint = str(folder)  # where AdaLoraCallback looks
        return str(folder)


class LikeLengths(torch.utils.data.Sampler[int]):
    """Rows in random order, but those of like length in one batch; a function of seed and epoch.

    Pools of `POOL` batches are drawn, each is sorted by length and cut into batches, and these are shuffled. A batch that
    is not full comes last.
    """

    POOL = 16

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader, also when resuming."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        numbers = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self), generator=numbers).tolist()
        whole = len(order) // self.batch * self.batch
        size = self.POOL * self.batch
        pools = [order[start : min(start + size, whole)] for start in range(0, whole, size)]
        flat = [place for pool in pools for place in sorted(pool, key=lambda place: self.lengths[place])]
        batches = [flat[start : start + self.batch] for start in range(0, whole, self.batch)]
        for chosen in torch.randperm(len(batches), generator=numbers).tolist():
            yield from batches[chosen]
        yield from order[whole:]


class _Watch(TrainerCallback):
    """Looks for Stop after each piece of work, and at the gradients before they reach the weights."""

    def __init__(self, stop: threading.Event, trainer: AdapterTrainer) -> None:
        self.stop = stop
        self._trainer = weakref.ref(trainer)
        self.told = False  # how much the gradients take, which is the same at each step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.is_set():
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        if trainer is not None:
            trainer.before = None
        if self.stop.is_set():
            control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.is_set():
            raise StoppedError("Stopped in the middle of an evaluation, and a part of it would be no result.")

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if not self.told:
            note("gradients", lambda: [p.grad for p in model.parameters() if p.grad is not None])
            self.told = True
        self._remember(model, state.global_step)
        if getattr(optimizer, "scaler", None) is not None:
            return  # it leaves such steps out by itself
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise NonFiniteError(
                f"A gradient is not finite at step {state.global_step + 1}, and that step was not taken. Lower the learning "
                "rate, or look into the data."
            )

    def _remember(self, model: Any, step: int) -> None:
        trainer = self._trainer()
        if trainer is not None:
            allocator = None if trainer.allocation is None else trainer.allocation.allocator
            weights = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
            trainer.before = Before(step, weights, [] if allocator is None else allocator.kept)


class _Bar(TrainerCallback):
    """One line: steps, steps/s, time left, loss."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        self.close()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is not None:
            shown = {"loss": logs.get("loss"), "held out": logs.get("eval_loss")}
            told = [f"{label} {value:.3f}" for label, value in shown.items() if value is not None]
            if told:
                self.bar.set_postfix_str(", ".join(told))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the line as it is; twice is once."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
