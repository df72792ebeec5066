"""The peak of an operation against an allocation of known size, and against formulas for what is in it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import standins
import torch
from transformers import TrainerCallback

from adapterlab import AdapterLab
from adapterlab import peaks as peaks_module
from adapterlab.peaks import Operation, note, watch

MB = 1_000_000
SIZE = 200 * MB
NOISE = MB  # by which the kernel's own counts of a process are apart
SETTINGS: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT's remark on Conv1D
measurable = pytest.mark.skipif(
    peaks_module._start_anew("cpu") is None, reason="this system does not let a process set its peak back"
)


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    gc.collect()  # what an earlier test has left in cycles would be freed in the middle of a measurement
    yield
    assert not peaks_module._running


def in_one_piece() -> None:
    torch.ones(SIZE, dtype=torch.uint8)


def in_small_pieces() -> None:
    """So small that malloc does not give them back by itself, with one behind them that stays."""
    pieces = [torch.ones(MB // 20, dtype=torch.uint8) for _ in range(SIZE * 20 // MB)]
    STAYS.append(torch.ones(MB // 20, dtype=torch.uint8))
    pieces.clear()


STAYS: list[torch.Tensor] = []


def hooked(lab: AdapterLab, allocate: Any) -> Any:
    return lab.model.get_submodule("model.norm").register_forward_hook(lambda *args: allocate())


def last(lab: AdapterLab) -> Operation:
    operation = lab._last_operation
    assert operation is not None
    return operation


@measurable
@pytest.mark.parametrize("allocate", [in_one_piece, in_small_pieces])
def test_the_peak_is_what_was_allocated_and_again_the_second_time(lab: AdapterLab, allocate: Any) -> None:
    lab.compare("Hello there", **SETTINGS)  # what libraries take when they are first used
    small = last(lab).peak["cpu"]
    assert small < 40 * MB
    hooked(lab, allocate)
    for _ in range(3):
        comparison = lab.compare("Hello", **SETTINGS)
        assert SIZE - NOISE < last(lab).peak["cpu"] < SIZE + 60 * MB
        assert comparison.model["memory"]["peak_bytes"] == last(lab).peak["cpu"]


@measurable
def test_an_earlier_peak_does_not_count(lab: AdapterLab) -> None:
    in_one_piece()
    in_small_pieces()
    lab.compare("Hello", **SETTINGS)
    assert last(lab).peak["cpu"] < 60 * MB


@measurable
def test_what_malloc_has_kept_from_before_is_no_cover(lab: AdapterLab) -> None:
    lab.compare("Hello there", **SETTINGS)
    in_small_pieces()
    hooked(lab, in_small_pieces)
    lab.compare("Hello", **SETTINGS)
    assert last(lab).peak["cpu"] > SIZE - NOISE


@measurable
def test_an_operation_gives_back_what_it_freed(lab: AdapterLab) -> None:
    import psutil

    lab.compare("Hello there", **SETTINGS)
    before = psutil.Process().memory_info().rss
    hooked(lab, in_small_pieces)
    lab.compare("Hello", **SETTINGS)
    assert psutil.Process().memory_info().rss < before + 40 * MB


def test_the_rows_add_up_to_the_peak(full_lab: AdapterLab) -> None:
    assert full_lab._last_operation is None
    full_lab.compare("Hello", **SETTINGS)
    operation = last(full_lab)
    frame = full_lab.memory()
    mine = frame[frame["owner"] == "last operation"].set_index("kind")
    assert set(mine["device"]) == {"cpu"}
    assert mine.loc["peak of compare: KV cache", "source"] == "measured"
    assert mine.loc["peak of compare: KV cache", "bytes"] == operation.parts["KV cache"]["cpu"]
    if "cpu" in operation.peak:
        assert mine["bytes"].sum() == operation.peak["cpu"]
        assert mine.loc["peak of compare: activations and temporaries", "source"] == "computed"


# 2 (keys and values) × layers × heads of keys × width of a head × 4 bytes, for one row and position
PER_POSITION = {
    "llama": 2 * standins.LAYERS * 2 * (standins.HIDDEN // 4) * 4,
    "gpt2": 2 * standins.LAYERS * 4 * (standins.HIDDEN // 4) * 4,
    "t5": 2 * standins.LAYERS * 4 * 8 * 4,
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_cache_is_what_its_shape_says(name: str) -> None:
    lab = AdapterLab(getattr(standins, f"tiny_{name}")(), tokenizer=standins.tiny_tokenizer())
    lab.add_adapter("lora", "mine", target_modules=["c_attn"] if name == "gpt2" else ["q_proj"])
    comparison = lab.compare(["Hello", "What is the moon made of?"], **SETTINGS)
    longest = max(map(len, comparison.prompt_ids))
    rows, positions = 2 * 2, longest + SETTINGS["max_new_tokens"] - 1  # the last token is not read any more
    assert last(lab).parts["KV cache"] == {"cpu": rows * positions * PER_POSITION[name]}
    lab.generate("Hello", None, max_new_tokens=2, min_new_tokens=2, seed=9)
    assert last(lab).name == "generate"
    positions = len(lab.tokenizer("Hello").input_ids) + 1  # type: ignore[misc]
    assert last(lab).parts["KV cache"] == {"cpu": positions * PER_POSITION[name]}


def test_an_encoder_decoders_cache_is_two() -> None:
    lab = AdapterLab(standins.tiny_t5(), tokenizer=standins.tiny_tokenizer(seq2seq=True))
    comparison = lab.compare("Hello there", [None], **SETTINGS)
    read = len(comparison.prompt_ids[0])
    assert last(lab).parts["KV cache"] == {"cpu": (read + SETTINGS["max_new_tokens"]) * PER_POSITION["t5"]}


def test_rows_that_leave_early_were_there() -> None:
    """The cache counts at its largest, before rows leave the batch."""
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    for name in ("a", "b", "c"):
        lab.add_adapter("lora", name, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ends = list(range(11, standins.VOCABULARY, 6))
    comparison = lab.compare("Hello", max_new_tokens=12, eos_token_id=ends)
    lengths = {g.new_tokens for g in comparison.generations}
    assert len(lengths) > 1, "some left before others"
    positions = len(comparison.prompt_ids[0]) + 11
    assert last(lab).parts["KV cache"] == {"cpu": 4 * positions * PER_POSITION["llama"]}


@pytest.mark.parametrize("call", ["divergence", "evaluate"])
def test_looking_at_words_is_an_operation_too(full_lab: AdapterLab, call: str) -> None:
    getattr(full_lab, call)(
        "What is the moon made of?" if call == "divergence" else ["What is the moon?", "Arr, matey."]
    )
    assert last(full_lab).name == call
    assert last(full_lab).seconds > 0
    assert bool(last(full_lab).peak) == (peaks_module._start_anew("cpu") is not None)


# ----- where it can't be measured -----


@pytest.mark.parametrize("system", ["none", "deaf"])
def test_where_the_system_does_not_count_there_is_no_number(
    full_lab: AdapterLab, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No /proc at all, as on macOS and Windows, and one that takes the wish and does nothing."""
    if system == "deaf":
        (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t900000 kB\nVmRSS:\t100000 kB\n")
    monkeypatch.setattr(peaks_module, "_PROCESS", tmp_path if system == "deaf" else tmp_path / "none")
    comparison = full_lab.compare("Hello", **SETTINGS)
    assert last(full_lab).peak == {}
    assert comparison.model["memory"]["peak_bytes"] is None
    frame = full_lab.memory()
    assert list(frame.loc[frame["owner"] == "last operation", "kind"]) == ["peak of compare: KV cache"]


def test_a_peak_is_never_less_than_its_parts() -> None:
    """Memory that another malloc has kept is used again, and does not show."""
    done: list[Operation] = []
    kept = torch.ones(100 * MB, dtype=torch.uint8)  # as if it had been taken from what was kept
    with watch("train", ["cpu"], done.append) as watched:
        watched.resident = {"cpu": 10**15}
        note("optimizer", lambda: [kept])
    assert done[0].peak == {"cpu": 100 * MB}
    assert done[0].rows() == [
        ("peak of train: optimizer", "cpu", 100 * MB, "measured"),
        ("peak of train: activations and temporaries", "cpu", 0, "computed"),
    ]


def test_on_a_gpu_the_allocator_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: a stand-in for `torch.cuda` that counts, and that reports what was before as long as nobody resets."""
    now = {1: 5 * MB}
    highest = {1: 90 * MB}
    stats = SimpleNamespace(
        reset_peak_memory_stats=lambda index: highest.update({index: now[index]}),
        memory_stats=lambda index: {
            "allocated_bytes.all.current": now[index],
            "allocated_bytes.all.peak": highest[index],
        },
    )
    monkeypatch.setattr(peaks_module, "_allocator", lambda kind: {"cuda": stats}[kind])
    done: list[Operation] = []
    with watch("train", ["cuda:1"], done.append):
        highest[1] = 45 * MB
    assert done[0].peak["cuda:1"] == 40 * MB


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_a_device_that_counts_nothing_is_missing(device: str) -> None:
    done: list[Operation] = []
    with watch("train", [device], done.append):
        pass
    assert device not in done[0].peak


# ----- within one another, and failures -----


@measurable
def test_one_within_another_spoils_nothing_and_is_not_measured() -> None:
    done: list[Operation] = []
    with watch("train", ["cpu"], done.append):
        in_one_piece()
        with watch("compare", ["cpu"], done.append):
            torch.ones(MB)
    inner, outer = done
    assert (inner.name, inner.peak) == ("compare", {})
    assert outer.name == "train"
    assert SIZE - NOISE < outer.peak["cpu"] < SIZE + 60 * MB


@measurable
def test_a_comparison_in_a_callback_does_not_spoil_the_training() -> None:
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    seen: list[Any] = []

    class Compares(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                in_one_piece()
                seen.append(lab.compare("Hello", **SETTINGS).model["memory"]["peak_bytes"])
                seen.append(last(lab).name)

    lab.train("mine", ["The moon.", "The sea."], method="lora", target_modules=["q_proj"], max_steps=3,
              disable_tqdm=True, callbacks=[Compares()])  # fmt: skip
    assert seen == [None, "compare"]
    assert last(lab).name == "train"
    assert SIZE - NOISE < last(lab).peak["cpu"] < SIZE + 200 * MB
    trained = sum(p.numel() for p in lab._adapters.mounts.adapters["mine"].trainable)
    assert last(lab).parts["gradients"] == {"cpu": 4 * trained}


@measurable
def test_one_beside_another_is_not_measured() -> None:
    done: list[Operation] = []
    begun, may_end = threading.Event(), threading.Event()

    def beside() -> None:
        with watch("train", ["cpu"], done.append):
            begun.set()
            may_end.wait(60)

    with watch("compare", ["cpu"], done.append):
        thread = threading.Thread(target=beside)
        thread.start()
        assert begun.wait(60)
        note("KV cache", lambda: [torch.zeros(5)])
    may_end.set()
    thread.join(60)
    first, second = done
    assert set(first.peak) == {"cpu"}
    assert first.parts == {"KV cache": {"cpu": 20}}, "each thread tells its own"
    assert (second.peak, second.parts) == ({}, {})


def test_a_failure_leaves_the_record_before(lab: AdapterLab) -> None:
    lab.compare("Hello", **SETTINGS)
    before = last(lab)

    def fail() -> None:
        raise ZeroDivisionError

    handle = hooked(lab, fail)
    with pytest.raises(ZeroDivisionError):
        lab.compare("Hello", **SETTINGS)
    assert last(lab) is before
    handle.remove()
    lab.compare("Hello you", **SETTINGS)
    assert last(lab) is not before


def test_outside_of_operations_nothing_is_told() -> None:
    def never() -> list[torch.Tensor]:
        raise AssertionError

    note("KV cache", never)


def test_an_operation_keeps_no_tensor_alive(lab: AdapterLab) -> None:
    import weakref

    seen: list[Any] = []
    lab.model.get_submodule("model.norm").register_forward_hook(lambda m, args, out: seen.append(weakref.ref(out)))
    lab.compare("Hello", **SETTINGS)
    gc.collect()
    assert seen
    assert not any(ref() is not None for ref in seen)


@measurable
def test_closing_a_lab_gives_its_memory_back(tmp_path: Path) -> None:
    """What a training and a base have left in malloc's hands goes back to the system."""
    import psutil

    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    lab.compare("Hello", **SETTINGS)
    before = psutil.Process().memory_info().rss
    in_small_pieces()
    assert psutil.Process().memory_info().rss > before + SIZE // 2, "malloc keeps it"
    lab.close()
    assert psutil.Process().memory_info().rss < before + 20 * MB
