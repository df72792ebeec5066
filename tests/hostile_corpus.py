"""Files that a stranger could send: adapters, models, comparisons and data that are broken, absurd or mean harm.

`python tests/hostile_corpus.py FOLDER` writes them all, each in a folder of its own, and prints a line about each. Nothing
in them is random. No payload does more than to make the file `canary/RAN` in FOLDER: where it is, something was executed.
test_hostile.py hands each to the lab.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hostile_bases
import hostile_configs
import hostile_folders
import hostile_results
import hostile_weights
from hostile_cases import CASES, Case, Good, build

__all__ = ["CASES", "Case", "Good", "build", "make_good"]
PARTS = (
    hostile_weights,
    hostile_configs,
    hostile_folders,
    hostile_bases,
    hostile_results,
)  # each puts its own into CASES


def make_good(root: Path) -> Good:
    """Write what every case starts from."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig
    from standins import tiny_llama, tiny_tokenizer, write_adapter, write_model

    from adapterlab import AdapterLab

    good = Good(root)
    good.canary.parent.mkdir(parents=True)
    (good.canary.parent / "hostile_import.py").write_text(
        f"open({str(good.canary)!r}, 'w').close()\n", encoding="utf-8"
    )
    write_model(good.base, tiny_llama(), tiny_tokenizer(chat=True))
    configs = {
        "lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=["v_proj", "up_proj"]),
        "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"]),
    }
    for seed, (kind, config) in enumerate(configs.items()):
        write_adapter(good.adapter(kind), tiny_llama(), config, base=str(good.base), seed=seed)
    lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
    lab.load_adapter(good.adapter("lora"), "pirate")
    lab.compare("Hello", max_new_tokens=3).to_json(good.comparison)
    lab.close()
    lab = AdapterLab(good.base)
    lab.load_adapter(good.adapter("lora"), "pirate")
    lab.load_adapter(good.adapter("ia3"), "poet")
    lab.train("poet", ["One text to learn."], max_steps=1)
    lab.set_adapter({"pirate": 0.5, "poet": 1.0})
    lab.compare("Hello", max_new_tokens=2)
    lab.save(good.lab)
    lab.close()
    return good


def main(folder: str) -> None:
    root = Path(folder)
    if root.exists() and any(root.iterdir()):
        raise SystemExit(f"{folder} holds things already: name a new folder.")
    good = make_good(root)
    for one in CASES:
        build(one, root / "cases" / one.name, good)
        print(f"{one.what:<10}  {one.name:<32}  {one.why}{' (legal)' if one.legal else ''}")
    print(f"{len(CASES)} cases in {root}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER")
    main(sys.argv[1])
