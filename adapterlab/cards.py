"""An adapter's model card, written from what the lab knows: every number in it is the lab's."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.pagetext import readable
from adapterlab.places import portable_name

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import ModelCard

    from adapterlab.adapters import Adapters
    from adapterlab.records import AdapterInfo, Record
    from adapterlab.runs import TrainingRun

RANKS_PICTURE = "ranks.png"  # beside the card of an AdaLoRA adapter
HERE = "<this repository>"  # where the card of a package names it: the Hub may put the user's name before
# Of a config: what is worth telling even where it is PEFT's default, and what is told elsewhere or to nobody.
_ALWAYS_TOLD = {
    "r", "init_r", "target_r", "alpha", "lora_alpha", "lora_dropout", "target_modules", "feedforward_modules",
}  # fmt: skip
_NOT_TOLD = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip
_UNUSED_BY_ADALORA = {"r", "rank_pattern"}  # it has init_r; and its ranks have a table
# What 5.15 leaves out without a word, and 5.23 does not
_LOST_BY_OLDER_TRANSFORMERS = {
    "modules_to_save": "the modules of `modules_to_save`",
    "trainable_token_indices": "the tokens of `trainable_token_indices`",
}
_OF_OTHERS = ("equals ", "approximates ")  # how the sources of weighted adapters begin
_MARKS = re.compile(r"[\\`*{}\[\]<>#|~$&!]|(?<!\w)_|_(?!\w)")
_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Base:
    """What a published adapter calls its base: a Hub id; or the last part of a local path, which is nobody else's
    business; or "" where the model in hand has no name."""

    name: str
    is_local: bool

    @property
    def hub_id(self) -> str | None:
        return self.name if self.name and not self.is_local else None


def base_of(record: Record, config: Any, base_path: str) -> Base:
    """The base to name: the config's Hub id, else the lab's, else the last part of what either calls it."""
    said = getattr(config, "base_model_name_or_path", None) or ""
    beside = [] if record.files is None else [record.files.folder.parent, record.files.folder]
    for name, folders in ((said, [Path(), *beside]), (base_path, [Path()])):
        found = _hub_id(name, folders)
        if found is not None:
            return Base(found, is_local=False)
    parts = [part for part in re.split(r"[/\\]", said or base_path) if part not in ("", ".", "..", "~")]
    return Base(parts[-1] if parts else "", is_local=bool(parts))


def _hub_id(name: str, folders: list[Path]) -> str | None:
    """`name` if it can be a Hub id and no folder here is called so; the id behind a path into the Hub's cache."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = portable_name(name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if any((folder / name).is_dir() for folder in folders) else name


# -- the card -----------------------------------------------------------------------------------------------------------


def make_card(adapters: Adapters, name: str, about: dict[str, Any], repo_id: str | None = None) -> ModelCard:
    """The model card of one adapter; `about` is what the lab says of itself. Reads the adapter's weights for its status."""
    from huggingface_hub import ModelCard, ModelCardData

    adapters.refresh([name])
    info, model = adapters.info(name), adapters.model
    base = base_of(adapters.records[name], info.peft_config, adapters.base_path)
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    tags = {"adapterlab", "transformers", *(getattr(model, "model_tags", None) or ())}
    tags |= {"lora"} if info.method == "LORA" else set()
    tags |= {f"base_model:adapter:{base.hub_id}"} if base.hub_id else set()
    data = ModelCardData(
        base_model=base.hub_id,
        library_name="peft",
        pipeline_tag=None if seq2seq else "text-generation",
        tags=sorted(tags),
    )
    sections = [
        _title(info, base),
        _base(base, about, info.peft_config),
        _method(info),
        _size(adapters, info),
        *_training(adapters.records[name], info),
        *_scores(info.runs),
        *_ranks(adapters, info),
        _loading(info, base, seq2seq, repo_id),
        "## Versions\n\n" + ", ".join(f"{library} {version}" for library, version in about["versions"].items()) + ".",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _title(info: AdapterInfo, base: Base) -> str:
    from adapterlab.methods import method_label

    method = method_label(info.method)
    return (
        f"# {_words(info.name)}\n\n{'An' if method[0] in 'AEIO' else 'A'} {method} adapter for {_linked(base)}: a small set of "
        "weights that changes what the model says and leaves the model's own weights as they are. Made with AdapterLab."
    )


def _linked(base: Base) -> str:
    if base.hub_id:
        return f"[{_words(base.name)}]({_HUB}/{base.name})"
    return _code(base.name) if base.name else "a model without a name"


def _base(base: Base, about: dict[str, Any], config: Any) -> str:
    held = f"{about['quantization']} quantised" if about["quantization"] else about["dtype"]
    lines = f"## Base\n\n- model: {_linked(base)}\n- in the lab: {_words(held)}"
    if config.revision:
        lines += f"\n- revision: {_code(config.revision)}"
    if base.is_local:
        lines += "\n\nThis is a local model: its name is that of a folder, and not of a repository on the Hub."
    return lines


def _method(info: AdapterInfo) -> str:
    from adapterlab.methods import PROVISIONAL_TOTAL_STEP, method_label

    config = info.peft_config
    lines = [f"- method: {method_label(info.method)}"]
    for one in dataclasses.fields(config):
        value = _plain(getattr(config, one.name))
        if one.name == "target_modules" and not value:
            value = list(info.target_modules)  # PEFT's choice for this architecture
        usual = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        told = value not in (None, [], {}, "") and (one.name in _ALWAYS_TOLD or value != _plain(usual))
        provisional = (one.name, value) == ("total_step", PROVISIONAL_TOTAL_STEP) and not info.runs
        hidden = _NOT_TOLD | (_UNUSED_BY_ADALORA if info.method == "ADALORA" else set())
        if told and not provisional and one.name not in hidden and not dataclasses.is_dataclass(value):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"- {one.name}: {_code(text)}")
    return "## Method\n\n" + "\n".join(lines)


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else value


def _size(adapters: Adapters, info: AdapterInfo) -> str:
    from adapterlab.inspection import base_size, parameters_frame

    base = base_size(adapters)[0]
    frame = parameters_frame(adapters)
    mine = frame[frame["owner"] == info.name]
    effective, dtypes = int(mine["effective"].sum()), ", ".join(sorted(set(mine["dtype"])))
    act = f", of which {effective:,} act and the others are pruned" if effective != info.parameters else ""
    return (
        f"## Size\n\n{info.parameters:,} parameters{act}: {_percent(info.parameters / base)} of the base's {base:,}. "
        f"{_megabytes(info.bytes)} (10⁶ bytes) in memory, {dtypes}."
    )


def _training(record: Record, info: AdapterInfo) -> list[str]:
    if not info.runs:
        return [f"## Training\n\n{_untrained(record, info)}"]
    parts = []
    if record.loaded is not None:
        parts.append(f"It was loaded{_origin(record)} and trained from there.")
    elif record.source.startswith(_OF_OTHERS):
        parts.append(f"It was made of other adapters ({_words(record.source)}) and trained from there.")
    for number, run in enumerate(info.runs, 1):
        heading = [f"### Run {number} of {len(info.runs)}"] if len(info.runs) > 1 else []
        parts.append("\n\n".join([*heading, *_run(run)]))
    return ["## Training\n\n" + "\n\n".join(parts)]


def _untrained(record: Record, info: AdapterInfo) -> str:
    if info.status == "untrained":
        return "Not trained in this lab, nor anywhere else: it changes nothing."
    if info.status == "random weights":
        return "Not trained in this lab, nor anywhere else: its weights are random numbers, as they were drawn."
    if record.source.startswith(_OF_OTHERS):
        return f"Not trained in this lab: made there of other adapters, and {_words(record.source)}."
    if info.status == "loaded":
        return f"Not trained in this lab, only loaded{_origin(record)}."
    return "Its weights were changed in the lab by other means than `lab.train`, which keeps no record of that."


def _origin(record: Record) -> str:
    """Where it was loaded from, if that is a repository: paths are nobody else's business."""
    folder = "" if record.files is None else str(record.files.folder)
    hub_id = portable_name(folder)
    return f" from {_linked(Base(hub_id, is_local=False))}" if hub_id != folder else ""


def _run(run: TrainingRun) -> list[str]:
    data = f"Trained on {_words(run.data)}" if run.data else "Trained"
    measured = f", measured on {_words(run.eval_data)}" if run.eval_data else ""
    steps = f"{run.steps} of {run.total_steps} steps" if run.steps < run.total_steps else f"{run.steps} steps"
    ended = "; an error ended it" if run.error else "; it was stopped" if run.stopped_early else ""
    lines = [f"{data}{measured}: {steps} in {run.seconds:.1f} s{ended}."]
    for label, column in (("Loss", "loss"), ("Held-out loss", "eval_loss")):
        ends = _ends(run.history, column)
        if ends:
            (first, before), (last, after) = ends
            change = f"{before:.3f} (step {first}) → {after:.3f} (step {last})" if last != first else f"{after:.3f}"
            lines.append(f"{label} in nats per token: {change}.")
    settings = dict(run.settings)
    limits = (("num_train_epochs", "max_steps") if settings.get("max_steps", -1) > 0 else ("max_steps",))[0]
    settings.pop(limits, None)  # of these two, one is in force
    rows = [(_code(key), _words(value)) for key, value in settings.items() if value is not None and value is not False]
    return [*lines, *([_table(("setting", "value"), rows)] if rows else [])]


def _scores(runs: tuple[TrainingRun, ...]) -> list[str]:
    rows = []
    for number, run in enumerate(runs, 1):
        ends = _ends(run.history, "eval_loss")
        if ends and ends[0][0] != ends[1][0]:
            told = [f"{loss:.3f} (step {step})" for step, loss in ends]
            rows.append((str(number), _words(run.eval_data) or "–", *told))
    if not rows:
        return []
    return [
        "## Scores\n\nLoss on held-out data, in nats per token:\n\n" + _table(("run", "data", "before", "after"), rows)
    ]


def _ends(history: pd.DataFrame, column: str) -> list[tuple[int, float]]:
    """(step, value) of the first and the last finite value; [] if there is none."""
    values = [
        (int(step), float(value)) for step, value in zip(history["step"], history[column]) if math.isfinite(value)
    ]
    return [values[0], values[-1]] if values else []


def _ranks(adapters: Adapters, info: AdapterInfo) -> list[str]:
    from adapterlab.inspection import ranks_frame_of

    if info.method != "ADALORA":
        return []
    frame = ranks_frame_of(adapters.mounts.adapters[info.name], info.name)
    rows = [
        (_code(str(module)), str(len(each)), str(each["rank"].sum()), f"{each['rank'].mean():.1f}")
        for module, each in frame.groupby("module", sort=False)
    ]
    kept, started = int(frame["rank"].sum()), int(frame["init_r"].sum())
    return [
        f"## Ranks\n\n{kept} of {started} ranks are kept, {frame['rank'].mean():.1f} on average over {len(frame)} places.",
        _table(("module", "layers", "ranks kept", "mean"), rows),
        f"![Ranks kept, by layer and module]({RANKS_PICTURE})",
    ]


def _loading(info: AdapterInfo, base: Base, seq2seq: bool, repo_id: str | None) -> str:
    auto = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    here, named = _quoted(repo_id or info.name), f"base = {_quoted(base.name or 'the-base-model')}"
    revision = getattr(info.peft_config, "revision", None) if base.hub_id else None
    at = f", revision={_quoted(revision)}" if revision else ""
    bare, notes = f"{auto}.from_pretrained(base{at})", []
    if repo_id is None:
        notes.append(f"Write its repository's id, or its folder, where it says {_code(here)}.")
    if base.hub_id:  # the adapter's config leads to its base
        native = f"{auto}.from_pretrained({here})  # the base with the adapter"
        lab = f"lab = AdapterLab({here})"
        if revision:  # to which transformers' own way does not look
            native = f"{bare}\nmodel.load_adapter({here})"
    else:
        native, lab = (
            f"{bare}\nmodel.load_adapter({here})",
            f"{named}\nlab = AdapterLab(base)\nlab.load_adapter({here})",
        )
        notes.append("Write the base's folder or id on this machine where it says `base = …`.")
    head = f"from transformers import {auto}, AutoTokenizer\n\n{named}\nmodel = "
    tail = f"\ntokenizer = AutoTokenizer.from_pretrained(base{at})"
    ways = {
        "transformers": head + native + tail,
        "PEFT": f"from peft import PeftModel\n{head}PeftModel.from_pretrained({bare}, {here}){tail}",
        "AdapterLab": f"from adapterlab import AdapterLab\n\n{lab}",
    }
    notes += [
        f"transformers 5.15 loads it without {what}, and does not say so; 5.23 loads all of it."
        for field, what in _LOST_BY_OLDER_TRANSFORMERS.items()
        if getattr(info.peft_config, field, None)
    ]
    told = [f"With {name}:\n\n```python\n{code}\n```" for name, code in ways.items()]
    return "\n\n".join(["## How to load it", *notes, *told])


# -- Markdown -----------------------------------------------------------------------------------------------------------


def _words(text: Any) -> str:
    """Text that Markdown takes literally, also in a table: one line, its marks as entities."""
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", " ".join(readable(text).split()))


def _code(text: str) -> str:
    """Text as code on one line, with fences longer than those in it. In a table it may have no bar."""
    text = " ".join(readable(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`" if text else ""


def _quoted(text: str) -> str:
    """Python's literal for it, with escapes for all that would not be seen."""
    letters = (
        letter if letter.isprintable() else _escaped(ord(letter)) for letter in json.dumps(text, ensure_ascii=False)
    )
    return "".join(letters)


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB"
