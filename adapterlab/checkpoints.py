"""Which checkpoint to resume from. One that is not whole (a process killed while it wrote, a file lost on the way) would train
on with another optimizer, without a word."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from adapterlab.errors import AdapterLabError
from adapterlab.notices import say

_STATE, _ADAPTER = "trainer_state.json", "adapter_model.safetensors"
_MOMENTS = ("optimizer.pt", "scheduler.pt")  # both, or with `save_only_model` neither
_OF_TORCH = (*_MOMENTS, "rng_state.pth", "scaler.pt")


def find_checkpoint(given: str | os.PathLike[str] | bool | None, output_dir: str | None) -> Path | None:
    """The folder that `resume_from_checkpoint` means, None for none: of True the newest one in `output_dir` that is whole.

    Raises `AdapterLabError` where there is none, or the one that was named is not whole.
    """
    if given is True:
        return _newest(Path(output_dir or ""))
    if not given:
        return None
    folder = Path(given)
    why = lacks(folder)
    if why:
        raise AdapterLabError(f"{str(folder)!r} is no checkpoint to resume from: {why}.")
    if not (folder / _MOMENTS[0]).exists():
        say(f"{folder.name} was saved without the optimizer's state (save_only_model): it begins anew.")
    return folder


def lacks(folder: Path) -> str:
    """What a checkpoint lacks to be whole, "" if nothing. No tensor is read."""
    try:
        if not isinstance(json.loads((folder / _STATE).read_text(encoding="utf-8")), dict):
            return f"its {_STATE} is none"
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {_STATE}"
    except (OSError, ValueError, RecursionError):
        return f"its {_STATE} can't be read, it may have been cut off"
    if not (folder / _ADAPTER).is_file():
        return f"it has no {_ADAPTER}"
    there = [name for name in _MOMENTS if (folder / name).is_file()]
    if len(there) == 1:
        return f"it has no {next(name for name in _MOMENTS if name not in there)}"
    for name in _OF_TORCH:
        if (folder / name).exists() and not zipfile.is_zipfile(folder / name):
            return f"its {name} is damaged, it may have been cut off"
    return ""


def _newest(output_dir: Path) -> Path:
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for folder in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        why = lacks(folder)
        if not why:
            return find_checkpoint(str(folder), None) or folder
        say(f"{folder.name} is passed over: {why}.")
    raise AdapterLabError(f"There is no checkpoint in {str(output_dir)!r} to resume from.")
