"""Cells, threads and panels at once on one lab: nobody's words come from another's adapter, and nobody waits for ever.

What each column says to each prompt is computed beforehand, by a lab of its own in one thread. Then eight threads work on one
lab; every answer's text, weights and shift are held against that.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standins import tiny_llama, tiny_tokenizer
from transformers import TrainerCallback

from adapterlab import AdapterLab, AdapterLabError
from adapterlab.columns import Column
from adapterlab.comparison import Comparison, Generation
from adapterlab.widgets.state import PanelState
from adapterlab.widgets.worker import Worker

PROMPTS = ["The moon", "A ship and the sea", "Tell me about the weather"]
FIXED = ["pirate", "poet", "ada"]  # these stay; others come, learn and go
COLUMNS: list[Any] = [None, *FIXED, {"pirate": 0.5, "poet": 2.0}, {"ada": 0.25}]
TOKENS = 4
SECONDS, LONG_SECONDS = 12, 660
LIMIT = 240  # seconds that a piece of work may wait, on a busy machine


def label(column: Any) -> str:
    return Column.of(column).label


def opened(folders: dict[str, Path]) -> AdapterLab:
    lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
    for name in FIXED:
        lab.load_adapter(folders[name], name)
    lab.set_adapter("poet")
    return lab


@pytest.fixture(scope="module")
def reference(adapter_folders: dict[str, Path]) -> dict[tuple[str, str], Generation]:
    """What each column says to each prompt, alone."""
    lab = opened(adapter_folders)
    said = {
        (label(column), prompt): lab.generate(prompt, column, max_new_tokens=TOKENS)
        for column in COLUMNS
        for prompt in PROMPTS
    }
    lab.close()
    assert len({g.weights_digest for g in said.values()}) == len(COLUMNS)
    return said


class Stress:
    """A lab, what was expected of it, and what went wrong."""

    def __init__(self, lab: AdapterLab, reference: dict[tuple[str, str], Generation], folders: dict[str, Path]) -> None:
        self.lab, self.reference, self.folders = lab, reference, folders
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over = threading.Event()
        self.begun = threading.Event()  # the first piece is done, or something is wrong
        self.closing = False  # which stops what runs

    def check(self, comparison: Comparison) -> None:
        for g in comparison.generations:
            alone = self.reference.get((g.column, g.prompt))
            if alone is None or (self.closing and g.finish_reason == "stopped"):
                continue
            have = (g.text, g.token_ids, g.weights_digest, g.active_adapters, g.multipliers)
            want = (alone.text, alone.token_ids, alone.weights_digest, alone.active_adapters, alone.multipliers)
            if have != want or abs(g.logit_shift - alone.logit_shift) > 1e-3:
                self.wrong.append(
                    f"{g.column!r} said {have}, {g.logit_shift}; alone it says {want}, {alone.logit_shift}"
                )

    def work(self, number: int, seed: int, pieces: dict[str, Callable[[random.Random, int], None]]) -> None:
        """Random pieces, until it is over; only what the lab may say is caught."""
        numbers = random.Random(seed)
        while not self.over.is_set():
            name = numbers.choice([*pieces])
            try:
                pieces[name](numbers, number)
                self.done[name] += 1
                self.begun.set()
            except AdapterLabError as error:
                if not is_expected(str(error)):
                    self.fail(name, error)
                self.done[f"{name}: refused"] += 1
            except BaseException as error:
                self.fail(name, error)

    def fail(self, name: str, error: BaseException) -> None:
        import traceback

        self.wrong.append(f"{name}: {''.join(traceback.format_exception(error))[-1500:]}")
        self.over.set()
        self.begun.set()


def is_expected(said: str) -> bool:
    """What somebody else did meanwhile: deleted an adapter, used its name, let it learn, stopped, closed the lab."""
    expected = (
        "No adapter named", "is taken", "already", "no longer", "is closed", "Stopped before", "Nothing to verify",
        "has changed", "other weights",
    )  # fmt: skip
    return any(words in said for words in expected)


def pieces_of(stress: Stress) -> dict[str, Callable[[random.Random, int], None]]:
    lab = stress.lab

    def some(numbers: random.Random) -> list[Any]:
        return numbers.sample(COLUMNS, numbers.randint(1, 4))

    def compare(numbers: random.Random, mine: int) -> None:
        prompts = numbers.sample(PROMPTS, numbers.randint(1, 2))
        stress.check(lab.compare(prompts, some(numbers), max_new_tokens=TOKENS))

    def generate(numbers: random.Random, mine: int) -> None:
        generation = lab.generate(numbers.choice(PROMPTS), numbers.choice(COLUMNS), max_new_tokens=TOKENS)
        stress.check(SimpleNamespace(generations=[generation]))  # type: ignore[arg-type]

    def switch(numbers: random.Random, mine: int) -> None:
        lab.set_adapter(numbers.choice(COLUMNS))
        numbers.choice([lab.enable_adapters, lab.disable_adapters])()

    def come_and_go(numbers: random.Random, mine: int) -> None:
        name = f"guest{mine}"
        lab.load_adapter(stress.folders["wide"], name, select=numbers.random() < 0.5)
        comparison = lab.compare(PROMPTS[0], [None, name, "pirate"], max_new_tokens=TOKENS)
        stress.check(comparison)
        lab.delete_adapter(name)

    def learn(numbers: random.Random, mine: int) -> None:
        name = f"pupil{mine}"
        run = lab.train(
            name,
            [PROMPTS[1], "An answer."],
            method="lora",
            r=2,
            target_modules=["v_proj"],
            max_steps=1,
            disable_tqdm=True,
        )
        if run.steps != 1 or run.error:
            stress.wrong.append(f"{name} was trained {run}")
        lab.delete_adapter(name)

    def verify(numbers: random.Random, mine: int) -> None:
        comparison = lab.compare(numbers.choice(PROMPTS), some(numbers), max_new_tokens=2)
        frame = lab.verify(comparison)
        if not frame["agrees"].all():
            stress.wrong.append(f"plain PEFT disagrees: {frame.to_dict('records')}")

    def use(numbers: random.Random, mine: int) -> None:
        column = numbers.choice(COLUMNS)
        with lab.using(column) as model:
            before = acting(model)
            model(torch.tensor([[8, 9, 10]]))
            with lab.using(None):
                model(torch.tensor([[8, 9]]))
            if not before == acting(model) == set(Column.of(column).names):
                stress.wrong.append(f"in using({column}) {before}, then {acting(model)} acted")
            if lab.active_adapters != Column.of(column).as_dict():
                stress.wrong.append(f"in using({column}) the lab says {lab.active_adapters}")

    def forget(numbers: random.Random, mine: int) -> None:
        lab.clear_cache()

    def read_texts(numbers: random.Random, mine: int) -> None:
        frame = lab.evaluate(PROMPTS, some(numbers)) if mine % 2 else lab.divergence(PROMPTS[2], ["pirate"])
        assert len(frame)

    def tokens(numbers: random.Random, mine: int) -> None:
        for comparison in lab.history[-2:]:
            assert len(comparison.tokens()) == sum(g.new_tokens for g in comparison.generations)
        del lab.history[:-20]

    return {
        "compare": compare, "generate": generate, "switch": switch, "come and go": come_and_go, "learn": learn,
        "verify": verify, "use": use, "forget": forget, "read texts": read_texts, "tokens": tokens,
    }  # fmt: skip


def acting(model: Any) -> set[str]:
    """Whose layers are in the model now."""
    from adapterlab.equation import Blend

    found: set[str] = set()
    for module in model.modules():
        if isinstance(module, Blend):
            found |= {name for _, name, _ in module.parts}
        elif hasattr(module, "active_adapters") and hasattr(module, "base_layer"):
            found |= set(module.active_adapters)
    return found


def clicks(stress: Stress) -> Iterator[Callable[[], None]]:
    """What a panel does, on its own thread."""
    lab = stress.lab
    state = PanelState()
    worker = Worker(state, lab.track)
    pieces, numbers = pieces_of(stress), random.Random(99)

    def click() -> None:
        name = numbers.choice(["compare", "switch", "verify", "come and go"])

        def job() -> None:
            try:
                pieces[name](numbers, 77)
            except AdapterLabError as error:
                if not is_expected(str(error)):
                    raise

        if worker.start("Working…", job):
            lab.wait(LIMIT)
        if state.notice is not None and state.notice.kind == "error":
            stress.wrong.append(f"a click: {state.notice}")
            stress.over.set()
        stress.done["click"] += 1

    yield click
    worker.close()


def read_all_the_time(stress: Stress) -> None:
    """The reads that wait for nobody. Whatever is at work, they show the lab before or after it."""
    lab = stress.lab
    guests = {name for i in range(100) for name in (f"guest{i}", f"pupil{i}")}
    while not stress.over.is_set():
        try:
            infos = dict(lab.adapters.items())
            assert set(FIXED) <= set(infos) <= {*FIXED, *guests}, list(infos)
            summary = lab.summary()
            assert list(summary["adapter"])[: len(FIXED)] == FIXED
            active = {row["adapter"]: row["multiplier"] for row in summary.to_dict("records") if row["active"]}
            allowed = [Column.of(column).as_dict() for column in COLUMNS]
            assert active in allowed or set(active) <= guests, f"the summary says that {active} acts"
            assert lab.active_adapters in allowed or set(lab.active_adapters) <= guests, lab.active_adapters
            assert set(lab.selection.names) <= {*FIXED, *guests}
            assert lab.trainable is None or lab.trainable in {*FIXED, *guests}, lab.trainable
            assert "tiny" in repr(lab).lower() or repr(lab).startswith("AdapterLab(")
            assert "<table" in lab._repr_html_()
            assert lab.enabled in (True, False)
            assert lab.running in (True, False)
            assert len(lab.capabilities()) >= len(FIXED)
            assert (lab.memory()["bytes"] >= 0).any()
            assert len(lab.parameters())
            assert len(lab.ranks("ada"))
            assert "·" in lab.status()
            assert lab.last is None or lab.last.generations
            lab.is_free()
            stress.done["read"] += 1
        except BaseException as error:
            stress.fail("a reader", error)


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Every thread's stack and the end of the process, if the block hangs."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_together(stress: Stress, jobs: list[Callable[[], None]], seconds: float) -> None:
    threads = [threading.Thread(target=job, name=f"stress {i}", daemon=True) for i, job in enumerate(jobs)]
    with watchdog(seconds + LIMIT):
        for thread in threads:
            thread.start()
        stress.over.wait(seconds)
        stress.over.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def stress(adapter_folders: dict[str, Path], reference: dict[tuple[str, str], Generation]) -> Iterator[Stress]:
    lab = opened(adapter_folders)
    yield Stress(lab, reference, adapter_folders)
    lab.close()


@pytest.mark.filterwarnings("ignore")  # filters are the process's: what one thread sets for a while, another sees
@pytest.mark.usefixtures("_often")
def test_eight_threads_a_panel_and_a_reader(stress: Stress, long: bool, capsys: pytest.CaptureFixture[str]) -> None:
    lab, pieces = stress.lab, pieces_of(stress)
    base = {name: tensor.clone() for name, tensor in lab._adapters.base.items()}
    panel = clicks(stress)
    click = next(panel)

    def clicking() -> None:
        while not stress.over.is_set():
            click()

    def working(number: int) -> Callable[[], None]:
        return lambda: stress.work(number, 1000 + number, pieces)

    seconds = LONG_SECONDS if long else SECONDS
    run_together(stress, [*map(working, range(6)), clicking, lambda: read_all_the_time(stress)], seconds)
    next(panel, None)
    assert not stress.wrong, "\n".join(stress.wrong[:3])
    with capsys.disabled():
        print(f"\n{dict(stress.done)}")
    for name in [name for name in lab.adapters if name not in FIXED]:
        lab.delete_adapter(name)
    assert all(torch.equal(tensor, base[name]) for name, tensor in lab._adapters.base.items())
    last = lab.compare(PROMPTS, COLUMNS, max_new_tokens=TOKENS)
    stress.check(last)
    assert not stress.wrong
    assert lab.verify(last)["agrees"].all()
    assert stress.done["compare"] + stress.done["generate"] > 5
    assert stress.done["read"] > 5


@pytest.fixture
def _often() -> Iterator[None]:
    """Let threads take turns far more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_often")
def test_no_layer_of_an_adapter_runs_for_another_thread(stress: Stress) -> None:
    """A hook on every PEFT layer tells who ran where: in a thread's turn, only the layers of its own column."""
    lab = stress.lab
    asked: dict[int, set[str]] = {}
    ran: Counter[str] = Counter()
    for name, mounted in lab._adapters.mounts.adapters.items():
        for layer in mounted.layers.values():

            def hook(module: Any, inputs: Any, output: Any, name: str = name) -> None:
                ran[name] += 1
                if name not in asked.get(threading.get_ident(), set()):
                    stress.wrong.append(f"{name} ran in a thread that wanted {asked.get(threading.get_ident())}")

            layer.register_forward_hook(hook)

    def working(number: int) -> Callable[[], None]:
        numbers = random.Random(number)

        def job() -> None:
            for _ in range(8):
                name = numbers.choice(FIXED)
                asked[threading.get_ident()] = {name}
                with lab.using(name) as model:
                    model(torch.tensor([[8, 9, 10]]))

        return job

    jobs = [working(number) for number in range(8)]
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    with watchdog(LIMIT):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not stress.wrong
    assert set(ran) == set(FIXED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_often")
def test_a_lab_is_closed_while_others_wait(
    adapter_folders: dict[str, Path], reference: dict[tuple[str, str], Generation], long: bool
) -> None:
    """Those that wait are told; those that look see a lab that is open or closed."""
    for turn in range(30 if long else 3):
        stress = Stress(opened(adapter_folders), reference, adapter_folders)
        close_while_others_wait(stress, turn)
        assert not stress.wrong, "\n".join(stress.wrong[:2])
        assert stress.done["closed for a reader"] == 2


def close_while_others_wait(stress: Stress, turn: int) -> None:
    lab = stress.lab
    kept = lab.compare(PROMPTS[0], max_new_tokens=2)
    pieces = pieces_of(stress)
    for long_one in ("learn", "come and go"):
        del pieces[long_one]

    def reading() -> None:
        for _ in range(10**6):
            assert all([repr(lab), lab._repr_html_(), lab.status()])
            try:
                assert lab.summary() is not None
                assert len(lab.memory())
                assert isinstance(lab.active_adapters, dict)
                assert set(dict(lab.adapters.items())) == set(FIXED)
            except AdapterLabError as error:
                if "is closed" not in str(error):
                    raise
                break
        stress.done["closed for a reader"] += 1

    def guarded(job: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                job()
            except BaseException as error:
                stress.fail("a job", error)

        return run

    def working(number: int) -> Callable[[], None]:
        return lambda: stress.work(number, number + turn, pieces)

    jobs = [guarded(job) for job in (reading, reading, kept.tokens, *map(working, range(3)))]
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    with watchdog(LIMIT):
        for thread in threads:
            thread.start()
        stress.begun.wait()
        stress.closing = True
        lab.close()
        stress.over.set()
        for thread in threads:
            thread.join()


def test_while_one_lab_learns_another_answers_and_does_not_learn(adapter_folders: dict[str, Path]) -> None:
    """Trainer's accelerate has one state for the process: making a second trainer took it from under the first."""
    labs = [opened(adapter_folders) for _ in range(3)]
    settings = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "disable_tqdm": True,
    }
    said: list[str] = []

    def meanwhile() -> None:
        before = labs[1].adapters["pirate"], labs[1].selection
        for refused in (labs[1].train, labs[1].trainer):
            with pytest.raises(
                AdapterLabError, match=r"Another lab of this process is training.* call this again"
            ) as error:
                refused("pirate", PROMPTS, max_steps=1)
            said.append(str(error.value))
        assert (labs[1].adapters["pirate"], labs[1].selection) == before
        assert labs[1].verify(labs[1].compare(PROMPTS[0], max_new_tokens=2))["agrees"].all()
        said.append("answered")

    class Between(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            if not said:
                other = threading.Thread(target=meanwhile, daemon=True)
                other.start()
                other.join()

    with watchdog(LIMIT):
        run = labs[0].train("pirate", PROMPTS, callbacks=[Between()], **settings)
    assert said[-1:] == ["answered"]
    assert run.steps == 3
    for lab in labs[1:]:  # its turn now; and one that never met another
        lab.train("pirate", PROMPTS, **settings)
    states = [lab._adapters.state("pirate")[1] for lab in labs]
    for key, tensor in states[2].items():
        assert torch.equal(states[0][key], tensor)
        assert torch.equal(states[1][key], tensor)
    for lab in labs:
        lab.close()


def test_trainings_in_turn_after_one_that_failed(adapter_folders: dict[str, Path]) -> None:
    """Whoever fails or is cut makes room for the next."""

    class Failing(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    one, other = opened(adapter_folders), opened(adapter_folders)
    with pytest.raises(KeyboardInterrupt):
        one.train("pirate", PROMPTS, max_steps=1, callbacks=[Failing()], disable_tqdm=True)
    runs: list[Any] = []
    thread = threading.Thread(
        target=lambda: runs.append(other.train("pirate", PROMPTS, max_steps=1, disable_tqdm=True)), daemon=True
    )
    with watchdog(LIMIT):
        thread.start()
        thread.join()
    assert runs[0].steps == 1
    for lab in (one, other):
        lab.close()


# ----- what the stress has found, each by itself -----


def test_memory_can_be_looked_at_while_a_trainer_is_made(
    adapter_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimizer was asked for before there was one."""
    import transformers

    lab, seen = opened(adapter_folders), []
    made = transformers.Trainer.__init__

    def looking(self: Any, *arguments: Any, **keywords: Any) -> None:
        seen.append(lab.memory())
        made(self, *arguments, **keywords)

    monkeypatch.setattr(transformers.Trainer, "__init__", looking)
    lab.trainer("pirate", PROMPTS, max_steps=1)
    assert len(seen) == 1
    lab.close()


def test_who_looks_sees_no_change_before_it_is_whole(adapter_folders: dict[str, Path]) -> None:
    """Of an adapter that is being added the name could be seen, and that neither selected nor trainable yet."""
    lab = opened(adapter_folders)
    before, seen = look_at(lab), []
    make, select = lab._adapters._make_trainable, lab._adapters.select

    def elsewhere(step: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*arguments: Any) -> None:
            step(*arguments)
            thread = threading.Thread(target=lambda: seen.append(look_at(lab)))
            thread.start()
            thread.join()

        return stepping

    lab._adapters._make_trainable = elsewhere(make)  # type: ignore[method-assign]
    lab._adapters.select = elsewhere(select)  # type: ignore[method-assign]
    lab.add_adapter("lora", "new", r=2, target_modules=["v_proj"])
    assert seen == [before, before]
    names, selection, active, trainable = look_at(lab)
    assert (names[-1], selection.names, active, trainable) == ("new", ("new",), {"new": 1.0}, "new")
    lab.close()


def look_at(lab: AdapterLab) -> tuple[Any, ...]:
    return list(lab.adapters), lab.selection, lab.active_adapters, lab.trainable


def test_who_looks_sees_the_selection_while_another_thread_uses_a_column(adapter_folders: dict[str, Path]) -> None:
    """What acts on the next forward, for this thread: it would wait for its turn first."""
    lab, seen = opened(adapter_folders), []
    with lab.using("pirate"):
        thread = threading.Thread(target=lambda: seen.append((lab.active_adapters, lab.summary())))
        thread.start()
        thread.join()
        assert lab.active_adapters == {"pirate": 1.0}
    ((active, summary),) = seen
    assert active == {"poet": 1.0}
    assert list(summary.loc[summary["active"], "adapter"]) == ["poet"]
    lab.close()


def test_blends_are_set_in_the_middle_of_a_load_and_leave_it_alone(
    adapter_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They took PEFT's layers that were not whole yet for tampering, and "repaired" the model: adapters were lost."""
    from adapterlab import mounts

    lab, halves, failed = opened(adapter_folders), {"pirate": 0.5, "poet": 0.5}, []
    load_state = mounts.load_state

    def set_blends() -> None:
        try:
            lab.blends = [halves]
        except BaseException as error:
            failed.append(error)

    def loading(*arguments: Any) -> None:
        thread = threading.Thread(target=set_blends)
        thread.start()
        thread.join(LIMIT)
        assert lab.blends == (Column.of(halves),), failed
        load_state(*arguments)

    monkeypatch.setattr(mounts, "load_state", loading)
    lab.load_adapter(adapter_folders["wide"], "wide")
    assert list(lab.adapters) == [*FIXED, "wide"]
    assert not failed
    assert lab.verify(lab.compare(PROMPTS[0], max_new_tokens=2))["agrees"].all()
    lab.close()


def test_scoring_that_waited_for_a_lab_that_was_closed_has_no_scores(adapter_folders: dict[str, Path]) -> None:
    lab, found = opened(adapter_folders), []
    comparison = lab.compare(PROMPTS[0], ["pirate"], max_new_tokens=2)
    come, turn = threading.Event(), lab._turn

    def coming() -> Any:
        if threading.current_thread() is thread:
            come.set()
        return turn()

    lab._turn = coming  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: found.append(comparison.tokens()), daemon=True)
    with lab._lock:
        thread.start()
        assert come.wait(LIMIT)
        lab.close()
    thread.join(LIMIT)
    assert found[0]["base_logprob"].isna().all()


def test_the_size_of_what_is_kept_is_read_at_once() -> None:
    """Between two entries of an `OrderedDict` another thread could have its turn; here, whenever Python code runs."""
    from adapterlab.finished import FinishedColumns

    kept, armed = FinishedColumns(), []

    class Key(str):
        __slots__ = ()

        def __hash__(self) -> int:
            if armed:
                kept.clear()
            return super().__hash__()

    for name in "abc":
        kept._put(Key(name), name, 9_000)
    armed.append(True)
    assert kept.size == 27_000
