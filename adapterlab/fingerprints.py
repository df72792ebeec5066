"""Which weights are these? Checksums of content, since a tensor's version counter misses most real edits.

Content goes through xxh3 (128 bits, as fast as memory is read), names and shapes and those checksums through blake2b.
Nothing is remembered between calls: each one reads every byte anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from adapterlab.reading import AdapterReader, values

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

_QUANTISED = ("Linear8bitLt", "Linear4bit")
_BLOCK = 1024  # int64 words in a row of the checksum of tensors that are not on the CPU
_WORTH_THREADS = 8_000_000  # bytes; below, starting threads takes longer than reading
_MOST_THREADS = 4  # memory, not arithmetic, is what limits more of them


def adapter_digest(layers: Mapping[str, nn.Module], name: str) -> str:
    """Hex digest of an adapter's own tensors, scalings and kinds of layer; the adapter's name is no part of it.

    Every byte counts, and how the values lie in memory does not. `layers`: PEFT's layers by path. The base's weights
    inside them are left out.
    """
    return AdapterReader(layers, name).digest()


def column_digest(parts: Iterable[tuple[float, str]]) -> str:
    """Digest of a column from its (multiplier, adapter digest) pairs; one adapter at 1 keeps its own digest."""
    pairs = sorted(parts)
    if len(pairs) == 1 and pairs[0][0] == 1.0:
        return pairs[0][1]
    return hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Hex digest of bare tensors in their order, every byte."""
    return _combined((str(place), tensor) for place, tensor in enumerate(tensors))


def file_digest(path: Path) -> str | None:
    """Hex digest of a file's content, or None if it is not there any more."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return None


def base_digest(model: nn.Module) -> str:
    """Hex checksum of a bare model's weights, quantization statistics included; tens of milliseconds for 538 MB.

    On the CPU every byte counts. On other devices each tensor's bytes are laid in a grid there, 1024 words wide, and
    the sums of its rows and of its columns are hashed: any changed value is seen, and any exchange but one that keeps
    all those sums. Weights that accelerate holds elsewhere (meta tensors) can't be read and count by shape only.
    """
    found: dict[int, tuple[list[str], Tensor, Any]] = {}  # tied tensors once, under all their names
    wide: dict[int, Tensor] = {}
    for path, module in walk_modules(model):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is None:
                    continue
                layer = module if type(module).__name__ in _QUANTISED else None
                found.setdefault(id(tensor), ([], tensor, layer if key == "weight" else None))[0].append(
                    f"{path}.{key}"
                )
                if layer is not None and key == "bias":
                    wide[id(tensor)] = tensor.float()  # bitsandbytes widens it in place at the first forward
    # by name: PEFT's parametrised experts are registered anew after each forward, which changes their order
    named = sorted(
        (("=".join(sorted(names)), tensor, layer) for names, tensor, layer in found.values()), key=itemgetter(0)
    )
    return _combined(
        part for name, tensor, layer in named for part in _with_statistics(name, wide.get(id(tensor), tensor), layer)
    )


def no_ones_digest(digest: str) -> str:
    """A digest that no weights have, for what ran while they changed from those of `digest`."""
    return hashlib.blake2b(f"changed from {digest}".encode(), digest_size=16).hexdigest()


def walk_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, by its path, as `named_modules` gives them but in a fraction of the time."""
    found: dict[int, tuple[str, nn.Module]] = {}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in found:
            continue
        found[id(module)] = (path, module)
        before = f"{path}." if path else ""
        waiting += [(before + key, child) for key, child in reversed(module._modules.items()) if child is not None]
    return list(found.values())


def _with_statistics(key: str, tensor: Any, layer: Any) -> Iterator[tuple[str, Tensor]]:
    yield key, tensor.detach()
    state = getattr(tensor, "quant_state", None)
    for label, part in (("", state), ("nested_", getattr(state, "state2", None))):
        for statistic in ("absmax", "code", "offset"):
            value: Any = getattr(part, statistic, None)
            if hasattr(value, "dtype"):
                yield f"{key}.{label}{statistic}", value
    # bitsandbytes moves an 8-bit weight's row scales from the weight to the layer's state at its first forward
    scales = getattr(tensor, "SCB", None)
    if scales is None and layer is not None and hasattr(layer, "state"):
        scales = layer.state.SCB
    if scales is not None:
        yield f"{key}.SCB", scales


def _combined(labelled: Iterable[tuple[str, Tensor]]) -> str:
    parts = list(labelled)
    total = hashlib.blake2b(digest_size=16)
    for (label, tensor), checksum in zip(parts, _checksums([tensor for _, tensor in parts])):
        total.update(f"{label}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(checksum)
    return total.hexdigest()


def _checksums(tensors: Sequence[Tensor]) -> list[bytes]:
    """One checksum for each tensor. Large ones are read by several threads, as many as torch may use here."""
    import torch

    workers = min(_MOST_THREADS, torch.get_num_threads())
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    if workers == 1 or sum(sizes) < _WORTH_THREADS:
        return [_checksum(tensor) for tensor in tensors]
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for place in sorted(range(len(tensors)), key=lambda i: -sizes[i]):  # the largest first, to whom has least
        share = loads.index(min(loads))
        shares[share].append(place)
        loads[share] += sizes[place]
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda share: [_checksum(tensors[place]) for place in share], shares))
    found = {place: checksum for share, checksums in zip(shares, done) for place, checksum in zip(share, checksums)}
    return [found[place] for place in range(len(tensors))]


def _checksum(tensor: Tensor) -> bytes:
    import xxhash

    if tensor.device.type in ("cpu", "meta"):
        return xxhash.xxh3_128_digest(values(tensor))
    content = xxhash.xxh3_128()
    for sums in _block_sums(tensor):
        content.update(values(sums))
    return content.digest()


def _block_sums(tensor: Tensor) -> Iterator[Tensor]:
    """Row sums, column sums and what is left over of the tensor's bytes, computed where it lies."""
    import torch

    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // (8 * _BLOCK) * (8 * _BLOCK)
    grid = flat[:whole].view(torch.int64).view(-1, _BLOCK)
    yield from (grid.sum(dim=1), grid.sum(dim=0), flat[whole:])
