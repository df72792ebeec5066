"""8-bit and 4-bit bases do all that others do: adapters loaded, added, switched, blended, compared, trained, saved, deleted.

The oracle is plain transformers and plain PEFT on a fresh model, loaded with the same `BitsAndBytesConfig`; for blends the
methods' formulas, read off the files. What batching changes by rounding is test_rows_quantised.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from safetensors.torch import load_file

from adapterlab import AdapterLab, AdapterLabError, Comparison
from adapterlab.mounts import skeleton
from adapterlab.quiet import silence_known_noise

pytestmark = [
    # PEFT, of adapters made on a Conv1D, over the linear layers that bitsandbytes makes of those
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but:UserWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

LABS: dict[str, dict[str, Any]] = {  # what the lab is given, where it has a shorthand
    "8bit": {"quantization": "8bit"},
    "4bit": {"quantization": "4bit"},
}
FP32 = {"bnb_4bit_compute_dtype": torch.float32}
CONFIGS: dict[str, dict[str, Any]] = {  # what plain transformers is given
    "8bit": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "8bit, threshold 6": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **FP32},
    "4bit, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        **FP32,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", **FP32},
}
LAYERS = {"8bit": "Linear8bitLt", "4bit": "Linear4bit", "fp4": "Linear4bit"}


@dataclass(frozen=True)
class Kind:
    """A tiny model in sizes that bitsandbytes likes, and what its adapters hang on."""

    make: Callable[..., Any]
    sizes: dict[str, int]
    lora: tuple[str, ...]
    ia3: tuple[str, ...]
    feed_forward: tuple[str, ...]
    task: str = "CAUSAL_LM"
    quantised: int = 0  # layers

    @property
    def fan_in_fan_out(self) -> bool:
        return self.make is standins.tiny_gpt2

    def configs(self) -> dict[str, Any]:
        from peft import AdaLoraConfig, IA3Config, LoraConfig

        common = {"task_type": self.task, "fan_in_fan_out": self.fan_in_fan_out}
        return {
            "lora": LoraConfig(r=4, lora_alpha=6, target_modules=list(self.lora), **common),
            "ia3": IA3Config(target_modules=list(self.ia3), feedforward_modules=list(self.feed_forward), **common),
            "ada": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=list(self.lora), **common),
        }

    def inputs(self) -> dict[str, torch.Tensor]:
        ids = torch.randint(7, 300, (2, 12), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if self.is_t5 else {"input_ids": ids}

    @property
    def is_t5(self) -> bool:
        return self.task == "SEQ_2_SEQ_LM"


KINDS = {
    "llama": Kind(
        standins.tiny_llama,
        {"hidden_size": 64, "intermediate_size": 128},
        ("q_proj", "down_proj"),
        ("k_proj", "down_proj"),
        ("down_proj",),
        quantised=14,
    ),
    "opt": Kind(
        standins.tiny_opt,
        {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
        ("q_proj", "v_proj", "fc1"),
        ("k_proj", "fc2"),
        ("fc2",),
        quantised=12,
    ),
    "gpt2": Kind(
        standins.tiny_gpt2,
        {"n_embd": 64},
        ("c_attn", "c_proj"),
        ("c_attn", "mlp.c_proj"),
        ("mlp.c_proj",),
        quantised=8,
    ),
    "t5": Kind(
        standins.tiny_t5,
        {"d_model": 64, "d_kv": 16, "d_ff": 128},
        ("q", "v"),
        ("k", "wo"),
        ("wo",),
        "SEQ_2_SEQ_LM",
        quantised=28,
    ),
}
HARDEST = ("8bit", "8bit, threshold 6", "4bit, double")
EVERY = [(name, precision) for name in KINDS for precision in CONFIGS if name == "llama" or precision in HARDEST]
SOME = [(name, precision) for name in KINDS for precision in CONFIGS if name == "llama" or precision in ("8bit", "fp4")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind of model the base and, made by plain PEFT on it in fp32, one adapter per method."""
    found = {}
    for name, kind in KINDS.items():
        root = found[name] = tmp_path_factory.mktemp(name)
        tokenizer = standins.tiny_tokenizer(seq2seq=kind.is_t5)
        standins.write_model(root / "base", kind.make(**kind.sizes), tokenizer)
        for seed, (adapter, config) in enumerate(kind.configs().items(), start=1):
            standins.write_adapter(root / adapter, kind.make(**kind.sizes), config, seed=seed)
    return found


def config_of(precision: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**CONFIGS[precision])


def open_lab(folder: Path, precision: str) -> AdapterLab:
    given = LABS.get(precision) or {"quantization_config": config_of(precision)}
    return AdapterLab(folder / "base", dtype=torch.float32, **given)


def load_plain(folder: Path, precision: str) -> Any:
    """The base as plain transformers loads it; 4-bit weights kept unpacked, since packed ones round otherwise."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    silence_known_noise()
    t5 = AutoConfig.from_pretrained(folder / "base").is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if t5 else AutoModelForCausalLM
    model = loader.from_pretrained(folder / "base", dtype=torch.float32, quantization_config=config_of(precision))
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def plain_peft(folder: Path, precision: str, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_plain(folder, precision), adapter).eval()


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def content(model: Any) -> dict[str, bytes]:
    """Every byte of a bare model: parameters, buffers, and what bitsandbytes keeps beside its weights."""
    found: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, module in model.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            scales = module.weight.SCB
            found[f"{path}.SCB"] = module.state.SCB if scales is None else scales
        elif type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            found |= {f"{path}.absmax": state.absmax, f"{path}.code": state.code}
            if state.nested:
                nested = {"absmax": state.state2.absmax, "code": state.state2.code, "offset": state.offset}
                found |= {f"{path}.nested.{key}": value for key, value in nested.items()}
    return {key: value.detach().contiguous().cpu().numpy().tobytes() for key, value in found.items()}


def own_tensors(lab: AdapterLab, name: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in lab._adapters.state(name)[1].items()}


def put_beside(model: Any, parts: dict[Path, float]) -> None:
    """y = s_out ⊙ [W (s_in ⊙ x) + Σ ((x Aᵀ) ⊙ e) Bᵀ] at each adapted module, from the adapters' files alone."""
    found: dict[str, list[tuple[str, dict[str, torch.Tensor], dict[str, Any], float]]] = {}
    for folder, multiplier in parts.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        at: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_file(folder / "adapter_model.safetensors").items():
            path, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            at.setdefault(path, {})[factor] = value
        for path, factors in at.items():
            found.setdefault(path, []).append((config["peft_type"], factors, config, multiplier))
    for path, here in found.items():
        module = model.get_submodule(path)
        module.forward = _beside(module.forward, path, here)


def _beside(own: Any, path: str, here: list[Any]) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        s_in, s_out, low = torch.ones(()), torch.ones(()), torch.zeros(())
        for method, factors, config, multiplier in here:
            if method == "IA3":
                scale = 1 + multiplier * (factors["ia3_l"].flatten() - 1)
                inward = any(path.endswith(end) for end in config["feedforward_modules"])
                s_in, s_out = (s_in * scale, s_out) if inward else (s_in, s_out * scale)
            elif method == "ADALORA":
                e = factors["lora_E"].flatten() * multiplier * config["lora_alpha"] / (config["init_r"] + 1e-5)
                low = low + ((x @ factors["lora_A"].T) * e) @ factors["lora_B"].T
            else:
                scaling = multiplier * config["lora_alpha"] / config["r"]
                low = low + (x @ factors["lora_A"].T) @ factors["lora_B"].T * scaling
        return s_out * (own(x * s_in) + low)

    return forward


class TestAdaptersOnTop:
    @pytest.mark.parametrize(("name", "precision"), EVERY)
    def test_load_switch_blend_disable_delete(self, name: str, precision: str, folders: dict[str, Path]) -> None:
        kind, folder = KINDS[name], folders[name]
        inputs, lab = kind.inputs(), open_lab(folders[name], precision)
        layers = [m for m in lab.model.modules() if type(m).__name__ == LAYERS[precision.partition(",")[0]]]
        assert len(layers) == kind.quantised, "GPT-2's Conv1D too"
        plain = load_plain(folder, precision)
        assert content(lab.model) == content(plain)
        base = logits(plain, inputs)
        expected = {a: logits(plain_peft(folder, precision, folder / a), inputs) for a in ("lora", "ia3", "ada")}
        for adapter in expected:
            lab.load_adapter(folder / adapter, adapter)
        for adapter in ("ada", "lora", "ia3", "lora"):
            lab.set_adapter(adapter)
            assert (expected[adapter] - base).abs().max() > 0.1
            torch.testing.assert_close(logits(lab.model, inputs), expected[adapter], atol=1e-5, rtol=1e-5)
        lab.disable_adapters()
        assert torch.equal(logits(lab.model, inputs), base)
        lab.enable_adapters()
        torch.testing.assert_close(logits(lab.model, inputs), expected["lora"], atol=1e-5, rtol=1e-5)
        blend = {"lora": 0.5, "ia3": 0.7, "ada": -0.4}
        lab.set_adapter(blend)
        put_beside(plain, {folder / a: m for a, m in blend.items()})
        # over 8-bit layers the last bit of an input can tip it into another of 255 steps
        slack = 0.2 if "8bit" in precision else 1e-4
        assert (logits(lab.model, inputs) - logits(plain, inputs)).abs().max() < slack
        lab.set_adapter("ia3")
        lab.delete_adapter("ia3")
        assert list(lab.adapters) == ["lora", "ada"]
        assert torch.equal(logits(lab.model, inputs), base), "base is selected"
        lab.set_adapter("lora")
        torch.testing.assert_close(logits(lab.model, inputs), expected["lora"], atol=1e-5, rtol=1e-5)
        lab.set_adapter(None)
        assert content(lab.model) == content(load_plain(folder, precision))
        lab.close()

    @pytest.mark.parametrize(("name", "precision"), SOME)
    def test_compare_verify_and_merge(self, name: str, precision: str, folders: dict[str, Path]) -> None:
        folder, lab = folders[name], open_lab(folders[name], precision)
        for adapter in ("lora", "ia3", "ada"):
            lab.load_adapter(folder / adapter, adapter)
        columns: list[Any] = [None, "lora", "ia3", "ada", {"lora": 0.5, "ia3": 0.7}]
        comparison = lab.compare(["Hello there", "What is the moon?"], columns, max_new_tokens=4)
        alone = precision == "8bit, threshold 6"
        for generation in comparison.generations:
            assert generation.batched is not alone
            assert ("llm_int8_threshold=6" in generation.note) is alone
        proof = lab.verify(comparison)
        assert proof.agrees.all(), proof
        if "8bit" not in precision:
            assert proof.logprob_error.max() < 1e-3
        if alone:  # nothing rounds otherwise than in transformers' own loop, so the tokens are the same
            for adapter in ("lora", "ada"):
                said = comparison[adapter, 0]
                ids = torch.tensor([comparison.prompt_ids[0]])
                plain = plain_peft(folder, precision, folder / adapter)
                out = plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0].tolist()
                assert tuple(out[-len(said.token_ids) :]) == said.token_ids
        for column in ("lora", {"lora": 0.5, "ia3": 0.7}):
            with pytest.raises(AdapterLabError, match="quantised weights rounds the adapter away"):
                lab.merge_and_unload(column)
        lab.close()

    def test_verify_allows_for_8_bits_and_not_for_more(self, folders: dict[str, Path]) -> None:
        lab = open_lab(folders["llama"], "8bit")
        lab.load_adapter(folders["llama"] / "lora", "lora")
        comparison = lab.compare("Hello there", ["lora"], max_new_tokens=16, min_new_tokens=16)
        said = comparison["lora"]
        for off, agrees in (([1.0], True), ([0, 2.0], False), ([0.7] * 16, False), ([float("nan")], False)):
            shifts = [*off, *[0.0] * (16 - len(off))]
            moved = tuple(logprob - shift for logprob, shift in zip(said.logprobs, shifts))
            comparison.generations = [replace(said, logprobs=moved)]
            assert lab.verify(comparison).agrees.tolist() == [agrees], off
        lab.close()

    @pytest.mark.parametrize("precision", CONFIGS)
    def test_added_and_combined(self, precision: str, folders: dict[str, Path], tmp_path: Path) -> None:
        """A fresh adapter changes nothing; one made of two is their blend; PEFT's own combinations work too."""
        folder, inputs = folders["llama"], KINDS["llama"].inputs()
        lab = open_lab(folder, precision)
        base = logits(lab.model, inputs)
        lab.add_adapter("lora", "fresh", r=2, target_modules=["q_proj", "o_proj"])
        assert lab.trainable == "fresh"
        torch.testing.assert_close(logits(lab.model, inputs), base, atol=0.2 if "8bit" in precision else 1e-5, rtol=0)
        assert {p.dtype for p in lab.model.parameters() if p.requires_grad} == {torch.float32}
        lab.load_adapter(folder / "lora", "one")
        lab.add_adapter("lora", "two", r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        lab.set_adapter({"one": 0.5, "two": 2.0})
        blend = logits(lab.model, inputs)
        lab.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both")
        torch.testing.assert_close(logits(lab.model, inputs), blend, atol=0.2 if "8bit" in precision else 1e-4, rtol=0)
        saved = lab.save_adapter("both", tmp_path / "both")
        torch.testing.assert_close(logits(plain_peft(folder, precision, saved), inputs), logits(lab.model, inputs))
        lab.add_weighted_adapter(["one", "two"], [0.5, 2.0], "nearly", "svd")
        assert (logits(lab.model, inputs) - base).abs().max() > 0.01
        lab.set_adapter(None)
        assert torch.equal(logits(lab.model, inputs), base)
        lab.close()

    @pytest.mark.parametrize("precision", ["8bit", "4bit, double"])
    def test_a_model_in_hand_made_ready_by_peft(self, precision: str, folders: dict[str, Path]) -> None:
        """`prepare_model_for_kbit_training` and a `PeftModel` around it, as QLoRA's notebooks have it."""
        from peft import PeftModel, prepare_model_for_kbit_training

        folder, inputs = folders["llama"], KINDS["llama"].inputs()
        expected = logits(plain_peft(folder, precision, folder / "lora"), inputs)
        prepared = prepare_model_for_kbit_training(load_plain(folder, precision), use_gradient_checkpointing=False)
        theirs = PeftModel.from_pretrained(prepared, folder / "lora", adapter_name="mine").eval()
        lab = AdapterLab(theirs, tokenizer=standins.tiny_tokenizer())
        lab.load_adapter(folder / "ia3", "ia3")
        lab.set_adapter("mine")
        torch.testing.assert_close(logits(lab.model, inputs), expected, atol=1e-5, rtol=1e-5)
        assert lab.verify(lab.compare("Hello", max_new_tokens=2)).agrees.all()
        lab.close()
        torch.testing.assert_close(logits(theirs, inputs), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("precision", ["8bit", "4bit, double"])
    def test_a_folder_that_holds_quantised_weights(
        self, precision: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        folder, inputs = folders["llama"], KINDS["llama"].inputs()
        plain = load_plain(folder, precision)
        expected = logits(plain, inputs)
        plain.save_pretrained(tmp_path / "base")
        standins.tiny_tokenizer().save_pretrained(tmp_path / "base")
        lab = AdapterLab(tmp_path / "base")
        assert precision.startswith(lab._quantization or "nothing")
        assert torch.equal(logits(lab.model, inputs), expected)
        lab.load_adapter(folder / "lora", "lora")
        torch.testing.assert_close(
            logits(lab.model, inputs),
            logits(plain_peft(folder, precision, folder / "lora"), inputs),
            atol=1e-5,
            rtol=1e-5,
        )
        assert lab.verify(lab.compare("Hello", max_new_tokens=2)).agrees.all()
        lab.close()

    def test_a_second_structure_shares_4bit_statistics(self, folders: dict[str, Path]) -> None:
        """Every load and every verify makes a structure; the statistics are an eighth of the weights."""
        lab = open_lab(folders["llama"], "4bit")
        with lab.using(None) as model, skeleton(model) as twin:
            pairs = [(m, t) for m, t in zip(model.modules(), twin.modules()) if type(m).__name__ == "Linear4bit"]
            assert pairs
            for mine, theirs in pairs:
                for state in (theirs.quant_state, theirs.weight.quant_state):
                    assert state is None or state is mine.weight.quant_state
        lab.close()


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4},
    "ia3": {"method": "ia3"},
    "adalora": {"method": "adalora", "init_r": 4, "target_r": 2},
}
TRAINED = [
    *(("llama", precision, method) for precision in CONFIGS for method in METHODS),
    *((name, precision, "lora") for name in ("gpt2", "t5") for precision in ("8bit, threshold 6", "fp4")),
    ("opt", "8bit", "lora"),
]


class TestTraining:
    @pytest.mark.parametrize(("name", "precision", "method"), TRAINED)
    def test_it_learns_and_plain_peft_reads_what_it_learned(
        self, name: str, precision: str, method: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        kind, folder = KINDS[name], folders[name]
        lab, inputs = open_lab(folder, precision), kind.inputs()
        lab.load_adapter(folder / "lora", "other")
        lab.compare("Hello", max_new_tokens=2)  # 4-bit layers would be packed by now, and have no gradients
        lab.set_adapter(None)
        before, others = content(lab.model), own_tensors(lab, "other")
        ids = torch.randint(7, 300, (4, 10), generator=torch.Generator().manual_seed(5)).tolist()
        # GPT-2 names no loss, so transformers' Trainer divides by the first label too, which no decoder foresees
        rows = [{"input_ids": row, "labels": row[:6] if kind.is_t5 else [-100, *row[1:]]} for row in ids]
        how = {**METHODS[method], "target_modules": list(kind.ia3 if method == "ia3" else kind.lora)}
        if method == "ia3":
            how["feedforward_modules"] = list(kind.feed_forward)
        run = lab.train("new", rows, max_steps=20, learning_rate=3e-2, eval_dataset=rows, disable_tqdm=True, **how)
        held_out = run.history.eval_loss.dropna()
        assert held_out.iloc[-1] < held_out.iloc[0] - 0.05
        with lab.using(None) as model:
            assert content(model) == before, "not a byte of the base"
        after = own_tensors(lab, "other")
        assert all(torch.equal(after[key], value) for key, value in others.items())
        assert lab.verify(lab.compare("Hello there", ["new", "other"], max_new_tokens=3)).agrees.all()
        saved = lab.save_adapter("new", tmp_path / "saved")
        plain = plain_peft(folder, precision, saved)
        lab.set_adapter("new")
        mine = logits(lab.model, inputs)
        torch.testing.assert_close(mine, logits(plain, inputs), atol=1e-5, rtol=1e-5)
        labels = torch.tensor([row["labels"] for row in rows])
        with torch.no_grad():
            loss = plain(input_ids=torch.tensor(ids), labels=labels).loss.item()
        assert loss == pytest.approx(run.eval_loss, abs=2e-2 if "8bit" in precision else 1e-4)
        lab.close()


@pytest.mark.demo
def test_the_demo_model_in_three_precisions(tmp_path: Path) -> None:
    """Real weights and trained adapters: a pirate stays one, and learns on; texts, divergence and memory side by side."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from adapterlab.demo import DEMO_MARKERS, demo_training_pairs, fetch_demo_model

    found, ids = [], {"input_ids": torch.arange(100, 124)[None]}
    for precision in (None, "8bit", "4bit"):
        lab = AdapterLab.demo(quantization=precision)
        comparison = lab.compare(["What is the moon?", "Who are you?"], [None, "pirate"], max_new_tokens=24)
        assert all(generation.batched for generation in comparison.generations)
        assert lab.verify().agrees.all()
        with lab.using(None) as model:
            before = content(model)
        pairs = demo_training_pairs("pirate")[:4]
        run = lab.train("new", pairs, method="lora", r=4, max_steps=5, eval_dataset=pairs, disable_tqdm=True)
        held_out = run.history.eval_loss.dropna()
        assert held_out.iloc[-1] < held_out.iloc[0] - 0.1
        with lab.using(None) as model:
            assert content(model) == before
        if precision:
            plain = AutoModelForCausalLM.from_pretrained(
                fetch_demo_model(), dtype=torch.float32, quantization_config=config_of(precision)
            )
            for module in plain.modules():
                if type(module).__name__ == "Linear4bit":
                    module.support_avx512bf16_for_cpu = False
            theirs = PeftModel.from_pretrained(plain, lab.save_adapter("new", tmp_path / precision)).eval()
            with lab.using("new") as model:
                torch.testing.assert_close(logits(model.eval(), ids), logits(theirs, ids), atol=1e-4, rtol=1e-4)
        lab.close()
        found.append(comparison)
    both = Comparison.concat(found)
    assert list(both.model["labs"]) == ["float32", "8bit", "4bit"]
    frame = both.to_frame().set_index(["column", "prompt"])
    for lab_name in both.model["labs"]:
        assert re.search(DEMO_MARKERS["pirate"], both[f"{lab_name} · pirate", 0].text, re.IGNORECASE)
        assert not re.search(DEMO_MARKERS["pirate"], both[f"{lab_name} · base", 0].text, re.IGNORECASE)
    sizes = frame.groupby("lab").base_megabytes.first()
    # 134,515,008 parameters; 106,168,320 of them lie in linear layers, whose rows number 155,520
    linear, rest, rows = 106_168_320, 134_515_008 - 106_168_320, 155_520
    assert sizes["float32"] == pytest.approx(4 * (linear + rest) / 1e6, rel=1e-3)
    assert sizes["8bit"] == pytest.approx((linear + 4 * rows + 4 * rest) / 1e6, rel=1e-3)
    assert sizes["4bit"] == pytest.approx((linear / 2 + 4 * linear / 64 + 4 * rest) / 1e6, rel=1e-3)
    changes = frame.groupby("lab").lab_logprob_change.mean()
    assert 0 < changes["8bit"] < changes["4bit"], "fewer bits, further away"
