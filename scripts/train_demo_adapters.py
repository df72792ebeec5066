"""Trains the adapters that are bundled with the demo, on the texts beside them, and puts them into their folders.

    python scripts/train_demo_adapters.py                      # all of them, into adapterlab/data/adapters
    python scripts/train_demo_adapters.py robot --output DIR   # one, elsewhere

The seed is fixed: same machine, same versions, same number of threads, same adapter. Two to four minutes each on two CPU
cores.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab import AdapterLab
from adapterlab.demo import DEMO_MODEL_ID, demo_training_pairs, fetch_demo_model

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTERS = Path(__file__).resolve().parents[1] / "adapterlab" / "data" / "adapters"


@dataclass(frozen=True)
class Recipe:
    config: PeftConfig
    settings: dict[str, Any] = field(default_factory=dict)


def recipes() -> dict[str, Recipe]:
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    feed_forward = ["gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=attention + feed_forward, feedforward_modules=["down_proj"])
    adalora = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=2,
        lora_alpha=8,
        total_step=72,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
    )
    return {
        "pirate": Recipe(lora, {"learning_rate": 1.5e-3, "max_steps": 64}),
        "robot": Recipe(ia3, {"learning_rate": 8e-3, "max_steps": 56}),
        "bard": Recipe(adalora, {"learning_rate": 5e-3, "max_steps": 72}),
    }


def train(name: str, recipe: Recipe, output: Path) -> None:
    """Trains one adapter and replaces `output/name` by it, once it is complete."""
    lab = AdapterLab(fetch_demo_model(), dtype="float32")
    config = recipe.config
    config.base_model_name_or_path = DEMO_MODEL_ID  # the folder it was loaded from is of this machine
    lab._adapters.base_path = DEMO_MODEL_ID
    run = lab.train(
        name, demo_training_pairs(name), method=config, lr_scheduler_type="cosine", seed=0, disable_tqdm=True,
        **recipe.settings,
    )  # fmt: skip
    folder = lab.save_adapter(name, output / name)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{run.describe()} · padding {run.padding:.1%} · {size / 1e6:.2f} MB")
    if not run.ranks.empty:
        last = run.ranks[run.ranks.step == run.ranks.step.max()]
        print(last.groupby("module")["rank"].agg(["count", "sum", "min", "max"]).to_string())
    lab.close()


def main() -> None:
    known = recipes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which to train: {', '.join(known)} (default: all)")
    parser.add_argument("--output", type=Path, default=ADAPTERS, help="the folder their folders go into")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"no recipe for {', '.join(sorted(unknown))}; there is {', '.join(known)}")
    for name in options.names or known:
        train(name, known[name], options.output)


if __name__ == "__main__":
    main()
