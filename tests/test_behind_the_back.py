"""What was done to `lab.model` natively, and the call that comes next, whichever it is (found by test_stateful.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standins import tiny_llama
from tiny_adapters import logits_of

from adapterlab import AdapterLab, AdapterLabError, AdapterLabWarning

NEXT: dict[str, Callable[[AdapterLab, Path], Any]] = {
    "set_adapter": lambda lab, folder: lab.set_adapter("pirate"),
    "compare": lambda lab, folder: lab.compare("Hi", ["pirate"], max_new_tokens=1),
    "save_adapter": lambda lab, folder: lab.save_adapter("pirate", folder / "x"),
    "train": lambda lab, folder: lab.train("pirate", ["Hi"], max_steps=1, disable_tqdm=True),
    "set_trainable": lambda lab, folder: lab.set_trainable("pirate"),
    "delete_adapter": lambda lab, folder: lab.delete_adapter("pirate"),
    "merge_and_unload": lambda lab, folder: lab.merge_and_unload("pirate"),
    "divergence": lambda lab, folder: lab.divergence("Hi there", ["pirate"]),
    "using": lambda lab, folder: lab.using("pirate").__enter__(),
    "add_weighted_adapter": lambda lab, folder: lab.add_weighted_adapter(["pirate", "wide"], [1.0, 1.0], "sum"),
    "model_card": lambda lab, folder: lab.model_card("pirate"),
}


@pytest.mark.filterwarnings("ignore::adapterlab.AdapterLabWarning")
@pytest.mark.parametrize("call", NEXT)
def test_the_call_after_a_native_deletion_knows_of_it(
    full_lab: AdapterLab, tmp_path: Path, call: str, ids: Any
) -> None:
    """It was noticed only after the name had been checked: KeyErrors, and states with a name that nobody had."""
    full_lab.set_adapter("pirate")
    full_lab.set_trainable("pirate")
    full_lab.model.delete_adapter("pirate")
    with pytest.raises(AdapterLabError, match="No adapter named 'pirate'"):
        NEXT[call](full_lab, tmp_path)
    assert "pirate" not in full_lab.adapters
    assert (full_lab.selection.label, full_lab.trainable) == ("base", None)
    assert not (logits_of(full_lab, ids) - tiny_llama()(ids).logits).any()


@pytest.mark.filterwarnings("ignore::adapterlab.AdapterLabWarning")
def test_a_comparison_of_all_leaves_out_what_was_deleted_natively(full_lab: AdapterLab) -> None:
    full_lab.set_adapter("pirate")
    full_lab.model.delete_adapter("pirate")
    assert full_lab.compare("Hi", max_new_tokens=1).columns == ["base", "wide", "poet", "ada", "dora"]


def test_a_training_says_what_was_done_before_it(full_lab: AdapterLab) -> None:
    """The trainer was made first, and while it is made warnings are kept quiet."""
    full_lab.set_adapter("pirate")
    for key, parameter in full_lab.model.named_parameters():
        if ".pirate" in key:
            parameter.requires_grad_(True)
    with pytest.warns(AdapterLabWarning, match="behind the lab's back"):
        full_lab.train("wide", ["Hi"], max_steps=1, disable_tqdm=True)
