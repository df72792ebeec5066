"""What an adapter does to the weights, layer by layer, and whether two adapters work in the same directions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    import pandas as pd

    from adapterlab.adapters import Adapters
    from adapterlab.mounts import Mounted


def delta_norms_frame(adapters: Adapters, name: str) -> pd.DataFrame:
    """One row per adapted layer, in the model's order; the columns as in `AdapterLab.delta_norms`.

    Raises `AdapterLabError` where a weight of the adapter is not finite, or where ΔW can be had in no way.
    """
    import pandas as pd
    import torch

    from adapterlab.changes import measure
    from adapterlab.factors import cores_of, singular_values
    from adapterlab.layers import layer_and_module

    layers = adapters.mounts.adapters[name].layers
    with torch.no_grad():
        cores = {path: found for path, layer in layers.items() if (found := cores_of(layer, name)) is not None}
        values = dict(zip(cores, singular_values(list(cores.values()))))
        rows = [measure(layer, name, path, values.get(path)) for path, layer in layers.items()]
    for path, row in zip(layers, rows):
        if row.norm is not None and not math.isfinite(row.norm):
            raise AdapterLabError(f"{name!r} has weights at {path} that are not finite (inf or NaN): no norm to show.")
    places = [
        {"layer": layer, "module": module, "path": path}
        for path, (layer, module) in zip(layers, layer_and_module(list(layers)))
    ]
    frame = pd.DataFrame([{**place, **vars(row)} for place, row in zip(places, rows)])
    numbers = ("norm", "relative_norm", "effective_rank", "scale_min", "scale_mean", "scale_max")
    return frame.astype({"layer": "Int64", "rank": "Int64", **dict.fromkeys(numbers, "float64")})


def overlap_frame(adapters: Adapters, name: str, other: str) -> pd.DataFrame:
    """One row per layer that both adapt by factors; the columns as in `AdapterLab.subspace_overlap`.

    Raises `AdapterLabError` where one of them has no factors at all, where they share no layer, and for an untrained one.
    """
    import pandas as pd
    import torch

    from adapterlab.factors import low_rank
    from adapterlab.layers import layer_and_module

    mine, its = (_terms(adapters.mounts.adapters[each], each, low_rank) for each in (name, other))
    shared = [path for path in mine if path in its]
    if not shared:
        raise AdapterLabError(
            f"{name!r} and {other!r} share no layer: {name!r} adapts {_modules(mine)}, {other!r} {_modules(its)}."
        )
    with torch.no_grad():
        rows = [_overlap(mine[path], its[path]) for path in shared]
    for each, key in ((name, "rank"), (other, "other_rank")):
        if not any(row[key] for row in rows):
            raise AdapterLabError(
                f"{each!r} has no directions to compare: ΔW = 0 in all {len(rows)} layers. Train it first."
            )
    places = [
        {"layer": layer, "module": module, "path": path}
        for path, (layer, module) in zip(shared, layer_and_module(shared))
    ]
    frame = pd.DataFrame([{**place, **row} for place, row in zip(places, rows)])
    return frame.astype({"layer": "Int64", "rank": "Int64", "other_rank": "Int64"})


def _terms(mounted: Mounted, name: str, low_rank: Any) -> dict[str, Any]:
    terms = {path: term for path, layer in mounted.layers.items() if (term := low_rank(layer, name)) is not None}
    if not terms:
        from adapterlab.methods import method_label

        method = method_label(str(getattr(mounted.config.peft_type, "value", mounted.config.peft_type)))
        raise AdapterLabError(
            f"{name!r} has no directions to compare: {method} changes weights without thin factors B and A, so its ΔW spans "
            "all directions there are. Compare LoRA, rsLoRA, AdaLoRA, DoRA or LoHa."
        )
    return terms


def _modules(paths: Any) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))


def _overlap(mine: Any, its: Any) -> dict[str, Any]:
    from adapterlab.factors import directions

    found: dict[str, Any] = {}
    pairs = dict(zip(("output", "input"), zip(directions(mine), directions(its))))
    ranks = [each.shape[1] for each in pairs["output"]]
    for side, (one, two) in pairs.items():
        found[f"{side}_overlap"] = float((one.T @ two).square().sum()) / min(ranks) if all(ranks) else math.nan
    for side, (one, _) in pairs.items():
        found[f"{side}_chance"] = max(ranks) / len(one) if all(ranks) else math.nan
    return {**found, "rank": ranks[0], "other_rank": ranks[1]}
