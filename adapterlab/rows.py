"""One batch, one adapter per row: base and every adapter generated together, for one read of W per token.

    y = s_out ⊙ [ W (s_in ⊙ x) + ((x Aᵀ) ⊙ e) Bᵀ ] + c          per column, W shared by all

The rows of one column lie together, so `x.view(columns, prompts · time, hidden)` lines up with A stacked as
(columns, r, in). Two `bmm` a layer, whatever the number of adapters (Punica, Chen et al. 2023, has the idea for LoRA).
The number of rows comes from the run and never from x.shape: OPT's fc1 and MoE gates get (batch · time, hidden).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterlab.equation import Term, blend_obstacle, compute_term
from adapterlab.fingerprints import column_digest, tensors_digest

if TYPE_CHECKING:
    from adapterlab.columns import Column
    from adapterlab.mounts import Mounts


class RowsError(Exception):
    """A layer got an input whose rows can't be told apart; the columns then run in turn."""


class Rows:
    """The layout of one batch, column by column, and the layers that read it.

    columns: all of the batch; `live`: indices of those still in it. prompts: rows of each live column.
    lengths: how many positions a row may have in one forward. weights: (path, A, B) stay PEFT's own where they can.
    """

    def __init__(self, mounts: Mounts, columns: Sequence[Column], prompts: int, lengths: set[int]) -> None:
        self.columns, self.prompts, self.lengths = list(columns), prompts, lengths
        self.live = list(range(len(self.columns)))
        self.layers = self._build(mounts)

    @torch.no_grad()
    def _build(self, mounts: Mounts) -> dict[str, RowLayer]:
        layers = {}
        paths = {path for column in self.columns for name in column.names for path in mounts.adapters[name].layers}
        for path in sorted(paths):
            terms = [
                [
                    compute_term(mounts.adapters[name].layers[path], name, multiplier)
                    for name, multiplier in column.parts
                    if path in mounts.adapters[name].layers
                ]
                for column in self.columns
            ]
            layers[path] = RowLayer(self, mounts.sites[path].original, terms)
        return layers

    def keep(self, done: Sequence[bool]) -> list[int] | None:
        """Which rows of the batch stay, given which are done; None for all. Whole columns and whole prompts leave.

        Call `select` with the same flags' result applied to the model's cache and inputs.
        """
        count = self.prompts
        grid = [list(done[i * count : (i + 1) * count]) for i in range(len(self.live))]
        columns = [i for i, row in enumerate(grid) if not all(row)]
        prompts = [j for j in range(count) if not all(row[j] for row in grid)]
        if len(columns) == len(self.live) and len(prompts) == count:
            return None
        self.live, self.prompts = [self.live[i] for i in columns], len(prompts)
        for layer in self.layers.values():
            layer.select(columns)
        return [i * count + j for i in columns for j in prompts]

    def split(self, x: Tensor) -> Tensor:
        """x as (columns, prompts · positions, features); raises `RowsError` where the rows can't be told apart."""
        rows = len(self.live) * self.prompts
        positions, rest = divmod(x[..., 0].numel(), rows)
        if rest or positions not in self.lengths or (x.dim() > 2 and x.shape[0] != rows):
            raise RowsError(f"an input of shape {tuple(x.shape)} does not hold {rows} rows")
        return x.reshape(len(self.live), -1, x.shape[-1])

    @torch.no_grad()
    def proof(self, place: int, mounts: Mounts, base: str, digests: Mapping[str, str]) -> tuple[dict[str, float], str]:
        """Who acts in column `place`, and the digest of the tensors its rows will really read.

        The stacks are compared with the adapters' own tensors: where they are equal, the adapters' `digests` stand for
        them; where somebody exchanged or changed them, their own content is hashed, which equals nobody's.
        """
        column = self.columns[place]
        if column.is_base:
            touched = [path for path, layer in self.layers.items() if layer.acts(place)]
            return ({}, base) if not touched else ({"?": 1.0}, self._stacked_digest(place))
        parts = [(m, mounts.adapters[name].layers, name) for name, m in column.parts]
        for path, layer in self.layers.items():
            terms = [compute_term(layers[path], name, m) for m, layers, name in parts if path in layers]
            if not layer.holds(place, terms):
                return column.as_dict(), self._stacked_digest(place)
        return column.as_dict(), column_digest((m, digests[name]) for name, m in column.parts)

    def _stacked_digest(self, place: int) -> str:
        return tensors_digest(tensor for path in sorted(self.layers) for tensor in self.layers[path].own(place))

    @contextlib.contextmanager
    def mounted(self, mounts: Mounts) -> Iterator[Rows]:
        """These layers in the bare base; afterwards the bare base again."""
        try:
            for path, layer in self.layers.items():
                site = mounts.sites[path]
                site.parent._modules[site.child] = layer
            yield self
        finally:
            for path in self.layers:
                site = mounts.sites[path]
                site.parent._modules[site.child] = site.original


class RowLayer(nn.Module):
    """Stands in for one module of the base while a batch runs; `weight` and `bias` are the base module's."""

    rows: Rows
    base_layer: nn.Module

    def __init__(self, rows: Rows, base_layer: nn.Module, terms: list[list[Term]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        object.__setattr__(self, "rows", rows)
        self.s_in = _stack([[t.s_in for t in column if t.s_in is not None] for column in terms], 1.0, Tensor.mul_)
        self.s_out = _stack([[t.s_out for t in column if t.s_out is not None] for column in terms], 1.0, Tensor.mul_)
        self.extra = _stack([[t.bias for t in column if t.bias is not None] for column in terms], 0.0, Tensor.add_)
        self.low = _stack_factors([[t for t in column if t.A is not None] for column in terms])

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @torch.no_grad()
    def select(self, columns: list[int]) -> None:
        """Go on with these columns only, as indices into those there are now."""
        for name in ("s_in", "s_out", "extra"):
            stack = getattr(self, name)
            setattr(self, name, None if stack is None else stack[columns])
        if self.low is not None:
            first, A, e, B = self.low
            inside = [i for i in columns if first <= i < first + len(A)]
            picked = [i - first for i in inside]
            where = columns.index(inside[0]) if inside else 0
            self.low = (where, A[picked], e[picked], B[picked]) if inside else None

    def own(self, place: int) -> list[Tensor]:
        """What column `place` has here: its scales, its bias, and its factors A, e, B; ones and zeros included."""
        found = [stack[place] for stack in (self.s_in, self.s_out, self.extra) if stack is not None]
        if self.low is not None and 0 <= place - self.low[0] < len(self.low[1]):
            found += [stack[place - self.low[0]] for stack in self.low[1:]]
        return found

    def acts(self, place: int) -> bool:
        """Whether anything here changes column `place`."""
        return not self.holds(place, [])

    def holds(self, place: int, terms: list[Term]) -> bool:
        """Whether column `place` has exactly these terms here."""
        alone = RowLayer(self.rows, self.base_layer, [terms])
        pairs = [(self.s_in, alone.s_in, 1.0), (self.s_out, alone.s_out, 1.0), (self.extra, alone.extra, 0.0)]
        for mine, theirs, neutral in pairs:
            have = None if mine is None else mine[place]
            want = None if theirs is None else theirs[0]
            if not _same(have, want, neutral):
                return False
        inside = self.low is not None and 0 <= place - self.low[0] < len(self.low[1])
        have_low = [stack[place - self.low[0]] for stack in self.low[1:]] if inside and self.low is not None else None
        if alone.low is None:
            return have_low is None or not bool((have_low[1] != 0).any())
        if have_low is None:
            return False
        A, e, B = (stack[0] for stack in alone.low[1:])
        r = A.shape[0]
        fits = (
            torch.equal(have_low[0][:r], A) and torch.equal(have_low[1][:, :r], e) and torch.equal(have_low[2][:r], B)
        )
        return fits and not bool((have_low[1][:, r:] != 0).any())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.rows.split(x)
        inner = x if self.s_in is None else (rows * self.s_in).to(x.dtype).reshape(x.shape)
        y = self.base_layer(inner, *args, **kwargs)
        if not y.is_contiguous():
            y = y.contiguous()
        out = y.view(len(rows), -1, y.shape[-1])
        if self.low is not None:
            first, A, e, B = self.low
            part, mine = out[first : first + len(A)], rows[first : first + len(A)]
            low = torch.bmm(mine.to(A.dtype), A.mT).mul_(e)
            if part.dtype == low.dtype:
                part.baddbmm_(low, B)
            else:
                part.copy_(part + torch.bmm(low, B))
        if self.s_out is not None:
            out.mul_(self.s_out)
        if self.extra is not None:
            out.add_(self.extra)
        return y


def _same(have: Tensor | None, want: Tensor | None, neutral: float) -> bool:
    if have is None:
        return want is None
    return bool((have == neutral).all()) if want is None else torch.equal(have, want)


def _stack(columns: list[list[Tensor]], neutral: float, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """(columns, 1, features): each column's vectors joined in place, `neutral` where it has none; None if nobody has any."""
    like = next((vector for column in columns for vector in column), None)
    if like is None:
        return None
    stack = torch.full((len(columns), 1, like.shape[-1]), neutral, dtype=like.dtype, device=like.device)
    for place, column in zip(stack, columns):
        for vector in column:
            join(place, vector)
    return stack


def _stack_factors(columns: list[list[Term]]) -> tuple[int, Tensor, Tensor, Tensor] | None:
    """(first column, A: (n, r, in), e: (n, 1, r), B: (n, r, out)) for the span of columns that have any.

    B lies transposed: a batch of vectors times it is what a CPU does fastest. Ranks are padded with zeros to the largest;
    a blend's factors lie behind one another. One adapter at several multipliers is spread without a copy.
    """
    having = [i for i, column in enumerate(columns) if column]
    if not having:
        return None
    span = columns[having[0] : having[-1] + 1]
    ranks = [sum(_rank(term) for term in column) for column in span]
    like = columns[having[0]][0]
    assert like.A is not None  # `columns` holds terms with factors only
    assert like.B is not None
    n, r = len(span), max(ranks)
    e = torch.zeros(n, 1, r, dtype=like.A.dtype, device=like.A.device)
    for i, column in enumerate(span):
        at = 0
        for term in column:
            e[i, 0, at : at + _rank(term)] = term.e
            at += _rank(term)
    shared = {(id(term.A), id(term.B)) for column in span for term in column}
    if len(shared) == 1 and all(len(column) == 1 for column in span):
        return having[0], like.A.detach().expand(n, -1, -1), e, like.B.detach().T.expand(n, -1, -1)
    A = torch.zeros(n, r, like.A.shape[1], dtype=like.A.dtype, device=like.A.device)
    B = torch.zeros(n, r, like.B.shape[0], dtype=like.B.dtype, device=like.B.device)
    for i, column in enumerate(span):
        at = 0
        for term in column:
            r = _rank(term)
            A[i, at : at + r].copy_(term.A)  # type: ignore[arg-type]
            B[i, at : at + r].copy_(term.B.T)  # type: ignore[union-attr]
            at += r
    return having[0], A, e, B


def _rank(term: Term) -> int:
    assert term.A is not None  # only terms with factors are asked
    return term.A.shape[0]


def row_obstacle(mounts: Mounts, column: Column) -> str | None:
    """Why `column` can't be rows of a batch, or None if it can."""
    for name in column.names:
        for path, layer in mounts.adapters[name].layers.items():
            reason = blend_obstacle(layer, name)
            if reason:
                return reason
            if isinstance(mounts.sites[path].original, nn.Embedding):
                return "it adapts an embedding"
            if ".experts." in path:
                return "it adapts experts, which see a part of the tokens only"
    return None


def model_obstacle(model: Any) -> str | None:
    """Why no columns of this model can share a batch, or None if they can."""
    devices = getattr(model, "hf_device_map", None) or {}
    if len(set(map(str, devices.values()))) > 1:
        return "the model is spread over several devices"
    for module in model.modules():
        state: Any = getattr(module, "state", None)
        if type(module).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0.0) > 0:
            return (
                f"8-bit layers at llm_int8_threshold={state.threshold:g} let the rows of a batch leak into each other"
            )
    return None
