"""Keys and values that grow in place: appending a token copies that token and not the whole text so far."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

if TYPE_CHECKING:
    from torch import Tensor

_ROOM = 128  # positions that are made ready ahead, at most


class GrowingLayer(DynamicLayer):
    """transformers' own layer, which concatenates keys and values anew for each token, with room kept behind them.

    `keys` and `values`: (rows, heads, positions, width), views of what is kept. Who replaces them (selecting rows,
    reordering) is heeded: the next token finds them elsewhere and moves in there. most: positions there will ever be.
    """

    keys: Tensor
    values: Tensor
    _kept: tuple[Tensor, Tensor] | None = None

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most = most

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        have = self.get_seq_length()
        end = have + key_states.shape[-2]
        if not self._has_room(end, key_states.shape[0]):
            length = end + _ROOM if self.most is None or self.most < end else min(end + _ROOM, self.most)
            self._kept = (_moved(self.keys, key_states, have, length), _moved(self.values, value_states, have, length))
        assert self._kept is not None  # it has room now
        for kept, states in zip(self._kept, (key_states, value_states)):
            kept[:, :, have:end].copy_(states)
        keys, values = self._kept
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _has_room(self, end: int, rows: int) -> bool:
        if self._kept is None:
            return False
        keys, values = self._kept
        here = (self.keys.data_ptr(), self.values.data_ptr()) == (keys.data_ptr(), values.data_ptr())
        return here and len(keys) == rows and end <= keys.shape[2]

    def reset(self) -> None:
        self._kept = None
        super().reset()


def _moved(old: Tensor, new: Tensor, have: int, length: int) -> Tensor:
    rows, heads, _, width = new.shape
    kept = new.new_empty(rows, heads, length, width)
    if have:
        kept[:, :, :have].copy_(old)
    return kept


def let_grow(cache: Any, most: int | None = None) -> None:
    """Give an empty cache of transformers' growing layers; layers of other kinds (sliding windows, …) stay as they are.

    most: how many positions the text can come to, if that is known.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if type(cache) is not DynamicCache or cache.get_seq_length():
        return
    make = functools.partial(GrowingLayer, most)
    cache.layers = [make() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = make
