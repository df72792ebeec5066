"""Hostile base models."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile_cases import (
    DEEP,
    HTML,
    Good,
    RunsCommand,
    beside,
    device,
    dump,
    flip,
    folder_case,
    instead,
    link_to_itself,
    read,
    safetensors_bytes,
)


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
    lambda b: flip(b, 30),
    tags=frozenset({"either"}),
)
_base_bytes("base-weights-nothing", "a sound file without any tensor", lambda b: safetensors_bytes(b"{}", b""))


def _base_pickle(folder: Path, good: Good) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": RunsCommand(good.canary)}, folder / "pytorch_model.bin")


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
    "climbs": "../../good/base/model.safetensors", "absolute": "/etc/passwd", "device": "../../../../../../../dev/zero",
    "number": 7, "list": ["a"], "gone": "model-00001.safetensors", "long": "a" * 5000, "nul": "a\x00b",
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
folder_case("base-weights-fifo", "weights that are a pipe", instead("model.safetensors", os.mkfifo), what="base")
folder_case(
    "base-weights-device", "weights that are a link to /dev/zero", instead("model.safetensors", device), what="base"
)
folder_case("base-config-fifo", "config.json is a pipe", instead("config.json", os.mkfifo), what="base")
folder_case("base-config-folder", "config.json is a folder", instead("config.json", Path.mkdir), what="base")
folder_case("base-loop", "a link to itself", link_to_itself, what="base", said="loop")
folder_case(
    "base-tokenizer-code",
    "a tokenizer with code of its own",
    beside(tokenizer_config__json={"auto_map": {"AutoTokenizer": ["hostile_import.T", None]}, "tokenizer_class": "T"}),
    what="base",
    tags=frozenset({"either"}),
)
folder_case(
    "base-tokenizer-deep",
    "a tokenizer nested 100,000 deep",
    beside(tokenizer__json="[" * DEEP + "]" * DEEP),
    what="base",
)
folder_case(
    "base-tokenizer-types",
    "a tokenizer whose values are of wrong types",
    beside(tokenizer__json={"model": {"vocab": 7}}),
    what="base",
)
folder_case("base-tokenizer-list", "tokenizer_config.json is a list", beside(tokenizer_config__json=[1]), what="base")
folder_case(
    "base-tokenizer-fifo",
    "a tokenizer that is a pipe",
    instead("tokenizer.json", os.mkfifo),
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
    beside(generation_config__json={"eos_token_id": "x", "max_length": "y", "do_sample": 7}),
    what="base",
    tags=frozenset({"either"}),
)
folder_case(
    "base-generation-code",
    "generation_config.json that names code",
    beside(generation_config__json={"custom_generate": "evil/repo"}),
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
