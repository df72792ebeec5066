"""One batch, one adapter per row: base and every adapter generated together, for one read of W per token.

    y = s_out ⊙ [ W (s_in ⊙ x) + ((x Aᵀ) ⊙ e) Bᵀ ] + c          per column, W shared by all (terms: equation.py)

The rows of one column lie together, so `x.view(columns, prompts · time, hidden)` lines up with A stacked as
(columns, r, in). Two `bmm` a layer, whatever the number of adapters (Punica, Chen et al. 2023, has the idea for LoRA).
The number of rows comes from the run and never from x.shape: OPT's fc1 and MoE gates get (batch · time, hidden).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterlab.equation import Term, blend_obstacle, compute_dora, compute_term, is_dora
from adapterlab.fingerprints import column_digest, tensors_digest
from adapterlab.guards import put_back
from adapterlab.spans import Part, Span, find_place, is_term, make_spans

if TYPE_CHECKING:
    from adapterlab.columns import Column
    from adapterlab.mounts import Mounts


class RowsError(Exception):
    """A layer got an input whose rows can't be told apart; the columns then run in turn."""


class Rows:
    """The layout of one batch, column by column, and the layers that read it.

    columns: all of the batch; `live`: indices of those still in it. prompts: rows of each live column.
    lengths: how many positions a row may have in one forward. base, digests: of the weights as they are now,
    the base's and by adapter; what was computed from the same weights for an earlier batch is not computed again.
    """

    def __init__(
        self,
        mounts: Mounts,
        columns: Sequence[Column],
        prompts: int,
        lengths: set[int],
        base: str = "",
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.columns, self.prompts, self.lengths = list(columns), prompts, lengths
        self.base, self.digests = base, digests or {}
        self.live = list(range(len(self.columns)))
        self._known: set[torch.Size] = set()  # shapes of inputs whose rows were told apart
        self.layers = self._find(mounts)

    def _find(self, mounts: Mounts) -> dict[str, RowLayer]:
        """The layers of an earlier batch of these columns, if the weights are what they were, and new ones otherwise."""
        names = sorted({name for column in self.columns for name in column.names})
        weights = {"": self.base, **{name: self.digests.get(name, "") for name in names}}
        batches = mounts.stacks.batches
        layers = batches.find(tuple(self.columns), weights)
        if layers is None or not all(layer.stands(mounts.sites[path].original) for path, layer in layers.items()):
            layers = self._build(mounts, names)
            batches.put(tuple(self.columns), weights, layers)
        for layer in layers.values():
            layer.begin(self)
        return layers

    @torch.no_grad()
    def _build(self, mounts: Mounts, names: Sequence[str]) -> dict[str, RowLayer]:
        layers = {}
        for path in sorted({path for name in names for path in mounts.adapters[name].layers}):
            here = {name: mounts.adapters[name].layers[path] for name in names if path in mounts.adapters[name].layers}
            if len(here) > 1:
                mounts.arrange(path)
            places = {name: find_place(mounts.stacks, path, layer, name) for name, layer in here.items()}
            parts = [
                [Part(self._term(mounts, path, name, m), *places[name]) for name, m in column.parts if name in here]
                for column in self.columns
            ]
            layers[path] = RowLayer(mounts.sites[path].original, parts)
        return layers

    def _term(self, mounts: Mounts, path: str, name: str, multiplier: float) -> Term:
        layer = mounts.adapters[name].layers[path]
        if not is_dora(layer, name):
            return compute_term(layer, name, multiplier)
        made_of = (self.base, self.digests.get(name, ""))
        kept = mounts.stacks.norms.get((path, name))
        if kept is None or kept[0] != made_of or "" in made_of:
            kept = mounts.stacks.norms[path, name] = (made_of, compute_dora(layer, name))
        return kept[1]

    def keep(self, done: Sequence[bool]) -> list[int] | None:
        """Which rows of the batch stay, given which are done; None for all. Whole columns and whole prompts leave.

        The caller leaves the same rows in the model's cache and inputs. Nothing is copied here but vectors.
        """
        count = self.prompts
        grid = [list(done[i * count : (i + 1) * count]) for i in range(len(self.live))]
        columns = [i for i, row in enumerate(grid) if not all(row)]
        prompts = [j for j in range(count) if not all(row[j] for row in grid)]
        if len(columns) == len(self.live) and len(prompts) == count:
            return None
        if len(columns) < len(self.live):
            for layer in self.layers.values():
                layer.select(columns)
        self.live, self.prompts = [self.live[i] for i in columns], len(prompts)
        self._known.clear()
        return [i * count + j for i in columns for j in prompts]

    def split(self, x: Tensor) -> Tensor:
        """x as (columns, prompts · positions, features); raises `RowsError` where the rows can't be told apart."""
        if x.shape not in self._known:
            rows = len(self.live) * self.prompts
            positions, rest = divmod(x.numel() // x.shape[-1], rows)
            if rest or positions not in self.lengths or (x.dim() > 2 and x.shape[0] != rows):
                raise RowsError(f"an input of shape {tuple(x.shape)} does not hold {rows} rows")
            self._known.add(x.shape)
        if x.dim() == 3 and x.shape[0] == len(self.live):
            return x
        return x.reshape(len(self.live), -1, x.shape[-1])

    @torch.no_grad()
    def proof(self, place: int, mounts: Mounts) -> tuple[dict[str, float], str]:
        """Who acts in column `place`, and the digest of the tensors its rows will really read.

        What the layers hold is compared with the adapters' own tensors: where it is theirs, the adapters' digests
        stand for it; where somebody exchanged or changed it, its content is hashed, which equals nobody's.
        """
        column = self.columns[place]
        if column.is_base:
            touched = [path for path, layer in self.layers.items() if not layer.holds(place, [])]
            return ({}, self.base) if not touched else ({"?": 1.0}, self._own_digest(place))
        parts = [(m, mounts.adapters[name].layers, name) for name, m in column.parts]
        for path, layer in self.layers.items():
            terms = [self._term(mounts, path, name, m) for m, layers, name in parts if path in layers]
            if not layer.holds(place, terms):
                return column.as_dict(), self._own_digest(place)
        return column.as_dict(), column_digest((m, self.digests[name]) for name, m in column.parts)

    def _own_digest(self, place: int) -> str:
        return tensors_digest(tensor for path in sorted(self.layers) for tensor in self.layers[path].own(place))

    @contextlib.contextmanager
    def mounted(self, mounts: Mounts) -> Iterator[Rows]:
        """These layers in the bare base; afterwards the bare base again."""
        sites = {path: mounts.sites[path] for path in self.layers}

        def undo() -> None:
            for site in sites.values():
                site.parent._modules[site.child] = site.original

        with put_back(undo):
            for path, layer in self.layers.items():
                sites[path].parent._modules[sites[path].child] = layer
            yield self


class RowLayer(nn.Module):
    """Stands in for one module of the base while a batch runs; `weight` and `bias` are the base module's."""

    rows: Rows
    base_layer: nn.Module
    parts: list[list[Part]]  # of the live columns
    spans: list[Span]
    s_in: Tensor | None
    s_out: Tensor | None
    extra: Tensor | None

    def __init__(self, base_layer: nn.Module, parts: list[list[Part]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        terms = [[part.term for part in column] for column in parts]
        self._whole: dict[str, Any] = {
            "parts": parts,
            "spans": make_spans(parts),
            "s_in": _stack([[t.s_in for t in column if t.s_in is not None] for column in terms], 1.0, Tensor.mul_),
            "s_out": _stack([[t.s_out for t in column if t.s_out is not None] for column in terms], 1.0, Tensor.mul_),
            "extra": _stack([[t.bias for t in column if t.bias is not None] for column in terms], 0.0, Tensor.add_),
        }

        self._pointers = self._where()

    def _where(self) -> list[int]:
        """Where the adapters' parameters lie."""
        terms = [part.term for column in self._whole["parts"] for part in column]
        return [side.data_ptr() for term in terms for side in (term.A, term.B) if side is not None]

    def stands(self, base_layer: nn.Module) -> bool:
        """Whether this layer still reads the parameters that it was made of, and stands in for `base_layer`."""
        return self.base_layer is base_layer and self._where() == self._pointers

    def begin(self, rows: Rows) -> None:
        """A batch of all the columns is to run, `rows`."""
        object.__setattr__(self, "rows", rows)
        self.training = self.base_layer.training
        self.__dict__.update(self._whole)  # not registered as modules or buffers: they are the adapters'

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
        self.parts = [self.parts[i] for i in columns]
        self.spans = make_spans(self.parts)

    def own(self, place: int) -> list[Tensor]:
        """What column `place` has here: its scales, its bias, and its factors A, e, B; ones and zeros included."""
        found = [stack[place] for stack in (self.s_in, self.s_out, self.extra) if stack is not None]
        for A, e, B in self._factors(place):
            found += [A, torch.as_tensor(e), B]
        return found

    def _factors(self, place: int) -> list[tuple[Tensor, float | Tensor, Tensor]]:
        """(A, e, B) of each span that column `place` is in, as the forward reads them."""
        found = []
        for span in self.spans:
            if span.first <= place < span.end:
                i = place - span.first
                e = span.e if isinstance(span.e, float) else span.e[i, 0]
                found.append((span.A[i], e, span.B[i]))
        return found

    def holds(self, place: int, terms: list[Term]) -> bool:
        """Whether column `place` has exactly these terms here."""
        for stack, vectors, neutral, join in (
            (self.s_in, [t.s_in for t in terms if t.s_in is not None], 1.0, Tensor.mul_),
            (self.s_out, [t.s_out for t in terms if t.s_out is not None], 1.0, Tensor.mul_),
            (self.extra, [t.bias for t in terms if t.bias is not None], 0.0, Tensor.add_),
        ):
            if stack is None and not vectors:
                continue
            want = _stack([vectors], neutral, join)
            have = None if stack is None else stack[place]
            if have is None or not (bool((have == neutral).all()) if want is None else torch.equal(have, want[0])):
                return False
        factors = [term for term in terms if term.A is not None and len(term.A)]
        have_factors = self._factors(place)
        return len(factors) == len(have_factors) and all(
            is_term(term, *found) for term, found in zip(factors, have_factors)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.rows.split(x)
        inner = x if self.s_in is None else (rows * self.s_in).to(x.dtype).reshape(x.shape)
        y: Tensor = self._modules["base_layer"](inner, *args, **kwargs)  # type: ignore[misc]  # found faster than by name
        if not y.is_contiguous():
            y = y.contiguous()
        out = y if rows is x else y.view(rows.shape[0], -1, y.shape[-1])
        for span in self.spans:
            part, mine = out, rows
            if span.A.shape[0] < rows.shape[0]:  # len(tensor) would take ten times as long
                part, mine = out[span.first : span.end], rows[span.first : span.end]
            low = torch.bmm(mine.to(span.A.dtype), span.A.mT)
            alpha = 1.0
            if isinstance(span.e, float):
                alpha = span.e
            else:
                low.mul_(span.e)
            if part.dtype == low.dtype:
                part.baddbmm_(low, span.B, alpha=alpha)
            else:
                part.copy_(part + torch.bmm(low, span.B) * alpha)
        if self.s_out is not None:
            out.mul_(self.s_out)
        if self.extra is not None:
            out.add_(self.extra)
        return y


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


def row_obstacle(mounts: Mounts, column: Column) -> str | None:
    """Why `column` can't be rows of a batch, or None if it can."""
    for name in column.names:
        reason = adapter_row_obstacle(mounts, name, mounts.adapters[name].layers, alone=column.single is not None)
        if reason is not None:
            return reason
    return None


def adapter_row_obstacle(mounts: Mounts, name: str, layers: Mapping[str, nn.Module], *, alone: bool) -> str | None:
    """The same for these layers of one adapter. alone: it is the column's only one, at multiplier 1."""
    for path, layer in layers.items():
        reason = blend_obstacle(layer, name)
        if reason and not (alone and is_dora(layer, name)):
            return reason
        if isinstance(mounts.sites[path].original, nn.Embedding):
            return "it adapts an embedding"
        if ".experts." in path:
            return "it adapts experts, which see a part of the tokens only"
    return None


# Model types whose rows `Rows.split` could take for positions, without an error.
_MIXED = {
    "fsmt": "FSMT puts time before rows, where they can't always be told apart",
    "rwkv": "transformers' RWKV mixes the rows of a batch",
}


def is_spread(model: Any) -> bool:
    """Whether accelerate has placed the model's parts on several devices, the disk being one."""
    devices = getattr(model, "hf_device_map", None) or {}
    return len(set(map(str, devices.values()))) > 1


def model_obstacle(model: Any, packed: Iterable[nn.Module] | None = None) -> str | None:
    """Why no columns of this model can share a batch, or None if they can. packed: its quantised layers, if known."""
    if is_spread(model):
        return "the model is spread over several devices"
    if (mixed := _MIXED.get(model.config.model_type)) is not None:
        return mixed
    for module in model.modules() if packed is None else packed:
        if type(module).__name__ != "Linear8bitLt":
            continue
        threshold = getattr(module.state, "threshold", 0.0)
        if threshold > 0:
            return f"8-bit layers at llm_int8_threshold={threshold:g} let the rows of a batch leak into each other"
    return None
