"""Which weights are these? Checksums of content, since a tensor's version counter misses most real edits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

_BLOCK = 1024  # int64 words in a row of the base's checksum


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


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Hex digest of bare tensors in their order, every byte."""
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        total.update(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def adapter_tensors(layer: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that adapter `name` owns in one of PEFT's layers, keyed without the name, in a fixed order."""
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    for key in sorted(own):
        words = key.split(".")
        of_base = words[0] in ("base_layer", "original_module") or "base_layer" in words
        if name in words and not of_base:
            yield ".".join(word for word in words if word != name), own[key].detach()


def file_digest(path: Path) -> str | None:
    """Hex digest of a file's content, or None if it is not there any more."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return None


def base_digest(model: nn.Module) -> str:
    """Hex checksum of a bare model's weights, quantization statistics included.

    Each tensor's bytes are laid in a grid, 1024 words wide; the sums of its rows and of its columns are hashed. Any
    changed value is seen, and any exchange but one that keeps all those sums. Tens of milliseconds for 538 MB.
    """
    total = hashlib.blake2b(digest_size=16)
    statistics = {id(module.weight): module for module in model.modules() if type(module).__name__ == "Linear8bitLt"}
    # by name: PEFT's parametrised experts are registered anew after each forward, which changes their order
    for key, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        for label, part in _with_statistics(key, tensor, statistics.get(id(tensor))):
            total.update(f"{label}|{part.dtype}|{tuple(part.shape)}|".encode())
            for sums in _block_sums(part):
                total.update(sums)
    return total.hexdigest()


def _with_statistics(key: str, tensor: Any, layer: Any) -> Iterator[tuple[str, Tensor]]:
    yield key, tensor.detach()
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        yield f"{key}.absmax", state.absmax
        if getattr(state, "state2", None) is not None:
            yield f"{key}.nested_absmax", state.state2.absmax
    # bitsandbytes moves an 8-bit weight's row scales from the weight to the layer's state at its first forward
    scales = getattr(tensor, "SCB", None)
    if scales is None and layer is not None:
        scales = layer.state.SCB
    if scales is not None:
        yield f"{key}.SCB", scales


def _block_sums(tensor: Tensor) -> Iterator[Any]:
    import torch

    if tensor.device.type == "meta":
        yield b"meta"  # offloaded by accelerate: not resident, so its content can't be read here
        return
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // (8 * _BLOCK) * (8 * _BLOCK)
    grid = flat[:whole].view(torch.int64).view(-1, _BLOCK)
    for part in (grid.sum(dim=1), grid.sum(dim=0), flat[whole:]):
        yield _bytes(part)


def _bytes(tensor: Tensor) -> Any:
    """The tensor's content as a buffer, without a copy where it lies on the CPU."""
    import torch

    if tensor.device.type == "meta":
        return b"meta"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
