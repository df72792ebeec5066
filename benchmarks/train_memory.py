"""What one training holds in memory, in a process of its own: bytes of tensors by owner, and the process's growth.

    python benchmarks/train_memory.py --model demo --method lora|adalora|ia3|full

`train.py` runs it once for each method and reads the JSON that it prints.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from tensors import StorageCounter, storage_bytes
from train_record import Footprint
from train_steps import Classroom, TrainPlan, classroom, load
from transformers import TrainerCallback
from workloads import MODELS

METHODS = ("lora", "adalora", "ia3", "full")
STEPS = 1  # beside those for warmth: what a training holds is there from the first on
EVERY = 0.002  # seconds between two looks at resident memory


class Owners(TrainerCallback):
    """Bytes of gradients and optimizer state, each when it is there."""

    def __init__(self) -> None:
        self.trained = self.parameters = self.gradients = self.optimizer = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained, self.parameters = sum(p.numel() for p in trained), storage_bytes(trained)
        self.gradients = storage_bytes(p.grad for p in trained if p.grad is not None)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        tensors = [value for held in optimizer.state.values() for value in held.values() if hasattr(value, "numel")]
        self.optimizer = storage_bytes(tensors)


class Resident:
    """The most that the process's resident memory is above `start`, looked at all the time."""

    def __init__(self) -> None:
        gc.collect()
        self.start = psutil.Process().memory_info().rss
        self.growth = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        ended, process = threading.Event(), psutil.Process()

        def look() -> None:
            while not ended.wait(EVERY):
                self.growth = max(self.growth, process.memory_info().rss - self.start)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def measure_footprint(method: str, plan: TrainPlan, model: Any, tokenizer: Any, rows: list[Any]) -> Footprint:
    """Train twice on the longest rows: once as it is, once with every storage counted, which takes its time."""
    base = storage_bytes((*model.parameters(), *model.buffers()))
    longest_first = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    with classroom(plan, model, tokenizer, longest_first) as room:
        resident = Resident()  # by now everything is imported
        trainer = make_trainer(room, method, Owners())
        with resident.watched():
            trainer.train()
        del trainer
        owners = Owners()
        trainer = make_trainer(room, method, owners)
        with StorageCounter() as counter:
            trainer.train()
        allocator = getattr(getattr(trainer, "allocation", None), "allocator", None)
        return Footprint(
            method=method,
            trained=owners.trained,
            base=base,
            parameters=owners.parameters,
            gradients=owners.gradients,
            optimizer=owners.optimizer,
            allocation=storage_bytes(allocator.state().values()) if allocator is not None else 0,
            peak=counter.peak,
            resident=resident.growth,
            checkpoint=saved_bytes(room, method),
            largest=tuple(counter.at_peak.most_common(5)),
        )


def make_trainer(room: Classroom, method: str, owners: Owners) -> Any:
    """The lab's for an adapter; plain Trainer on the bare model for full fine-tuning."""
    if method != "full":
        return room.lab_trainer(method, [owners])
    return room.plain_trainer(room.model.requires_grad_(True).train(), [owners])


def saved_bytes(room: Classroom, method: str) -> int:
    """Of the weights' files, as the lab or transformers saves them."""
    folder = room.folder / "saved"
    if method == "full":
        room.model.save_pretrained(folder)
    else:
        room.lab.save_adapter(method, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def run_memory(model: str, report: Callable[[str], None]) -> tuple[Footprint, ...]:
    """Every method in a process of its own."""
    found = []
    for method in METHODS:
        command = [sys.executable, str(Path(__file__).resolve()), "--model", model, "--method", method]
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found.append(footprint(told.stdout.splitlines()[-1]))
        report(f"  {method}: {found[-1].peak / 1e6:.0f} MB of tensors at the peak")
    return tuple(found)


def footprint(line: str | bytes) -> Footprint:
    raw = json.loads(line)
    return Footprint(**{**raw, "largest": tuple((what, size) for what, size in raw["largest"])})


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of one training.")
    parser.add_argument("--model", choices=list(MODELS), default="demo")
    parser.add_argument("--method", choices=METHODS, required=True)
    asked = parser.parse_args()
    plan = TrainPlan(asked.model, steps=STEPS)
    print(json.dumps(asdict(measure_footprint(asked.method, plan, *load(asked.model)))))


if __name__ == "__main__":
    main()
