"""Finished columns are taken from the cache exactly as long as they would come out the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import LoraConfig, PeftModel

from adapterlab import AdapterLab, AdapterLabWarning, Comparison, TokenEvent
from adapterlab.circumstances import plain
from adapterlab.finished import FinishedColumns

PROMPT = "What is the moon?"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each forward of a tiny Llama has had; put on the class, since a model's own `forward` is no secret."""
    from transformers import LlamaForCausalLM

    seen: list[int] = []
    original = LlamaForCausalLM.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        seen.append(out.logits.shape[0])
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", counting)
    return seen


def answers(comparison: Comparison) -> list[tuple[Any, ...]]:
    return [(g.column, g.prompt_index, g.text, g.token_ids, g.weights_digest) for g in comparison.generations]


def cached(comparison: Comparison) -> dict[str, bool]:
    return {g.column: g.cached for g in comparison.generations}


def plain_tokens(comparison: Comparison, folder: Path | None, change: Callable[[Any], Any] | None = None) -> list[int]:
    """What a fresh model says with only this adapter, through plain PEFT, after `change` of its base."""
    model: Any = standins.tiny_llama()
    if change is not None:
        change(model)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    ids = torch.tensor([comparison.prompt_ids[0]])
    return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()


# ----- what is cached -----


def test_an_unchanged_rerun_asks_the_model_nothing(full_lab: AdapterLab, rows: list[int]) -> None:
    first = full_lab.compare([PROMPT, "Who are you?"], max_new_tokens=6)
    rows.clear()
    again = full_lab.compare([PROMPT, "Who are you?"], max_new_tokens=6)
    assert rows == []
    assert answers(again) == answers(first)
    assert all(g.cached for g in again.generations)
    assert not any(g.cached for g in first.generations)
    for mine, made in zip(again.generations, first.generations):
        assert (mine.seconds, mine.batched, mine.batch_size) == (made.seconds, made.batched, made.batch_size)
        assert mine.logit_shift == made.logit_shift
    assert full_lab.history == [first, again]
    assert full_lab.verify()["agrees"].all()


def test_one_column_more_runs_alone(full_lab: AdapterLab, rows: list[int]) -> None:
    whole = full_lab.compare(PROMPT, max_new_tokens=6, min_new_tokens=6)
    full_lab.clear_cache()
    full_lab.compare(PROMPT, [None, "pirate", "poet", "ada"], max_new_tokens=6, min_new_tokens=6)
    rows.clear()
    more = full_lab.compare(PROMPT, [None, "pirate", "poet", "ada", "wide"], max_new_tokens=6, min_new_tokens=6)
    assert rows == [1] * 6, "the base's logits, against which the shift is measured, are known too"
    assert cached(more) == {"base": True, "pirate": True, "poet": True, "ada": True, "wide": False}
    assert more["wide"].token_ids == whole["wide"].token_ids
    assert more["wide"].logit_shift == pytest.approx(whole["wide"].logit_shift, abs=1e-4)


def test_one_prompt_more_runs_alone(full_lab: AdapterLab, rows: list[int]) -> None:
    columns: list[Any] = [None, "pirate", "poet"]
    full_lab.compare([PROMPT], columns, max_new_tokens=3, min_new_tokens=3)
    rows.clear()
    both = full_lab.compare(["Who?", PROMPT], [*columns, "wide"], max_new_tokens=3, min_new_tokens=3)
    assert sorted(rows) == [2, 2, 2, 3, 3, 3], "wide lacks both prompts, the others lack one"
    fresh = full_lab.compare(["Who?", PROMPT], [*columns, "wide"], max_new_tokens=3, min_new_tokens=3)
    assert answers(fresh) == answers(both)
    full_lab.clear_cache()
    assert answers(full_lab.compare(["Who?", PROMPT], [*columns, "wide"], max_new_tokens=3, min_new_tokens=3)) == (
        answers(both)
    )


def test_generate_shares_it(full_lab: AdapterLab, rows: list[int]) -> None:
    compared = full_lab.compare(PROMPT, ["pirate"], max_new_tokens=4)
    rows.clear()
    generated = full_lab.generate(PROMPT, "pirate", max_new_tokens=4)
    assert (generated.text, generated.cached, rows) == (compared["pirate"].text, True, [])


def test_the_same_prompt_typed_otherwise_keeps_its_own_words(full_lab: AdapterLab) -> None:
    full_lab.compare([{"role": "user", "content": PROMPT}], [None], max_new_tokens=2)
    again = full_lab.compare(["Another", PROMPT], [None], max_new_tokens=2)
    assert [(g.prompt, g.prompt_index, g.cached) for g in again.generations] == [
        ("Another", 0, False),
        (PROMPT, 1, True),
    ]


def test_a_label_is_that_of_the_column_asked_for(full_lab: AdapterLab) -> None:
    full_lab.compare(PROMPT, [{"wide": 0.5, "poet": 1}], max_new_tokens=2)
    assert full_lab.compare(PROMPT, [{"poet": 1, "wide": 0.5}], max_new_tokens=2).columns == ["poet + wide × 0.5"]


def test_clear_cache_forgets(full_lab: AdapterLab, rows: list[int]) -> None:
    first = full_lab.compare(PROMPT, max_new_tokens=3)
    assert full_lab.clear_cache() is None  # type: ignore[func-returns-value]
    rows.clear()
    again = full_lab.compare(PROMPT, max_new_tokens=3)
    assert rows
    assert not any(g.cached for g in again.generations)
    assert answers(again) == answers(first)


@pytest.mark.parametrize(
    "settings",
    [{"seed": 1}, {"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 3}, {"max_new_tokens": 3}, {"min_new_tokens": 2},
     {"repetition_penalty": 1.2}, {"eos_token_id": 9}, {"stop_strings": ["e"]}, {"chat": False}],
    ids=str,
)  # fmt: skip
def test_other_settings_are_another_answer(lab: AdapterLab, settings: dict[str, Any]) -> None:
    lab.compare(PROMPT, max_new_tokens=4)
    settings = {"max_new_tokens": 4, **settings}
    made = lab.compare(PROMPT, **settings)
    assert not made["base"].cached
    again = lab.compare(PROMPT, **settings)
    assert again["base"].cached
    lab.clear_cache()
    assert answers(lab.compare(PROMPT, **settings)) == answers(again)


def test_sampled_columns_are_cached_by_their_seed(full_lab: AdapterLab) -> None:
    first = full_lab.compare(PROMPT, max_new_tokens=8, temperature=1.2, seed=3)
    again = full_lab.compare(PROMPT, max_new_tokens=8, temperature=1.2, seed=3)
    assert answers(again) == answers(first)
    assert all(g.cached for g in again.generations)


def test_another_end_of_text_is_another_answer(lab: AdapterLab) -> None:
    first = lab.compare(PROMPT, max_new_tokens=6)["base"]
    lab.model.generation_config.eos_token_id = first.token_ids[2]
    ended = lab.compare(PROMPT, max_new_tokens=6)["base"]
    assert not ended.cached
    assert (ended.new_tokens, ended.finish_reason) == (first.token_ids.index(first.token_ids[2]) + 1, "eos")


def test_another_vocabulary_is_another_answer(lab: AdapterLab) -> None:
    lab.compare(PROMPT, max_new_tokens=2)
    assert lab.tokenizer is not None
    lab.tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert not lab.compare(PROMPT, max_new_tokens=2)["base"].cached


def test_settings_that_are_no_plain_values_are_not_cached(lab: AdapterLab) -> None:
    ids = torch.tensor([5, 6])
    for _ in range(2):
        assert not lab.compare(PROMPT, max_new_tokens=2, suppress_tokens=ids)["base"].cached
    assert lab.compare(PROMPT, max_new_tokens=2, suppress_tokens=[5, 6])["base"].cached is False
    assert lab.compare(PROMPT, max_new_tokens=2, suppress_tokens=(5, 6))["base"].cached


# ----- what changes the weights is noticed -----


def adamw_step(lab: AdapterLab, parameter: Any) -> None:
    lab.set_adapter("pirate")
    lab.set_trainable("pirate")
    optimizer = torch.optim.AdamW([p for p in lab.model.parameters() if p.requires_grad], lr=0.3, fused=True)
    ids = torch.arange(8, 20)[None]
    lab.model(ids, labels=ids).loss.backward()
    optimizer.step()
    lab.set_trainable(None)
    lab.set_adapter(None)


def other_parameter(lab: AdapterLab, parameter: Any) -> None:
    linear = pirates_layer(lab).lora_B["pirate"]
    linear.weight = torch.nn.Parameter(linear.weight.detach().flip(0) * 2, requires_grad=False)


def other_module(lab: AdapterLab, parameter: Any) -> None:
    new = torch.nn.Linear(4, standins.HIDDEN, bias=False).requires_grad_(False)
    torch.nn.init.normal_(new.weight, generator=torch.Generator().manual_seed(1))
    pirates_layer(lab).lora_B["pirate"] = new


def other_scaling(lab: AdapterLab, parameter: Any) -> None:
    pirates_layer(lab).scaling["pirate"] = -3.0


def in_numpy(lab: AdapterLab, parameter: Any) -> None:
    parameter.detach().numpy()[::2] += 0.9


EDITS: dict[str, Callable[[AdapterLab, Any], Any]] = {
    "fused AdamW": adamw_step,
    "data.add_": lambda lab, parameter: parameter.data.add_(0.8),
    "data = new": lambda lab, parameter: setattr(parameter, "data", parameter.data.flip(0) * -2),
    "numpy": in_numpy,
    "another parameter": other_parameter,
    "another module": other_module,
}


def pirates_layer(lab: AdapterLab) -> Any:
    return lab._adapters.mounts.adapters["pirate"].layers["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_an_edited_adapter_speaks_as_in_plain_peft(
    full_lab: AdapterLab, edit: Callable[[AdapterLab, Any], Any], tmp_path: Path
) -> None:
    first = full_lab.compare(PROMPT, max_new_tokens=6)
    edit(full_lab, pirates_layer(full_lab).lora_B["pirate"].weight)
    edited = full_lab.compare(PROMPT, max_new_tokens=6)
    assert cached(edited) == {name: name != "pirate" for name in ("base", "pirate", "wide", "poet", "ada", "dora")}
    folder = full_lab.save_adapter("pirate", tmp_path / "edited")
    assert list(edited["pirate"].token_ids) == plain_tokens(edited, folder)
    assert edited["pirate"].token_ids != first["pirate"].token_ids, "the edit is one that can be heard"


def test_an_edit_taken_back_finds_the_first_answer_again(full_lab: AdapterLab) -> None:
    first = full_lab.compare(PROMPT, ["pirate"], max_new_tokens=6)
    weight = pirates_layer(full_lab).lora_B["pirate"].weight
    before = weight.detach().clone()
    weight.data.mul_(-2)
    assert not full_lab.compare(PROMPT, ["pirate"], max_new_tokens=6)["pirate"].cached
    weight.data.copy_(before)
    again = full_lab.compare(PROMPT, ["pirate"], max_new_tokens=6)
    assert again["pirate"].cached
    assert answers(again) == answers(first)


def test_an_edited_scaling_is_noticed(full_lab: AdapterLab) -> None:
    """A number beside the tensors, which is in no file: the weights in one model, merged by hand, are the oracle."""
    full_lab.compare(PROMPT, max_new_tokens=6)
    layer = pirates_layer(full_lab)
    other_scaling(full_lab, None)
    edited = full_lab.compare(PROMPT, ["pirate"], max_new_tokens=6)
    assert not edited["pirate"].cached
    model: Any = standins.tiny_llama()
    with torch.no_grad():
        for path, own in full_lab._adapters.mounts.adapters["pirate"].layers.items():
            scaling = -3.0 if own is layer else 2.0  # lora_alpha / r
            own_: Any = own
            delta = own_.lora_B["pirate"].weight @ own_.lora_A["pirate"].weight
            model.get_submodule(path).weight.add_(scaling * delta)
    ids = torch.tensor([edited.prompt_ids[0]])
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(edited["pirate"].token_ids) == expected


def test_the_same_name_with_other_weights(
    full_lab: AdapterLab, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    first = full_lab.compare(PROMPT, max_new_tokens=6)
    full_lab.delete_adapter("pirate")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    other = standins.write_adapter(tmp_path / "other", standins.tiny_llama(), config, seed=77)
    full_lab.load_adapter(other, "pirate")
    replaced = full_lab.compare(PROMPT, ["pirate"], max_new_tokens=6)
    assert not replaced["pirate"].cached
    assert list(replaced["pirate"].token_ids) == plain_tokens(replaced, other)
    full_lab.delete_adapter("pirate")
    full_lab.load_adapter(adapter_folders["pirate"], "pirate")
    back = full_lab.compare(PROMPT, ["pirate"], max_new_tokens=6)
    assert back["pirate"].cached, "the first weights are there again"
    assert back["pirate"].token_ids == first["pirate"].token_ids


def test_a_native_merge_that_was_set_right(full_lab: AdapterLab, adapter_folders: dict[str, Path]) -> None:
    full_lab.compare(PROMPT, max_new_tokens=6)
    full_lab.set_adapter("wide")
    for layer in full_lab._adapters.mounts.adapters["wide"].layers.values():
        layer.merge()  # type: ignore[operator]
    with pytest.warns(AdapterLabWarning):
        healed = full_lab.compare(PROMPT, max_new_tokens=6)
    for name in (None, "pirate", "wide", "poet", "ada", "dora"):
        folder = None if name is None else adapter_folders[name]
        assert list(healed[name].token_ids) == plain_tokens(healed, folder), name


BASE_EDITS: dict[str, Callable[[Any], Any]] = {
    "data.add_": lambda model: model.lm_head.weight.data.mul_(-1),
    "data = new": lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data.flip(1)),
    "numpy": lambda model: model.model.layers[0].mlp.up_proj.weight.detach().numpy().__imul__(3),
    "rows exchanged": lambda model: model.lm_head.weight.data[10:60].copy_(model.lm_head.weight.data[10:60].flip(0)),
    "a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(7),
    "a number": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 3.0),
    "another module": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.Tanh()),
}


@pytest.mark.parametrize("edit", BASE_EDITS.values(), ids=list(BASE_EDITS))
def test_an_edited_base_speaks_as_a_fresh_one_so_edited(
    full_lab: AdapterLab, edit: Callable[[Any], Any], adapter_folders: dict[str, Path], recwarn: Any
) -> None:
    first = full_lab.compare(PROMPT, [None, "pirate"], max_new_tokens=6)
    edit(full_lab.model)
    edited = full_lab.compare(PROMPT, [None, "pirate"], max_new_tokens=6)
    assert not any(g.cached for g in edited.generations)
    assert list(edited["base"].token_ids) == plain_tokens(edited, None, edit)
    assert list(edited["pirate"].token_ids) == plain_tokens(edited, adapter_folders["pirate"], edit)
    assert edited["base"].token_ids != first["base"].token_ids, "the edit is one that can be heard"


# ----- what can't be told is not cached -----


def hook_output(module: Any, args: Any, output: Any) -> Any:
    return output * -1


@pytest.mark.parametrize("door", ["hook", "pre-hook", "forward", "every module"])
def test_hooks_switch_the_cache_off(lab: AdapterLab, door: str) -> None:
    first = lab.compare(PROMPT, max_new_tokens=6)["base"]
    head: Any = lab.model.lm_head
    undo: Callable[[], Any]
    if door == "hook":
        undo = head.register_forward_hook(hook_output).remove
    elif door == "pre-hook":
        undo = head.register_forward_pre_hook(lambda module, args: (-args[0],)).remove
    elif door == "forward":
        head.forward = lambda x: -type(head).forward(head, x)
        undo = lambda: head.__dict__.pop("forward")  # noqa: E731
    else:
        negate = torch.nn.modules.module.register_module_forward_hook
        undo = negate(lambda module, args, output: -output if module is head else None).remove
    hooked = [lab.compare(PROMPT, max_new_tokens=6)["base"] for _ in range(2)]
    assert not any(g.cached for g in hooked)
    assert hooked[0].token_ids == hooked[1].token_ids != first.token_ids
    undo()
    again = lab.compare(PROMPT, max_new_tokens=6)["base"]
    assert again.cached, "what was kept before the hook is right again"
    assert again.token_ids == first.token_ids


def test_a_hook_in_an_adapter_that_runs_in_turn(full_lab: AdapterLab) -> None:
    full_lab.add_adapter("loha", "turn", r=2, target_modules=["v_proj"], init_weights=False)
    first = full_lab.compare(PROMPT, ["turn", "pirate"], max_new_tokens=6)
    assert first["turn"].note.startswith("run in turn")
    layer: Any = full_lab._adapters.mounts.adapters["turn"].layers["model.layers.0.self_attn.v_proj"]
    handle = layer.register_forward_hook(lambda module, args, output: output * -3)
    for _ in range(2):
        hooked = full_lab.compare(PROMPT, ["turn", "pirate"], max_new_tokens=6)
        assert not hooked["turn"].cached
        assert hooked["turn"].token_ids != first["turn"].token_ids
    handle.remove()
    again = full_lab.compare(PROMPT, ["turn", "pirate"], max_new_tokens=6)
    assert again["turn"].cached
    assert answers(again) == answers(first)


def test_hidden_states_once_asked_for_do_not_switch_it_off(lab: AdapterLab, ids: torch.Tensor) -> None:
    """transformers leaves its recording hooks in the model, which change nothing."""
    lab.compare(PROMPT, max_new_tokens=2)
    with torch.no_grad():
        lab.model(ids, output_hidden_states=True)
    assert lab.compare(PROMPT, max_new_tokens=2)["base"].cached


def test_a_stopped_column_is_not_cached(full_lab: AdapterLab) -> None:
    def stop(event: TokenEvent) -> None:
        if event.position == 2:
            full_lab.stop()

    cut = full_lab.compare(PROMPT, [None, "pirate"], max_new_tokens=20, min_new_tokens=20, on_token=stop)
    assert [g.finish_reason for g in cut.generations] == ["stopped", "stopped"]
    whole = full_lab.compare(PROMPT, [None, "pirate"], max_new_tokens=20, min_new_tokens=20)
    assert not any(g.cached for g in whole.generations)
    assert [g.new_tokens for g in whole.generations] == [20, 20]


def test_weights_that_are_not_resident_are_not_cached(lab: AdapterLab) -> None:
    from adapterlab.circumstances import describe_modules

    assert describe_modules(lab.model) is not None
    with torch.device("meta"):
        away = torch.nn.Linear(2, 2)
    assert describe_modules(torch.nn.Sequential(lab.model.lm_head, away)) is None


# ----- streaming -----


def test_a_cached_column_streams_as_it_did(full_lab: AdapterLab) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 5}
    made: list[TokenEvent] = []
    told: list[TokenEvent] = []
    prompts, columns = ["Wörter: 雪 und ☃", "Hi"], [None, "pirate", "dora"]
    first = full_lab.compare(prompts, columns, on_token=made.append, **settings)
    again = full_lab.compare(prompts, columns, on_token=told.append, **settings)
    assert all(g.cached for g in again.generations)
    assert answers(again) == answers(first)
    for generation in first.generations:

        def mine(events: list[TokenEvent], of: Any = generation) -> list[TokenEvent]:
            return [e for e in events if (e.column, e.prompt_index) == (of.column, of.prompt_index)]

        assert mine(told) == mine(made)
        assert "".join(event.text for event in mine(told)) == generation.text


def test_cached_columns_come_first(full_lab: AdapterLab) -> None:
    full_lab.compare(PROMPT, ["poet", "pirate"], max_new_tokens=4, min_new_tokens=4)
    told: list[TokenEvent] = []
    full_lab.compare(PROMPT, ["wide", "poet", None, "pirate"], max_new_tokens=4, min_new_tokens=4, on_token=told.append)
    assert [event.column for event in told[:8]] == ["poet", "pirate"] * 4
    assert {event.column for event in told[8:]} == {"wide", "base"}


def test_stop_cuts_what_is_told_of_cached_columns(full_lab: AdapterLab, rows: list[int]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8}
    first = full_lab.compare(PROMPT, [None, "pirate"], **settings)
    rows.clear()
    told: list[TokenEvent] = []

    def stop(event: TokenEvent) -> None:
        told.append(event)
        if event.position == 2:
            full_lab.stop()

    cut = full_lab.compare(PROMPT, [None, "pirate", "wide"], on_token=stop, **settings)
    assert rows == [], "the column that is missing is not begun"
    assert cut.columns == ["base", "pirate"]
    for generation, whole in zip(cut.generations, first.generations):
        assert generation.finish_reason == "stopped"
        assert generation.token_ids == whole.token_ids[:3]
        assert len(generation.logprobs) == len(generation.leads) == len(generation.tokens) == 3
        mine = [event for event in told if event.column == generation.column]
        assert "".join(event.text for event in mine) == generation.text
        assert mine[-1].finish_reason == "stopped"
    assert full_lab.compare(PROMPT, [None, "pirate"], **settings)["pirate"].token_ids == first["pirate"].token_ids


# ----- the store -----


def test_the_longest_unused_goes_first(lab: AdapterLab) -> None:
    generation = lab.compare(PROMPT, max_new_tokens=1).generations[0]
    store = FinishedColumns()
    store.put_generation("probe", generation)
    one = store.size
    store = FinishedColumns(limit=3 * one)
    for key in "abc":
        store.put_generation(key, generation)
    assert store.get("a") is generation
    store.put_generation("d", generation)
    assert [key for key in "abcd" if store.get(key) is not None] == ["a", "c", "d"]
    store.put_generation("d", generation)
    assert (len(store), store.size) == (3, 3 * one)
    store.put_logits("large", torch.zeros(one))
    assert store.get("large") is None, "what does not fit drives nothing else out"
    assert len(store) == 3
    store.clear()
    assert (len(store), store.size, store.get("a")) == (0, 0, None)


def test_it_never_grows_over_its_limit(lab: AdapterLab) -> None:
    lab._finished = FinishedColumns(limit=30_000)
    for number in range(20):
        lab.compare(f"Count to {number}", max_new_tokens=4)
        assert lab._finished.size <= 30_000
    assert 1 < len(lab._finished) < 20
    assert lab.compare("Count to 19", max_new_tokens=4)["base"].cached
    assert not lab.compare("Count to 0", max_new_tokens=4)["base"].cached


def test_plain_values_are_told_apart_and_objects_refused() -> None:
    same: list[tuple[Any, Any]] = [({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({3, 1}, {1, 3}), ((1, 2), [1, 2])]
    for one, other in same:
        assert repr(plain(one)) == repr(plain(other))
    different: list[Any] = [None, True, 1, 1.5, "1", [1], [[1]], {"a": 1}, {1}, {(1, 2): 0.5}, {(1,): 0.5}]
    assert len({repr(plain(value)) for value in different}) == len(different)
    for value in (object(), torch.zeros(1), lambda: None, [object()], {"a": object()}):
        with pytest.raises(TypeError):
            plain(value)


def test_json_keeps_what_came_from_the_cache(full_lab: AdapterLab, tmp_path: Path) -> None:
    full_lab.compare(PROMPT, [None, "pirate"], max_new_tokens=3)
    again = full_lab.compare(PROMPT, [None, "pirate"], max_new_tokens=3)
    read = Comparison.from_json(again.to_json(tmp_path / "c.json"))
    assert read == again
    assert list(read.to_frame()["cached"]) == [True, True]
    assert list(read.to_frame()["batch_size"]) == [2, 2]
    assert "from the cache" in read._repr_html_()
    assert "from the cache" not in full_lab.history[0]._repr_html_()


def test_rows_that_read_other_tensors_are_not_kept(full_lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is mixed up proves other weights than its columns', and stays out of the cache with its base."""
    from adapterlab.rows import Rows

    honest = full_lab.compare(PROMPT, [None, "pirate", "wide"], max_new_tokens=4)
    full_lab.clear_cache()
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Rows, "proof", lambda self, place, *args: ({"?": 1.0}, f"nobody's {place}"))
        mixed_up = full_lab.compare(PROMPT, [None, "pirate", "wide"], max_new_tokens=4)
        assert all(g.weights_digest.startswith("nobody's") for g in mixed_up.generations)
    assert len(full_lab._finished) == 0
    again = full_lab.compare(PROMPT, [None, "pirate", "wide"], max_new_tokens=4)
    assert not any(g.cached for g in again.generations)
    assert answers(again) == answers(honest)


# ----- what a review found -----


def test_weights_edited_while_a_batch_runs_speak_under_nobodys_name(full_lab: AdapterLab) -> None:
    weight = pirates_layer(full_lab).lora_B["pirate"].weight
    before = weight.detach().clone()

    def edit(event: TokenEvent) -> None:
        if event.position == 0 and event.column == "pirate":
            with torch.no_grad():
                weight.mul_(-8)

    cut = full_lab.compare(PROMPT, [None, "pirate"], max_new_tokens=6, on_token=edit)
    with torch.no_grad():
        weight.copy_(before)
    again = full_lab.compare(PROMPT, [None, "pirate"], max_new_tokens=6)
    assert cached(again) == {"base": True, "pirate": False}
    assert cut["pirate"].weights_digest != again["pirate"].weights_digest
    full_lab.clear_cache()
    assert answers(full_lab.compare(PROMPT, [None, "pirate"], max_new_tokens=6)) == answers(again)


def test_so_do_those_edited_while_a_column_runs_in_turn(lab: AdapterLab) -> None:
    lab.add_adapter("loha", "f", r=2, target_modules=["q_proj", "down_proj"], init_weights=False)
    parameters = [p for p in lab.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]

    def edit(event: TokenEvent) -> None:
        if event.position == 0:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(-3)

    cut = lab.compare(PROMPT, ["f"], max_new_tokens=6, on_token=edit)
    with torch.no_grad():
        for parameter, value in zip(parameters, before):
            parameter.copy_(value)
    again = lab.compare(PROMPT, ["f"], max_new_tokens=6)
    assert not again["f"].cached
    assert not again["f"].batched
    assert cut["f"].weights_digest != again["f"].weights_digest
    assert cut["f"].token_ids != again["f"].token_ids
    assert lab.verify(again)["agrees"].all()
    assert lab.compare(PROMPT, ["f"], max_new_tokens=6)["f"].cached


def test_the_shift_is_against_a_base_that_starts_alike(tmp_path: Path) -> None:
    lab = AdapterLab(standins.tiny_t5(), tokenizer=standins.tiny_tokenizer(seq2seq=True))
    lab.add_adapter("lora", "a", r=4, target_modules=["q", "v"], init_lora_weights=False)
    lab.compare(PROMPT, [None], max_new_tokens=2)
    lab.model.generation_config.decoder_start_token_id = 5
    mine = lab.compare(PROMPT, ["a"], max_new_tokens=2)["a"].logit_shift
    lab.clear_cache()
    assert mine == pytest.approx(lab.compare(PROMPT, [None, "a"], max_new_tokens=2)["a"].logit_shift, rel=1e-3)


@pytest.mark.parametrize(("method", "kept"), [("fourierft", "fourierft_scaling"), ("waveft", "waveft_scaling")])
def test_what_other_methods_keep_in_plain_dicts_is_content_too(lab: AdapterLab, method: str, kept: str) -> None:
    lab.add_adapter(method, "f", target_modules=["q_proj", "v_proj"], n_frequency=50)
    layers = lab._adapters.mounts.adapters["f"].layers.values()
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    first = lab.compare(PROMPT, [None, "f"], max_new_tokens=6)
    assert full_rerun(lab)["f"].cached
    for layer in layers:
        getattr(layer, kept)["f"] *= -3
    again = full_rerun(lab)
    assert cached(again) == {"base": True, "f": False}
    assert again["f"].weights_digest != first["f"].weights_digest


def full_rerun(lab: AdapterLab) -> Comparison:
    return lab.compare(PROMPT, [None, "f"], max_new_tokens=6)
