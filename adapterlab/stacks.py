"""All adapters' LoRA factors side by side, one stack a layer, so that a batch multiplies them in one `bmm`.

The stacks are the adapters: each adapter's parameters become views of its place, so nothing is held twice and nothing
can be out of date. An adapter that is being trained keeps tensors of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adapterlab.equation import Term, blend_obstacle, factors, is_dora

if TYPE_CHECKING:
    from torch import Tensor

_PADDING = 1.25  # a stack may be this much larger than what lies in it
_BATCHES = 8  # whose layers are kept


@dataclass(eq=False)
class Stack:
    """A: (n, r, in), B: (n, r, out): B lies transposed, since a CPU multiplies a few vectors by it fastest so.

    Ranks are padded with zeros to the largest. `names[i]` owns place i.
    """

    A: Tensor
    B: Tensor
    names: tuple[str, ...]

    def holds(self, name: str, term: Term) -> bool:
        """Whether the adapter's own tensors are the views of its place, and not others that somebody put there."""
        place = self.names.index(name)
        A, B = term.A, term.B
        assert A is not None  # only terms with factors are asked
        assert B is not None
        return (
            A.data_ptr() == self.A.data_ptr() + place * self.A.stride(0) * self.A.element_size()
            and B.data_ptr() == self.B.data_ptr() + place * self.B.stride(0) * self.B.element_size()
            and A.shape[0] <= self.A.shape[1]
            and (A.dtype, A.shape[1], A.stride()) == (self.A.dtype, self.A.shape[2], self.A.stride()[1:])
            and (B.dtype, B.shape[0], B.T.stride()) == (self.B.dtype, self.B.shape[2], self.B.stride()[1:])
        )


class Batches:
    """The layers of the last few batches (rows.py) by their columns, for as long as they read the same weights.

    They hold views of the stacks, so all go when a stack is made or taken apart.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Mapping[str, str], dict[str, Any]]] = {}

    def find(self, columns: Any, weights: Mapping[str, str]) -> dict[str, Any] | None:
        """The layers of these columns, if `weights` (name → digest) are what they were made of."""
        made_of, layers = self._made.get(columns, (None, None))
        return layers if made_of == weights and "" not in weights.values() else None

    def put(self, columns: Any, weights: Mapping[str, str], layers: dict[str, Any]) -> None:
        """Keep these layers, and no others that read other weights under the same names."""
        alike = {
            key: made
            for key, made in self._made.items()
            if key != columns and all(weights.get(name, digest) == digest for name, digest in made[0].items())
        }
        self._made = dict([*alike.items(), (columns, (weights, layers))][-_BATCHES:])

    def clear(self) -> None:
        self._made.clear()


class Stacks:
    """The stacks of one lab's adapters, by the path of the layer. Not thread-safe: the lab holds the lock."""

    def __init__(self) -> None:
        self._at: dict[str, list[Stack]] = {}
        # DoRA's terms by path and name, and whose weights made them
        self.norms: dict[tuple[str, str], tuple[Any, Term]] = {}
        self.batches = Batches()

    def find(self, path: str, name: str, term: Term) -> tuple[Stack, int]:
        """Where the adapter's factors lie: a shared stack and the place in it, or a stack of one made of its own tensors."""
        for stack in self._at.get(path, ()):
            if name in stack.names and stack.holds(name, term):
                return stack, stack.names.index(name)
        assert term.A is not None  # only terms with factors are asked
        assert term.B is not None
        return Stack(term.A.detach()[None], term.B.detach().T[None], (name,)), 0

    @torch.no_grad()
    def arrange(self, path: str, layers: Mapping[str, Any]) -> None:
        """Let all adapters of a layer lie as few stacks as their ranks allow; does nothing where they lie so already.

        `layers`: adapter → PEFT's layer at `path`, in the order of the places. Adapters that require gradients and those
        whose layers have no factors are left alone.
        """
        terms = _lendable(layers)
        groups = [group for group in _group(terms) if len(group) > 1]
        have = self._at.get(path, [])
        if [list(stack.names) for stack in have] == groups and all(
            stack.holds(name, terms[name]) for stack in have for name in stack.names
        ):
            return
        self.batches.clear()
        lent = {name for stack in have for name in stack.names}
        self._at[path] = [_build(group, terms) for group in groups]
        for name in lent & set(terms) - {name for group in groups for name in group}:
            _own(terms[name])

    @torch.no_grad()
    def release(self, name: str, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Give an adapter tensors of its own again and close the gap; `layers`: path → the other adapters' layers there.

        The adapter itself is in `layers` unless it has been deleted.
        """
        self.batches.clear()
        self.norms = {key: kept for key, kept in self.norms.items() if key[1] != name}
        for path, stacks in list(self._at.items()):
            if not any(name in stack.names for stack in stacks):
                continue
            here = dict(layers.get(path, {}))
            layer = here.pop(name, None)
            if layer is not None:
                _own(Term(*factors(layer, name)))
            self.arrange(path, here)
            if not self._at[path]:
                del self._at[path]


def _lendable(layers: Mapping[str, Any]) -> dict[str, Term]:
    terms = {}
    for name, layer in layers.items():
        if blend_obstacle(layer, name) and not is_dora(layer, name):
            continue
        term = Term(*factors(layer, name))
        if term.A is None or term.B is None or not _rank(term):
            continue
        if not (term.A.requires_grad or term.B.requires_grad):
            terms[name] = term
    return terms


def _group(terms: Mapping[str, Term]) -> list[list[str]]:
    """Names that may share a stack: of one dtype and device, and of ranks near enough for little padding."""
    kinds: dict[Any, list[str]] = {}
    for name, term in terms.items():
        assert term.A is not None  # `_lendable` keeps these only
        kinds.setdefault((term.A.dtype, term.A.device), []).append(name)
    groups = []
    for names in kinds.values():
        ranks = {name: _rank(terms[name]) for name in names}
        rest = sorted(names, key=lambda name: -ranks[name])
        while rest:
            count = len(rest)
            while count * ranks[rest[0]] > _PADDING * sum(ranks[name] for name in rest[:count]):
                count -= 1
            taken = set(rest[:count])
            groups.append([name for name in names if name in taken])
            rest = rest[count:]
    return groups


def _build(names: Iterable[str], terms: Mapping[str, Term]) -> Stack:
    names = tuple(names)
    like, r = terms[names[0]], max(_rank(terms[name]) for name in names)
    assert like.A is not None  # `_lendable` keeps these only
    assert like.B is not None
    A = like.A.new_empty(len(names), r, like.A.shape[1])
    B = like.B.new_empty(len(names), r, like.B.shape[0])
    for place, name in enumerate(names):
        _lend(terms[name], A[place], B[place])
    return Stack(A, B, names)


def _lend(term: Term, A: Tensor, B: Tensor) -> None:
    """Move the factors into their places; the parameters stay the same objects."""
    r = _rank(term)
    for parameter, place in ((term.A, A[:r]), (term.B, B[:r].T)):
        assert parameter is not None  # `_lendable` keeps these only
        parameter.data = place.copy_(parameter)
    A[r:].zero_()
    B[r:].zero_()


def _own(term: Term) -> None:
    for parameter in (term.A, term.B):
        if parameter is not None:
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)


def _rank(term: Term) -> int:
    assert term.A is not None  # only terms with factors are asked
    return term.A.shape[0]
