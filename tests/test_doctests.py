"""Every public name has a docstring with an example, and what the example shows is so.

The examples run on `AdapterLab.demo()`, with a tiny model in the place of the demo's and random weights in adapters of the
same names, methods, ranks and modules. What they show is no model's words, so it holds for the real demo too:
`pytest tests/test_doctests.py --long` runs them on that.
"""

from __future__ import annotations

import doctest
import gc
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from peft import LoraConfig, PeftConfig
from standins import hub_environment, tiny_llama, tiny_opt, tiny_tokenizer, write_adapter, write_model
from test_publishing import PushHub
from transformers import Trainer, TrainerCallback, TrainingArguments

import adapterlab
from adapterlab import AdapterLab, demo

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
TEXTS = ["The moon is a celestial body.", "Arr, the wind is fair and the sails are full, matey!"]
PAIRS = [
    ("What is the moon?", "Arr, a lantern in the night!"),
    ("What is the sea?", "Arr, our home, matey!"),
    ("What is a ship?", "Arr, wood with a will!"),
    ("What is the wind?", "Arr, a friend with moods!"),
]


def public_names() -> dict[str, Any]:
    """The package's names, and `Class.name` of each public method and property that the package itself writes.

    What transformers' Trainer calls in a callback is no name for people.
    """
    found: dict[str, Any] = {}
    for name in adapterlab.__all__:
        thing = getattr(adapterlab, name)
        if not inspect.isclass(thing):
            continue
        found[name] = thing
        for home in thing.__mro__:
            if not home.__module__.startswith("adapterlab."):
                continue
            for each, member in vars(home).items():
                called = callable(member) or isinstance(member, (property, classmethod, staticmethod))
                if called and not each.startswith("_") and not hasattr(TrainerCallback, each):
                    found.setdefault(f"{name}.{each}", getattr(thing, each))
    return found


NAMES = public_names()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The demo in small, and an adapter for another model: folders."""
    root = tmp_path_factory.mktemp("small")
    adapters = {}
    for seed, (name, real) in enumerate(demo.demo_adapters().items()):
        config = PeftConfig.from_pretrained(str(real))
        config.inference_mode = False  # or no weight would be filled
        adapters[name] = write_adapter(root / name, tiny_llama(), config, base=demo.DEMO_MODEL_ID, seed=seed)
    other = LoraConfig(r=8, target_modules=["fc1", "fc2"])
    return SimpleNamespace(
        model=write_model(root / "model", tiny_llama(), tiny_tokenizer(chat=True)),
        adapters=adapters,
        adapter_for_opt=write_adapter(root / "for-opt", tiny_opt(), other, base="facebook/opt-350m"),
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PushHub]:
    """The Hub of all examples, on loopback."""
    root = tmp_path_factory.mktemp("hub")
    with PushHub({}, root) as hub, hub_environment(root / "cache", url=hub.url):
        yield hub


class Labs:
    """Labs as `AdapterLab.demo()` opens them: the same one again as long as the examples left it as it was."""

    def __init__(self) -> None:
        self.lab: AdapterLab | None = None
        self.fresh = ""

    def give(self) -> AdapterLab:
        if self.lab is None or self.look() != self.fresh:
            self.close()
            self.lab = AdapterLab.demo()
            self.fresh = self.look()
        return self.lab

    def look(self) -> str:
        lab = self.lab
        if lab is None or lab.status().endswith("closed"):
            return "closed"
        return f"{lab.summary().to_csv()}{lab.selection}{lab.enabled}{lab.blends}{lab.history}{len(lab._listeners)}"

    def close(self) -> None:
        if self.lab is not None:
            self.lab.close()


@pytest.fixture(scope="module")
def labs() -> Iterator[Labs]:
    labs = Labs()
    gc.collect()
    gc.freeze()  # closing a lab looks through everything that there is, and what there is by now stays
    yield labs
    labs.close()
    gc.unfreeze()


@pytest.fixture
def names(
    labs: Labs, small: SimpleNamespace, hub: PushHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> dict[str, Any]:
    """What the examples take as given: public names, a lab, a folder, texts, and what a Trainer of one's own needs."""
    if not long:
        monkeypatch.setattr(demo, "fetch_demo_model", lambda: small.model)
        monkeypatch.setattr(demo, "demo_adapters", lambda: small.adapters)
    listed = [SimpleNamespace(id="you/pirate", downloads=2, likes=1, last_modified=None)]
    monkeypatch.setattr(huggingface_hub, "list_models", lambda **_: listed)
    monkeypatch.chdir(tmp_path)
    lab = labs.give()
    ids = lab.tokenizer(TEXTS[1]).input_ids
    args = TrainingArguments(str(tmp_path / "out"), max_steps=8, use_cpu=True, report_to="none", disable_tqdm=True)
    return {
        **{name: getattr(adapterlab, name) for name in adapterlab.__all__},
        "lab": lab,
        "folder": tmp_path,
        "texts": TEXTS,
        "pairs": PAIRS,
        "adapter_for_opt": small.adapter_for_opt,
        "Trainer": Trainer,
        "args": args,
        "data": [{"input_ids": ids, "labels": ids}] * 8,
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_example_shows_what_is_so(name: str, names: dict[str, Any]) -> None:
    text = inspect.cleandoc(NAMES[name].__doc__ or "")
    example = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert any(one.want for one in example.examples), f"{name}: no example in its docstring, or none with an output"
    told: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(example, out=told.append, clear_globs=False)
    for made in example.globs.values():
        if isinstance(made, AdapterLab) and made is not names["lab"]:
            made.close()
    assert not told, "\n" + "".join(told)


def test_the_small_demo_has_the_adapters_of_the_real_one(small: SimpleNamespace) -> None:
    """So that what the examples say of names, methods, ranks and modules is true of the demo that a reader opens."""
    real = demo.demo_adapters()
    assert list(small.adapters) == list(real)
    for name, folder in small.adapters.items():
        ours, theirs = (json.loads((one / "adapter_config.json").read_text("utf-8")) for one in (folder, real[name]))
        for key in ("peft_type", "base_model_name_or_path", "r", "init_r", "target_modules", "feedforward_modules"):
            assert ours.get(key) == theirs.get(key) or sorted(ours[key]) == sorted(theirs[key]), (name, key)
