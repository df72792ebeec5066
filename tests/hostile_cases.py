"""What a hostile file is here, and the kinds of them: hostile_corpus.py says what they are for."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DEEP = 100_000
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
HTML = "<img src=x onerror=alert(1)><script>alert(2)</script>"
NEVER = r"(?:.*?)*x(\w+\.?)+y"  # takes longer than a life on a name of thirty letters


@dataclass(frozen=True)
class Good:
    """What every case starts from, all of it right: adapters, a base model, a comparison and a saved lab below `root`."""

    root: Path

    @property
    def canary(self) -> Path:
        return self.root / "canary" / "RAN"

    @property
    def base(self) -> Path:
        return self.root / "good" / "base"

    def adapter(self, kind: str) -> Path:
        return self.root / "good" / kind

    @property
    def lab(self) -> Path:
        return self.root / "good" / "lab"

    @property
    def comparison(self) -> Path:
        return self.root / "good" / "comparison.json"


@dataclass(frozen=True)
class Case:
    """name: of its folder. what: the room that reads it (adapter, base, comparison, lab or data). why: what it tries.

    legal: it may be used after all, and then acts as its numbers say. header: whether config and header alone tell that it
    can't be used. said: what the error must name. tells: what the lab must say of what it takes all the same. tags: "base"
    where only opening it as a lab fails, "either" where its being used is as good as an error.
    """

    name: str
    what: str
    why: str
    make: Callable[[Path, Good], Any]
    legal: bool = False
    header: bool = True
    said: str = ""
    tells: str = ""
    tags: frozenset[str] = field(default_factory=frozenset)


CASES: list[Case] = []


def case(name: str, what: str, why: str, make: Callable[[Path, Good], Any], **more: Any) -> None:
    CASES.append(Case(name, what, why, make, **more))


def build(one: Case, folder: Path, good: Good) -> Path:
    """Write the case into `folder`, which is new, and give what is to be handed to the lab."""
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on old formats
        made = one.make(folder, good)
    return made if isinstance(made, Path) else folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def copied(folder: Path, good: Good, kind: str = "lora") -> dict[str, Any]:
    """The good adapter in `folder`; gives its config."""
    shutil.copytree(good.adapter(kind), folder, dirs_exist_ok=True)
    (folder / "README.md").unlink(missing_ok=True)
    return read(folder / CONFIG)


# ----- kinds of case -----


def config_case(
    name: str,
    why: str,
    *,
    kind: str = "lora",
    said: str = "",
    tells: str = "",
    legal: bool = False,
    only_as_base: bool = False,
    either: bool = False,
    **fields: Any,
) -> None:
    """An adapter whose config has other values; `...` takes the field out."""

    def make(folder: Path, good: Good) -> None:
        raw = copied(folder, good, kind)
        for key, value in fields.items():
            raw[key] = value
            if value is ...:
                del raw[key]
        dump(folder / CONFIG, raw)

    tags = frozenset(["base"] * only_as_base + ["either"] * either)
    said = said or ("" if legal else next(iter(fields)))
    case(name, "adapter", why, make, legal=legal, tells=tells, said=said, tags=tags)


def config_text(name: str, why: str, text: Callable[[str], bytes], *, said: str = CONFIG, legal: bool = False) -> None:
    """An adapter whose config is other text."""

    def make(folder: Path, good: Good) -> None:
        copied(folder, good)
        (folder / CONFIG).write_bytes(text((folder / CONFIG).read_text(encoding="utf-8")))

    case(name, "adapter", why, make, said=said, legal=legal)


def bytes_case(name: str, why: str, edit: Callable[[bytes], bytes], *, said: str = WEIGHTS, **more: Any) -> None:
    """An adapter whose safetensors file is other bytes."""

    def make(folder: Path, good: Good) -> None:
        copied(folder, good)
        (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))

    case(name, "adapter", why, make, said=said, **more)


def header_case(
    name: str, why: str, edit: Callable[[dict[str, Any]], Any], *, said: str = WEIGHTS, **more: Any
) -> None:
    """An adapter whose safetensors header says other things of the same bytes."""

    def change(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        text = edit(header)
        return safetensors_bytes(text if isinstance(text, bytes) else json.dumps(header).encode(), content[8 + size :])

    bytes_case(name, why, change, said=said, **more)


def tensors_case(
    name: str, why: str, edit: Callable[[dict[str, Any]], Any], *, kind: str = "lora", said: str = "", **more: Any
) -> None:
    """An adapter with other tensors in a sound file."""

    def make(folder: Path, good: Good) -> None:
        from safetensors.torch import load_file, save_file

        copied(folder, good, kind)
        tensors = load_file(str(folder / WEIGHTS))
        changed = edit(tensors) or tensors
        save_file({key: value.contiguous() for key, value in changed.items()}, str(folder / WEIGHTS))

    case(name, "adapter", why, make, said=said, **more)


def folder_case(name: str, why: str, make: Callable[[Path, Good], Any], *, what: str = "adapter", **more: Any) -> None:
    """A good adapter (or model), and what `make` does to its folder."""

    def prepare(folder: Path, good: Good) -> Path | None:
        if what == "base":
            shutil.copytree(good.base, folder, dirs_exist_ok=True)
        else:
            copied(folder, good)
        return make(folder, good)

    case(name, what, why, prepare, **more)


def safetensors_bytes(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def header_size(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def flip(content: bytes, place: int, bit: int = 6) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path, Good], None]:
    def prepare(folder: Path, good: Good) -> None:
        (folder / name).unlink()
        make(folder / name)

    return prepare


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def beside(**files: Any) -> Callable[[Path, Good], None]:
    def prepare(folder: Path, good: Good) -> None:
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    return prepare


class RunsCommand:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


def link_to_itself(folder: Path, good: Good) -> Path:
    link = folder / "loop"
    link.symlink_to(folder / "pool")
    (folder / "pool").symlink_to(link)
    return link
