"""A closed lab is gone: no tensor of its base is alive, whoever still holds what it gave, and the process shrinks again."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import standins
import torch

from adapterlab import AdapterLab, AdapterLabError
from adapterlab.freeing import forget_last_error

PAIRS = [("What is the moon?", "A lantern."), ("Who are you?", "A captain.")] * 2
KINDS: dict[str, dict[str, Any]] = {"fp32": {}, "8bit": {"quantization": "8bit"}, "4bit": {"quantization": "4bit"}}
TARGETS = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = standins.tiny_llama(hidden_size=64, intermediate_size=128)
    return standins.write_model(tmp_path_factory.mktemp("base") / "m", model, standins.tiny_tokenizer(chat=True))


def open_lab(base: Path, kind: str = "fp32") -> AdapterLab:
    return AdapterLab(base, dtype=torch.float32, **KINDS[kind])


def tensors_alive() -> dict[int, int]:
    """Bytes of every storage that a tensor alive in Python has, by its address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}


def watched(model: Any) -> dict[str, Any]:
    """Weak references to a model's tensors, bitsandbytes' own beside its weights among them."""
    found: dict[str, Any] = dict(model.named_parameters())
    for path, module in model.named_modules():
        state = getattr(module, "state", None) or getattr(getattr(module, "weight", None), "quant_state", None)
        for key in ("CB", "SCB", "absmax"):
            if isinstance(getattr(state, key, None), torch.Tensor):
                found[f"{path}.{key}"] = getattr(state, key)
    return {key: weakref.ref(value) for key, value in found.items()}


def alive(references: dict[str, Any]) -> list[str]:
    gc.collect()
    return [key for key, reference in references.items() if reference() is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_base_is_alive_whatever_is_held(kind: str, base: Path) -> None:
    before = tensors_alive()
    lab = open_lab(base, kind)
    lab.add_adapter("lora", "a", **TARGETS)
    lab.add_adapter("lora", "d", use_dora=True, **TARGETS)
    held: list[Any] = [lab.compare("Hello", [None, "a", {"a": 0.5}, "d"], max_new_tokens=2)]
    held += [lab.train("a", PAIRS, max_steps=2, disable_tqdm=True)]
    held += [lab.train("b", PAIRS, method="adalora", init_r=4, target_r=2, max_steps=12, disable_tqdm=True)]
    held += [lab.compare("Hello", max_new_tokens=2), lab.verify(), lab.last and lab.last.tokens(), lab.summary()]
    held += [lab.panel(), lab.adapters, lab.adapters["a"], lab.selection, lab]
    with pytest.raises(AdapterLabError) as error:
        lab.set_adapter("nobody")
    held += [error.value]
    references = watched(lab.model)
    assert len(references) > 40
    lab.wait(timeout=60)  # the panel's thread looks at the lab too
    lab.close()
    del lab
    assert alive(references) == []
    grown = sum(tensors_alive().values()) - sum(before.values())
    # what is imported on the way keeps a few constants
    assert grown < 4096, "neither the adapters', the optimizer's or the cache's"
    assert held[0].generations[0].text == held[0]["base"].text, "a comparison stays"


def test_a_second_base_does_not_wait_for_the_first(base: Path) -> None:
    """One after another under one name, as a notebook's cell that is run again."""
    references: dict[str, Any] = {}
    for kind in KINDS:
        lab = open_lab(base, kind)
        assert alive(references) == []
        lab.compare("Hello", max_new_tokens=1)
        references = watched(lab.model)
    lab.close()


def failed(lab: AdapterLab) -> BaseException:
    """An error that came through frames which have the model in their variables."""

    def look(model: Any) -> None:
        raise RuntimeError("no memory is left")

    try:
        try:
            with lab.using(None) as model:
                look(model)
        except RuntimeError as error:
            raise AdapterLabError("it does not fit") from error
    except AdapterLabError as error:
        return error
    raise AssertionError("it was to fail")


def test_the_last_error_that_nobody_caught_does_not_hold_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebooks keep it, and its frames their variables: after an error no model would ever go."""
    lab = open_lab(base)
    error = failed(lab)
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    references = watched(lab.model)
    lab.close()
    del lab
    assert alive(references) == []
    assert str(error.__cause__) == "no memory is left"
    assert error.__traceback__ is not None, "the lines stay"


def test_errors_that_name_each_other_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    monkeypatch.setattr(sys, "last_value", one, raising=False)
    forget_last_error()
    monkeypatch.setattr(sys, "last_value", None, raising=False)
    forget_last_error()


def test_what_was_given_stays_the_givers(base: Path) -> None:
    model = standins.tiny_llama()
    lab = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    lab.add_adapter("lora", "a", target_modules=["q_proj"])
    view = lab.adapters
    lab.close()
    with pytest.raises(AdapterLabError, match="closed"):
        list(view)
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, standins.tiny_llama()(ids).logits)


ROUNDS = """
import ctypes, gc, json
import psutil, torch
from adapterlab import AdapterLab

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
Counts = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names.split()]})
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Counts

def resident():
    return psutil.Process().memory_info().rss

def in_use():
    counts = mallinfo2()
    return counts.uordblks + counts.hblkhd

def peak(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def tensors():
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor):
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())

torch.set_num_threads(1)
found = []
for turn in range(3):
    for kind in (None, "8bit", "4bit"):
        row = {"turn": turn, "kind": kind or "fp32"}
        peak(reset=True)
        before = in_use()
        lab = AdapterLab.demo(quantization=kind)
        row |= {"opened": resident(), "opened_in_use": in_use() - before, "tensors": tensors()}
        lab.compare("What is the moon?", [None, "pirate"], max_new_tokens=4)
        row["peak"] = peak()
        lab.close()
        row |= {"closed": resident(), "closed_in_use": in_use(), "left": tensors()}
        found.append(row)
print("FOUND" + json.dumps(found))
"""
# glibc gives each thread a heap of its own and keeps up to 64 MB of its end, also when asked to trim: how much depends on
# which threads happened to be quick. In one arena for all, what the lab gives back goes back.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@pytest.mark.demo
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_labs_opened_one_after_another_take_no_more_than_the_largest() -> None:
    """What is in use is compared to the megabyte, what is resident to its fiftieth part."""
    environment = {**os.environ, **ONE_ARENA}
    run = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True, env=environment)
    rows = json.loads(run.stdout.partition("FOUND")[2])
    for row in rows:
        print({key: value if key in ("turn", "kind") else round(value / 1e6, 1) for key, value in row.items()})
    first = [row for row in rows if row["turn"] == 1]  # in the first round libraries are loaded and threads begun
    last = [row for row in rows if row["turn"] == 2]
    for one, other in zip(first, last):
        assert abs(other["closed_in_use"] - one["closed_in_use"]) < 1e6, (
            "what a lab took goes back, to the last megabyte"
        )
        assert other["closed"] <= 1.02 * one["closed"], "no trend over the rounds"
    for row in rows:
        assert row["left"] < 1e6, "no tensor outlives its lab"
    for row in first + last:
        assert row["opened_in_use"] < 1.02 * row["tensors"] + 10e6, "what quantizing took on the way went back"
    largest = max(row["opened"] for row in first if row["kind"] == "fp32")
    for row in rows:
        assert row["closed"] < largest - 300e6, "most of the 538 MB of the fp32 base, or less, went back"
    assert max(row["peak"] for row in last) <= 1.02 * max(row["peak"] for row in first)
