"""One part from beginning to end: load, count bytes, warm up, time in rounds, check every token."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any

from checks import Checker
from contenders import BASE, Stage
from record import Memory, Part
from rounds import settled_memory, summarise, time_rounds, warm_up
from tensors import StorageCounter, storage_bytes
from workloads import ADAPTERS, MODELS, Plan, adapter_configs, load_model, prompt_for, share, write_adapters

from adapterlab import AdapterLab, AdapterLabWarning

SWITCH_ROUNDS = 10


def run_part(plan: Plan, report: Callable[[str], None] = print, model: Any = None, tokenizer: Any = None) -> Part:
    """Run one part; a `model` and `tokenizer` in hand take the place of the plan's. Raises `WrongToken`."""
    started = time.perf_counter()
    if model is None:
        model, tokenizer = load_model(plan.model, plan.dtype)
    with TemporaryDirectory() as folder, stage_of(plan, model, tokenizer, Path(folder)) as stage, sound_base():
        memory = count_memory(stage)
        report(f"  peak {memory.ratio:.3f} of weights, adapters and cache; loading the others")
        stage.prepare()
        switches = time_switches(stage)
        checker = Checker(stage, plan.most + 1)
        report(f"  rounding alone makes {checker.noise:.2g} logits; warming up")
        with settled_memory():
            warm_up(stage, plan)
            rounds = time_rounds(stage, plan, checker, report)
        return Part(
            model=MODELS.get(plan.model, plan.model),
            adapters=ADAPTERS[plan.adapters],
            dtype=plan.dtype,
            parameters=sum(p.numel() for p in model.parameters()),
            adapted_layers=adapted_layers(stage),
            prompt_tokens=len(stage.ids),
            new_tokens=plan.new_tokens,
            rounds=plan.rounds,
            timings=summarise(rounds, stage.names, plan.columns),
            switches=switches,
            checks=checker.judge(),
            noise=checker.noise,
            tolerance=checker.tolerance,
            memory=memory,
            notes=tuple(sorted(stage.notes)),
            elapsed=time.perf_counter() - started,
        )


@contextmanager
def stage_of(plan: Plan, model: Any, tokenizer: Any, folder: Path) -> Iterator[Stage]:
    """The lab with its adapters, and what the others will need; the lab is closed at the end."""
    *folders, extra = write_adapters(model, adapter_configs(plan.adapters, plan.most + 1), folder).items()
    lab = AdapterLab(share(model), tokenizer=tokenizer)
    try:
        for name, path in folders:
            lab.load_adapter(path, name)
        lab.set_adapter(None)
        prompt = prompt_for(tokenizer)
        ids = lab.compare(prompt, [BASE], max_new_tokens=1).prompt_ids[0]
        yield Stage(model, lab, prompt, ids, plan.new_tokens, dict(folders), extra[1], plan.adapters != "mixed")
    finally:
        lab.close()


@contextmanager
def sound_base() -> Iterator[None]:
    """The contenders share the base's tensors: if one of them changes them, the lab warns, and here that ends the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterLabWarning)
        yield


def adapted_layers(stage: Stage) -> int:
    """How many modules of the model the first adapter changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(module, BaseTunerLayer) for module in stage.peft.modules())


def count_memory(stage: Stage) -> Memory:
    """Bytes alive at the most while the lab compares everything for the first time; only the lab is loaded."""
    stage.lab.clear_cache()
    with StorageCounter() as counter:
        stage.compare([BASE, *stage.names])
    gc.collect()
    return Memory(
        base=storage_bytes((*stage.model.parameters(), *stage.model.buffers())),
        adapters=sum(adapter.bytes for adapter in stage.lab.adapters.values()),
        kv_cache=cache_bytes(stage.model, len(stage.ids) + stage.new_tokens, len(stage.names) + 1),
        before=counter.before,
        peak=counter.peak,
        after=counter.current,
        contributors=tuple(counter.at_peak.most_common(8)),
    )


def cache_bytes(model: Any, positions: int, rows: int) -> int:
    """Keys and values of every layer, from the config."""
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * groups * width * positions * rows * model.dtype.itemsize


def time_switches(stage: Stage) -> dict[str, tuple[float, ...]]:
    """Milliseconds of each of many `set_adapter` calls, with all adapters loaded."""
    contestants = {"lab": stage.lab.set_adapter} | ({"peft": stage.peft.set_adapter} if stage.one_method else {})
    found: dict[str, tuple[float, ...]] = {}
    for whose, set_adapter in contestants.items():
        for name in stage.names:  # warm
            set_adapter(name)
        calls = [partial(set_adapter, name) for name in stage.names] * SWITCH_ROUNDS
        found[whose] = tuple(timeit(call, number=1) * 1e3 for call in calls)
    stage.lab.set_adapter(None)
    return found
