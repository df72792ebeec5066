"""Blends against the formula, written out with explicit weights: W + Σ mᵢΔWᵢ, times 1 + m(s − 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_adapters import adapter_configs, logits_of

from adapterlab import AdapterLab, AdapterLabError

CLOSE = {"atol": 5e-5, "rtol": 1e-4}


def explicit_model(folders: dict[str, Path], column: dict[str, float]) -> Any:
    """A fresh tiny Llama whose weights are computed from the saved files alone, by the design's equation."""
    model = standins.tiny_llama()
    scales_out: dict[str, torch.Tensor] = {}
    scales_in: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    for name, m in column.items():
        config: Any = adapter_configs()[name]
        tensors = {
            key.removeprefix("base_model.model."): value
            for key, value in load_file(str(folders[name] / "adapter_model.safetensors")).items()
        }
        for key, value in tensors.items():
            path, _, part = key.partition(".lora_A" if ".lora_A" in key else ".ia3_l" if ".ia3_l" in key else ".none")
            if ".ia3_l" in key:
                scale = 1 + m * (value.flatten() - 1)
                target = scales_in if path.endswith("down_proj") else scales_out
                target[path] = target.get(path, torch.ones(())) * scale
            elif ".lora_A" in key:
                A, suffix = value, part  # ".weight" for LoRA, "" for AdaLoRA
                B = tensors[f"{path}.lora_B{suffix}"]
                module = path.rsplit(".", 1)[-1]
                if config.peft_type == "ADALORA":
                    e = tensors[f"{path}.lora_E"].flatten() * config.lora_alpha / (config.init_r + 1e-5)
                else:
                    r = config.rank_pattern.get(module, config.r)
                    alpha = config.alpha_pattern.get(module, config.lora_alpha)
                    e = torch.full((r,), alpha / (r**0.5 if config.use_rslora else r))
                deltas[path] = deltas.get(path, torch.zeros(())) + m * (B * e) @ A
    with torch.no_grad():
        for path in {*deltas, *scales_out, *scales_in}:
            module = model.get_submodule(path)
            W = module.weight * scales_in.get(path, torch.ones(()))
            W = W + deltas.get(path, torch.zeros(()))
            s = scales_out.get(path)
            module.weight.copy_(W if s is None else W * s[:, None])
            if s is not None and module.bias is not None:
                module.bias.mul_(s)
    return model


@pytest.mark.parametrize(
    "column",
    [
        {"pirate": 0.5},
        {"pirate": -1.0},
        {"wide": 1.5},
        {"ada": 0.3},
        {"poet": 0.5},
        {"poet": 2.0},
        {"pirate": 0.7, "wide": 0.3},
        {"pirate": 1.0, "ada": 1.0},
        {"wide": 0.4, "poet": 0.6},
        {"poet": 0.6, "wide": 0.4},
        {"pirate": 0.5, "wide": 0.5, "ada": 2.0, "poet": 1.5},
    ],
    ids=str,
)
def test_a_blend_is_the_equation(
    full_lab: AdapterLab, adapter_folders: dict[str, Path], column: dict[str, float], ids: torch.Tensor
) -> None:
    with torch.no_grad():
        expected = explicit_model(adapter_folders, column)(ids).logits
        assert (expected - standins.tiny_llama()(ids).logits).abs().max() > 0.05
    full_lab.set_adapter(column)
    assert torch.allclose(logits_of(full_lab, ids), expected, **CLOSE)


def test_multiplier_one_is_peft_and_zero_is_base(full_lab: AdapterLab, ids: torch.Tensor, plain_logits: Any) -> None:
    full_lab.set_adapter({"pirate": 1.0})
    assert torch.allclose(logits_of(full_lab, ids), plain_logits("pirate"), **CLOSE)
    full_lab.set_adapter({"pirate": 0.0, "dora": 0})
    assert torch.equal(logits_of(full_lab, ids), plain_logits(None))


@pytest.mark.parametrize("column", [{"dora": 0.5}, {"dora": 1, "pirate": 1}, ["pirate", "dora"]], ids=str)
def test_dora_does_not_blend_and_says_why(full_lab: AdapterLab, column: Any) -> None:
    before = full_lab.selection
    with pytest.raises(AdapterLabError, match="DoRA is no plain ΔW"):
        full_lab.set_adapter(column)
    assert full_lab.selection == before


def test_other_methods_refuse_a_multiplier_with_the_reason(lab: AdapterLab) -> None:
    lab.add_adapter("loha", "h")
    with pytest.raises(AdapterLabError, match=r"'h' × 0.5 has no meaning: .*knows no multiplier for LoHa"):
        lab.compare("Hello", columns=[{"h": 0.5}])
    lab.add_adapter("lora", "head", modules_to_save=["lm_head"])
    with pytest.raises(AdapterLabError, match="modules_to_save replaces a whole module"):
        lab.set_adapter({"head": 0.5})


@pytest.mark.parametrize("builder", ["tiny_gpt2", "tiny_opt", "tiny_t5"])
def test_blends_on_other_layers(builder: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """Conv1D, OPT's flattened fc1/fc2 and T5 (which asks `wo` for its dtype), against merging by plain PEFT."""
    from peft import LoraConfig

    make = getattr(standins, builder)
    targets = {"tiny_gpt2": ["c_attn", "c_fc"], "tiny_opt": ["fc1", "fc2", "q_proj"], "tiny_t5": ["wo", "q"]}[builder]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :4]} if builder == "tiny_t5" else {})}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=builder == "tiny_gpt2")
    folders = [standins.write_adapter(tmp_path / str(seed), make(), config, seed=seed) for seed in (1, 2)]
    lab = AdapterLab(make(), tokenizer=standins.tiny_tokenizer())
    lab.load_adapter(folders[0], "a")
    lab.load_adapter(folders[1], "b")
    plain = PeftModel.from_pretrained(make(), folders[0], adapter_name="a")
    plain.load_adapter(folders[1], "b")
    for layer in plain.modules():  # PEFT's own way to a multiplier
        if hasattr(layer, "set_scale") and hasattr(layer, "lora_A"):
            layer.set_scale("a", 0.5)
            layer.set_scale("b", 2.0)
    plain.base_model.set_adapter(["a", "b"])
    with torch.no_grad(), lab.using({"a": 0.5, "b": 2.0}) as model:
        assert torch.allclose(model(**inputs).logits, plain.eval()(**inputs).logits, **CLOSE)


def test_a_blend_on_embeddings(ids: torch.Tensor, tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"])
    folder = standins.write_adapter(tmp_path / "e", standins.tiny_llama(), config, seed=3)
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    lab.load_adapter(folder, "e")
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    A, B = (next(v for k, v in tensors.items() if part in k) for part in ("lora_embedding_A", "lora_embedding_B"))
    explicit = standins.tiny_llama()
    with torch.no_grad():
        explicit.model.embed_tokens.weight.add_(0.5 * (8 / 4) * (B @ A).T)
        with lab.using({"e": 0.5}) as model:
            assert torch.allclose(model(ids).logits, explicit(ids).logits, **CLOSE)


def test_a_blend_on_embeddings_that_are_scaled_by_a_number(ids: torch.Tensor, tmp_path: Path) -> None:
    from peft import LoraConfig

    def make() -> Any:
        return standins.tiny_bart(scale_embedding=True)

    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    folder = standins.write_adapter(tmp_path / "e", make(), config, seed=3)
    lab = AdapterLab(make(), tokenizer=standins.tiny_tokenizer(seq2seq=True))
    lab.load_adapter(folder, "e")
    plain = PeftModel.from_pretrained(make(), folder).eval()
    for layer in plain.modules():
        if hasattr(layer, "lora_embedding_A"):
            layer.scaling["default"] *= 0.5
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    with torch.no_grad(), lab.using({"e": 0.5}) as model:
        assert torch.allclose(model(**inputs).logits, plain(**inputs).logits, **CLOSE)
