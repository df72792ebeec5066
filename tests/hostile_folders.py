"""Hostile folders of adapters, and what lies beside one."""

from __future__ import annotations

import os
from pathlib import Path

from hostile_cases import (
    CONFIG,
    DEEP,
    FIRST,
    HTML,
    WEIGHTS,
    Good,
    beside,
    case,
    copied,
    device,
    dump,
    folder_case,
    instead,
    link_to_itself,
)

for _name in (CONFIG, WEIGHTS):
    _short = "config" if _name == CONFIG else "weights"
    folder_case(f"{_short}-folder", f"{_name} is a folder", instead(_name, Path.mkdir), said=_name)
    folder_case(f"{_short}-fifo", f"{_name} is a pipe that nobody writes into", instead(_name, os.mkfifo), said=_name)
    folder_case(f"{_short}-device", f"{_name} is a link to /dev/zero", instead(_name, device), said=_name)
    folder_case(f"{_short}-loop", f"{_name} is a link to itself", instead(_name, lambda p: p.symlink_to(p)), said=_name)
    folder_case(
        f"{_short}-dangling",
        f"{_name} is a link to nothing",
        instead(_name, lambda p: p.symlink_to("/nowhere")),
        said=_name,
    )
folder_case("weights-gone", "there are no weights", instead(WEIGHTS, lambda p: None), said=WEIGHTS)
folder_case(
    "weights-index",
    "an index of shards that climbs out of the folder",
    lambda f, g: dump(
        instead(WEIGHTS, lambda p: None)(f, g) or f / (WEIGHTS + ".index.json"),
        {"weight_map": {FIRST: "../../../../etc/passwd"}},
    ),
    said=WEIGHTS,
)


folder_case("folder-loop", "the folder is a link to a link to itself", link_to_itself, said="loop")
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


folder_case(
    "beside-code",
    "a tokenizer with code beside it",
    beside(
        tokenizer_config__json={"auto_map": {"AutoTokenizer": ["hostile_import.T", None]}, "tokenizer_class": "T"},
        hostile_import__py="raise SystemExit",
        tokenizer__json={},
    ),
    legal=True,
)
folder_case(
    "beside-template",
    "a chat template that would run code",
    beside(tokenizer_config__json={"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}),
    legal=True,
)
folder_case(
    "beside-endless-template",
    "a chat template that never ends",
    beside(
        tokenizer_config__json={
            "chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        }
    ),
    legal=True,
)
folder_case(
    "beside-deep", "a tokenizer nested 100,000 deep", beside(tokenizer__json="[" * DEEP + "]" * DEEP), legal=True
)
folder_case(
    "beside-types",
    "a tokenizer whose values are of wrong types",
    beside(
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
    beside(tokenizer__json='{"model": {"vocab": {"a": 1' + "0" * 3000 + "}}}"),
    legal=True,
)
folder_case(
    "beside-digits",
    "a tokenizer that numbers a token in other digits",
    beside(
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
    beside(README__md=f"---\nbase_model: {HTML}\n---\n{HTML}"),
    legal=True,
)
folder_case(
    "beside-python",
    "Python files of the libraries' names",
    beside(torch__py="raise SystemExit", peft__py="raise SystemExit", sitecustomize__py="raise SystemExit"),
    legal=True,
)
