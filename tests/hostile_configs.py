"""Hostile configs of adapters: their values, their text, and where they point."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_cases import (
    CONFIG,
    DEEP,
    HTML,
    NEVER,
    Good,
    config_case,
    config_text,
    dump,
    folder_case,
    read,
)

# ----- values -----

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
    "number": 7, "nested": [["q_proj"], ["v_proj"]], "empty": [], "null": None, "mapping": {"q_proj": {"v_proj": 1}},
    "empty-text": "", "empty-names": [""], "numbers": [1, 2], "true": True, "wrong": ["nothing"],
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
config_case(
    "eva-config",
    "a config inside the config, of wrong types, which PEFT 0.20 leaves unread",
    eva_config={"rho": "x"},
    either=True,
)
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


# ----- where they point -----

for _label, _value in {
    "climbs": "../../../../../../../../../../etc", "absolute": "/etc", "file": "/etc/passwd", "device": "/dev/zero",
    "address": "http://127.0.0.1:9/model", "git": "git+ssh://x/y", "control": "a\x00b\x1b[31m\n", "huge": "a/" * 3000 + "b",
    "long": "a" * 5000, "home": "~nobody-of-this-name/model", "null": None, "dots": "..", "turned": "\u202egnp.exe",
    "html": HTML,
}.items():  # fmt: skip
    config_case(
        f"names-base-{_label}", f"base_model_name_or_path is {str(_value)[:30]!r}", legal=True, only_as_base=True,
        said="base_model_name_or_path" if _value is None else "", base_model_name_or_path=_value,
    )  # fmt: skip
config_case("names-base-number", "base_model_name_or_path is a number", base_model_name_or_path=7)
config_case("names-base-list", "base_model_name_or_path is a list", base_model_name_or_path=["gpt2"])


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


# ----- text -----

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
