"""What strangers' files taught: one small test for each mistake that the corpus (test_hostile.py) found."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import tiny_llama, tiny_tokenizer, write_model

from adapterlab import AdapterLab, AdapterLabError, Comparison
from adapterlab.patterns import pattern_objections
from adapterlab.strangers import read_json

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def pirate(adapter_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a good LoRA, to be spoilt."""
    shutil.copytree(adapter_folders["pirate"], tmp_path / "pirate")
    return tmp_path / "pirate"


def set_config(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")
    return folder


def set_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    key = f"base_model.model.{Q0}.lora_A.weight"
    tensors = load_file(str(path))
    save_file({**tensors, key: change(tensors[key])}, str(path))
    return folder


def as_pickle(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    from safetensors.torch import load_file

    tensors = load_file(str(folder / "adapter_model.safetensors"))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(change(tensors), folder / "adapter_model.bin")
    return folder


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(AdapterLabError) as raised:
        act()
    return str(raised.value)


# ----- weights -----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_adapter_with_nan_or_infinity_is_refused_by_its_tensor(value: float, pirate: Path, lab: AdapterLab) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[-1, -1] = value
        return tensor

    said = refusal(lambda: lab.load_adapter(set_tensor(pirate, spoil)))
    assert f"{Q0}.lora_A.weight has" in said
    assert not lab.adapters


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64], ids=str)
def test_numbers_that_are_no_floats_are_refused_before_they_are_read(
    dtype: torch.dtype, pirate: Path, lab: AdapterLab
) -> None:
    set_tensor(pirate, lambda tensor: tensor.to(dtype))
    flight = lab.check_adapter(pirate)
    assert [each.item for each in flight.mismatches] == [f"{Q0}.lora_A.weight"]
    assert "hold no floats" in refusal(lambda: lab.load_adapter(pirate))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64], ids=str)
def test_floats_of_other_sizes_are_read_as_the_numbers_they_are(
    dtype: torch.dtype, pirate: Path, lab: AdapterLab
) -> None:
    from safetensors.torch import load_file

    set_tensor(pirate, lambda tensor: tensor.to(dtype))
    stored = load_file(str(pirate / "adapter_model.safetensors"))[f"base_model.model.{Q0}.lora_A.weight"]
    lab.load_adapter(pirate, "p")
    held = lab._adapters.state("p")[1][f"{Q0}.lora_A.weight"]
    assert torch.equal(held, stored.float())


def test_a_double_that_float32_has_no_room_for_is_infinity(pirate: Path, lab: AdapterLab) -> None:
    set_tensor(pirate, lambda tensor: tensor.double() * 1e300)
    assert "more than float32 holds" in refusal(lambda: lab.load_adapter(pirate))


def test_a_pickle_with_code_is_refused_without_advice_to_run_it(pirate: Path, lab: AdapterLab) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(pirate / "sprung"),)

    said = refusal(lambda: lab.load_adapter(as_pickle(pirate, lambda tensors: {**tensors, "x": Trap()})))
    assert "posix.mkdir" in said or "nt.mkdir" in said
    assert "safetensors" in said
    assert "weights_only" not in said
    assert not (pirate / "sprung").exists()


def test_a_packed_pickle_is_not_unpacked(pirate: Path, lab: AdapterLab) -> None:
    as_pickle(pirate, lambda tensors: tensors)
    path = pirate / "adapter_model.bin"
    with zipfile.ZipFile(path) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in inside.items():
            archive.writestr(name, content)
    assert "packed as torch never does it" in refusal(lambda: lab.load_adapter(pirate))


def test_a_tensor_larger_than_its_file_is_refused(pirate: Path, lab: AdapterLab) -> None:
    key = f"base_model.model.{Q0}.lora_A.weight"
    as_pickle(pirate, lambda tensors: {**tensors, key: torch.zeros(1).expand(4, 32)})
    assert "more than the file has" in refusal(lambda: lab.load_adapter(pirate))


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(pirate: Path, lab: AdapterLab) -> None:
    (pirate / "adapter_model.safetensors").unlink()
    os.mkfifo(pirate / "adapter_model.safetensors")
    assert "no ordinary file" in lab.check_adapter(pirate).problems[0]


def test_names_of_tensors_can_t_act_on_a_terminal(pirate: Path, lab: AdapterLab) -> None:
    from safetensors.torch import load_file, save_file

    path = pirate / "adapter_model.safetensors"
    save_file({**load_file(str(path)), "\x1b[2J\u202e" + "a" * 9000: torch.zeros(1)}, str(path))
    said = refusal(lambda: lab.load_adapter(pirate))
    assert "\\x1b[2J\\u202eaaa" in said
    assert len(said) < 1500
    assert "\x1b" not in str(lab.check_adapter(pirate))


# ----- configs -----


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"lora_alpha": float("nan")}, "no finite number"),
        ({"lora_alpha": float("inf")}, "no finite number"),
        ({"lora_alpha": 1e300}, "too large a number"),
        ({"lora_alpha": None}, "no number"),
        ({"r": True}, "no number"),
        ({"r": 10**30}, "too large a number"),
        ({"r": 0}, "1 or more"),
        ({"lora_dropout": -1}, "between 0 and 1"),
        ({"lora_dropout": 7}, "between 0 and 1"),
        ({"use_dora": "no"}, "not true or false"),
        ({"use_rslora": "false"}, "not true or false"),
        ({"fan_in_fan_out": "maybe"}, "not true or false"),
        ({"target_modules": {"q_proj": 1}}, "not a list or a text"),
        ({"target_modules": [1, 2]}, "not a list or a text"),
        ({"modules_to_save": "lm_head"}, "not a list"),
        ({"layers_to_transform": [[0]]}, "not a list or a whole number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "no finite number"),
        ({"rank_pattern": {"q_proj": "x"}}, "no number"),
        ({"rank_pattern": {"q_proj": 0}}, "1 or more"),
    ],
    ids=str,
)
def test_values_of_other_kinds_than_peft_declares_are_named(
    fields: dict[str, Any], why: str, pirate: Path, lab: AdapterLab
) -> None:
    field = next(iter(fields))
    said = refusal(lambda: lab.load_adapter(set_config(pirate, **fields)))
    assert f"{field}=" in said
    assert why in said
    assert {each.item for each in lab.check_adapter(pirate).mismatches if each.check == "option"} == {field}
    assert f"{field}=" in refusal(lambda: AdapterLab.estimate(tiny_llama(), adapters=[pirate]))


def test_the_declared_kinds_of_every_method_are_known() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        assert {each.name for each in dataclasses.fields(cls)} <= set(typing.get_type_hints(cls)), cls


def test_what_every_method_saves_is_of_the_declared_kinds(tmp_path: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from adapterlab.config_values import wrong_values
    from adapterlab.methods import make_config, unsupported_reason

    for kind in (str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING):
        if unsupported_reason(kind) is None and kind != "ADAMSS":  # which wants another library
            make_config(kind, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
            assert not wrong_values(json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))), kind


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"peft_type": "LORA"}' + " " * 33_000_000, "more than 32 MB"),
        ("\ud800", "not UTF-8"),
    ],
    ids=["deep", "huge", "half a character"],
)
def test_a_config_that_can_t_be_read_is_one_sentence(text: str, said: str, pirate: Path, lab: AdapterLab) -> None:
    (pirate / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert said in refusal(lambda: lab.load_adapter(pirate))


def test_a_byte_order_mark_is_no_obstacle(pirate: Path, lab: AdapterLab) -> None:
    path = pirate / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert lab.load_adapter(pirate, "p") == "p"


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-this-name/model", "a\0b", "/" + "a" * 300 + "/b"])
def test_a_base_with_a_name_that_no_file_can_have_is_refused(name: str, pirate: Path) -> None:
    said = refusal(lambda: AdapterLab(set_config(pirate, base_model_name_or_path=name), local_files_only=True))
    assert "is for" in said
    assert len(said) < 1500


# ----- patterns -----

NEVER = r"(\w+\.?)+!"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": NEVER},
        {"target_modules": r"(\w|\w\w|.)" * 30 + "!"},
        {"target_modules": r"(?=(\w+\.?)+!).*"},
        {"exclude_modules": NEVER},
        {"rank_pattern": {NEVER: 4}},
        {"alpha_pattern": {NEVER: 4}},
        {"modules_to_save": [NEVER]},
        {"layers_to_transform": [0], "layers_pattern": NEVER},
    ],
    ids=str,
)
def test_a_regular_expression_that_never_ends_is_stopped(fields: dict[str, Any], pirate: Path, lab: AdapterLab) -> None:
    set_config(pirate, **fields)
    assert "takes too long" in lab.check_adapter(pirate).problems[0]
    assert list(fields)[-1] in refusal(lambda: lab.load_adapter(pirate))


def test_one_that_a_person_types_is_stopped_too(lab: AdapterLab) -> None:
    assert "takes too long" in refusal(lambda: lab.add_adapter("lora", "x", target_modules=NEVER))
    assert not lab.adapters


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.(0|1)\..*_proj",
        r"^(?!.*lm_head).*(?:q_proj|k_proj|v_proj|o_proj).*$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)"
        r"\.(?:(?:q_proj|k_proj|v_proj)))",
    ],
)
def test_patterns_that_people_write_are_taken(pattern: str, lab: AdapterLab) -> None:
    lab.add_adapter("lora", "x", target_modules=pattern)
    assert lab.adapters["x"].target_modules


def test_what_is_no_regular_expression_is_said_of_its_field(pirate: Path, lab: AdapterLab) -> None:
    said = refusal(lambda: lab.load_adapter(set_config(pirate, target_modules="(((")))
    assert "target_modules: '(((' is no regular expression (missing )" in said


def test_plain_names_start_no_process(lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a process is started")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    config = LoraConfig(
        target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 4}, modules_to_save=["norm"]
    )
    assert pattern_objections(config, lab.model) == {}


def test_where_no_process_can_be_started_patterns_are_refused(lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    said = refusal(lambda: pattern_objections(LoraConfig(target_modules=r".*\.never_asked_before"), lab.model))
    assert "can't be tried out" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", [f"m{i}" for i in range(5000)]),
        ("rank_pattern", {f"m{i}": 4 for i in range(5000)}),
        ("layers_to_transform", list(range(5000))),
    ],
    ids=["target_modules", "rank_pattern", "layers_to_transform"],
)
def test_lists_far_longer_than_the_model_are_refused(field: str, value: Any, pirate: Path, lab: AdapterLab) -> None:
    assert f"{field}: it has 5,000 entries" in refusal(lambda: lab.load_adapter(set_config(pirate, **{field: value})))


# ----- base models -----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", tiny_llama(), tiny_tokenizer())


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "base")
    return tmp_path / "base"


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 2000},
        {"num_hidden_layers": 10**7},
        {"hidden_size": 10**9, "intermediate_size": 10**9},
        {"vocab_size": 10**12},
    ],
    ids=str,
)
def test_a_config_of_a_far_larger_model_is_refused_before_it_is_built(fields: dict[str, Any], base: Path) -> None:
    change_json(base / "config.json", **fields)
    assert "don't belong together" in refusal(lambda: AdapterLab(base))


def test_an_index_that_climbs_out_of_its_folder_is_refused(base: Path) -> None:
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "'../outside.safetensors'" in refusal(lambda: AdapterLab(base))


def test_a_model_s_pickle_with_code_is_refused_without_advice_to_run_it(base: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(base / "sprung"),)

    (base / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, base / "pytorch_model.bin")
    said = refusal(lambda: AdapterLab(base))
    assert "a pickle of more than tensors" in said
    assert "weights_only" not in said
    assert not (base / "sprung").exists()


def test_ids_that_are_no_numbers_are_refused_when_the_model_is_opened(base: Path) -> None:
    change_json(base / "generation_config.json", eos_token_id="x")
    assert "eos_token_id='x'" in refusal(lambda: AdapterLab(base))


def test_a_model_of_random_numbers_is_refused_and_one_with_some_is_said(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = base / "model.safetensors"
    tensors = load_file(str(path))
    gone = "model.layers.0.self_attn.q_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != gone}, str(path), metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"1 of 35 weights of base are not in its files.*{gone}"):
        AdapterLab(base).close()
    save_file({f"of.another.{key}": value for key, value in tensors.items()}, str(path), metadata={"format": "pt"})
    assert "None of the weights" in refusal(lambda: AdapterLab(base))


# ----- comparisons and data -----


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt_index": 0.0}, "prompt_index is no whole number"),
        ({"prompt_index": True}, "prompt_index is no whole number"),
        ({"token_ids": [10**30] * 2}, "which can't be"),
        ({"asked": [["pirate", 10**400]]}, "too large"),
        ({"logit_shift": 10**400}, "too large"),
        ({"first_difference": 10**30}, "which can't be"),
        ({"seconds": -1}, "seconds is no time"),
        ({"leads": [1.0]}, "differ in length"),
        ({"active_adapters": ["x"] * 7}, "differ in length"),
    ],
    ids=str,
)
def test_a_comparison_edited_by_hand_is_refused_by_the_value(
    fields: dict[str, Any], said: str, lab: AdapterLab, tmp_path: Path
) -> None:
    path = lab.compare("Hello", max_new_tokens=2).to_json(tmp_path / "c.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["generations"][0].update(fields)
    path.write_text(json.dumps(content), encoding="utf-8")
    assert said in refusal(lambda: Comparison.from_json(path))


def test_half_a_character_in_a_comparison_is_no_obstacle_to_its_frames(lab: AdapterLab, tmp_path: Path) -> None:
    path = lab.compare("Hello", max_new_tokens=2).to_json(tmp_path / "c.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["generations"][0].update(text="\ud800", tokens=["\ud800", "x"])
    path.write_text(json.dumps(content), encoding="utf-8")
    comparison = Comparison.from_json(path)
    assert comparison.to_frame()["text"][0] == "\ufffd"
    assert comparison.tokens()["token"][0] == "\ufffd"


def test_a_pipe_and_a_device_are_no_comparisons(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert "no ordinary file" in refusal(lambda path=path: Comparison.from_json(path))  # type: ignore[misc]


def test_data_nested_too_deeply_is_said(lab: AdapterLab, tmp_path: Path) -> None:
    lab.add_adapter("lora", "x")
    for name in ("data.json", "data.jsonl"):
        (tmp_path / name).write_text("[" * 100_000, encoding="utf-8")
        assert "nested too deeply" in refusal(lambda name=name: lab.train("x", tmp_path / name))  # type: ignore[misc]


def test_a_token_id_beyond_what_torch_counts_with_is_said(lab: AdapterLab) -> None:
    lab.add_adapter("lora", "x")
    assert "row 1" in refusal(lambda: lab.train("x", [{"input_ids": [1, 10**30]}], max_steps=1))


def test_a_file_that_grows_beyond_the_limit_is_not_read_on(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b" " * 1001)
    with pytest.raises(ValueError, match="more than"):
        read_json(tmp_path / "x.json", 1000)
    (tmp_path / "x.json").write_bytes(pickle.dumps(1))
    with pytest.raises(ValueError):
        read_json(tmp_path / "x.json", 1000)
