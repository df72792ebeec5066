"""Ids and folders resolved to files, through huggingface_hub itself: against a Hub on loopback, and a Hub's cache."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from standins import (
    OPT_350M,
    OPT_350M_LORA,
    StandinHub,
    commit_of,
    hub_environment,
    lay_in_cache,
    tiny_llama,
    tiny_opt,
    write_adapter,
    write_model,
    write_opt_350m,
    write_opt_350m_lora,
)

from adapterlab.errors import AdapterLabError
from adapterlab.hub import adapter_files, locate_base, resolve_adapter
from adapterlab.places import locate, portable_name

UNREACHABLE = "the Hub cannot be reached"


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """Folders by Hub id: the two stand-ins, and one repository with two adapters in subfolders."""
    root = tmp_path_factory.mktemp("repos")
    lora = write_opt_350m_lora(root / "lora")
    several = root / "several"
    for name in ("pirate", "poet"):
        shutil.copytree(lora, several / name)
    (several / "README.md").write_text("two adapters", encoding="utf-8")
    return {OPT_350M: write_opt_350m(root / "opt"), OPT_350M_LORA: lora, "org/several": several, "org/gated": lora}


@pytest.fixture
def online(repos, tmp_path):
    """A Hub on loopback with an empty cache; yields the Hub."""
    with StandinHub(repos, gated={"org/gated"}) as hub, hub_environment(tmp_path / "cache", url=hub.url):
        yield hub


@pytest.fixture
def lora_folder(repos, tmp_path):
    """A copy of the LoRA stand-in that a test may spoil."""
    return Path(shutil.copytree(repos[OPT_350M_LORA], tmp_path / "opt-350m.lora_v2"))


def edit(folder: Path, **changes) -> Path:
    """Change keys of a folder's adapter_config.json; None removes one."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
    return folder


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(AdapterLabError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ----- adapters on the Hub -----


def test_an_adapter_is_downloaded_by_its_id(online, repos):
    files = resolve_adapter(OPT_350M_LORA)
    assert files.source == OPT_350M_LORA
    assert files.default_name == "opt-350m-lora"
    assert files.config["peft_type"] == "LORA"
    assert files.config["r"] == 16
    assert files.folder.name == commit_of(OPT_350M_LORA)
    for downloaded in (files.config_file, files.weights_file):
        assert downloaded.read_bytes() == (repos[OPT_350M_LORA] / downloaded.name).read_bytes()
    asked = [request for request in online.requests if request.startswith("GET") and "/resolve/" in request]
    assert [request.rsplit("/", 1)[1] for request in asked] == ["adapter_config.json", "adapter_model.bin"]


def test_a_subfolder_and_a_revision_are_part_of_the_source(online):
    commit = commit_of("org/several")
    files = resolve_adapter("org/several", subfolder="poet", revision=commit)
    assert files.source == f"org/several/poet@{commit}"
    assert files.default_name == "poet"
    assert files.config_file.parent.name == "poet"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nobody/nothing", {}, ["'nobody/nothing'", "token="]),
        ("org/gated", {}, ["org/gated is gated", "terms"]),
        (OPT_350M_LORA, {"revision": "v9"}, [OPT_350M_LORA, "'v9'"]),
        (OPT_350M_LORA, {"subfolder": "nope"}, [OPT_350M_LORA, "'nope'"]),
        ("org/several", {}, ["org/several holds no adapter", "'pirate', 'poet'"]),
        (OPT_350M, {}, [f"{OPT_350M} is a model, not an adapter", f"AdapterLab('{OPT_350M}')"]),
        ("org/not an id", {}, ["'org/not an id' is neither a folder here nor a Hub id"]),
        ("https://huggingface.co/org/name/tree/main", {}, ["give the Hub id alone, 'org/name'"]),
        ("  ", {}, ["empty"]),
    ],
)
def test_what_cannot_be_resolved_is_named_with_the_remedy(online, name, options, said):
    message = refusal(resolve_adapter, name, **options)
    assert all(part in message for part in said), message


def test_errors_keep_their_cause(online):
    with pytest.raises(AdapterLabError) as caught:
        resolve_adapter("nobody/nothing")
    assert type(caught.value.__cause__).__name__ == "RepositoryNotFoundError"


# ----- without the Hub -----


@pytest.mark.parametrize("how", ["offline", "unreachable", "local_files_only"])
def test_the_cache_answers_when_the_hub_does_not(repos, tmp_path, capsys, how):
    cache = lay_in_cache(tmp_path / "cache", {OPT_350M_LORA: repos[OPT_350M_LORA]})
    with hub_environment(cache, offline=how == "offline"):
        files = resolve_adapter(OPT_350M_LORA, local_files_only=how == "local_files_only")
    assert files.weights_file.read_bytes() == (repos[OPT_350M_LORA] / "adapter_model.bin").read_bytes()
    assert (UNREACHABLE in capsys.readouterr().out) == (how == "unreachable")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("offline", "HF_HUB_OFFLINE is set"),
        ("unreachable", UNREACHABLE),
        ("local_files_only", "local_files_only=True forbids asking the Hub"),
    ],
)
def test_offline_with_a_cold_cache_is_one_sentence(tmp_path, how, reason):
    with hub_environment(tmp_path / "cache", offline=how == "offline"):
        message = refusal(resolve_adapter, OPT_350M_LORA, local_files_only=how == "local_files_only")
    assert message.startswith(f"{OPT_350M_LORA} is not in the local cache")
    assert reason in message
    assert message.count(". ") == 0


def test_what_was_downloaded_is_there_offline(repos, tmp_path):
    with StandinHub(repos) as hub, hub_environment(tmp_path / "cache", url=hub.url):
        online = resolve_adapter(OPT_350M_LORA)
    with hub_environment(tmp_path / "cache", offline=True):
        assert resolve_adapter(OPT_350M_LORA) == online


# ----- folders -----


def test_a_folder_is_resolved_to_its_files(lora_folder):
    files = resolve_adapter(lora_folder)
    assert files.folder == lora_folder.resolve()
    assert files.weights_file == files.folder / "adapter_model.bin"
    assert files.source == str(lora_folder)
    assert files.default_name == "opt-350m-lora-v2"  # neither a dot nor PEFT's own "lora_"


def test_safetensors_are_preferred_to_a_pickle(lora_folder):
    (lora_folder / "adapter_model.safetensors").write_bytes(b"")
    assert resolve_adapter(lora_folder).weights_file.name == "adapter_model.safetensors"


def test_nothing_that_a_config_names_is_imported(lora_folder, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(lora_folder, auto_mapping={"base_model_class": "Trap", "parent_library": "trap"})
    resolve_adapter(lora_folder)
    assert "trap" not in sys.modules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{not json", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[1, 2]", "holds a list"),
        ('{"r": 8}', "no peft_type"),
        ('{"peft_type": 3}', "no peft_type"),
    ],
)
def test_a_broken_config_is_refused(lora_folder, text, said):
    (lora_folder / "adapter_config.json").write_text(text, encoding="latin-1")
    message = refusal(resolve_adapter, lora_folder)
    assert said in message
    assert str(lora_folder) in message


def test_a_folder_without_weights_is_refused_listing_what_it_holds(lora_folder):
    (lora_folder / "adapter_model.bin").unlink()
    message = refusal(resolve_adapter, str(lora_folder))
    assert "adapter_model.safetensors or adapter_model.bin is missing" in message
    assert "README.md" in message


def test_peft_subfolders_are_pointed_to(lora_folder, tmp_path):
    outer = tmp_path / "outer"
    shutil.copytree(lora_folder, outer / "pirate")
    assert "subfolder='pirate'" in refusal(resolve_adapter, outer)
    assert resolve_adapter(outer, subfolder="pirate").default_name == "pirate"
    assert "no subfolder 'poet'" in refusal(resolve_adapter, outer, subfolder="poet")


def test_paths_that_are_no_folder_are_refused_as_paths(lora_folder, tmp_path):
    for path in ("./nowhere", str(tmp_path / "nowhere"), "nowhere/", "~/nowhere-at-all", tmp_path / "nowhere"):
        assert "There is no folder" in refusal(resolve_adapter, path)
    assert "is a file" in refusal(resolve_adapter, lora_folder / "adapter_config.json")
    assert "is a local folder" in refusal(resolve_adapter, lora_folder, revision="main")


def test_a_path_into_the_cache_is_called_by_its_hub_id():
    snapshot = os.path.join("cache", "models--facebook--opt-350m", "snapshots", "0123abcd")
    assert portable_name(snapshot) == portable_name(snapshot + os.sep) == OPT_350M
    assert portable_name("models/opt") == "models/opt"


# ----- the base that an adapter names -----


def base_of(folder):
    place = locate(folder)
    return locate_base(place, adapter_files(place))


@pytest.mark.parametrize("name", ["base", "../runs/base"])
def test_a_base_beside_the_adapter_is_found_from_anywhere(tmp_path, lora_folder, monkeypatch, name):
    model = write_model(tmp_path / "runs" / "base", tiny_opt())
    adapter = tmp_path / "runs" / "pirate"
    shutil.copytree(lora_folder, adapter)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    edit(adapter, base_model_name_or_path=name)
    found = base_of(adapter)
    assert Path(found.target).samefile(model)


def test_an_absolute_base_is_found(tmp_path, lora_folder):
    model = write_model(tmp_path / "base", tiny_opt())
    assert base_of(edit(lora_folder, base_model_name_or_path=str(model))).target == str(model.resolve())


@pytest.mark.parametrize("name", [None, "", 7])
def test_an_adapter_that_names_no_base_is_refused(lora_folder, name):
    message = refusal(base_of, edit(lora_folder, base_model_name_or_path=name))
    assert "base_model_name_or_path" in message
    assert "lab.load_adapter(" in message


def test_a_base_that_is_not_there_is_refused_with_both_names(online, lora_folder):
    for name in ("nobody/nothing", "/nowhere/at/all"):
        message = refusal(base_of, edit(lora_folder, base_model_name_or_path=name))
        assert name in message
        assert str(lora_folder) in message
        assert "lab.load_adapter(" in message


def test_an_adapter_on_an_adapter_is_refused(tmp_path, lora_folder):
    from peft import LoraConfig

    under = write_adapter(tmp_path / "under", tiny_llama(), LoraConfig(target_modules=["q_proj"]), base=OPT_350M)
    message = refusal(base_of, edit(lora_folder, base_model_name_or_path=str(under)))
    assert "is an adapter itself" in message


def test_the_config_s_revision_is_the_base_s(online, lora_folder):
    edit(lora_folder, revision=commit_of(OPT_350M))
    assert base_of(lora_folder).revision == commit_of(OPT_350M)
    assert "no revision 'gone'" in refusal(base_of, edit(lora_folder, revision="gone"))
