"""An adapter to disk, as a folder that plain PEFT loads, and all or nothing (atomic.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.atomic import building
from adapterlab.errors import AdapterLabError
from adapterlab.mounts import MAGNITUDE, prefixed
from adapterlab.notices import say

if TYPE_CHECKING:
    from peft import PeftConfig

_OWN_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def write_adapter(folder: Any, config: PeftConfig, state: dict[str, Any], base_path: str) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`, replacing an adapter that is there.

    Keys are plain PEFT's, whatever else the lab holds. An AdaLoRA that came from a pruned file gets its pruned triplets
    back as zeros, which is said: transformers can't load a pruned file. Raises `AdapterLabError` if the folder holds other
    things or can't be written; then what was there is still there.
    """
    folder = checked_folder(folder, _OWN_FILES, "an adapter")
    state = with_all_triplets(config, state)
    with building(folder) as beside:
        write_files(beside, config, state, base_path)
        if (folder / "README.md").is_file():  # somebody's words about the adapter: they stay with it
            shutil.copy2(folder / "README.md", beside / "README.md")
    return folder


def write_files(folder: Path, config: PeftConfig, state: dict[str, Any], base_path: str) -> None:
    """The two files of an adapter, into a folder that is there; `config` is marked as one to load.

    Keys and fields are written so that PEFT and plain transformers read them alike: DoRA's magnitudes under the key that
    both know (with PEFT's, transformers 5.23 leaves them out without a word), and of IA3's feedforward_modules those that are
    targets (PEFT adds its defaults, and then refuses what it wrote; issue 5).
    """
    from safetensors.torch import save_file

    config.inference_mode = True
    if not getattr(config, "base_model_name_or_path", None):
        config.base_model_name_or_path = base_path
    feed_forward, targets = getattr(config, "feedforward_modules", None), getattr(config, "target_modules", None)
    if isinstance(targets, (set, list)):
        if isinstance(feed_forward, (set, list)):
            # PEFT matches both by the ends of paths, and takes a file only if each of these is a target by its very name.
            longer = {one for one in feed_forward for t in targets if f".{one}".endswith(f".{t}")}
            shorter = {t for t in targets for one in feed_forward if f".{t}".endswith(f".{one}")}
            config.feedforward_modules, targets = sorted(longer | shorter), {*targets, *longer}
        config.target_modules = sorted(targets)  # sets would be written in another order each time
    tensors = {key: value.contiguous().clone() for key, value in _as_saved(state).items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _as_saved(state: dict[str, Any]) -> dict[str, Any]:
    """An adapter's tensors under the keys that stand in its file."""
    return {key + ".weight" if key.endswith(MAGNITUDE) else key: value for key, value in prefixed(state).items()}


def file_bytes(state: dict[str, Any]) -> int:
    """Bytes of the `adapter_model.safetensors` that `write_files` would make of these tensors, which may be meta tensors.

    The format: 8 bytes, a header in JSON padded to a multiple of 8, and the tensors; the largest dtypes come first.
    """
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors = _as_saved(state)
    for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):
        end = offset + tensors[key].numel() * tensors[key].element_size()
        dtype = str(tensors[key].dtype).removeprefix("torch.")
        header[key] = {
            "dtype": names.get(dtype, dtype.upper()),
            "shape": list(tensors[key].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8 + offset


def with_all_triplets(config: PeftConfig, state: dict[str, Any]) -> dict[str, Any]:
    """An AdaLoRA's tensors at `init_r` in every layer, zeros where it was pruned; `config` loses its rank_pattern. Others,
    and those that have all triplets, are given back as they are."""
    import torch

    init_r = getattr(config, "init_r", None)
    if init_r is None:
        return state
    config.rank_pattern = None
    across = {"lora_E": 0, "lora_A": 0, "lora_B": 1}
    whole, pruned = {}, 0
    for key, tensor in state.items():
        along = across.get(key.rsplit(".", 1)[-1])
        short = 0 if along is None else init_r - tensor.shape[along]
        if along is not None and short > 0:
            shape = [short if place == along else size for place, size in enumerate(tensor.shape)]
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], along)
            pruned += short if key.endswith("lora_E") else 0
        whole[key] = tensor
    if pruned:
        say(f"{pruned} pruned triplets are saved as zeros, so that plain transformers can load the file too.")
    return whole


def checked_folder(folder: Any, own: set[str], what: str) -> Path:
    """`folder` as a path, if it is new, empty, or holds nothing but `own`; `AdapterLabError` otherwise."""
    try:
        path = Path(folder).expanduser()
        if path.exists() and not path.is_dir():
            raise AdapterLabError(f"{str(path)!r} is a file: name a folder to save {what} in.")
        strange = sorted({item.name for item in path.iterdir()} - own) if path.is_dir() else []
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise AdapterLabError(f"{str(folder)[:80]!r} is no folder to save {what} in: {error}") from error
    if strange:
        raise AdapterLabError(
            f"{str(path)!r} holds other things ({', '.join(strange[:4])}): name an empty or a new folder."
        )
    return path
