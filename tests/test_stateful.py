"""Any calls in any order: after each of them the lab's claims and its logits are those of a model that the test keeps.

Hypothesis draws the calls. stateful_book.py says what must be true; weights, logits and answers come from plain PEFT on
fresh models (oracle.py). `pytest tests/test_stateful.py --long` draws anew, over 10,000 steps, and prints how often each
rule ran.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from oracle import Kind, Oracle, Parts, copied, forward, own_tensors
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stateful_book import (
    COUNTS,
    NAMES,
    NEAR,
    Book,
    columns,
    everything,
    free,
    has_adapters,
    has_room,
    kinds,
    ours,
    parts_of,
    some_kinds,
    step,
    wrong_columns,
)
from test_rows_architectures import pytestmark as pytestmark  # plain PEFT's remarks, with the reasons
from transformers import TrainerCallback

from adapterlab import AdapterLab, AdapterLabError, AdapterLabWarning

PROMPTS = ["Hi", "What is the moon made of?", "Tell me"]
TEXTS = ["Arr, the captain says that the wind is fair.", "The moon is a celestial body."]
ENDS = (2, *range(11, 320, 12))  # so many that answers end at different lengths


class Mine(Exception):
    """Raised by a user's callback or hook."""


# ----- the rules -----


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "warm": {"temperature": 0.8, "seed": 3},
    "hot": {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
}


def sampling(how: str, length: int) -> dict[str, Any]:
    """Settings of a comparison, with so many ends that answers have different lengths."""
    return {"max_new_tokens": length, "eos_token_id": list(ENDS), **HOW[how]}


class Failing(TrainerCallback):
    """A user's callback that fails at the beginning, or after the first step; or that asks for a stop there."""

    def __init__(self, machine: Any, how: str) -> None:
        self.machine, self.how = machine, how

    def on_train_begin(self, *args: Any, **keywords: Any) -> None:
        if self.how == "begin":
            raise Mine("at the beginning")

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if self.how == "step":
            raise Mine("after a step")
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "stop":
            self.machine.lab.stop()


class Calls(Book):
    """What people do with a lab, in any order."""

    @initialize(brought=st.booleans(), loaded=st.runner().flatmap(lambda machine: some_kinds(machine.world)))
    def open(self, brought: bool, loaded: list[str]) -> None:
        if brought:
            kind = self.world.kinds[self.world.native]
            given = PeftModel.from_pretrained(self.model, self.oracle.folders[self.world.native], adapter_name="own")
            self.brought = {"own": self.oracle.held(given, kind, "own")}
            self.brought["own"].loaded = self.brought["own"].key
        self.given = self.snapshot_of(self.model, dict(self.model.named_modules()))
        self.enter(loaded)

    @staticmethod
    def snapshot_of(like: Any, modules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool], Any]:
        """How a model is to be given back: its modules, and as in `like` what requires gradients and its own adapters."""
        flags = {key: parameter.requires_grad for key, parameter in like.named_parameters()}
        return modules, flags, getattr(like, "peft_config", None)

    def enter(self, loaded: list[str]) -> None:
        self.empty()
        self.lab = AdapterLab(self.model, tokenizer=self.world.tokenizer)
        self.runs.update(dict.fromkeys(self.held, 0))
        for kind, name in zip(loaded, NAMES):
            self.bring(self.oracle.folders[kind], self.world.kinds[kind], name, select=True)

    # -- coming and going

    @step(has_room, kind=kinds(), name=free(), select=st.booleans())
    def load(self, kind: str, name: str, select: bool) -> None:
        self.bring(self.oracle.folders[kind], self.world.kinds[kind], name, select)

    @step(lambda self: has_room(self) and self.saved, which=st.integers(0, 20), name=free(), select=st.booleans())
    def load_what_was_saved(self, which: int, name: str, select: bool) -> None:
        folder, kind = self.saved[which % len(self.saved)]
        self.bring(folder, kind, name, select)

    def bring(self, folder: Path, kind: Kind, name: str, select: bool) -> None:
        before = self.selection, self.enabled
        assert self.call(lambda: self.lab.load_adapter(folder, name, select=select)) == name
        self.came(name, self.oracle.load(folder, kind))
        if not select:
            self.selection, self.enabled = before

    @step(has_room, kind=kinds())
    def load_without_a_name(self, kind: str) -> None:
        name = kind
        while name in self.held:
            number = int(name.rpartition("-")[2]) + 1 if name != kind else 2
            name = f"{kind}-{number}"
        assert self.call(lambda: self.lab.load_adapter(self.oracle.folders[kind])) == name
        self.came(name, self.oracle.load(self.oracle.folders[kind], self.world.kinds[kind]))

    @step(has_room, kind=kinds(), name=free(), drawn=st.booleans())
    def add(self, kind: str, name: str, drawn: bool) -> None:
        config = self.fresh_config(kind, drawn)
        before = copy.deepcopy(config.__dict__)
        self.call(lambda: self.lab.add_adapter(config, name))
        assert config.__dict__ == before
        self.make_trainable(None)
        held = self.read(name, self.world.kinds[kind])
        held.initial, held.inert = held.key, not drawn
        held.seen()
        self.came(name, held)
        self.trainable = name
        if not drawn:
            self.acts(self.oracle.plain(held), (), "a fresh adapter changes nothing")

    def fresh_config(self, kind: str, drawn: bool) -> Any:
        config = copy.deepcopy(self.world.kinds[kind].config)
        for field in ("init_lora_weights", "init_ia3_weights", "init_weights"):
            if drawn and hasattr(config, field):
                setattr(config, field, False)
        return config

    @step(has_adapters, name=ours())
    def delete(self, name: str) -> None:
        expected = sum(tensor.nbytes for tensor in self.held[name].tensors.values())
        assert self.call(lambda: self.lab.delete_adapter(name)) == expected
        self.forget(name)

    @step(
        lambda self: has_room(self) and any(held.kind.sums for held in self.held.values()),
        weights=st.runner().flatmap(
            lambda m: st.dictionaries(
                st.sampled_from([n for n, held in m.held.items() if held.kind.sums]),
                st.sampled_from([1.0, 0.5, -2.0]),
                min_size=1,
                max_size=3,
            )
        ),
        name=free(),
    )
    def add_weighted(self, weights: dict[str, float], name: str) -> None:
        self.call(lambda: self.lab.add_weighted_adapter(list(weights), list(weights.values()), name))
        made = self.read(name, Kind(None))
        self.came(name, made)
        self.close_to(self.oracle.logits(((name, 1.0),), self.held, self.ids), parts_of(weights), "cat", 1e-3)

    # -- what is refused, and changes nothing

    @step(what=st.sampled_from(["column", "file", "name", "nobody", "sum", "place"]), number=st.integers(0, 59))
    def be_refused(self, what: str, number: int) -> None:
        name = list(self.held)[number % len(self.held)] if self.held else "nobody"
        getattr(self, f"refuse_{what}")(name, number)

    def refuse_column(self, name: str, number: int) -> None:
        lab, wrong = self.lab, wrong_columns(self.held)
        column = wrong[number % len(wrong)]
        for work in (
            lambda: lab.set_adapter(column),
            lambda: lab.compare("Hi", [column], max_new_tokens=1),
            lambda: lab.generate("Hi", column, max_new_tokens=1),
            lambda: lab.merge_and_unload(column),
            lambda: self.look_through(column),
            lambda: setattr(lab, "blends", [column]),
        ):
            self.refused(work)

    def refuse_file(self, name: str, number: int) -> None:
        folder = sorted(self.broken.values())[number % len(self.broken)]
        self.refused(lambda: self.lab.load_adapter(folder, "bad"))
        if folder.exists():
            assert not self.call(lambda: self.lab.check_adapter(folder), imposes=False).ok

    def refuse_name(self, name: str, number: int) -> None:
        """One that is taken or will not do, and configs that will not."""
        folder, lab = self.oracle.folders["lora"], self.lab
        for bad in (*self.held, "a.b", "base", "weight", "lora_x", "", "q w"):
            self.refused(lambda bad=bad: lab.load_adapter(folder, bad))
            self.refused(lambda bad=bad: lab.add_adapter("ia3", bad))
        self.refused(lambda: lab.add_adapter("lora", "fine", target_modules=["nowhere"]))
        self.refused(lambda: lab.add_adapter("lora", "fine", bias="all"))

    def refuse_nobody(self, name: str, number: int) -> None:
        lab, folder = self.lab, self.folder()
        for nobody in ("nobody", "base"):
            for work in (lab.delete_adapter, lab.set_trainable, lambda n: lab.save_adapter(n, folder), lab.model_card):
                self.refused(lambda work=work, nobody=nobody: work(nobody))
            self.refused(lambda nobody=nobody: lab.train(nobody, TEXTS, max_steps=1))
        assert not folder.exists()

    def refuse_sum(self, name: str, number: int) -> None:
        lab = self.lab
        self.refused(lambda: lab.add_weighted_adapter([name], [1.0, 2.0], "fine"))
        self.refused(lambda: lab.add_weighted_adapter([name], [0.0], "fine"))
        self.refused(lambda: lab.add_weighted_adapter([name], [1.0], name))
        if name in self.held and not self.held[name].kind.sums:
            self.refused(lambda: lab.add_weighted_adapter([name], [1.0], "fine"))

    def refuse_place(self, name: str, number: int) -> None:
        file, other = self.folder(), self.folder()
        file.write_text("mine")
        other.mkdir()
        (other / "mine.txt").write_text("mine")
        for place in (file, other, file / "below"):
            self.refused(lambda place=place: self.lab.save_adapter(name, place))
            self.refused(lambda place=place: self.lab.merge_and_unload(None, place))
            self.refused(lambda place=place: self.lab.save(place))
        assert [path.name for path in other.iterdir()] == ["mine.txt"]
        assert file.read_text() == "mine"

    # -- the state

    @step(column=columns())
    def set_adapter(self, column: Any) -> None:
        self.set_adapter_now(column)

    def set_adapter_now(self, column: Any) -> None:
        self.call(lambda: self.lab.set_adapter(column))
        self.selection = parts_of(column)
        self.enabled = self.enabled or bool(self.selection)

    @step(on=st.booleans())
    def enable_or_disable(self, on: bool) -> None:
        self.call(self.lab.enable_adapters if on else self.lab.disable_adapters)
        self.enabled = on

    @step(name=st.runner().flatmap(lambda machine: st.sampled_from([None, *machine.held, *machine.held])))
    def set_trainable(self, name: str | None) -> None:
        self.call(lambda: self.lab.set_trainable(name))
        self.make_trainable(name)

    @step(
        path=st.runner().flatmap(lambda m: st.sampled_from(["", "", "", *(p for p in m.modules if p)])),
        on=st.booleans(),
    )
    def change_mode(self, path: str, on: bool) -> None:
        """`lab.model.train()`, or of a part of it."""
        self.modules[path].train(on)
        if not path:
            self.lab.model.train(on)
        inside = f"{path}." if path else ""
        self.modes.update({p: on for p in self.modules if p == path or p.startswith(inside)})

    @step(
        wanted=st.tuples(columns(), columns()),
        deep=st.booleans(),
        ending=st.sampled_from(["", "", "error", "interrupt"]),
        inside=st.sampled_from(["look", "generate", "compare", "refused", "save"]),
    )
    def using(self, wanted: tuple[Any, Any], deep: bool, ending: str, inside: str) -> None:
        error = {"error": Mine, "interrupt": KeyboardInterrupt}.get(ending)
        outer, inner = map(parts_of, wanted)
        self.call(lambda: self.look_through(wanted[0]))  # which says what was done behind the lab's back

        def work() -> None:
            with self.lab.using(wanted[0]) as model:
                self.acts(model, outer, "using")
                if deep:
                    with contextlib.suppress(Mine), self.lab.using(wanted[1]) as again:
                        assert again is model
                        self.acts(model, inner, "using in using")
                        self.do_inside(inside, inner)
                        raise Mine
                else:
                    self.do_inside(inside, outer)
                assert self.lab.active_adapters == dict(outer)
                self.acts(model, outer, "after using in using")
                if error is not None:
                    raise error

        if error is None:
            self.call(work)
        else:
            with pytest.raises(error):
                self.call(work)

    def look_through(self, column: Any) -> None:
        with self.lab.using(column) as model:
            forward(model, self.ids)

    def do_inside(self, what: str, parts: Parts) -> None:
        """Inside `using`: what acts is its column, one may look, and the state can't change."""
        assert self.lab.active_adapters == dict(parts)
        assert self.lab.selection.parts == self.selection
        if what == "generate":
            generation = self.lab.generate("Hi", **sampling("greedy", 2))
            assert generation.asked == parts
            self.look_at(dict(parts))
            self._hold(generation, self.prompt(), sampling("greedy", 2), hooked=False)
        elif what == "compare":
            self.compare_now(["Hi"], [None], sampling("greedy", 2))
        elif what == "save" and self.held:
            self.save_now(next(iter(self.held)), self.folder())
        elif what == "refused":
            lab = self.lab
            for work in (
                lambda: lab.set_adapter(None),
                lambda: lab.set_trainable(None),
                lambda: lab.load_adapter(self.oracle.folders["lora"], "late"),
                lambda: lab.add_adapter("lora", "late"),
                lab.close,
            ):
                with pytest.raises(AdapterLabError):
                    work()

    # -- learning

    @step(has_adapters, name=ours(), how=st.sampled_from(["", "", "", "begin", "step", "interrupt", "stop", "hook"]))
    def train(self, name: str, how: str) -> None:
        steps = self.held[name].kind.steps
        keywords = {"max_steps": steps + 1 if how in ("step", "interrupt", "stop") else steps}
        before = self.trainable
        with self.hooked(0) if how == "hook" else contextlib.nullcontext():
            run = self.train_now(name, how, keywords)
        self.make_trainable(name)
        self.learned(name, changed=how not in ("begin", "hook"))
        self.make_trainable(before)
        if how in ("interrupt", "stop"):
            assert run.stopped_early

    def train_now(self, name: str, how: str, keywords: dict[str, Any]) -> Any:
        keywords = {"learning_rate": 0.05, "per_device_train_batch_size": 1, "disable_tqdm": True, **keywords}
        data = [("What is it?", text) for text in TEXTS] if self.world.seq2seq else TEXTS
        work = functools.partial(self.lab.train, name, data, callbacks=[Failing(self, how)], **keywords)
        if how in ("begin", "step", "hook"):
            with pytest.raises((Mine, AdapterLabError)) as failed:
                self.call(work)
            assert isinstance(failed.value, Mine) or isinstance(failed.value.__cause__, Mine), failed.value
            return None
        run = self.call(work)
        assert run.steps == (1 if how else keywords["max_steps"])
        return run

    def learned(self, name: str, *, changed: bool) -> None:
        """Take over what one adapter learned: that all others are as they were, `weights` will look."""
        held, before = self.held[name], self.held[name].key
        held.take(self.own(name))
        assert (held.key != before) is changed, "it learned nothing" if changed else "it learned"
        assert all(bool(tensor.isfinite().all()) for tensor in held.tensors.values())
        self.runs[name] += changed

    @step(has_room, name=free(), kind=kinds(), how=st.sampled_from(["", "", "begin", "hook"]))
    def train_a_new_one(self, name: str, kind: str, how: str) -> None:
        before = self.selection, self.enabled, self.trainable
        steps, method = self.world.kinds[kind].steps, self.fresh_config(kind, False)
        with self.hooked(0) if how == "hook" else contextlib.nullcontext():
            self.train_now(name, how, {"max_steps": steps, "method": method})
        self.make_trainable(None)
        if not how:
            self.came(name, self.read(name, self.world.kinds[kind]))
            self.runs[name] = 1
        self.selection, self.enabled, self.trainable = before

    @step(has_adapters, name=ours())
    def train_by_hand(self, name: str) -> None:
        """A loop of one's own, with plain SGD: the step is that of plain PEFT on a fresh model."""
        lab, rate = self.lab, 0.3
        self.call(lambda: lab.set_adapter(name))
        self.call(lambda: lab.set_trainable(name))
        self.selection, self.enabled = ((name, 1.0),), True
        self.make_trainable(name)
        optimizer = torch.optim.SGD([p for p in lab.model.parameters() if p.requires_grad], lr=rate)
        held, plain = self.held[name], self.oracle.plain(self.held[name])
        forward_with_labels(lab.model, self.ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs = own_tensors(oracle.tuner_layers(plain.get_base_model()), "default")
        for key, parameter in theirs.items():
            parameter.requires_grad_("ranknum" not in key)
        forward_with_labels(plain.get_base_model(), self.ids).loss.backward()
        for key, parameter in self.own(name).items() if not self.random_now(self.selection) else ():
            grad = theirs[key].grad
            expected = held.tensors[key] if grad is None else held.tensors[key] - rate * grad
            error = float((parameter.detach() - expected).abs().max())
            assert error < 1e-3 * max(1.0, float(expected.abs().max())), f"{key} learned something else: {error:.3g}"
        plain.zero_grad()
        held.take(self.own(name))

    @step(has_adapters, name=ours(), which=st.integers(0, 30), how=st.sampled_from([0, 1, 2, 2, 3, 4]))
    def edit_in_place(self, name: str, which: int, how: int) -> None:
        """Change one tensor by hand, in ways that version counters do not all see."""
        mine, tensors = self.own(name), copied(self.held[name].tensors)
        keys = sorted(key for key in mine if "ranknum" not in key)
        key = keys[which % len(keys)]
        parameter = mine[key]
        if how == 0:
            parameter.data.add_(0.25)
            tensors[key].add_(0.25)
        elif how == 1:
            parameter.data.mul_(-1.0)
            tensors[key].mul_(-1.0)
        elif how == 2:
            parameter.data = parameter.data.clone() * 0.5  # other storage
            tensors[key].mul_(0.5)
        elif how == 3:
            parameter.detach().numpy()[..., 0] += 0.5
            tensors[key][..., 0] += 0.5
        else:
            with torch.no_grad():
                parameter.copy_(parameter.flip(0))
            tensors[key] = tensors[key].flip(0)
        self.held[name].take(tensors)

    # -- generating

    def compare_now(
        self, prompts: list[str], wanted: list[Any] | None, settings: dict[str, Any], *, cut: bool = False, **more: Any
    ) -> Any:
        comparison = self.call(lambda: self.lab.compare(prompts, wanted, **settings, **more))
        asked = [(), *(((name, 1.0),) for name in self.held)] if wanted is None else list(map(parts_of, wanted))
        self.comparisons += 1
        assert self.lab.last is comparison
        self.hold_comparison(comparison, asked, settings, hooked=bool(self.hooks), cut=cut)
        return comparison

    @step(
        prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=2, unique=True),
        wanted=st.none() | st.lists(columns(), min_size=1, max_size=4, unique_by=lambda c: repr(parts_of(c))),
        how=st.sampled_from(["greedy", "greedy", "warm", "hot"]),
        length=st.integers(1, 5),
        again=st.booleans(),
    )
    def compare(self, prompts: list[str], wanted: Any, how: str, length: int, again: bool) -> None:
        asked = sampling(how, length)
        self.compare_now(prompts, wanted, asked)
        if again:
            assert all(g.cached for g in self.compare_now(prompts, wanted, asked).generations)

    @step(column=st.just("selection") | columns(), how=st.sampled_from(sorted(HOW)), length=st.integers(1, 5))
    def generate(self, column: Any, how: str, length: int) -> None:
        asked = sampling(how, length)
        generation = self.call(lambda: self.lab.generate("Hi", column, **asked))
        parts = self.acting if column == "selection" else parts_of(column)
        assert generation.asked == parts
        self.look_at(dict(parts))
        self._hold(generation, self.prompt(), asked, hooked=False)

    def prompt(self) -> tuple[int, ...]:
        """The ids of "Hi", as the model is to read it."""
        read = self.world.tokenizer
        if self.world.seq2seq:
            return tuple(read("Hi")["input_ids"])
        turns = [{"role": "user", "content": "Hi"}]
        return tuple(read.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])

    @step(
        wanted=st.none() | st.lists(columns(), min_size=1, max_size=3, unique_by=lambda c: repr(parts_of(c))),
        how=st.sampled_from(["error", "interrupt", "state", "stop"]),
        at=st.integers(0, 6),
    )
    def fail_in_on_token(self, wanted: Any, how: str, at: int) -> None:
        events: list[Any] = []

        def on_token(event: Any) -> None:
            events.append(event)
            if len(events) != at + 1:
                return
            if how == "state":
                for work in (
                    lambda: self.lab.set_adapter(None),
                    lambda: self.lab.compare("Hi", [None]),
                    self.lab.close,
                ):
                    with pytest.raises(AdapterLabError):
                        work()
            elif how == "stop":
                self.lab.stop()
            else:
                raise Mine if how == "error" else KeyboardInterrupt

        asked = sampling("greedy", 3)
        try:
            self.compare_now(["Hi"], wanted, asked, on_token=on_token, cut=how == "stop")
        except (Mine, KeyboardInterrupt):
            assert how in ("error", "interrupt")
            all_of_them = [None, *self.held] if wanted is None else wanted
            for parts in map(parts_of, all_of_them):  # those that had ended by then are kept
                self.look_at(dict(parts))
                self.finished.add(self.answer(parts, self.prompt(), asked))
        else:
            assert how in ("state", "stop") or len(events) <= at

    @contextlib.contextmanager
    def hooked(self, after: int) -> Iterator[None]:
        """A user's forward hook on the base, which fails after some calls."""
        calls = 0

        def hook(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Mine("in a hook")

        handle = self.modules[self.world.block].register_forward_hook(hook)
        self.hooks += 1
        try:
            yield
        finally:
            self.hooks -= 1
            handle.remove()

    @step(
        wanted=st.none() | st.lists(columns(), min_size=1, max_size=3, unique_by=lambda c: repr(parts_of(c))),
        after=st.integers(0, 5),
        how=st.sampled_from(["compare", "generate", "divergence", "using"]),
    )
    def fail_in_a_hook(self, wanted: Any, after: int, how: str) -> None:
        asked = sampling("greedy", 3)
        columns = wanted or [None]
        named = {name for column in wanted or self.held for name, _ in parts_of(column)}
        with self.hooked(after), contextlib.suppress(Mine):
            if how == "compare":
                self.compare_now(["Hi"], wanted, asked)
            elif how == "generate":
                named = set(dict(parts_of(columns[0])))
                self.call(lambda: self.lab.generate("Hi", columns[0], **asked))
            elif how == "divergence":
                named = set(dict(parts_of(columns[0])))
                if named:
                    self.call(lambda: self.lab.divergence("Hi there", [columns[0]], **self.side))
            else:
                named = set()
                self.call(lambda: self.look_through(columns[0]))
        self.look_at(named)

    @step(has_adapters, column=columns())
    def divergence(self, column: Any) -> None:
        parts, text = parts_of(column), "The moon is a body"
        if not parts:
            self.refused(lambda: self.lab.divergence(text, [column], **self.side))
            return
        frame = self.call(lambda: self.lab.divergence(text, [column], chat=False, **self.side))
        self.look_at(dict(parts))
        if not self.world.seq2seq:
            ids = self.world.tokenizer(text, return_tensors="pt")["input_ids"]
            logprobs = self.oracle.logits(parts, self.held, ids)[0, :-1].log_softmax(-1)
            expected = logprobs.gather(1, ids[0, 1:, None])[:, 0]
            error = float((torch.tensor(frame["logprob"].to_numpy()) - expected[-len(frame) :]).abs().max())
            assert error < NEAR * max(1.0, float(expected.abs().max()))

    @step(lambda self: self.told, which=st.integers(0, 3))
    def verify(self, which: int) -> None:
        comparison, told = self.told[which % len(self.told)]
        frame = self.call(lambda: self.lab.verify(comparison))
        for (_, row), (parts, keys) in zip(frame.iterrows(), told):
            there = all(name in self.held for name in keys)
            agree = there and all(self.held[name].reference == key for name, key in keys.items())
            assert row["weights_agree"] == agree, f"{row.to_dict()} {parts}"
            if there and all(self.held[name].key == key == self.held[name].reference for name, key in keys.items()):
                assert row["agrees"], row.to_dict()

    @step(lambda self: self.last_step != "compare_all")
    def compare_all(self) -> None:
        """The one rule that draws nothing, which Hypothesis would therefore take most often."""
        self.compare_now(["Hi"], None, sampling("greedy", 3))

    @step(clear=st.booleans())
    def only_look(self, clear: bool) -> None:
        lab = self.lab
        for look in (lab.summary, lab.parameters, lab.memory, lab.capabilities, lab._repr_html_):
            self.call(look, imposes=False)
        if clear:
            lab.clear_cache()
            self.finished.clear()

    # -- to weights, to disk, and back

    @step(column=columns(), to_disk=st.sampled_from([False, False, True]))
    def merge(self, column: Any, to_disk: bool) -> None:
        parts, folder = parts_of(column), self.folder() if to_disk else None
        merged = self.call(lambda: self.lab.merge_and_unload(column, folder))
        assert not set(map(id, merged.parameters())) & {id(p) for p in self.model.parameters()}
        for model in (merged, type(self.model).from_pretrained(folder).eval() if to_disk else merged):
            with torch.no_grad():
                self.close_to(forward(model, self.ids).logits, parts, "merged", 1e-3)

    @step(has_adapters, name=ours(), over=st.booleans())
    def save(self, name: str, over: bool) -> None:
        """Into a new folder, or over what another adapter was saved as."""
        self.save_now(name, self.saved[0][0] if over and self.saved else self.folder())

    def save_now(self, name: str, folder: Path) -> None:
        held = self.held[name]
        self.call(lambda: self.lab.save_adapter(name, folder))
        self.look_at([name])
        held.saved = held.reference = held.key
        self.saved = [*[place for place in self.saved if place[0] != folder][-3:], (folder, held.kind)]
        again = self.oracle.load(folder, held.kind)
        assert again.key == held.key, "plain PEFT reads something else from the file"
        self.close_to(self.oracle.logits(((name, 1.0),), {name: again}, self.ids), ((name, 1.0),), "saved", 0.0)

    @step(over=st.booleans(), blend=columns(), go_on=st.booleans())
    def save_the_lab(self, over: bool, blend: Any, go_on: bool) -> None:
        """Opened on a fresh base, it is the same lab; `go_on` with that one, or with the old one."""
        old, names = self.lab, list(self.held)
        self.call(lambda: setattr(old, "blends", [blend]), imposes=False)
        if self.lab_folder is None or not over:
            self.lab_folder = self.folder()
        folder = self.lab_folder
        self.call(lambda: old.save(folder))
        self.look_at(names)
        for held in self.held.values():
            held.saved = held.reference = held.key
        here, base = (self.model, self.modules, self.tensors, self.modes), self.oracle.bare()
        self.stand_on(base)
        again = self.call(lambda: AdapterLab(folder, base_model=base, tokenizer=self.world.tokenizer), imposes=False)
        assert again.restored["agrees"].all(), again.restored
        assert [column.parts for column in again.blends] == [parts_of(blend)]
        assert [one._json() for one in again.history] == [one._json() for one in old.history]
        places = {id(comparison): place for place, comparison in enumerate(old.history)}
        self.lab = again
        self.all_is_true()
        if go_on:
            self.call(old.close, imposes=False)
            self.brought, self.given = {}, self.snapshot_of(self.oracle.bare(), self.modules)
            self.told = [(again.history[places[id(comparison)]], told) for comparison, told in self.told]
            self.finished.clear()
        else:
            self.call(again.close, imposes=False)
            assert dict(base.named_modules()) == self.modules
            self.model, self.modules, self.tensors, self.modes = here
            self.lab = old

    @step(loaded=st.runner().flatmap(lambda machine: some_kinds(machine.world)))
    def close_and_open_again(self, loaded: list[str]) -> None:
        old, modes = self.lab, [module.training for module in self.model.modules()]
        self.call(old.close, imposes=False)
        old.close()
        modules, flags, config = self.given
        assert dict(self.model.named_modules()) == modules, "the model is not given back as it came"
        assert {key: p.requires_grad for key, p in self.model.named_parameters()} == flags
        assert getattr(self.model, "peft_config", None) is config
        assert set(modes) >= {module.training for module in self.model.modules()}
        for work in (lambda: old.model, lambda: old.compare("Hi"), lambda: old.set_adapter(None), lambda: old.adapters):
            with pytest.raises(AdapterLabError, match="closed"):
                work()
        self.enter(loaded)

    # -- behind the lab's back

    @step(
        lambda self: not self.drifted,
        what=st.sampled_from(["disable", "enable", "set", "flags", "base flags", "intruder", "replace"]),
        number=st.integers(0, 9),
    )
    def do_natively(self, what: str, number: int) -> None:
        model: Any = self.lab.model
        if what not in ("base flags", "intruder") and self.held:  # the others are for one adapter that acts alone
            self.set_adapter_now(list(self.held)[number % len(self.held)])
        parts = self.acting
        single = parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else None
        if what == "base flags":
            list(self.tensors.values())[number].requires_grad_(True)
            self.drifted = what
        elif what == "intruder":
            self.drifted = what
            with contextlib.suppress(ValueError):  # of PEFT, over a blend or a modules_to_save; half of it is done then
                model.add_adapter(self.fresh_config(["lora", "ia3"][number % 2], True), "intruder")
                self.must_say = True
        elif single is not None:
            if what == "disable":
                model.disable_adapters()
            elif what in ("enable", "set"):
                model.enable_adapters() if what == "enable" else model.set_adapter(single)
            elif what == "flags":
                for key, parameter in self.own(single).items():
                    if "ranknum" not in key:
                        parameter.requires_grad_(single != self.trainable)
            else:
                path = [path for path, _ in self.layers(single)][number % len(self.layers(single))]
                parent, _, child = path.rpartition(".")
                model.get_submodule(parent)._modules[child] = self.modules[path]
            self.drifted, self.must_say = what, what != "enable" and not (what == "set" and single == self.trainable)

    @step(lambda self: has_adapters(self) and not self.drifted, name=ours(), then=st.integers(0, 12))
    def delete_natively(self, name: str, then: int) -> None:
        """The lab notices, says so and drops the adapter, whatever is called next."""
        lab, one = self.lab, {"max_new_tokens": 1}
        self.call(lambda: lab.set_adapter(name))
        self.selection, self.enabled = ((name, 1.0),), True
        lab.model.delete_adapter(name)
        calls: list[Callable[[], Any]] = [
            lambda: lab.set_adapter(name),
            lambda: lab.set_adapter(None),
            lambda: lab.compare("Hi", **one),
            lambda: lab.compare("Hi", [name], **one),
            lambda: lab.generate("Hi", **one),
            lambda: lab.save_adapter(name, self.folder()),
            lambda: lab.train(name, TEXTS, max_steps=3, disable_tqdm=True),
            lambda: lab.set_trainable(name),
            lambda: lab.delete_adapter(name),
            lambda: lab.merge_and_unload(name),
            lambda: lab.divergence("Hi there", [name], **self.side),
            lab.disable_adapters,
            lambda: lab.using(name).__enter__(),
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterLabWarning)
            history = len(lab.history)
            with contextlib.suppress(AdapterLabError):
                calls[then]()
            lab.enable_adapters()
            assert name not in lab.adapters, "the lab still has what was deleted natively"
        self.forget(name)
        self.call(lambda: lab.compare("Hi", **one))
        self.comparisons += len(lab.history) - history
        self.look_at(self.held)

    @step(which=st.integers(0, 50), column=columns())
    def change_the_base_for_a_while(self, which: int, column: Any) -> None:
        """It is said at the next comparison, and `verify` says no."""
        key = sorted(self.tensors)[which % len(self.tensors)]
        pristine = everything(self.oracle.pristine)[key].detach()
        # Each time another change: answers of the same changed weights may well be known.
        self.tensors[key].data.add_(0.5 + self.comparisons / 64)
        try:
            told = "no longer those that this lab opened"
            comparison = self.call(lambda: self.lab.compare("Hi", [column], max_new_tokens=2), told)
            assert not any(g.cached for g in comparison.generations)
            assert not self.call(lambda: self.lab.verify(comparison))["agrees"].any()
        finally:
            self.tensors[key].data.copy_(pristine)
        self.comparisons += 1
        self.look_at(dict(parts_of(column)))


def forward_with_labels(model: Any, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, labels=ids)


# ----- running it -----

_COMMON: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "report_multiple_bugs": False,
    # a step takes a tenth of a second on purpose, and steps that were drawn for adapters that went meanwhile are left out
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
SHORT = {"llama": (8, 26), "gpt2": (4, 20), "t5": (4, 20)}  # examples, steps of each
LONG = {"llama": (340, 35), "gpt2": (60, 30), "t5": (60, 30)}


def broken_folders(root: Path, folder: Path) -> dict[str, Path]:
    """Folders that no lab may load."""
    file = "adapter_model.safetensors"
    found = {"gone": root / "gone"}
    for label in ("cut", "garbled", "empty", "base", "shapes", "config"):
        found[label] = root / label
        shutil.copytree(folder, found[label])
    whole = (folder / file).read_bytes()
    (found["cut"] / file).write_bytes(whole[: len(whole) // 2])
    (found["garbled"] / file).write_bytes(b"no tensors at all")
    (found["empty"] / file).unlink()
    tensors = load_file(str(folder / file))
    first = next(iter(tensors))
    base = first.partition(".lora_")[0] + ".weight"
    save_file({**tensors, base: torch.ones(3, 3)}, str(found["base"] / file), {"format": "pt"})
    save_file({**tensors, first: torch.ones(3, 3)}, str(found["shapes"] / file), {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (found["config"] / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "PROMPT_TUNING"}))
    return found


@pytest.mark.parametrize("builder", ["llama", "gpt2", "t5"])
def test_any_calls_in_any_order(builder: str, long: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = getattr(oracle, builder)()
    plain = Oracle(world, tmp_path / "plain")
    broken = broken_folders(tmp_path, plain.folders["lora"])
    machine = type(f"On{builder.title()}", (Calls,), {"world": world, "oracle": plain, "broken": broken})
    COUNTS.clear()
    examples, steps = (LONG if long else SHORT)[builder]
    how: dict[str, Any] = {"derandomize": True, "phases": [Phase.generate]}
    if long:
        how = {"print_blob": True, "phases": [Phase.generate, Phase.shrink]}
    gc.collect()
    gc.freeze()  # closing a lab and training collect garbage, which else takes most of the time: all of torch is looked at
    try:
        run_state_machine_as_test(
            machine, settings=settings(max_examples=examples, stateful_step_count=steps, **how, **_COMMON)
        )
    finally:
        gc.unfreeze()
        each = ", ".join(f"{name} {count}" for name, count in COUNTS.most_common())
        with capsys.disabled():
            print(f"\n{builder}: {sum(COUNTS.values())} steps of {len(COUNTS)} rules: {each}")
