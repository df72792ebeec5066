"""The stacks are the adapters: what lies in them, when they are made again, and what that leaves of the parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import LoraConfig, PeftModel

from adapterlab import AdapterLab
from adapterlab.rows import Rows

PATH = "model.layers.0.self_attn.q_proj"


def factors(lab: AdapterLab, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    layer: Any = lab._adapters.mounts.adapters[name].layers[PATH]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def storages(lab: AdapterLab, name: str) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in factors(lab, name)}


@pytest.fixture
def three(tmp_path: Path) -> AdapterLab:
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    for seed, name in enumerate(["a", "b", "c"], start=1):
        config = LoraConfig(r=4, lora_alpha=seed, target_modules=["q_proj", "down_proj"])
        lab.load_adapter(standins.write_adapter(tmp_path / name, standins.tiny_llama(), config, seed=seed), name)
    return lab


def test_a_batch_moves_the_parameters_into_stacks_and_keeps_their_values(three: AdapterLab) -> None:
    before = {name: [p.detach().clone() for p in factors(three, name)] for name in "abc"}
    parameters = {name: factors(three, name) for name in "abc"}
    three.compare("Hello", max_new_tokens=2)
    assert storages(three, "a") == storages(three, "b") == storages(three, "c")
    for name in "abc":
        assert all(now is then for now, then in zip(factors(three, name), parameters[name]))
        assert all(torch.equal(now, then) for now, then in zip(factors(three, name), before[name]))


def test_nothing_is_stacked_again_while_nothing_changes(three: AdapterLab) -> None:
    three.compare("Hello", max_new_tokens=2)
    lying = storages(three, "a")
    three.compare("Hello again", [None, "c", {"a": 0.5}], max_new_tokens=2)
    three.set_adapter("b")
    three.compare("And again", ["b", "a"], max_new_tokens=2)
    assert storages(three, "a") == storages(three, "b") == storages(three, "c") == lying


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every time that a batch's layers are made anew, their columns."""
    made: list[Any] = []
    original = Rows._build

    def counting(self: Rows, *args: Any) -> Any:
        made.append([column.label for column in self.columns])
        return original(self, *args)

    monkeypatch.setattr(Rows, "_build", counting)
    return made


def test_the_layers_of_a_batch_stay_while_weights_and_columns_do(three: AdapterLab, built: list[Any]) -> None:
    def compare(prompt: Any, columns: Any = None) -> None:
        three.clear_cache()
        three.compare(prompt, columns, max_new_tokens=2)

    for prompt in ("Hello", "Hello again", ["And", "again"]):
        compare(prompt)
    assert len(built) == 1
    compare("Hello", ["a", "b"])
    compare("Hello", ["a", {"b": 0.5}])
    assert len(built) == 3, "other columns"
    factors(three, "b")[0].data[0, 0] += 1
    compare("Hello", ["a", {"b": 0.5}])
    assert len(built) == 4, "another weight"
    three.delete_adapter("c")
    compare("Hello", ["a", {"b": 0.5}])
    assert len(built) == 5, "the stacks were made anew"


def test_columns_that_left_are_in_the_next_batch_again(three: AdapterLab, built: list[Any]) -> None:
    whole = three.compare("Hello", max_new_tokens=8)
    end = int(whole["a"].token_ids[1])
    for _ in range(2):
        three.clear_cache()
        shorter = three.compare("Hello", max_new_tokens=8, eos_token_id=[2, end])
        assert shorter["a"].new_tokens <= 2
    three.clear_cache()
    again = three.compare("Hello", max_new_tokens=8)
    assert len(built) == 1
    assert [g.token_ids for g in again.generations] == [g.token_ids for g in whole.generations]
    assert three.verify(again)["agrees"].all()


@pytest.mark.parametrize("again", ["in place", "elsewhere"])
def test_parameters_that_lie_elsewhere_are_what_the_next_batch_reads(three: AdapterLab, again: str) -> None:
    first = three.compare("Hello", max_new_tokens=4)
    A, _ = factors(three, "b")
    lay = A.data
    A.data = lay.clone()  # of equal content, so no digest tells
    if again == "in place":
        A.data.mul_(3)
    lay.mul_(5)  # the place that the parameter left
    three.clear_cache()
    comparison = three.compare("Hello", max_new_tokens=4)
    assert (comparison["b"].weights_digest == first["b"].weights_digest) is (again == "elsewhere")
    with three.using("b") as model:
        out = model.generate(torch.tensor([comparison.prompt_ids[0]]), max_new_tokens=4, do_sample=False)
    assert list(comparison["b"].token_ids) == out[0, len(comparison.prompt_ids[0]) :].tolist()


def test_a_column_alone_is_not_stacked(three: AdapterLab) -> None:
    lying = {name: storages(three, name) for name in "abc"}
    three.compare("Hello", [None, "b", {"b": 2}], max_new_tokens=2)
    assert {name: storages(three, name) for name in "abc"} == lying


def test_the_trainable_adapter_keeps_tensors_of_its_own(three: AdapterLab) -> None:
    three.compare("Hello", max_new_tokens=2)
    three.set_trainable("b")
    for p in factors(three, "b"):
        assert p.is_contiguous()
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    expected = three.compare("Hello", max_new_tokens=4)
    assert storages(three, "a") == storages(three, "c")
    assert storages(three, "b").isdisjoint(storages(three, "a"))
    assert three.verify(expected)["agrees"].all()


def test_deleting_frees_the_place(three: AdapterLab) -> None:
    three.compare("Hello", max_new_tokens=2)
    size = {p.untyped_storage().nbytes() for p in factors(three, "a")}
    three.delete_adapter("b")
    assert storages(three, "a") == storages(three, "c")
    assert {p.untyped_storage().nbytes() for p in factors(three, "a")} == {n * 2 // 3 for n in size}
    three.delete_adapter("a")
    for p in factors(three, "c"):
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    assert three._adapters.mounts.stacks._at == {}


def test_tensors_put_in_by_hand_are_what_speaks(three: AdapterLab, tmp_path: Path) -> None:
    three.compare("Hello", max_new_tokens=4)
    A, _ = factors(three, "b")
    A.data = torch.randn_like(A)
    generation = three.compare("Hello", max_new_tokens=4)["b"]
    plain: Any = PeftModel.from_pretrained(standins.tiny_llama(), tmp_path / "b").eval()
    plain.get_submodule(f"base_model.model.{PATH}").lora_A["default"].weight.data.copy_(A)
    ids = torch.tensor([three.last.prompt_ids[0]])  # type: ignore[union-attr]
    out = plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert list(generation.token_ids) == out[0, ids.shape[1] :].tolist()


def test_ranks_far_apart_do_not_pad_each_other(tmp_path: Path) -> None:
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    ranks = {"a": 2, "b": 8, "c": 7, "d": 2}
    for seed, (name, r) in enumerate(ranks.items(), start=1):
        config = LoraConfig(r=r, target_modules=["q_proj"])
        lab.load_adapter(standins.write_adapter(tmp_path / name, standins.tiny_llama(), config, seed=seed), name)
    comparison = lab.compare("Hello", max_new_tokens=3)
    assert storages(lab, "a") == storages(lab, "d")
    assert storages(lab, "b") == storages(lab, "c")
    assert storages(lab, "a").isdisjoint(storages(lab, "b"))
    held = sum(p.untyped_storage().nbytes() for name in ("a", "b") for p in factors(lab, name))
    own = sum(p.numel() * p.element_size() for name in ranks for p in factors(lab, name))
    assert held <= 1.25 * own
    assert lab.verify(comparison)["agrees"].all()


def test_a_stacked_adapter_is_saved_as_plain_peft_reads_it(three: AdapterLab, tmp_path: Path) -> None:
    three.compare("Hello", max_new_tokens=2)
    three.save_adapter("b", tmp_path / "saved")
    three.set_adapter("c")
    three.model.save_pretrained(tmp_path / "native")
    for folder, name in (("saved", "b"), ("native", "c")):
        again: Any = PeftModel.from_pretrained(standins.tiny_llama(), tmp_path / folder)
        layer = again.get_submodule(f"base_model.model.{PATH}")
        for mine, theirs in zip(factors(three, name), (layer.lora_A["default"], layer.lora_B["default"])):
            assert torch.equal(mine, theirs.weight)
        assert (tmp_path / folder / "adapter_model.safetensors").stat().st_size < 20_000


def test_factors_that_are_views_of_each_other_stay_where_they_lie(tmp_path: Path) -> None:
    """Apart, lm_head's would not be trained and the file would not be what acts."""

    def make() -> Any:
        return standins.tiny_llama(tie_word_embeddings=True)

    lab = AdapterLab(make(), tokenizer=standins.tiny_tokenizer())
    configs = {
        "tied": LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True),
        "h": LoraConfig(r=4, target_modules=["lm_head"]),
        "i": LoraConfig(r=4, target_modules=["lm_head"]),
    }
    for seed, (name, config) in enumerate(configs.items(), start=1):
        lab.load_adapter(standins.write_adapter(tmp_path / name, make(), config, seed=seed), name)
    lab.compare("Hello", [None, "h", "i"], max_new_tokens=2)
    lab.delete_adapter("h")  # what is left lies anew
    lab.train("tied", ["The moon is wide."] * 4, max_steps=2, learning_rate=1e-2, disable_tqdm=True)
    lab.save_adapter("tied", tmp_path / "saved")
    plain: Any = PeftModel.from_pretrained(make(), tmp_path / "saved").eval()
    ids = torch.tensor([[0, 7, 9, 33, 40]])
    with torch.no_grad(), lab.using("tied") as model:
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=2e-5, rtol=1e-4)
