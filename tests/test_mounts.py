"""The oracle: whatever happened before, the lab's logits are those of a fresh model with only that adapter in it."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_adapters import logits_of

from adapterlab import AdapterLab, AdapterLabError

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def architectures() -> list[tuple[str, Any, list[str], list[str]]]:
    """(builder, inputs, LoRA targets, feed-forward targets)"""
    return [
        ("tiny_opt", "causal", ["q_proj", "v_proj", "fc1"], ["fc2"]),
        ("tiny_llama", "causal", ["q_proj", "k_proj", "up_proj"], ["down_proj"]),
        ("tiny_gpt2", "causal", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        ("tiny_t5", "seq2seq", ["q", "v", "wi"], ["wo"]),
        ("tiny_bart", "seq2seq", ["q_proj", "v_proj"], ["fc2"]),
        ("tiny_mixtral", "causal", ["q_proj", "v_proj"], ["o_proj"]),
    ]


def method_configs(builder: str, targets: list[str], feedforward: list[str]) -> dict[str, Any]:
    from peft import AdaLoraConfig, HRAConfig, IA3Config, LNTuningConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    fan = builder == "tiny_gpt2"
    configs: dict[str, Any] = {
        "lora": LoraConfig(r=4, target_modules=targets, fan_in_fan_out=fan),
        "rslora": LoraConfig(r=4, use_rslora=True, target_modules=targets, fan_in_fan_out=fan),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=targets, fan_in_fan_out=fan),
        "ia3": IA3Config(target_modules=targets + feedforward, feedforward_modules=feedforward, fan_in_fan_out=fan),
        "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=targets, fan_in_fan_out=fan),
    }
    if not fan:
        configs |= {
            "loha": LoHaConfig(r=3, target_modules=targets),
            "lokr": LoKrConfig(r=3, target_modules=targets),
            "oft": OFTConfig(oft_block_size=8, target_modules=targets),
            "hra": HRAConfig(r=4, target_modules=targets),
        }
    if builder == "tiny_llama":
        configs["ln_tuning"] = LNTuningConfig(target_modules=["input_layernorm"])
        configs["embed"] = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
        configs["head"] = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        configs["tokens"] = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[11, 12, 13])
    if builder == "tiny_mixtral":
        configs["moe"] = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    return configs


@pytest.mark.parametrize(("builder", "kind", "targets", "feedforward"), architectures())
def test_every_method_equals_plain_peft_on_one_base(
    builder: str, kind: str, targets: list[str], feedforward: list[str], ids: torch.Tensor, tmp_path: Path
) -> None:
    make = getattr(standins, builder)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if kind == "seq2seq" else {})}
    tokenizer = standins.tiny_tokenizer(seq2seq=kind == "seq2seq")
    configs = method_configs(builder, targets, feedforward)
    folders = {}
    for seed, (name, config) in enumerate(configs.items()):
        folders[name] = standins.write_adapter(tmp_path / name, make(), config, seed=seed)
    lab = AdapterLab(make(), tokenizer=tokenizer)
    for name, folder in folders.items():
        lab.load_adapter(folder, name)
    with torch.no_grad():
        for name, folder in folders.items():
            expected = PeftModel.from_pretrained(make(), folder).eval()(**inputs).logits
            with lab.using(name) as model:
                assert torch.allclose(model(**inputs).logits, expected, **CLOSE), name
                assert isinstance(model, type(make()))
        lab.set_adapter(None)
        base = make()(**inputs).logits
        assert torch.equal(lab.model(**inputs).logits, base), "base must stay equal to the bit"
        assert (expected - base).abs().max() > 1e-4
    assert not any(isinstance(module, BaseTunerLayer) for module in lab.model.modules())


def test_any_sequence_of_operations_equals_a_fresh_model(
    lab: AdapterLab, adapter_folders: dict[str, Path], plain_logits: Any, ids: torch.Tensor
) -> None:
    expected = {name: plain_logits(name) for name in [None, *adapter_folders]}
    dice = random.Random(0)
    acted = 0
    for _ in range(150):
        present = [name for name in adapter_folders if name in lab.adapters]
        absent = [name for name in adapter_folders if name not in lab.adapters]
        what = dice.choice(
            ["load", "set", "set", "set", "base", "disable", "enable", "delete", "train", "fail", "using"]
        )
        if what == "load" and absent:
            name = dice.choice(absent)
            lab.load_adapter(adapter_folders[name], name)
        elif what == "set" and present:
            lab.set_adapter(dice.choice(present))
        elif what == "base":
            lab.set_adapter(None)
        elif what == "disable":
            lab.disable_adapters()
        elif what == "enable":
            lab.enable_adapters()
        elif what == "delete" and present:
            lab.delete_adapter(dice.choice(present))
        elif what == "train" and present:
            lab.set_trainable(dice.choice([None, *present]))
        elif what == "fail":
            with pytest.raises(AdapterLabError):
                lab.set_adapter("nobody")
        elif what == "using" and present:
            with pytest.raises(ZeroDivisionError), lab.using(dice.choice(present)):
                _ = 1 / 0
        active = lab.active_adapters
        name = next(iter(active), None)
        acted += name is not None
        assert torch.allclose(logits_of(lab, ids), expected[name], **CLOSE)
        if name is None:
            assert torch.equal(logits_of(lab, ids), expected[None])
        assert [
            n for n, p in lab.model.named_parameters() if p.requires_grad and "lora" not in n and "ia3" not in n
        ] == []
    assert acted > 20, "the sequence must have run adapters, not only base"


def test_a_mounted_adapter_is_a_native_model(
    full_lab: AdapterLab, tmp_path: Path, plain_logits: Any, ids: torch.Tensor
) -> None:
    """transformers' own saving writes a folder that plain PEFT reads."""
    full_lab.set_adapter("pirate")
    assert full_lab.model.active_adapters() == ["pirate"]
    assert list(full_lab.model.peft_config) == ["pirate"]
    full_lab.model.save_pretrained(tmp_path / "native")
    again = PeftModel.from_pretrained(standins.tiny_llama(), tmp_path / "native").eval()
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, plain_logits("pirate"), **CLOSE)


def test_unmounted_adapters_are_not_in_the_model_and_take_its_mode(full_lab: AdapterLab) -> None:
    names = [name for name, _ in full_lab.model.named_parameters()]
    assert not any("lora_" in name or "ia3_" in name for name in names)
    full_lab.model.train()
    full_lab.set_adapter("pirate")
    layers = [m for m in full_lab.model.modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    assert all(layer.training for layer in layers)
    full_lab.model.eval()
    full_lab.set_adapter("poet")
    assert not any(module.training for module in full_lab.model.modules())


def test_a_failed_load_leaves_nothing_behind(full_lab: AdapterLab, tmp_path: Path, ids: torch.Tensor) -> None:
    from peft import LoraConfig

    other = standins.tiny_llama(hidden_size=64)
    folder = standins.write_adapter(tmp_path / "other", other, LoraConfig(r=4, target_modules=["q_proj"]))
    full_lab.set_adapter("pirate")
    before = (list(full_lab.adapters), full_lab.selection, full_lab.trainable, copy.copy(full_lab.model.peft_config))
    keys, logits = set(full_lab.model.state_dict()), logits_of(full_lab, ids)
    with pytest.raises(
        AdapterLabError, match=r"model.layers.0.self_attn.q_proj.lora_A.weight is \[4, 64\], .*needs \[4, 32\]"
    ):
        full_lab.load_adapter(folder)
    with pytest.raises(AdapterLabError, match="nothing_like_this"):
        full_lab.add_adapter("lora", "broken", target_modules=["nothing_like_this"])
    assert (list(full_lab.adapters), full_lab.selection, full_lab.trainable, full_lab.model.peft_config) == before
    assert set(full_lab.model.state_dict()) == keys
    assert torch.equal(logits_of(full_lab, ids), logits)


def test_five_rounds_of_add_and_delete_leave_no_wrapper_and_no_tensor(lab: AdapterLab, ids: torch.Tensor) -> None:
    import gc
    import weakref

    expected, kinds = logits_of(lab, ids), [type(m) for m in lab.model.modules()]
    for _ in range(5):
        lab.add_adapter("lora", "one", init_lora_weights=False)
        lab.add_adapter("ia3", "two", init_ia3_weights=False)
        ghost = weakref.ref(next(p for n, p in lab.model.named_parameters() if "ia3" in n))
        lab.delete_adapter("one")
        freed = lab.delete_adapter("two")
        assert freed > 0
    gc.collect()
    assert ghost() is None, "a deleted adapter's tensors must be gone"
    assert [type(m) for m in lab.model.modules()] == kinds
    assert torch.equal(logits_of(lab, ids), expected)


def test_a_model_with_native_adapters_is_adopted_and_given_back(ids: torch.Tensor) -> None:
    """The guide's own path: OPTForCausalLM with `model.add_adapter` twice, then into the lab."""
    from peft import LoraConfig

    model = standins.tiny_opt()
    config = LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="adapter_1")
    model.add_adapter(config, adapter_name="adapter_2")
    expected = {}
    with torch.no_grad():
        for name in ("adapter_1", "adapter_2"):
            model.set_adapter(name)
            expected[name] = model(ids).logits
        model.disable_adapters()
        base = model(ids).logits
        model.enable_adapters()
    lab = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    assert lab.model is model
    assert list(lab.adapters) == ["adapter_1", "adapter_2"]
    assert torch.equal(logits_of(lab, ids), base)
    for name, logits in expected.items():
        lab.set_adapter(name)
        assert torch.allclose(logits_of(lab, ids), logits, **CLOSE)
    lab.close()
    model.set_adapter("adapter_2")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected["adapter_2"]), "the caller's model comes back as it was"


@pytest.mark.parametrize("train", [True, False])
def test_a_mode_set_meanwhile_is_the_mode_of_all_that_is_given_back(train: bool) -> None:
    """`model.train()` does not reach the layers that are out of the model at the time."""
    from peft import LoraConfig

    model = standins.tiny_llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], lora_dropout=0.5), "own")
    model.train(not train)
    lab = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    lab.model.train(train)
    lab.close()
    assert {module.training for module in model.modules()} == {train}


def test_a_mode_that_nobody_touched_is_given_back_as_it_came() -> None:
    from peft import LoraConfig

    model = standins.tiny_llama().eval()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], lora_dropout=0.5), "own")  # its dropout is in train mode
    modes = {path: module.training for path, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    lab = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    lab.set_adapter("own")
    lab.set_adapter(None)
    lab.close()
    assert {path: module.training for path, module in model.named_modules()} == modes


def test_a_peft_model_in_hand(adapter_folders: dict[str, Path], plain_logits: Any, ids: torch.Tensor) -> None:
    peft_model = PeftModel.from_pretrained(standins.tiny_llama(), adapter_folders["pirate"]).eval()
    lab = AdapterLab(peft_model, tokenizer=standins.tiny_tokenizer())
    assert list(lab.adapters) == ["default"]
    assert torch.equal(logits_of(lab, ids), plain_logits(None))
    lab.set_adapter("default")
    assert torch.allclose(logits_of(lab, ids), plain_logits("pirate"), **CLOSE)
    lab.close()
    with torch.no_grad():
        assert torch.allclose(peft_model(ids).logits, plain_logits("pirate"), **CLOSE)


def test_a_peft_model_of_which_one_adapter_has_trained_tokens(ids: torch.Tensor) -> None:
    from peft import LoraConfig

    configs = {
        "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=ids[0, 1:3].tolist()),
        "none": LoraConfig(r=4, target_modules=["q_proj"]),
    }
    together: Any = PeftModel(standins.tiny_llama(), configs["tokens"], "tokens")
    together.add_adapter("none", configs["none"])
    for seed, name in enumerate(configs):
        together.set_adapter(name)
        standins.random_adapter_state(together, seed)
    expected = {}
    for name, config in configs.items():
        plain = PeftModel(standins.tiny_llama(), config, name).eval()
        plain.load_state_dict(together.state_dict(), strict=False)
        with torch.no_grad():
            expected[name] = plain(ids).logits
    lab = AdapterLab(together.eval(), tokenizer=standins.tiny_tokenizer())
    assert list(lab.adapters) == list(configs)
    for name, logits in expected.items():
        lab.set_adapter(name)
        assert torch.allclose(logits_of(lab, ids), logits, **CLOSE)


def test_mounting_leaves_the_modes_of_the_base_alone(full_lab: AdapterLab) -> None:
    """It gave the layers' insides the mode of the whole model, the base's own modules included."""
    model = full_lab.model
    model.model.layers[0].train()
    modes = {path: module.training for path, module in model.named_modules()}
    for column in ("pirate", {"wide": 0.5, "poet": 1.0}, "dora", None):
        full_lab.set_adapter(column)
        for path, layer in full_lab._adapters.mounts.sites.items():
            standing = layer.parent._modules[layer.child]
            assert {module.training for module in standing.modules()} == {".layers.0." in f".{path}"}
    assert {path: module.training for path, module in model.named_modules()} == modes
