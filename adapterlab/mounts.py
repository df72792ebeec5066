"""The base stays bare; adapters are mounted into it and taken out again.

PEFT injects each adapter alone into the bare base. The layers it made are harvested (path → module) and the base's
own modules put back, so afterwards switching is swapping `parent._modules[child]`. While one adapter is mounted,
`model.peft_config` is set: the model then *is* a native single-adapter transformers model. An unmounted adapter is
outside `model.parameters()`: when it is mounted it takes the modes of the modules that it stands in for, and its device
and dtype stay its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.columns import Column
from adapterlab.errors import AdapterLabError
from adapterlab.guards import put_back
from adapterlab.patterns import check_patterns
from adapterlab.quantization import keep_8bit_scales, keep_quantized_dtype
from adapterlab.quiet import quiet, warnings_ignored

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

PREFIX = "base_model.model."  # before every key that plain PEFT writes
MAGNITUDE = "lora_magnitude_vector"  # the end of DoRA's keys


@dataclass(frozen=True)
class Site:
    """A place in the base where some adapter hangs: `parent._modules[child]` is `original` while it is bare."""

    parent: nn.Module
    child: str
    original: nn.Module


@dataclass
class Mounted:
    """One adapter, harvested: PEFT's layers by path, its config, and the parameters PEFT would train.

    `kinds`: one layer of each kind, once capabilities.py has looked. `tied`: parameters of one layer are views of
    another's (`ensure_weight_tying`), and must stay where they lie.
    """

    layers: dict[str, nn.Module]
    config: PeftConfig
    trainable: list[nn.Parameter]
    kinds: dict[str, nn.Module] | None = None
    tied: bool = False


class Mounts:
    """The adapters of one model and what is mounted in it now. Not thread-safe: the lab holds the lock."""

    def __init__(self, model: PreTrainedModel) -> None:
        from adapterlab.stacks import Stacks

        self.model: Any = model
        self.sites: dict[str, Site] = {}
        self.adapters: dict[str, Mounted] = {}
        self.column = Column()
        self.stacks = Stacks()
        self._placed: dict[str, nn.Module] = {}
        self._hooks: dict[str, Any] = {}  # path → handle of what keeps an 8-bit layer whole under DoRA

    def inject(self, config: PeftConfig, name: str, load: Callable[[Any], None] | None = None) -> Mounted:
        """Make PEFT build the adapter in the bare base, run `load(tuner)` on it, harvest it, and leave the base bare.

        What was mounted before is mounted again, also when PEFT or `load` raises: then nothing else has changed.
        """
        if is_offloaded(self.model):
            _check_offloaded(config, name)
        with self._bare() as children:
            with _stand_ins(self.model):
                tuner = inject(config, self.model, name)
                if load is not None:
                    load(tuner)
            return self._harvest(children, name)

    def adopt(self) -> dict[str, tuple[PeftConfig, dict[str, Any]]]:
        """Unwrap a model that came with native adapters: their configs and weights by name, and a bare model.

        The weights are copies, so nothing of the old wrappers is kept alive here.
        """
        merged = [path for path, m in self.model.named_modules() if getattr(m, "merged", False)]
        if merged:
            raise AdapterLabError(
                f"This model has an adapter merged into its weights (at {merged[0]}): call its unmerge_adapter() first, or "
                "load it again. The base must be the bare base."
            )
        found = {}
        for name, config in dict(getattr(self.model, "peft_config", {}) or {}).items():
            config = copy.deepcopy(config)
            state = adapter_state(self.model, name)
            found[name] = (config, {key: value.detach().clone() for key, value in state.items()})
        unwrap(self.model)
        self._announce(None)
        return found

    def add(self, name: str, mounted: Mounted) -> None:
        from adapterlab.equation import is_dora

        self.adapters[name] = mounted
        for path, layer in mounted.layers.items():
            original = self.sites[path].original
            if path not in self._hooks and type(original).__name__ == "Linear8bitLt" and is_dora(layer, name):
                self._hooks[path] = keep_8bit_scales(original)

    def remove(self, name: str) -> None:
        """Forget the adapter; it must not be mounted. Sites that no other adapter uses go with it."""
        gone = self.adapters.pop(name)
        self.release(name)
        used = {path for other in self.adapters.values() for path in other.layers}
        for path in gone.layers:
            if path not in used:
                self.sites.pop(path, None)
        self.tidy()

    def tidy(self) -> None:
        """Take off the hooks of layers where no adapter hangs any more."""
        for path in [path for path in self._hooks if path not in self.sites]:
            self._hooks.pop(path).remove()

    def leave(self) -> None:
        """Take everything out of the model: the adapters' layers, and what hangs on the base's own."""
        self.mount(Column())
        while self._hooks:
            self._hooks.popitem()[1].remove()

    def arrange(self, path: str) -> None:
        """Let the adapters' factors at `path` lie side by side (stacks.py)."""
        self.stacks.arrange(path, self._movable(path))

    def release(self, name: str) -> None:
        """Give an adapter that will be trained tensors of its own, or close the gap that a deleted one leaves."""
        paths = {path for mounted in self.adapters.values() for path in mounted.layers}
        self.stacks.release(name, {path: self._movable(path) for path in paths})

    def _movable(self, path: str) -> dict[str, nn.Module]:
        return {n: m.layers[path] for n, m in self.adapters.items() if path in m.layers and not m.tied}

    def mount(self, column: Column) -> None:
        """Make `column` act on the model's next forward. The work grows with the layers swapped, not with the adapters."""
        placed, before = self._layers_for(column), self._placed
        self._placed = {**before, **placed}  # an interrupt on the way leaves it so, and `drift` sees what is missing
        for path in before:
            if path not in placed:
                site = self.sites[path]
                site.parent._modules[site.child] = site.original
        for path, layer in placed.items():
            site = self.sites[path]
            site.parent._modules[site.child] = layer
            if layer.training != site.original.training:
                follow_mode(layer, site.original)
        self.column, self._placed = column, placed
        self._announce(column.single)

    def _layers_for(self, column: Column) -> dict[str, nn.Module]:
        if column.is_base:
            return {}
        if column.single is not None:
            return self.adapters[column.single].layers
        from adapterlab.equation import Blend

        parts: dict[str, list[tuple[nn.Module, str, float]]] = {}
        for name, multiplier in column.parts:
            for path, layer in self.adapters[name].layers.items():
                parts.setdefault(path, []).append((layer, name, multiplier))
        return {path: Blend(self.sites[path].original, here) for path, here in parts.items()}

    def _announce(self, single: str | None) -> None:
        if single is None:
            self.model.__dict__.pop("peft_config", None)
            self.model._hf_peft_config_loaded = False
        else:
            self.model.peft_config = {single: self.adapters[single].config}
            self.model._hf_peft_config_loaded = True

    def standing(self) -> dict[str, tuple[float, dict[str, nn.Module]]]:
        """Adapter → (multiplier, PEFT's layers by path), read off the modules in the model now, not off what was asked."""
        from adapterlab.equation import Blend

        found: dict[str, tuple[float, dict[str, nn.Module]]] = {}
        for path, site in self.sites.items():
            layer: Any = site.parent._modules[site.child]
            if layer is site.original:
                continue
            if isinstance(layer, Blend):
                parts = list(layer.parts)
            else:
                off = getattr(layer, "_disable_adapters", False)
                parts = [] if off else [(layer, name, 1.0) for name in layer.active_adapters]
            for inner, name, multiplier in parts:
                found.setdefault(name, (multiplier, {}))[1][path] = inner
        return found

    def drift(self) -> list[str]:
        """What somebody did to the model behind the lab's back, in words; empty if nothing."""
        said = []
        expected = {} if self.column.single is None else {self.column.single}
        natively = set(getattr(self.model, "peft_config", None) or {})
        if natively != set(expected):
            said.append(f"the model's own adapters were {sorted(natively)} where the lab had {sorted(expected)}")
        if expected and natively == expected:
            single = next(iter(expected))
            if self.model.peft_config[single] is not self.adapters[single].config:
                said.append(f"another adapter was loaded under the name {single!r}, over its weights")
        for path, site in self.sites.items():
            here: Any = site.parent._modules.get(site.child)
            if here is not self._placed.get(path, site.original):
                said.append(f"{path} was replaced")
            elif here is site.original:
                continue
            elif getattr(here, "merged", False):
                said.append(f"{path} was merged")
            elif (active := getattr(here, "active_adapters", None)) is not None and list(active) != [
                self.column.single
            ]:
                said.append(f"{path} had {list(active)} active")
            elif getattr(here, "_disable_adapters", False):
                said.append(f"{path} was disabled")
        return said

    def lost(self) -> list[str]:
        """Adapters whose layers no longer hold them: somebody deleted them natively."""
        return [
            name
            for name, mounted in self.adapters.items()
            if any(name not in layer._get_available_adapters() for layer in mounted.layers.values())  # type: ignore[operator]
        ]

    def repair(self, column: Column) -> None:
        """Take out everything foreign, undo disabling and merging, and mount `column`.

        A merge is divided or subtracted back, which can leave rounding in the base: its digest tells.
        """
        for name, mounted in self.adapters.items():
            for layer in mounted.layers.values():
                heal(layer, name)
        for site in self.sites.values():
            site.parent._modules[site.child] = site.original
        unwrap(self.model)
        self.column, self._placed = Column(), {}
        self.mount(column)

    @contextlib.contextmanager
    def _bare(self) -> Iterator[dict[nn.Module, dict[str, Any]]]:
        """The bare base, and its children by module; afterwards the base as it was and the old column mounted."""
        column, model = self.column, self.model
        with put_back(lambda: self.mount(column)):
            self.mount(Column())
            children = {module: dict(module._modules) for module in model.modules()}
            # PEFT exchanges 8-bit ones for DoRA
            parameters = [(module, dict(module._parameters)) for module in children]
            flags = [(p, p.requires_grad) for p in model.parameters()]
            modes = [(module, module.training) for module in children]

            def undo() -> None:
                for module, before in children.items():
                    module._modules.clear()
                    module._modules.update(before)
                for module, own in parameters:
                    module._parameters.update(own)
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
                for module, mode in modes:
                    module.training = mode
                self._announce(None)

            with put_back(undo):
                yield children

    def _harvest(self, children: dict[nn.Module, dict[str, Any]], name: str) -> Mounted:
        model, layers = self.model, {}
        paths = {module: path for path, module in model.named_modules()}
        base = {id(p) for module in children for p in module._parameters.values() if p is not None}
        for parent, before in children.items():
            if parent not in paths:
                continue  # it stands inside a wrapper now, which was harvested whole
            for child, original in before.items():
                layer = parent._modules.get(child)
                if layer is original or layer is None:
                    continue
                path = f"{paths[parent]}.{child}".lstrip(".")
                layers[path] = layer
                self.sites.setdefault(path, Site(parent, child, original))
        if not layers:
            raise AdapterLabError(f"PEFT put no layer of {name!r} into the model: check target_modules.")
        trainable = [
            p for layer in layers.values() for p in layer.parameters() if p.requires_grad and id(p) not in base
        ]
        own = list(dict.fromkeys(trainable))
        places = [p.data_ptr() for p in own if p.numel()]
        return Mounted(layers, model.peft_config[name], own, tied=len(set(places)) < len(places))


def follow_mode(layer: nn.Module, original: nn.Module) -> None:
    """Give an adapter's layer the mode of the module that it stands in for, whose own modules keep theirs."""
    base = set(original.modules())
    for module in layer.modules():
        if module not in base:
            module.training = original.training


def inject(config: PeftConfig, model: Any, name: str, *, empty: bool = False) -> Any:
    """PEFT's tuner around `model`, its layers injected in place; `empty` leaves their weights on the meta device.

    The same steps as `peft.inject_adapter_in_model`, which gives back the model only: loading an AdaLoRA with a
    `rank_pattern` needs the tuner's own resizing (issue 2).
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    check_patterns(config, model, name)
    config = copy.deepcopy(config)
    config.inference_mode = False
    apart: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if not empty and is_offloaded(model):
        _check_offloaded(config, name)
        apart = _stand_ins(model)
    with (
        apart,
        _full_rank_pattern(config),
    ):  # PEFT reads AdaLoRA's as if it were LoRA's, and warns that no module matches
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name=name, low_cpu_mem_usage=empty)
    # As PeftModel does before it loads weights; native injection leaves adapters in a half-precision base's dtype,
    # where they would be rounded and could not be trained (issue 2).
    tuner._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=True)
    keep_quantized_dtype(model)
    return tuner


def is_offloaded(model: Any) -> bool:
    """Whether accelerate keeps some of the weights on disk or on the host and fetches them layer by layer."""
    return any(parameter.is_meta for parameter in model.parameters())


def _check_offloaded(config: PeftConfig, name: str) -> None:
    for field, what in (
        ("use_dora", "DoRA"),
        ("modules_to_save", "modules_to_save"),
        ("trainable_token_indices", "it"),
    ):
        if getattr(config, field, None):
            raise AdapterLabError(
                f"{name!r} can't be put into this base: {what} needs weights of the base, which accelerate has offloaded. "
                "Load the base without disk or CPU offload."
            )


@contextlib.contextmanager
def _stand_ins(model: Any) -> Iterator[None]:
    """Weights where offloaded layers compute, of the right shapes and without memory, in the place of those on the meta
    device: PEFT puts an adapter where its layer's weight lies, and there it would have no values (issue 3)."""
    import torch

    held: list[tuple[Any, str, Any]] = []

    def undo() -> None:
        for module, key, parameter in held:
            module._parameters[key] = parameter

    with put_back(undo):
        for module in model.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    held.append((module, key, parameter))
                    one = torch.zeros((), dtype=parameter.dtype, device="cpu" if device is None else device)
                    module._parameters[key] = torch.nn.Parameter(one.expand(parameter.shape), requires_grad=False)
        yield


def adapter_state(model: Any, name: str) -> dict[str, Any]:
    """The tensors of an adapter that is in `model`, under the keys PEFT saves but without its prefix; not copied."""
    from peft import get_peft_model_state_dict

    # PEFT takes a lora_bias or a triplet pruned to rank 0 for a shard that DeepSpeed forgot to gather.
    not_sharded = warnings_ignored(r".*LoRA tensor\(s\) have invalid shape")
    with _full_rank_pattern(model.peft_config[name]), _tokens_of_others_hidden(model, name), not_sharded:
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def load_state(tuner: Any, state: dict[str, Any], name: str) -> None:
    """Put an adapter's tensors (keys as PEFT saves them) into freshly injected layers, through PEFT's own loader."""
    from peft import set_peft_model_state_dict

    model = tuner.model

    def resize(pattern: dict[str, Any], adapter_name: str) -> None:
        # PEFT tells from `adapter_name in key` whether a key ends in the name, so "s" would be found in any (issue 2).
        tuner.resize_modules_by_rank_pattern(
            {f"{key}.{adapter_name}": mask for key, mask in pattern.items()}, adapter_name
        )

    model.resize_modules_by_rank_pattern = resize
    try:
        set_peft_model_state_dict(model, state, adapter_name=name)
    finally:
        del model.resize_modules_by_rank_pattern


def prefixed(state: dict[str, Any]) -> dict[str, Any]:
    """The keys as plain PEFT writes and reads them, under `base_model.model.`."""
    return {PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}


def plain_peft(model: Any, config: PeftConfig, state: dict[str, Any], name: str) -> Any:
    """A `PeftModel` around `model` with these tensors in it, by PEFT's public calls alone: the lab's second opinion."""
    from peft import get_peft_model, set_peft_model_state_dict

    with quiet(), _stand_ins(model):
        plain = get_peft_model(model, config, adapter_name=name)
        set_peft_model_state_dict(plain, prefixed(state), adapter_name=name)
    return plain


@contextlib.contextmanager
def _tokens_of_others_hidden(model: Any, name: str) -> Iterator[None]:
    """Let trained tokens be asked for by the adapters that have some: PEFT asks all, and raises a KeyError."""
    from peft.utils.other import TrainableTokensWrapper

    others = [m for m in model.modules() if isinstance(m, TrainableTokensWrapper) and name not in m._adapters]

    def undo() -> None:
        for module in others:
            module.__dict__.pop("adapter_state_dict", None)

    with put_back(undo):
        for module in others:
            module.__dict__["adapter_state_dict"] = lambda *asked: {}
        yield


@contextlib.contextmanager
def _full_rank_pattern(config: Any) -> Iterator[None]:
    """Hide AdaLoRA's `rank_pattern`: PEFT would cut tensors by it through a method that transformers models lack."""
    pattern = getattr(config, "rank_pattern", None)
    if pattern is None or getattr(config, "init_r", None) is None:
        yield
        return
    with put_back(lambda: setattr(config, "rank_pattern", pattern)):
        config.rank_pattern = None
        yield


@contextlib.contextmanager
def skeleton(model: Any) -> Iterator[Any]:
    """A second structure over the same tensors: new modules, no new memory. What is put into it leaves `model` alone.

    PEFT freezes the parameters it finds, and those are shared: their flags are restored at the end.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # what accelerate holds for its offloaded layers
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            shared[id(weights)] = weights
        statistics = module.__dict__.get("quant_state")  # of bitsandbytes' 4-bit weights, which have it too
        if statistics is not None:
            shared[id(statistics)] = statistics
        for holder in (module.__dict__.get("state"), module._parameters.get("weight")):  # and its 8-bit weights
            for tensor in (getattr(holder, "CB", None), getattr(holder, "SCB", None)):
                if tensor is not None:
                    shared[id(tensor)] = tensor
    twin = copy.deepcopy(model, shared)
    twin.__dict__.pop("peft_config", None)
    twin._hf_peft_config_loaded = False

    def undo() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    with put_back(undo):
        yield twin


def unwrap(model: Any) -> None:
    """Put every tuner layer's and wrapper's original module back into the model, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        wrapped = [
            (parent, child, module)
            for parent in model.modules()
            for child, module in parent._modules.items()
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            and not isinstance(parent, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]
        if not wrapped:
            return
        for parent, child, module in wrapped:
            if isinstance(module, BaseTunerLayer) and module.merged:
                module.unmerge()
            original = getattr(module, "base_layer", None)
            parent._modules[child] = module.original_module if original is None else original


def heal(layer: Any, name: str) -> None:
    """Bring one tuner layer back to: only `name` in it, active, enabled, unmerged."""
    with warnings_ignored():  # PEFT's remarks on each of these steps; the lab has said what it undoes
        if getattr(layer, "merged", False) and hasattr(layer, "unmerge"):
            layer.unmerge()
        for other in [a for a in getattr(layer, "_get_available_adapters", set)() if a != name]:
            layer.delete_adapter(other)
        if getattr(layer, "_disable_adapters", False):
            layer.enable_adapters(True)
        if hasattr(layer, "active_adapters") and list(layer.active_adapters) != [name]:
            layer.set_adapter([name])
