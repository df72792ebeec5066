"""What is in the lab, in numbers: DataFrames that read no weights. Bytes are bytes, megabytes 10⁶ bytes."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from adapterlab.adapters import Adapters
    from adapterlab.mounts import Mounted

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
    return parameters, size, base_dtype(adapters)


def base_dtype(adapters: Adapters) -> str:
    """The dtype that most of the base's values are stored in: `float32`."""
    stored: dict[Any, int] = {}
    for tensor in adapters.base.values():
        stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.numel()
    return str(max(stored, key=lambda dtype: stored[dtype])).removeprefix("torch.")


def dtype_label(dtype: str) -> str:
    """torch's name as people say it: `float32` → `fp32`."""
    return _DTYPES.get(dtype, dtype)


def linear_shapes(model: Any) -> dict[str, list[tuple[int, int]]]:
    """What `target_modules` can name: last name of each linear layer → (in_features, out_features) of all so called.

    Adapters that are mounted count as the layers they stand in for. Sorted by name; nothing is changed.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        sizes: Any = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if type(module).__name__ == "Conv1D":
            sizes = tuple(module.weight.shape)
        if all(isinstance(size, int) for size in sizes) and not _inside_an_adapter(path):
            found.setdefault(name, []).append(sizes)
    return dict(sorted(found.items()))


def _inside_an_adapter(path: str) -> bool:
    return any(part == "base_layer" or part.startswith(("lora_", "ia3_")) for part in path.split("."))


def count_new_parameters(method: str, r: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Parameters that a fresh adapter would train on linear layers of these (in, out) shapes.

    lora: r·(in + out); adalora: r·(in + out + 1); ia3: out, as it is where nothing is said of feedforward_modules.
    """
    each = {
        "lora": lambda n_in, n_out: r * (n_in + n_out),
        "adalora": lambda n_in, n_out: r * (n_in + n_out + 1),
        "ia3": lambda n_in, n_out: n_out,
    }[method]
    return sum(each(n_in, n_out) for n_in, n_out in shapes)


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
    """One row for the base and one per adapter and dtype: owner, parameters, trainable, effective, bytes, dtype,
    share_of_base. `effective` leaves out AdaLoRA triplets whose λ is masked to zero after allocation."""
    import pandas as pd

    parameters, size, dtype = base_size(adapters)
    row = {"owner": "base", "parameters": parameters, "trainable": 0, "effective": parameters, "bytes": size}
    rows: list[dict[str, Any]] = [{**row, "dtype": dtype, "share_of_base": 1.0}]
    for name, mounted in adapters.mounts.adapters.items():
        info = adapters.info(name)
        dtypes = {str(p.dtype).removeprefix("torch.") for p in mounted.trainable}
        rows.append(
            {
                "owner": name,
                "parameters": info.parameters,
                "trainable": info.parameters if name == adapters.trainable else 0,
                "effective": _effective(adapters, name, info.parameters),
                "bytes": info.bytes,
                "dtype": ", ".join(sorted(dtypes)),
                "share_of_base": info.parameters / parameters,
            }
        )
    return pd.DataFrame(rows)


def _effective(adapters: Adapters, name: str, parameters: int) -> int:
    pattern = getattr(adapters.mounts.adapters[name].config, "rank_pattern", None)
    if not pattern or not hasattr(adapters.mounts.adapters[name].config, "init_r"):
        return parameters
    masked = 0
    for layer in adapters.mounts.adapters[name].layers.values():
        inner: Any = layer
        gone = int((inner.lora_E[name] == 0).sum())
        masked += gone * (1 + inner.in_features + inner.out_features)
    return parameters - masked


def people_count(number: float) -> str:
    """331196416 → `331 M`, 1572864 → `1.57 M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def people_bytes(number: float) -> str:
    """662392832 → `662 MB`, in 10⁶ bytes."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return f"{number:.0f} B"


def summary_html(status: str, frame: pd.DataFrame) -> str:
    """The lab as a cell's result: one line in words, then a table. Names are escaped."""
    shown = frame.copy()
    shown["megabytes"] = [f"{value:.2f}" for value in frame["megabytes"]]
    shown["share"] = [f"{value:.2%}" for value in frame["share"]]
    shown["r"] = ["–" if missing else str(value) for value, missing in zip(frame["r"], frame["r"].isna())]
    table = shown.to_html(index=False, escape=True) if len(frame) else "<p>No adapters yet.</p>"
    return f"<p><b>{escape(status)}</b></p>{table}"


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
    if not scales:
        method = method_label(str(getattr(mounted.config.peft_type, "value", mounted.config.peft_type)))
        raise AdapterLabError(
            f"{name!r} is of the method {method}, which allocates no ranks: only AdaLoRA has ranks by layer to show."
        )
    kept = [int((scale != 0).sum()) for scale in scales.values()]
    if not any(kept):
        kept = [scale.numel() for scale in scales.values()]
    config: Any = mounted.config
    rows = [
        {"layer": layer, "module": module, "rank": rank, "init_r": config.init_r}
        for (layer, module), rank in zip(layer_and_module(list(scales)), kept)
    ]
    return pd.DataFrame(rows, columns=["layer", "module", "rank", "init_r"]).astype({"layer": "Int64"})
