"""`lab.check_adapter`: everything that does not fit, at once; no tensor is read and nothing is changed."""

from __future__ import annotations

import copy
import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_adapters import logits_of

from adapterlab import AdapterLab, AdapterLabError, Preflight

PREFIX = "base_model.model."
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))


def changed(
    folder: Path, target: Path, tensors: Callable[[dict[str, Any]], dict[str, Any]] | None = None, **config: Any
) -> Path:
    """A copy of an adapter folder with other tensors or other fields in its config."""
    target.mkdir(parents=True)
    raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (target / "adapter_config.json").write_text(json.dumps({**raw, **config}), encoding="utf-8")
    found = load_file(str(folder / "adapter_model.safetensors"))
    save_file(tensors(found) if tensors else found, str(target / "adapter_model.safetensors"), {"format": "pt"})
    return target


def items(flight: Preflight, check: str) -> set[str]:
    frame = flight.to_frame()
    return set(frame.loc[frame["check"] == check, "item"])


def state(lab: AdapterLab) -> tuple[Any, ...]:
    parameters = [(name, id(p), p.requires_grad) for name, p in lab.model.named_parameters()]
    return list(lab.adapters), lab.selection, lab.enabled, lab.trainable, parameters, lab.model.training


@pytest.fixture
def lab(lab: AdapterLab) -> AdapterLab:
    """The tiny Llama under the name of a real base."""
    lab._adapters.base_path = "meta/llama"
    return lab


@pytest.fixture
def pirate(adapter_folders: dict[str, Path]) -> Path:
    return adapter_folders["pirate"]


# ----- all at once -----


def test_everything_that_is_wrong_is_listed_at_once(pirate: Path, tmp_path: Path, lab: AdapterLab) -> None:
    rows = standins.VOCABULARY + 5

    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        made = dict(tensors)
        made[f"{PREFIX}{Q0}.lora_A.weight"] = torch.zeros(4, 48)
        made[f"{PREFIX}{Q1}.lora_B.weight"] = torch.zeros(48, 4)
        del made[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"]
        for layer in range(6):  # more than a sentence names
            made[f"{PREFIX}model.layers.{layer}.mlp.gate.lora_A.weight"] = torch.zeros(4, 32)
        made[f"{PREFIX}model.embed_tokens.weight"] = torch.zeros(rows, 32)
        return made

    folder = changed(
        pirate,
        tmp_path / "x",
        spoil,
        base_model_name_or_path="somebody/else",
        auto_mapping={"base_model_class": "OPTForCausalLM", "parent_library": "transformers"},
        bias="all",
        r="four",
        use_of_tomorrow={"deep": 1},
        target_modules=["q_proj", "v_proj", "c_attn", "c_proj"],
        modules_to_save=["embed_tokens", "score"],
        peft_version="9.9.9",
    )
    tokenizer = standins.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new-1>", "<new-2>"]})
    tokenizer.save_pretrained(folder)
    before = state(lab)
    flight = lab.check_adapter(folder)
    assert state(lab) == before
    assert not flight.ok
    assert items(flight, "base model") == {"base_model_name_or_path", "architecture"}
    assert items(flight, "option") == {"bias", "r", "use_of_tomorrow"}
    assert items(flight, "target modules") == {"c_attn", "c_proj", "score"}
    # r is no number, so PEFT's own 8 is what the factors are held against
    assert {f"{Q0}.lora_A.weight", f"{Q1}.lora_B.weight", "model.embed_tokens.weight"} <= items(flight, "shapes")
    foreign = {f"model.layers.{layer}.mlp.gate.lora_A.weight" for layer in range(6)}
    assert items(flight, "tensors") == foreign | {"model.layers.1.self_attn.v_proj.lora_A.weight"}
    assert items(flight, "vocabulary") == {"model.embed_tokens.weight", "tokenizer", "<new-1>", "<new-2>"}
    frame = flight.to_frame()
    assert list(frame.columns) == ["check", "item", "found", "expected", "problem"]
    resized = frame[(frame["check"] == "vocabulary") & (frame["item"] == "model.embed_tokens.weight")].iloc[0]
    assert (resized["found"], resized["expected"]) == (str(rows), str(standins.VOCABULARY))
    wrong = frame[(frame["check"] == "shapes") & (frame["item"] == f"{Q0}.lora_A.weight")].iloc[0]
    assert wrong["found"] == "[4, 48]"
    said = " ".join(flight.problems)
    assert "base must stay base" in said
    assert "r='four' (no number)" in said
    assert f"model.resize_token_embeddings({rows})" in said
    assert "6 of its 14 tensors belong to no layer" in said
    assert "PEFT 9.9.9" in " ".join(flight.notes)
    with pytest.raises(AdapterLabError) as raised:
        lab.load_adapter(folder)
    assert all(problem in str(raised.value) for problem in flight.problems), "the same verdict"
    assert state(lab) == before


def test_what_fits_has_no_mismatch(lab: AdapterLab, adapter_folders: dict[str, Path]) -> None:
    for name, folder in adapter_folders.items():
        flight = lab.check_adapter(folder)
        assert (flight.ok, flight.problems, flight.notes) == (True, [], []), name
        stored = load_file(str(folder / "adapter_model.safetensors"))
        assert (flight.tensors, flight.expected) == (len(stored), len(stored))
        assert flight.parameters == sum(tensor.numel() for tensor in stored.values())
        assert len(flight.to_frame()) == 0
        assert str(flight).startswith(f"{folder} fits: ")


def test_an_adapter_of_another_architecture(tmp_path: Path, lab: AdapterLab) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    folder = standins.write_adapter(tmp_path / "x", standins.tiny_gpt2(), config, base="openai/gpt2")
    flight = lab.check_adapter(folder)
    frame = flight.to_frame()
    lacking = frame[frame["check"] == "target modules"]
    assert set(lacking["item"]) == {"c_attn", "c_fc"}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert linear <= set(lacking["expected"].iloc[0].split(", "))
    stored = load_file(str(folder / "adapter_model.safetensors"))
    assert items(flight, "tensors") == {key.removeprefix(PREFIX) for key in stored}, "all keys, however many"


@pytest.mark.parametrize("method", ["VERA", "PROMPT_TUNING", "NOVEL"])
def test_a_method_that_can_t_live_here_does_not_hide_the_rest(
    method: str, pirate: Path, tmp_path: Path, lab: AdapterLab
) -> None:
    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            **tensors,
            f"{PREFIX}{Q0}.lora_A.weight": torch.zeros(4, 48),
            f"{PREFIX}model.layers.7.x.lora_A.weight": torch.zeros(4, 48),
        }

    folder = changed(
        pirate, tmp_path / "x", spoil, peft_type=method, task_type="SEQ_CLS", base_model_name_or_path="a/b"
    )
    flight = lab.check_adapter(folder)
    assert items(flight, "method") == {"peft_type", "task_type"}
    assert items(flight, "tensors") == {"model.layers.7.x.lora_A.weight"}
    assert items(flight, "shapes") == {f"{Q0}.lora_A.weight"}
    assert "can't be used in the lab" in refusal(lambda: lab.load_adapter(folder))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(AdapterLabError) as raised:
        call()
    return str(raised.value)


def test_several_options_that_peft_refuses(adapter_folders: dict[str, Path], tmp_path: Path, lab: AdapterLab) -> None:
    folder = changed(
        adapter_folders["ada"], tmp_path / "x", total_step=None, layers_pattern="layers", layers_to_transform=None
    )
    flight = lab.check_adapter(folder)
    assert {"total_step", "layers_pattern"} <= items(flight, "option")
    assert not flight.ok


def test_one_module_that_peft_can_t_adapt_does_not_hide_the_others(
    pirate: Path, tmp_path: Path, lab: AdapterLab
) -> None:
    """PEFT stops at the first module that is no layer it knows."""
    gone = "model.layers.1.self_attn.v_proj.lora_B.weight"

    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        del tensors[f"{PREFIX}{gone}"]
        return {**tensors, f"{PREFIX}{Q0}.lora_A.weight": torch.zeros(4, 48)}

    folder = changed(pirate, tmp_path / "x", spoil, target_modules=["q_proj", "v_proj", "self_attn"])
    flight = lab.check_adapter(folder)
    assert "LlamaAttention" in " ".join(flight.problems)
    assert items(flight, "shapes") == {f"{Q0}.lora_A.weight"}
    assert items(flight, "tensors") == {gone}


# ----- the vocabulary -----


def resized(tokens: int, **config: Any) -> tuple[Any, LoraConfig]:
    model = standins.tiny_llama()
    model.resize_token_embeddings(tokens)
    return model, LoraConfig(r=4, **config)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 327]}},
    ],
    ids=["whole", "embeddings", "head", "tokens"],
)
def test_a_larger_vocabulary_and_what_to_do(config: dict[str, Any], tmp_path: Path, lab: AdapterLab, ids: Any) -> None:
    from peft import PeftModel

    tokens = standins.VOCABULARY + 8
    model, made = resized(tokens, **config)
    folder = standins.write_adapter(tmp_path / "x", model, made)
    flight = lab.check_adapter(folder)
    assert items(flight, "vocabulary")
    advice = f"model.resize_token_embeddings({tokens})"
    assert advice in " ".join(flight.problems)
    assert advice in refusal(lambda: lab.load_adapter(folder))
    base, _ = resized(tokens)  # what the advice says
    fresh = copy.deepcopy(base)
    larger = AdapterLab(base, tokenizer=standins.tiny_tokenizer())
    assert larger.check_adapter(folder).ok
    larger.load_adapter(folder, "x")
    plain = PeftModel.from_pretrained(fresh, folder).eval()
    with torch.no_grad():
        assert torch.allclose(logits_of(larger, ids), plain(ids).logits, atol=1e-5)


def test_embeddings_that_peft_saved_along(pirate: Path, tmp_path: Path, lab: AdapterLab) -> None:
    """PEFT writes the whole table beside a LoRA where the vocabulary was resized; the config does not say so."""
    tables = {
        f"{PREFIX}model.embed_tokens.weight": torch.zeros(324, 32),
        f"{PREFIX}lm_head.weight": torch.zeros(324, 32),
    }
    flight = lab.check_adapter(changed(pirate, tmp_path / "x", lambda tensors: {**tensors, **tables}))
    assert items(flight, "vocabulary") == {"model.embed_tokens.weight", "lm_head.weight"}
    assert items(flight, "tensors") == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_the_bases_own_tensors_that_peft_copied_along(
    target: str, safe: bool, tmp_path: Path, lab: AdapterLab, ids: Any
) -> None:
    """PEFT does so for a LoRA on embeddings or head: it fits where they equal the base's, and nowhere else."""
    from peft import get_peft_model

    made = LoraConfig(r=4, target_modules=["q_proj", target], init_lora_weights=False)
    plain = get_peft_model(standins.tiny_llama(), made).eval()
    plain.save_pretrained(tmp_path / "x", safe_serialization=safe)
    path = {"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}[target]
    flight = lab.check_adapter(tmp_path / "x")
    assert flight.ok
    assert flight.left_out == [f"{path}.base_layer.weight"]
    assert flight.left_out[0] in " ".join(flight.notes)
    lab.load_adapter(tmp_path / "x", "x")
    with torch.no_grad():
        assert torch.equal(logits_of(lab, ids), plain(ids).logits)
        with lab.using(None) as bare:
            assert torch.equal(bare(ids).logits, standins.tiny_llama()(ids).logits)
    lab.compare("Hello", max_new_tokens=2)
    assert lab.verify()["agrees"].all()
    other = standins.tiny_llama()
    with torch.no_grad():
        other.get_submodule(path).weight[7, 3] += 0.01
    elsewhere = AdapterLab(other, tokenizer=standins.tiny_tokenizer())
    before = state(elsewhere)
    said = refusal(lambda: elsewhere.load_adapter(tmp_path / "x"))
    assert f"other values than this base's: {path}.base_layer.weight" in said
    assert "save_embedding_layers=False" in said
    assert state(elsewhere) == before


class TestTokenizerBeside:
    def test_more_tokens_than_rows(self, pirate: Path, tmp_path: Path, lab: AdapterLab) -> None:
        folder = changed(pirate, tmp_path / "x")
        (folder / "added_tokens.json").write_text(json.dumps({"<a>": 320, "<b>": 331}), encoding="utf-8")
        flight = lab.check_adapter(folder)
        assert flight.ok, "the layers fit: worth knowing, and no more"
        assert "knows 332 tokens, this model has 320 rows" in flight.notes[0]
        assert "model.resize_token_embeddings(332)" in flight.notes[0]

    def test_as_transformers_saves_it(self, pirate: Path, tmp_path: Path, lab: AdapterLab) -> None:
        folder = changed(pirate, tmp_path / "x")
        standins.tiny_tokenizer(chat=True).save_pretrained(folder)
        assert lab.check_adapter(folder).notes == [], "the lab's own"
        other = standins.tiny_tokenizer()
        other.add_special_tokens({"additional_special_tokens": ["<|end|>"], "eos_token": "<|end|>"})
        other.save_pretrained(folder)
        flight = lab.check_adapter(folder)
        assert flight.ok
        assert items(flight, "vocabulary") == {"tokenizer", "<|end|>", "eos_token"}
        assert "eos_token is '<|end|>' there and '</s>' here" in " ".join(flight.notes)

    def test_as_older_releases_did(self, pirate: Path, tmp_path: Path, lab: AdapterLab) -> None:
        folder = changed(pirate, tmp_path / "x")
        decoder = {"321": {"content": "<old>", "special": True}, "bad": 5, "322": []}
        config = {"added_tokens_decoder": decoder, "eos_token": {"content": "<old>"}, "pad_token": None}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        flight = lab.check_adapter(folder)
        assert items(flight, "vocabulary") == {"tokenizer", "<old>", "eos_token"}
        assert "knows 322 tokens" in flight.notes[0]

    @pytest.mark.parametrize(
        "content", ["[1, 2", "[]", '{"model": 5, "added_tokens": [3, {"id": "x"}]}', "[" * 100_000]
    )
    def test_broken_ones_are_no_obstacle(self, content: str, pirate: Path, tmp_path: Path, lab: AdapterLab) -> None:
        folder = changed(pirate, tmp_path / "x")
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        flight = lab.check_adapter(folder)
        assert flight.ok
        assert bool(flight.notes) is content.startswith("[1") or content.startswith("[[")

    def test_a_huge_one_is_not_read(
        self, pirate: Path, tmp_path: Path, lab: AdapterLab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from adapterlab import vocabulary

        monkeypatch.setattr(vocabulary, "MOST_BYTES", 1000)
        folder = changed(pirate, tmp_path / "x")
        (folder / "tokenizer.json").write_text(
            json.dumps({"added_tokens": [{"id": 999}], "x": "y" * 1000}), encoding="utf-8"
        )
        flight = lab.check_adapter(folder)
        assert flight.ok
        assert "was not compared" in flight.notes[0]

    def test_it_comes_from_the_hub_too(self, pirate: Path, tmp_path: Path, lab: AdapterLab) -> None:
        folder = changed(pirate, tmp_path / "x")
        (folder / "added_tokens.json").write_text(json.dumps({"<b>": 331}), encoding="utf-8")
        with (
            standins.StandinHub({"someone/poet": folder}) as hub,
            standins.hub_environment(tmp_path / "cache", url=hub.url),
        ):
            assert items(lab.check_adapter("someone/poet"), "vocabulary") == {"tokenizer"}


# ----- what is read, and what is not -----


def test_no_tensor_is_read(full_lab: AdapterLab, pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors
    import safetensors.torch

    real = safetensors.safe_open

    class Header:
        """A file of which only names and shapes may be asked for."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = real(*args, **kwargs)

        def __enter__(self) -> Header:
            self._inner = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def keys(self) -> Any:
            return self._inner.keys()

        def get_slice(self, key: str) -> Any:
            class Shape:
                get_shape = self._inner.get_slice(key).get_shape

            return Shape

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor is read")

    wrong = changed(pirate, tmp_path / "x", lambda tensors: {**tensors, "y": torch.zeros(2)})
    monkeypatch.setattr(safetensors, "safe_open", Header)
    monkeypatch.setattr(safetensors.torch, "load_file", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    assert full_lab.check_adapter(pirate).ok
    assert items(full_lab.check_adapter(wrong), "tensors") == {"y"}


@pytest.mark.parametrize("value", [None, -1, 10**12, "x", ["x"], {"x": ["y"]}, [1, None], 1.5, True, {}], ids=str)
def test_no_config_is_bad_enough_to_raise(
    value: Any, adapter_folders: dict[str, Path], tmp_path: Path, lab: AdapterLab
) -> None:
    before = state(lab)
    for name in ("pirate", "ada", "poet"):
        raw = json.loads((adapter_folders[name] / "adapter_config.json").read_text(encoding="utf-8"))
        target = tmp_path / name
        shutil.copytree(adapter_folders[name], target)
        fields = ["r", "init_r", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_alpha",
                  "layers_to_transform", "feedforward_modules", "auto_mapping", "base_model_name_or_path", "task_type", "bias",
                  "trainable_token_indices", "target_parameters", "init_lora_weights", "lora_dropout"]  # fmt: skip
        for field in fields:
            (target / "adapter_config.json").write_text(json.dumps({**raw, field: value}), encoding="utf-8")
            flight = lab.check_adapter(target)
            assert isinstance(flight, Preflight), field
            assert str(flight), field
            if not flight.ok:
                assert refusal(lambda target=target: lab.load_adapter(target))
    assert state(lab) == before


def test_files_that_can_t_be_read(pirate: Path, tmp_path: Path, lab: AdapterLab) -> None:
    folder = changed(pirate, tmp_path / "x", base_model_name_or_path="a/b", bias="all")
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    flight = lab.check_adapter(folder)
    assert items(flight, "tensors") == {"adapter_model.safetensors"}
    assert items(flight, "option") == {"bias"}, "and the rest is looked at all the same"
    assert items(flight, "base model") == {"base_model_name_or_path"}
    (folder / "adapter_model.safetensors").unlink()
    flight = lab.check_adapter(folder)
    assert not flight.ok
    assert items(flight, "option") == {"bias"}
    for text in ("{", "[]", "{}"):
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        flight = lab.check_adapter(folder)
        assert not flight.ok
        assert "adapter_config.json" in flight.problems[0]


def test_where_nothing_is_it_raises(tmp_path: Path, lab: AdapterLab) -> None:
    with pytest.raises(AdapterLabError, match="holds no adapter"):
        lab.check_adapter(tmp_path)
    standins.write_model(tmp_path / "model", standins.tiny_llama())
    with pytest.raises(AdapterLabError, match="is a model, not an adapter"):
        lab.check_adapter(tmp_path / "model")
    with standins.hub_environment(tmp_path / "cache"), pytest.raises(AdapterLabError):
        lab.check_adapter(str(tmp_path / "nowhere"))


# ----- read by people -----


def test_the_verdict_comes_first_and_names_stay_text(pirate: Path, tmp_path: Path, lab: AdapterLab) -> None:
    hostile = "<script>alert(1)</script>"
    many = {f"{PREFIX}{hostile}.{i}": torch.zeros(1) for i in range(60)}
    folder = changed(pirate, tmp_path / "x", lambda tensors: {**tensors, **many}, base_model_name_or_path=hostile)
    flight = lab.check_adapter(folder)
    lines = str(flight).splitlines()
    assert lines[0] == f"{folder} does not fit: 1 problem."
    assert sum(hostile in line and line.startswith("tensors · ") for line in lines) == 60
    page = flight._repr_html_()
    inside = page.removeprefix('<div class="tex2jax_ignore mathjax_ignore">')
    assert inside.startswith(f"<p><b>{html.escape(str(folder))} does not fit")
    assert hostile not in page
    assert "and 21 more" in page, "61 mismatches, of which 40 are shown"
    assert lab.check_adapter(pirate)._repr_html_().count("<li>") == 0
