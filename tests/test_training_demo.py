"""A dozen examples and forty steps turn the style of a real model, with `lab.train`'s own defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_adapters import logits_of

from adapterlab import AdapterLab
from adapterlab.demo import DEMO_MARKERS, demo_training_pairs, fetch_demo_model, held_out_questions
from adapterlab.fingerprints import base_digest

pytestmark = pytest.mark.demo


@pytest.fixture
def lab() -> AdapterLab:
    return AdapterLab(fetch_demo_model(), dtype="float32")


def test_a_dozen_examples_turn_the_style(lab: AdapterLab, tmp_path: Path) -> None:
    pairs, ids = demo_training_pairs("pirate"), torch.arange(100, 112)[None]
    digest, bare = base_digest(lab.model), logits_of(lab, ids)
    run = lab.train("mine", pairs[:12], method="lora", max_steps=40, eval_dataset=pairs[40:48], disable_tqdm=True)
    held_out = run.history.eval_loss.dropna()
    assert run.history.step[held_out.index[0]] == 0, "before the first step the adapter is the base"
    assert held_out.iloc[-1] < held_out.iloc[0] - 1.0, "in nats per token"
    questions = held_out_questions()[::5]
    said = lab.compare(questions, max_new_tokens=24)
    fires = {
        column: sum(
            re.search(DEMO_MARKERS["pirate"], g.text, re.IGNORECASE) is not None
            for g in said.generations
            if g.column == column
        )
        for column in said.columns
    }
    assert fires == {"base": 0, "mine": len(questions)}
    assert base_digest(lab.model) == digest
    assert torch.equal(logits_of(lab, ids), bare)
    lab.close()
