"""A saved lab as files: a manifest, one folder of plain PEFT for each adapter, runs, comparisons, and logits as a
fingerprint. `docs/saved-lab.md` describes the format. Data only: what is done with it stands in reopening.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from adapterlab import strangers
from adapterlab.columns import Column, check_name, is_finite
from adapterlab.errors import AdapterLabError

FORMAT = "adapterlab-lab"
VERSION = 1
MANIFEST = "adapterlab.json"
LOGITS = "fingerprint.safetensors"
ADAPTERS, RUNS, HISTORY = "adapters", "runs", "history"
_IN_ADAPTERS = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
_LARGEST = 64_000_000  # bytes of one JSON file
_MOST_IDS = 512
Parts = tuple[tuple[str, float], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class BaseReference:
    """Which base, and how it was loaded.

    path: a Hub id or an absolute folder, "" for a model that was never a file. beside: the same folder seen from the saved
    lab's, "" for others. revision: the commit. demo: the demo model, which is fetched and not looked up. digest: of the
    weights, on a `device` of this type. dtype: torch's name of it. quantization: of a `BitsAndBytesConfig`.
    """

    path: str
    beside: str = ""
    revision: str | None = None
    subfolder: str | None = None
    demo: bool = False
    digest: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    quantization: dict[str, Any] | None = None


@dataclass(frozen=True)
class SavedAdapter:
    """What the lab knew of an adapter beside its files; the digests and `noop` are those of `records.Record`."""

    name: str
    source: str
    digest: str
    noop: bool = False
    initial: str | None = None
    loaded: str | None = None
    saved: str | None = None
    runs: int = 0


@dataclass(frozen=True)
class SavedLab:
    """A manifest. selection and blends: columns as (name, multiplier) pairs. history: how many comparisons. ids: the text
    of the fingerprint; columns: whose logits it holds, row by row."""

    name: str
    base: BaseReference
    adapters: tuple[SavedAdapter, ...] = ()
    selection: Parts = ()
    enabled: bool = True
    trainable: str | None = None
    blends: tuple[Parts, ...] = ()
    history: int = 0
    ids: tuple[int, ...] = ()
    columns: tuple[Parts, ...] = ()
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, allow_nan=False)


def is_saved_lab(path: Any) -> bool:
    """Whether there is a folder of this name with a saved lab in it."""
    try:
        return (Path(path).expanduser() / MANIFEST).is_file()
    except (TypeError, ValueError, OSError, RuntimeError):
        return False


def adapter_folder(folder: Path, name: str) -> Path:
    return folder / ADAPTERS / name


def comparison_file(folder: Path, number: int) -> Path:
    return folder / HISTORY / f"{number:05d}.json"


def run_file(folder: Path, name: str, number: int) -> Path:
    return folder / RUNS / f"{name}.{number}.json"


def strange_files(folder: Path) -> list[str]:
    """What lies in a saved lab's folder and is none of its own, as paths from there."""
    own = (
        lambda p: len(p) == 1 and p[0] in {MANIFEST, LOGITS, "README.md"},
        lambda p: len(p) == 2 and p[0] in {RUNS, HISTORY} and p[1].endswith(".json"),
        lambda p: len(p) == 3 and p[0] == ADAPTERS and p[2] in _IN_ADAPTERS,
    )
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    inside = [path.relative_to(folder) for path in found]
    return sorted(str(path) for path in inside if not any(is_own(path.parts) for is_own in own))


def read_json(path: Path) -> Any:
    """The content of one of a saved lab's files. Raises `AdapterLabError`."""
    try:
        return strangers.read_json(path, _LARGEST)
    except FileNotFoundError as error:
        raise AdapterLabError(
            f"{str(path)!r} is missing: the saved lab is not whole. Copy its folder again."
        ) from error
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise AdapterLabError(f"{str(path)!r} can't be read: {words}.") from error


def read_manifest(folder: Path) -> SavedLab:
    """The manifest of a saved lab, every value checked. Raises `AdapterLabError` saying which is wrong."""
    path = folder / MANIFEST
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterLabError(f"{str(path)!r} is no saved lab: it was not written by lab.save(…).")
    if content.get("version") != VERSION:
        raise AdapterLabError(
            f"{str(path)!r} is of format version {repr(content.get('version'))[:40]}, this AdapterLab reads "
            f"version {VERSION}: update it."
        )
    try:
        return _manifest(content)
    except (AdapterLabError, KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise AdapterLabError(f"{str(path)!r} is damaged: {what}. Save the lab again, or undo the edit.") from error


def _manifest(content: Mapping[str, Any]) -> SavedLab:
    adapters = tuple(_fields(SavedAdapter, one, "adapters") for one in _list(content["adapters"], "adapters"))
    names: list[str] = []
    for adapter in adapters:
        names.append(check_name(adapter.name, names))
    saved = _fields(
        SavedLab,
        {
            **{key: value for key, value in content.items() if key not in ("format", "version")},
            "base": _fields(BaseReference, content["base"], "base"),
            "adapters": adapters,
            "selection": _parts(content["selection"], "selection", names),
            "blends": tuple(_parts(one, "blends", names) for one in _list(content["blends"], "blends")),
            "columns": tuple(_parts(one, "columns", names) for one in _list(content["columns"], "columns")),
            "ids": _ids(content["ids"]),
            "versions": {str(key): str(value) for key, value in _object(content["versions"], "versions").items()},
        },
        "",
    )
    if saved.trainable is not None and saved.trainable not in names:
        raise ValueError(f"trainable is {saved.trainable!r}, which is none of the adapters")
    if saved.base.quantization is not None:
        _check_quantization(saved.base.quantization)
    return saved


_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: _is_text(value, 4096),
    "source": lambda value: _is_text(value, 1_000_000),  # of a blend it lists what was blended, which may be hundreds
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int and 0 <= value < 10**6,
}


def _is_text(value: Any, longest: int) -> bool:
    return isinstance(value, str) and "\0" not in value and len(value) <= longest


def _fields(kind: type[T], values: Any, where: str) -> T:
    """A dataclass of the JSON object, its texts, numbers and switches of their types."""
    values = dict(_object(values, where))
    for one in fields(kind):  # type: ignore[arg-type]
        plain = str(one.type).removesuffix(" | None")
        optional = str(one.type).endswith("| None")
        value = values[one.name]
        fits = _KINDS.get(one.name) or _KINDS.get(plain)
        if fits is not None and not (optional and value is None) and not fits(value):
            at = f"{where}.{one.name}" if where else one.name
            raise TypeError(f"{at} is {repr(value)[:60]}, where {'a text' if plain == 'str' else plain} belongs")
    unknown = set(values) - {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} is no field of {where or 'a saved lab'}")
    return kind(**values)


def _parts(value: Any, where: str, names: Iterable[str]) -> Parts:
    pairs = [_list(pair, where) for pair in _list(value, where)]
    if not all(len(pair) == 2 and isinstance(pair[0], str) and is_finite(pair[1]) for pair in pairs):
        raise TypeError(f"{where} is {repr(value)[:60]}, where pairs of a name and a multiplier belong")
    return Column.of(Column(tuple((name, float(m)) for name, m in pairs))).check(names).parts


def _ids(value: Any) -> tuple[int, ...]:
    ids = _list(value, "ids")
    if not 0 < len(ids) <= _MOST_IDS or not all(type(one) is int and 0 <= one < 2**31 for one in ids):
        raise TypeError(f"ids is {repr(value)[:60]}, where token ids belong")
    return tuple(ids)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{where} is {repr(value)[:60]}, where a list belongs")
    return value


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{where or 'the file'} is {repr(value)[:60]}, where an object belongs")
    return value


_DTYPES = {"float32", "float16", "bfloat16", "uint8"}
_QUANTIZATION: dict[str, Callable[[Any], bool]] = {
    "load_in_8bit": lambda value: isinstance(value, bool),
    "load_in_4bit": lambda value: isinstance(value, bool),
    "llm_int8_threshold": is_finite,
    "llm_int8_skip_modules": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "llm_int8_enable_fp32_cpu_offload": lambda value: isinstance(value, bool),
    "llm_int8_has_fp16_weight": lambda value: isinstance(value, bool),
    "bnb_4bit_quant_type": lambda value: value in ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": lambda value: isinstance(value, bool),
    "bnb_4bit_compute_dtype": lambda value: value in _DTYPES,
    "bnb_4bit_quant_storage": lambda value: value in _DTYPES,
}


def quantization_fields(config: Any) -> dict[str, Any] | None:
    """What of a `BitsAndBytesConfig` is saved; None for other quantizers, which stand in the checkpoint itself."""
    if not any(getattr(config, name, False) for name in ("load_in_8bit", "load_in_4bit")):
        return None
    values = {name: getattr(config, name, None) for name in _QUANTIZATION}
    plain = {name: value if _is_json(value) else str(value).removeprefix("torch.") for name, value in values.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def _check_quantization(values: Any) -> None:
    for name, value in _object(values, "base.quantization").items():
        if name not in _QUANTIZATION or not _QUANTIZATION[name](value):
            raise ValueError(f"base.quantization.{name} is {repr(value)[:60]}")
