"""Which weights are these? Checksums of content, since a tensor's version counter misses most real edits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_BLOCK = 1024  # int64 words summed at a time in the base's checksum


def adapter_digest(layers: Mapping[str, nn.Module], name: str) -> str:
    """Hex digest of an adapter's own tensors and scalings; the adapter's name is no part of it.

    Every byte counts. `layers`: PEFT's layers by path. The base's weights inside them are left out.
    """
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(layers):
        layer: Any = layers[path]
        for key, tensor in adapter_tensors(layer, name):
            total.update(f"{path}|{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            total.update(_bytes(tensor))
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and name in scaling:
            total.update(f"{path}|scaling|{scaling[name]!r}|".encode())
    return total.hexdigest()


def column_digest(parts: Iterable[tuple[float, str]]) -> str:
    """Digest of a column from its (multiplier, adapter digest) pairs; one adapter at 1 keeps its own digest."""
    pairs = sorted(parts)
    if len(pairs) == 1 and pairs[0][0] == 1.0:
        return pairs[0][1]
    return hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()


def adapter_tensors(layer: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that adapter `name` owns in one of PEFT's layers, keyed without the name, in a fixed order."""
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    for key in sorted(own):
        words = key.split(".")
        if words[0] not in ("base_layer", "original_module", "token_adapter") and name in words:
            yield ".".join(word for word in words if word != name), own[key].detach()
        elif words[0] == "token_adapter" and name in words and "base_layer" not in words:
            yield ".".join(word for word in words if word != name), own[key].detach()


def base_digest(model: nn.Module) -> str:
    """Hex checksum of a bare model's weights, quantization statistics included.

    Sums of 8 kB blocks, hashed in order: any changed value is seen, and so are exchanged rows or tensors; only an
    exchange of 8-byte words inside one block is not. About 20 ms for 538 MB.
    """
    total = hashlib.blake2b(digest_size=16)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        for label, part in _with_statistics(key, tensor):
            total.update(f"{label}|{part.dtype}|{tuple(part.shape)}|".encode())
            total.update(_block_sums(part))
    return total.hexdigest()


def _with_statistics(key: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    yield key, tensor.detach()
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        yield f"{key}.absmax", state.absmax
        if getattr(state, "state2", None) is not None:
            yield f"{key}.nested_absmax", state.state2.absmax
    if getattr(tensor, "SCB", None) is not None:
        yield f"{key}.SCB", tensor.SCB


def _block_sums(tensor: Tensor) -> bytes:
    import torch

    if tensor.device.type == "meta":
        return b"meta"  # offloaded by accelerate: not resident, so its content can't be read here
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // (8 * _BLOCK) * (8 * _BLOCK)
    sums = flat[:whole].view(torch.int64).view(-1, _BLOCK).sum(dim=1)
    return _bytes(sums) + _bytes(flat[whole:])


def _bytes(tensor: Tensor) -> bytes:
    import torch

    if tensor.device.type == "meta":
        return b"meta"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
