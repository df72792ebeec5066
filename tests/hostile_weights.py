"""Hostile weights: safetensors files, their tensors, and pickles."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile_cases import (
    DEEP,
    FIRST,
    FIRST_B,
    HTML,
    PICKLE,
    WEIGHTS,
    Good,
    RunsCommand,
    bytes_case,
    case,
    copied,
    flip,
    header_case,
    header_size,
    safetensors_bytes,
    tensors_case,
)

# ----- the safetensors file -----

bytes_case("weights-empty", "a weights file of 0 bytes", lambda b: b"")
bytes_case("weights-cut-in-the-length", "cut inside the 8 bytes of the header's length", lambda b: b[:5])
bytes_case("weights-cut-after-the-length", "nothing but the header's length", lambda b: b[:8])
bytes_case("weights-cut-in-the-header", "cut in the middle of the header", lambda b: b[: header_size(b) // 2])
bytes_case("weights-cut-after-the-header", "a header without any data", lambda b: b[: header_size(b)])
bytes_case("weights-cut-in-the-data", "the last byte is missing", lambda b: b[:-1])
bytes_case("weights-too-long", "a pickle hidden behind the data", lambda b: b + b"\x80\x04cos\nsystem\n" * 9)
bytes_case("weights-flip-in-the-length", "one bit of the header's length is flipped", lambda b: flip(b, 1))
bytes_case("weights-flip-in-the-header", "one bit of the header's JSON is flipped", lambda b: flip(b, 9))
bytes_case("weights-claims-2-63", "the header claims 2^63 bytes", lambda b: struct.pack("<Q", 1 << 63) + b[8:])
bytes_case(
    "weights-claims-2-64", "the header claims 2^64 − 1 bytes", lambda b: struct.pack("<Q", (1 << 64) - 1) + b[8:]
)
bytes_case("weights-claims-100-MB", "the header claims 100 MB", lambda b: struct.pack("<Q", 100_000_000) + b[8:])
bytes_case(
    "weights-header-not-utf8", "the header's JSON is not UTF-8", lambda b: safetensors_bytes(b'{"\xff\xfe":1}', b"")
)
bytes_case(
    "weights-header-deep", "a header of nested lists", lambda b: safetensors_bytes(b"[" * DEEP + b"]" * DEEP, b"")
)
bytes_case(
    "weights-header-deep-metadata",
    "metadata nested 100,000 deep",
    lambda b: safetensors_bytes(b'{"__metadata__":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}", b""),
)
bytes_case("weights-header-a-list", "the header is a list", lambda b: safetensors_bytes(b"[1, 2]", b""))
bytes_case("weights-header-null", "the header is null", lambda b: safetensors_bytes(b"null", b""))
bytes_case(
    "weights-header-huge",
    "50,000 empty tensors that nobody needs",
    lambda b: safetensors_bytes(
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
        np.save(inside, np.array([RunsCommand(self.canary)], dtype=object), allow_pickle=True)
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
            content = pickle.dumps(RunsCommand(canary))
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
    "pickle-system", "runs a command while it is unpickled", lambda p, t, c: torch.save({**t, "x": RunsCommand(c)}, p)
)
pickle_case(
    "pickle-system-legacy",
    "the same in torch's older format",
    lambda p, t, c: torch.save({**t, "x": RunsCommand(c)}, p, _use_new_zipfile_serialization=False),
)
pickle_case("pickle-exec", "runs Python while it is unpickled", lambda p, t, c: torch.save({**t, "x": _Exec(c)}, p))
pickle_case(
    "pickle-import", "imports a module while it is unpickled", lambda p, t, c: torch.save({**t, "x": _Import()}, p)
)
pickle_case("pickle-numpy", "hides a second pickle in an array", lambda p, t, c: torch.save({**t, "x": _Numpy(c)}, p))
pickle_case("pickle-bare", "a pickle that is not torch's", lambda p, t, c: p.write_bytes(pickle.dumps(RunsCommand(c))))
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
