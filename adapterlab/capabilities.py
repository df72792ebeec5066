"""What can be done with each adapter here and now, and why not.

Each capability asks the function by which the operation itself refuses, so table and lab can't disagree; a test does all of
it for real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from adapterlab.adapters import Adapters

Asked = Callable[["Adapters", str, Mapping[str, Any]], "str | None"]


def capabilities_frame(adapters: Adapters) -> pd.DataFrame:
    """One row per adapter and capability: adapter, capability, possible, reason (why not, and what to do; "" where it is).

    Reads no weights and changes nothing.
    """
    import pandas as pd

    from adapterlab.merging import base_merge_obstacle
    from adapterlab.rows import model_obstacle
    from adapterlab.training import base_train_obstacle

    everywhere = {
        "batch": model_obstacle(adapters.model, adapters.packed),
        **dict.fromkeys(("merge", "merge_to_disk"), base_merge_obstacle(adapters)),
        "train": base_train_obstacle(adapters),
    }
    rows: dict[str, list[Any]] = {"adapter": [], "capability": [], "possible": [], "reason": []}
    for name in list(adapters.records):
        layers = _one_of_each_kind(adapters, name)
        for capability, asked in CAPABILITIES.items():
            why = everywhere.get(capability) or asked(adapters, name, layers) or ""
            for column, value in zip(rows.values(), (name, capability, not why, why)):
                column.append(value)
    return pd.DataFrame(rows).astype({"possible": bool})


def _one_of_each_kind(adapters: Adapters, name: str) -> Mapping[str, Any]:
    """The first layer of each kind, by path: what can be done with an adapter doesn't depend on how many it has."""
    mounted = adapters.mounts.adapters[name]
    if mounted.kinds is None:
        found: dict[Any, tuple[str, Any]] = {}
        for path, layer in mounted.layers.items():
            found.setdefault(_kind(adapters, name, path, layer), (path, layer))
        mounted.kinds = dict(found.values())
    return mounted.kinds


def _kind(adapters: Adapters, name: str, path: str, layer: Any) -> tuple[Any, ...]:
    """Everything about a layer that the functions below look at."""
    original = adapters.mounts.sites[path].original
    weight = original._parameters.get("weight")
    out = layer._modules.get("lora_B")
    rank = layer.__dict__.get("r")
    return (
        type(layer),
        type((layer.__dict__.get("lora_variant") or {}).get(name)),
        type(original),
        type(weight),
        weight is not None and weight.is_meta,
        None if weight is None else weight.shape,
        original._parameters.get("bias") is None,
        out is not None and name in out._modules and out._modules[name]._parameters.get("bias") is not None,
        rank.get(name) if isinstance(rank, dict) else None,
        path in adapters.tied,
        path in adapters.stay_whole,
        ".experts." in path,
    )


def _batch(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    from adapterlab.rows import adapter_row_obstacle

    return adapter_row_obstacle(adapters.mounts, name, layers, alone=True)


def _blend(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    from adapterlab.equation import multiplier_advice, multiplier_obstacle

    found = multiplier_obstacle(layers, name)
    return None if found is None else multiplier_advice(found[1])


def _concatenate(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    from adapterlab.merging import concatenate_obstacle

    return concatenate_obstacle(layers, name)


def _merge(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    from adapterlab.merging import adapter_merge_obstacle

    return adapter_merge_obstacle(adapters, name, layers)


def _merge_to_disk(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    from adapterlab.merging import adapter_file_obstacle

    return _merge(adapters, name, layers) or adapter_file_obstacle(adapters, name, layers)


def _train(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    from adapterlab.training import adapter_train_obstacle

    return adapter_train_obstacle(adapters, name, layers)


def _save(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    return None  # whatever could be loaded or added can be written, as the test of this table shows


def _ranks(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    from adapterlab.inspection import ranks_obstacle

    return ranks_obstacle(adapters.mounts.adapters[name])


def _delta_norms(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
    from adapterlab.changes import change_obstacle

    return next((why for layer in layers.values() if (why := change_obstacle(layer, name))), None)


def _over_packed(quantization: str) -> Asked:
    """Whether the adapter works on this base opened in `quantization`, which it may be already."""

    def asked(adapters: Adapters, name: str, layers: Mapping[str, Any]) -> str | None:
        from adapterlab.quantization import packed_as, packed_obstacle, quantization_of, would_pack
        from adapterlab.training import method_of

        plain = quantization_of(adapters.model) is None
        over = []
        for path, layer in layers.items():
            original = adapters.mounts.sites[path].original
            if packed_as(original) or (plain and path not in adapters.stay_whole and would_pack(original)):
                over.append(layer)
        return packed_obstacle(over, method_of(adapters.mounts.adapters[name].config), quantization)

    return asked


CAPABILITIES: dict[str, Asked] = {
    "batch": _batch,
    "blend": _blend,
    "concatenate": _concatenate,
    "merge": _merge,
    "merge_to_disk": _merge_to_disk,
    "train": _train,
    "save": _save,
    "ranks": _ranks,
    "delta_norms": _delta_norms,
    "8bit": _over_packed("8bit"),
    "4bit": _over_packed("4bit"),
}
