"""Where a module stands, in two words: `model.layers.3.self_attn.q_proj` is layer 3, module q_proj."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERED = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_and_module(paths: Sequence[str]) -> list[tuple[int | None, str]]:
    """(layer, module) for each path: its first number, None without one, and the shortest ending of the rest that tells
    all paths apart: usually the last name, `fc.q` and `self.q` where two layers have a `q` each."""
    layers, names = [], []
    for path in paths:
        match = _NUMBERED.search(path)
        layers.append(int(match.group(1)) if match else None)
        names.append(path[: match.start()] + "." + path[match.end() :] if match else path)
    parts = [[part for part in name.split(".") if part] for name in names]
    for length in range(1, max(map(len, parts), default=1) + 1):
        short = [".".join(each[-length:]) for each in parts]
        if len(set(zip(layers, short))) == len(paths):
            break
    return list(zip(layers, short)) if paths else []
