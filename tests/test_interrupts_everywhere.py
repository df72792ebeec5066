"""Ctrl-C at any moment of any operation: afterwards the lab is as it was before, or as after the whole operation.

Each operation runs once to count the moments at which it could be cut: every line of the package, and every entry of a
function and return of a C function anywhere (where Python really looks for signals). Then it runs again and again, cut at one
of them each time. Both forms take lines after changes of the state and a sample of the rest, spread evenly; `--long` takes some
seven times as many.
"""

from __future__ import annotations

import dis
import faulthandler
import functools
import hashlib
import itertools
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from standins import tiny_llama, tiny_tokenizer

import adapterlab
from adapterlab import AdapterLab

LIMIT = 1800  # seconds
HOUSE = str(Path(adapterlab.__file__).parent)
NAMES = ("pirate", "poet", "dora")
LETTERS = torch.randint(7, 300, (1, 9), generator=torch.Generator().manual_seed(3))
TEXTS = ["The moon is round.", "One adapter learns."]

pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterlab.AdapterLabWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    # where a generator is being closed Python can't hand an exception on, Ctrl-C's no more than this one
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Cut(BaseException):
    """Stands for Ctrl-C, and can't be mistaken for one that came from elsewhere."""


# ----- where an operation can be cut -----


@functools.cache
def leaving(code: CodeType) -> frozenset[int]:
    """Offsets at which a `with` begins to leave: tracing tells of a line there, but no signal is ever looked for between
    the block's last instruction and the call of a C lock's `__exit__`."""
    starts = [*dis.findlinestarts(code), (1 << 40, 0)]
    entering = {"BEFORE_WITH", "SETUP_WITH", "LOAD_SPECIAL"}
    found, lines = [], set()
    for (offset, line), (end, _) in itertools.pairwise(starts):
        enters = any(i.opname in entering for i in dis.get_instructions(code) if offset <= i.offset < end)
        found.append((offset, line, enters))
        lines |= {line} if enters else set()
    return frozenset(offset for offset, line, enters in found if line in lines and not enters)


class Tracer:
    """Counts the moments of a call, and raises `error` at the one of number `at`, once."""

    def __init__(self, at: int = 0, error: type[BaseException] = Cut) -> None:
        self.at, self.error = at, error
        self.seen = 0
        self.where = ""

    def moment(self, frame: FrameType, what: str) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name} ({what})"
            raise self.error

    def __enter__(self) -> Tracer:
        self._set(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        self._set(None)

    _set: Callable[[Any], None]

    def _event(self, frame: FrameType, event: str, argument: Any) -> Any:
        raise NotImplementedError


class Lines(Tracer):
    """Every line of the package. `changes`: numbers of those before which something of the lab's state changed."""

    def __init__(self, at: int = 0, error: type[BaseException] = Cut, look: Callable[[], object] | None = None) -> None:
        super().__init__(at, error)
        self._look, self._last = look, None if look is None else look()
        self.changes: dict[tuple[str, int], int] = {}
        self.firsts: dict[tuple[str, int], int] = {}

    _set = staticmethod(sys.settrace)

    def _event(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(HOUSE):
            return None
        if event == "line" and frame.f_lasti not in leaving(code):
            if self._look is not None:
                place = (code.co_filename, frame.f_lineno)
                self.firsts.setdefault(place, self.seen + 1)
                now = self._look()
                if now != self._last:
                    self._last = now
                    self.changes.setdefault(place, self.seen + 1)
            self.moment(frame, "line")
        return self._event


class Checks(Tracer):
    """Where Python looks for signals: when a function begins, and when a C function has returned."""

    _set = staticmethod(sys.setprofile)

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code is Tracer.__exit__.__code__ or argument is sys.setprofile:
            return
        # Not within logging: its lock would stay taken, and every thread of the tests to come would wait for it.
        if event in ("call", "c_return") and frame.f_code.co_filename != logging.__file__:
            self.moment(frame, event)


@pytest.fixture(autouse=True)
def _loggings_lock_is_free() -> Iterator[None]:
    """A real Ctrl-C can come within Python's own logging and leave its lock taken; the tests to come need it."""
    yield
    lock: Any = logging._lock  # type: ignore[attr-defined]
    while lock._is_owned():
        lock.release()


# ----- what a lab is -----


def digest(tensors: list[torch.Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(repr((tensor.shape, tensor.dtype)).encode() + tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def base_tensors(lab: AdapterLab) -> list[torch.Tensor]:
    return [tensor for _, tensor in sorted(lab._adapters.base.items())]


def weights(lab: AdapterLab, name: str) -> str:
    """All tensors that PEFT's layers hold of an adapter, by plain attributes."""
    layers = lab._adapters.mounts.adapters[name].layers
    bare = {id(tensor) for tensor in base_tensors(lab)}
    own = [
        tensor
        for _, layer in sorted(layers.items())
        for key, tensor in layer.named_parameters()
        if id(tensor) not in bare and ("." + name in key)
    ]
    assert own
    return digest(own)


def hooks(model: Any) -> list[tuple[str, str, int]]:
    return [
        (path, key, len(value))
        for path, module in model.named_modules()
        for key, value in module.__dict__.items()
        if key.endswith("hooks") and value
    ] + [(path, "forward", 1) for path, module in model.named_modules() if "forward" in module.__dict__]


def claims(lab: AdapterLab) -> dict[str, Any]:
    return {
        "active": lab.active_adapters,
        "selection": lab.selection,
        "enabled": lab.enabled,
        "trainable": lab.trainable,
        "badges": [(name, info.status, len(info.runs), info.method) for name, info in lab.adapters.items()],
        "blends": lab.blends,
        "running": lab.running,
    }


def picture(lab: AdapterLab, *, without: str = "") -> dict[str, Any]:
    """Everything that an operation must leave alone, or change as a whole. without: an adapter that learns."""
    seen = claims(lab)
    model = lab.model
    mounts = lab._adapters.mounts
    with torch.no_grad():
        logits = model(LETTERS).logits
    acts = without not in lab.active_adapters
    return {
        **seen,
        "flags": [p.requires_grad for p in base_tensors(lab)],
        "adapters' flags": {n: {p.requires_grad for p in m.trainable} for n, m in mounts.adapters.items()},
        "modes": [(path, module.training) for path, module in model.named_modules()],
        "generation_config": (id(model.generation_config), repr(model.generation_config.to_dict())),
        "config": repr(model.config.to_dict()),
        "hooks": hooks(model),
        "peft_config": [(n, id(c)) for n, c in getattr(model, "peft_config", {}).items() if n in lab.adapters],
        "natively": (model._hf_peft_config_loaded, len(getattr(model, "peft_config", {}))),
        "base": digest(base_tensors(lab)),
        "weights": {name: weights(lab, name) for name in lab.adapters if name != without},
        "logits": logits.numpy().tobytes() if acts else b"",
        "gradients on": torch.is_grad_enabled(),
        "inside": (lab._adapters._depth, lab._adapters._changing, len(lab._works)),
        "ctrl-c": signal.getsignal(signal.SIGINT),
    }


def looker(lab: AdapterLab) -> Callable[[], object]:
    """What tells quickly of what changes in the course of an operation."""
    adapters = lab._adapters
    model, mounts = adapters.model, adapters.mounts
    layer, head = model.model.layers[0], model.lm_head

    def look() -> object:
        sites = [id(site.parent._modules.get(site.child)) for site in [*mounts.sites.values()]]
        return (
            lab._closed, lab._running, lab._training, len(lab._works), len(lab.history), lab._blends, sites,
            adapters.selection, adapters.enabled, adapters.trainable, list(adapters.records), id(adapters._shown),
            list(mounts.adapters), mounts.column, adapters._depth, adapters._changing, "_adapters" in lab.__dict__,
            id(model.generation_config), model.training, layer.training, model.config.use_cache, len(model._modules),
            "forward" in head.__dict__, signal.getsignal(signal.SIGINT), id(model.__dict__.get("peft_config")),
        )  # fmt: skip

    return look


# ----- the operations -----


@dataclass
class Bench:
    """A lab on the bench, and where things lie."""

    folders: dict[str, Path]
    scratch: Path
    labs: list[AdapterLab] = field(default_factory=list)

    def lab(self) -> AdapterLab:
        for old in self.labs:
            old.close()
        model = tiny_llama()
        model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
        lab = AdapterLab(model, tokenizer=tiny_tokenizer(chat=True))
        for name in NAMES:
            lab.load_adapter(self.folders[name], name)
        lab.set_adapter("poet")
        lab.set_trainable("pirate")
        lab.blends = [{"pirate": 0.5, "poet": 0.5}]
        model.train()
        model.model.layers[1].eval()
        self.labs = [lab]
        return lab


STEPS = 3
Operation = Callable[[AdapterLab, Bench], object]
COUNT = itertools.count()


def a_body(lab: AdapterLab, bench: Bench) -> None:
    with lab.using({"pirate": 0.5}) as model, lab.using("dora"):
        model(LETTERS)


def train(name: str, **more: Any) -> Operation:
    def run(lab: AdapterLab, bench: Bench) -> None:
        lab.train(name, TEXTS, max_steps=STEPS, disable_tqdm=True, per_device_train_batch_size=1, seed=5, **more)

    return run


OPERATIONS: dict[str, Operation] = {
    "load": lambda lab, bench: lab.load_adapter(bench.folders["wide"], "new"),
    "load beside": lambda lab, bench: lab.load_adapter(bench.folders["wide"], "new", select=False),
    "add": lambda lab, bench: lab.add_adapter("ia3", "new", target_modules=["v_proj"], feedforward_modules=[]),
    "set": lambda lab, bench: lab.set_adapter("pirate"),
    "set a blend": lambda lab, bench: lab.set_adapter({"pirate": 0.5, "poet": 2.0}),
    "set base": lambda lab, bench: lab.set_adapter(None),
    "disable": lambda lab, bench: lab.disable_adapters(),
    "set trainable": lambda lab, bench: lab.set_trainable("poet"),
    "delete": lambda lab, bench: lab.delete_adapter("dora"),
    "delete the selected": lambda lab, bench: lab.delete_adapter("poet"),
    "delete the trainable": lambda lab, bench: lab.delete_adapter("pirate"),
    "concatenate": lambda lab, bench: lab.add_weighted_adapter(["pirate"], [0.5], "new"),
    "approximate": lambda lab, bench: lab.add_weighted_adapter(["pirate"], [0.5], "new", "linear"),
    "save an adapter": lambda lab, bench: lab.save_adapter("dora", bench.scratch / "dora"),
    "merge": lambda lab, bench: lab.merge_and_unload({"pirate": 0.5}),
    "merge through PEFT": lambda lab, bench: lab.merge_and_unload("dora", bench.scratch / "merged" / str(next(COUNT))),
    "check": lambda lab, bench: lab.check_adapter(bench.folders["wide"]),
    "generate": lambda lab, bench: (lab.clear_cache(), lab.generate("The sea", max_new_tokens=2)),
    "compare": lambda lab, bench: (lab.clear_cache(), lab.compare("The sea", max_new_tokens=2, temperature=1.0)),
    "compare in turn": lambda lab, bench: lab.compare("Hi", ["dora"], max_new_tokens=1, repetition_penalty=1.2),
    "compare again": lambda lab, bench: lab.compare("Hello", max_new_tokens=2, on_token=lambda event: None),
    "verify": lambda lab, bench: lab.verify(lab.history[0]),
    "divergence": lambda lab, bench: lab.divergence("The tides follow it."),
    "evaluate": lambda lab, bench: lab.evaluate(TEXTS),
    "norms": lambda lab, bench: lab.delta_norms("pirate"),
    "use": a_body,
    "save the lab": lambda lab, bench: lab.save(bench.scratch / "lab"),
    "close": lambda lab, bench: lab.close(),
}
TRAININGS = {
    "train": train("dora"),
    "train a new one": train("new", method="lora", r=2, target_modules=["v_proj"]),
    "train AdaLoRA": train("new", method="adalora", init_r=3, target_r=1, target_modules=["v_proj"]),
}
# moments of each operation; of the lines, half are those after a change
SHORT = {"lines": 6, "checks": 2}
LONG = {"lines": 160, "checks": 48}  # a quarter of an hour in all, on a core of its own


@pytest.fixture(scope="module")
def free_of() -> Iterator[Callable[[AdapterLab], bool]]:
    """Whether another thread could begin at once."""
    with ThreadPoolExecutor(1) as other:
        yield lambda lab: other.submit(lab.is_free).result(timeout=30)


@pytest.fixture
def bench(adapter_folders: dict[str, Path], tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(adapter_folders, tmp_path)
    yield bench
    for lab in bench.labs:
        lab.close()


def spread(numbers: list[int], count: int, shift: int) -> list[int]:
    """So many of them, spread evenly; which ones depends on `shift`."""
    if len(numbers) <= count:
        return numbers
    step = len(numbers) / count
    return sorted({numbers[int((i * step + shift * 7.3) % len(numbers))] for i in range(count)})


def line_moments(run: Operation, lab: AdapterLab, bench: Bench, shift: int, long: bool) -> list[int]:
    with Lines(look=looker(lab)) as counted:
        run(lab, bench)
    count = (LONG if long else SHORT)["lines"] // 2
    changes, firsts = sorted(counted.changes.values()), sorted(counted.firsts.values())
    return sorted({*spread(changes, count, shift), *spread(firsts, count, shift)})


def check_moments(run: Operation, lab: AdapterLab, bench: Bench, shift: int, long: bool) -> list[int]:
    with Checks() as counted:
        run(lab, bench)
    return spread(list(range(1, counted.seen + 1)), (LONG if long else SHORT)["checks"], shift)


def cut(tracer: Tracer, run: Operation, lab: AdapterLab, bench: Bench) -> bool:
    """Whether the operation came to the moment at which it was to be cut."""
    try:
        with warnings.catch_warnings(), tracer:
            warnings.simplefilter("ignore")
            run(lab, bench)
    except tracer.error:
        pass
    return bool(tracer.where)


def goes_on(lab: AdapterLab) -> None:
    """The lab works: every column speaks, and plain PEFT agrees."""
    lab.clear_cache()
    comparison = lab.compare("And then", max_new_tokens=3)
    assert {g.finish_reason for g in comparison.generations} <= {"length", "eos"}, "an old Stop has cut it"
    assert lab.verify(comparison)["agrees"].all()
    lab.history.pop()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_cut_short_is_not_done_or_done(
    name: str, bench: Bench, free_of: Callable[[AdapterLab], bool], long: bool
) -> None:
    run, shift = OPERATIONS[name], list(OPERATIONS).index(name)

    def made() -> tuple[AdapterLab, dict[str, Any], list[Any]]:
        lab = bench.lab()
        lab.compare("Hello", ["poet"], max_new_tokens=1)
        return lab, picture(lab), list(lab.history)

    lab, before, history = made()
    goes_on(lab)  # so that everything is imported
    moments: list[tuple[type[Tracer], int]] = [(Lines, at) for at in line_moments(run, lab, bench, shift, long)]
    after = None if lab._closed else picture(lab)
    if not is_again(lab, before):
        lab, before, history = made()
    moments += [(Checks, at) for at in check_moments(run, lab, bench, shift, long)]
    came = 0
    for kind, moment in moments:
        if not is_again(lab, before):
            lab, before, history = made()
        del lab.history[len(history) :]
        tracer = kind(moment)
        came += cut(tracer, run, lab, bench)
        where = f"{name}, cut at moment {moment}: {tracer.where}"
        assert free_of(lab), where
        if lab._closed:
            assert after is None, where
            with pytest.raises(adapterlab.AdapterLabError, match="closed"):
                lab.set_adapter(None)
            lab.close()
            assert "_adapters" not in lab.__dict__, where
            continue
        now = picture(lab)
        wanted = before if same(now, before) else after
        assert wanted is not None, where
        assert same(now, wanted), f"{where}: {differences(now, before)}, {differences(now, wanted)}"
        assert lab.history[: len(history)] == history, where
        assert free_of(lab), where
        if (kind, moment) in moments[-1::-25]:
            goes_on(lab)
            assert same(picture(lab), wanted), where
    assert came > len(moments) / 2
    if long:
        print(f"{name}: cut at {came} moments")


def is_again(lab: AdapterLab, before: dict[str, Any]) -> bool:
    """Whether the lab is as it was at first, made so where that is easy."""
    if lab._closed or not set(NAMES) <= set(lab.adapters):
        return False
    if "new" in lab.adapters:
        lab.delete_adapter("new")
    lab.set_adapter("poet")
    lab.set_trainable("pirate")
    return not differences(picture(lab), before)


LOOSE = ("generation_config", "peft_config", "ctrl-c")  # of another lab: identities


def same(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return not differences(now, then)


def differences(now: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """What is otherwise; of things that are new in every lab, that they are the lab's own is checked elsewhere."""
    return {
        key: (then[key] if key != "logits" else "…", now[key] if key != "logits" else "…")
        for key in then
        if now[key] != then[key] and not (key in LOOSE and loosely(now[key]) == loosely(then[key]))
    }


def loosely(value: Any) -> Any:
    return [part for part in value if not isinstance(part, int)] if isinstance(value, tuple) else len(str(value)) > 2


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_cut_short_keeps_whole_steps(
    name: str, bench: Bench, free_of: Callable[[AdapterLab], bool], long: bool
) -> None:
    """The weights are those after so many steps as the lab's run tells of, and all else is as before."""
    run, learner = TRAININGS[name], "dora" if name == "train" else "new"
    lab = bench.lab()
    before = picture(lab, without=learner)
    known = after_each_step(lab, run, bench, learner)
    assert len(set(known)) == 1 + STEPS
    lab = bench.lab()
    for kind, found in ((Lines, line_moments), (Checks, check_moments)):
        moments = found(run, lab, bench, 0, long)
        for moment in moments if long else moments[1::2]:
            if learner not in lab.adapters or weights(lab, learner) != known[0]:
                lab = bench.lab()
            tracer = kind(moment)
            cut(tracer, run, lab, bench)
            where = f"{name}, cut at moment {moment}: {tracer.where}"
            runs = lab.adapters[learner].runs if learner in lab.adapters else ()
            steps = runs[-1].steps if runs else 0
            assert free_of(lab), where
            have = weights(lab, learner) if learner in lab.adapters else ""
            assert have == known[steps], f"{where}: not those after {steps} steps"
            now = picture(lab, without=learner)
            now["badges"] = [badge for badge in now["badges"] if badge[0] != learner]
            wanted = {**before, "badges": [badge for badge in before["badges"] if badge[0] != learner]}
            for each in (now, wanted):
                each["adapters' flags"].pop(learner, None)
            assert same(now, wanted), f"{where}: {differences(now, wanted)}"
        goes_on(lab)


def after_each_step(lab: AdapterLab, run: Operation, bench: Bench, learner: str) -> list[str]:
    """The learner's weights before the first step ("" for a new one) and after each."""
    from transformers import TrainerCallback

    found = [weights(lab, learner) if learner in lab.adapters else ""]

    class Recorder(TrainerCallback):
        def on_step_end(self, *given: Any, **kwargs: Any) -> None:
            found.append(weights(lab, learner))

    train = lab.train

    def training(*arguments: Any, **keywords: Any) -> Any:
        return train(*arguments, **keywords, callbacks=[Recorder()])

    lab.train = training  # type: ignore[method-assign]
    try:
        run(lab, bench)
    finally:
        del lab.train
    assert lab.adapters[learner].runs[-1].steps == STEPS
    return found


def test_opening_cut_short_gives_the_model_back(bench: Bench, long: bool) -> None:
    """A model in hand, with an adapter of its own: as it came, and it can be opened again."""
    from peft import LoraConfig

    def made() -> Any:
        model = tiny_llama()
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "own")
        return model.train()

    def told(model: Any) -> Any:
        with torch.no_grad():
            logits = model(LETTERS).logits
        flags = [(key, p.requires_grad) for key, p in model.named_parameters()]
        kinds = [(key, type(module).__name__) for key, module in model.named_modules()]
        return logits.numpy().tobytes(), flags, kinds, list(model.peft_config), "_adapterlab" in model.__dict__

    tokenizer = tiny_tokenizer()

    def run(model: Any, _: Any) -> None:
        AdapterLab(model, tokenizer=tokenizer).close()

    model = made()
    before = told(model)
    for kind in (Lines, Checks):
        with kind() as counted:
            run(model, None)
        assert told(model) == before
        for moment in spread(list(range(1, counted.seen + 1)), 50 if long else 8, 3):
            tracer = kind(moment)
            assert cut(tracer, run, model, bench)
            assert told(model) == before, f"cut at {tracer.where}"
    with AdapterLab(model, tokenizer=tokenizer).using("own") as again:
        assert again is model


def test_opening_a_saved_lab_cut_short_gives_the_model_back(bench: Bench, long: bool) -> None:
    folder = bench.lab().save(bench.scratch / "lab")
    model = tiny_llama()
    flags = [p.requires_grad for p in model.parameters()]
    tokenizer = tiny_tokenizer(chat=True)

    def run(model: Any, _: Any) -> None:
        AdapterLab(folder, base_model=model, tokenizer=tokenizer).close()

    with Lines() as counted:
        run(model, None)
    for moment in spread(list(range(1, counted.seen + 1)), 40 if long else 6, 5):
        tracer = Lines(moment)
        assert cut(tracer, run, model, bench)
        assert [p.requires_grad for p in model.parameters()] == flags, tracer.where
        assert hooks(model) == [], tracer.where
        assert "_adapterlab" not in model.__dict__, tracer.where
    lab = AdapterLab(folder, base_model=model, tokenizer=tokenizer)
    assert list(lab.adapters) == list(NAMES)
    lab.close()


def test_real_signals_at_random_times(bench: Bench, long: bool) -> None:
    """In a process of its own: a signal can hit locks of Python's own libraries, and then others here would wait for ever."""
    child = os.fork()
    if not child:
        try:
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            with ThreadPoolExecutor(1) as other:
                free_of = lambda lab: other.submit(lab.is_free).result(timeout=30)  # noqa: E731
                strike_at_random(bench, free_of, 200 if long else 25)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def strike_at_random(bench: Bench, free_of: Callable[[AdapterLab], bool], turns: int) -> None:
    """The clock sends the signal, so it comes wherever Python happens to be, in torch and transformers too."""
    import random

    def strike(number: int, frame: Any) -> None:
        if frame is not None and frame.f_code.co_filename == logging.__file__:  # as in `Checks`: a moment later
            signal.setitimer(signal.ITIMER_REAL, 0.001)
            return
        raise Cut

    numbers = random.Random(7)
    lab = bench.lab()
    before = picture(lab)
    said = lab.compare("Hi", max_new_tokens=2)
    operations: list[Operation] = [
        *(OPERATIONS[name] for name in ("compare", "use", "evaluate", "merge")),
        lambda lab, bench: lab.verify(said),
    ]
    for run in operations:  # what they import is whole before the first signal
        run(lab, bench)
    old, struck = signal.signal(signal.SIGALRM, strike), 0
    try:
        for turn in range(turns):
            run = operations[turn % len(operations)]
            try:
                signal.setitimer(signal.ITIMER_REAL, numbers.uniform(0.0005, 0.05))
                run(lab, bench)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Cut:
                struck += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert free_of(lab)
            assert same(picture(lab), before), differences(picture(lab), before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert struck > 5
    goes_on(lab)
