"""What training does to a model beside the weights, and how all of it is put back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from adapterlab.guards import put_back

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def kept(model: Any) -> Iterator[None]:
    """In the block anything may be set on the model's modules and configs; afterwards they are as they were.

    Modes, hooks, gradient checkpointing, a replaced `forward`, `use_cache` and special tokens are put back; parameters and
    buffers, and which module stands where, are not looked at.
    """
    modules = [(module, dict(module.__dict__), _hooks(module)) for module in model.modules()]
    configs = [(config, dict(config.__dict__)) for config in _configs(model)]

    def undo() -> None:
        for module, own, hooks in modules:
            _put_back(module.__dict__, own)
            for key, before in hooks.items():
                table = module.__dict__[key]
                table.clear()
                table.update(before)
        for config, own in configs:
            _put_back(config.__dict__, own)

    with put_back(undo):
        yield


def _hooks(module: nn.Module) -> dict[str, OrderedDict[Any, Any]]:
    return {
        key: OrderedDict(value)
        for key, value in module.__dict__.items()
        if key.endswith("hooks") and isinstance(value, OrderedDict)
    }


def _configs(model: Any) -> list[Any]:
    config = model.config
    inner = [getattr(config, key, None) for key in getattr(config, "sub_configs", None) or ()]
    found = [config, *inner, getattr(model, "generation_config", None)]
    return [one for one in found if hasattr(one, "__dict__")]


def _put_back(table: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in table if key not in before]:
        del table[key]
    for key, value in before.items():
        if table.get(key) is not value:
            table[key] = value


@contextlib.contextmanager
def float32(layers: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """In the block these parameters are float32, and what is computed with them goes on in the dtype it had.

    PEFT keeps factors in float32 anyway; copies of whole modules (`modules_to_save`) are in the base's dtype, where small
    updates would be rounded away. Afterwards they are in that dtype again, as in the file and for every other lab.
    """
    import torch

    half = {id(p): p.dtype for p in parameters if p.dtype in (torch.float16, torch.bfloat16)}
    handles: list[Any] = []
    changed: list[tuple[nn.Parameter, Any]] = []

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for parameter, dtype in changed:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)

    with put_back(undo):
        for layer in layers if half else ():
            for owner in layer.modules():
                own = [p for p in owner._parameters.values() if p is not None and id(p) in half]
                if not own or isinstance(owner, (torch.nn.ParameterDict, torch.nn.ParameterList)):
                    continue  # dicts of bare tensors have no forward to widen
                # PEFT's tied copies are one parameter of two owners, and for the second it is wide already
                changed += [(parameter, parameter.dtype) for parameter in own if parameter.dtype == half[id(parameter)]]
                handles.append(owner.register_forward_pre_hook(_widen))
                handles.append(owner.register_forward_hook(_narrow(half[id(own[0])])))
                for parameter in own:
                    parameter.data = parameter.data.float()
        yield


def _widen(owner: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if getattr(arg, "is_floating_point", bool)() else arg for arg in args)


def _narrow(dtype: Any) -> Any:
    def narrowed(output: Any) -> Any:
        if isinstance(output, tuple):  # a router's scores and choices
            return tuple(map(narrowed, output))
        return output.to(dtype) if getattr(output, "is_floating_point", bool)() else output

    return lambda owner, args, output: narrowed(output)


@contextlib.contextmanager
def interrupt_stops(stop: threading.Event) -> Iterator[None]:
    """In the block, in the main thread, the first Ctrl-C sets `stop`, so that the step at work is finished; the second
    one interrupts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stop.set()

    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, or not Python's: it is somebody's wish
        yield
        return
    with put_back(lambda: signal.signal(signal.SIGINT, before)):
        signal.signal(signal.SIGINT, first)
        yield
