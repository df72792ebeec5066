"""The façade: opening, closing, running a cell again, threads, and what it shows of itself."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from tiny_adapters import logits_of

from adapterlab import AdapterLab, AdapterLabError


def test_running_the_cell_again_frees_the_old_lab(tmp_path: Path) -> None:
    folder = standins.write_model(tmp_path / "m", standins.tiny_llama(), standins.tiny_tokenizer())
    lab = AdapterLab(folder)
    first, tensor = lab, weakref.ref(next(lab.model.parameters()))
    closed: list[str] = []
    lab.on_change(closed.append)
    lab = AdapterLab(folder)
    assert closed == ["closed"]
    assert first is not lab
    gc.collect()
    assert tensor() is None, "the old base must be gone, though somebody still holds the lab"
    with pytest.raises(AdapterLabError, match="This lab is closed"):
        first.compare("Hello")
    with pytest.raises(AdapterLabError, match="This lab is closed"):
        _ = first.model
    assert "closed" in repr(first)
    other = AdapterLab(folder)
    assert lab.active_adapters == {}, "another name closes nothing"
    other.close()
    other.close()


def test_a_failed_rerun_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterLabError):
        AdapterLab(tmp_path)


def test_the_objects_in_hand_come_back_as_they_were(ids: torch.Tensor) -> None:
    model = standins.tiny_llama().train()
    with torch.no_grad():
        expected = model(ids).logits
    flags = [p.requires_grad for p in model.parameters()]
    lab = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    assert not any(p.requires_grad for p in model.parameters()), "the base is frozen in a lab"
    lab.add_adapter("lora", "a", init_lora_weights=False)
    lab.compare("Hello", max_new_tokens=2)
    lab.close()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert not hasattr(model, "peft_config")


def test_calls_from_many_threads_never_meet(full_lab: AdapterLab) -> None:
    names = [None, *full_lab.adapters]
    reference = full_lab.compare("What is the moon?", names, max_new_tokens=4)
    expected = {g.column: (g.token_ids, g.weights_digest) for g in reference.generations}

    def work(index: int) -> None:
        name = names[index % len(names)]
        full_lab.set_adapter(names[(index + 1) % len(names)])
        generation = full_lab.compare("What is the moon?", [name], max_new_tokens=4).generations[0]
        assert (generation.token_ids, generation.weights_digest) == expected[generation.column]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(24)))
    assert len(full_lab.history) == 25


def test_wait_waits_for_tracked_work(lab: AdapterLab) -> None:
    gate, done = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: (gate.wait(30), done.append(1)))
        lab.track(future)
        with pytest.raises(AdapterLabError, match="still run"):
            lab.wait(timeout=0.01)
        gate.set()
        lab.wait(timeout=30)
    assert done == [1]


def test_listeners_hear_and_a_broken_one_breaks_nothing(lab: AdapterLab) -> None:
    heard: list[str] = []

    def broken(kind: str) -> None:
        raise RuntimeError("no")

    unsubscribe = lab.on_change(heard.append)
    lab.generate("Hello", max_new_tokens=1)
    lab.evaluate(["Hello there"])
    assert heard == ["running", "memory", "running", "memory"], "each has had a peak of its own"
    heard.clear()
    lab.add_adapter("lora", "a")
    lab.set_adapter(None)
    lab.compare("Hello", max_new_tokens=1)
    assert heard == ["adapters", "state", "running", "running", "history"]
    mend = lab.on_change(broken)
    with pytest.warns(UserWarning, match="RuntimeError: no"):
        lab.set_adapter("a")
    unsubscribe()
    with pytest.warns(UserWarning, match="RuntimeError"):
        lab.set_adapter(None)
    assert heard == ["adapters", "state", "running", "running", "history", "state"]
    mend()


def test_listeners_hear_that_an_adapter_whose_first_step_failed_has_gone(lab: AdapterLab) -> None:
    """Its row stayed in every panel."""
    heard: list[list[str]] = []
    lab.on_change(lambda kind: heard.append(list(lab.adapters)) if kind == "adapters" else None)
    hook = lab.model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(AdapterLabError, match="became nan"):
        lab.train("new", ["The moon is round."], method="lora", max_steps=2, disable_tqdm=True)
    hook.remove()
    assert heard[-1] == []


def test_loading_without_selecting_leaves_what_acts(lab: AdapterLab, adapter_folders: dict[str, Path]) -> None:
    lab.load_adapter(adapter_folders["pirate"], "pirate")
    lab.set_adapter({"pirate": 0.5})
    lab.disable_adapters()
    lab.load_adapter(adapter_folders["wide"], "wide", select=False)
    assert list(lab.adapters) == ["pirate", "wide"]
    assert lab.selection.as_dict() == {"pirate": 0.5}
    assert not lab.enabled


def test_a_lab_is_free_unless_another_thread_works_with_it(lab: AdapterLab) -> None:
    answers: list[bool] = []

    def ask() -> None:
        answers.append(lab.is_free())

    for busy in (False, True):
        with lab.using(None) if busy else contextlib.nullcontext():
            assert lab.is_free(), "this thread goes on"
            asking = threading.Thread(target=ask)
            asking.start()
            asking.join()
    assert answers == [True, False]


def test_a_closed_lab_says_its_name_as_text(lab: AdapterLab) -> None:
    lab.name = "<img src=x>"
    lab.close()
    assert "<img" not in lab._repr_html_()


def test_running_is_true_while_a_comparison_runs(lab: AdapterLab) -> None:
    heard: list[bool] = []
    lab.on_change(lambda kind: heard.append(lab.running) if kind == "running" else None)
    lab.compare("Hello", max_new_tokens=2, on_token=lambda event: heard.append(lab.running))
    assert heard == [True, True, True, False]
    with pytest.raises(ZeroDivisionError):
        lab.compare("Hello again", max_new_tokens=2, on_token=lambda event: 1 // 0)  # type: ignore[arg-type, return-value]
    assert not lab.running
    assert heard[4:] == [True, False]


def test_adapters_is_a_read_only_mapping_with_completion(full_lab: AdapterLab) -> None:
    assert list(full_lab.adapters) == ["pirate", "wide", "poet", "ada", "dora"]
    assert full_lab.adapters._ipython_key_completions_() == list(full_lab.adapters)  # type: ignore[attr-defined]
    assert "nobody" not in full_lab.adapters
    assert full_lab.adapters.get("nobody") is None
    with pytest.raises(AdapterLabError, match="No adapter named 'nobody'; the lab has 'pirate'"):
        full_lab.adapters["nobody"]
    with pytest.raises(TypeError):
        full_lab.adapters["x"] = 1  # type: ignore[index]


def test_sizes_are_formulas(full_lab: AdapterLab) -> None:
    h, layers, kv, mlp = standins.HIDDEN, standins.LAYERS, standins.HIDDEN // 2, 2 * standins.HIDDEN
    pirate = layers * 4 * ((h + h) + (h + kv))
    poet = layers * (kv + kv + mlp)
    ada = layers * (4 * (h + h + 1) + 4 * (mlp + h + 1))
    frame = full_lab.parameters().set_index("owner")
    base = sum(p.numel() for p in standins.tiny_llama().parameters())
    assert frame["parameters"].to_dict() | {} == {
        "base": base,
        "pirate": pirate,
        "wide": frame.loc["wide", "parameters"],
        "poet": poet,
        "ada": ada,
        "dora": frame.loc["dora", "parameters"],
    }
    assert frame.loc["pirate", "bytes"] == 4 * pirate
    assert frame.loc["base", "bytes"] == 4 * base
    assert frame.loc["pirate", "share_of_base"] == pytest.approx(pirate / base)
    summary = full_lab.summary().set_index("adapter")
    assert summary.loc["pirate", "megabytes"] == pytest.approx(4 * pirate / 1e6)
    assert summary["r"].isna().to_dict()["poet"]
    assert list(full_lab.summary().columns) == (
        ["adapter", "method", "r", "parameters", "megabytes", "share", "multiplier", "active", "trainable", "status"]
    )


def test_the_status_line(full_lab: AdapterLab) -> None:
    assert full_lab.status().startswith("LlamaForCausalLM · ")
    assert " · fp32 · " in full_lab.status()
    assert full_lab.status().endswith("acting now: base")
    full_lab.set_adapter({"pirate": 0.5, "poet": 1})
    assert full_lab.status().endswith("acting now: pirate × 0.5 + poet × 1")
    full_lab.disable_adapters()
    assert full_lab.status().endswith("adapters disabled")
    assert full_lab.status() in repr(full_lab)


def test_the_lab_as_a_cells_result_escapes_names(lab: AdapterLab) -> None:
    lab.name = "<script>x</script>"
    lab.add_adapter("lora", "a")
    html = lab._repr_html_()
    assert "<script" not in html
    assert "untrained" in html


def test_switching_does_not_grow_with_the_number_of_adapters(lab: AdapterLab) -> None:
    """Counted, not timed: how many modules a switch puts in place."""
    lab.add_adapter("lora", "first", target_modules=["q_proj"])
    lab.add_adapter("lora", "second", target_modules=["q_proj"])

    def swaps() -> int:
        mounts = lab._adapters.mounts
        count = 0

        class Counting(dict):
            def __setitem__(self, key: str, value: Any) -> None:
                nonlocal count
                count += 1
                super().__setitem__(key, value)

        parents = {site.parent for site in mounts.sites.values()}
        for parent in parents:
            parent._modules = Counting(parent._modules)
        lab.set_adapter("first")
        lab.set_adapter("second")
        for parent in parents:
            parent._modules = dict(parent._modules)
        return count

    few = swaps()
    for index in range(6):
        lab.add_adapter("lora", f"more-{index}", target_modules=["q_proj"])
    assert 0 < swaps() <= few


@pytest.mark.parametrize("name", ["base", "a.b", "", "q_proj", "lora_x", "<b>", 3])
def test_names_that_will_not_do(lab: AdapterLab, name: Any, adapter_folders: dict[str, Path]) -> None:
    for call in (lambda: lab.add_adapter("lora", name), lambda: lab.load_adapter(adapter_folders["pirate"], name)):
        with pytest.raises(AdapterLabError):
            call()
    assert list(lab.adapters) == []
    assert lab.selection.label == "base"


@pytest.mark.parametrize("name", ["half", "train", "type", "training", "_modules", "copy"])
def test_words_of_torchs_own_are_said_to_be_so(lab: AdapterLab, name: str, adapter_folders: dict[str, Path]) -> None:
    """PEFT's words were "attribute 'half' already exists"."""
    for call in (lambda: lab.add_adapter("ia3", name), lambda: lab.load_adapter(adapter_folders["pirate"], name)):
        with pytest.raises(AdapterLabError, match=f"'{name}' is a word of torch's own.* 'my-.*' would do"):
            call()
    assert list(lab.adapters) == []


def test_a_folder_called_by_a_word_of_torchs_own_loads(
    lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    for place in ("one", "two"):
        lab.load_adapter(shutil.copytree(adapter_folders["pirate"], tmp_path / place / "update"))
    assert list(lab.adapters) == ["my-update", "my-update-2"]


def test_a_saved_lab_whose_adapter_is_a_word_of_torchs_own_opens(
    lab: AdapterLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such names were taken for LoRA, with which they work."""
    with monkeypatch.context() as then:
        then.setattr(type(lab._adapters), "check_new_name", lambda *given, **told: None)
        lab.add_adapter("lora", "copy")
    lab.save(tmp_path / "saved")
    again = AdapterLab(tmp_path / "saved", base_model=standins.tiny_llama(), tokenizer=lab.tokenizer)
    assert list(again.adapters) == ["copy"]
    again.close()


def test_a_name_that_acts_now_is_said_to_be_taken(lab: AdapterLab) -> None:
    lab.add_adapter("lora", "mine")
    with pytest.raises(AdapterLabError, match="There is an adapter named 'mine' already"):
        lab.add_adapter("lora", "mine")


def test_default_names_are_made_safe_and_said(
    lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = shutil.copytree(adapter_folders["pirate"], tmp_path / "my.pirate v2")
    assert lab.load_adapter(folder) == "my-pirate-v2"
    assert "as 'my-pirate-v2'" in capsys.readouterr().out
    assert lab.load_adapter(folder) == "my-pirate-v2-2"


def test_unknown_methods_and_fields_are_named(lab: AdapterLab) -> None:
    with pytest.raises(AdapterLabError, match=r"'lorra' is no PEFT method\. .*adalora, .*lora"):
        lab.add_adapter("lorra")
    with pytest.raises(AdapterLabError, match="rank"):
        lab.add_adapter("lora", rank=3)
    with pytest.raises(AdapterLabError, match="neither a method's name"):
        lab.add_adapter(3)  # type: ignore[arg-type]
    with pytest.raises(AdapterLabError, match="PROMPT_TUNING"):
        lab.add_adapter("prompt_tuning", num_virtual_tokens=4)
    from peft import LoraConfig

    with pytest.raises(AdapterLabError, match="set them in the config"):
        lab.add_adapter(LoraConfig(), "x", r=3)
    assert list(lab.adapters) == []


def test_find_adapters_asks_the_hub_for_this_base(lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the client's boundary: the filter that is sent, and what comes back as a frame."""
    import huggingface_hub
    from huggingface_hub import ModelInfo

    asked: dict[str, Any] = {}

    def list_models(**kwargs: Any) -> list[ModelInfo]:
        asked.update(kwargs)
        return [ModelInfo(id="someone/opt-lora", downloads=5, likes=1)]

    monkeypatch.setattr(huggingface_hub, "list_models", list_models)
    lab._adapters.base_path = "facebook/opt-350m"
    frame = lab.find_adapters(limit=3)
    assert asked["filter"] == "base_model:adapter:facebook/opt-350m"
    assert asked["limit"] == 3
    assert frame.to_dict("records")[0]["repo_id"] == "someone/opt-lora"
    with pytest.raises(AdapterLabError, match="limit=0"):
        lab.find_adapters(limit=0)

    def offline(**kwargs: Any) -> list[ModelInfo]:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "list_models", offline)
    with pytest.raises(AdapterLabError, match="can't be asked"):
        lab.find_adapters()


def test_logits_of_the_model_are_the_selections(full_lab: AdapterLab, ids: torch.Tensor, plain_logits: Any) -> None:
    full_lab.set_adapter("wide")
    assert torch.allclose(logits_of(full_lab, ids), plain_logits("wide"), atol=2e-5)


def test_a_method_that_only_plain_peft_makes_is_refused_with_the_call_that_makes_one(lab: AdapterLab) -> None:
    """There is no folder of the new adapter's name that could be loaded."""
    with pytest.raises(AdapterLabError, match=r"get_peft_model\(model, config\)") as refused:
        lab.add_adapter("prompt_tuning", "mine", num_virtual_tokens=4, task_type="CAUSAL_LM")
    assert "from_pretrained" not in str(refused.value)
    assert not lab.adapters


def test_a_method_without_a_rank_has_none(lab: AdapterLab) -> None:
    """PEFT's OFT has r = 0 where the block's size decides, which is no rank."""
    lab.add_adapter("oft", "turned", target_modules=["q_proj"])
    assert lab.adapters["turned"].r is None
    assert lab.summary()["r"].isna().all()
