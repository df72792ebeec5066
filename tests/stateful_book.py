"""The other half of test_stateful.py: what must be true of a lab, by the tables of ARCHITECTURE.md, and how it is looked at.

`Book` keeps it: names, state, badges and weights in plain Python; what a column computes and says it asks of oracle.py. The
strategies here draw what a rule can be called with.
"""

from __future__ import annotations

import copy
import functools
import math
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from oracle import Held, Kind, Oracle, Parts, World, content, copied, forward, numbers, own_tensors
from test_rows_architectures import Findings, plain_logits

from adapterlab import AdapterLabError, AdapterLabWarning

NAMES = ["ada", "bob", "cyd", "dan", "eve", "fay", "gus"]
SLOTS = 5  # adapters at a time
MULTIPLIERS = [1.0, 0.5, -1.0, 2.0, 0.0]
NEAR = 2e-4  # of logits: rounding
COUNTS: Counter[str] = Counter()  # how often each rule ran
DIGESTS: dict[Any, str] = {}  # what the lab calls which content
OWNERS: dict[Any, Any] = {}  # and back


# ----- what is drawn -----


def parts_of(column: Any) -> Parts:
    """A column as the documentation reads it."""
    if column is None or column == "base":
        return ()
    pairs = [(column, 1.0)] if isinstance(column, str) else [(name, 1.0) for name in column]
    return tuple((n, float(m)) for n, m in (column.items() if isinstance(column, dict) else pairs) if m)


def ours(wanted: Callable[[Held], bool] = lambda held: True) -> Any:
    """An adapter that is there."""
    return st.runner().flatmap(lambda machine: st.sampled_from([n for n, held in machine.held.items() if wanted(held)]))


def free() -> Any:
    return st.runner().flatmap(lambda machine: st.sampled_from([n for n in NAMES if n not in machine.held]))


def columns() -> Any:
    """A column that the lab must take."""

    def of(machine: Any) -> Any:
        kinds = [st.sampled_from([None, "base"])]
        if machine.held:
            kinds += [st.sampled_from(list(machine.held))] * 2
        able = [name for name, held in machine.held.items() if held.kind.blends]
        if able:
            kinds.append(st.lists(st.sampled_from(able), min_size=1, max_size=3, unique=True))
            kinds += [st.dictionaries(st.sampled_from(able), st.sampled_from(MULTIPLIERS), min_size=1, max_size=3)] * 2
        return st.one_of(kinds)

    return st.runner().flatmap(of)


def wrong_columns(held: Mapping[str, Held]) -> list[Any]:
    """Columns that the lab must refuse."""
    wrong: list[Any] = ["nobody", ["nobody"], {"nobody": 0.5}, 7, {"base": 1.0}]
    for name, one in held.items():
        wrong += [[name, name], {name: math.nan}, {name: "much"}, [name, "nobody"]]
        if not one.kind.blends:
            wrong += [{name: 0.5}, *([name, other] for other in held if other != name)]
    return wrong


def kinds() -> Any:
    return st.runner().flatmap(lambda machine: st.sampled_from(list(machine.world.kinds)))


def some_kinds(world: World) -> Any:
    """What is loaded at the beginning."""
    return st.lists(st.sampled_from(list(world.kinds)), min_size=1, max_size=4)


def has_adapters(machine: Any) -> bool:
    return bool(machine.held)


def has_room(machine: Any) -> bool:
    return len(machine.held) < SLOTS


def step(only: Callable[[Any], bool] | None = None, **drawn: Any) -> Any:
    """A rule that is counted; `only`: when it can be used."""

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def counted(self: Any, **given: Any) -> Any:
            COUNTS[function.__name__] += 1
            self.last_step = function.__name__
            return function(self, **given)

        made = rule(**drawn)(counted)
        return made if only is None else precondition(only)(made)

    return decorate


def everything(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


# ----- what must be true -----


class Book(RuleBasedStateMachine):
    """A lab, what must be true of it, and how that is looked at. The rules are in `Calls`."""

    world: World
    oracle: Oracle
    broken: dict[str, Path]

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="stateful-"))
        self.ids = torch.randint(7, 300, (1, 9), generator=torch.Generator().manual_seed(1))
        self.stand_on(self.oracle.bare())
        self.saved: list[tuple[Path, Kind]] = []
        self.folders = 0
        self.last_step = ""
        self.lab_folder: Path | None = None
        self.hooks = 0  # of a user, on the model now
        self.brought: dict[str, Held] = {}
        self.empty()

    def stand_on(self, model: Any) -> None:
        """The lab is on this model, which is bare as yet."""
        self.model = model
        self.modules = dict(model.named_modules())
        self.tensors = everything(model)
        self.modes = {path: module.training for path, module in self.modules.items()}

    def empty(self) -> None:
        """What is true of a lab that was just opened."""
        self.held: dict[str, Held] = {name: copy.deepcopy(held) for name, held in self.brought.items()}
        self.selection: Parts = ()
        self.enabled = True
        self.trainable: str | None = None
        self.drifted = ""  # what was done behind the lab's back and has not been said yet
        self.must_say = False
        self.told: list[tuple[Any, list[tuple[Parts, dict[str, str]]]]] = []
        self.finished: set[Any] = set()
        self.comparisons = 0
        self.runs: Counter[str] = Counter()

    @property
    def side(self) -> dict[str, str]:
        """What `divergence` needs beside a text: an encoder reads a prompt."""
        return {"prompt": "Hi"} if self.world.seq2seq else {}

    @property
    def acting(self) -> Parts:
        return self.selection if self.enabled else ()

    def teardown(self) -> None:
        if hasattr(self, "lab"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AdapterLabWarning)
                self.lab.close()
        shutil.rmtree(self.root, ignore_errors=True)

    # -- calling -------------------------------------------------------------------------------------------------

    def call(self, work: Callable[[], Any], says: str = "", *, imposes: bool = True) -> Any:
        """Call the lab. It warns if the model was changed behind its back, and never otherwise; `says`: of what else.

        imposes: the call sets right what was done behind the lab's back, if it comes to its end."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AdapterLabWarning)
            try:
                result = work()
            except BaseException:
                self._heard(caught, says, ended=False)
                raise
        self._heard(caught, says, ended=imposes)
        return result

    def _heard(self, caught: Any, says: str, *, ended: bool) -> None:
        heard = [str(warning.message) for warning in caught]
        behind = [text for text in heard if "behind the lab's back" in text]
        assert not behind or self.drifted, f"nobody did a thing, and it says {behind}"
        if ended and self.must_say:
            assert behind, f"{self.drifted} was not said"
        if behind or ended:
            self.drifted, self.must_say = "", False
        rest = [text for text in heard if text not in behind]
        assert all(says and says in text for text in rest), rest
        assert not (says and ended) or rest, f"it did not say {says!r}"

    def refused(self, work: Callable[[], Any]) -> None:
        with pytest.raises(AdapterLabError):
            self.call(work)

    def folder(self) -> Path:
        self.folders += 1
        return self.root / f"folder-{self.folders}"

    def layers(self, name: str) -> list[tuple[str, Any]]:
        return list(self.lab._adapters.mounts.adapters[name].layers.items())

    def own(self, name: str) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters, off the attributes of PEFT's layers."""
        return own_tensors(self.layers(name), name)

    def read(self, name: str, kind: Kind) -> Held:
        """An adapter that the lab has made."""
        config = copy.deepcopy(self.lab.adapters[name].peft_config)
        held = Held(kind, config, copied(self.own(name)), numbers(self.layers(name), name))
        held.reference = held.key
        held.seen()
        return held

    # -- what the calls change -----------------------------------------------------------------------------------

    def came(self, name: str, held: Held) -> None:
        assert name not in self.held
        self.held[name] = held
        self.selection, self.enabled = ((name, 1.0),), True
        self.runs[name] = 0

    def make_trainable(self, name: str | None) -> None:
        self.look_at([self.trainable])
        self.trainable = name

    def look_at(self, names: Any) -> None:
        """The lab reads these adapters' weights; those of the trainable one are meant to change."""
        for name in names:
            if name in self.held:
                self.held[name].seen()
                if name == self.trainable:
                    self.held[name].reference = self.held[name].key

    def forget(self, name: str) -> None:
        del self.held[name]
        if name in dict(self.selection):
            self.selection = ()
        if self.trainable == name:
            self.trainable = None

    # -- looking -------------------------------------------------------------------------------------------------

    def close_to(self, given: torch.Tensor, parts: Parts, where: str, near: float = NEAR) -> None:
        expected = self.oracle.logits(parts, self.held, self.ids)
        error = float((given - expected).abs().max())
        assert error <= near * max(1.0, float(expected.abs().max())), f"{where}: logits of {parts} are {error:.3g} off"

    def random_now(self, parts: Parts) -> bool:
        """Whether dropout is at work: in train mode, in one adapter that acts alone."""
        single = parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else None
        return single is not None and self.held[single].kind.dropout and any(self.modes.values())

    def acts(self, model: Any, parts: Parts, where: str) -> None:
        """What `model` computes now is this column."""
        if not self.random_now(parts):
            with torch.no_grad():
                self.close_to(forward(model, self.ids).logits, parts, where)

    @invariant()
    def all_is_true(self) -> None:
        self.base_is_pristine()
        if hasattr(self, "lab"):
            self.claims()
            self.weights()
            self.model_is_as_claimed()

    def base_is_pristine(self) -> None:
        for key, tensor in everything(self.oracle.pristine).items():
            assert torch.equal(self.tensors[key], tensor), f"the base's {key} has changed"

    def claims(self) -> None:
        lab = self.lab
        assert list(lab.adapters) == list(self.held)
        assert lab.selection.parts == self.selection
        assert lab.enabled is self.enabled
        assert lab.trainable == self.trainable
        assert lab.active_adapters == dict(self.acting)
        assert len(lab.history) == self.comparisons
        assert not lab.running
        for name, held in self.held.items():
            info = lab.adapters[name]
            assert info.status in held.statuses(), f"{name}: {info.status!r}, and it must be {held.statuses()}"
            assert len(info.runs) == self.runs[name]

    def weights(self) -> None:
        """Adapters hold what they must, to the bit, and only what may learn requires gradients."""
        assert self.drifted or not any(p.requires_grad for p in self.tensors.values()), "the base is not frozen"
        for name, held in self.held.items():
            mine = self.own(name)
            assert mine.keys() == held.tensors.keys(), name
            for key, parameter in mine.items():
                assert torch.equal(parameter, held.tensors[key]), f"{name}'s {key} is not what it must be"
                learns = name == self.trainable and "ranknum" not in key
                assert self.drifted or parameter.requires_grad is learns, f"{name}'s {key}: {parameter.requires_grad}"
            assert self.drifted or numbers(self.layers(name), name) == held.numbers, name

    def model_is_as_claimed(self) -> None:
        for path, module in self.modules.items():
            assert module.training is self.modes[path], f"the mode of {path or 'the model'} is {module.training}"
        if self.drifted:
            return
        model = self.lab.model
        assert model is self.model
        parts = self.acting
        single = parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else None
        assert list(getattr(model, "peft_config", None) or {}) == ([] if single is None else [single])
        if not parts:
            assert dict(model.named_modules()) == self.modules, "base acts, and the model is not bare"
        if len(set(self.modes.values())) == 1:
            assert {module.training for module in model.modules()} == set(self.modes.values())
        for path, module in model.named_modules():
            assert not module._forward_hooks, path
            assert not module._forward_pre_hooks, path
            assert "forward" not in module.__dict__, path
        self.acts(model, parts, "now")

    # -- comparisons -----------------------------------------------------------------------------------------------

    def hold_comparison(
        self, comparison: Any, asked: list[Parts], settings: dict[str, Any], *, hooked: bool = False, cut: bool = False
    ) -> None:
        """Every answer is that of its column alone, and its proof says so. cut: somebody asked for a stop."""
        self.look_at({name for parts in asked for name, _ in parts})
        places = [(index, parts) for index in range(len(comparison.prompts)) for parts in asked]
        there = [(g.prompt_index, g.asked) for g in comparison.generations]
        if cut:  # what had not begun is left out
            places = [place for place in places if place in there]
        assert there == places
        for generation in comparison.generations:
            self._hold(generation, comparison.prompt_ids[generation.prompt_index], settings, hooked)
        self.told = [*self.told[-3:], (comparison, [(p, {n: self.held[n].key for n, _ in p}) for _, p in places])]

    def _hold(self, generation: Any, prompt: tuple[int, ...], settings: dict[str, Any], hooked: bool) -> None:
        parts, held = generation.asked, self.held
        logits = plain_logits(self.oracle.model(parts, held), prompt, generation.token_ids)
        near = NEAR * max(1.0, float(logits.abs().max()))
        findings = Findings()
        if generation.finish_reason != "stopped":
            findings.hold(generation, logits, prompt, settings, near)
        if not settings.get("temperature") and generation.finish_reason != "stopped" and not findings.ties:
            ends, length = settings["eos_token_id"], settings["max_new_tokens"]
            assert generation.token_ids == self.oracle.greedy(parts, held, prompt, ends, length), generation.column
        base = plain_logits(self.oracle.pristine, prompt, generation.token_ids[:1])
        assert abs(generation.logit_shift - float((logits[0] - base[0]).abs().max())) < near
        assert dict(zip(generation.active_adapters, generation.multipliers)) == dict(parts)
        mine = content(parts, held)
        assert DIGESTS.setdefault((type(self), mine), generation.weights_digest) == generation.weights_digest, mine
        assert OWNERS.setdefault((type(self), generation.weights_digest), mine) == mine, "two contents, one digest"
        where = self.answer(parts, prompt, settings)
        assert not generation.cached or where in self.finished, "it says what it never said"
        if not hooked and generation.finish_reason != "stopped":
            self.finished.add(where)

    def answer(self, parts: Parts, prompt: tuple[int, ...], settings: dict[str, Any]) -> Any:
        """A name for what decides an answer."""
        return parts, content(parts, self.held), prompt, repr(sorted(settings.items()))
