"""Badges of adapters whose tensors do not tell whether they change anything: the lab has to remember it (found by
test_stateful.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from standins import tiny_llama, tiny_tokenizer

from adapterlab import AdapterLab

FRESH: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("loha", {"target_modules": ["q_proj"]}),
    "dora": ("lora", {"use_dora": True, "target_modules": ["q_proj"]}),
}


def own(lab: AdapterLab) -> list[torch.nn.Parameter]:
    return [parameter for key, parameter in lab.model.named_parameters() if ".mine" in key]


@pytest.mark.parametrize("kind", FRESH)
def test_an_edit_that_is_taken_back_leaves_an_adapter_untrained(lab: AdapterLab, kind: str) -> None:
    method, fields = FRESH[kind]
    lab.add_adapter(method, "mine", **fields)
    before = [parameter.detach().clone() for parameter in own(lab)]
    statuses = []
    for change in (1.0, None):
        for parameter, value in zip(own(lab), before):
            parameter.data.copy_(value) if change is None else parameter.data.add_(change)
        lab.compare("Hi", max_new_tokens=1)
        statuses.append(lab.adapters["mine"].status)
    assert statuses == ["unsaved", "untrained"]


@pytest.mark.parametrize("kind", FRESH)
@pytest.mark.parametrize("drawn", [False, True])
def test_a_saved_lab_knows_what_is_untrained(lab: AdapterLab, tmp_path: Path, kind: str, drawn: bool) -> None:
    method, fields = FRESH[kind]
    field = "init_weights" if kind == "loha" else "init_lora_weights"
    lab.add_adapter(method, "mine", **fields, **{field: not drawn})
    status = "random weights" if drawn else "untrained"
    assert lab.adapters["mine"].status == status
    lab.save(tmp_path / "saved")
    again = AdapterLab(tmp_path / "saved", base_model=tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
    assert again.adapters["mine"].status == status


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"]], ids=str)
def test_fresh_factors_on_embeddings_are_untrained(lab: AdapterLab, ids: torch.Tensor, targets: list[str]) -> None:
    """There it is A that PEFT starts at zero, and B that it draws."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=targets)
    with torch.no_grad():
        assert torch.equal(get_peft_model(tiny_llama(), config).eval()(ids).logits, tiny_llama()(ids).logits)
    lab.add_adapter(config, "mine")
    assert lab.adapters["mine"].status == "untrained"
    with torch.no_grad():
        own(lab)[0].add_(0.1)  # an embedding's A comes first
    lab.compare("Hi", max_new_tokens=1)
    assert lab.adapters["mine"].status == "unsaved"
