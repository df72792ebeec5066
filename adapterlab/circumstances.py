"""Everything that decides an answer, as a key: the weights by their content, and what stands around them.

Where two comparisons have equal keys, the model would do the same work again. What can't be told so gives no key.
"""

from __future__ import annotations

import enum
import hashlib
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.fingerprints import column_digest, walk_modules

if TYPE_CHECKING:
    from torch import nn

    from adapterlab.adapters import Adapters
    from adapterlab.columns import Column
    from adapterlab.settings import Settings


@dataclass(frozen=True)
class Keys:
    """Names what one comparison may find or leave: everything that decides an answer but column and prompt is in it."""

    base: str  # digest of the base's weights
    digests: Mapping[str, str]  # of the adapters' weights
    configs: Mapping[str, str]  # of the adapters: on these, methods that run in turn may hang
    model: str  # config and modules of the base, where and how it computes
    decoding: str  # settings, special tokens, tokenizer
    tokens: str  # special tokens alone: with which a decoder starts

    @classmethod
    def of(
        cls, adapters: Adapters, tokenizer: Any, settings: Settings, base: str, digests: Mapping[str, str]
    ) -> Keys | None:
        """The keys of a comparison on the bare model as it stands, its generation config the one of the run. `base` and
        `digests` were just read. None if something that decides the answers can't be told: hooks, replaced `forward`s,
        weights held elsewhere, settings that are no plain values."""
        model = adapters.model
        modules = describe_modules(model)
        if modules is None:
            return None
        try:
            asked = plain([getattr(settings, name) for name in settings.__dataclass_fields__])
        except TypeError:
            return None
        tokens = model.generation_config.to_dict()
        return cls(
            base=base,
            digests=digests,
            configs={name: repr(adapters.mounts.adapters[name].config) for name in digests},
            model=_digest(modules, repr(model.config.to_dict()), _circumstances(model)),
            decoding=_digest(repr(asked), repr(tokens), _tokenizer(tokenizer)),
            tokens=_digest(repr(tokens)),
        )

    def generation(self, column: Column, prompt_ids: Iterable[int]) -> str:
        """The name of the answer of `column`. Names and order of its adapters are part of it: they make the label."""
        parts = [(name, m, self.digests[name], self.configs[name]) for name, m in column.parts]
        return _digest("generation", self.base, self.model, self.decoding, repr(parts), repr(tuple(prompt_ids)))

    def first_logits(self, prompt_ids: Iterable[int]) -> str:
        """The name of the base's unprocessed logits after the prompt."""
        return _digest("first logits", self.base, self.model, self.tokens, repr(tuple(prompt_ids)))

    def weights(self, column: Column) -> str:
        """The digest that an answer of `column` must carry."""
        return column_digest((m, self.digests[name]) for name, m in column.parts) if column.parts else self.base


def describe_modules(model: nn.Module) -> str | None:
    """What the model's modules are besides their weights: kinds, numbers, switches. None if their outputs can't be told
    from that: forward hooks, a `forward` put on one module, weights that accelerate holds elsewhere. Methods that were
    exchanged in a class are not looked for."""
    import torch
    from torch.nn.modules import module as of_all_modules

    if of_all_modules._global_forward_hooks or of_all_modules._global_forward_pre_hooks:
        return None
    known = (int, float, str, torch.dtype)  # bool is an int
    parts: list[Any] = []
    for path, module in walk_modules(model):
        if has_foreign_forward(module) or any(p is not None and p.is_meta for p in module._parameters.values()):
            return None
        own = [
            (key, value)
            for key, value in module.__dict__.items()
            if key[0] != "_" and key != "training" and isinstance(value, known)
        ]
        parts.append((path, type(module).__qualname__, own))
        if "state" in module.__dict__:  # bitsandbytes' 8-bit layers
            parts.append(getattr(module.state, "threshold", None))
    return repr(parts)


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether a hook, or a `forward` of its own, can change what this module gives. Those of accelerate, which move
    tensors, of transformers, which record them or ask for gradients, and the lab's own do not."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if hooks and not all(
            str(getattr(hook, "__module__", "")).startswith(("transformers.", "adapterlab.")) for hook in hooks.values()
        ):
            return True
    return "forward" in module.__dict__ and "_hf_hook" not in module.__dict__


def plain(value: Any) -> Any:
    """`value` out of plain Python parts, so that equal ones have equal `repr`. Raises TypeError for any other object."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {"mapping": sorted(((plain(key), plain(item)) for key, item in value.items()), key=repr)}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((plain(item) for item in value), key=repr)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no plain form")


def _circumstances(model: Any) -> str:
    import torch

    kinds = ("cpu", "cuda")
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    where = (str(model.device), getattr(model, "hf_device_map", None), model.dtype)
    attention = getattr(model.config, "_attn_implementation", None)
    return repr((autocast, torch.get_float32_matmul_precision(), where, attention))


def _tokenizer(tokenizer: Any) -> str:
    """The tokenizer is the lab's own and stays; what a cell may change of it is here."""
    changeable = ("special_tokens_map", "clean_up_tokenization_spaces", "padding_side")
    return repr((len(tokenizer), [str(getattr(tokenizer, name, None)) for name in changeable]))


def _digest(*texts: str) -> str:
    total = hashlib.blake2b(digest_size=16)
    for text in texts:
        total.update(f"{len(text)}|".encode())
        total.update(text.encode(errors="surrogatepass"))
    return total.hexdigest()
