"""What was trained, saved and loaded again by everyone; and training on 8-bit and 4-bit bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model
from standins import random_adapter_state, tiny_llama, tiny_tokenizer, write_model
from transformers import AutoModelForCausalLM

from adapterlab import AdapterLab
from adapterlab.fingerprints import base_digest

PAIRS = [("What is the moon?", "Arr, the moon be a lantern."), ("Who are you?", "Arr, a captain.")] * 4
IDS = torch.tensor([[0, 7, 8, 9, 30, 40, 50, 60]])
LORA = {"method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
ADALORA = {"method": "adalora", "init_r": 6, "target_r": 3, "target_modules": ["q_proj", "v_proj"]}
WAYS = {
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "ia3": {"method": "ia3"},
    "ia3 without feed-forward": {"method": "ia3", "target_modules": ["k_proj", "v_proj"]},
    "adalora": ADALORA,
    "lora and lm_head": {**LORA, "modules_to_save": ["lm_head"]},
    "lora and lm_head, tied": {**LORA, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "lora and embeddings": {**LORA, "modules_to_save": ["embed_tokens"]},
    "lora and norms": {**LORA, "modules_to_save": ["norm"]},
    "lora and tokens": {**LORA, "trainable_token_indices": [30, 40]},
    "ia3 and lm_head": {"method": "ia3", "modules_to_save": ["lm_head"]},
    "adalora and lm_head": {**ADALORA, "modules_to_save": ["lm_head"]},
}


def train(lab: AdapterLab, name: str, **given: Any) -> Any:
    return lab.train(name, PAIRS, **{"max_steps": 12, "learning_rate": 2e-2, "disable_tqdm": True, **given})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def logits_under(lab: AdapterLab, name: str | None) -> torch.Tensor:
    with lab.using(name) as model, torch.no_grad():
        return model(IDS).logits


def everyones_logits(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The adapter in `folder` as the lab, plain PEFT and plain transformers (by either of its calls) load it.

    transformers 5.15 leaves out whole modules and trained tokens without a word; 5.23 does not.
    """
    lab = AdapterLab(str(folder))
    found = {"AdapterLab": logits(lab.model)}
    lab.close()
    found["PeftModel"] = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))
    config = PeftConfig.from_pretrained(folder)
    beside = getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None)
    if beside and parse(transformers.__version__) < parse("5.23"):
        return found
    found["AutoModelForCausalLM"] = logits(AutoModelForCausalLM.from_pretrained(folder))
    native = AutoModelForCausalLM.from_pretrained(base)
    native.load_adapter(str(folder))
    return {**found, "load_adapter": logits(native)}


class TestEveryoneLoadsIt:
    @pytest.mark.parametrize(
        ("way", "tied"), [*((way, True) for way in WAYS), ("lora and lm_head", False), ("lora and embeddings", False)]
    )
    def test_equal_logits(self, tmp_path: Path, way: str, tied: bool) -> None:
        base = write_model(tmp_path / "base", tiny_llama(tie_word_embeddings=tied), tiny_tokenizer(chat=True))
        lab = AdapterLab(str(base))
        bare, digest = logits_under(lab, None), base_digest(lab.model)
        train(lab, "new", **WAYS[way])
        assert base_digest(lab.model) == digest
        assert torch.equal(logits_under(lab, None), bare)
        expected = logits_under(lab, "new")
        assert (expected - bare).abs().max() > 0.05
        folder = lab.save_adapter("new", tmp_path / "saved")
        for loader, found in everyones_logits(base, folder).items():
            assert torch.equal(found, expected), loader
        lab.close()

    def test_several_with_and_without_whole_modules(self, tmp_path: Path) -> None:
        """Natively, selecting one without `modules_to_save` while the other has them raises."""
        base = write_model(tmp_path / "base", tiny_llama(tie_word_embeddings=True), tiny_tokenizer(chat=True))
        lab = AdapterLab(str(base))
        bare = logits_under(lab, None)
        expected = {}
        for name, way in (
            ("one", "lora and lm_head"),
            ("two", "lora"),
            ("three", "ia3 and lm_head"),
            ("four", "adalora"),
        ):
            train(lab, name, seed=len(name), **WAYS[way])
            expected[name] = logits_under(lab, name)
        for name in ("three", "one", "four", "two"):
            assert torch.equal(logits_under(lab, name), expected[name]), name
            folder = lab.save_adapter(name, tmp_path / name)
            plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
            assert torch.equal(logits(plain), expected[name]), name
        assert torch.equal(logits_under(lab, None), bare)
        assert lab.verify(lab.compare("Why?", max_new_tokens=4)).agrees.all()
        lab.close()

    # PEFT's words on its own small file: AdaLoRA's rank_pattern is read as if it were LoRA's, and a triplet pruned to
    # rank 0 is taken for a missing shard
    @pytest.mark.filterwarnings("ignore:Adapter 'default'. .*LoRA tensor.s. have invalid shape")
    @pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
    def test_a_small_file_of_pefts_is_saved_in_the_form_that_transformers_loads(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = write_model(tmp_path / "base", tiny_llama(), tiny_tokenizer(chat=True))
        config = AdaLoraConfig(init_r=6, target_r=3, total_step=9, target_modules=["q_proj", "v_proj"])
        plain = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        random_adapter_state(plain, 3)
        pattern = {}
        with torch.no_grad():
            for place, (key, parameter) in enumerate(plain.base_model.model.named_parameters()):
                if "lora_E" in key:
                    parameter[place % 5 :] = 0
                    pattern[key] = (parameter != 0).view(-1).tolist()
        plain.peft_config["default"].rank_pattern = pattern
        expected = logits(plain)
        plain.save_pretrained(tmp_path / "small", save_embedding_layers=False)
        with pytest.raises((RuntimeError, ValueError, AttributeError)):  # the trap: natively it does not load
            AutoModelForCausalLM.from_pretrained(base).load_adapter(str(tmp_path / "small"))
        lab = AdapterLab(str(base))
        lab.load_adapter(tmp_path / "small", "pruned")
        torch.testing.assert_close(logits_under(lab, "pruned"), expected)
        capsys.readouterr()
        folder = lab.save_adapter("pruned", tmp_path / "whole")
        assert "pruned" in capsys.readouterr().out
        for loader, found in everyones_logits(base, folder).items():
            torch.testing.assert_close(found, expected, msg=loader)
        lab.close()


@pytest.fixture(params=["8bit", "4bit"])
def quantised(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    wide = tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    base = write_model(tmp_path / "base", wide, tiny_tokenizer(chat=True))
    lab = AdapterLab(str(base), quantization=request.param)
    yield lab
    lab.close()


class TestQuantisedBases:
    @pytest.mark.parametrize("way", ["lora", "ia3", "adalora", "lora and lm_head"])
    def test_they_train_and_keep_every_bit(self, quantised: AdapterLab, way: str) -> None:
        lab = quantised
        lab.generate("What is the moon?", None, max_new_tokens=2)
        digest = base_digest(lab.model)
        run = train(lab, "new", eval_dataset=PAIRS[:2], max_steps=25, **WAYS[way])
        held_out = run.history.eval_loss.dropna()
        assert held_out.iloc[-1] < held_out.iloc[0] - 0.05
        assert base_digest(lab.model) == digest
        factors = {key: value for key, value in lab._adapters.state("new")[1].items() if "lm_head" not in key}
        assert {value.dtype for value in factors.values()} == {torch.float32}
        assert lab.compare("Why?", max_new_tokens=3)["new"].logit_shift > 0

    def test_having_generated_changes_no_gradient(self, quantised: AdapterLab) -> None:
        """bitsandbytes repacks 4-bit weights at the first forward in eval mode, where nothing forbids it."""
        lab = quantised
        train(lab, "first", max_steps=3, **LORA)
        lab.compare("What is the moon?", max_new_tokens=3)
        train(lab, "second", max_steps=3, **LORA)
        first, second = (lab._adapters.state(name)[1] for name in ("first", "second"))
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, msg=key)
