"""`lab.train` and `lab.trainer`: what the user asked for → transformers' TrainingArguments and an `AdapterTrainer` → a
`TrainingRun`. Each keyword goes where its name belongs: to TrainingArguments, to Trainer, or to the adapter's config."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterlab.columns import as_plain, is_finite
from adapterlab.errors import AdapterLabError
from adapterlab.examples import Problems
from adapterlab.guards import put_back
from adapterlab.notices import say
from adapterlab.training_data import TrainingData, make_collator, read_training_data

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from adapterlab.adapters import Adapters
    from adapterlab.runs import TrainingRun
    from adapterlab.trainer import AdapterTrainer, Session

DEFAULT_STEPS = 100
DEFAULT_BATCH = 8
MOST_ROWS_OF_HISTORY = 200  # a short run logs each step
# Learning rates that taught the demo model a style in some forty steps; per method, since IA3's few numbers need large steps
LEARNING_RATES = {"IA3": 8e-3, "ADALORA": 1e-2}
DEFAULT_LEARNING_RATE = 2e-3
# transformers 5.23 renamed these; either name will do with either version
_NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_OLD_NAMES = {new: old for old, new in _NEW_NAMES.items()}
# Fields of a config that PEFT, training or loading fill in
_NOT_OF_THE_USER = frozenset({
    "auto_mapping", "base_model_name_or_path", "deltaT", "inference_mode", "peft_version", "rank_pattern", "revision",
    "task_type", "tfinal", "tinit", "total_step",
})  # fmt: skip
_OURS = ("model", "args", "train_dataset", "eval_dataset", "processing_class", "model_init")


@dataclass
class Wish:
    """What the user asked for, sorted by where it belongs."""

    arguments: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    resume: Any = None


def sort_keywords(given: Mapping[str, Any], config_fields: set[str]) -> Wish:
    """Each keyword to its place by its name; `AdapterLabError` that lists those that have none."""
    from transformers import Trainer, TrainingArguments

    of_arguments = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    of_trainer = set(inspect.signature(Trainer.__init__).parameters) - {"self", *_OURS}
    wish, wrong = Wish(), []
    for name, value in given.items():
        known = next((n for n in (_NEW_NAMES.get(name), name, _OLD_NAMES.get(name)) if n in of_arguments), None)
        if name == "resume_from_checkpoint":
            wish.resume = value
        elif known is not None:
            wish.arguments[known] = as_plain(value)
        elif name in of_trainer:
            wish.trainer[name] = value
        elif name in config_fields:
            wish.config[name] = value
        else:
            near = difflib.get_close_matches(name, [*of_arguments, *of_trainer, *config_fields], n=1)
            wrong.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if wrong:
        raise AdapterLabError(
            f"{', '.join(wrong)}: no argument of transformers' TrainingArguments or Trainer, nor a field of the adapter's "
            "config."
        )
    return wish


def config_fields(method: Any) -> set[str]:
    """The fields that can be given beside a method's name; none beside a config, which has its own."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if not isinstance(method, str):
        return set()
    known = {str(getattr(kind, "value", kind)): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    cls = known.get(method.upper())
    return {f.name for f in dataclasses.fields(cls)} if cls is not None else set()


@dataclass
class Lessons:
    """The rows to learn from, those to be measured on, and how they are laid out in batches."""

    train: TrainingData
    held_out: TrainingData | None


def read_lessons(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, dataset: Any, eval_dataset: Any, max_length: Any, seed: int
) -> Lessons:
    """Both datasets as rows of tokens that the model has; `eval_dataset` may be a share to hold out, 0 to 1."""
    text = model.config.get_text_config()
    how = {
        "encoder_decoder": bool(getattr(model.config, "is_encoder_decoder", False)),
        "context": getattr(text, "max_position_embeddings", None),
        "max_length": max_length,
    }
    train = _with_known_tokens(read_training_data(dataset, tokenizer, **how), model, "dataset")
    if eval_dataset is None:
        return Lessons(train, None)
    if isinstance(eval_dataset, numbers.Real) and not isinstance(eval_dataset, bool):
        return Lessons(*train.split(float(eval_dataset), seed))
    held_out = read_training_data(eval_dataset, tokenizer, **how, label="eval_dataset")
    return Lessons(train, _with_known_tokens(held_out, model, "eval_dataset"))


def _with_known_tokens(data: TrainingData, model: Any, label: str) -> TrainingData:
    from adapterlab.vocabulary import HOW_TO_READ_THEM, token_without_row

    problems = Problems(label)
    for number, row in enumerate(data.rows, 1):
        if wrong := token_without_row(model, row["input_ids"], row["labels"]):
            problems.add(number, wrong)
    problems.raise_any(HOW_TO_READ_THEM)
    return data


def make_arguments(given: dict[str, Any], lessons: Lessons, model: Any, method: str, folder: str) -> TrainingArguments:
    """transformers' TrainingArguments: what was given, and for the rest what suits a small adapter.

    max_steps 100 (unless num_train_epochs is given), learning rate by method, batches of 8 or of all rows there are,
    rows of like length together, nothing reported and nothing saved unless asked, a line of history for each step of a
    short run, and an evaluation before the first step, after each quarter and at the end where there is held-out data.
    """
    from transformers import TrainingArguments

    chosen = dict(given)
    if chosen.get("num_train_epochs") is None:
        chosen.pop("num_train_epochs", None)
    if chosen.get("max_steps") is None:
        chosen["max_steps"] = -1 if "num_train_epochs" in chosen else DEFAULT_STEPS
    if chosen.get("learning_rate") is None:
        chosen["learning_rate"] = LEARNING_RATES.get(method, DEFAULT_LEARNING_RATE)
    _check_numbers(chosen)
    batch = chosen.setdefault("per_device_train_batch_size", min(DEFAULT_BATCH, len(lessons.train)))
    per_epoch = math.ceil(math.ceil(len(lessons.train) / batch) / chosen.get("gradient_accumulation_steps", 1))
    steps = chosen["max_steps"] if chosen["max_steps"] > 0 else math.ceil(chosen["num_train_epochs"] * per_epoch)
    usual: dict[str, Any] = {
        "report_to": "none",
        "logging_first_step": True,
        "logging_steps": max(1, steps // MOST_ROWS_OF_HISTORY),
        "warmup_steps": steps // 20,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "output_dir": folder,
    }
    if not {"output_dir", "save_steps"} & set(given):
        usual["save_strategy"] = "no"
    if model.device.type == "cpu":
        usual |= {"use_cpu": True, "dataloader_pin_memory": False}
    else:
        usual |= mixed_precision(model, given)
    if lessons.held_out is not None:
        usual["per_device_eval_batch_size"] = batch
        usual["eval_on_start"] = True
        if "eval_strategy" not in given:
            usual |= {"eval_strategy": "steps", "eval_steps": max(1, math.ceil(steps / 4))}
    try:
        return TrainingArguments(**{**usual, **chosen})
    except (TypeError, ValueError) as error:  # transformers' own verdict on values, in its words
        raise AdapterLabError(f"These training arguments can't be used: {' '.join(str(error).split())}") from error


def _check_numbers(chosen: dict[str, Any]) -> None:
    wrong = []
    for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
        value = chosen.get(name, 1)
        if (
            not isinstance(value, numbers.Integral)
            or isinstance(value, bool)
            or (value < 1 and (name, value) != ("max_steps", -1))
        ):
            wrong.append(f"{name}={value!r} is no whole number from 1 up")
    epochs = chosen.get("num_train_epochs", 1)
    if not is_finite(epochs) or epochs <= 0:
        wrong.append(f"num_train_epochs={epochs!r} is no number above 0")
    if chosen["max_steps"] == -1 and "num_train_epochs" not in chosen:
        wrong.append("max_steps=-1 leaves the number of steps to num_train_epochs: give that too")
    rate = chosen["learning_rate"]
    if not isinstance(rate, numbers.Real) or isinstance(rate, bool) or not math.isfinite(rate) or rate < 0:
        wrong.append(f"learning_rate={rate!r} is no number from 0 up")
    if wrong:
        raise AdapterLabError("These training arguments can't be used: " + "; ".join(wrong) + ".")


def mixed_precision(model: Any, given: Mapping[str, Any]) -> dict[str, bool]:
    """On a GPU: compute in the base's half precision, if that is what it is in; adapters stay float32."""
    import torch

    if {"bf16", "fp16"} & set(given):
        return {}
    if model.dtype == torch.bfloat16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return {"bf16": True}
    return {"fp16": True} if model.dtype == torch.float16 and torch.cuda.is_available() else {}


def train_obstacle(adapters: Adapters, name: str) -> str | None:
    """Why adapter `name` can't be trained here, whatever the data, or None if it can. Reads no weights."""
    layers = adapters.mounts.adapters[name].layers
    return base_train_obstacle(adapters) or adapter_train_obstacle(adapters, name, layers)


def base_train_obstacle(adapters: Adapters) -> str | None:
    """Why nothing can be trained over this base, or None if something can."""
    from adapterlab.quantization import quantization_of
    from adapterlab.rows import is_spread

    model = adapters.model
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        return f"nothing can be trained over weights that are quantised by {quantization_of(model)}: open another base."
    if any(parameter.is_meta for parameter in adapters.base.values()) and not is_spread(model):
        return (
            "accelerate keeps the whole base on disk or on the host, and transformers' Trainer would move it: load the "
            "base without offload, or a part of it only."
        )
    return None


def adapter_train_obstacle(adapters: Adapters, name: str, layers: Iterable[str]) -> str | None:
    """Why an adapter with layers at these paths can't be trained, or None if it can."""
    from adapterlab.allocation import allocation_obstacle
    from adapterlab.methods import train_packed_obstacle
    from adapterlab.quantization import packed_as

    config: Any = adapters.mounts.adapters[name].config
    for path in layers:
        packed = packed_as(adapters.mounts.sites[path].original)
        why = None if packed is None else train_packed_obstacle(method_of(config), packed)
        if why is not None:
            return why
    return allocation_obstacle(config) if method_of(config) == "ADALORA" else None


def make_trainer(
    session: Session, lessons: Lessons, arguments: TrainingArguments, tokenizer: Any, keywords: dict[str, Any]
) -> AdapterTrainer:
    """The trainer, ready to train; the lab is as before. Raises `AdapterLabError` with what `train_obstacle` says."""
    from adapterlab.quiet import quiet
    from adapterlab.trainer import AdapterTrainer

    why = train_obstacle(session.adapters, session.name)
    if why is not None:
        raise AdapterLabError(f"{session.name!r} can't be trained: {why}")
    keywords.setdefault("data_collator", make_collator(tokenizer, session.adapters.model))
    with quiet():
        return AdapterTrainer(
            session,
            args=arguments,
            train_dataset=lessons.train.rows,
            eval_dataset=None if lessons.held_out is None else lessons.held_out.rows,
            **keywords,
        )


class Learning:
    """A training of one adapter, and what is told of it."""

    def __init__(self, adapters: Adapters, name: str, lessons: Lessons, *, new: bool) -> None:
        self.adapters, self.name, self.lessons, self.new = adapters, name, lessons, new
        self.trainer: AdapterTrainer | None = None
        self._told: TrainingRun | None = None
        self._ended: BaseException | None = None

    def run(self, resume: Any) -> tuple[TrainingRun, BaseException | None]:
        """Train and tell: the run, and the exception that ended it, if one did. Stop is no exception."""
        assert self.trainer is not None  # it is made before
        try:
            self.trainer.train(resume_from_checkpoint=resume)
        except BaseException as error:
            self._ended = error
        run = self._tell()
        return run, None if run.steps and isinstance(self._ended, KeyboardInterrupt) else self._ended

    def _tell(self) -> TrainingRun:
        assert self.trainer is not None
        ended = self._ended
        interrupted = isinstance(ended, KeyboardInterrupt)
        run = _told(self.trainer, self.lessons)
        run.stopped_early = run.steps < run.total_steps and (ended is None or interrupted)
        if ended is not None and not interrupted:
            run.error = f"{type(ended).__name__}: {ended}" if not isinstance(ended, AdapterLabError) else str(ended)
        self._told = run
        return run

    def settle(self) -> None:
        """Whatever ended it, every step that was taken is in a run; a new adapter that has learned nothing goes again."""
        record = self.adapters.records.get(self.name)
        if record is None:
            return
        if self.trainer is not None and self.trainer.state.global_step:
            run = self._told or self._tell()
            if not any(known is run for known in record.runs):
                record.runs.append(run)
        elif self.new and not any(known is self._told for known in record.runs):
            self.adapters.delete(self.name)


@contextlib.contextmanager
def told_of(adapters: Adapters, name: str, lessons: Lessons, *, new: bool) -> Iterator[Learning]:
    """In the block an adapter learns, a `new` one is added first; afterwards the lab knows what came of it."""
    learning = Learning(adapters, name, lessons, new=new)
    with put_back(learning.settle):
        yield learning


def _told(trainer: AdapterTrainer, lessons: Lessons) -> TrainingRun:
    from adapterlab.methods import method_label
    from adapterlab.runs import TrainingRun, history_frame, ranks_frame

    state = trainer.state
    return TrainingRun(
        adapter_name=trainer.session.name,
        method=method_label(trainer.method),
        history=history_frame(state.log_history),
        ranks=trainer.allocation.ranks if trainer.allocation is not None else ranks_frame([], []),
        steps=state.global_step,
        total_steps=as_plain(max(state.max_steps, state.global_step)),
        seconds=trainer.took,
        settings=_settings(trainer.args),
        data=lessons.train.source,
        eval_data="" if lessons.held_out is None else lessons.held_out.source,
        padding=trainer.padding,
    )


def _settings(arguments: TrainingArguments) -> dict[str, Any]:
    """The arguments that say how it learned."""
    names = (
        "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "optim", "seed", "bf16", "fp16",
    )  # fmt: skip
    plain = {name: as_plain(getattr(arguments, name)) for name in names}
    return {
        name: str(getattr(value, "value", value)) if hasattr(value, "value") else value for name, value in plain.items()
    }


def method_of(method: Any) -> str:
    """PEFT's type of a method's name or config: `ADALORA`."""
    if isinstance(method, str):
        return method.upper()
    kind = getattr(method, "peft_type", None)
    return str(getattr(kind, "value", kind))


def check_same(name: str, config: PeftConfig, method: Any, fields: Mapping[str, Any]) -> None:
    """Running a cell again goes on training what it made; another adapter under that name is refused."""
    other = [] if method is None else differences(config, method, fields)
    if other:
        raise AdapterLabError(
            f"{name!r} is there already, and otherwise: {'; '.join(other[:4])}. Delete it first, choose another name, or leave "
            "out method to train it as it is."
        )


def with_what_is_kept(ended: BaseException, run: TrainingRun) -> BaseException:
    """The exception that ended a training, saying what remains of it."""
    kept = f"What {run.adapter_name!r} learned in {run.steps} steps is kept."
    if isinstance(ended, AdapterLabError):
        said = type(ended)(f"{ended} {kept}")
        said.__cause__ = ended.__cause__ or ended
        return said
    say(kept)
    return ended


def differences(config: PeftConfig, method: Any, fields: Mapping[str, Any]) -> list[str]:
    """What an adapter that is there has otherwise than what is asked for now, in words; empty if nothing."""
    from adapterlab.methods import make_config

    wanted = make_config(method, **fields).to_dict() if isinstance(method, str) else method.to_dict()
    have = config.to_dict()
    names = set(fields) if isinstance(method, str) else set(wanted) - _NOT_OF_THE_USER
    return [
        f"{name} {_plain(have.get(name))}, not {_plain(wanted[name])}"
        for name in sorted({"peft_type", *names})
        if _plain(have.get(name)) != _plain(wanted[name])
    ]


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, (set, list, tuple)) else value
