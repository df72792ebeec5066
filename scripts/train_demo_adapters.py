"""Trains the adapters that are bundled with the demo, on the texts beside them, and puts them into their folders.

    python scripts/train_demo_adapters.py                      # all of them, into adapterlab/data/adapters
    python scripts/train_demo_adapters.py robot --output DIR   # one, elsewhere

The seed is fixed: same machine, same versions, same number of threads, same adapter. Three to four minutes each on
two CPU cores.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from adapterlab.demo import DEMO_MODEL_ID, demo_training_pairs, fetch_demo_model

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

ADAPTERS = Path(__file__).resolve().parents[1] / "adapterlab" / "data" / "adapters"
IGNORED = -100  # what the loss skips, in transformers


@dataclass(frozen=True)
class Recipe:
    config: PeftConfig
    learning_rate: float
    max_steps: int
    batch_size: int = 8
    seed: int = 0


def recipes() -> dict[str, Recipe]:
    from peft import IA3Config, LoraConfig

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    feed_forward = ["gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=attention + feed_forward, feedforward_modules=["down_proj"])
    return {
        "pirate": Recipe(lora, learning_rate=1.5e-3, max_steps=64),
        "robot": Recipe(ia3, learning_rate=8e-3, max_steps=56),
    }


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> dict[str, list[int]]:
    """One training row: the rendered chat, with labels on the answer and its end only."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {
        "input_ids": prompt + reply,
        "attention_mask": [1] * len(prompt + reply),
        "labels": [IGNORED] * len(prompt) + reply,
    }


def train(name: str, recipe: Recipe, output: Path) -> None:
    """Trains one adapter and replaces `output/name` by it, once it is complete."""
    import torch
    from peft import get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(recipe.seed)
    folder = fetch_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), recipe.config)
    rows = [encode(tokenizer, question, answer) for question, answer in demo_training_pairs(name)]
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output, prefix=".training-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=recipe.max_steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, recipe.max_steps // 20),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=recipe.seed,
            use_cpu=True,
            disable_tqdm=True,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
        # The folder it was loaded from is of this machine; everyone knows the model by its id.
        model.peft_config["default"].base_model_name_or_path = DEMO_MODEL_ID
        built = Path(scratch) / name
        model.save_pretrained(built, save_embedding_layers=False)  # "auto" would ask the Hub about the base
        (built / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        for file in built.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        shutil.rmtree(output / name, ignore_errors=True)
        built.rename(output / name)


def main() -> None:
    known = recipes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which to train: {', '.join(known)} (default: all)")
    parser.add_argument("--output", type=Path, default=ADAPTERS, help="the folder their folders go into")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"no recipe for {', '.join(sorted(unknown))}; there is {', '.join(known)}")
    for name in options.names or known:
        start = time.perf_counter()
        train(name, known[name], options.output)
        size = sum(file.stat().st_size for file in (options.output / name).iterdir())
        print(f"{name}: {size / 1e6:.2f} MB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
