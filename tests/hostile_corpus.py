"""Files that a stranger could send: adapters, models, comparisons and data that are broken, absurd or mean harm.

`python tests/hostile_corpus.py FOLDER` writes them all, each in a folder of its own, and prints a line about each. Nothing
in them is random. No payload does more than to make the file `canary/RAN` in FOLDER: where it is, something was executed.
test_hostile.py hands each to the lab.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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
    can't be used. said: what the error must name. tells: what the lab must say of what it takes all the same. tags: "base" where only
    opening it as a lab fails, "either" where its being used is as good as an error.
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


# ----- what all start from -----


def make_good(root: Path) -> Good:
    """Write what every case starts from."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig
    from standins import tiny_llama, tiny_tokenizer, write_adapter, write_model

    from adapterlab import AdapterLab

    good = Good(root)
    good.canary.parent.mkdir(parents=True)
    (good.canary.parent / "hostile_import.py").write_text(
        f"open({str(good.canary)!r}, 'w').close()\n", encoding="utf-8"
    )
    write_model(good.base, tiny_llama(), tiny_tokenizer(chat=True))
    configs = {
        "lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=["v_proj", "up_proj"]),
        "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"]),
    }
    for seed, (kind, config) in enumerate(configs.items()):
        write_adapter(good.adapter(kind), tiny_llama(), config, base=str(good.base), seed=seed)
    lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
    lab.load_adapter(good.adapter("lora"), "pirate")
    lab.compare("Hello", max_new_tokens=3).to_json(good.comparison)
    lab.close()
    lab = AdapterLab(good.base)
    lab.load_adapter(good.adapter("lora"), "pirate")
    lab.load_adapter(good.adapter("ia3"), "poet")
    lab.train("poet", ["One text to learn."], max_steps=1)
    lab.set_adapter({"pirate": 0.5, "poet": 1.0})
    lab.compare("Hello", max_new_tokens=2)
    lab.save(good.lab)
    lab.close()
    return good


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


def config_case(name: str, why: str, *, kind: str = "lora", said: str = "", tells: str = "", legal: bool = False, **fields: Any) -> None:
    """An adapter whose config has other values; `...` takes the field out."""

    def make(folder: Path, good: Good) -> None:
        raw = copied(folder, good, kind)
        for key, value in fields.items():
            raw[key] = value
            if value is ...:
                del raw[key]
        dump(folder / CONFIG, raw)

    case(name, "adapter", why, make, legal=legal, tells=tells, said=said or ("" if legal else next(iter(fields))))


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
        return _safetensors(text if isinstance(text, bytes) else json.dumps(header).encode(), content[8 + size :])

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


def _safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _header_size(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def _flip(content: bytes, place: int, bit: int = 6) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


# ----- the safetensors file -----

bytes_case("weights-empty", "a weights file of 0 bytes", lambda b: b"")
bytes_case("weights-cut-in-the-length", "cut inside the 8 bytes of the header's length", lambda b: b[:5])
bytes_case("weights-cut-after-the-length", "nothing but the header's length", lambda b: b[:8])
bytes_case("weights-cut-in-the-header", "cut in the middle of the header", lambda b: b[: _header_size(b) // 2])
bytes_case("weights-cut-after-the-header", "a header without any data", lambda b: b[: _header_size(b)])
bytes_case("weights-cut-in-the-data", "the last byte is missing", lambda b: b[:-1])
bytes_case("weights-too-long", "a pickle hidden behind the data", lambda b: b + b"\x80\x04cos\nsystem\n" * 9)
bytes_case("weights-flip-in-the-length", "one bit of the header's length is flipped", lambda b: _flip(b, 1))
bytes_case("weights-flip-in-the-header", "one bit of the header's JSON is flipped", lambda b: _flip(b, 9))
bytes_case("weights-claims-2-63", "the header claims 2^63 bytes", lambda b: struct.pack("<Q", 1 << 63) + b[8:])
bytes_case(
    "weights-claims-2-64", "the header claims 2^64 − 1 bytes", lambda b: struct.pack("<Q", (1 << 64) - 1) + b[8:]
)
bytes_case("weights-claims-100-MB", "the header claims 100 MB", lambda b: struct.pack("<Q", 100_000_000) + b[8:])
bytes_case("weights-header-not-utf8", "the header's JSON is not UTF-8", lambda b: _safetensors(b'{"\xff\xfe":1}', b""))
bytes_case("weights-header-deep", "a header of nested lists", lambda b: _safetensors(b"[" * DEEP + b"]" * DEEP, b""))
bytes_case(
    "weights-header-deep-metadata",
    "metadata nested 100,000 deep",
    lambda b: _safetensors(b'{"__metadata__":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}", b""),
)
bytes_case("weights-header-a-list", "the header is a list", lambda b: _safetensors(b"[1, 2]", b""))
bytes_case("weights-header-null", "the header is null", lambda b: _safetensors(b"null", b""))
bytes_case(
    "weights-header-huge",
    "50,000 empty tensors that nobody needs",
    lambda b: _safetensors(
        json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}).encode(),
        b"",
    ),
    said="50000",
)
bytes_case(
    "weights-text", "a page of HTML, as a failed download leaves it", lambda b: b"<!DOCTYPE html>" + HTML.encode()
)
bytes_case(
    "weights-lfs-pointer",
    "the pointer that git leaves instead",
    lambda b: b"version https://git-lfs.github.com/spec/v1\n",
)


def _twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    other = json.dumps({FIRST: {**header[FIRST], "data_offsets": header[FIRST_B]["data_offsets"]}})
    return (text[:-1] + ", " + other[1:]).encode()


def _at(key: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[key].update(values)


header_case("header-key-twice", "one tensor twice in the header, at two places", _twice)
header_case(
    "header-overlap",
    "two tensors share their bytes",
    lambda h: h[FIRST].update(data_offsets=h[FIRST_B]["data_offsets"]),
)
header_case("header-beyond-the-end", "a tensor ends behind the file", _at(FIRST, data_offsets=[10**9, 10**9 + 512]))
header_case("header-negative-offset", "a tensor begins before the file", _at(FIRST, data_offsets=[-512, 0]))
header_case("header-backwards", "a tensor ends before it begins", _at(FIRST, data_offsets=[512, 0]))
header_case("header-offset-float", "offsets that are no whole numbers", _at(FIRST, data_offsets=[0.5, 512.5]))
header_case("header-unknown-dtype", "a dtype that there is not", _at(FIRST, dtype="F31"))
header_case("header-negative-shape", "a negative size", _at(FIRST, shape=[-4, -32]))
header_case("header-huge-shape", "sizes whose product overflows", _at(FIRST, shape=[1 << 40, 1 << 40]))
header_case("header-wrong-size", "a shape that the bytes don't fill", _at(FIRST, shape=[400, 3200]))
header_case("header-no-shape", "a tensor without a shape", lambda h: h[FIRST].pop("shape"))
header_case("header-metadata-number", "metadata that is no text", lambda h: h.update(__metadata__={"format": 7}))
header_case(
    "header-lies-about-dtype",
    "float32 said to be int32: the same size, other numbers",
    _at(FIRST, dtype="I32"),
    said=FIRST[17:],
)


# ----- the tensors -----


def _set(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def _filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return fill


SHORT = FIRST.removeprefix("base_model.model.")
tensors_case("tensors-nan", "one NaN", _set(FIRST, _filled(float("nan"))), said=SHORT, header=False)
tensors_case("tensors-inf", "one infinity", _set(FIRST, _filled(float("inf"))), said=SHORT, header=False)
tensors_case(
    "tensors-minus-inf", "one negative infinity", _set(FIRST_B, _filled(float("-inf"))), said="lora_B", header=False
)
tensors_case(
    "tensors-nan-half",
    "one NaN in half precision",
    _set(FIRST, lambda t: _filled(float("nan"))(t.half())),
    said=SHORT,
    header=False,
)
tensors_case(
    "tensors-nan-fp8",
    "one NaN in 8-bit floats",
    _set(FIRST, lambda t: _filled(float("nan"))(t).to(torch.float8_e4m3fn)),
    said=SHORT,
    header=False,
)
tensors_case(
    "tensors-overflow",
    "float64 numbers that float32 has no room for",
    _set(FIRST, lambda t: t.double() * 1e300),
    said=SHORT,
    header=False,
)
tensors_case(
    "tensors-int8", "whole numbers where floats belong", _set(FIRST, lambda t: (t * 100).to(torch.int8)), said=SHORT
)
tensors_case("tensors-int64", "64-bit whole numbers where floats belong", _set(FIRST, lambda t: t.long()), said=SHORT)
tensors_case("tensors-bool", "true and false where floats belong", _set(FIRST, lambda t: t > 0), said=SHORT)
tensors_case(
    "tensors-complex", "complex numbers where floats belong", _set(FIRST, lambda t: t.to(torch.complex64)), said=SHORT
)
tensors_case(
    "tensors-fp8",
    "8-bit floats: read as the numbers they are",
    lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()},
    legal=True,
)
tensors_case(
    "tensors-bfloat16",
    "half precision: read as the numbers they are",
    lambda t: {k: v.bfloat16() for k, v in t.items()},
    legal=True,
)
tensors_case(
    "tensors-float64",
    "double precision, in float32's range",
    lambda t: {k: v.double() for k, v in t.items()},
    legal=True,
)
tensors_case("tensors-none", "a sound file without any tensor", lambda t: {"nothing": torch.zeros(0)}, said="nothing")
tensors_case("tensors-transposed", "A is transposed", _set(FIRST, lambda t: t.T), said=SHORT)
tensors_case("tensors-scalar", "A is one number", _set(FIRST, lambda t: t.sum()), said=SHORT)
tensors_case("tensors-empty", "A has no rows", _set(FIRST, lambda t: t[:0]), said=SHORT)
tensors_case("tensors-extra-dimension", "A has a third dimension", _set(FIRST, lambda t: t[None]), said=SHORT)
tensors_case(
    "tensors-ia3-nan",
    "a NaN in IA3's scales",
    lambda t: t.update({k: _filled(float("nan"))(t[k]) for k in [min(t)]}),
    kind="ia3",
    said="ia3_l",
    header=False,
)
tensors_case(
    "tensors-missing-dora",
    "DoRA without one of its magnitudes",
    lambda t: t.pop(next(k for k in t if "magnitude" in k)) is t or t,
    kind="dora",
    legal=True,
)
tensors_case(
    "tensors-extra",
    "a tensor of a layer that there is not",
    lambda t: t.update({FIRST.replace("layers.0", "layers.99"): t[FIRST].clone()}),
    said="layers.99",
)
tensors_case(
    "tensors-base-weight",
    "carries a weight of the base",
    lambda t: t.update({"base_model.model.model.layers.0.mlp.down_proj.weight": torch.zeros(32, 64)}),
    said="down_proj.weight",
)
tensors_case(
    "tensors-base-layer",
    "carries the weight under the adapter",
    lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": torch.zeros(32, 32)}),
    said="base_layer",
)
tensors_case(
    "tensors-base-unprefixed",
    "carries a weight of the base under its own name",
    lambda t: t.update({"model.norm.weight": torch.zeros(32)}),
    said="model.norm.weight",
)
tensors_case(
    "tensors-embeddings",
    "carries the base's embeddings",
    lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(320, 32)}),
    said="embed_tokens",
)
tensors_case(
    "tensors-another-adapter",
    "carries keys of the adapter that the lab has",
    lambda t: t.update({FIRST.replace("lora_A.weight", "lora_A.keeper.weight"): torch.zeros(4, 32)}),
    said="keeper",
)
tensors_case(
    "tensors-default-name",
    "keys that name PEFT's default adapter",
    lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()},
    said="default",
)
tensors_case(
    "tensors-twice",
    "the same tensor with and without PEFT's prefix",
    lambda t: t.update({SHORT: t[FIRST].clone()}),
    said=WEIGHTS,
)
tensors_case(
    "tensors-climbing-key",
    "a key that climbs",
    lambda t: t.update({"base_model.model.../../../../etc/passwd": torch.zeros(1)}),
    said="passwd",
)
tensors_case(
    "tensors-dunder-key",
    "a key that names Python's own attributes",
    lambda t: t.update({"base_model.model.__class__.__init__.lora_A.weight": torch.zeros(1)}),
    said="__class__",
)
tensors_case(
    "tensors-html-key",
    "a key of HTML",
    lambda t: t.update({f"base_model.model.{HTML}.lora_A.weight": torch.zeros(1)}),
    said="script",
)
tensors_case(
    "tensors-long-key", "a key of 100,000 letters", lambda t: t.update({"a" * DEEP: torch.zeros(1)}), said="aaa"
)
tensors_case(
    "tensors-many-keys",
    "20,000 keys of layers that there are not",
    lambda t: t.update({f"base_model.model.x{i}.lora_A.weight": torch.zeros(1) for i in range(20_000)}),
    said="20000",
)
tensors_case(
    "tensors-nul-key",
    "a key with NUL, newlines and marks that turn the text round",
    lambda t: t.update({"a\x00\n\u202eb": torch.zeros(1)}),
    said="tensors",
)


# ----- pickles -----


class _System:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


class _Exec:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


class _Import:
    """Pickle's own way to import a module."""

    def __reduce__(self) -> Any:
        return __import__, ("hostile_import",)


class _Numpy:
    """An array of objects: numpy's loader would unpickle what is in it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        import numpy as np

        inside = io.BytesIO()
        np.save(inside, np.array([_System(self.canary)], dtype=object), allow_pickle=True)
        return _numpy_load, (inside.getvalue(),)


def _numpy_load(content: bytes) -> Any:
    import numpy as np

    return np.load(io.BytesIO(content), allow_pickle=True)


def pickle_case(name: str, why: str, write: Callable[[Path, dict[str, Any], Path], None], **more: Any) -> None:
    def make(folder: Path, good: Good) -> None:
        from safetensors.torch import load_file

        copied(folder, good)
        tensors = load_file(str(folder / WEIGHTS))
        (folder / WEIGHTS).unlink()
        write(folder / PICKLE, tensors, good.canary)

    case(name, "adapter", why, make, said=more.pop("said", PICKLE), **more)


def _tar(path: Path, canary: Path) -> None:
    """torch's oldest format: a tar of pickles."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(_System(canary))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _zip(path: Path, inside: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in inside.items():
            archive.writestr(name, content)


def _claims(path: Path, tensors: dict[str, Any], canary: Path) -> None:
    """A tensor whose pickle asks for far more storage than the file holds."""
    whole = io.BytesIO()
    torch.save({FIRST: torch.zeros(7919)}, whole)
    with zipfile.ZipFile(whole) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    wanted, claimed = b"M\xef\x1e", b"J\x00\x00\x00\x7f"  # 7919 and 2³¹ − 2²⁴, as pickle writes them
    _zip(path, {name: c.replace(wanted, claimed) if name.endswith("data.pkl") else c for name, c in inside.items()})


pickle_case("pickle-sound", "a pickle of tensors alone", lambda p, t, c: torch.save(t, p), legal=True)
pickle_case(
    "pickle-legacy",
    "the same in torch's older format",
    lambda p, t, c: torch.save(t, p, _use_new_zipfile_serialization=False),
    legal=True,
)
pickle_case(
    "pickle-system", "runs a command while it is unpickled", lambda p, t, c: torch.save({**t, "x": _System(c)}, p)
)
pickle_case(
    "pickle-system-legacy",
    "the same in torch's older format",
    lambda p, t, c: torch.save({**t, "x": _System(c)}, p, _use_new_zipfile_serialization=False),
)
pickle_case("pickle-exec", "runs Python while it is unpickled", lambda p, t, c: torch.save({**t, "x": _Exec(c)}, p))
pickle_case(
    "pickle-import", "imports a module while it is unpickled", lambda p, t, c: torch.save({**t, "x": _Import()}, p)
)
pickle_case("pickle-numpy", "hides a second pickle in an array", lambda p, t, c: torch.save({**t, "x": _Numpy(c)}, p))
pickle_case("pickle-bare", "a pickle that is not torch's", lambda p, t, c: p.write_bytes(pickle.dumps(_System(c))))
pickle_case("pickle-tar", "torch's oldest format, a tar of pickles", lambda p, t, c: _tar(p, c))
pickle_case(
    "pickle-script",
    "torch's format for programs",
    lambda p, t, c: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(p)),
)
pickle_case(
    "pickle-zip-bomb",
    "a zip of 200 kB with a pickle of 200 MB in it",
    lambda p, t, c: _zip(
        p, {"a/data.pkl": b"\x80\x02" + b"0" * 2 * 10**8, "a/version": b"3\n", "a/byteorder": b"little"}
    ),
)
pickle_case("pickle-claims-memory", "claims a tensor of 8 GB", _claims)
pickle_case(
    "pickle-recursion",
    "tuples in tuples, 100,000 deep",
    lambda p, t, c: p.write_bytes(b"\x80\x02" + b"(" * DEEP + b"t" * DEEP + b"."),
)
pickle_case("pickle-nothing", "0 bytes", lambda p, t, c: p.write_bytes(b""))
pickle_case("pickle-text", "a page of HTML", lambda p, t, c: p.write_bytes(b"<!DOCTYPE html>"))
pickle_case("pickle-list", "a list where a mapping belongs", lambda p, t, c: torch.save(list(t.values()), p))
pickle_case("pickle-nested", "a mapping in a mapping", lambda p, t, c: torch.save({"state": t}, p))
pickle_case("pickle-number-keys", "keys that are no text", lambda p, t, c: torch.save(dict(enumerate(t.values())), p))
pickle_case(
    "pickle-expanded",
    "a tensor of 40 GB that takes four bytes in the file",
    lambda p, t, c: torch.save({**t, FIRST: torch.zeros(1).expand(10**10)}, p),
    said="lora_A",
)
pickle_case(
    "pickle-sparse",
    "a sparse tensor of 4 TB",
    lambda p, t, c: torch.save(
        {**t, FIRST: torch.sparse_coo_tensor(torch.zeros(2, 0), torch.zeros(0), (10**6, 10**6))}, p
    ),
    said="lora_A",
)
pickle_case(
    "pickle-meta",
    "a tensor without values",
    lambda p, t, c: torch.save({**t, FIRST: t[FIRST].to("meta")}, p),
    said="lora_A",
)
pickle_case(
    "pickle-quantised",
    "a tensor of torch's own quantisation",
    lambda p, t, c: torch.save({**t, FIRST: torch.quantize_per_tensor(t[FIRST], 0.1, 0, torch.qint8)}, p),
    said="lora_A",
)


# ----- the config's values -----

for _label, _value in {
    "text": "8", "list": [8], "mapping": {"r": 8}, "null": None, "true": True, "fraction": 4.5, "zero": 0, "minus": -4,
    "huge": 10**30, "float-huge": 1e30, "nan": float("nan"),
}.items():  # fmt: skip
    config_case(f"r-{_label}", f"r is {_value!r}", r=_value, said="r=")
config_case("r-absurd", "a rank that would take terabytes", r=10**10, said="shape")
for _label, _value in {
    "text": "x",
    "list": [8],
    "null": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "huge": 1e300,
}.items():
    config_case(f"alpha-{_label}", f"lora_alpha is {_value!r}", lora_alpha=_value)
config_case(
    "alpha-minus", "a negative lora_alpha: turns the adapter round, and is said in no error", legal=True, lora_alpha=-8
)
for _label, _value in {
    "high": 7,
    "minus": -1,
    "text": "much",
    "null": None,
    "nan": float("nan"),
    "list": [0.1],
}.items():
    config_case(f"dropout-{_label}", f"lora_dropout is {_value!r}", lora_dropout=_value)
for _label, _value in {
    "number": 7, "nested": [["q_proj"], ["v_proj"]], "empty": [], "null": None, "mapping": {"q_proj": {"v_proj": 1}}, "empty-text": "",
    "empty-names": [""], "numbers": [1, 2], "true": True, "wrong": ["nothing"],
}.items():  # fmt: skip
    config_case(f"targets-{_label}", f"target_modules is {_value!r}", target_modules=_value, legal=_label == "null")
config_case("targets-many", "target_modules of 300,000 names", target_modules=[f"m{i}" for i in range(300_000)])
config_case("targets-everything", "target_modules that match every module", target_modules=".*", said="PEFT")
config_case(
    "targets-bad-pattern", "target_modules that is no regular expression", target_modules="(((", said="target_modules"
)
config_case("targets-html", "a target of HTML", target_modules=[HTML], said="target_modules")
for _field, _value in {
    "target_modules": NEVER, "exclude_modules": NEVER, "rank_pattern": {NEVER: 4}, "alpha_pattern": {NEVER: 4},
}.items():  # fmt: skip
    config_case(f"never-{_field}", f"{_field} with a regular expression that never ends", **{_field: _value})
config_case("never-classic", "target_modules of the kind (a+)+$", target_modules=r"^(([a-z_])+.?)+[A-Z]([a-z])+$")
config_case("never-choices", "thirty choices without a star", target_modules=r"(\w|\w\w|.)(\w|\w\w|.)" * 15 + "!")
config_case(
    "never-polynomial", "no nested star, yet its work grows with the ninth power", target_modules=r".*.*.*.*.*.*.*.*.*!"
)
config_case(
    "never-backreference", "a pattern that refers to itself", target_modules=r"((.*)(.*)(.*)\2\3\4)+\1!", said="PEFT"
)
config_case("never-lookahead", "the same hidden in a look-ahead", target_modules=r"(?=(\w+\.?)+!).*")
config_case(
    "never-layers_pattern",
    "layers_pattern with a regular expression that never ends",
    target_modules=["q_proj", "v_proj"],
    layers_to_transform=[0],
    layers_pattern=["(.*.*)*.*!"],
    said="layers_pattern",
)
config_case(
    "never-layers_pattern-text",
    "the same as one text",
    layers_to_transform=[0],
    layers_pattern=NEVER,
    said="layers_pattern",
)
config_case(
    "never-modules_to_save", "modules_to_save, which PEFT reads as regular expressions", modules_to_save=[NEVER]
)
config_case(
    "never-feedforward",
    "IA3's feedforward_modules",
    kind="ia3",
    target_modules=".*(k_proj|v_proj|down_proj)",
    feedforward_modules=NEVER,
    said="feedforward_modules",
)
config_case(
    "never-compiled",
    "a regular expression that can't even be compiled",
    target_modules="(" * 5000 + ")" * 5000,
    said="target_modules",
)
config_case("pattern-many", "rank_pattern with 50,000 entries", rank_pattern={f"x{i}": 4 for i in range(50_000)})
for _label, _value in {
    "list": ["q_proj"],
    "text": "q_proj",
    "number": 4,
    "of-text": {"q_proj": "x"},
    "of-zero": {"q_proj": 0},
    "of-minus": {"q_proj": -3},
    "of-null": {"q_proj": None},
    "of-lists": {"q_proj": [4]},
}.items():
    config_case(f"rank_pattern-{_label}", f"rank_pattern is {_value!r}", rank_pattern=_value)
config_case(
    "rank_pattern-absurd", "rank_pattern that would take terabytes", rank_pattern={"q_proj": 10**11}, said="shape"
)
config_case("rank_pattern-bad-pattern", "rank_pattern whose key is no regular expression", rank_pattern={"(": 4})
for _label, _value in {"nan": {"q_proj": float("nan")}, "of-text": {"q_proj": "x"}, "list": [1]}.items():
    config_case(f"alpha_pattern-{_label}", f"alpha_pattern is {_value!r}", alpha_pattern=_value)
for _label, _value in {
    "text": "all",
    "nested": [[0]],
    "mapping": {"0": 1},
    "fraction": 0.5,
    "beyond": [99],
    "minus": [-1],
    "many": list(range(200_000)),
}.items():
    config_case(f"layers-{_label}", f"layers_to_transform is {str(_value)[:20]}", layers_to_transform=_value)
for _label, _value in {"all": "all", "unknown": "sideways", "list": ["none"], "number": 3, "mapping": {"a": 1}}.items():
    config_case(f"bias-{_label}", f"bias is {_value!r}", bias=_value)
for _label, _value in {
    "unknown": "FLORP",
    "number": 7,
    "list": ["LORA"],
    "null": None,
    "missing": ...,
    "lower": "lora",
    "other": "IA3",
    "prompt": "PROMPT_TUNING",
    "shared": "VERA",
    "html": HTML,
    "dunder": "__class__",
}.items():
    config_case(
        f"type-{_label}",
        f"peft_type is {_value!r}",
        peft_type=_value,
        said="IA3"
        if _label == "other"
        else (
            "VERA"
            if _label == "shared"
            else "peft_type"
            if _value is None or _value is ... or not isinstance(_value, str)
            else _value[:20]
        ),
    )
config_case(
    "dora-without-magnitudes",
    "use_dora over a file without magnitudes, which are the base's then: said, and loaded",
    use_dora=True,
    legal=True,
    said="lora_magnitude_vector",
)
config_case("dora-text", "use_dora is a text", use_dora="no")
config_case("rslora-text", "use_rslora is a text", use_rslora="false")
config_case("dora-on-ia3", "an option of another method", kind="ia3", legal=True, use_dora=True)
for _label, _value in {
    "nonsense": "SUMMON",
    "classes": "SEQ_CLS",
    "list": ["CAUSAL_LM"],
    "number": 5,
    "mapping": {"a": 1},
}.items():
    config_case(f"task-{_label}", f"task_type is {_value!r}", task_type=_value, said="task")
for _value in ("pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga"):
    config_case(f"init-{_value}", f"init_lora_weights={_value!r} changes the base", init_lora_weights=_value)
config_case("init-nonsense", "init_lora_weights of no meaning", init_lora_weights="florp")
config_case("init-list", "init_lora_weights is a list", init_lora_weights=["gaussian"])
config_case("fan_in_fan_out-text", "fan_in_fan_out is a text", fan_in_fan_out="maybe")
config_case("replication", "a base with other layers", layer_replication=[[0, 2], [0, 2]])
config_case("replication-absurd", "a base of 10⁹ layers", layer_replication=[[0, 10**9]])
config_case(
    "token-indices-absurd", "trains a token beyond any vocabulary", trainable_token_indices=[10**12], said=str(10**12)
)
config_case("token-indices-text", "trainable_token_indices is a text", trainable_token_indices="all")
config_case("save-everything", "modules_to_save that names the whole model", modules_to_save=["model"])
config_case("save-numbers", "modules_to_save of numbers", modules_to_save=[1])
config_case("save-text", "modules_to_save is a text", modules_to_save="lm_head")
config_case("parameters-number", "target_parameters is a number", target_parameters=7)
config_case(
    "megatron",
    "a config that imports a library",
    megatron_config={"a": 1},
    megatron_core="hostile_import",
    said="megatron_core",
)
config_case("loftq-text", "loftq_config is a text", loftq_config="florp")
config_case("runtime-number", "runtime_config is a number", runtime_config=7)
config_case("eva-config", "a config inside the config, of wrong types", eva_config={"rho": "x"})
config_case("adalora-ranks", "target_r above init_r", kind="adalora", legal=True, target_r=100)
config_case(
    "adalora-steps",
    "more warm-up than steps",
    kind="adalora",
    tinit=10**9,
    tfinal=10**9,
    total_step=1,
    said="total_step",
)
config_case("adalora-no-steps", "no total_step at all", kind="adalora", total_step=None)
config_case("adalora-steps-text", "total_step is a text", kind="adalora", total_step="ten")
config_case("adalora-init_r", "init_r that would take terabytes", kind="adalora", init_r=10**10, said="shape")
config_case("adalora-init_r-minus", "init_r is negative", kind="adalora", init_r=-1)
config_case("adalora-pattern-text", "rank_pattern of AdaLoRA is a text", kind="adalora", rank_pattern="all")
config_case(
    "adalora-pattern-numbers",
    "rank_pattern of AdaLoRA holds numbers",
    kind="adalora",
    rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": 4},
)
config_case(
    "adalora-pattern-foreign",
    "rank_pattern of AdaLoRA names other layers",
    kind="adalora",
    rank_pattern={"x.lora_E": [True] * 4},
)
config_case(
    "adalora-pattern-long",
    "rank_pattern of AdaLoRA with a mask of 10⁶",
    kind="adalora",
    rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True] * 10**6},
    said="lora_E",
)
config_case(
    "unknown-fields",
    "fields that PEFT does not know, one of them Python's",
    legal=True,
    __class__="os.system",
    florp=[1],
)
config_case("inference_mode-text", "inference_mode is a text", inference_mode="no")


# ----- where the config points -----

for _label, _value in {
    "climbs": "../../../../../../../../../../etc", "absolute": "/etc", "file": "/etc/passwd", "device": "/dev/zero", "address": "http://127.0.0.1:9/model", "control": "a\x00b\x1b[31m\n",
    "huge": "a/" * 3000 + "b", "long": "a" * 5000, "home": "~nobody-of-this-name/model", "number": 7, "list": ["gpt2"], "null": None, "dots": "..", "turned": "\u202egnp.exe", "html": HTML, "git": "git+ssh://x/y",
}.items():  # fmt: skip
    config_case(
        f"names-base-{_label}",
        f"base_model_name_or_path is {str(_value)[:30]!r}",
        legal=_label not in ("number", "list"),
        base_model_name_or_path=_value,
    )
    CASES[-1] = Case(
        **{
            **CASES[-1].__dict__,
            "tags": frozenset({"base"}),
            "said": "base_model_name_or_path" if _label in ("number", "list", "null") else "",
        }
    )


def _points_at(make: Callable[[Path], Any]) -> Callable[[Path, Good], None]:
    def prepare(folder: Path, good: Good) -> None:
        target = folder / "target"
        make(target)
        dump(folder / CONFIG, {**read(folder / CONFIG), "base_model_name_or_path": str(target)})

    return prepare


folder_case(
    "names-base-loop",
    "its base is a symlink to itself",
    _points_at(lambda t: t.symlink_to(t)),
    legal=True,
    tags=frozenset({"base"}),
)
folder_case(
    "names-base-fifo",
    "its base is a pipe that nobody writes into",
    _points_at(os.mkfifo),
    legal=True,
    tags=frozenset({"base"}),
)
folder_case(
    "names-base-empty", "its base is an empty folder", _points_at(Path.mkdir), legal=True, tags=frozenset({"base"})
)
folder_case(
    "names-base-itself",
    "its base is itself",
    lambda f, g: dump(f / CONFIG, {**read(f / CONFIG), "base_model_name_or_path": str(f)}),
    legal=True,
    tags=frozenset({"base"}),
)
config_case("revision-list", "revision is a list", revision=["main"])
config_case("revision-climbs", "revision climbs out of the cache", legal=True, revision="../../../etc")
config_case(
    "mapping-import",
    "auto_mapping names a library that does something when it is imported",
    legal=True,
    task_type=None,
    auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "hostile_import"},
)
config_case(
    "mapping-os",
    "auto_mapping names os.system",
    legal=True,
    task_type=None,
    auto_mapping={"base_model_class": "system", "parent_library": "os"},
)
config_case("mapping-list", "auto_mapping is a list", legal=True, auto_mapping=["os", "system"])
config_case("auto_map", "auto_map with code beside it", legal=True, auto_map={"AutoConfig": "hostile_import.Config"})


# ----- the config's text -----

config_text("config-empty", "0 bytes", lambda t: b"")
config_text("config-cut", "cut in the middle", lambda t: t[: len(t) // 2].encode())
config_text("config-list", "a list", lambda t: f"[{t}]".encode())
config_text("config-text", "a text", lambda t: b'"LORA"')
config_text("config-not-utf8", "not UTF-8", lambda t: t.encode("utf-16"))
config_text("config-latin1", "one byte that is not UTF-8", lambda t: t.replace("LORA", "LOR\u00c4").encode("latin-1"))
config_text("config-bom", "a byte order mark, as some editors put there", lambda t: t.encode("utf-8-sig"), legal=True)
config_text("config-deep", "nested 100,000 deep", lambda t: b'{"peft_type": ' + b"[" * DEEP + b"]" * DEEP + b"}")
config_text("config-deep-mapping", "mappings nested 100,000 deep", lambda t: b'{"a":' * DEEP + b"1" + b"}" * DEEP)
config_text("config-huge", "200 MB of spaces", lambda t: t.encode() + b" " * 200_000_000)
config_text(
    "config-long-number", "a number of a million digits", lambda t: t.replace('"r": 4', '"r": ' + "9" * 10**6).encode()
)
config_text(
    "config-twice",
    "a key twice: the last one counts, as for PEFT",
    lambda t: (t.rstrip()[:-1].rstrip() + ', "r": 4}').encode(),
    legal=True,
)
config_text("config-pickle", "a pickle", lambda t: pickle.dumps(dict))
config_text("config-nul", "NUL bytes", lambda t: b"\x00" * 4096)
config_text("config-surrogates", "half characters", lambda t: t.replace('"LORA"', '"\\ud800"').encode(), said="method")


# ----- the folder -----


def _instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path, Good], None]:
    def prepare(folder: Path, good: Good) -> None:
        (folder / name).unlink()
        make(folder / name)

    return prepare


def _node(path: Path) -> None:
    path.symlink_to("/dev/zero")


for _name in (CONFIG, WEIGHTS):
    _short = "config" if _name == CONFIG else "weights"
    folder_case(f"{_short}-folder", f"{_name} is a folder", _instead(_name, Path.mkdir), said=_name)
    folder_case(f"{_short}-fifo", f"{_name} is a pipe that nobody writes into", _instead(_name, os.mkfifo), said=_name)
    folder_case(f"{_short}-device", f"{_name} is a link to /dev/zero", _instead(_name, _node), said=_name)
    folder_case(
        f"{_short}-loop", f"{_name} is a link to itself", _instead(_name, lambda p: p.symlink_to(p)), said=_name
    )
    folder_case(
        f"{_short}-dangling",
        f"{_name} is a link to nothing",
        _instead(_name, lambda p: p.symlink_to("/nowhere")),
        said=_name,
    )
folder_case("weights-gone", "there are no weights", _instead(WEIGHTS, lambda p: None), said=WEIGHTS)
folder_case(
    "weights-index",
    "an index of shards that climbs out of the folder",
    lambda f, g: dump(
        _instead(WEIGHTS, lambda p: None)(f, g) or f / (WEIGHTS + ".index.json"),
        {"weight_map": {FIRST: "../../../../etc/passwd"}},
    ),
    said=WEIGHTS,
)


def _loop(folder: Path, good: Good) -> Path:
    link = folder / "loop"
    link.symlink_to(folder / "pool")
    (folder / "pool").symlink_to(link)
    return link


folder_case("folder-loop", "the folder is a link to a link to itself", _loop, said="loop")
folder_case(
    "folder-in-itself", "the folder holds a link to itself", lambda f, g: (f / "again").symlink_to(f), legal=True
)
for _label, _value in {
    "html": "<b onclick=x>",
    "newline": "a\nb",
    "turned": "\u202etxt.exe",
    "dots": "..x..",
    "quote": "a'\"`b",
    "percent": "%s%n{0}",
    "spaces": "   ",
    "dash": "--force",
}.items():

    def _named(folder: Path, good: Good, name: str = _value) -> Path:
        copied(folder / name, good)
        return folder / name

    case(f"folder-name-{_label}", "adapter", f"a folder called {_value!r}: its name is made safe", _named, legal=True)


def _beside(**files: Any) -> Callable[[Path, Good], None]:
    def prepare(folder: Path, good: Good) -> None:
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    return prepare


folder_case(
    "beside-code",
    "a tokenizer with code beside it",
    _beside(
        tokenizer_config__json={"auto_map": {"AutoTokenizer": ["hostile_import.T", None]}, "tokenizer_class": "T"},
        hostile_import__py="raise SystemExit",
        tokenizer__json={},
    ),
    legal=True,
)
folder_case(
    "beside-template",
    "a chat template that would run code",
    _beside(tokenizer_config__json={"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}),
    legal=True,
)
folder_case(
    "beside-endless-template",
    "a chat template that never ends",
    _beside(
        tokenizer_config__json={
            "chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        }
    ),
    legal=True,
)
folder_case(
    "beside-deep", "a tokenizer nested 100,000 deep", _beside(tokenizer__json="[" * DEEP + "]" * DEEP), legal=True
)
folder_case(
    "beside-types",
    "a tokenizer whose values are of wrong types",
    _beside(
        tokenizer__json={"model": {"vocab": 7}, "added_tokens": {"a": 1}},
        special_tokens_map__json=[1],
        tokenizer_config__json={
            "added_tokens_decoder": [1],
            "eos_token": {"content": {"a": 1}},
            "additional_special_tokens": 3,
        },
    ),
    legal=True,
)
folder_case(
    "beside-huge-id",
    "a tokenizer with a token of number 10³⁰⁰⁰",
    _beside(tokenizer__json='{"model": {"vocab": {"a": 1' + "0" * 3000 + "}}}"),
    legal=True,
)
folder_case(
    "beside-digits",
    "a tokenizer that numbers a token in other digits",
    _beside(
        tokenizer_config__json={
            "added_tokens_decoder": {"²": {"content": "x", "special": True}, "9" * 5000: {"content": "y"}}
        }
    ),
    legal=True,
)
folder_case("beside-fifo", "a tokenizer that is a pipe", lambda f, g: os.mkfifo(f / "tokenizer.json"), legal=True)
folder_case(
    "beside-card",
    "a card with HTML and a script",
    _beside(README__md=f"---\nbase_model: {HTML}\n---\n{HTML}"),
    legal=True,
)
folder_case(
    "beside-python",
    "Python files of the libraries' names",
    _beside(torch__py="raise SystemExit", peft__py="raise SystemExit", sitecustomize__py="raise SystemExit"),
    legal=True,
)


# ----- base models -----


def base_config(name: str, why: str, **fields: Any) -> None:
    said = fields.pop("_said", "")
    legal = fields.pop("_legal", False)
    tags = frozenset({"either"}) if fields.pop("_either", False) else frozenset()

    def make(folder: Path, good: Good) -> None:
        raw = read(folder / "config.json")
        for key, value in fields.items():
            raw[key] = value
            if value is ...:
                del raw[key]
        dump(folder / "config.json", raw)

    folder_case(name, why, make, what="base", said=said, legal=legal, tags=tags)


def _base_bytes(
    name: str, why: str, edit: Callable[[bytes], bytes], file: str = "model.safetensors", **more: Any
) -> None:
    folder_case(name, why, lambda f, g: (f / file).write_bytes(edit((f / file).read_bytes())), what="base", **more)


base_config(
    "base-code",
    "needs code of its own",
    auto_map={"AutoConfig": "hostile_import.C", "AutoModelForCausalLM": "hostile_import.M"},
    model_type="florp",
    architectures=["M"],
)
base_config(
    "base-code-known",
    "code of its own for a known type",
    _legal=True,
    auto_map={"AutoConfig": "hostile_import.C", "AutoModelForCausalLM": "hostile_import.M"},
)
base_config(
    "base-code-elsewhere",
    "code out of another repository",
    auto_map={"AutoConfig": "evil/repo--hostile_import.C"},
    model_type="florp",
)
base_config("base-hidden-huge", "a hidden size of 10⁹", hidden_size=10**9, intermediate_size=10**9)
base_config("base-vocabulary-huge", "a vocabulary of 10¹²", vocab_size=10**12)
base_config("base-layers-huge", "10⁷ layers", num_hidden_layers=10**7)
base_config("base-layers-many", "2,000 layers, two of which are in the file", num_hidden_layers=2000)
base_config("base-heads-huge", "10⁹ heads", num_attention_heads=10**9, num_key_value_heads=10**9)
base_config("base-positions-huge", "positions without end", _legal=True, max_position_embeddings=10**15)
base_config("base-hidden-zero", "a hidden size of 0", hidden_size=0)
base_config("base-hidden-minus", "a negative hidden size", hidden_size=-32)
base_config("base-hidden-text", "a hidden size that is a text", hidden_size="large")
base_config("base-hidden-list", "a hidden size that is a list", hidden_size=[32])
base_config("base-heads-zero", "no heads", num_attention_heads=0)
base_config(
    "base-heads-odd",
    "heads that don't divide the hidden size",
    num_attention_heads=7,
    num_key_value_heads=7,
    head_dim=...,
)
base_config("base-type-unknown", "a type that there is not", model_type="florp")
base_config("base-type-list", "model_type is a list", model_type=["llama"])
base_config("base-type-none", "no model_type", model_type=...)
base_config("base-type-other", "a type that generates no text", model_type="bert", architectures=["BertModel"])
base_config("base-architectures-text", "architectures is a text", architectures="LlamaForCausalLM")
base_config("base-architectures-numbers", "architectures of numbers", architectures=[1, None])
base_config("base-dtype-nonsense", "a dtype that there is not", dtype="float7", torch_dtype="float7")
base_config("base-dtype-attribute", "a dtype that is another thing of torch's", dtype="load", torch_dtype="load")
base_config("base-rope-nonsense", "rope settings of wrong types", rope_parameters="fast", rope_scaling="fast")
base_config("base-act-nonsense", "an activation that there is not", hidden_act="os.system")
base_config(
    "base-quantization-nonsense",
    "a quantizer that there is not",
    quantization_config={"quant_method": "florp"},
    _either=True,
)
base_config("base-quantization-text", "quantization_config is a text", quantization_config="florp")
base_config(
    "base-attention-code",
    "attention fetched from a repository of kernels",
    attn_implementation="evil/kernels",
    _attn_implementation="evil/kernels",
)
base_config(
    "base-name-elsewhere", "says that it is another model", _legal=True, _name_or_path="/etc", name_or_path="../../etc"
)
base_config(
    "base-html", "HTML wherever there is text", transformers_version=HTML, architectures=[HTML], model_type=HTML
)
_base_bytes(
    "base-config-list", "config.json is a list", lambda b: b"[" + b + b"]", "config.json", said="base-config-list"
)
_base_bytes(
    "base-config-deep", "config.json nested 100,000 deep", lambda b: b'{"a":' * DEEP + b"1" + b"}" * DEEP, "config.json"
)
_base_bytes("base-config-cut", "config.json cut", lambda b: b[:40], "config.json")
_base_bytes("base-config-not-utf8", "config.json not UTF-8", lambda b: b.decode().encode("utf-16"), "config.json")
_base_bytes("base-config-huge", "config.json with 200 MB of spaces", lambda b: b + b" " * 200_000_000, "config.json")
_base_bytes("base-weights-cut", "weights cut in the middle", lambda b: b[: len(b) // 2])
_base_bytes("base-weights-empty", "weights of 0 bytes", lambda b: b"")
_base_bytes(
    "base-weights-claim", "weights whose header claims 2^63 bytes", lambda b: struct.pack("<Q", 1 << 63) + b[8:]
)
_base_bytes(
    "base-weights-flip",
    "one bit of a tensor's name flipped: its weight is missing, which is said",
    lambda b: _flip(b, 30),
    tags=frozenset({"either"}),
)
_base_bytes("base-weights-nothing", "a sound file without any tensor", lambda b: _safetensors(b"{}", b""))


def _base_pickle(folder: Path, good: Good) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": _System(good.canary)}, folder / "pytorch_model.bin")


def _base_index(shard: str) -> Callable[[Path, Good], None]:
    def prepare(folder: Path, good: Good) -> None:
        from safetensors import safe_open

        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            keys = list(file.keys())
        (folder / "model.safetensors").unlink()
        dump(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, shard)},
        )

    return prepare


folder_case("base-pickle", "weights that run a command", _base_pickle, what="base")
for _label, _value in {
    "climbs": "../../good/base/model.safetensors", "absolute": "/etc/passwd", "device": "../../../../../../../dev/zero", "number": 7, "list": ["a"], "gone": "model-00001.safetensors", "long": "a" * 5000, "nul": "a\x00b",
}.items():  # fmt: skip
    folder_case(
        f"base-index-{_label}", f"an index whose shard is {str(_value)[:30]!r}", _base_index(_value), what="base"
    )
folder_case(
    "base-index-text",
    "an index that is a text",
    lambda f, g: ((f / "model.safetensors").unlink(), dump(f / "model.safetensors.index.json", "florp")),
    what="base",
)
folder_case(
    "base-index-map-list",
    "an index whose weight_map is a list",
    lambda f, g: (((f / "model.safetensors").unlink(), dump(f / "model.safetensors.index.json", {"weight_map": [1]}))),
    what="base",
)
folder_case("base-weights-fifo", "weights that are a pipe", _instead("model.safetensors", os.mkfifo), what="base")
folder_case(
    "base-weights-device", "weights that are a link to /dev/zero", _instead("model.safetensors", _node), what="base"
)
folder_case("base-config-fifo", "config.json is a pipe", _instead("config.json", os.mkfifo), what="base")
folder_case("base-config-folder", "config.json is a folder", _instead("config.json", Path.mkdir), what="base")
folder_case("base-loop", "a link to itself", _loop, what="base", said="loop")
folder_case(
    "base-tokenizer-code",
    "a tokenizer with code of its own",
    _beside(tokenizer_config__json={"auto_map": {"AutoTokenizer": ["hostile_import.T", None]}, "tokenizer_class": "T"}),
    what="base",
    tags=frozenset({"either"}),
)
folder_case(
    "base-tokenizer-deep",
    "a tokenizer nested 100,000 deep",
    _beside(tokenizer__json="[" * DEEP + "]" * DEEP),
    what="base",
)
folder_case(
    "base-tokenizer-types",
    "a tokenizer whose values are of wrong types",
    _beside(tokenizer__json={"model": {"vocab": 7}}),
    what="base",
)
folder_case("base-tokenizer-list", "tokenizer_config.json is a list", _beside(tokenizer_config__json=[1]), what="base")
folder_case(
    "base-tokenizer-fifo",
    "a tokenizer that is a pipe",
    _instead("tokenizer.json", os.mkfifo),
    what="base",
    tags=frozenset({"either"}),
)
folder_case(
    "base-template-code",
    "a chat template that would run code",
    lambda f, g: (f / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__ }}"
    ),
    what="base",
    legal=True,
    tags=frozenset({"template"}),
)
folder_case(
    "base-generation-types",
    "generation_config.json of wrong types",
    _beside(generation_config__json={"eos_token_id": "x", "max_length": "y", "do_sample": 7}),
    what="base",
    tags=frozenset({"either"}),
)
folder_case(
    "base-generation-code",
    "generation_config.json that names code",
    _beside(generation_config__json={"custom_generate": "evil/repo"}),
    what="base",
    tags=frozenset({"either"}),
)
folder_case(
    "base-generate-file",
    "a custom_generate folder with code",
    lambda f, g: (
        ((f / "custom_generate").mkdir(), (f / "custom_generate" / "generate.py").write_text("import hostile_import\n"))
    ),
    what="base",
    legal=True,
)


# ----- comparisons -----


def comparison_case(name: str, why: str, edit: Callable[[dict[str, Any]], Any], **more: Any) -> None:
    def make(folder: Path, good: Good) -> Path:
        content = read(good.comparison)
        changed = edit(content)
        path = folder / "comparison.json"
        if isinstance(changed, (bytes, str)):
            path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
        else:
            dump(path, content)
        return path

    case(name, "comparison", why, make, said=more.pop("said", "comparison.json"), **more)


def _generation(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["generations"][1].update(values)


def _walk(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _walk(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_walk(item, change) for item in value]
    return change(value)


def _html_everywhere(content: dict[str, Any]) -> None:
    kept = {key: content[key] for key in ("format", "version")}
    changed = _walk(content, lambda value: HTML if isinstance(value, str) else value)
    content.clear()
    content.update(changed)
    content.update(kept)


def _many_columns(content: dict[str, Any]) -> bytes:
    one = {
        **content["generations"][0],
        "token_ids": [],
        "tokens": [],
        "logprobs": [],
        "leads": [],
        "base_logprobs": None,
    }
    before, after = json.dumps({**one, "column": "@"}).encode().split(b"@")
    rows = b",".join(before + b"c%d" % number + after for number in range(1_000_000))
    return json.dumps({**content, "generations": ["@"]}).encode().replace(b'"@"', rows)


comparison_case("comparison-empty", "0 bytes", lambda c: b"")
comparison_case("comparison-cut", "cut in the middle", lambda c: json.dumps(c)[:500])
comparison_case("comparison-deep", "nested 100,000 deep", lambda c: '{"format":' * DEEP + "1" + "}" * DEEP)
comparison_case(
    "comparison-deep-settings",
    "settings nested 100,000 deep",
    lambda c: json.dumps({**c, "settings": "@"}).replace('"@"', '{"a":' * DEEP + "1" + "}" * DEEP),
)
comparison_case(
    "comparison-deep-900",
    "settings nested 900 deep: the reader's limit is the writer's, too",
    lambda c: json.dumps({**c, "settings": "@"}).replace('"@"', '{"a":' * 900 + "1" + "}" * 900),
    tags=frozenset({"either"}),
)
comparison_case("comparison-not-utf8", "not UTF-8", lambda c: json.dumps(c).encode("utf-16"))
comparison_case(
    "comparison-surrogates", "half characters", _generation(text="\ud800", prompt="\udfff"), tags=frozenset({"either"})
)
comparison_case("comparison-list", "a list", lambda c: json.dumps([c]))
comparison_case("comparison-format", "another format", lambda c: c.update(format="florp"))
comparison_case("comparison-version", "a version to come", lambda c: c.update(version=2))
comparison_case(
    "comparison-version-true",
    "version is true, which equals 1",
    lambda c: c.update(version=True),
    tags=frozenset({"either"}),
)
comparison_case("comparison-version-list", "version is a list", lambda c: c.update(version=[1]))
comparison_case("comparison-html", "HTML in every text", _html_everywhere, legal=True)
comparison_case("comparison-million", "10⁶ columns", _many_columns)
for _key in ("prompts", "rendered", "prompt_ids", "settings", "model", "created", "generations"):
    comparison_case(f"comparison-no-{_key}", f"without {_key}", lambda c, key=_key: c.pop(key) is c or None)
    comparison_case(f"comparison-{_key}-number", f"{_key} is a number", lambda c, key=_key: c.update({key: 7}))
    comparison_case(
        f"comparison-{_key}-nested",
        f"{_key} is a list of lists of lists",
        lambda c, key=_key: c.update({key: [[["x"]]]}),
    )
for _key, _values in {
    "prompt_index": [7, -1, "0", 0.5, None, True, 10**30, float("nan")],
    "token_ids": [["x"], 7, [10**30] * 3, [-1] * 3, [1.5] * 3, [None] * 3, [[1]] * 3, "abc", [float("nan")] * 3],
    "tokens": [[1, 2, 3], "abc", None],
    "logprobs": [["a", "b", "c"], [None] * 3, [10**400] * 3, [True] * 3, "abc"],
    "leads": [["a"], 7, [1.0]],
    "asked": [[["pirate", "x"]], [["pirate", float("nan")]], "pirate", [["pirate"]], [[None, 1]], [["pirate", 10**400]]],
    "seconds": ["fast", float("inf"), -1, 10**400, None],
    "active_adapters": ["pirate", [1], None],
    "multipliers": [["x"], [10**400], 7],
    "batch_size": ["many", 1.5, -3, True],
    "first_difference": ["x", -5, 10**30, 2.5],
    "logit_shift": ["x", 10**400, [1]],
    "base_logprobs": [[1.0], "abc", ["a", "b", "c"]],
    "column": [None, 7, ["base"]],
    "florp": [1],
    "batched": ["yes", 1],
}.items():  # fmt: skip
    for _number, _value in enumerate(_values):
        comparison_case(
            f"comparison-{_key}-{_number}",
            f"{_key} is {str(_value)[:30]}",
            _generation(**{_key: _value}),
            tags=frozenset({"either"}),
        )
comparison_case(
    "comparison-labs", "labs of wrong types", lambda c: c["model"].update(labs={"a": {"memory": {"base_bytes": "x"}}})
)
comparison_case(
    "comparison-labs-prompts",
    "a lab whose prompts are numbers",
    lambda c: c["model"].update(labs={"a": {"rendered": 7}}),
)
comparison_case(
    "comparison-memory",
    "memory of wrong types",
    lambda c: c["model"].update(memory={"base_bytes": "x"}),
    tags=frozenset({"either"}),
)
case(
    "comparison-fifo",
    "comparison",
    "a pipe that nobody writes into",
    lambda f, g: os.mkfifo(f / "comparison.json") or f / "comparison.json",
    said="comparison.json",
)
case(
    "comparison-device",
    "comparison",
    "a link to /dev/zero",
    lambda f, g: (f / "comparison.json").symlink_to("/dev/zero") or f / "comparison.json",
    said="comparison.json",
)
case("comparison-folder", "comparison", "a folder", lambda f, g: f, said="comparison-folder")
case(
    "comparison-loop",
    "comparison",
    "a link to itself",
    lambda f, g: (f / "comparison.json").symlink_to(f / "comparison.json") or f / "comparison.json",
    said="comparison.json",
)


# ----- saved labs -----


def lab_case(name: str, why: str, edit: Callable[[Path, Good], Any], **more: Any) -> None:
    """A saved lab, and what `edit` does to its folder."""

    def make(folder: Path, good: Good) -> Path:
        shutil.copytree(good.lab, folder / "lab")
        edit(folder / "lab", good)
        return folder / "lab"

    case(f"lab-{name}", "lab", why, make, **more)


def manifest_case(
    name: str, why: str, edit: Callable[[dict[str, Any]], Any], *, said: str = "adapterlab.json", **more: Any
) -> None:
    """A saved lab whose manifest says other things, or is other text."""

    def change(folder: Path, good: Good) -> None:
        path = folder / "adapterlab.json"
        content = read(path)
        changed = edit(content)
        if isinstance(changed, (str, bytes)):
            path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
        else:
            dump(path, content)

    lab_case(name, why, change, said=said, **more)


def _swap(folder: Path, good: Good) -> None:
    """Two adapters of one shape change places."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapters" / "pirate" / WEIGHTS
    save_file({key: tensor.flip(0).contiguous() for key, tensor in load_file(str(path)).items()}, str(path))


def _rename(name: str) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> None:
        content["adapters"][0]["name"] = name
        for parts in (content["selection"], *content["columns"], *content["blends"]):
            for part in parts:
                part[0] = name if part[0] == "pirate" else part[0]

    return change


manifest_case("empty", "0 bytes", lambda c: b"")
manifest_case("list", "a list", lambda c: "[]")
manifest_case("deep", "nested 100,000 deep", lambda c: '{"format":' * DEEP + "1" + "}" * DEEP)
manifest_case("huge", "200 MB of spaces", lambda c: json.dumps(c).encode() + b" " * 200_000_000)
manifest_case("not-utf8", "not UTF-8", lambda c: json.dumps(c).encode("utf-16"))
manifest_case("format", "another format", lambda c: c.update(format="florp"))
manifest_case("version", "a version to come", lambda c: c.update(version=99))
manifest_case("version-list", "a version that is a list", lambda c: c.update(version=[1]))
for _key in (
    "base",
    "adapters",
    "selection",
    "enabled",
    "trainable",
    "blends",
    "history",
    "ids",
    "columns",
    "created",
    "versions",
    "name",
):
    manifest_case(f"no-{_key}", f"without {_key}", lambda c, key=_key: c.pop(key) is c or None)
    manifest_case(
        f"{_key}-wrong",
        f"{_key} of a wrong type",
        lambda c, key=_key: c.update({key: 7.5 if key != "versions" else [[1]]}),
    )
for _label, _value in {
    "separators": "a/b",
    "climbs": "..",
    "root": "/etc",
    "html": HTML,
    "nul": "a\0b",
    "base": "base",
    "long": "a" * 5000,
    "turned": "\u202etxt",
}.items():
    manifest_case(f"adapter-{_label}", f"an adapter called {_value[:20]!r}", _rename(_value))
manifest_case("adapter-twice", "one adapter twice", lambda c: c["adapters"].append(dict(c["adapters"][0])))
manifest_case("adapter-code", "a key that would allow code", lambda c: c["adapters"][0].update(trust_remote_code=True))
manifest_case("code", "a key that would allow code", lambda c: c.update(trust_remote_code=True))
manifest_case("base-code", "a key that would allow the base's code", lambda c: c["base"].update(trust_remote_code=True))
manifest_case(
    "selection-unknown", "selects an adapter that there is not", lambda c: c.update(selection=[["nobody", 1.0]])
)
manifest_case("trainable-unknown", "trains an adapter that there is not", lambda c: c.update(trainable="nobody"))
for _label, _value in {
    "nan": float("nan"),
    "text": "much",
    "huge": 10**400,
    "null": None,
    "list": [1],
    "true": True,
}.items():
    manifest_case(
        f"multiplier-{_label}",
        f"a multiplier that is {str(_value)[:10]}",
        lambda c, value=_value: c.update(selection=[["pirate", value]]),
    )
manifest_case("history-many", "claims 10⁵ comparisons", lambda c: c.update(history=10**5), said="history")
manifest_case("history-minus", "claims −1 comparisons", lambda c: c.update(history=-1))
manifest_case("runs-many", "claims 10⁵ runs", lambda c: c["adapters"][0].update(runs=10**5), said="runs")
manifest_case(
    "ids-beyond",
    "a text of tokens that the model has not",
    lambda c: c.update(ids=[10**8]),
    legal=True,
    tells="vocabulary",
)
manifest_case("ids-many", "a text of 10⁶ tokens", lambda c: c.update(ids=[5] * 10**6))
manifest_case("columns-many", "the logits of 10⁵ columns", lambda c: c.update(columns=[[]] * 10**5))
manifest_case(
    "quantization-code",
    "a quantizer's option that there is not",
    lambda c: c["base"].update(quantization={"load_in_8bit": True, "florp": "os"}),
)
manifest_case(
    "dtype", "a dtype that is another thing of torch's", lambda c: c["base"].update(dtype="load"), said="dtype"
)
for _label, _value in {
    "climbs": "/../../../../etc",
    "file": "/etc/passwd",
    "device": "/dev/zero",
    "address": "http://127.0.0.1:9/x",
    "nul": "/a\0b",
    "long": "/" + "a" * 5000,
    "none": "",
}.items():
    manifest_case(
        f"base-{_label}",
        f"a base in {_value[:20]!r}",
        lambda c, value=_value: c["base"].update(path=value, beside="../nowhere" if value else ""),
        said="etc" if _label == "climbs" else "",
    )
manifest_case("digest", "another digest of the base", lambda c: c["base"].update(digest=HTML), legal=True, tells="base")


def _looping_base(folder: Path, good: Good) -> None:
    loop = folder.parent / "loop"
    loop.symlink_to(loop)
    content = read(folder / "adapterlab.json")
    content["base"].update(path=str(loop), beside="../loop")
    dump(folder / "adapterlab.json", content)


lab_case("base-loop", "a base that is a link to itself", _looping_base, said="loop")
lab_case("swapped", "an adapter's file was exchanged for another of its shape", _swap, legal=True, tells="pirate")
lab_case(
    "no-logits",
    "the fingerprint is gone",
    lambda f, g: (f / "fingerprint.safetensors").unlink(),
    said="fingerprint.safetensors",
)
lab_case(
    "logits-cut",
    "the fingerprint is cut",
    lambda f, g: (f / "fingerprint.safetensors").write_bytes((f / "fingerprint.safetensors").read_bytes()[:-9]),
    said="fingerprint.safetensors",
)
lab_case(
    "logits-fifo",
    "the fingerprint is a pipe",
    _instead("fingerprint.safetensors", os.mkfifo),
    said="fingerprint.safetensors",
)
lab_case(
    "no-adapter", "an adapter's folder is gone", lambda f, g: shutil.rmtree(f / "adapters" / "pirate"), said="pirate"
)
lab_case(
    "no-weights",
    "an adapter's weights are gone",
    lambda f, g: (f / "adapters" / "pirate" / WEIGHTS).unlink(),
    said=WEIGHTS,
)
lab_case(
    "adapter-link",
    "an adapter's folder leads elsewhere",
    lambda f, g: (shutil.rmtree(f / "adapters" / "pirate"), (f / "adapters" / "pirate").symlink_to("/etc")),
    said="pirate",
)
lab_case(
    "weights-cut",
    "an adapter's weights are cut",
    lambda f, g: (f / "adapters" / "poet" / WEIGHTS).write_bytes(b"x"),
    said="poet",
)
lab_case(
    "history-cut",
    "a comparison is cut",
    lambda f, g: (f / "history" / "00000.json").write_text("{"),
    said="00000.json",
)
lab_case("history-fifo", "a comparison is a pipe", _instead("history/00000.json", os.mkfifo), said="00000.json")
lab_case(
    "history-types",
    "a comparison of wrong types",
    lambda f, g: dump(
        f / "history" / "00000.json", {**read(f / "history" / "00000.json"), "generations": [{"text": 7}]}
    ),
    said="00000.json",
)
lab_case(
    "run-cut",
    "a training's history is cut",
    lambda f, g: (f / "runs" / "poet.0.json").write_text("{"),
    said="poet.0.json",
)
lab_case(
    "run-types",
    "a training's history of wrong types",
    lambda f, g: dump(f / "runs" / "poet.0.json", {"steps": "x", "history": [[["x"]]]}),
    said="poet.0.json",
)
lab_case(
    "run-deep",
    "a training's history nested 100,000 deep",
    lambda f, g: (f / "runs" / "poet.0.json").write_text("[" * DEEP + "]" * DEEP),
    said="poet.0.json",
)
lab_case("manifest-fifo", "the manifest is a pipe", _instead("adapterlab.json", os.mkfifo), said="lab")
lab_case(
    "manifest-loop",
    "the manifest is a link to itself",
    _instead("adapterlab.json", lambda p: p.symlink_to(p)),
    said="lab",
)


# ----- data to train on -----


def data_case(name: str, why: str, file: str, content: bytes, **more: Any) -> None:
    def make(folder: Path, good: Good) -> Path:
        (folder / file).write_bytes(content)
        return folder / file

    case(name, "data", why, make, said=more.pop("said", file), **more)


data_case("data-empty-json", "0 bytes", "data.json", b"")
data_case("data-empty-jsonl", "0 bytes", "data.jsonl", b"")
data_case("data-empty-csv", "0 bytes", "data.csv", b"")
data_case("data-empty-txt", "0 bytes", "data.txt", b"")
data_case("data-deep-json", "nested 100,000 deep", "data.json", b"[" * DEEP + b"]" * DEEP)
data_case(
    "data-deep-jsonl", "a line nested 100,000 deep", "data.jsonl", b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}\n"
)
data_case("data-not-utf8-json", "not UTF-8", "data.json", '["a"]'.encode("utf-16"))
data_case("data-not-utf8-csv", "not UTF-8", "data.csv", b"text\n\xff\xfe\x00")
data_case("data-not-utf8-txt", "not UTF-8", "data.txt", b"\xff\xfe\x00")
data_case("data-nul-csv", "NUL bytes: letters like any other", "data.csv", b"text\n\x00\x00\x00\n", legal=True)
data_case("data-number", "a number", "data.json", b"1e400")
data_case("data-quotes-csv", "a quote that never closes", "data.csv", b'text\n"' + b"a\n" * 1000)
data_case("data-pickle", "a pickle called .csv", "data.csv", pickle.dumps(dict))
data_case(
    "data-ids", "token ids beyond all sizes", "data.json", b'[{"input_ids": [1, 1' + b"0" * 300 + b"]}]", said="10000"
)
data_case("data-surrogates", "half characters", "data.json", b'[{"text": "\\ud800"}]', said="UTF-8")
case(
    "data-fifo",
    "data",
    "a pipe that nobody writes into",
    lambda f, g: os.mkfifo(f / "data.json") or f / "data.json",
    said="data.json",
)
case(
    "data-device",
    "data",
    "a link to /dev/zero",
    lambda f, g: (f / "data.json").symlink_to("/dev/zero") or f / "data.json",
    said="data.json",
)


def main(folder: str) -> None:
    root = Path(folder)
    if root.exists() and any(root.iterdir()):
        raise SystemExit(f"{folder} holds things already: name a new folder.")
    good = make_good(root)
    for one in CASES:
        build(one, root / "cases" / one.name, good)
        print(f"{one.what:<10}  {one.name:<32}  {one.why}{' (legal)' if one.legal else ''}")
    print(f"{len(CASES)} cases in {root}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER")
    main(sys.argv[1])
