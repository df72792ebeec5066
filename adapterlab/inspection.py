"""What is in the lab, in numbers: DataFrames that read no weights but AdaLoRA's λ. Bytes are bytes, megabytes 10⁶ bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterlab.pagetext import escape, table_html, without_maths
from adapterlab.reading import adapter_tensors

if TYPE_CHECKING:
    import pandas as pd

    from adapterlab.adapters import Adapters
    from adapterlab.mounts import Mounted

_SIZES = ("parameters", "trainable", "effective", "bytes", "bytes_on_disk")
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def count_parameters(tensor: Any) -> int:
    """Parameters that a stored tensor stands for: a packed 4-bit byte holds two."""
    state = getattr(tensor, "quant_state", None)
    if state is not None and getattr(state, "shape", None) is not None:
        count = 1
        for size in state.shape:
            count *= size
        return count
    return int(tensor.numel())


def count_bytes(tensor: Any) -> int:
    """Bytes that a parameter takes, its quantization statistics included."""
    total = tensor.numel() * tensor.element_size()
    state = getattr(tensor, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        for label in ("absmax", "code", "offset"):
            extra: Any = getattr(part, label, None)
            total += extra.numel() * extra.element_size() if hasattr(extra, "numel") else 0
    scale = getattr(tensor, "SCB", None)
    return total + (scale.numel() * scale.element_size() if scale is not None else 0)


def base_size(adapters: Adapters) -> tuple[int, int, str]:
    """(parameters, bytes, dtype of most of them) of the base."""
    parameters, size = (sum(map(count, adapters.base.values())) for count in (count_parameters, count_bytes))
    return parameters, size + _moved_scales(adapters.model), base_dtype(adapters)


def _moved_scales(model: Any) -> int:
    """Bytes of the 8-bit scales that bitsandbytes has moved from the weights to their layers, as it does in a first forward."""
    moved = 0
    for layer in model.modules():
        if type(layer).__name__ == "Linear8bitLt" and layer.weight.SCB is None:
            scales = getattr(
                getattr(layer, "state", None), "SCB", None
            )  # PEFT's wrapper, of the same name, has no state
            moved += 0 if scales is None else scales.numel() * scales.element_size()
    return moved


def base_dtype(adapters: Adapters) -> str:
    """The dtype that most of the base's values are stored in: `float32`."""
    stored: dict[Any, int] = {}
    for tensor in adapters.base.values():
        stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.numel()
    return str(max(stored, key=lambda dtype: stored[dtype])).removeprefix("torch.")


def dtype_label(dtype: str) -> str:
    """torch's name as people say it: `float32` → `fp32`."""
    return _DTYPES.get(dtype, dtype)


class LayerShape(NamedTuple):
    """A linear layer's in_features and out_features; feedforward: whether IA3 scales what goes into it, not its output."""

    n_in: int
    n_out: int
    feedforward: bool = False


def linear_shapes(model: Any) -> dict[str, list[LayerShape]]:
    """What `target_modules` can name: last name of each linear layer → the layers so called.

    Adapters that are mounted count as the layers they stand in for. Sorted by name; nothing is changed.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

    scaled_before = tuple(FEEDFORWARD.get(getattr(model.config, "model_type", None), ()))  # PEFT's choice, by its rule
    found: dict[str, list[LayerShape]] = {}
    for path, module in _bare_modules(model):
        name = path.rpartition(".")[2]
        sizes: Any = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if type(module).__name__ == "Conv1D":
            sizes = tuple(module.weight.shape)
        if all(isinstance(size, int) for size in sizes):
            found.setdefault(name, []).append(LayerShape(sizes[0], sizes[1], path.endswith(scaled_before)))
    return dict(sorted(found.items()))


def _bare_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, module) of the model as it would be with nothing mounted."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from adapterlab.equation import Blend
    from adapterlab.rows import RowLayer

    own: dict[str, str] = {}  # where something stands in for a module → the name that the base's own has in it
    bare: dict[str, str | None] = {}  # path → what it would be, or None for what is an adapter's
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        above = bare.get(parent, parent)
        if parent in own:
            bare[path] = above if name == own[parent] else None
        else:
            bare[path] = None if above is None else f"{above}.{name}".removeprefix(".")
        if isinstance(module, (BaseTunerLayer, Blend, RowLayer)):
            own[path] = "base_layer"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            own[path] = "original_module"
        elif (found := bare[path]) is not None:
            yield found, module


def count_new_parameters(method: str, r: int, layers: Iterable[LayerShape]) -> int:
    """Parameters that a fresh adapter would train on these layers.

    lora: r·(in + out); adalora: r·(in + out + 1); ia3: out, or in where PEFT takes the layer for a feed-forward one.
    """
    each = {
        "lora": lambda one: r * (one.n_in + one.n_out),
        "adalora": lambda one: r * (one.n_in + one.n_out + 1),
        "ia3": lambda one: one.n_in if one.feedforward else one.n_out,
    }[method]
    return sum(map(each, layers))


def summary_frame(adapters: Adapters) -> pd.DataFrame:
    """One row per adapter: adapter, method, r, parameters, megabytes, share (of the base's parameters), multiplier,
    active, trainable, status. `multiplier` and `active` are what acts on the next forward."""
    import pandas as pd

    base = base_size(adapters)[0]
    acting = adapters.effective.as_dict()
    rows = []
    for name in adapters.records:
        info = adapters.info(name)
        rows.append(
            {
                "adapter": name,
                "method": info.method,
                "r": info.r,
                "parameters": info.parameters,
                "megabytes": info.bytes / 1e6,
                "share": info.parameters / base,
                "multiplier": acting.get(name, 0.0),
                "active": name in acting,
                "trainable": name == adapters.trainable,
                "status": info.status,
            }
        )
    columns = [
        "adapter",
        "method",
        "r",
        "parameters",
        "megabytes",
        "share",
        "multiplier",
        "active",
        "trainable",
        "status",
    ]
    return pd.DataFrame(rows, columns=columns).astype({"r": "Int64"})


def parameters_frame(adapters: Adapters) -> pd.DataFrame:
    """How large base and adapters are; see `AdapterLab.parameters`."""
    import pandas as pd

    everything = base_size(adapters)[0]
    rows = _size_rows("base", [("weights", tensor, True) for tensor in adapters.base.values()], adapters.base_file)
    for row in rows:
        row["bytes"] += _moved_scales(adapters.model) if row["dtype"] == "int8" else 0
    for name, mounted in adapters.mounts.adapters.items():
        trained = {p.data_ptr() for p in mounted.trainable if p.numel()}
        tensors = [
            ("modules_to_save" if label.startswith("modules_to_save.") else "weights", t, t.data_ptr() in trained)
            for label, t in adapter_tensors(mounted.layers.values(), name)
        ]
        tensors.sort(key=lambda item: item[0] != "weights")
        mine = _size_rows(name, tensors, adapters.records[name].file_bytes)
        for row in mine:
            row["effective"] -= _pruned(mounted, name) if row["kind"] == "weights" and row["parameters"] else 0
        rows += mine
    frame = pd.DataFrame(rows)
    frame["share_of_base"] = frame["parameters"] / everything
    return frame.astype({"bytes_on_disk": "Int64"})


def _size_rows(owner: str, tensors: list[tuple[str, Any, bool]], file_bytes: int | None) -> list[dict[str, Any]]:
    """One row per kind and dtype of the (kind, tensor, whether it is a parameter) that an owner has, in their order."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for kind, tensor, counts in tensors:
        dtype = stored_dtype(tensor)
        row = rows.setdefault((kind, dtype), {"owner": owner, "kind": kind, "dtype": dtype} | dict.fromkeys(_SIZES, 0))
        count = count_parameters(tensor) if counts else 0
        row["parameters"] += count
        row["effective"] += count
        row["trainable"] += count if tensor.requires_grad else 0
        row["bytes"] += count_bytes(tensor)
    found = [row for row in rows.values() if row["bytes"]]
    for row in found[:1]:
        row["bytes_on_disk"] = file_bytes
    return found


def stored_dtype(tensor: Any) -> str:
    """How a tensor's values are stored: torch's name of the dtype, or bitsandbytes' "nf4", "fp4", "int8"."""
    quantised = getattr(getattr(tensor, "quant_state", None), "quant_type", None)
    return quantised or str(tensor.dtype).removeprefix("torch.")


def _pruned(mounted: Mounted, name: str) -> int:
    """Parameters of an AdaLoRA's triplets that its allocation has switched off."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    layers: list[Any] = [layer for layer in mounted.layers.values() if isinstance(layer, AdaLoraLayer)]
    if not any(bool((layer.lora_E[name] != 0).any()) for layer in layers):
        return 0  # a fresh one: every λ is zero, and none was taken away
    return sum(
        int((layer.lora_E[name] == 0).sum()) * (1 + layer.lora_A[name].shape[1] + layer.lora_B[name].shape[0])
        for layer in layers
    )


def people_count(number: float) -> str:
    """331196416 → `331 M`, 1572864 → `1.57 M`."""
    return _in_units(number, "k", "M", "B") or f"{number:.0f}"


def people_bytes(number: float) -> str:
    """662392832 → `662 MB`, in 10⁶ bytes."""
    return _in_units(number, "kB", "MB", "GB") or f"{number:.0f} B"


def _in_units(number: float, *units: str) -> str:
    """Three digits of the largest unit that it fills, or fills when rounded; "" below the first."""
    for power in range(len(units), 0, -1):
        size = 1000**power
        if number >= 0.9995 * size:
            digits = f"{number / size:.3g}" if number < 999.5 * size else f"{number / size:.0f}"
            return f"{digits} {units[power - 1]}"
    return ""


def summary_html(status: str, frame: pd.DataFrame) -> str:
    """The lab as a cell's result: one line in words, then a table. Names are escaped."""
    shown = frame.copy()
    shown["megabytes"] = [f"{value:.2f}" for value in frame["megabytes"]]
    shown["share"] = [f"{value:.2%}" for value in frame["share"]]
    shown["r"] = ["–" if missing else str(value) for value, missing in zip(frame["r"], frame["r"].isna())]
    table = table_html(shown) if len(frame) else "<p>No adapters yet.</p>"
    return without_maths(f"<p><b>{escape(status)}</b></p>{table}")


def ranks_obstacle(mounted: Mounted) -> str | None:
    """Why an adapter has no ranks to show, or None if it has."""
    from adapterlab.methods import method_label

    method = str(getattr(mounted.config.peft_type, "value", mounted.config.peft_type))
    if method == "ADALORA":
        return None
    return f"only AdaLoRA has ranks by layer to show, and this is {method_label(method)}."


def ranks_frame_of(mounted: Mounted, name: str) -> pd.DataFrame:
    """The ranks that AdaLoRA has left: one row per adapted layer: layer, module, rank, init_r.

    rank: the triplets whose λ is not zero; all that are there as long as every λ of the adapter is zero, as in a fresh one.
    layer: missing where the path has no number. init_r: what the config started with, also after a file that keeps pruned
    triplets out. Reads λ and nothing else. Raises `AdapterLabError` for a method that allocates no ranks.
    """
    import pandas as pd

    from adapterlab.errors import AdapterLabError
    from adapterlab.layers import layer_and_module
    from adapterlab.methods import method_label

    triplets: dict[str, Any] = {path: getattr(layer, "lora_E", {}) for path, layer in mounted.layers.items()}
    scales = {path: scale[name].detach() for path, scale in triplets.items() if name in scale}
    why = ranks_obstacle(mounted)
    if why is not None:
        method = method_label(str(getattr(mounted.config.peft_type, "value", mounted.config.peft_type)))
        raise AdapterLabError(f"{name!r} is of the method {method}, which allocates no ranks: {why}")
    kept = [int((scale != 0).sum()) for scale in scales.values()]
    if not any(kept):
        kept = [scale.numel() for scale in scales.values()]
    config: Any = mounted.config
    rows = [
        {"layer": layer, "module": module, "rank": rank, "init_r": config.init_r}
        for (layer, module), rank in zip(layer_and_module(list(scales)), kept)
    ]
    return pd.DataFrame(rows, columns=["layer", "module", "rank", "init_r"]).astype({"layer": "Int64"})
