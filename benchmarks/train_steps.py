"""Steps on a clock: the lab, plain Trainer and PEFT's own allocator, on the same batches, from the same weights.

A contender makes a Trainer; a round trains one Trainer of each. What is timed lies between the Trainer's own events, so
neither loading nor building a model is.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from measure import sound_base
from rounds import settled_memory
from train_record import Agreement, Padding, Race, StepTimes, Work
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from workloads import load_model, quiet_peft, share, write_adapters

from adapterlab import AdaLoraCallback, AdapterLab
from adapterlab.demo import demo_training_pairs
from adapterlab.trainer import LikeLengths
from adapterlab.training_data import make_collator, read_training_data

WARM = 2  # steps at the beginning of each run that do not count; AdaLoRA prunes in all others
TERM, ALLOCATION = "orthogonal term", "scoring and pruning"
PLAIN, AGAIN, LAB, ADALORA, PEFT = "plain_lora", "plain_lora_again", "lab_lora", "lab_adalora", "peft_adalora"
ORDERS = ("random", "group_by_length")  # transformers' default and the lab's
EPOCHS = 200  # for the shares, which cost nothing


@dataclass(frozen=True)
class TrainPlan:
    """steps: that count, in each round. r: LoRA's and AdaLoRA's at the start, in every linear layer."""

    model: str = "demo"
    rounds: int = 5
    steps: int = 8
    batch: int = 8
    r: int = 12

    @property
    def total(self) -> int:
        return WARM + self.steps

    @property
    def target_r(self) -> int:
        return 2 * self.r // 3


def load(name: str) -> tuple[Any, Any, list[dict[str, list[int]]]]:
    """The bare base in float32, its tokenizer, and the rows that the demo's pirate learned from."""
    model, tokenizer = load_model(name, "float32")
    return model, tokenizer, read_training_data(demo_training_pairs("pirate"), tokenizer).rows


class Stopwatch(TrainerCallback):
    """Seconds of each step, from its beginning until its loss is logged. Give it before all other callbacks."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # and not the summary at the end
            self.seconds.append(time.perf_counter() - self._began)


@contextmanager
def clocked(seconds: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)


class LabAllocation(AdaLoraCallback):
    """The lab's callback on a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        with clocked(self.seconds[TERM]):
            super().on_step_begin(*args, **kwargs)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with clocked(self.seconds[ALLOCATION]):
            super().on_optimizer_step(*args, **kwargs)


class PeftAllocation(TrainerCallback):
    """PEFT's own allocator, called where its documentation and the Trainer allow it.

    Its orthogonal term is part of the model's forward and backward, so it is timed once more by itself, when the step
    is over.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        with clocked(self.seconds[ALLOCATION]):
            model.base_model.update_and_allocate(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, *, model: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            with only_the_term(model.base_model) as forward, clocked(self.seconds[TERM]):
                forward().loss.backward()
            model.zero_grad()


@contextmanager
def only_the_term(tuner: Any) -> Iterator[Callable[[], Any]]:
    """`AdaLoraModel.forward` around a model that does nothing: what remains is PEFT's orthogonal term."""
    import torch

    own = dict(tuner.model.__dict__)
    tuner.model.forward = lambda: SimpleNamespace(loss=torch.zeros(()))
    try:
        yield tuner.forward
    finally:
        del tuner.model.__dict__["forward"]
        tuner.model.__dict__.update({key: value for key, value in own.items() if key == "forward"})


@dataclass
class Classroom:
    """What all contenders share: base tensors, rows, starting weights on disk, and a folder for the Trainer."""

    plan: TrainPlan
    model: Any
    tokenizer: Any
    rows: list[dict[str, list[int]]]
    folder: Path
    lab: AdapterLab = field(init=False)
    starts: dict[str, Path] = field(init=False)

    def prepare(self) -> Classroom:
        self.starts = write_adapters(self.model, starting_configs(self.plan), self.folder, acting=False)
        self.lab = AdapterLab(share(self.model), tokenizer=self.tokenizer)
        return self

    def arguments(self, **given: Any) -> TrainingArguments:
        usual = {
            "max_steps": self.plan.total,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": self.plan.batch,
            "train_sampling_strategy": "sequential",
            "dataloader_drop_last": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "prediction_loss_only": True,
            "remove_unused_columns": False,
        }
        return TrainingArguments(str(self.folder / "trainer"), **{**usual, **given})

    def lab_trainer(self, name: str, callbacks: list[Any], **given: Any) -> Trainer:
        """The lab's, on the adapter as it is at the start."""
        if name in self.lab.adapters:
            self.lab.delete_adapter(name)
        self.lab.load_adapter(self.starts[name], name)
        self.lab.set_adapter(None)
        return self.lab.trainer(name, self.rows, self.arguments(**given), callbacks=callbacks)

    def plain_trainer(self, model: Any, callbacks: list[Any], **given: Any) -> Trainer:
        """transformers' own, as one would write it, with the same padding."""
        trainer = Trainer(
            model=model,
            args=self.arguments(**given),
            train_dataset=self.rows,
            data_collator=make_collator(self.tokenizer),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def load_peft(self, name: str) -> Any:
        """A `PeftModel` with the adapter as it is at the start, to be trained, over the base's own tensors."""
        from peft import PeftModel

        with quiet_peft():
            return PeftModel.from_pretrained(share(self.model), str(self.starts[name]), is_trainable=True)


def starting_configs(plan: TrainPlan) -> dict[str, Any]:
    """LoRA, AdaLoRA and IA3 on what each adapts best: all linear layers; IA3 as PEFT chooses. AdaLoRA prunes after every
    step but the first two."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    everywhere = {"target_modules": "all-linear", "lora_alpha": plan.r, "task_type": "CAUSAL_LM"}
    return {
        "lora": LoraConfig(r=plan.r, **everywhere),
        "adalora": AdaLoraConfig(
            init_r=plan.r, target_r=plan.target_r, tinit=WARM - 1, tfinal=1, total_step=plan.total, **everywhere
        ),
        "ia3": IA3Config(task_type="CAUSAL_LM"),
    }


@contextmanager
def classroom(plan: TrainPlan, model: Any, tokenizer: Any, rows: list[Any]) -> Iterator[Classroom]:
    """The lab is closed and the folder gone at the end."""
    with TemporaryDirectory() as folder:
        room = Classroom(plan, model, tokenizer, rows, Path(folder)).prepare()
        try:
            yield room
        finally:
            room.lab.close()


# The race


@dataclass
class Finish:
    """A run at its end: seconds of the steps that count, AdaLoRA's work in them, and what was learned."""

    seconds: list[float]
    work: Mapping[str, list[float]]
    tensors: dict[str, Any]
    kept: dict[str, list[bool]]


def run_race(plan: TrainPlan, model: Any, tokenizer: Any, rows: list[Any], report: Callable[[str], None]) -> Race:
    """All contenders in each round, every round beginning with another one."""
    finishes: dict[str, list[Finish]] = defaultdict(list)
    with classroom(plan, model, tokenizer, rows) as room, sound_base():
        contenders: dict[str, Callable[[], Finish]] = {
            PLAIN: partial(run_plain, room, "lora"),
            LAB: partial(run_lab, room, "lora"),
            ADALORA: partial(run_lab, room, "adalora"),
            PEFT: partial(run_plain, room, "adalora"),
            AGAIN: partial(run_plain, room, "lora"),
        }
        names = list(contenders)
        with settled_memory():
            for number in range(plan.rounds):
                first = number * len(names) // plan.rounds
                for name in (*names[first:], *names[:first]):
                    gc.collect()
                    finishes[name].append(contenders[name]())
                steps = ", ".join(f"{name} {sorted(finishes[name][-1].seconds)[plan.steps // 2]:.3f}" for name in names)
                report(f"  round {number + 1} of {plan.rounds}, seconds a step: {steps}")
    return Race(
        layers=len(finishes[ADALORA][0].kept),
        r=plan.r,
        target_r=plan.target_r,
        batch=plan.batch,
        warm=WARM,
        widths=tuple(batch_widths([len(row["input_ids"]) for row in rows], plan)),
        times=tuple(StepTimes(name, tuple(tuple(f.seconds) for f in finishes[name])) for name in names),
        work=tuple(
            Work(name, what, tuple(seconds for finish in finishes[name] for seconds in finish.work[what]))
            for name in (ADALORA, PEFT)
            for what in (TERM, ALLOCATION)
        ),
        equal=(
            Agreement.fewest(
                "tensors", [equal_tensors(a.tensors, b.tensors) for a, b in zip(finishes[LAB], finishes[PLAIN])]
            ),
            Agreement.fewest(
                "triplets", [equal_triplets(a.kept, b.kept) for a, b in zip(finishes[ADALORA], finishes[PEFT])]
            ),
        ),
    )


def batch_widths(lengths: list[int], plan: TrainPlan) -> Iterator[int]:
    """How long the longest row is in each batch that counts: rows in their order, full batches, from the start again."""
    whole = len(lengths) // plan.batch
    for step in range(WARM, plan.total):
        first = step % whole * plan.batch
        yield max(lengths[first : first + plan.batch])


def run_lab(room: Classroom, name: str) -> Finish:
    from safetensors.torch import load_file

    watch, allocation = Stopwatch(), LabAllocation()
    trainer = room.lab_trainer(name, [watch, allocation] if name == "adalora" else [watch])
    trainer.train()
    saved = room.lab.save_adapter(name, room.folder / "trained")
    kept = allocation.rank_pattern if name == "adalora" else {}
    return _finish(watch, allocation.seconds, load_file(saved / "adapter_model.safetensors"), kept)


def run_plain(room: Classroom, name: str) -> Finish:
    from peft import get_peft_model_state_dict

    watch, allocation = Stopwatch(), PeftAllocation()
    model = room.load_peft(name)
    room.plain_trainer(model, [watch, allocation] if name == "adalora" else [watch]).train()
    if name == "lora":
        return _finish(watch, {}, get_peft_model_state_dict(model, save_embedding_layers=False), {})
    pattern = model.peft_config["default"].rank_pattern
    kept = {key.removesuffix(".lora_E.default"): triplets for key, triplets in pattern.items()}
    return _finish(watch, allocation.seconds, {}, kept)


def _finish(watch: Stopwatch, work: Mapping[str, list[float]], tensors: Any, kept: dict[str, list[bool]]) -> Finish:
    counted = {what: seconds[WARM:] for what, seconds in work.items()}
    return Finish(watch.seconds[WARM:], counted, {key: tensor.clone() for key, tensor in tensors.items()}, kept)


def equal_tensors(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[int, int]:
    """How many are equal to the bit, and how many names there are in both together."""
    import torch

    both = mine.keys() & theirs.keys()
    return sum(torch.equal(mine[key], theirs[key]) for key in both), len(mine.keys() | theirs.keys())


def equal_triplets(mine: dict[str, list[bool]], theirs: dict[str, list[bool]]) -> tuple[int, int]:
    """How many triplets both keep or both drop, of how many."""
    pairs = [pair for path, kept in mine.items() for pair in zip(kept, theirs.get(path, []))]
    return sum(a == b for a, b in pairs), sum(map(len, mine.values()))


# Padding


def run_padding(plan: TrainPlan, model: Any, tokenizer: Any, rows: list[Any], report: Callable[[str], None]) -> Padding:
    """One epoch in each order, in turns: a round draws other orders than the one before."""
    seconds: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    with classroom(plan, model, tokenizer, rows) as room, sound_base(), settled_memory():
        for number in range(plan.rounds + 1):
            for order in ORDERS if number % 2 else reversed(ORDERS):
                watch = Stopwatch()
                given = {"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": False, "seed": number}
                gc.collect()
                room.lab_trainer("lora", [watch], train_sampling_strategy=order, **given).train()
                if number:  # the first is for warmth
                    seconds[order].append(tuple(watch.seconds))
            report(f"  epochs: {number} of {plan.rounds}")
    lengths = [len(row["input_ids"]) for row in rows]
    return Padding(
        rows=len(rows),
        batch=plan.batch,
        lengths=(min(lengths), sum(lengths) / len(lengths), max(lengths)),
        shares=padding_shares(lengths, plan.batch, EPOCHS),
        times=tuple(StepTimes(order, tuple(seconds[order])) for order in ORDERS),
    )


def padding_shares(lengths: list[int], batch: int, epochs: int) -> dict[str, tuple[float, ...]]:
    """Order → share of positions that is padding, epoch by epoch, from the orders that the samplers give."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    numbers = torch.Generator().manual_seed(0)
    ours = LikeLengths(lengths, batch, seed=0)
    theirs = LengthGroupedSampler(batch, lengths=lengths, generator=numbers)

    def shares(draw: Callable[[], list[int]], epoch: int) -> float:
        ours.set_epoch(epoch)
        return padding_share([lengths[place] for place in draw()], batch)

    draws: dict[str, Callable[[], list[int]]] = {
        "random": lambda: torch.randperm(len(lengths), generator=numbers).tolist(),
        "group_by_length": lambda: list(ours),
        "transformers": lambda: list(theirs),
    }
    return {order: tuple(shares(draw, epoch) for epoch in range(epochs)) for order, draw in draws.items()}


def padding_share(lengths: list[int], batch: int) -> float:
    """Of rows of these lengths, cut into batches as they stand."""
    batches = [lengths[first : first + batch] for first in range(0, len(lengths), batch)]
    return 1 - sum(lengths) / sum(max(rows) * len(rows) for rows in batches)
