"""A whole lab to disk and back, and the proof that it is the same one: logits of one text under base and every column."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab import labfiles
from adapterlab.atomic import building
from adapterlab.columns import BASE, Column
from adapterlab.comparison import Comparison
from adapterlab.errors import AdapterLabError
from adapterlab.labfiles import BaseReference, SavedAdapter, SavedLab
from adapterlab.notices import say, warn
from adapterlab.runs import TrainingRun

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from adapterlab.adapters import Adapters
    from adapterlab.hub import AdapterFiles
    from adapterlab.loading import Origin

_TEXT = "The captain asked the clerk where the sea ends, and the answer came in three words."
_MOST_IDS = 32
_README = """# A saved lab

Base model: `{name}`. Adapters: {adapters}. Each folder in `adapters/` is an adapter as PEFT writes it.

```python
from adapterlab import AdapterLab

lab = AdapterLab({folder!r})  # where this folder is
```

Written by AdapterLab {version}; the base's own weights are not in here.
"""


def write_lab(
    folder: Any,
    adapters: Adapters,
    base: BaseReference,
    name: str,
    tokenizer: Any,
    history: Sequence[Comparison],
    blends: Sequence[Column],
    versions: Mapping[str, str],
) -> Path:
    """Write everything that is a lab's own into `folder`, replacing a saved lab that is there; all or nothing."""
    folder = _checked_folder(folder)
    adapters.refresh()
    ids = _text_ids(adapters, tokenizer)
    columns = _columns(adapters, blends)
    saved = SavedLab(
        name=name,
        base=base,
        adapters=tuple(_saved_adapter(adapters, one) for one in adapters.records),
        selection=adapters.selection.parts,
        enabled=adapters.enabled,
        trainable=adapters.trainable,
        blends=tuple(blend.parts for blend in blends),
        history=len(history),
        ids=ids,
        columns=tuple(column.parts for column in columns),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions=dict(versions),
    )
    with building(folder) as built:
        _write(built, saved, adapters, history, fingerprint(adapters, ids, columns))
        _keep_readmes(folder, built, saved)
    return folder


def _write(built: Path, saved: SavedLab, adapters: Adapters, history: Sequence[Comparison], logits: Tensor) -> None:
    from safetensors.torch import save_file

    from adapterlab.storage import write_files

    for name, record in adapters.records.items():
        config, state = adapters.state(name)
        own = labfiles.adapter_folder(built, name)
        own.mkdir(parents=True)
        write_files(own, config, state, adapters.base_path)
        for number, run in enumerate(record.runs):
            _write_text(labfiles.run_file(built, name, number), json.dumps(run.to_dict(), indent=1, allow_nan=False))
    for number, comparison in enumerate(history):
        _write_text(labfiles.comparison_file(built, number), comparison._json())
    save_file({"logits": logits}, str(built / labfiles.LOGITS))
    _write_text(built / labfiles.MANIFEST, saved.to_json())


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _keep_readmes(old: Path, built: Path, saved: SavedLab) -> None:
    """Somebody's words stay with what they are about; a lab without any gets a few of its own, each time anew."""
    before = _saved_there(old)
    kept = [] if before is not None and _is_ours(old / "README.md", before) else [Path()]
    known = {one.name: (one.source, one.initial) for one in (before or saved).adapters}
    same = [one for one in saved.adapters if known.get(one.name) == (one.source, one.initial)]  # trained since or not
    for place in [*kept, *(labfiles.adapter_folder(Path(), one.name) for one in same)]:
        if (old / place / "README.md").is_file():
            (built / place / "README.md").write_bytes((old / place / "README.md").read_bytes())
    if not (built / "README.md").exists():
        _write_text(built / "README.md", _readme(saved, f"{old.name}/"))


def _saved_there(folder: Path) -> SavedLab | None:
    """The lab in a folder, or None if there is none or it is damaged."""
    try:
        return labfiles.read_manifest(folder) if labfiles.is_saved_lab(folder) else None
    except AdapterLabError:
        return None


def _readme(saved: SavedLab, folder: str) -> str:
    names = ", ".join(f"`{one.name}`" for one in saved.adapters) or "none"
    version = saved.versions.get("adapterlab", "")
    return _README.format(name=saved.name, adapters=names, folder=folder, version=version)


def _is_ours(path: Path, saved: SavedLab) -> bool:
    """Whether a README is as it was written, when the folder may have had another name."""
    start, end = _readme(saved, "\0").rsplit(repr("\0"), 1)
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    return text.startswith(start) and text.endswith(end) and "\n" not in text[len(start) : -len(end)]


def _checked_folder(folder: Any) -> Path:
    from adapterlab.storage import checked_folder

    if not labfiles.is_saved_lab(folder):
        return checked_folder(folder, set(), "a lab")
    path = Path(folder).expanduser()
    strange = labfiles.strange_files(path)
    if strange:
        raise AdapterLabError(
            f"{str(path)!r} holds other things than a saved lab ({', '.join(strange[:4])}): name an empty or a new folder."
        )
    return path


def _saved_adapter(adapters: Adapters, name: str) -> SavedAdapter:
    record = adapters.records[name]
    return SavedAdapter(
        name=name,
        source=record.source,
        digest=record.digest,
        noop=record.noop,
        initial=record.initial,
        loaded=record.loaded,
        saved=record.digest,  # which it is, when this has been written
        runs=len(record.runs),
    )


# -- and back ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedFolder:
    """A saved lab that is being opened: all of it but tensors, read and found right."""

    folder: Path
    saved: SavedLab
    adapters: Mapping[str, AdapterFiles]
    runs: Mapping[str, list[TrainingRun]]
    history: list[Comparison]

    @classmethod
    def find(cls, model: Any, base_model: Any = None) -> SavedFolder | None:
        """The saved lab in the folder `model`, None if it is no such folder. `base_model` belongs to saved labs only."""
        if isinstance(model, (str, os.PathLike)) and labfiles.is_saved_lab(model):
            return cls.read(Path(model).expanduser().resolve())
        if base_model is not None:
            raise AdapterLabError(
                f"base_model= is for a saved lab, and {str(model)[:200]!r} is none: give the model as the first argument."
            )
        return None

    @classmethod
    def read(cls, folder: Path) -> SavedFolder:
        """Raises `AdapterLabError` for the first thing in the folder that is missing or wrong."""
        from adapterlab.hub import resolve_adapter

        saved = labfiles.read_manifest(folder)
        if len(saved.columns) > len(saved.adapters) + len(saved.blends) + 2:  # base and the selection
            raise AdapterLabError(
                f"{str(folder / labfiles.MANIFEST)!r} is damaged: it names {len(saved.columns):,} columns, more than this lab "
                "can have. Save the lab again, or undo the edit."
            )
        logits = folder / labfiles.LOGITS
        if not logits.is_file():
            raise AdapterLabError(f"{str(logits)!r} is missing: the saved lab is not whole. Copy its folder again.")
        return cls(
            folder=folder,
            saved=saved,
            adapters={one.name: resolve_adapter(labfiles.adapter_folder(folder, one.name)) for one in saved.adapters},
            runs={one.name: [_read_run(folder, one.name, n) for n in range(one.runs)] for one in saved.adapters},
            history=[Comparison.from_json(labfiles.comparison_file(folder, n)) for n in range(saved.history)],
        )

    def load_options(self, base_model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """What to call `load_base` with: what the user gave, and for the rest what the saved base was loaded with."""
        options, base = dict(given), self.saved.base
        if base_model is not None and not isinstance(base_model, (str, os.PathLike)):
            return {**options, "model": base_model}  # it is loaded already
        if base_model is None:
            base_model = base_to_load(self.saved, self.folder)
            if isinstance(base_model, str):
                options["revision"] = options.get("revision") or base.revision
                if base.subfolder and "subfolder" not in options:
                    options["subfolder"] = base.subfolder
        if options["dtype"] == "auto":
            options["dtype"] = base.dtype
        if base.quantization is not None and options["quantization"] is None and options["quantization_config"] is None:
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(**base.quantization)
        return {**options, "model": base_model}


def base_to_load(saved: SavedLab, folder: Path) -> str | Path:
    """What the saved lab names as its base, as `load_base` takes it: a Hub id or a folder that is there."""
    base = saved.base
    if base.demo:
        from adapterlab.demo import fetch_demo_model

        return fetch_demo_model()
    if not base.path:
        raise AdapterLabError(
            f"The base of the saved lab {str(folder)!r} ({saved.name}) was a model in hand, which no file holds: load it "
            f"as you did then, and open AdapterLab({str(folder)!r}, base_model=model)."
        )
    beside = Path(os.path.realpath(folder / base.beside)) if base.beside else None  # which a loop of links lets be
    if beside is None:
        return base.path
    try:
        found = next((place for place in (Path(base.path), beside) if place.is_dir()), None)
    except (OSError, RuntimeError, ValueError):
        found = None
    if found is None:
        raise AdapterLabError(
            f"The base of the saved lab {str(folder)!r} is not in {base.path!r} any more: open "
            f"AdapterLab({str(folder)!r}, base_model=…) with the folder it is in now, or its Hub id."
        )
    return found


def reference_to(adapters: Adapters, origin: Origin, folder: Any = None) -> BaseReference:
    """The base as it is here; folder: where the lab is saved."""
    from adapterlab.fingerprints import base_digest

    with adapters.using(None) as model:
        digest = base_digest(model)
    is_folder = os.path.isabs(origin.path) and folder is not None
    quantization = getattr(model.config, "quantization_config", None) if origin.quantized_here else None
    return BaseReference(
        path=origin.path,
        beside=os.path.relpath(origin.path, os.path.realpath(Path(folder).expanduser())) if is_folder else "",
        revision=origin.revision,
        subfolder=origin.subfolder,
        demo=origin.demo,
        digest=digest,
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=None if quantization is None else labfiles.quantization_fields(quantization),
    )


def restore_adapters(adapters: Adapters, lab: SavedFolder, tokenizer: Any) -> None:
    """Hang the saved adapters on the base, and set the state as it was."""
    for one in lab.saved.adapters:
        adapters.restore(lab.adapters[one.name], one, tokenizer)
        adapters.records[one.name].runs.extend(lab.runs[one.name])
    adapters.set_trainable(lab.saved.trainable)
    adapters.select(Column(lab.saved.selection))
    adapters.set_enabled(lab.saved.enabled)


def _read_run(folder: Path, name: str, number: int) -> TrainingRun:
    path = labfiles.run_file(folder, name, number)
    content = labfiles.read_json(path)
    try:
        return TrainingRun.from_dict(content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise AdapterLabError(
            f"{str(path)!r} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}."
        ) from error


# -- is it the same? ---------------------------------------------------------------------------------------------------


def fingerprint(adapters: Adapters, ids: Sequence[int], columns: Sequence[Column]) -> Tensor:
    """The logits after `ids` under each column: (columns, vocabulary), float32."""
    import torch

    from adapterlab.generation import compute_last_logits

    rows = []
    for column in columns:
        with adapters.using(column) as model:
            rows.append(compute_last_logits(model, ids).float().cpu())
    return torch.stack(rows)


def differences(
    adapters: Adapters, saved: SavedLab, folder: Path, here: BaseReference, versions: Mapping[str, str], noise: float
) -> pd.DataFrame:
    """What is as it was saved and what is not, one row each: part ("base", a column's label, a package), what (weights,
    logits, dtype, quantization, version), saved, here (texts), agrees.

    Weights agree when every bit does; logits when they differ by no more than `noise`, which is rounding's. Base weights
    on another kind of device can't be held against the saved digest, and have no row then.
    """
    import pandas as pd

    rows: list[tuple[str, str, str, str]] = []
    if here.device == saved.base.device:
        rows.append((BASE, "weights", saved.base.digest, here.digest))
    rows.append((BASE, "dtype", saved.base.dtype, here.dtype))
    rows.append((BASE, "quantization", _words(saved.base.quantization), _words(here.quantization)))
    rows += [(one.name, "weights", one.digest, adapters.records[one.name].digest) for one in saved.adapters]
    rows += [(package, "version", had, versions.get(package, "")) for package, had in saved.versions.items()]
    frame = pd.DataFrame(rows, columns=["part", "what", "saved", "here"])
    frame["agrees"] = frame["saved"] == frame["here"]
    logits = _logit_rows(adapters, saved, folder, noise)
    return pd.concat([frame, pd.DataFrame(logits, columns=list(frame.columns))], ignore_index=True)


def _logit_rows(
    adapters: Adapters, saved: SavedLab, folder: Path, noise: float
) -> list[tuple[str, str, str, str, bool]]:
    from safetensors.torch import load_file

    from adapterlab.preflight import header_shapes

    path = folder / labfiles.LOGITS
    shapes = header_shapes(path)
    rows = adapters.model.get_input_embeddings().weight.shape[0]
    columns = [Column(parts) for parts in saved.columns]
    if max(saved.ids) >= rows:
        return [(BASE, "logits", "", f"a vocabulary of {rows}, too small for the text", False)]
    found = fingerprint(adapters, saved.ids, columns)
    if dict(shapes) != {"logits": tuple(found.shape)}:
        had = shapes.get("logits", ())
        return [(BASE, "logits", f"of shape {list(had)}", f"of shape {list(found.shape)}", False)]
    before = load_file(path)["logits"].float()
    told = []
    for column, was, now in zip(columns, before, found):
        same = was.isnan() & now.isnan()  # an adapter that has diverged is what it was, too
        change = float((now - was).masked_fill(same, 0.0).abs().max())
        told.append((column.label, "logits", "", f"largest |Δ| {change:.1e}", change <= noise))
    return told


def tell(frame: pd.DataFrame, saved: SavedLab) -> None:
    """Say that it is the same lab, or warn of what differs. Versions alone are no difference."""
    other = frame[~frame["agrees"] & (frame["what"] != "version")]
    if other.empty:
        count = len(saved.adapters)
        text = f"{saved.name} with {count} adapter{'s' if count != 1 else ''}"
        text += f" and {saved.history} comparison{'s' if saved.history != 1 else ''}"
        say(f"Opened {text}: weights and logits are those that were saved.")
        return
    listed = [f"{part}: {what} ({_change(had, now)})" for part, what, had, now, _ in other.itertuples(index=False)]
    more = f"; and {len(listed) - 6} more" if len(listed) > 6 else ""
    warn(f"This is not quite the lab that was saved. {'; '.join(listed[:6])}{more}. All of it is in lab.restored.")


def _change(had: str, now: str) -> str:
    return f"{had} when saved, {now} here" if had else now


def _words(quantization: Mapping[str, Any] | None) -> str:
    return json.dumps(quantization, sort_keys=True) if quantization else "none"


def _columns(adapters: Adapters, blends: Sequence[Column]) -> list[Column]:
    every = [Column(), *(Column.of(name) for name in adapters.records), adapters.selection, *blends]
    return list(dict.fromkeys(every))


def _text_ids(adapters: Adapters, tokenizer: Any) -> tuple[int, ...]:
    """The fingerprint's text: a sentence, or without a tokenizer some ids."""
    rows = int(adapters.model.get_input_embeddings().weight.shape[0])
    if tokenizer is None:
        return tuple(7 * place % rows for place in range(1, 17))
    return tuple(min(one, rows - 1) for one in tokenizer(_TEXT)["input_ids"][:_MOST_IDS])
