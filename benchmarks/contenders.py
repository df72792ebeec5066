"""Who competes: plain transformers, plain PEFT, pre-merged models and the lab, all over the same base tensors.

A chain is what runs without interruption; a turn is what is timed in it. Everything generates greedily, with the cache,
exactly as many tokens, in the way in which a user of that library would write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from workloads import quiet_peft, share

from adapterlab import AdapterLab

BASE = "base"
EXTRA = "one_more"
Texts = dict[str, list[int]]  # column → its new tokens


@dataclass(frozen=True)
class Turn:
    """What is timed at one stroke: `run`, with `before` and `after` it untimed. columns: how many it generates.

    contender "in_turn" and "merged" have a turn for each column, in their order; the others one for all.
    """

    contender: str
    columns: int
    run: Callable[[], Texts]
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None


@dataclass
class Stage:
    """Everything of one part that is loaded. folders: name → adapter on disk; `extra` is one adapter more."""

    model: Any
    lab: AdapterLab
    prompt: str
    ids: tuple[int, ...]
    new_tokens: int
    folders: dict[str, Path]
    extra: Path
    one_method: bool
    notes: set[str] = field(default_factory=set)  # what the lab said of columns that it did not batch

    @property
    def names(self) -> list[str]:
        return list(self.folders)

    def prepare(self) -> Stage:
        """Load what the others need: plain PEFT, and each adapter merged into its own model."""
        self.bare = share(self.model)
        first, *rest = self.folders if self.one_method else [next(iter(self.folders))]
        self.peft = self.load_alone(first)
        for name in rest:
            self.peft.load_adapter(str(self.folders[name]), name)
        self.merged = {name: self.load_merged(name) for name in self.folders}
        return self

    def load_alone(self, name: str) -> Any:
        """A `PeftModel` with this adapter, and the base's own tensors."""
        from peft import PeftModel

        folder = self.extra if name == EXTRA else self.folders[name]
        with quiet_peft():
            return PeftModel.from_pretrained(share(self.model), str(folder), name).eval()

    def load_merged(self, name: str) -> Any:
        """A plain model with this adapter merged by PEFT; modules that it does not touch keep the base's own tensors."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from torch import nn

        alone = self.load_alone(name)
        for module in alone.modules():
            if isinstance(module, BaseTunerLayer):
                base = module.get_base_layer()
                for key, parameter in list(base.named_parameters(recurse=False)):
                    setattr(base, key, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        return alone.merge_and_unload()

    @contextmanager
    def alone(self, name: str) -> Iterator[Any]:
        """The model that plain PEFT runs for a column on its own."""
        if name == BASE:
            yield self.bare
        elif self.one_method and name != EXTRA:
            self.peft.set_adapter(name)
            yield self.peft
        else:
            yield self.load_alone(name)

    def generate(self, model: Any, labels: list[str], **settings: Any) -> Texts:
        """`model.generate` with one row for each label."""
        import torch

        ids = torch.tensor([self.ids] * len(labels))
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            **settings,
        )
        return dict(zip(labels, out[:, len(self.ids) :].tolist()))

    def compare(self, columns: list[str]) -> Texts:
        comparison = self.lab.compare(
            self.prompt, [*columns], max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens
        )
        self.notes |= {f"the lab's column {g.column}: {g.note}" for g in comparison.generations if g.note}
        return {generation.column: list(generation.token_ids) for generation in comparison.generations}

    def add_extra(self) -> None:
        self.lab.load_adapter(self.extra, EXTRA)
        self.lab.set_adapter(None)


def make_chains(stage: Stage, columns: tuple[int, ...], in_turn: list[str]) -> list[list[Turn]]:
    """All that one round runs; `in_turn`: the columns that it times one after another."""
    bare, names = stage.bare, stage.names
    chains = [
        [Turn("one", 1, partial(stage.generate, bare, [BASE]))],
        [Turn("lab_base", 1, partial(stage.compare, [BASE]), stage.lab.clear_cache)],
        [Turn("lab_one", 1, partial(stage.compare, names[:1]), stage.lab.clear_cache)],
        [Turn("in_turn", 1, _switch_and_generate(stage, name)) for name in in_turn],
        [Turn("merged", 1, partial(stage.generate, stage.merged.get(name, bare), [name])) for name in in_turn],
    ]
    for n in columns:
        labels = [BASE, *names[:n]]
        chains.append([Turn("floor", n + 1, partial(stage.generate, bare, [BASE] * (n + 1)))])
        if stage.one_method:
            rows = ["__base__" if label == BASE else label for label in labels]
            chains.append([Turn("peft_batch", n + 1, partial(stage.generate, stage.peft, labels, adapter_names=rows))])
        chains.append([Turn("lab", n + 1, partial(stage.compare, labels), stage.lab.clear_cache)])
    more = partial(stage.compare, [*labels, EXTRA])  # what stands on the comparison that has just been finished
    chains[-1].append(Turn("rerun", n + 1, partial(stage.compare, labels)))
    chains[-1].append(Turn("one_more", 1, more, stage.add_extra, partial(stage.lab.delete_adapter, EXTRA)))
    return chains


def _switch_and_generate(stage: Stage, name: str) -> Callable[[], Texts]:
    """What one writes without a lab; where one `PeftModel` can't hold the methods, what one writes with its switch."""

    def of_peft() -> Texts:
        if name == BASE:
            with stage.peft.disable_adapter():
                return stage.generate(stage.peft, [BASE])
        stage.peft.set_adapter(name)
        return stage.generate(stage.peft, [name])

    def of_lab() -> Texts:
        stage.lab.set_adapter(name)
        return stage.generate(stage.lab.model, [name])

    return of_peft if stage.one_method else of_lab
