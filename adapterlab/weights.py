"""An adapter's weights file: what its header says, and its tensors. Whoever made it, reading it runs nothing, takes no more
memory than the file has bytes, and gives tensors that can be reckoned with."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from adapterlab.errors import AdapterLabError
from adapterlab.mounts import MAGNITUDE, PREFIX
from adapterlab.strangers import refuse_odd_file

# Floats, as safetensors and torch call them. PEFT reads each as float32; other kinds, too, without a word.
FLOATS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_INDICES = re.compile(r"_indices(\.|$)")  # the methods that keep whole numbers beside their weights call them so
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit


def header_shapes(weights_file: Path) -> dict[str, tuple[int, ...]]:
    """Shape by key in an adapter's weights file (keys without PEFT's prefix), reading no tensor of a safetensors file."""
    refuse_odd_file(weights_file)
    try:
        if weights_file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(weights_file), framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return _unprefixed(shapes, weights_file)
        return {key: tuple(tensor.shape) for key, tensor in read_weights(weights_file).items()}
    except AdapterLabError:
        raise
    except Exception as error:  # safetensors raises its own types, by version
        raise _unreadable(weights_file, error) from error


def read_tensor(weights_file: Path, key: str) -> Any:
    """One tensor of the file, on the CPU; key: without PEFT's prefix. Raises `AdapterLabError` where it can't be read."""
    if weights_file.suffix != ".safetensors":
        return read_weights(weights_file, finite=False)[key]
    from safetensors import safe_open

    try:
        with safe_open(str(weights_file), framework="pt") as file:
            return file.get_tensor(next(name for name in (PREFIX + key, key) if name in file.keys()))  # noqa: SIM118
    except Exception as error:  # safetensors raises its own types, by version
        raise _unreadable(weights_file, error) from error


def header_kinds(weights_file: Path) -> dict[str, str]:
    """Key → kind of number, of those tensors of a safetensors file that hold no floats where floats belong."""
    with weights_file.open("rb") as file:
        size = min(int.from_bytes(file.read(8), "little"), _MOST_HEADER_BYTES)
        header = json.loads(file.read(size))
    kinds = {key: about["dtype"] for key, about in header.items() if key != "__metadata__"}
    odd = {key: kind for key, kind in kinds.items() if kind not in FLOATS and not _INDICES.search(key)}
    return _unprefixed(odd, weights_file)


def read_weights(weights_file: Path, *, finite: bool = True) -> dict[str, Any]:
    """The tensors of an adapter's file on the CPU, keys without PEFT's prefix. A `.bin` is unpickled as weights only.

    Raises `AdapterLabError` for what can't be read, and for tensors with NaN, infinity or no floats in them. With
    `finite=False` NaN and infinity are let in: a saved lab comes back as it was, an adapter whose training went wrong included.
    """
    import torch

    refuse_odd_file(weights_file)
    try:
        if weights_file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(str(weights_file))
        else:
            _refuse_packed_pickle(weights_file)
            state = torch.load(weights_file, map_location="cpu", weights_only=True)
    except AdapterLabError:
        raise
    except pickle.UnpicklingError as error:  # torch's own words advise to run it
        wanted = re.search(r"(?:GLOBAL|global|class)\s+`?([\w.]+)", str(error))
        what = f" ({wanted[1]})" if wanted else ""
        raise AdapterLabError(
            f"{str(weights_file)!r} is a pickle of more than tensors{what}, which could run any code: it is not read. "
            "Ask for the adapter as .safetensors."
        ) from error
    except Exception as error:  # a damaged file raises whatever its format's reader raises
        raise _unreadable(weights_file, error) from error
    texts = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not texts or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise AdapterLabError(f"{str(weights_file)!r} holds no plain mapping of names to tensors.")
    plain = _unprefixed(state, weights_file)
    wrong = {key: why for key, tensor in plain.items() if (why := _objection(key, tensor, finite))}
    if wrong:
        shown = "; ".join(f"{key[:200]} {why}" for key, why in list(wrong.items())[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise AdapterLabError(
            f"{str(weights_file)!r} can't be used: {shown}{more}. Such an adapter gives no words: its training has gone "
            "wrong or the file is damaged. Ask for an earlier checkpoint, or for the file again."
        )
    return plain


def _objection(key: str, tensor: Any, finite: bool) -> str:
    """What is wrong with the values, or ""."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return "is no plain tensor with values"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims {tensor.numel():,} values, more than the file has"
    if _INDICES.search(key) and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return ""
    if str(tensor.dtype).removeprefix("torch.") not in FLOATS.values():
        return f"holds {str(tensor.dtype).removeprefix('torch.')} where floats belong"
    if not tensor.numel() or not finite:
        return ""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        tensor = tensor.float()  # as PEFT will; a float64 may have no place there
    least, most = torch.aminmax(tensor)  # NaN if there is one; takes no memory
    if bool(torch.isnan(least)):
        return "has NaN in it"
    if not bool(torch.isfinite(least)) or not bool(torch.isfinite(most)):
        return "has infinity in it, or more than float32 holds"
    return ""


def _refuse_packed_pickle(path: Path) -> None:
    """torch stores a zip's files as they are. One that was made smaller, or lies over another, takes more memory than it
    has bytes."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        inside = archive.infolist()
    packed = any(one.compress_type != zipfile.ZIP_STORED for one in inside)
    if packed or sum(one.file_size for one in inside) > path.stat().st_size:
        raise AdapterLabError(
            f"{str(path)!r} is packed as torch never does it, and would take any amount of memory: it is not read. "
            "Ask for the adapter as .safetensors."
        )


def _unreadable(path: Path, error: Exception) -> AdapterLabError:
    words = " ".join(str(error).split()) or type(error).__name__
    return AdapterLabError(f"{str(path)!r} can't be read as adapter weights: {words[:400]}")


def _unprefixed(state: dict[str, Any], weights_file: Path) -> dict[str, Any]:
    # DoRA's magnitudes, as the lab saves them so that transformers finds them too (storage.py)
    plain = {key.removeprefix(PREFIX).replace(f"{MAGNITUDE}.weight", MAGNITUDE): value for key, value in state.items()}
    if len(plain) != len(state):
        raise AdapterLabError(
            f"{str(weights_file)!r} holds tensors twice, with and without {PREFIX!r} or '.weight': which are meant?"
        )
    return plain
