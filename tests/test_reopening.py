"""Saved labs: what comes back is what was saved, and what is not the same is said."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import standins
import torch
from peft import PeftModel
from tiny_adapters import adapter_configs, logits_of

from adapterlab import AdapterLab, AdapterLabError, AdapterLabWarning, Comparison, TrainingRun
from adapterlab.hub import resolve_adapter

SHORT: dict[str, Any] = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standins.write_model(
        tmp_path_factory.mktemp("b") / "base", standins.tiny_llama(), standins.tiny_tokenizer(chat=True)
    )


@pytest.fixture(scope="module")
def worked(base: Path, adapter_folders: dict[str, Path]) -> AdapterLab:
    """A lab in which something has been done: five loaded adapters, a fresh one, two trained ones, comparisons, a blend. The
    tests save it and change nothing else."""
    lab = AdapterLab(base)
    for name, folder in adapter_folders.items():
        lab.load_adapter(folder, name)
    lab.add_adapter("lora", "fresh", target_modules=["q_proj"])
    lab.add_adapter("loha", "drawn", target_modules=["q_proj"], init_weights=False)
    quiet: dict[str, Any] = {"disable_tqdm": True, "logging_steps": 1}
    lab.train("mine", ["The moon.", "The sea."], method="adalora", target_modules=["q_proj"], max_steps=10, **quiet)
    lab.train("head", ["The moon."] * 4, method="lora", target_modules=["v_proj"], modules_to_save=["lm_head"],
              eval_dataset=0.25, max_steps=2, **quiet)  # fmt: skip
    lab.save_adapter("head", base.parent / "head")
    lab.compare("The moon", [None, "pirate", {"pirate": 0.5, "poet": 0.5}, "mine"], **SHORT)
    lab.compare([{"role": "user", "content": "Hi"}], temperature=0.8, seed=3, **SHORT)
    lab.add_weighted_adapter(["pirate", "wide"], [0.5, 0.5], "both")
    lab.blends = [{"pirate": 0.5, "poet": 0.5}, ["pirate", "wide"]]
    lab.set_adapter({"pirate": 0.7, "ada": -0.3})
    lab.disable_adapters()
    lab.set_trainable("poet")
    return lab


@pytest.fixture
def saved(worked: AdapterLab, tmp_path: Path) -> Path:
    return worked.save(tmp_path / "saved")


STATUS = {
    **dict.fromkeys(adapter_configs(), "loaded"),
    "fresh": "untrained",
    "drawn": "random weights",
    "mine": "trained here",
    "head": "trained here",
    "both": "trained here",
}


def claims(lab: AdapterLab) -> dict[str, Any]:
    """All that a lab says of itself."""
    return {
        "name": lab.name,
        "adapters": [
            (i.name, i.method, i.r, i.parameters, i.bytes, i.target_modules, i.source, i.status, i.multiplier_obstacle)
            for i in lab.adapters.values()
        ],
        "state": (lab.selection, lab.enabled, lab.trainable, lab.active_adapters, lab.blends),
        "trainable": sorted(name for name, p in lab.model.named_parameters() if p.requires_grad),
        "summary": lab.summary().to_dict(),
        "runs": {name: [run.describe() for run in info.runs] for name, info in lab.adapters.items()},
        "history": [one._json() for one in lab.history],
    }


def all_logits(lab: AdapterLab, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for column in (None, *lab.adapters, *lab.blends, lab.selection):
        with lab.using(column) as model, torch.no_grad():
            found[str(column)] = model(ids).logits
    return found


def test_everything_comes_back(
    worked: AdapterLab, ids: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert worked.restored is None
    folder = worked.save(tmp_path / "saved")
    assert {name: info.status for name, info in worked.adapters.items()} == STATUS
    expected, logits = claims(worked), all_logits(worked, ids)
    capsys.readouterr()
    again = AdapterLab(folder)
    assert capsys.readouterr().out == (
        "Opened base with 10 adapters and 2 comparisons: weights and logits are those that were saved.\n"
    )
    assert claims(again) == expected
    found = all_logits(again, ids)
    assert list(found) == list(logits)
    assert all(torch.equal(found[column], logits[column]) for column in logits)
    assert again.restored is not None
    assert again.restored["agrees"].all()
    assert set(again.restored.loc[again.restored["what"] == "logits", "part"]) == {
        "base", *again.adapters, "pirate × 0.5 + poet × 0.5", "pirate + wide", "pirate × 0.7 + ada × -0.3",
    }  # fmt: skip
    for one in again.history:
        assert again.verify(one)["agrees"].all()
    assert not again.history[0].tokens()["base_logprob"].isna().any(), "base can be asked again"
    again.compare("The moon", [None, "pirate", "mine"], **SHORT)
    for column in (None, "pirate", "mine"):
        assert again.history[-1][column].token_ids == worked.history[0][column].token_ids


def test_saved_twice_it_is_the_same_folder(worked: AdapterLab, tmp_path: Path) -> None:
    """Through files and back nothing is lost, not even the last bit: all files but the time are equal."""
    one = worked.save(tmp_path / "one")
    two = AdapterLab(one).save(tmp_path / "two")
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for path in files:
        if path.name not in ("README.md", "adapterlab.json"):
            assert (one / path).read_bytes() == (two / path).read_bytes(), path
    manifests = [json.loads((folder / "adapterlab.json").read_text()) for folder in (one, two)]
    assert all(manifest.pop("created") for manifest in manifests)
    assert manifests[0] == manifests[1]


def test_each_adapter_is_plain_pefts(worked: AdapterLab, ids: torch.Tensor, tmp_path: Path) -> None:
    folder = worked.save(tmp_path / "saved")
    for name in worked.adapters:
        with worked.using(name) as model, torch.no_grad():
            expected = model(ids).logits
        plain = PeftModel.from_pretrained(standins.tiny_llama(), folder / "adapters" / name).eval()
        with torch.no_grad():
            assert torch.allclose(plain(ids).logits, expected, atol=5e-5, rtol=1e-4), name


def test_base_and_lab_move_together_or_apart(adapter_folders: dict[str, Path], tmp_path: Path) -> None:
    lab = AdapterLab(standins.write_model(tmp_path / "base", standins.tiny_llama(), standins.tiny_tokenizer()))
    lab.load_adapter(adapter_folders["pirate"], "pirate")
    lab.save(tmp_path / "labs" / "saved")
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "labs"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    again = AdapterLab(tmp_path / "elsewhere" / "labs" / "saved")
    assert again.restored is not None
    assert again.restored["agrees"].all()
    shutil.move(tmp_path / "elsewhere" / "base", tmp_path / "new")
    with pytest.raises(AdapterLabError, match=r"is not in '.*base' any more: open AdapterLab\(.*, base_model=…\)"):
        AdapterLab(tmp_path / "elsewhere" / "labs" / "saved")
    moved = AdapterLab(tmp_path / "elsewhere" / "labs" / "saved", base_model=tmp_path / "new")
    assert moved.restored is not None
    assert moved.restored["agrees"].all()
    assert moved.name == lab.name


def test_a_model_in_hand_is_asked_for_again(full_lab: AdapterLab, ids: torch.Tensor, tmp_path: Path) -> None:
    full_lab.set_adapter("dora")
    expected = logits_of(full_lab, ids)
    folder = full_lab.save(tmp_path / "saved")
    with pytest.raises(AdapterLabError, match=r"was a model in hand.*base_model=model\)"):
        AdapterLab(folder)
    again = AdapterLab(folder, base_model=standins.tiny_llama(), tokenizer=standins.tiny_tokenizer(chat=True))
    assert torch.equal(logits_of(again, ids), expected)
    assert again.restored is not None
    assert again.restored["agrees"].all()


def test_base_model_is_for_saved_labs(base: Path) -> None:
    with pytest.raises(AdapterLabError, match="base_model= is for a saved lab"):
        AdapterLab(base, base_model=base)


# -- what differs is said ----------------------------------------------------------------------------------------------


def _differing(lab: AdapterLab) -> set[tuple[str, str]]:
    assert lab.restored is not None
    other = lab.restored[~lab.restored["agrees"]]
    return set(zip(other["part"], other["what"]))


def test_another_base_is_said(full_lab: AdapterLab, tmp_path: Path) -> None:
    folder = full_lab.save(tmp_path / "saved")
    other = standins.tiny_llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.5
    with pytest.warns(AdapterLabWarning, match=r"not quite the lab that was saved\. base: weights .*lab\.restored"):
        again = AdapterLab(folder, base_model=other, tokenizer=standins.tiny_tokenizer(chat=True))
    assert ("base", "weights") in _differing(again)
    assert {"base", *full_lab.adapters} == {part for part, what in _differing(again) if what == "logits"}
    assert again.name != "base"


def test_a_base_that_differs_within_rounding_has_equal_logits(full_lab: AdapterLab, tmp_path: Path) -> None:
    folder = full_lab.save(tmp_path / "saved")
    other = standins.tiny_llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] *= 1 + 1e-6
    with pytest.warns(AdapterLabWarning, match="base: weights"):
        again = AdapterLab(folder, base_model=other, tokenizer=standins.tiny_tokenizer(chat=True))
    assert _differing(again) == {("base", "weights")}


def test_adapters_that_were_swapped_on_disk_are_said(worked: AdapterLab, tmp_path: Path) -> None:
    folder = worked.save(tmp_path / "saved")
    worked.save_adapter("wide", tmp_path / "w")
    shutil.rmtree(folder / "adapters" / "pirate")
    shutil.copytree(tmp_path / "w", folder / "adapters" / "pirate")
    with pytest.warns(AdapterLabWarning, match="pirate: weights"):
        again = AdapterLab(folder)
    assert {("pirate", "weights"), ("pirate", "logits")} <= _differing(again)
    assert ("wide", "weights") not in _differing(again)
    assert again.adapters["pirate"].status == "loaded"
    spoken = again.compare("Hi", ["pirate", "wide"], **SHORT)
    assert spoken["pirate"].weights_digest == spoken["wide"].weights_digest
    assert again.verify()["agrees"].all()


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_lab_comes_back_quantised(
    base: Path, adapter_folders: dict[str, Path], ids: torch.Tensor, tmp_path: Path, quantization: Any
) -> None:
    lab = AdapterLab(base, quantization=quantization)
    lab.load_adapter(adapter_folders["pirate"], "pirate")
    expected = logits_of(lab, ids)
    folder = lab.save(tmp_path / "saved")
    again = AdapterLab(folder)
    assert again.status().split(" · ")[2] == quantization
    assert again.model.config.quantization_config.to_dict() == lab.model.config.quantization_config.to_dict()
    assert torch.equal(logits_of(again, ids), expected)
    assert again.restored is not None
    assert again.restored["agrees"].all()
    with pytest.warns(AdapterLabWarning, match=r"base: weights .*base: quantization"):
        plain = AdapterLab(folder, base_model=standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    assert ("base", "logits") in _differing(plain)


def test_the_dtype_comes_back_unless_another_is_given(
    base: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    lab = AdapterLab(base, dtype="bfloat16")
    lab.load_adapter(adapter_folders["poet"], "poet")
    folder = lab.save(tmp_path / "saved")
    assert AdapterLab(folder).model.dtype is torch.bfloat16
    with pytest.warns(AdapterLabWarning, match="base: dtype"):
        assert AdapterLab(folder, dtype="float32").model.dtype is torch.float32


@pytest.mark.parametrize("make", [standins.tiny_opt, standins.tiny_t5, standins.tiny_gpt2])
def test_other_architectures(make: Any, tmp_path: Path) -> None:
    seq2seq = make is standins.tiny_t5
    standins.write_model(tmp_path / "base", make(), standins.tiny_tokenizer(seq2seq=seq2seq))
    lab = AdapterLab(tmp_path / "base")
    lab.add_adapter(
        "lora", "a", init_lora_weights=False, **({"fan_in_fan_out": True} if make is standins.tiny_gpt2 else {})
    )
    again = AdapterLab(lab.save(tmp_path / "saved"))
    assert again.restored is not None
    assert again.restored["agrees"].all()
    assert again.adapters["a"].status == "random weights"


def test_without_a_tokenizer(tmp_path: Path) -> None:
    standins.write_model(tmp_path / "base", standins.tiny_llama())
    again = AdapterLab(AdapterLab(tmp_path / "base").save(tmp_path / "saved"))
    assert again.restored is not None
    assert again.restored["agrees"].all()


def test_an_adapter_whose_training_diverged_is_what_it_was(full_lab: AdapterLab, tmp_path: Path) -> None:
    """NaN is equal to NaN here."""
    full_lab.set_trainable("pirate")
    for layer in full_lab._adapters.mounts.adapters["pirate"].layers.values():
        layer.lora_B["pirate"].weight.data.fill_(float("inf"))  # type: ignore[union-attr, index]
    folder = full_lab.save(tmp_path / "saved")
    again = AdapterLab(folder, base_model=standins.tiny_llama(), tokenizer=standins.tiny_tokenizer(chat=True))
    assert _differing(again) == set()


# -- the folder --------------------------------------------------------------------------------------------------------


def test_saving_changes_nothing_but_the_badges(worked: AdapterLab, ids: torch.Tensor, tmp_path: Path) -> None:
    said: list[str] = []
    before, logits = claims(worked), logits_of(worked, ids)
    worked.on_change(said.append)
    worked.save(tmp_path / "saved")
    after = claims(worked)
    assert {**after, "adapters": 0, "summary": 0} == {**before, "adapters": 0, "summary": 0}
    assert torch.equal(logits_of(worked, ids), logits)
    assert said == ["adapters"]


def test_a_saved_lab_is_replaced_and_other_things_are_not(full_lab: AdapterLab, tmp_path: Path) -> None:
    folder = full_lab.save(tmp_path / "saved")
    (folder / "README.md").write_text("my words")
    (folder / "adapters" / "pirate" / "README.md").write_text("of the pirate")
    full_lab.delete_adapter("dora")
    full_lab.save(folder)
    assert not (folder / "adapters" / "dora").exists()
    assert (folder / "README.md").read_text() == "my words"
    assert (folder / "adapters" / "pirate" / "README.md").read_text() == "of the pirate"
    (folder / "adapters" / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterLabError, match=r"holds other things than a saved lab \(adapters/thesis.txt\)"):
        full_lab.save(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterLabError, match=r"holds other things \(thesis.txt\)"):
        full_lab.save(tmp_path / "other")
    with pytest.raises(AdapterLabError, match="no folder to save a lab in"):
        full_lab.save(None)  # type: ignore[arg-type]


def test_a_readme_is_of_what_is_there(full_lab: AdapterLab, tmp_path: Path) -> None:
    folder = full_lab.save(tmp_path / "saved")
    own, ours = folder / "adapters" / "pirate" / "README.md", folder / "README.md"
    own.write_text("of the pirate")
    assert "`pirate`, `wide`, `poet`, `ada`" in ours.read_text()
    folder = folder.rename(tmp_path / "other")
    own, ours = folder / "adapters" / "pirate" / "README.md", folder / "README.md"
    full_lab.delete_adapter("poet")
    full_lab.save(folder)
    assert "`pirate`, `wide`, `ada`" in ours.read_text()
    assert "AdapterLab('other/')" in ours.read_text()
    full_lab.train("pirate", ["The moon."], max_steps=1, disable_tqdm=True)
    full_lab.save(folder)
    assert own.read_text() == "of the pirate"  # which has learned something, and is the same one
    again = AdapterLab(folder, base_model=standins.tiny_llama(), tokenizer=standins.tiny_tokenizer(chat=True))
    again.save(folder)
    assert own.read_text() == "of the pirate"
    again.delete_adapter("pirate")
    again.add_adapter("ia3", "pirate")
    again.save(folder)
    assert not own.exists()
    changed = ours.read_text() + "\nAnd `poet` was good.\n"
    ours.write_text(changed)
    again.delete_adapter("wide")
    again.save(folder)
    assert ours.read_text() == changed


def test_the_readme_of_one_that_was_made_anew_goes(lab: AdapterLab, tmp_path: Path) -> None:
    lab.add_adapter("lora", "mine", r=2)
    own = lab.save(tmp_path / "saved") / "adapters" / "mine" / "README.md"
    own.write_text("of rank 2")
    lab.save(tmp_path / "saved")
    assert own.read_text() == "of rank 2"
    lab.delete_adapter("mine")
    lab.add_adapter("lora", "mine", r=4)
    lab.save(tmp_path / "saved")
    assert not own.exists()


def test_a_blend_of_many_adapters_opens_again(lab: AdapterLab, tmp_path: Path) -> None:
    names = [f"{number:02}-" + 57 * "x" for number in range(70)]
    for name in names:
        lab.add_adapter("lora", name, r=1, target_modules=["q_proj"], init_lora_weights=False)
    lab.add_weighted_adapter(names, [1.0] * len(names), "all")
    had = lab.adapters["all"].source
    assert len(had) > 70 * 60
    for name in names:
        lab.delete_adapter(name)
    folder = lab.save(tmp_path / "saved")
    again = AdapterLab(folder, base_model=standins.tiny_llama(), tokenizer=standins.tiny_tokenizer(chat=True))
    assert again.adapters["all"].source == had


def test_a_saved_lab_is_no_adapter(full_lab: AdapterLab, tmp_path: Path) -> None:
    folder = full_lab.save(tmp_path / "saved")
    with pytest.raises(AdapterLabError, match=r"is a saved lab: open it as AdapterLab\("):
        full_lab.load_adapter(folder)
    assert full_lab.load_adapter(folder / "adapters" / "poet") == "poet-2"


def test_an_adapter_that_is_damaged_leaves_no_lab(worked: AdapterLab, tmp_path: Path) -> None:
    folder = worked.save(tmp_path / "saved")
    weights = folder / "adapters" / "wide" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterLabError, match="wide"):
        AdapterLab(folder)
    weights.unlink()
    with pytest.raises(AdapterLabError, match="has no weights"):
        AdapterLab(folder)


EDITS: dict[str, tuple[Any, str]] = {
    "version": (2, "format version 2, this AdapterLab reads version 1: update it"),
    "format": ("other", "is no saved lab"),
    "adapters": ({}, "adapters is {}, where a list belongs"),
    "selection": ([["nobody", 1]], "No adapter named 'nobody'"),
    "enabled": ("yes", "enabled is 'yes', where bool belongs"),
    "trainable": ("nobody", "trainable is 'nobody', which is none of the adapters"),
    "history": (-1, "history is -1, where int belongs"),
    "ids": ([], "where token ids belong"),
    "blends": ([[["pirate", "a lot"]]], "where pairs of a name and a multiplier belong"),
    "base": (None, "base is None, where an object belongs"),
    "trust_remote_code": (True, "'trust_remote_code' is no field"),
}


@pytest.mark.parametrize("field", list(EDITS))
def test_a_manifest_edited_by_hand_says_where(full_lab: AdapterLab, tmp_path: Path, field: str) -> None:
    folder = full_lab.save(tmp_path / "saved")
    value, said = EDITS[field]
    content = json.loads((folder / "adapterlab.json").read_text())
    (folder / "adapterlab.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(AdapterLabError, match=r"adapterlab\.json") as caught:
        AdapterLab(folder, base_model=full_lab.model)
    assert said in str(caught.value)


def test_a_missing_field_or_file_is_said(worked: AdapterLab, tmp_path: Path) -> None:
    folder = worked.save(tmp_path / "saved")
    kept = (folder / "adapterlab.json").read_text()
    for field in json.loads(kept):
        content = json.loads(kept)
        del content[field]
        (folder / "adapterlab.json").write_text(json.dumps(content))
        with pytest.raises(AdapterLabError, match=rf"'{field}' is missing|no saved lab|version None"):
            AdapterLab(folder)
    (folder / "adapterlab.json").write_text(kept)
    for path in sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("README.md", "adapterlab.json")
    ):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(AdapterLabError, match=path.name.split(".")[0]):
            AdapterLab(folder)
        path.write_bytes(data)
    AdapterLab(folder)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_run_goes_through_json(worked: AdapterLab) -> None:
    for name in ("mine", "head"):
        (run,) = worked.adapters[name].runs
        again = TrainingRun.from_dict(json.loads(json.dumps(run.to_dict(), allow_nan=False)))
        for field in dataclasses.fields(TrainingRun):
            had, has = getattr(run, field.name), getattr(again, field.name)
            if isinstance(had, pd.DataFrame):
                pd.testing.assert_frame_equal(had, has)
            else:
                assert had == has, field.name


def test_a_loss_that_was_not_finite_does_not_keep_the_lab_from_being_saved(lab: AdapterLab, tmp_path: Path) -> None:
    run = lab.train("mine", ["The moon."] * 4, method="lora", max_steps=2, eval_dataset=0.25, disable_tqdm=True)
    run.history.loc[1, "eval_loss"] = float("inf")
    run.settings["max_grad_norm"] = float("inf")
    had = run.history["eval_loss"].tolist()
    written = json.loads((lab.save(tmp_path / "saved") / "runs" / "mine.0.json").read_text())
    again = TrainingRun.from_dict(written)
    assert again.history["eval_loss"].isna().tolist() == [not math.isfinite(one) for one in had]
    assert again.history["loss"].tolist()[1:] == run.history["loss"].tolist()[1:]
    assert again.settings["max_grad_norm"] is None
    assert run.history.loc[1, "eval_loss"] == float("inf")


@pytest.mark.parametrize(
    "change",
    [{"history": {"columns": ["loss"], "rows": []}}, {"history": {"columns": ["step", "loss"], "rows": [[1]]}}, {"steps": "3"},
     {"stopped_early": 1}, {"settings": []}, {"ranks": None}, {"more": 1}, {"error": None}],
)  # fmt: skip
def test_a_run_edited_by_hand_is_refused(worked: AdapterLab, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = worked.save(tmp_path / "saved")
    path = folder / "runs" / "mine.0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterLabError, match=r"mine\.0\.json' is damaged"):
        AdapterLab(folder)


def test_a_second_opinion_comes_from_the_saved_folder(worked: AdapterLab, tmp_path: Path) -> None:
    """Until the adapter learns something new, and from its weights after that."""
    again = AdapterLab(worked.save(tmp_path / "saved"))
    files = again._adapters.records["mine"].files
    assert files is not None
    assert files.folder == resolve_adapter(tmp_path / "saved" / "adapters" / "mine").folder
    again.compare("The moon", ["mine"], **SHORT)
    assert again.verify()["agrees"].all()
    again.train("mine", ["The moon."], max_steps=10, disable_tqdm=True)
    again.save_adapter("mine", tmp_path / "elsewhere")
    again.compare("The moon", ["mine"], **SHORT)
    assert again.verify()["agrees"].all()


def test_blends_are_checked_and_follow_the_adapters(full_lab: AdapterLab) -> None:
    said: list[str] = []
    full_lab.on_change(said.append)
    full_lab.blends = [{"pirate": 0.5, "poet": 1}, ["pirate", "wide"], {"pirate": 0.5, "poet": 1.0}]
    assert [blend.label for blend in full_lab.blends] == ["pirate × 0.5 + poet", "pirate + wide"]
    assert said == ["blends"]
    with pytest.raises(AdapterLabError, match="A blend with 'dora' has no meaning"):
        full_lab.blends = [["pirate", "dora"]]
    with pytest.raises(AdapterLabError, match="No adapter named 'nobody'"):
        full_lab.blends = [["pirate", "nobody"]]
    assert len(full_lab.blends) == 2
    full_lab.delete_adapter("poet")
    assert [blend.label for blend in full_lab.blends] == ["pirate + wide"]


def test_the_older_lab_of_the_name_goes_first(worked: AdapterLab, tmp_path: Path) -> None:
    folder = worked.save(tmp_path / "saved")
    lab = AdapterLab(folder)
    first = lab
    lab = AdapterLab(folder)
    with pytest.raises(AdapterLabError, match="closed"):
        first.summary()
    assert len(lab.adapters) == 10


def test_a_history_is_only_believed_by_the_lab_it_was_made_in(full_lab: AdapterLab, tmp_path: Path) -> None:
    """On another base the comparisons are there to be read, but base_logprobs are not computed with the wrong weights."""
    full_lab.compare("The moon", ["pirate"], **SHORT)
    folder = full_lab.save(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterLabWarning)
        again = AdapterLab(folder, base_model=standins.tiny_llama(seed=5), tokenizer=standins.tiny_tokenizer(chat=True))
    assert isinstance(again.history[0], Comparison)
    assert again.history[0].tokens()["base_logprob"].isna().all()
    assert copy.deepcopy(again.history[0].generations) == full_lab.history[0].generations
