"""Layers that accelerate fetches from the host or from disk, and what an interrupted batch leaves behind: nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from test_rows_architectures import ARCHITECTURES, PROMPTS, adapter_configs, hold_all, maker, plain_model, write_plain
from test_rows_architectures import pytestmark as pytestmark  # plain PEFT's remarks, with the reasons

from adapterlab import AdapterLab, AdapterLabError, Column
from adapterlab.mounts import skeleton

BUILDER = "tiny_llama"
COLUMNS: list[Any] = [None, "lora", "cut", "ia3", {"lora": 0.5}, {"lora": 0.7, "cut": -0.5, "ia3": 1.5}]
SETTINGS: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters by name, and the base as a folder under "base"."""
    folder = tmp_path_factory.mktemp("offload")
    standins.write_model(folder / "base", maker(BUILDER)(), standins.tiny_tokenizer())
    return folder


@pytest.fixture(scope="module")
def plain(root: Path) -> dict[str, Any]:
    """The adapters under plain PEFT, on models of their own that lie in memory; also saved under `root`."""
    configs = adapter_configs(ARCHITECTURES[BUILDER])
    return {
        name: write_plain(root / name, maker(BUILDER)(), configs[name], seed, mask=name == "cut", cut=name == "cut")
        for seed, name in enumerate(["lora", "cut", "ia3"], start=1)
    }


def with_adapters(lab: AdapterLab, root: Path, plain: dict[str, Any]) -> AdapterLab:
    for name in plain:
        lab.load_adapter(root / name, name)
    return lab


def hold(lab: AdapterLab, plain: dict[str, Any]) -> Any:
    """Compare, and hold each column against plain PEFT. Gives the comparison."""
    comparison = lab.compare(PROMPTS, COLUMNS, **SETTINGS)
    hold_all(comparison, lambda column: plain_model(maker(BUILDER), plain, column), SETTINGS)
    assert len(comparison) == len(COLUMNS) * len(PROMPTS)
    return comparison


def anatomy(lab: AdapterLab) -> dict[str, Any]:
    """What a comparison must leave as it was: modules, modes, hooks, parameters, configs, and the lab's state."""
    model: Any = lab.model
    return {
        "modules": {path: id(module) for path, module in model.named_modules()},
        "children": {id(m): {child: id(one) for child, one in m._modules.items()} for m in model.modules()},
        "modes": {path: module.training for path, module in model.named_modules()},
        "forwards": {path: module.__dict__.get("forward") for path, module in model.named_modules()},
        # accelerate itself makes an offloaded parameter anew at each forward
        "parameters": {n: (p.is_meta or id(p), p.requires_grad, p.device) for n, p in model.named_parameters()},
        "storage": {n: p.data_ptr() for n, p in model.named_parameters() if "lora" not in n and "ia3" not in n},
        "hooks": {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()},
        "generation config": (id(model.generation_config), model.generation_config.to_dict()),
        "config": model.config.to_dict(),
        "attributes": sorted(model.__dict__),
        "state": (lab.selection, lab.enabled, lab.trainable, lab.active_adapters),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


# ----- offloaded layers -----


def in_parts(root: Path, folder: Path) -> AdapterLab:
    """Loaded by transformers, the second layer on disk, the rest on the CPU."""
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return AdapterLab(root / "base", device_map={**places, "model.layers.1": "disk"}, offload_folder=str(folder))


def all_on_disk(root: Path, folder: Path) -> AdapterLab:
    return AdapterLab(root / "base", device_map={"": "disk"}, offload_folder=str(folder))


def by_disk_offload(root: Path, folder: Path) -> AdapterLab:
    import accelerate

    return AdapterLab(accelerate.disk_offload(maker(BUILDER)(), str(folder)), tokenizer=standins.tiny_tokenizer())


def by_cpu_offload(root: Path, folder: Path) -> AdapterLab:
    import accelerate

    model = accelerate.cpu_offload(maker(BUILDER)(), execution_device=torch.device("cpu"))
    return AdapterLab(model, tokenizer=standins.tiny_tokenizer())


@pytest.mark.parametrize("opened", [in_parts, all_on_disk, by_disk_offload, by_cpu_offload])
def test_offloaded_layers_batch_correctly_or_run_in_turn(
    opened: Callable[[Path, Path], AdapterLab], root: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    lab = with_adapters(opened(root, tmp_path), root, plain)
    lab.set_adapter("lora")
    before = anatomy(lab)
    assert any(p.is_meta for p in lab.model.parameters()), "some weights are not there"
    comparison = hold(lab, plain)
    for generation in comparison.generations:
        assert generation.batched or generation.note.startswith("run in turn: "), generation.note
    assert lab.verify(comparison)["agrees"].all()
    assert anatomy(lab) == before
    ids = torch.tensor([comparison.prompt_ids[1]])
    with torch.no_grad():
        assert torch.allclose(lab.model(ids).logits, plain["lora"](ids).logits, atol=2e-5), "what is mounted acts"
        lab.set_adapter(None)
        assert torch.equal(lab.model(ids).logits, maker(BUILDER)()(ids).logits)


def test_no_adapter_lands_where_weights_have_no_values(root: Path, tmp_path: Path) -> None:
    """PEFT puts an adapter beside its layer's weight, and an offloaded weight is on the meta device."""
    lab = by_disk_offload(root, tmp_path)
    lab.add_adapter("lora", "drawn", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    lab.add_adapter("ia3", "ones", target_modules=["k_proj"], feedforward_modules=[])
    lab.add_adapter("adalora", "triplets", target_modules=["v_proj"])
    for name in lab.adapters:
        lab.set_adapter(name)
        own = [p for key, p in lab.model.named_parameters() if f".{name}" in key]
        assert own
        assert not any(p.is_meta for p in own), name
    assert lab.adapters["drawn"].status == "random weights"
    assert lab.adapters["ones"].status == "untrained"
    assert lab.compare("Hi", max_new_tokens=2)["drawn"].logit_shift > 0.01


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_what_needs_the_base_weights_themselves_is_refused_in_words(
    fields: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    lab = by_disk_offload(root, tmp_path)
    before = anatomy(lab)
    with pytest.raises(AdapterLabError, match=r"'bold' .*offload"):
        lab.add_adapter("lora", "bold", target_modules=["q_proj"], **fields)
    assert anatomy(lab) == before
    assert list(lab.adapters) == []


def test_a_second_structure_shares_what_is_kept_on_the_host(root: Path, tmp_path: Path) -> None:
    """Every load and every verify makes one: it must not copy a model that did not fit."""
    lab = by_cpu_offload(root, tmp_path)
    with skeleton(lab.model) as twin:
        for (path, mine), (_, theirs) in zip(lab.model.named_modules(), twin.named_modules()):
            if hasattr(mine, "_hf_hook") and "weight" in mine._parameters:
                weights = [module._hf_hook.weights_map["weight"].data_ptr() for module in (mine, theirs)]
                assert weights[0] == weights[1], path


# ----- interrupted batches -----


@pytest.fixture
def lab(root: Path, plain: dict[str, Any]) -> AdapterLab:
    """One adapter mounted and another trainable, in train mode: all of which a comparison changes for a while."""
    lab = with_adapters(AdapterLab(maker(BUILDER)(), tokenizer=standins.tiny_tokenizer()), root, plain)
    lab.set_adapter("ia3")
    lab.set_trainable("lora")
    lab.model.train()
    return lab


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", [1, 15])
def test_an_exception_in_on_token_leaves_everything(
    error: type[BaseException], nth: int, lab: AdapterLab, plain: dict[str, Any]
) -> None:
    before, events = anatomy(lab), []

    def break_off(event: Any) -> None:
        events.append(event)
        if len(events) == nth:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        lab.compare(PROMPTS, COLUMNS, on_token=break_off, **SETTINGS)
    assert anatomy(lab) == before
    assert lab.history == []
    hold(lab, plain)
    assert anatomy(lab) == before


def test_stop_in_on_token_leaves_everything(lab: AdapterLab, plain: dict[str, Any]) -> None:
    before, events = anatomy(lab), []

    def stop(event: Any) -> None:
        events.append(event)
        if len(events) == 15:
            lab.stop()

    stopped = lab.compare(PROMPTS, COLUMNS, on_token=stop, **SETTINGS)
    assert anatomy(lab) == before
    rows = len(COLUMNS) * len(PROMPTS)
    assert all(generation.new_tokens <= -(-15 // rows) for generation in stopped.generations), "within a token"
    whole = hold(lab, plain)
    for cut in stopped.generations:
        mine = whole[Column(cut.asked), cut.prompt_index]
        assert cut.token_ids == mine.token_ids[: cut.new_tokens]
        assert cut.finish_reason == ("stopped" if cut.new_tokens < mine.new_tokens else mine.finish_reason)
    assert anatomy(lab) == before


@pytest.mark.parametrize("call", [1, 3])
def test_an_exception_in_a_layer_leaves_everything(call: int, lab: AdapterLab, plain: dict[str, Any]) -> None:
    """As when memory runs out in the middle of the prompt, or of the third token."""
    calls = []

    def fail(module: Any, args: Any) -> None:
        calls.append(module)
        if len(calls) == call:
            raise MemoryError("no room")

    with lab.using(None) as model:
        handle = model.model.layers[1].mlp.act_fn.register_forward_pre_hook(fail)
    before = anatomy(lab)
    with pytest.raises(MemoryError, match="no room"):
        lab.compare(PROMPTS, COLUMNS, **SETTINGS)
    assert anatomy(lab) == before
    handle.remove()
    hold(lab, plain)
