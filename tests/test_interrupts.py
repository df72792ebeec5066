"""Ctrl-C at any line of what changes the model for a while: afterwards the base is bare, and the lab goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from standins import tiny_llama, tiny_tokenizer
from tiny_adapters import logits_of

from adapterlab import AdapterLab, linear
from adapterlab.generation import eval_mode
from adapterlab.notices import AdapterLabWarning


def interrupt_at(line: int, function: str, file: str) -> Callable[..., Any]:
    """A trace function that raises KeyboardInterrupt at the so-manieth line that `function` runs, once."""
    seen = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        return local if code.co_name == function and code.co_filename.endswith(file) else None

    return trace


def interrupted(line: int, function: str, file: str, call: Callable[[], object]) -> bool:
    """Whether `call` came that far."""
    before = sys.gettrace()
    sys.settrace(interrupt_at(line, function, file))
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def wrapped(lab: AdapterLab) -> list[str]:
    return [path for path, module in lab.model.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.filterwarnings("ignore::adapterlab.AdapterLabWarning")
def test_a_mount_cut_short_leaves_nothing_in_the_base(full_lab: AdapterLab, ids: torch.Tensor) -> None:
    base = logits_of(full_lab, ids)
    came = 0
    for line in range(1, 400, 7):
        if not interrupted(line, "mount", "mounts.py", lambda: full_lab.set_adapter("wide")):
            break
        came += 1
        full_lab.set_adapter(None)
        assert wrapped(full_lab) == []
        assert torch.equal(logits_of(full_lab, ids), base)
    assert came > 5


@pytest.mark.filterwarnings("ignore::adapterlab.AdapterLabWarning")
def test_using_cut_short_restores_what_it_found(full_lab: AdapterLab, ids: torch.Tensor) -> None:
    full_lab.set_adapter("pirate")
    before = logits_of(full_lab, ids)

    def use() -> None:
        with full_lab.using("wide"):
            pass

    for line in (3, 9, 20, 60):
        assert interrupted(line, "mount", "mounts.py", use)
        assert full_lab.active_adapters == {"pirate": 1.0}
        full_lab.set_adapter("pirate")
        assert torch.equal(logits_of(full_lab, ids), before)


def test_a_module_of_the_base_that_was_exchanged_is_said_and_put_back(full_lab: AdapterLab) -> None:
    """Its weights would be in the digest, and the lab's own module would speak."""
    attention = full_lab.model.model.layers[0].self_attn
    own = attention.q_proj
    attention.q_proj = torch.nn.Linear(own.in_features, own.out_features, bias=own.bias is not None)
    with pytest.warns(AdapterLabWarning, match=r"q_proj was replaced"):
        answers = full_lab.compare("Hello", [None, "pirate"], max_new_tokens=2)
    assert attention.q_proj is own
    assert full_lab.verify(answers)["agrees"].all()


def test_products_are_left_as_they_were(full_lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_LARGE", 1)

    def run() -> None:
        with linear.few_rows(full_lab.model):
            pass

    for line in (4, 6, 9):
        assert interrupted(line, "few_rows", "linear.py", run)
        assert not [path for path, module in full_lab.model.named_modules() if "forward" in module.__dict__]


def test_every_module_has_its_mode_again(full_lab: AdapterLab) -> None:
    full_lab.model.train()

    def run() -> None:
        with eval_mode(full_lab.model):
            pass

    for line in (3, 5, 8):
        assert interrupted(line, "eval_mode", "generation.py", run)
        assert all(module.training for module in full_lab.model.modules())


def test_an_opening_cut_short_while_it_puts_back_says_so_and_gives_the_model_back(
    full_lab: AdapterLab, tmp_path: Path, ids: torch.Tensor
) -> None:
    """What the cut has left to put back is put back when the lab that it belongs to is closed already."""
    full_lab.set_adapter("poet")
    folder = full_lab.save(tmp_path / "lab")
    model, tokenizer = tiny_llama(), tiny_tokenizer(chat=True)
    kinds = [type(module) for module in model.modules()]

    opened: list[AdapterLab] = []
    line = 1
    while interrupted(
        line, "_back_to", "guards.py", lambda: opened.append(AdapterLab(folder, base_model=model, tokenizer=tokenizer))
    ):
        assert [type(module) for module in model.modules()] == kinds, line
        assert not opened
        line += 11
    opened.pop().close()
    assert line > 30
    with AdapterLab(folder, base_model=model, tokenizer=tokenizer).using("poet") as again:
        assert again is model
