"""AdapterLab: one base model, any number of adapters, side by side in a notebook.

Importing this imports neither torch nor transformers: public names are resolved when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    from adapterlab.adalora import AdaLoraCallback
    from adapterlab.columns import Column
    from adapterlab.comparison import Comparison, Generation, TokenEvent
    from adapterlab.lab import AdapterLab
    from adapterlab.notices import AdapterLabWarning
    from adapterlab.preflight import Preflight
    from adapterlab.records import AdapterInfo
    from adapterlab.runs import TrainingRun

__version__ = "0.1.0"

_HOMES = {
    "AdaLoraCallback": "adalora",
    "AdapterInfo": "records",
    "AdapterLab": "lab",
    "AdapterLabWarning": "notices",
    "Column": "columns",
    "Comparison": "comparison",
    "Generation": "comparison",
    "Preflight": "preflight",
    "TokenEvent": "comparison",
    "TrainingRun": "runs",
}

__all__ = [
    "AdaLoraCallback",
    "AdapterInfo",
    "AdapterLab",
    "AdapterLabError",
    "AdapterLabWarning",
    "Column",
    "Comparison",
    "Generation",
    "Preflight",
    "TokenEvent",
    "TrainingRun",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adapterlab' has no attribute {name!r}")
    value = getattr(import_module(f"adapterlab.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *globals()])
