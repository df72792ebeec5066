"""Any adapters, any columns, any prompts, whatever was done between two comparisons: each column is itself alone.

Hypothesis draws the configurations. The profile that runs by default is derandomised and short;
`ADAPTERLAB_HYPOTHESIS=nightly` draws anew, many more, and prints what reproduces a failure.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from test_rows_architectures import ARCHITECTURES, TIE, Findings, maker, plain_logits, plain_model, write_plain
from test_rows_architectures import pytestmark as pytestmark  # plain PEFT's remarks, with the reasons

from adapterlab import AdapterLab, Column

_COMMON: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "report_multiple_bugs": False,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
}
PROFILES = {
    "ci": settings(max_examples=25, derandomize=True, phases=[Phase.generate], **_COMMON),
    "nightly": settings(
        max_examples=600, print_blob=True, phases=[Phase.generate, Phase.target, Phase.shrink], **_COMMON
    ),
}
PROFILE = PROFILES[os.environ.get("ADAPTERLAB_HYPOTHESIS", "ci")]

BUILDERS = ["tiny_llama", "tiny_opt", "tiny_gpt2", "tiny_gpt_neox", "tiny_mistral", "tiny_qwen2_moe", "tiny_t5"]
METHODS = ["lora", "rslora", "adalora", "ia3", "biased", "dora"]
NAMES = ["ada", "bob", "cyd", "dan", "eve", "fay"]
TEXTS = [
    "A",
    "Hi",
    "Yes, captain?",
    "Tell me more about it",
    "What is the moon made of, and who says so, and why? " * 2,
]
MULTIPLIERS = [1.0, 0.5, -1.0, 2.0, 0.0, 1.25]


# ----- what is drawn -----


@dataclass(frozen=True)
class Adapter:
    """One adapter: `config` is for PEFT, `masked` says that some of an AdaLoRA's triplets are."""

    method: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    other_rank: int  # of the first target, by a rank pattern; 0 for no pattern
    other_alpha: int
    masked: bool
    seed: int

    def config(self, builder: str) -> Any:
        from peft import AdaLoraConfig, IA3Config, LoraConfig

        where = ARCHITECTURES[builder]
        targets, fan = list(self.targets), {"fan_in_fan_out": where.transposed}
        if self.method == "ia3":
            return IA3Config(
                target_modules=targets, feedforward_modules=[t for t in targets if t == where.scaled[-1]], **fan
            )
        if self.method == "adalora":
            return AdaLoraConfig(
                init_r=self.rank + 1, target_r=1, lora_alpha=self.alpha, total_step=9, target_modules=targets, **fan
            )
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            use_rslora=self.method == "rslora",
            lora_bias=self.method == "biased",
            use_dora=self.method == "dora",
            target_modules=targets,
            rank_pattern={targets[0]: self.other_rank} if self.other_rank else {},
            alpha_pattern={targets[0]: self.other_alpha} if self.other_alpha else {},
            **fan,
        )


@dataclass(frozen=True)
class Case:
    """One example: a model, its adapters by name, columns, prompts, settings, and what is done before a second look."""

    builder: str
    adapters: dict[str, Adapter]
    columns: tuple[Column, ...]
    prompts: tuple[str, ...]
    settings: dict[str, Any]
    deeds: tuple[tuple[str, str, int], ...]  # (what, to whom, a number)


def adapters(builder: str) -> st.SearchStrategy[Adapter]:
    where = ARCHITECTURES[builder]

    def of_method(method: str) -> st.SearchStrategy[Adapter]:
        among = where.scaled if method == "ia3" else where.targets
        return st.builds(
            Adapter,
            method=st.just(method),
            rank=st.integers(1, 9),
            alpha=st.integers(1, 9),
            targets=st.lists(st.sampled_from(among), min_size=1, unique=True).map(tuple),
            other_rank=st.sampled_from([0, 0, 1, 4, 9]),
            other_alpha=st.sampled_from([0, 0, 3]),
            masked=st.booleans(),
            seed=st.integers(0, 99),
        )

    return st.sampled_from(METHODS).flatmap(of_method)


def columns(drawn: Mapping[str, Adapter]) -> st.SearchStrategy[tuple[Column, ...]]:
    """Base, singles, sweeps and blends, each label once. DoRA has no multiplier."""
    kinds = [st.just({}), st.sampled_from(list(drawn)).map(lambda name: {name: 1.0})]
    scalable = [name for name, adapter in drawn.items() if adapter.method != "dora"]
    if scalable:
        name, multiplier = st.sampled_from(scalable), st.sampled_from(MULTIPLIERS)
        kinds.append(st.tuples(name, multiplier).map(lambda pair: dict([pair])))
        kinds.append(st.dictionaries(name, multiplier, min_size=min(2, len(scalable)), max_size=3))
    one = st.one_of(kinds).map(Column.of)
    return st.lists(one, min_size=1, max_size=8, unique_by=lambda column: column.label).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    builder = draw(st.sampled_from(BUILDERS))
    names = NAMES[: draw(st.sampled_from([1, 2, 2, 3, 3, 4, 6]))]
    drawn = {name: draw(adapters(builder)) for name in names}
    sampling = st.sampled_from([{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.3, "top_k": 50}])
    every = draw(st.sampled_from([1000, 40, 12, 4]))  # one id of so many ends a text
    return Case(
        builder,
        drawn,
        draw(columns(drawn)),
        draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3, unique=True).map(tuple)),
        {
            "max_new_tokens": draw(st.integers(1, 10)),
            "eos_token_id": range(standins.EOS, standins.VOCABULARY, every),
            "seed": draw(st.integers(0, 3)),
            **draw(sampling),
        },
        draw(
            st.lists(
                st.tuples(st.sampled_from(sorted(DEEDS)), st.sampled_from(names), st.integers(0, 99)), max_size=3
            ).map(tuple)
        ),
    )


# ----- what is done between two comparisons -----


@dataclass
class Scene:
    """The lab and, beside it, each of its adapters under plain PEFT on a model of its own."""

    case: Case
    make: Callable[[], Any]
    lab: AdapterLab
    plain: dict[str, Any]
    root: Path

    def bring(self, name: str) -> None:
        """Write the adapter as it was drawn, and load it."""
        drawn = self.case.adapters[name]
        config = drawn.config(self.case.builder)
        masked = drawn.masked and drawn.method == "adalora"
        folder = self.root / f"{name}-{len(list(self.root.iterdir()))}"
        cut = masked and drawn.seed % 2 == 0
        plain = write_plain(folder, self.make(), config, drawn.seed, mask=masked, cut=cut)
        # what is cut is in the file only
        self.plain[name] = PeftModel.from_pretrained(self.make(), folder, is_trainable=True).eval() if cut else plain
        self.lab.load_adapter(folder, name)

    def own(self, name: str) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters as a user finds them: in `lab.model`, while it is selected. Keys as in plain PEFT."""
        before = self.lab.selection
        self.lab.set_adapter(name)
        found = {
            f"base_model.model.{key.replace(f'.{name}', '.default')}": parameter
            for key, parameter in self.lab.model.named_parameters()
            if f".{name}." in f"{key}." and "base_layer" not in key
        }
        self.lab.set_adapter(before)
        return found

    def copy_over(self, name: str) -> None:
        """Give plain PEFT the values that the parameters in the lab have now."""
        theirs = dict(self.plain[name].named_parameters())
        for key, parameter in self.own(name).items():
            theirs[key].data.copy_(parameter.data)


def edit(scene: Scene, name: str, number: int) -> None:
    """Change one parameter by hand, in one of the ways that version counters do not all see."""
    mine = scene.own(name)
    key = sorted(k for k, p in mine.items() if p.numel() > 1)[number % sum(p.numel() > 1 for p in mine.values())]
    parameter = mine[key]
    way = number % 5
    if way == 0:
        parameter.data.mul_(-1.5)
    elif way == 1:
        parameter.data[-1] += 0.5
    elif way == 2:
        parameter.data = parameter.data.clone() * 0.5 + 0.25  # other storage
    elif way == 3:
        parameter.detach().numpy()[..., 0] += 0.75
    else:
        with torch.no_grad():
            parameter.copy_(parameter.flip(0) + 0.1)
    scene.copy_over(name)


def train(scene: Scene, name: str, number: int) -> None:
    """A step of Trainer's own optimizer, held against plain PEFT's gradients and AdamW written out; then another."""
    lab, rate, decay = scene.lab, 0.02, 0.01
    before = lab.selection
    lab.set_adapter(name)
    lab.set_trainable(name)
    mine = {key: p for key, p in scene.own(name).items() if p.requires_grad}
    theirs = dict(scene.plain[name].named_parameters())
    optimizer = torch.optim.AdamW(mine.values(), lr=rate, weight_decay=decay, fused=True)
    ids = torch.arange(7 + number, 15 + number)[None]
    lab.model(input_ids=ids, labels=ids).loss.backward()
    scene.plain[name].get_base_model()(input_ids=ids, labels=ids).loss.backward()
    expected = {}
    with torch.no_grad():
        for key, p in mine.items():
            g = theirs[key].grad
            assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-4 * float(g.abs().max()) + 1e-7), key
            expected[key] = p * (1 - rate * decay) - rate * p.grad / (p.grad.abs() + 1e-8)
    optimizer.step()
    for key, p in mine.items():
        assert torch.allclose(p, expected[key], atol=1e-5), f"{key} learned something else"
    optimizer.zero_grad()
    scene.plain[name].zero_grad()
    lab.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    lab.set_adapter(before)
    scene.copy_over(name)


def save(scene: Scene, name: str, number: int) -> None:
    """What is saved loads in plain PEFT, and is what the lab had."""
    folder = scene.root / f"saved-{name}-{len(list(scene.root.iterdir()))}"
    scene.lab.save_adapter(name, folder)
    again = PeftModel.from_pretrained(scene.make(), folder)
    mine = dict(scene.plain[name].named_parameters())
    for key, parameter in again.named_parameters():
        assert torch.equal(parameter, mine[key]), key


def rescale(scene: Scene, name: str, number: int) -> None:
    """Change the scaling of the first layer, as PEFT's own `set_scale` would."""
    before = scene.lab.selection
    scene.lab.set_adapter(name)
    for model, key in ((scene.lab.model, name), (scene.plain[name], "default")):
        layer = next((m for m in model.modules() if isinstance(m, LoraLayer) and key in m.scaling), None)
        if layer is not None:
            layer.scaling[key] *= 1.5
    scene.lab.set_adapter(before)


def readd(scene: Scene, name: str, number: int) -> None:
    scene.lab.delete_adapter(name)
    scene.bring(name)


def delete(scene: Scene, name: str, number: int) -> None:
    scene.lab.delete_adapter(name)
    del scene.plain[name]


def make_trainable(scene: Scene, name: str, number: int) -> None:
    scene.lab.set_trainable(name if number % 2 else None)


def select(scene: Scene, name: str, number: int) -> None:
    scene.lab.set_adapter([name, {name: 0.5}, None][number % 3])


DEEDS: Mapping[str, Callable[[Scene, str, int], None]] = {
    "delete": delete,
    "edit": edit,
    "make trainable": make_trainable,
    "readd": readd,
    "rescale": rescale,
    "save": save,
    "select": select,
    "train": train,
}


# ----- what must hold -----


def settings_of(case: Case) -> dict[str, Any]:
    return {**case.settings, "eos_token_id": list(case.settings["eos_token_id"])}


def content(model: Any) -> str:
    """A digest of one adapter's values under plain PEFT, of the tests' own."""
    total = hashlib.sha256()
    for key, parameter in sorted(model.named_parameters()):
        if ".default" in key or "ia3_" in key:
            total.update(key.encode() + parameter.detach().contiguous().numpy().tobytes())
    scalings = [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    return total.hexdigest() + repr(scalings)


def rounding_of(model: Any, logits: torch.Tensor, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    """How far plain fp32 itself is from float64 on this text: drawn adapters can make a model that amplifies rounding."""
    exact = plain_logits(copy.deepcopy(model).double(), prompt, tokens)
    return float((exact.log_softmax(-1) - logits.log_softmax(-1)).abs().max())


def look(scene: Scene) -> dict[tuple[Any, ...], str]:
    """Compare, and hold every column against itself alone. Gives content → digest, for each column."""
    case, lab = scene.case, scene.lab
    wanted = [column for column in case.columns if set(column.names) <= set(scene.plain)] or [Column()]
    before = (lab.selection, lab.enabled, lab.trainable, lab.active_adapters)
    comparison = lab.compare(list(case.prompts), wanted, chat=False, **settings_of(case))
    assert before == (lab.selection, lab.enabled, lab.trainable, lab.active_adapters)
    models = {column: plain_model(scene.make, scene.plain, column) for column in wanted}
    findings = Findings()
    digests = {}
    for generation in comparison.generations:
        column = Column(generation.asked)
        prompt = comparison.prompt_ids[generation.prompt_index]
        logits = plain_logits(models[column], prompt, generation.token_ids)
        try:
            findings.hold(generation, logits, prompt, case.settings)
        except AssertionError:
            rounding = rounding_of(models[column], logits, prompt, generation.token_ids)
            if 10 * rounding < TIE:
                raise
            findings.hold(generation, logits, prompt, case.settings, tolerance=10 * rounding)
        assert not generation.note.startswith("run in turn"), generation.note
        key = tuple(sorted((m, content(scene.plain[name])) for name, m in column.parts))
        assert digests.setdefault(key, generation.weights_digest) == generation.weights_digest
    assert len(comparison) == len(wanted) * len(case.prompts)
    return digests


def live(case: Case) -> None:
    """Load the adapters, look, do the deeds, look again."""
    make = maker(case.builder)
    seq2seq = ARCHITECTURES[case.builder].seq2seq
    with tempfile.TemporaryDirectory() as root:
        lab = AdapterLab(make(), tokenizer=standins.tiny_tokenizer(seq2seq=seq2seq))
        scene = Scene(case, make, lab, {}, Path(root))
        for name in case.adapters:
            scene.bring(name)
        seen = look(scene)
        for what, name, number in case.deeds:
            if name in scene.plain:
                DEEDS[what](scene, name, number)
        if case.deeds:
            for key, digest in look(scene).items():
                assert seen.setdefault(key, digest) == digest, "the same weights have the same digest"
        assert len(set(seen.values())) == len(seen), "other weights have another digest"
        lab.set_adapter(None)
        with torch.no_grad():
            assert torch.equal(plain_logits(lab.model, (7, 8, 9), (7, 8)), plain_logits(make(), (7, 8, 9), (7, 8)))
        lab.close()


@PROFILE
@given(case=cases())
def test_any_column_equals_itself_alone(case: Case) -> None:
    event(case.builder)
    for what, _, _ in case.deeds:
        event(what)
    live(case)


@pytest.mark.parametrize("deed", DEEDS)
def test_each_deed_to_each_kind_of_adapter_is_heeded(deed: str) -> None:
    """All adapters hang on the same modules, and the deed is done to one after another."""
    drawn = {
        name: Adapter(method, 3, 4, ("q_proj", "down_proj"), 2, 0, masked=True, seed=seed)
        for seed, (name, method) in enumerate(zip(NAMES, METHODS), start=1)
    }
    drawn["dan"] = Adapter("ia3", 1, 1, ("k_proj", "down_proj"), 0, 0, masked=False, seed=7)
    scalable = {name: 0.5 for name, adapter in drawn.items() if adapter.method != "dora"}
    columns = tuple(Column.of(value) for value in [None, *drawn, scalable])
    deeds = tuple((deed, name, number) for number, name in enumerate(drawn))
    settings = {"max_new_tokens": 6, "eos_token_id": range(standins.EOS, standins.VOCABULARY, 12)}
    live(Case("tiny_llama", drawn, columns, tuple(TEXTS[1:4:2]), settings, deeds))
