"""How far `AdapterLab.estimate` is off: weights, a comparison and training against what was measured, and what it costs.

    python benchmarks/estimate.py [--part weights use seven] [--quick] [--output benchmarks/results]

Writes estimate.json and estimate.md. Tensors are counted exactly (tensors.py); each case runs in a process of its own.
See README.md beside this file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from record import describe_machine
from report import table

HERE = Path(__file__).resolve().parent
PARTS = ("weights", "use", "seven")
MODELS = {
    "opt": "opt-350m geometry",
    "llama": "SmolLM2-135M-Instruct (Llama)",
    "gpt2": "gpt2 geometry",
    "t5": "t5-small geometry",
}
NF4 = {"bnb_4bit_quant_type": "nf4", "load_in_4bit": True}
PRECISIONS: dict[
    str, tuple[str, dict[str, Any] | None, int]
] = {  # dtype, quantization, what accelerate divides float32 by
    "fp32": ("float32", None, 1),
    "bf16": ("bfloat16", None, 2),
    "int8": ("bfloat16", {"load_in_8bit": True, "llm_int8_threshold": 0.0}, 4),
    "nf4": ("bfloat16", NF4, 8),
    "nf4, doubly quantised": ("bfloat16", {**NF4, "bnb_4bit_use_double_quant": True}, 8),
}
USES = ("compare", "full", "full, checkpointing", "lora", "lora, checkpointing", "qlora", "qlora, checkpointing")
BATCH, LENGTH, STEPS = 4, 64, 2
COLUMNS, NEW_TOKENS = 8, 8
ROUNDS = 5
SEVEN = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "float16",
}  # Llama-2-7B's
Result = dict[str, Any]


# ----- weights -----


def measure_weights(model: str, folder: Path) -> list[Result]:
    """Estimate, accelerate's and the loaded model's bytes, in every precision."""
    from transformers import BitsAndBytesConfig

    from adapterlab import AdapterLab
    from adapterlab.inspection import count_bytes

    found = []
    source, auto_class = save_model(model, folder)
    largest = accelerates(source)
    for precision, (dtype, quantization, divisor) in PRECISIONS.items():
        settings = None if quantization is None else BitsAndBytesConfig(**quantization)
        real = auto_class.from_pretrained(source, dtype=dtype, quantization_config=settings, device_map="cpu")
        measured = sum(map(count_bytes, real.parameters()))
        del real
        gc.collect()
        frame = AdapterLab.estimate(source, quantization_config=settings, dtype=dtype, context=8)
        here = frame[(frame["owner"] == "base") & (frame["kind"] != "buffers")]
        sizes = {"lab": int(here["bytes"].sum()), "accelerate": largest // divisor, "measured": measured}
        found.append({"model": MODELS[model], "precision": precision, **sizes})
    return found


def save_model(model: str, folder: Path) -> tuple[Path, Any]:
    """The demo model as it is; the others with the published geometry and random weights, saved in `folder`."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, T5Config
    from workloads import random_opt

    from adapterlab.demo import fetch_demo_model

    if model == "llama":
        return fetch_demo_model(), AutoModelForCausalLM
    auto_class = AutoModelForSeq2SeqLM if model == "t5" else AutoModelForCausalLM
    configs = {"gpt2": GPT2Config, "t5": T5Config}
    made = random_opt() if model == "opt" else auto_class.from_config(configs[model]())
    made.save_pretrained(folder)
    return folder, auto_class


def accelerates(folder: Path) -> int:
    """float32 bytes by what `accelerate estimate-memory` does: AutoModel on the meta device, `calculate_maximum_sizes`."""
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModel

    with init_empty_weights():
        bare = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype="float32")
    return int(calculate_maximum_sizes(bare)[0])


# ----- a comparison, and training -----


def measure_use(use: str) -> Result:
    """The peak of all tensors that belong to it, on the demo model in float32, and the estimate of it."""
    import torch
    from peft import LoraConfig
    from tensors import StorageCounter

    from adapterlab import AdapterLab
    from adapterlab.demo import fetch_demo_model

    torch.set_num_threads(1)
    what, _, checkpointing = use.partition(", ")
    folder, quantization = fetch_demo_model(), "4bit" if what == "qlora" else None
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    asked: dict[str, Any] = {"quantization": quantization, "dtype": "float32"}
    asked |= {"batch_size": BATCH, "length": LENGTH, "gradient_checkpointing": bool(checkpointing)}
    lab = AdapterLab(folder, quantization=quantization, dtype="float32", device_map="cpu")
    if what == "compare":
        names = [f"lora-{i + 1}" for i in range(COLUMNS - 1)]
        for name in names:
            lab.add_adapter(lora, name)
        prompt = "The moon is a celestial body that orbits our planet, and the tides follow it. " * 12
        length = len(lab.compare(prompt, ["base"], chat=False, max_new_tokens=1).prompt_ids[0])
        lab.clear_cache()
        counter = StorageCounter()
        with counter:
            lab.compare(prompt, ["base", *names], chat=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        frame = AdapterLab.estimate(folder, dict.fromkeys(names, lora), context=length + NEW_TOKENS, **asked)
        case = "inference"
    else:
        if what != "full":
            lab.add_adapter(lora, "lora")
        with TemporaryDirectory() as scratch:
            trainer = make_trainer(what, lab, bool(checkpointing), scratch)
            counter = StorageCounter()
            with counter:
                trainer.train()
        frame = AdapterLab.estimate(folder, {"lora": lora}, training=True, **asked)
        case = "full fine-tuning" if what == "full" else "training lora"
    here = frame[frame["case"] == case]
    kinds = {str(kind): int(size) for kind, size in here.groupby("kind", sort=False)["bytes"].sum().items()}
    return {
        "use": use,
        "lab": sum(kinds.values()),
        "measured": counter.peak - counter.before + resident(lab),
        "kinds": kinds,
    }


def make_trainer(what: str, lab: Any, checkpointing: bool, scratch: str) -> Any:
    """The lab's for an adapter; plain Trainer on the bare model for full fine-tuning. Rows are cut to the same length."""
    from transformers import Trainer, TrainingArguments

    text = "An adapter changes what a model says, while the weights of the base model stay as they are. " * 8
    usual: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "report_to": "none", "save_strategy": "no",
        "use_cpu": True, "dataloader_pin_memory": False, "output_dir": scratch, "disable_tqdm": True,
        "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    if what != "full":
        rows = [f"{i} {text}" for i in range(BATCH * STEPS)]
        return lab.trainer("lora", rows, max_length=LENGTH, **usual)
    ids = lab.tokenizer(text)["input_ids"][:LENGTH]
    rows = [{"input_ids": ids, "attention_mask": [1] * LENGTH, "labels": ids}] * (BATCH * STEPS)
    names = {"gradient_checkpointing", "activation_checkpointing"} & set(TrainingArguments.__dataclass_fields__)
    usual[sorted(names)[0]] = usual.pop("gradient_checkpointing")
    return Trainer(lab.model.requires_grad_(True).train(), TrainingArguments(**usual), train_dataset=rows)


def resident(lab: Any) -> int:
    """Bytes of the base with its quantization, and of all adapters."""
    sizes = lab.memory()
    theirs = sizes["owner"].isin(["base", *lab.adapters]) & sizes["kind"].isin(["weights", "quantization", "buffers"])
    return int(sizes.loc[theirs, "bytes"].sum())


# ----- seven billion -----


def measure_seven() -> list[Result]:
    """Seconds, and by how many bytes this process grew at the most: the first call brings the libraries, the next don't."""
    import resource

    import psutil

    from adapterlab import AdapterLab

    found = []
    for what in ("the first call, imports included", "inference", "4-bit, LoRA, training", "the same, two adapters"):
        before, process, clock = psutil.Process().memory_info().rss, time.process_time(), time.perf_counter()
        from peft import LoraConfig
        from transformers import LlamaConfig

        lora = LoraConfig(r=8, target_modules="all-linear")
        adapters = {"a": lora, "b": lora} if "two" in what else {"a": lora}
        training = {"quantization": "4bit", "training": True} if what not in ("inference",) else {}
        frame = AdapterLab.estimate(LlamaConfig(**SEVEN), {} if what == "inference" else adapters, **training)
        seconds, work = time.perf_counter() - clock, time.process_time() - process
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        parameters = int(frame["parameters"].iloc[0])
        grown = {"seconds": seconds, "cpu_seconds": work, "grown": max(peak - before, 0), "parameters": parameters}
        found.append({"what": what, **grown})
    return found


# ----- the page -----


def markdown(results: Result) -> str:
    lines = ["# Estimates before loading", ""]
    lines += [f"Written by `benchmarks/estimate.py` on {results['created']}; every number is in `estimate.json`.", ""]
    lines += [*table(["machine", ""], [[key, text] for key, text in results["machine"].items()]), ""]
    for part, section in (("weights", _weights), ("use", _uses), ("seven", _seven)):
        if part in results:
            lines += [*section(results[part]), ""]
    return "\n".join(lines)


def _weights(found: Sequence[Result]) -> Iterator[str]:
    yield "## Weights"
    yield ""
    yield "Megabytes of 10⁶ bytes, quantization statistics included; off: against the model that was really loaded."
    yield ""
    rows = []
    for one in found:
        off = [f"{100 * (one[who] / one['measured'] - 1):+.2f} %" for who in ("lab", "accelerate")]
        rows.append([one["model"], one["precision"], *(f"{one[who] / 1e6:.1f}" for who in ("measured", "lab")), off[0]])
        rows[-1] += [f"{one['accelerate'] / 1e6:.1f}", off[1]]
    head = ["model", "precision", "measured", "estimate", "off", "`accelerate estimate-memory`", "off"]
    yield from table(head, rows)


def _uses(found: Sequence[Result]) -> Iterator[str]:
    yield "## At the peak"
    yield ""
    yield (
        f"SmolLM2-135M-Instruct in fp32, all tensors of the model and of the run, in megabytes. Training: AdamW, batches of "
        f"{BATCH} rows of {LENGTH} tokens, {STEPS} steps, by `lab.trainer`, full fine-tuning by plain `Trainer`; LoRA r = 8 on "
        f"all linear layers, QLoRA over nf4. compare: {COLUMNS} columns, a prompt and {NEW_TOKENS} tokens, `lab.compare`."
    )
    yield ""
    kinds = list(dict.fromkeys(kind for one in found for kind in one["kinds"]))
    rows = []
    for one in found:
        off = f"{100 * (one['lab'] / one['measured'] - 1):+.2f} %"
        parts = [f"{one['kinds'].get(kind, 0) / 1e6:.1f}" for kind in kinds]
        rows.append([one["use"], f"{one['measured'] / 1e6:.1f}", f"{one['lab'] / 1e6:.1f}", off, *parts])
    yield from table(["case", "measured", "estimate", "off", *(f"of it {kind}" for kind in kinds)], rows)


def _seven(found: Sequence[Result]) -> Iterator[str]:
    yield "## What an estimate of Llama-2-7B's geometry costs"
    yield ""
    yield (
        f"In one process, call after call; medians of {ROUNDS} processes. grown: resident memory, at the most, over what it "
        "was before the call."
    )
    yield ""
    rows = [
        [one["what"], f"{one['seconds']:.2f}", f"{one['cpu_seconds']:.2f}", f"{one['grown'] / 1e6:.0f}"]
        for one in found
    ]
    yield from table(["call", "seconds", "CPU seconds", "grown, MB"], rows)


# ----- running it -----


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Hold estimates against what is measured.")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="one model and one case: does it run?")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one case, in this process
    asked = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if asked.only:
        print(json.dumps(run_one(asked.only)))
        return
    created = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    results: Result = {"machine": describe_machine(), "created": created}
    models, uses = (["t5"], USES[3:4]) if asked.quick else (list(MODELS), USES)
    if "seven" in asked.part:
        results["seven"] = medians([apart("seven") for _ in range(1 if asked.quick else ROUNDS)])
    if "weights" in asked.part:
        results["weights"] = [row for model in models for row in apart(f"weights:{model}")]
    if "use" in asked.part:
        results["use"] = [apart(f"use:{use}") for use in uses]
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "estimate.json").write_text(
        json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (asked.output / "estimate.md").write_text(markdown(results), encoding="utf-8")


def medians(rounds: list[list[Result]]) -> list[Result]:
    """Of each call the medians over the rounds, each of which was a process of its own."""
    return [
        {
            key: value if key == "what" else statistics.median(one[key] for one in calls)
            for key, value in calls[0].items()
        }
        for calls in zip(*rounds)
    ]


def apart(what: str) -> Any:
    """One case in a process of its own."""
    print(what, flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--only", what]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def run_one(what: str) -> Any:
    part, _, which = what.partition(":")
    if part == "seven":
        return measure_seven()
    if part == "use":
        return measure_use(which)
    with TemporaryDirectory() as folder:
        return measure_weights(which, Path(folder))


if __name__ == "__main__":
    main()
