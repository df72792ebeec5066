"""Nothing stays behind: what a lab, a panel or a training took is given back to the last tensor, thread, widget and file.

Each test does some rounds of its work to warm up, counts, does many more, and counts again: the counts are equal, not
close. Resident memory has noise, so of that the trend is looked at. `--long` does the full number of rounds.
"""

from __future__ import annotations

import gc
import logging
import os
import statistics
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import psutil
import pytest
import torch
from matplotlib.figure import Figure
from standins import tiny_llama, tiny_tokenizer, write_model

from adapterlab import AdapterLab
from adapterlab.peaks import give_back

SETTINGS: dict[str, Any] = {"max_new_tokens": 3}
PAIRS = [("What is the moon?", "A lantern, matey!"), ("Who are you?", "A captain, arr!")] * 2
WARM_UP = 3  # rounds until libraries are loaded and caches that hold the last few of something are full
ENOUGH = 8  # samples of memory for a trend to be told from noise
SAMPLES = 20  # times at most that memory is looked at in one test
TREND = 2_000_000  # bytes by which resident memory may be apart between two quarters of the rounds
OURS = ("adapterlab", "peft", "transformers", "accelerate", "ipywidgets", "traitlets", "comm", "tempfile")


# -- what is counted ---------------------------------------------------------------------------------------------------


def census(lab: AdapterLab | None = None) -> Counter[str]:
    """How many there are now of everything that could stay behind, by what it is."""
    for _ in range(3):  # what the first finds can have finalizers that leave more
        gc.collect()
    found: Counter[str] = Counter()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, Figure):
            found["figures"] += 1
        if issubclass(kind, torch.Tensor):
            found["tensors"] += 1
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif str(kind.__module__).partition(".")[0] in OURS:
            found[f"objects of {kind.__module__}.{kind.__qualname__}"] += 1
    found["tensors' bytes"] = sum(storages.values())
    found["storages"] = len(storages)
    found["threads"] = threading.active_count()
    found["widgets"] = len(widgets_alive())
    found["open files"] = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    found["temporary files"] = sum(1 for _ in Path(tempfile.gettempdir()).rglob("*"))
    found["warning filters"] = len(warnings.filters)
    loggers = [
        logging.root,
        *(one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)),
    ]
    for what in ("filters", "handlers"):
        found[f"logging {what}"] = sum(len(getattr(logger, what)) for logger in loggers)
    found["logging levels"] = sum(logger.level for logger in loggers)
    found["global hooks"] = sum(len(hooks) for hooks in global_hooks())
    if lab is not None:
        found["hooks"] = sum(len(hooks) for module in lab.model.modules() for hooks in hooks_of(module))
        found["modules"] = sum(1 for _ in lab.model.modules())
        found["listeners"] = len(lab._listeners)
        found["finished columns"] = len(lab._finished)
        found["history"] = len(lab.history)
    return found


def widgets_alive() -> dict[str, Any]:
    """ipywidgets' own register of what the page may still ask for."""
    from ipywidgets.widgets import widget

    found: dict[str, Any] = (
        getattr(widget, "_instances", None) if hasattr(widget, "_instances") else ipywidgets.Widget.widgets
    )
    return found


def hooks_of(module: Any) -> Iterator[dict[int, Any]]:
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"):
        yield getattr(module, name)


def global_hooks() -> Iterator[dict[int, Any]]:
    from torch.nn.modules import module

    for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"):
        yield getattr(module, name)


def resident() -> int:
    gc.collect()
    give_back()
    return int(psutil.Process().memory_info().rss)


def check_rounds(work: Callable[[], object], rounds: int, lab: AdapterLab | None = None) -> None:
    """Do `work` a few times, and then `rounds` times; fail if anything is more or less than it was before those."""
    for _ in range(WARM_UP):
        work()
    before, sizes = census(lab), []
    for number in range(rounds):
        work()
        if number % max(rounds // SAMPLES, 1) == 0:
            sizes.append(resident())
    after = census(lab)
    more = {key: (before[key], after[key]) for key in before | after if before[key] != after[key]}
    assert not more, f"after {rounds} rounds (before, after): {more}"
    if len(sizes) >= ENOUGH:
        check_trend(sizes)


def check_trend(sizes: list[int]) -> None:
    """Fail if the last quarter of the rounds has more memory than the second one."""
    quarter = max(len(sizes) // 4, 1)
    second, last = sizes[quarter : 2 * quarter], sizes[-quarter:]
    grown = statistics.median(last) - statistics.median(second)
    assert grown <= TREND, f"resident memory grew by {grown / 1e6:.1f} MB in {len(sizes) // 2} rounds: {sizes}"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for temporary files in which nobody else writes, and what was there before the test not looked at again."""
    own = tmp_path / "tmp"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    gc.collect()
    gc.freeze()  # libraries are a million objects: looking through them takes most of a second each time
    yield
    gc.unfreeze()


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_switches(full_lab: AdapterLab) -> None:
    columns = [
        "pirate",
        "wide",
        None,
        {"pirate": 0.5},
        "poet",
        {"pirate": 0.7, "wide": 0.3},
        "ada",
        "dora",
        ["ada", "poet"],
    ]
    calls: list[Callable[[], object]] = [lambda column=column: full_lab.set_adapter(column) for column in columns]  # type: ignore[misc]
    calls += [full_lab.disable_adapters, full_lab.enable_adapters]

    def switch() -> None:
        for call in calls:
            call()
        with full_lab.using("pirate"):
            pass
        full_lab.set_trainable("wide")
        full_lab.set_trainable(None)
        full_lab.set_adapter(None)

    check_rounds(switch, 1000 // len(calls), full_lab)


def test_load_compare_delete(lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path, long: bool) -> None:
    lab.load_adapter(adapter_folders["pirate"], "kept")
    trained = tmp_path / "trained"

    def live() -> None:
        for name, folder in adapter_folders.items():
            lab.load_adapter(folder, name)
        lab.compare("Hello", [None, "pirate", "poet", {"wide": 0.5}, {"ada": 0.7, "kept": 0.2}, "dora"], **SETTINGS)
        lab.add_weighted_adapter(["pirate", "wide"], [0.5, 0.5], "both")
        lab.add_weighted_adapter(["pirate", "kept"], [0.5, 0.5], "near", combination_type="linear")
        lab.compare("Hello", ["both", "near"], temperature=0.8, **SETTINGS)
        lab.train("mine", PAIRS, method="lora", r=2, target_modules=["q_proj"], max_steps=1, disable_tqdm=True)
        lab.save_adapter("mine", trained)
        lab.verify()
        lab.merge_and_unload("pirate")
        for name in list(lab.adapters):
            if name != "kept":
                lab.delete_adapter(name)
        lab.load_adapter(trained, "again")
        lab.delete_adapter("again")
        lab.history.clear()
        lab.clear_cache()

    check_rounds(live, 100 if long else 8, lab)


def test_looking(full_lab: AdapterLab, long: bool) -> None:
    def look() -> None:
        full_lab.summary(), full_lab.parameters(), full_lab.memory(), full_lab.capabilities()
        full_lab.delta_norms("pirate"), full_lab.subspace_overlap("pirate", "wide")
        full_lab.divergence("The moon is", ["pirate"]), full_lab.evaluate(["The moon", "The sea"])
        full_lab.plot_memory(), full_lab.plot_divergence("The moon", ["pirate"])
        if long:
            full_lab.plot_ranks("ada"), full_lab.plot_delta_norms("poet"), full_lab.plot_parameters()
        AdapterLab.estimate(full_lab.model, ["lora"], context=16, training=long, length=8, batch_size=1)
        full_lab._repr_html_()
        str(full_lab.model_card("ada"))

    check_rounds(look, 20 if long else 2, full_lab)


def test_trainings(lab: AdapterLab, long: bool) -> None:
    def train() -> None:
        for method, more in (("lora", {"r": 2}), ("adalora", {"init_r": 3, "target_r": 2}), ("ia3", {})):
            lab.train(f"mine-{method}", PAIRS, method=method, max_steps=3, disable_tqdm=True, eval_dataset=0.5, **more)  # type: ignore[arg-type]
            lab.delete_adapter(f"mine-{method}")

    check_rounds(train, 10 if long else 8, lab)


def test_panels(full_lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path, long: bool) -> None:
    def click() -> None:
        panel = full_lab.panel()
        drive(full_lab, panel, adapter_folders["pirate"], tmp_path / "saved", VIEWS if long else VIEWS[:2])
        panel.close()
        full_lab.history.clear()
        full_lab.clear_cache()
        end_threads()

    check_rounds(click, 20 if long else 2, full_lab)


VIEWS = ("Sizes", "Abilities", "Memory", "Ranks", "Weights")


def drive(lab: AdapterLab, panel: Any, folder: Path, target: Path, views: Sequence[str]) -> None:
    """Click through a panel: compare, load, save, blend, train, inspect, verify, delete."""

    def done() -> None:
        lab.wait(60)
        assert panel.state.notice is None or panel.state.notice.kind == "info", panel.state.notice

    panel.state.max_new_tokens = 2
    panel.prompt.generate.click()
    done()
    panel.do.mark("likelihood")
    done()
    panel.do.load(lambda: (str(folder), "loaded"))
    done()
    panel.do.save(lambda: ("loaded", str(target)))
    done()
    panel.do.blend(lambda: {"pirate": 0.5, "wide": 0.5})
    done()
    panel.do.add(lambda: ("ia3", "fresh", {}))
    done()
    panel.tabs.open = "Train"
    panel.train.form.data.pasted.value = "What is the moon? => A lantern\nWho? => Me"
    panel.train.form.steps.value = 1
    panel.train.form.train.click()
    done()
    panel.tabs.open = "Inspect"
    for what in views:
        panel.inspect.what.value = what
        done()
    panel.trust.button.click()
    done()
    panel.tabs.open = "Compare"
    panel.prompt.generate.click()
    panel.prompt.stop.click()
    done()
    for name in ("loaded", "fresh", "mine"):
        panel.do.delete(name)
        done()


def end_threads() -> None:
    """Panels' threads end with the job they are on, and nobody waits for them; here somebody does."""
    for thread in threading.enumerate():
        if thread.name.startswith("adapterlab-panel"):
            thread.join(30)


def test_labs_opened_and_closed(adapter_folders: dict[str, Path], tmp_path: Path, long: bool) -> None:
    base = write_model(tmp_path / "base", tiny_llama(), tiny_tokenizer(chat=True))

    def open_and_close() -> None:
        lab = AdapterLab(base)
        for name in ("pirate", "poet", "ada"):
            lab.load_adapter(adapter_folders[name], name)
        lab.compare("Hello", **SETTINGS)
        panel = lab.panel()
        lab.close()
        panel.close()
        end_threads()

    check_rounds(open_and_close, 20 if long else 8)


def test_a_model_in_hand_comes_back_as_it_was(adapter_folders: dict[str, Path], long: bool) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    def borrow() -> None:
        lab = AdapterLab(model, tokenizer=tokenizer)
        lab.load_adapter(adapter_folders["dora"], "dora")
        lab.compare("Hello", **SETTINGS)
        lab.close()

    check_rounds(borrow, 20 if long else 8)


# -- what is kept on purpose ---------------------------------------------------------------------------------------------


def test_the_history_keeps_comparisons_and_nothing_of_the_model(full_lab: AdapterLab) -> None:
    """It grows by design, until somebody clears it; each comparison is texts and numbers."""
    for _ in range(WARM_UP):
        full_lab.compare("Hello", **SETTINGS)
        full_lab.clear_cache()
    before = census(full_lab)
    for _ in range(5):
        full_lab.compare("Hello", **SETTINGS)
        full_lab.clear_cache()
    after = census(full_lab)
    kinds = {
        "history": 5,
        "objects of adapterlab.comparison.Comparison": 5,
        "objects of adapterlab.comparison.Generation": 30,
    }
    grown = {key: after[key] - before[key] for key in before | after if after[key] != before[key]}
    assert grown == kinds
    full_lab.history.clear()
    assert census(full_lab)["objects of adapterlab.comparison.Generation"] == 0


def test_finished_columns_take_no_more_than_their_limit(full_lab: AdapterLab) -> None:
    assert full_lab._finished.limit == 64_000_000
    full_lab._finished.limit, seen = 120_000, []
    for number in range(30):
        full_lab.compare(f"Prompt number {number}", [None, "pirate"], **SETTINGS)
        full_lab.history.clear()
        assert 0 < full_lab._finished.size <= 120_000
        if number >= 20:
            found = census(full_lab)
            seen.append((found["tensors"], found["tensors' bytes"], found["finished columns"]))
    assert len(set(seen)) == 1, "one comes, and one goes"
    full_lab.clear_cache()
    assert (len(full_lab._finished), full_lab._finished.size) == (0, 0)


def test_adapters_that_are_deleted_give_their_memory_back(lab: AdapterLab, adapter_folders: dict[str, Path]) -> None:
    """The stacks too, in which the factors of several lie side by side."""

    def resident_of_lab() -> dict[tuple[str, str], int]:
        frame = lab.memory()
        rows = zip(frame["owner"], frame["kind"], frame["bytes"])
        return {(owner, kind): size for owner, kind, size in rows if owner not in ("process", "last operation")}

    def settle() -> None:
        lab.set_adapter("kept")
        lab.clear_cache()  # so that it runs, and its batch is kept
        lab.compare("Hello", **SETTINGS)
        lab.history.clear()
        lab.clear_cache()

    lab.load_adapter(adapter_folders["pirate"], "kept")
    settle()
    before, tensors = resident_of_lab(), census(lab)
    for name in ("pirate", "wide", "ada"):
        lab.load_adapter(adapter_folders[name], name)
    lab.compare("Hello", **SETTINGS)
    assert sum(resident_of_lab().values()) > sum(before.values())
    for name in ("pirate", "wide", "ada"):
        assert lab.delete_adapter(name) > 0
    settle()
    assert resident_of_lab() == before
    after = census(lab)
    assert {key: (tensors[key], after[key]) for key in after if after[key] > tensors[key]} == {}


# -- that a leak would be found ------------------------------------------------------------------------------------------

KEPT: list[Any] = []


def _keep_a_thread() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, daemon=True)
    thread.start()
    KEPT.append((stop, thread))


LEAKS: dict[str, Callable[[AdapterLab], object]] = {
    "a tensor": lambda lab: KEPT.append(torch.zeros(3)),
    "a view of a big one": lambda lab: KEPT.append(torch.zeros(1000)[:1]),
    "a hook": lambda lab: lab.model.lm_head.register_forward_hook(lambda *_: None),
    "a listener": lambda lab: lab.on_change(lambda kind: None),
    "a thread": lambda lab: _keep_a_thread(),
    "a widget": lambda lab: ipywidgets.HTML(),
    "an open file": lambda lab: KEPT.append(open(os.devnull)),  # noqa: SIM115
    "a temporary folder": lambda lab: tempfile.mkdtemp(),
    "a warning filter": lambda lab: warnings.filterwarnings("ignore", message=f"number {len(warnings.filters)}"),
    "a logging filter": lambda lab: logging.getLogger("transformers").addFilter(lambda record: True),
    "a figure": lambda lab: KEPT.append(lab.plot_memory()),
    "a record": lambda lab: KEPT.append(lab.adapters["pirate"]),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_found(leak: str, full_lab: AdapterLab) -> None:
    logger = logging.getLogger("transformers")
    widgets, filters = dict(widgets_alive()), list(logger.filters)
    try:
        with warnings.catch_warnings(), pytest.raises(AssertionError, match="after 2 rounds"):
            check_rounds(lambda: LEAKS[leak](full_lab), 2, full_lab)
    finally:
        for kept in KEPT:
            if isinstance(kept, tuple):
                kept[0].set()
                kept[1].join(10)
            elif hasattr(kept, "fileno"):
                kept.close()
        KEPT.clear()
        logger.filters[:] = filters
        for key, widget in list(widgets_alive().items()):
            if key not in widgets:
                widget.close()


def test_memory_that_grows_is_found() -> None:
    flat = [100_000_000 + 300_000 * (number % 3) for number in range(20)]
    check_trend(flat)
    check_trend([90_000_000, *flat[1:]])  # libraries that load themselves
    with pytest.raises(AssertionError, match=r"grew by 5\.\d MB"):
        check_trend([size + 500_000 * number for number, size in enumerate(flat)])
