"""What test_stateful.py holds a lab against: plain PEFT on fresh models, and weights that the test keeps by itself.

Nothing here goes through the lab but `own_tensors`, which reads the attributes of PEFT's layers wherever they hang.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import standins
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

Parts = tuple[tuple[str, float], ...]  # a column: adapters with their multipliers, none at 0; () is base


# ----- adapters on disk, made by plain PEFT -----


@dataclass(frozen=True)
class Kind:
    """A way of adapting. blends: it follows multipliers. sums: it is a ΔW, so that `cat` takes it. steps: the fewest
    training steps that it takes. dropout: in train mode it is random."""

    config: Any
    blends: bool = True
    sums: bool = True
    steps: int = 1
    dropout: bool = False


@dataclass(frozen=True)
class World:
    """A tiny model and the kinds of adapters that hang on it."""

    make: Callable[[], Any]
    kinds: Mapping[str, Kind]
    block: str  # a module that no adapter replaces
    seq2seq: bool = False
    native: str = "lora"  # what the model may have brought

    @functools.cached_property
    def tokenizer(self) -> Any:
        return standins.tiny_tokenizer(chat=not self.seq2seq, seq2seq=self.seq2seq)


def llama() -> World:
    """Every method that the equation knows, and those that run in turn."""
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    patterns: dict[str, Any] = {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"up_proj": 2}}
    scaled = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ada = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"])
    kinds = {
        "lora": Kind(LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])),
        "rslora": Kind(LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=every, **patterns)),
        "dropped": Kind(
            LoraConfig(r=4, lora_alpha=2, lora_dropout=0.4, target_modules=["v_proj", "up_proj"]), dropout=True
        ),
        "biased": Kind(LoraConfig(r=2, lora_alpha=3, lora_bias=True, target_modules=["q_proj", "o_proj"]), sums=False),
        "embedded": Kind(LoraConfig(r=3, lora_alpha=2, target_modules=["embed_tokens", "q_proj"])),
        "ia3": Kind(IA3Config(**scaled), sums=False),
        "adalora": Kind(ada, steps=3),
        "dora": Kind(LoraConfig(r=4, use_dora=True, target_modules=["v_proj", "up_proj"]), blends=False, sums=False),
        "loha": Kind(LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"]), blends=False, sums=False),
        "whole": Kind(
            LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"]), blends=False, sums=False
        ),
    }
    return World(standins.tiny_llama, kinds, "model.layers.0")


def gpt2() -> World:
    """Conv1D: weights lie transposed."""
    fan: dict[str, Any] = {"fan_in_fan_out": True}
    scaled = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
    kinds = {
        "lora": Kind(LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"], **fan)),
        "rslora": Kind(LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["c_attn", "c_fc"], **fan)),
        "ia3": Kind(IA3Config(**scaled, **fan), sums=False),
        "adalora": Kind(AdaLoraConfig(init_r=3, target_r=1, total_step=9, target_modules=["c_fc"], **fan), steps=3),
        "dora": Kind(LoraConfig(r=2, use_dora=True, target_modules=["c_attn"], **fan), blends=False, sums=False),
    }
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return World(functools.partial(standins.tiny_gpt2, **quiet), kinds, "transformer.h.0")


def t5() -> World:
    """An encoder and a decoder."""
    scaled = {"target_modules": ["v", "wo"], "feedforward_modules": ["wo"]}
    kinds = {
        "lora": Kind(LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v"])),
        "rslora": Kind(LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["q", "wi", "wo"])),
        "ia3": Kind(IA3Config(**scaled), sums=False),
        "dora": Kind(LoraConfig(r=2, use_dora=True, target_modules=["k"]), blends=False, sums=False),
        "loha": Kind(LoHaConfig(r=2, alpha=3, target_modules=["q"]), blends=False, sums=False),
    }
    return World(functools.partial(standins.tiny_t5, dropout_rate=0.0), kinds, "decoder.block.0", seq2seq=True)


# ----- what the test keeps of an adapter -----


def own_tensors(layers: Iterable[tuple[str, Any]], name: str) -> dict[str, torch.nn.Parameter]:
    """Adapter `name`'s parameters in PEFT's layers (path → layer), under plain PEFT's names with the adapter's left out."""
    found = {}
    for path, layer in layers:
        for key, parameter in layer.named_parameters(remove_duplicate=False):
            words = key.split(".")
            if name in words and not {"base_layer", "original_module"} & set(words):
                found[".".join([path, *(word for word in words if word != name)])] = parameter
    return found


def tuner_layers(model: Any) -> list[tuple[str, Any]]:
    """PEFT's layers in a model, those inside others left out."""
    found: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not inside:
            found.append((path, module))
    return found


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


@dataclass
class Held:
    """An adapter as the test knows it: config, tensors, and what the lab must say of it.

    `numbers`: what acts beside the tensors. `initial`, `loaded`, `saved`: keys of the contents as drawn, as read from a
    file, as last written; `reference`: what a run must show to be believed; `maybe`: contents since it was last looked at.
    """

    kind: Kind
    config: Any
    tensors: dict[str, torch.Tensor]
    numbers: str
    folder: Path | None = None
    inert: bool = False  # as it was drawn, it changes nothing
    initial: str | None = None
    loaded: str | None = None
    saved: str | None = None
    reference: str = ""
    maybe: list[str] = field(default_factory=list)
    nothing: set[str] = field(default_factory=set)  # contents that change nothing
    _key: str | None = None

    @property
    def key(self) -> str:
        """A name of the content."""
        if self._key is None:
            total = hashlib.blake2b(self.numbers.encode(), digest_size=12)
            for name, tensor in sorted(self.tensors.items()):
                total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
                total.update(tensor.numpy().tobytes())
            self._key = total.hexdigest()
        return self._key

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Its content has changed to these."""
        self.tensors, self._key = copied(tensors), None
        self.maybe.append(self.key)
        if self.does_nothing():
            self.nothing.add(self.key)

    def seen(self) -> None:
        """The lab has looked at the weights: what it says of them is of these."""
        self.maybe = [self.key]
        if self.does_nothing():
            self.nothing.add(self.key)

    def does_nothing(self) -> bool:
        """All B or λ zero, all IA3 scales one; for other methods, as they are drawn unless that is at random."""
        ends = {key: [word for word in key.split(".") if word != "weight"][-1] for key in self.tensors}
        if {"lora_magnitude_vector", "modules_to_save"} & {word for key in self.tensors for word in key.split(".")}:
            return self.inert and self.key == self.initial
        if "ia3_l" in ends.values():
            return all(bool((self.tensors[key] == 1).all()) for key in self.tensors)
        out = "lora_E" if "lora_E" in ends.values() else "lora_B"
        mine = [key for key in self.tensors if out in key or "lora_embedding_B" in key]
        if not mine:
            return self.inert and self.key == self.initial
        sides = [(key, key.replace("lora_embedding_B", "lora_embedding_A")) for key in mine]
        return not any(all(bool(self.tensors[side].any()) for side in pair) for pair in sides)

    def statuses(self) -> set[str]:
        """What its badge may say, by the docstring of `AdapterInfo`."""
        return {self._status(key) for key in self.maybe}

    def _status(self, key: str) -> str:
        if key == self.loaded:
            return "loaded"
        if key in self.nothing:
            return "untrained"
        if key == self.initial:
            return "random weights"
        return "trained here" if key == self.saved else "unsaved"


# ----- plain PEFT -----


class Oracle:
    """Fresh models under plain PEFT, kept by the content of what hangs on them."""

    LIMIT = 150  # models that are kept

    def __init__(self, world: World, root: Path) -> None:
        self.world = world
        self.pristine = world.make()
        self.folders: dict[str, Path] = {}
        self._models: OrderedDict[Any, Any] = OrderedDict()
        self._answers: dict[Any, Any] = {}
        for seed, (label, kind) in enumerate(world.kinds.items()):
            self.folders[label] = standins.write_adapter(root / label, self.pristine, kind.config, seed=seed)

    def bare(self) -> Any:
        return copy.deepcopy(self.pristine)

    def load(self, folder: Path, kind: Kind) -> Held:
        """What plain PEFT finds in a folder."""
        model = PeftModel.from_pretrained(self.bare(), folder).eval()
        held = self.held(model, kind)
        held.folder, held.loaded = folder, held.key
        self._keep(held.key, model)
        return held

    def held(self, model: Any, kind: Kind, name: str = "default") -> Held:
        """What hangs in a model under plain PEFT, or natively, as `name`."""
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        layers = tuner_layers(inner)
        config = copy.deepcopy(model.peft_config[name])
        held = Held(kind, config, copied(own_tensors(layers, name)), numbers(layers, name))
        held.reference = held.key
        held.seen()
        return held

    def plain(self, held: Held) -> Any:
        """The model that has this adapter and nothing else: from its file, or else with the tensors put in by hand."""

        def build() -> Any:
            if held.folder is not None and held.key == held.loaded:
                return PeftModel.from_pretrained(self.bare(), held.folder).eval()
            config = copy.deepcopy(held.config)
            config.inference_mode = False
            model = get_peft_model(self.bare(), config).eval()
            there = own_tensors(tuner_layers(model.get_base_model()), "default")
            assert there.keys() == held.tensors.keys()
            with torch.no_grad():
                for key, parameter in there.items():
                    parameter.copy_(held.tensors[key])
            return model

        return self._kept(held.key, build)

    def model(self, parts: Parts, held: Mapping[str, Held]) -> Any:
        """A model that is this column. Of a blend: weights written out, W + Σ mΔW and products of scales."""
        if not parts:
            return self.pristine
        if len(parts) == 1 and parts[0][1] == 1.0:
            return self.plain(held[parts[0][0]])

        def build() -> Any:
            model = self.bare()
            with torch.no_grad():
                blend(model, [(self.plain(held[name]), m) for name, m in parts])
            return model

        return self._kept(content(parts, held), build)

    def logits(self, parts: Parts, held: Mapping[str, Held], ids: torch.Tensor) -> torch.Tensor:
        def compute() -> torch.Tensor:
            with torch.no_grad():
                return forward(self.model(parts, held), ids).logits

        return self._answer(("logits", content(parts, held), tuple(ids[0].tolist())), compute)

    def greedy(self, parts: Parts, held: Mapping[str, Held], prompt: tuple[int, ...], ends: Any, length: int) -> Any:
        """What plain transformers generates."""

        def compute() -> tuple[int, ...]:
            model, ids = self.model(parts, held), torch.tensor([prompt])
            settings = {"max_new_tokens": length, "do_sample": False, "eos_token_id": list(ends), "pad_token_id": 1}
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
            return tuple(out[1:] if self.world.seq2seq else out[len(prompt) :])

        return self._answer(("greedy", content(parts, held), prompt, tuple(ends), length), compute)

    def _kept(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self._models:
            self._keep(key, build())
        self._models.move_to_end(key)
        return self._models[key]

    def _keep(self, key: Any, model: Any) -> None:
        self._models[key] = model
        while len(self._models) > self.LIMIT:
            self._models.popitem(last=False)

    def _answer(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._answers:
            if len(self._answers) > 3000:
                self._answers.clear()
            self._answers[key] = compute()
        return self._answers[key]


def numbers(layers: Iterable[tuple[str, Any]], name: str) -> str:
    """What acts in PEFT's layers beside tensors: their kinds and scalings."""
    found = []
    for path, layer in layers:
        scaling = getattr(layer, "scaling", None)
        scaling = scaling.get(name) if isinstance(scaling, dict) else None
        variant = type(getattr(layer, "lora_variant", {}).get(name)).__name__
        found.append((path, type(layer).__name__, variant, scaling, getattr(layer, "is_feedforward", None)))
    return repr(sorted(found, key=repr))


def content(parts: Parts, held: Mapping[str, Held]) -> tuple[Any, ...]:
    """A name for what a column holds, whatever its adapters are called."""
    return tuple(sorted((held[name].key, m) for name, m in parts))


def forward(model: Any, ids: torch.Tensor) -> Any:
    """One forward over a text; an encoder-decoder reads it on both sides."""
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids)
    return model(input_ids=ids, use_cache=False)


def blend(model: Any, parts: list[tuple[Any, float]]) -> None:
    """W becomes s_out ⊙ (W ⊙ s_in + Σ mΔW), with PEFT's own ΔW and s = 1 + m(s − 1): first all sums, then all products."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for plain, m in parts:
        for path, layer in tuner_layers(plain.get_base_model()):
            found.setdefault(path, []).append((layer, m))
    for path, layers in found.items():
        module = model.get_submodule(path)
        turned = type(module).__name__ == "Conv1D"
        W = module.weight.T if turned else module.weight
        s_in, s_out, late = torch.ones(W.shape[1]), torch.ones(W.shape[0]), torch.zeros(W.shape[0])
        delta = torch.zeros_like(W)
        for layer, m in layers:
            if hasattr(layer, "ia3_l"):
                scale = 1 + m * (layer.ia3_l["default"].flatten() - 1)
                s_in, s_out = (s_in * scale, s_out) if layer.is_feedforward else (s_in, s_out * scale)
                continue
            own = layer.get_delta_weight("default")
            delta = delta + m * (own.T if turned else own)
            if getattr(layer, "lora_bias", {}).get("default"):
                late = late + m * layer.scaling["default"] * layer.lora_B["default"].bias
        W = s_out[:, None] * (W * s_in + delta)
        module.weight = torch.nn.Parameter((W.T if turned else W).clone())  # its own: tied ones must not change too
        bias = getattr(module, "bias", None)
        if bias is not None:
            module.bias = torch.nn.Parameter(s_out * bias + late)
        else:
            assert not late.any()
