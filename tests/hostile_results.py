"""Hostile comparisons, saved labs and data to train on."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_cases import DEEP, HTML, WEIGHTS, Good, case, dump, instead, read

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
    instead("fingerprint.safetensors", os.mkfifo),
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
lab_case("history-fifo", "a comparison is a pipe", instead("history/00000.json", os.mkfifo), said="00000.json")
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
lab_case("manifest-fifo", "the manifest is a pipe", instead("adapterlab.json", os.mkfifo), said="lab")
lab_case(
    "manifest-loop",
    "the manifest is a link to itself",
    instead("adapterlab.json", lambda p: p.symlink_to(p)),
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
