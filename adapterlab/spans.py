"""Which factors a batch reads together: neighbouring columns whose factors lie evenly in one stack are one `bmm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adapterlab.equation import Term, factors

if TYPE_CHECKING:
    from torch import Tensor

    from adapterlab.stacks import Stack, Stacks


@dataclass
class Part:
    """One adapter's term in one column, and where its factors lie: `stack`, None if it has none, and the place in it."""

    term: Term
    stack: Stack | None = None
    place: int = 0


@dataclass
class Span:
    """Neighbouring columns whose factors lie evenly in one stack: both are slices, and nothing is copied.

    A: (n, r, in), B: (n, r, out); e: a number for all, or (n, 1, 1 or r).
    """

    first: int
    A: Tensor
    B: Tensor
    e: float | Tensor

    @property
    def end(self) -> int:
        return self.first + len(self.A)


def find_place(stacks: Stacks, path: str, layer: Any, name: str) -> tuple[Stack | None, int]:
    """Where the factors of adapter `name` lie, for `Part`."""
    term = Term(*factors(layer, name))
    return stacks.find(path, name, term) if term.A is not None and len(term.A) else (None, 0)


def make_spans(columns: list[list[Part]]) -> list[Span]:
    """As few spans as hold every column's factors. One adapter at several multipliers is one place, spread."""
    having = [[part for part in column if part.stack is not None] for column in columns]
    spans = []
    for depth in range(max(map(len, having), default=0)):
        run: list[Part] = []
        for i, column in enumerate([*having, []]):
            part = column[depth] if depth < len(column) else None
            if run and (part is None or not _goes_on(run, part)):
                spans.append(_span(i - len(run), run))
                run = []
            if part is not None:
                run.append(part)
    return spans


def _goes_on(run: list[Part], part: Part) -> bool:
    step = part.place - run[-1].place
    return part.stack is run[-1].stack and step >= 0 and (len(run) < 2 or step == run[-1].place - run[-2].place)


def _span(first: int, run: list[Part]) -> Span:
    stack = run[0].stack
    assert stack is not None  # `make_spans` takes parts with factors only
    step = run[-1].place - run[-2].place if len(run) > 1 else 1
    if step:
        places = slice(run[0].place, run[-1].place + 1, step)
        A, B = stack.A[places], stack.B[places]
    else:
        A, B = (side[run[0].place].expand(len(run), -1, -1) for side in (stack.A, stack.B))
    numbers = [part.term.e for part in run]
    if all(isinstance(e, float) and e == numbers[0] for e in numbers):
        return Span(first, A, B, float(numbers[0]))
    e = A.new_zeros(len(run), 1, A.shape[1])
    for row, part in zip(e, run):
        assert part.term.A is not None  # it has factors
        row[0, : len(part.term.A)] = part.term.e
    return Span(first, A, B, e)


def is_term(term: Term, A: Tensor, e: float | Tensor, B: Tensor) -> bool:
    """Whether these factors, as a span holds them, are the term's: the same memory, or the same values."""
    assert term.A is not None  # the caller asked
    assert term.B is not None
    r = term.A.shape[0]
    if isinstance(e, float):
        scaled = e == term.e if isinstance(term.e, float) else False
    else:
        scaled = torch.equal(e[:r], torch.as_tensor(term.e, dtype=e.dtype, device=e.device).expand(r))
    if A.shape[0] > r:
        padding = A[r:].any() & B[r:].any()
        return scaled and not bool(padding) and _same(A[:r], term.A) and _same(B[:r], term.B.T)
    return scaled and _same(A, term.A) and _same(B, term.B.T)


def _same(a: Tensor, b: Tensor) -> bool:
    same_memory = a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    return same_memory or torch.equal(a, b)
