"""`AdaLoraCallback`: makes transformers' Trainer train AdaLoRA, which on its own it does not: nothing would be pruned, and
no orthogonal term would be in the gradient, without a word (peft issues 3373, 1327, 432)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from adapterlab.allocation import Allocator, Schedule, choose_schedule
from adapterlab.errors import AdapterLabError
from adapterlab.notices import say
from adapterlab.runs import ranks_frame

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

STATE_FILE = "adalora_state.safetensors"  # beside a checkpoint's own files
HISTORY_COLUMNS = ["step", "budget", "total_rank", "orthogonality", "threshold", "revived"]


class AdaLoraCallback(TrainerCallback):
    """Give AdaLoRA its rank allocation and its orthogonal term under a plain `transformers.Trainer`.

    >>> lab.add_adapter("adalora", "mine", init_r=4, target_r=2)
    >>> callback = AdaLoraCallback()
    >>> trainer = Trainer(model=lab.model, args=args, train_dataset=data, callbacks=[callback])
    >>> output = trainer.train()
    {'train_runtime': ...}
    >>> sum(map(sum, callback.rank_pattern.values())) == 2 * len(callback.rank_pattern)
    True

    model: a transformers model with a native AdaLoRA adapter (`lab.model`, or after `model.add_adapter`), or PEFT's
    `PeftModel`. adapter_name: which one, where there are several.

    total_step is the Trainer's own count. tinit, tfinal and deltaT are the config's, or chosen where it leaves PEFT's
    defaults (see `choose_schedule`); all four are written into the config. An adapter that was pruned before starts from
    the ranks it has. Pruning happens after each optimizer step, skipped ones and those with infinite gradients left out.

    orth_reg_weight times the mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F goes into the gradient once per optimizer step, whatever
    the gradient accumulation. It is no part of the loss that the Trainer reports, so training and evaluation loss compare
    with LoRA's; a `PeftModel`'s own term, which is part of both, is off meanwhile. Clipping sees it.

    Afterwards `history` (frame: step, budget, total_rank, orthogonality, threshold, revived; orthogonality is that mean,
    without the weight) and `ranks` (long frame: step, layer, module, rank, score) tell what happened, and `rank_pattern`
    which triplets stay. A `PeftModel`'s config gets it too, so that it saves the small file; a native model's does not,
    since transformers can neither save nor load that one. Checkpoints hold all triplets and the averages: resuming goes on
    where they were. After an exception out of a Trainer of your own, `finish()` brings the model to what the pattern says and
    a `PeftModel` to its own forward; the lab calls it by itself. Raises `AdapterLabError` where no AdaLoRA can be trained.
    Of the model only λ and gradients change.
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name = adapter_name
        self.allocator: Allocator | None = None
        self.schedule: Schedule | None = None
        self._steps: list[dict[str, Any]] = []
        self._pruned: list[dict[str, Any]] = []
        self._orthogonality: Tensor | None = None
        self._tuner: Any = None
        self._config: Any = None

    # -- what the Trainer calls ----------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Find the adapter, take the real number of steps, and take over a checkpoint's state when resuming."""
        self._steps, self._pruned = [], []
        model = _unwrapped(model)
        name, self._config = self._find(model)
        layers = _adalora_layers(model, name)
        self.allocator = Allocator(layers, name, self._config.beta1, self._config.beta2)
        if state.global_step:
            given = args.resume_from_checkpoint
            usual = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.restore(Path(given) if isinstance(given, (str, Path)) else usual)
        self._plan(state.max_steps, name)
        self._silence_peft(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any) -> None:
        """Put the orthogonal term's gradient where the loss's will be added to it."""
        import torch

        allocator = self._running()
        weight = self._config.orth_reg_weight
        scaler = getattr(optimizer, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        terms = list(allocator.compute_orthogonality())
        if not terms:
            return
        self._orthogonality = torch.stack([norm for _, norm, _ in terms]).mean()
        if not weight:
            return
        for parameter, _, slope in terms:
            slope = slope.mul_(weight * scale / len(terms))
            parameter.grad = slope if parameter.grad is None else parameter.grad + slope

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any) -> None:
        """Score and prune: the gradients of this step are still there."""
        allocator, schedule = self._running(), self.schedule
        step = state.global_step  # of the steps before this one
        entry: dict[str, Any] = {"step": step + 1, "threshold": None, "revived": 0}
        if not getattr(optimizer, "step_was_skipped", False):
            if schedule is None or step > schedule.last:
                allocator.hold()
            else:
                if step < schedule.last:
                    allocator.observe()
                if schedule.prunes(step):
                    self._prune(schedule.budget(step), entry)
                elif step <= schedule.tinit:
                    allocator.hold()
        entry["budget"] = schedule.budget(step) if schedule else allocator.initial
        entry["total_rank"] = sum(allocator.ranks)
        entry["orthogonality"] = self._orthogonality
        self._steps.append(entry)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lay the averages beside the checkpoint, so that it can be resumed."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            self.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as its pattern says."""
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and (Path(best) / STATE_FILE).is_file():
            self.restore(Path(best), history=False)
        self.finish()

    # -- for everyone --------------------------------------------------------------------------------------------

    @property
    def history(self) -> pd.DataFrame:
        """One row per optimizer step: step (from 1), budget (planned), total_rank (kept), orthogonality, threshold (the
        score that the kept are above; NaN where nothing was pruned), revived (triplets that came back).

        >>> callback = AdaLoraCallback()
        >>> run = lab.train("mine", pairs, method="adalora", max_steps=8, callbacks=[callback])
        >>> callback.history["step"].tolist()
        [1, 2, 3, 4, 5, 6, 7, 8]
        """
        import pandas as pd

        rows = [{**row, "orthogonality": _number(row["orthogonality"])} for row in self._steps]
        frame = pd.DataFrame(rows, columns=HISTORY_COLUMNS)
        return frame.astype({"threshold": float, "orthogonality": float})

    @property
    def ranks(self) -> pd.DataFrame:
        """One row per pruning and layer: step, layer, module, rank, score (the mean of its triplets').

        >>> callback = AdaLoraCallback()
        >>> run = lab.train("mine", pairs, method="adalora", max_steps=8, callbacks=[callback])
        >>> callback.ranks.equals(run.ranks)
        True
        """
        return ranks_frame(self.allocator.paths if self.allocator else [], self._pruned)

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """Which triplets stay, by the layer's path.

        >>> callback = AdaLoraCallback()
        >>> run = lab.train("mine", pairs, method="adalora", max_steps=8, callbacks=[callback])
        >>> [sum(kept) for kept in callback.rank_pattern.values()] == lab.ranks("mine")["rank"].tolist()
        True
        """
        return self._running().pattern()

    def last(self) -> dict[str, float]:
        """Orthogonality, budget and total rank after the newest step, for a log.

        >>> callback = AdaLoraCallback()
        >>> run = lab.train("mine", pairs, method="adalora", max_steps=8, callbacks=[callback])
        >>> sorted(callback.last())
        ['budget', 'orthogonality', 'total_rank']
        """
        newest = self._steps[-1] if self._steps else {}
        return {key: _number(newest[key]) for key in ("orthogonality", "budget", "total_rank") if key in newest}

    def finish(self) -> None:
        """End the run, wherever it is: λ of what does not stay is 0, and the config knows the pattern. Twice is once.

        >>> callback = AdaLoraCallback()
        >>> run = lab.train("mine", pairs, method="adalora", max_steps=8, callbacks=[callback])
        >>> callback.finish()
        >>> callback.last()["total_rank"] == int(lab.ranks("mine")["rank"].sum())
        True
        """
        if self._config is None or self.allocator is None:
            return
        if any(not bool(kept.all()) for kept in self.allocator.kept):
            self.allocator.hold()
        if self._tuner is not None:
            self._tuner.__dict__.pop("forward", None)
            if any(not bool(kept.all()) for kept in self.allocator.kept):
                pattern = self.allocator.pattern()
                self._config.rank_pattern = {f"{path}.lora_E": kept for path, kept in pattern.items()}
        self._tuner = self._config = None

    def forget_step(self, step: int, kept: list[Tensor]) -> None:
        """Step `step` is taken back: what stays is what stayed before it.

        >>> callback = AdaLoraCallback()
        >>> run = lab.train("mine", pairs, method="adalora", max_steps=8, callbacks=[callback])
        >>> callback.forget_step(8, callback.allocator.kept)
        >>> len(callback.history)
        7
        """
        if self.allocator is not None:
            self.allocator.kept = kept
        self._steps = [row for row in self._steps if row["step"] < step]
        self._pruned = [row for row in self._pruned if row["step"] < step]

    def save(self, folder: Path) -> None:
        """Write averages, pattern and history into `folder`.

        >>> callback = AdaLoraCallback()
        >>> run = lab.train("mine", pairs, method="adalora", max_steps=8, callbacks=[callback])
        >>> callback.save(folder)
        >>> (folder / "adalora_state.safetensors").is_file()
        True
        """
        from safetensors.torch import save_file

        told = {
            "steps": json.dumps([{**row, "orthogonality": _number(row["orthogonality"])} for row in self._steps]),
            "pruned": json.dumps(self._pruned),
            "initial": str(self._running().initial),
        }
        state = {key: value.contiguous().cpu() for key, value in self._running().state().items()}
        save_file(state, str(folder / STATE_FILE), metadata=told)

    def restore(self, folder: Path, *, history: bool = True) -> None:
        """Take over what `save` wrote; `AdapterLabError` if it is not there: the allocation can't go on without it.

        >>> callback = AdaLoraCallback()
        >>> run = lab.train("mine", pairs, method="adalora", max_steps=8, callbacks=[callback])
        >>> callback.save(folder)
        >>> callback.restore(folder)
        >>> len(callback.history)
        8
        """
        from safetensors import safe_open

        file = folder / STATE_FILE
        if not file.is_file():
            raise AdapterLabError(
                f"{str(folder)!r} has no {STATE_FILE}, so AdaLoRA's allocation can't be resumed from it: train anew, or "
                "resume from a checkpoint that was written with AdaLoraCallback."
            )
        with safe_open(str(file), framework="pt") as stored:
            state = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118, it is no mapping
            told = stored.metadata() or {}
        self._running().restore(state)
        self._running().initial = int(told["initial"])  # where the budget started, not what a pruned checkpoint holds
        if history:
            self._steps, self._pruned = json.loads(told["steps"]), json.loads(told["pruned"])

    # -- inside --------------------------------------------------------------------------------------------------

    def _running(self) -> Allocator:
        if self.allocator is None:
            raise AdapterLabError("AdaLoraCallback has seen no training yet: give it to a Trainer and call train().")
        return self.allocator

    def _find(self, model: Any) -> tuple[str, Any]:
        configs = dict(getattr(model, "peft_config", None) or {})
        ours = {name: config for name, config in configs.items() if _method(config) == "ADALORA"}
        if self.adapter_name is not None:
            if self.adapter_name not in ours:
                raise AdapterLabError(
                    f"{self.adapter_name!r} is no AdaLoRA adapter in this model, which has "
                    f"{', '.join(f'{name!r} ({_method(config)})' for name, config in configs.items()) or 'none'}."
                )
            return self.adapter_name, ours[self.adapter_name]
        trained = {name: config for name, config in ours.items() if _is_trained(model, name)}
        if len(trained) != 1:
            raise AdapterLabError(
                f"AdaLoraCallback found {len(trained)} trainable AdaLoRA adapters in this model"
                + (f" ({', '.join(trained)}): name one, AdaLoraCallback(name)." if trained else ": add one first.")
            )
        return next(iter(trained.items()))

    def _plan(self, total_step: int, name: str) -> None:
        allocator, config = self._running(), self._config
        tinit, tfinal, delta = choose_schedule(config, total_step, name)
        config.total_step, config.tinit, config.tfinal, config.deltaT = total_step, tinit, tfinal, delta
        config.rank_pattern = None  # set at the end: until then checkpoints hold all triplets
        target = config.target_r * len(allocator.paths)
        if allocator.initial > target:
            self.schedule = Schedule(total_step, tinit, tfinal, delta, allocator.initial, target)
        else:
            self.schedule = None
            say(
                f"{name!r} has {allocator.initial} ranks, within its {target}: they stay, and nothing is allocated anew."
            )

    def _silence_peft(self, model: Any) -> None:
        """Keep the term that PEFT's own forward adds out of the loss: it is in the gradient already, would be counted
        once per accumulated batch, and makes the evaluation loss look worse than LoRA's (issue 5)."""
        tuner: Any = getattr(model, "base_model", None)
        if type(tuner).__name__ == "AdaLoraModel":
            self._tuner = tuner
            tuner.__dict__["forward"] = tuner.model.forward

    def _prune(self, budget: int, entry: dict[str, Any]) -> None:
        allocator = self._running()
        before = allocator.kept
        scores, entry["threshold"] = allocator.prune(budget)
        entry["revived"] = sum(int((now & ~was).sum()) for now, was in zip(allocator.kept, before))
        self._pruned.append(
            {"step": entry["step"], "ranks": allocator.ranks, "scores": [_number(score.mean()) for score in scores]}
        )


def _adalora_layers(model: Any, name: str) -> dict[str, Any]:
    """PEFT's layers that hold the adapter, by their path in the model that PEFT wrapped."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    tuner: Any = getattr(model, "base_model", None)
    inner = tuner.model if type(tuner).__name__ == "AdaLoraModel" else model
    return {
        path: module
        for path, module in inner.named_modules()
        if isinstance(module, AdaLoraLayer) and name in module.lora_E
    }


def _is_trained(model: Any, name: str) -> bool:
    return any(layer.lora_E[name].requires_grad for layer in _adalora_layers(model, name).values())


def _unwrapped(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def _method(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _number(value: Any) -> Any:
    return float(value) if hasattr(value, "item") else value
