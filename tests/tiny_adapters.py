"""Adapters for the tiny Llama, and a look at what a lab's model says with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from standins import tiny_llama, tiny_tokenizer, write_adapter, write_model

from adapterlab import AdapterLab

SEEDS = {"pirate": 1, "poet": 2, "robot": 3, "wide": 4, "dora": 5, "ada": 6}


def adapter_configs() -> dict[str, Any]:
    """One config per kind the blend equation knows, and DoRA, for the tiny Llama."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "pirate": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "wide": LoraConfig(
            r=3,
            lora_alpha=7,
            use_rslora=True,
            target_modules=linear,
            rank_pattern={"down_proj": 5},
            alpha_pattern={"up_proj": 2},
        ),
        "poet": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "ada": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"]),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=["v_proj", "up_proj"]),
    }


def tiny_demo(folder: Path) -> AdapterLab:
    """What `AdapterLab.demo()` gives, in small: a model that chats, and adapters of the same names and methods."""
    configs = adapter_configs()
    lab = AdapterLab(write_model(folder / "base", tiny_llama(), tiny_tokenizer(chat=True)))
    for seed, (name, like) in enumerate({"pirate": "pirate", "robot": "poet", "bard": "ada"}.items()):
        lab.load_adapter(write_adapter(folder / name, tiny_llama(), configs[like], seed=seed), name)
    return lab


def logits_of(lab: AdapterLab, ids: torch.Tensor) -> torch.Tensor:
    """What `lab.model` itself gives now."""
    with torch.no_grad():
        return lab.model(ids).logits
