"""The state table of ARCHITECTURE.md, row by row, and what somebody does to the model behind the lab's back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import logits_of

from adapterlab import AdapterLab, AdapterLabError, AdapterLabWarning


def state(lab: AdapterLab) -> tuple[str, bool, str | None]:
    return lab.selection.label, lab.enabled, lab.trainable


def trainable_names(lab: AdapterLab) -> list[str]:
    return [name for name, p in lab.model.named_parameters() if p.requires_grad]


def test_the_table(lab: AdapterLab, adapter_folders: dict[str, Path], ids: torch.Tensor) -> None:
    assert state(lab) == ("base", True, None)
    lab.load_adapter(adapter_folders["pirate"], "pirate")
    assert state(lab) == ("pirate", True, None)
    lab.add_adapter("ia3", "fresh")
    assert state(lab) == ("fresh", True, "fresh")
    lab.load_adapter(adapter_folders["poet"], "poet")
    assert state(lab) == ("poet", True, "fresh"), "loading leaves what is trainable"
    lab.disable_adapters()
    assert state(lab) == ("poet", False, "fresh")
    assert lab.active_adapters == {}
    lab.set_adapter(None)
    assert state(lab) == ("base", False, "fresh"), "selecting base leaves enabled as it is"
    lab.set_adapter({"pirate": 0.5, "poet": 0.5})
    assert state(lab) == ("pirate × 0.5 + poet × 0.5", True, "fresh"), "selecting an adapter enables"
    lab.disable_adapters()
    lab.enable_adapters()
    assert lab.active_adapters == {"pirate": 0.5, "poet": 0.5}
    lab.delete_adapter("poet")
    assert state(lab) == ("base", True, "fresh")
    lab.set_adapter("pirate")
    lab.delete_adapter("fresh")
    assert state(lab) == ("pirate", True, None)
    before = state(lab), lab.model.training
    lab.compare("Hello", max_new_tokens=2)
    lab.generate("Hello", "base", max_new_tokens=2)
    with lab.using(None):
        assert torch.equal(logits_of(lab, ids), logits_of(lab, ids))
    assert (state(lab), lab.model.training) == before


def test_a_deleted_selection_says_so(full_lab: AdapterLab, capsys: pytest.CaptureFixture[str]) -> None:
    full_lab.set_adapter("pirate")
    capsys.readouterr()
    full_lab.delete_adapter("pirate")
    assert "'pirate' was selected: base is selected now." in capsys.readouterr().out


def test_only_the_trainable_adapter_requires_grad_whatever_is_selected(full_lab: AdapterLab) -> None:
    """PEFT sets requires_grad when one selects or enables (peft #3447, #2759)."""
    full_lab.set_adapter("pirate")
    full_lab.disable_adapters()
    full_lab.enable_adapters()
    assert trainable_names(full_lab) == []
    full_lab.set_trainable("pirate")
    names = trainable_names(full_lab)
    assert names
    assert all(".pirate" in name for name in names)
    full_lab.set_adapter("poet")
    assert trainable_names(full_lab) == []
    full_lab.set_adapter("pirate")
    assert trainable_names(full_lab) == names
    full_lab.set_trainable(None)
    assert trainable_names(full_lab) == []


def test_adalora_ranknum_is_never_trained(full_lab: AdapterLab) -> None:
    full_lab.set_adapter("ada")
    full_lab.set_trainable("ada")
    kinds = {name.split(".")[-2] for name in trainable_names(full_lab)}
    assert kinds == {"lora_A", "lora_B", "lora_E"}


def test_disabled_is_base_to_the_bit_also_with_modules_to_save(lab: AdapterLab, ids: torch.Tensor) -> None:
    """transformers' enable_adapters skips ModulesToSaveWrapper, and its set_adapter raises without one."""
    base = logits_of(lab, ids)
    lab.add_adapter("lora", "head", modules_to_save=["lm_head"], init_lora_weights=False)
    lab.add_adapter("lora", "plain", init_lora_weights=False)
    lab.set_adapter("head")
    head = logits_of(lab, ids)
    lab.disable_adapters()
    assert torch.equal(logits_of(lab, ids), base)
    lab.enable_adapters()
    assert torch.equal(logits_of(lab, ids), head)
    lab.set_adapter("plain")
    lab.set_adapter("head")
    assert torch.equal(logits_of(lab, ids), head)


@pytest.mark.parametrize("what", ["disable", "train", "native", "merge", "unwrap"])
def test_what_is_done_behind_the_labs_back_is_said_and_undone(
    full_lab: AdapterLab, ids: torch.Tensor, what: str
) -> None:
    from peft import LoraConfig

    full_lab.set_adapter("pirate")
    expected = logits_of(full_lab, ids)
    model: Any = full_lab.model
    if what == "disable":
        model.disable_adapters()
    elif what == "train":
        model.set_adapter("pirate")  # PEFT makes what one selects trainable
    elif what == "native":
        model.add_adapter(LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False), "intruder")
    elif what == "merge":
        layer = model.model.layers[0].self_attn.q_proj
        given, added = layer.base_layer.weight.detach().clone(), layer.get_delta_weight("pirate").detach()
        layer.merge()
    else:
        attention = model.model.layers[0].self_attn
        attention.q_proj = attention.q_proj.base_layer
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        full_lab.compare("Hello", columns=[None], max_new_tokens=1)
    said = [str(w.message) for w in said if issubclass(w.category, AdapterLabWarning)]
    assert "behind the lab's back" in said[0]
    assert len(said) == (2 if what == "merge" else 1), (
        "merging and dividing back leaves rounding in the base, and that is said"
    )
    if what == "merge":  # that rounding, and no more; with the weights as given, the logits are held as ever
        weight = full_lab.model.model.layers[0].self_attn.q_proj.base_layer.weight
        assert torch.equal(weight, (given + added) - added)
        weight.data.copy_(given)
    assert torch.allclose(logits_of(full_lab, ids), expected, atol=1e-6)
    assert list(full_lab.model.peft_config) == ["pirate"]
    assert trainable_names(full_lab) == []


def test_using_restores_after_an_exception_and_nests(full_lab: AdapterLab) -> None:
    full_lab.set_adapter("pirate")
    seen = []

    def fail_inside() -> None:
        with full_lab.using("poet"), full_lab.using({"wide": 0.5}):
            seen.extend(full_lab._adapters.mounts.standing())
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail_inside()
    assert seen == ["wide"]
    assert list(full_lab._adapters.mounts.standing()) == ["pirate"]
    with full_lab.using("poet"):
        with full_lab.using(None):
            assert full_lab._adapters.mounts.standing() == {}
        assert list(full_lab._adapters.mounts.standing()) == ["poet"]


def test_status_badges_follow_the_weights(lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path) -> None:
    lab.load_adapter(adapter_folders["pirate"], "pirate")
    lab.add_adapter("lora", "fresh")
    lab.add_adapter("ia3", "fresh-ia3")
    lab.add_adapter("adalora", "fresh-ada", target_modules=["q_proj"])
    lab.add_adapter("loha", "fresh-loha")
    lab.add_adapter("lora", "dice", init_lora_weights=False)
    badges = {name: info.status for name, info in lab.adapters.items()}
    fresh = dict.fromkeys(["fresh", "fresh-ia3", "fresh-ada", "fresh-loha"], "untrained")
    assert badges == {"pirate": "loaded", **fresh, "dice": "random weights"}
    with lab.using("fresh") as model:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.add_(1.0)
    lab.compare("Hello", max_new_tokens=1)
    assert lab.adapters["fresh"].status == "unsaved"
    lab.save_adapter("fresh", tmp_path / "fresh")
    assert lab.adapters["fresh"].status == "trained here"


def test_adalora_needs_no_total_step_and_configs_are_never_mutated(lab: AdapterLab) -> None:
    import copy

    from peft import LoraConfig

    lab.add_adapter("adalora", "ada", target_modules=["q_proj"], init_r=6, target_r=2)
    assert lab.adapters["ada"].r == 6
    config = LoraConfig(r=2, target_modules=["q_proj"])
    before = copy.deepcopy(config.__dict__)
    lab.add_adapter(config, "one")
    lab.add_adapter(config, "two")
    assert config.__dict__ == before


def test_trainable_weights_are_fp32_on_a_half_precision_base(ids: torch.Tensor) -> None:
    import standins

    lab = AdapterLab(standins.tiny_llama().half(), tokenizer=standins.tiny_tokenizer())
    lab.add_adapter("lora", "a")
    assert {p.dtype for p in lab.model.parameters() if p.requires_grad} == {torch.float32}


def test_two_names_one_inside_the_other(lab: AdapterLab, ids: torch.Tensor) -> None:
    """AdaLoRA's allocator and PEFT's key handling match names by substring; the lab's adapters never meet."""
    lab.add_adapter("lora", "r1", r=1, init_lora_weights=False)
    one = logits_of(lab, ids)
    lab.add_adapter("lora", "r16", r=16, init_lora_weights=False)
    sixteen = logits_of(lab, ids)
    lab.set_adapter("r1")
    assert torch.equal(logits_of(lab, ids), one)
    lab.delete_adapter("r1")
    lab.set_adapter("r16")
    assert torch.equal(logits_of(lab, ids), sixteen)


# -- files ----------------------------------------------------------------------------------------------------------


def tampered(folder: Path, target: Path, change: Any = None, **config: Any) -> Path:
    """A copy of an adapter folder with other tensors or other config fields."""
    target.mkdir()
    raw = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**raw, **config}))
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    save_file(change(tensors) if change else tensors, str(target / "adapter_model.safetensors"), {"format": "pt"})
    return target


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.mlp.down_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.bias",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.weight",
    ],
)
def test_a_file_that_carries_base_weights_is_refused(
    lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path, key: str, ids: torch.Tensor
) -> None:
    """Native load_adapter and PeftModel write these into the base without a word."""
    base = logits_of(lab, ids)
    shape = lab.model.state_dict()[key.removeprefix("base_model.model.").replace(".base_layer", "")].shape
    folder = tampered(adapter_folders["pirate"], tmp_path / "x", lambda t: {**t, key: torch.ones(shape)})
    with pytest.raises(AdapterLabError, match=key.removeprefix("base_model.model.").replace(".", r"\.")):
        lab.load_adapter(folder)
    assert torch.equal(logits_of(lab, ids), base)
    assert not lab.check_adapter(folder).ok


def test_missing_tensors(
    lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = tampered(
        adapter_folders["pirate"], tmp_path / "none", lambda t: {"base_model.model.x.lora_A.weight": torch.ones(1)}
    )
    with pytest.raises(AdapterLabError, match="none of its tensors matches"):
        lab.load_adapter(none)
    some = tampered(
        adapter_folders["pirate"], tmp_path / "some", lambda t: {k: v for k, v in t.items() if "layers.0" in k}
    )
    lab.load_adapter(some, "some")
    assert "4 of 8 tensors loaded" in capsys.readouterr().out


def test_trained_biases_are_refused(lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tampered(adapter_folders["pirate"], tmp_path / "b", bias="all")
    with pytest.raises(AdapterLabError, match="bias='all'"):
        lab.load_adapter(folder)
    with pytest.raises(AdapterLabError, match="bias='lora_only'"):
        lab.add_adapter("lora", "x", bias="lora_only")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva"])
def test_inits_that_change_the_base_are_refused(lab: AdapterLab, init: str, ids: torch.Tensor) -> None:
    from peft import LoraConfig

    base = logits_of(lab, ids)
    config = LoraConfig(target_modules=["q_proj"])
    config.init_lora_weights = init  # some of these want more settings before they can be made
    with pytest.raises(AdapterLabError, match="base must stay base"):
        lab.add_adapter(config, "x")
    assert torch.equal(logits_of(lab, ids), base)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING .*PeftModel.from_pretrained"),
        *(
            (
                {"peft_type": method},
                f"x' can't be used in the lab: {method} shares one state .*PeftModel.from_pretrained",
            )
            for method in ("VERA", "PVERA", "VBLORA", "UNILORA", "TINYLORA", "FROD")
        ),
        ({"peft_type": "NOVEL"}, "'NOVEL' is no method"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS.*PeftModel.from_pretrained"),
    ],
)
def test_what_can_not_live_in_a_lab_names_the_plain_call(
    lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path, change: dict[str, str], said: str
) -> None:
    folder = tampered(adapter_folders["pirate"], tmp_path / "x", **change)
    with pytest.raises(AdapterLabError, match=said):
        lab.load_adapter(folder)
    assert not lab.check_adapter(folder).ok
    assert list(lab.adapters) == []


def test_a_config_imports_nothing(lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's AutoPeftModel imports what `auto_mapping` names."""
    import sys

    (tmp_path / "evil_library.py").write_text("raise SystemExit('imported')")
    mapping = {"base_model_class": "X", "parent_library": "evil_library"}
    folder = tampered(adapter_folders["pirate"], tmp_path / "x", auto_mapping=mapping)
    lab.load_adapter(folder, "x")
    assert "evil_library" not in sys.modules


def test_a_pickle_runs_no_code(lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "boom",)

    folder = tampered(adapter_folders["pirate"], tmp_path / "x")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))
    with pytest.raises(AdapterLabError, match="can't be read as adapter weights"):
        lab.load_adapter(folder)
    assert not (tmp_path / "boom").exists()


def test_an_absurd_rank_is_refused_before_memory_is_taken(lab: AdapterLab) -> None:
    with pytest.raises(AdapterLabError, match=r"would take .* GB"):
        lab.add_adapter("lora", "huge", r=10**9, target_modules=["q_proj"])
    assert list(lab.adapters) == []


def test_another_base_is_said(lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    lab._adapters.base_path = "facebook/opt-350m"
    folder = tampered(adapter_folders["pirate"], tmp_path / "x", base_model_name_or_path="facebook/opt-125m")
    lab.load_adapter(folder, "x")
    assert "names 'facebook/opt-125m' as its base, this lab's is 'facebook/opt-350m'" in capsys.readouterr().out


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_bases_hold_switch_and_blend(
    bits: str, adapter_folders: dict[str, Path], tmp_path: Path, ids: torch.Tensor
) -> None:
    """Against plain PEFT on an equally quantised model; base equal to the bit afterwards."""
    import standins
    from peft import PeftModel

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    folder = standins.write_model(tmp_path / "m", standins.tiny_llama(**sizes), standins.tiny_tokenizer())
    from peft import IA3Config, LoraConfig

    configs = {
        "pirate": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "poet": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    lab = AdapterLab(folder, quantization=bits, dtype=torch.float32)
    base = logits_of(lab, ids)
    for name, config in configs.items():
        standins.write_adapter(tmp_path / name, standins.tiny_llama(**sizes), config, seed=3)
        lab.load_adapter(tmp_path / name, name)
        twin = AdapterLab(folder, quantization=bits, dtype=torch.float32).model
        plain = PeftModel.from_pretrained(twin, tmp_path / name).eval()
        with torch.no_grad():
            expected = plain(ids).logits
        assert (expected - base).abs().max() > 1e-3
        assert torch.allclose(logits_of(lab, ids), expected, atol=1e-4)
    lab.set_adapter({"pirate": 0.5, "poet": 0.5})
    assert not torch.equal(logits_of(lab, ids), base)
    lab.add_adapter("lora", "fresh")
    lab.set_adapter(None)
    assert torch.equal(logits_of(lab, ids), base)
    with pytest.raises(AdapterLabError, match="quantised weights"):
        lab.merge_and_unload("pirate")
    comparison = lab.compare("Hello", max_new_tokens=4)
    assert lab.verify(comparison)["agrees"].all()


# -- found by review: each was a way to make the lab lie --------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("kasa_config", {}), ("layer_replication", [[0, 2], [0, 2]]), ("alora_invocation_tokens", [1, 2])],
)
def test_options_that_need_more_than_layers_are_refused(
    lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path, field: str, value: Any, ids: torch.Tensor
) -> None:
    """KaSA rewrites the base, replication rebuilds it, aLoRA acts only inside PeftModel's own forward."""
    base, layers = logits_of(lab, ids), lab.model.config.num_hidden_layers
    folder = tampered(adapter_folders["pirate"], tmp_path / "x", **{field: value or {"beta": 0.1}})
    with pytest.raises(AdapterLabError, match=r"base must stay base|own forward"):
        lab.load_adapter(folder)
    assert torch.equal(logits_of(lab, ids), base)
    assert lab.model.config.num_hidden_layers == layers


def test_the_state_can_not_change_inside_using_or_a_running_comparison(full_lab: AdapterLab) -> None:
    refused: list[str] = []

    def meddle(event: Any) -> None:
        for name, call in {
            "set": lambda: full_lab.set_adapter("poet"),
            "off": full_lab.disable_adapters,
            "delete": lambda: full_lab.delete_adapter("pirate"),
            "add": lambda: full_lab.add_adapter("lora", "late"),
            "close": full_lab.close,
        }.items():
            with pytest.raises(AdapterLabError, match="can't change"):
                call()
            refused.append(name)
        if event.position == 0:
            for call in (lambda: full_lab.compare("Nested"), full_lab.verify, full_lab.using("poet").__enter__):
                with pytest.raises(AdapterLabError, match=r"is running"):
                    call()

    honest = full_lab.compare("Hello", ["dora", "pirate"], max_new_tokens=3)
    meddled = full_lab.compare("Hello", ["dora", "pirate"], max_new_tokens=3, on_token=meddle)
    assert len(refused) >= 10
    assert [g.token_ids for g in meddled.generations] == [g.token_ids for g in honest.generations]
    with full_lab.using("poet"):
        meddle(type("Event", (), {"position": 1}))
        assert full_lab.active_adapters == {"poet": 1.0}
        assert full_lab.generate("Hello", max_new_tokens=1).active_adapters == ("poet",)
    assert full_lab.active_adapters == {}


def test_two_labs_never_share_a_model(ids: torch.Tensor) -> None:
    import standins

    model = standins.tiny_llama()
    one = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    one.add_adapter("lora", "a", init_lora_weights=False)
    with pytest.raises(AdapterLabError, match="in another open lab"):
        other = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    one = AdapterLab(model, tokenizer=standins.tiny_tokenizer())  # the same cell again
    assert list(one.adapters) == []
    one.close()
    other = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    assert torch.equal(logits_of(other, ids), logits_of(other, ids))


def test_a_changed_base_is_said_and_a_thawed_one_is_frozen(full_lab: AdapterLab) -> None:
    full_lab.model.requires_grad_(True)
    full_lab.set_adapter("pirate")
    assert trainable_names(full_lab) == []
    full_lab.model.lm_head.weight.data.mul_(1.5)
    with pytest.warns(AdapterLabWarning, match="no longer those"):
        full_lab.compare("Hello", max_new_tokens=1)
    assert not full_lab.verify()["agrees"].any()


def test_an_overwritten_folder_does_not_make_a_liar_of_verify(
    lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(adapter_folders["pirate"], tmp_path / "x"))
    lab.load_adapter(folder, "one")
    lab.load_adapter(adapter_folders["wide"], "two")
    lab.save_adapter("two", folder)
    lab.compare("Hello", ["one"], max_new_tokens=2)
    assert lab.verify()["agrees"].all()


def test_what_was_trained_stays_believed_when_something_else_is_trained_next(lab: AdapterLab) -> None:
    lab.add_adapter("lora", "first")
    for parameter in [p for p in lab.model.parameters() if p.requires_grad]:
        parameter.data.add_(0.1)
    lab.add_adapter("lora", "second")
    lab.compare("Hello", ["first"], max_new_tokens=2)
    assert lab.verify()["agrees"].all()


def test_an_adapter_deleted_natively_is_forgotten(full_lab: AdapterLab) -> None:
    full_lab.set_adapter("pirate")
    full_lab.model.delete_adapter("pirate")
    with pytest.warns(AdapterLabWarning, match="behind the lab's back"):
        full_lab.set_adapter("poet")
    assert "pirate" not in full_lab.adapters
    full_lab.compare("Hello", max_new_tokens=1)


def test_one_name_is_asked_for_where_one_adapter_is_meant(full_lab: AdapterLab, tmp_path: Path) -> None:
    for wrong in (["pirate"], {"pirate": 0.5}, 3, "base", "nobody"):
        for call in (
            full_lab.set_trainable,
            full_lab.delete_adapter,
            lambda name: full_lab.save_adapter(name, tmp_path / "x"),
        ):
            with pytest.raises(AdapterLabError):
                call(wrong)  # type: ignore[arg-type, operator]
    assert full_lab.trainable is None
    assert len(full_lab.adapters) == 5


def test_an_adopted_adapter_with_a_reserved_name_is_renamed(
    adapter_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import standins
    from peft import PeftModel

    model = PeftModel.from_pretrained(standins.tiny_llama(), adapter_folders["pirate"], adapter_name="base")
    lab = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    assert list(lab.adapters) == ["my-base"]
    assert "is called 'my-base' here" in capsys.readouterr().out


def test_a_merged_model_in_hand_is_refused(adapter_folders: dict[str, Path]) -> None:
    import standins
    from peft import PeftModel

    model = PeftModel.from_pretrained(standins.tiny_llama(), adapter_folders["pirate"])
    model.merge_adapter()
    with pytest.raises(AdapterLabError, match="unmerge_adapter"):
        AdapterLab(model, tokenizer=standins.tiny_tokenizer())


def test_stop_strings_stop(lab: AdapterLab) -> None:
    plain = lab.generate("Hello", "base", max_new_tokens=20).text
    stop = plain[2:4]
    stopped = lab.generate("Hello", "base", max_new_tokens=20, stop_strings=[stop])
    assert stopped.finish_reason == "stop_string"
    assert stopped.new_tokens < 20


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 0}, {"bad_words_ids": []}, {"no_repeat_ngram_size": "a"}, {"stop_strings": 3}],
    ids=str,
)
def test_settings_that_transformers_refuses_are_named(lab: AdapterLab, settings: dict[str, Any]) -> None:
    with pytest.raises(AdapterLabError, match=next(iter(settings))):
        lab.compare("Hello", **settings)
