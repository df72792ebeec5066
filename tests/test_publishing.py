"""Model cards, and the way to the Hub: through huggingface_hub itself, to a Hub on loopback, and back by others' means."""

from __future__ import annotations

import base64
import io
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import mistune
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from matplotlib import rc_context, style
from matplotlib.image import imread
from packaging.version import parse
from peft import AdaLoraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file
from standins import (
    StandinHub,
    commit_of,
    hub_environment,
    random_adapter_state,
    tiny_llama,
    tiny_t5,
    tiny_tokenizer,
    write_model,
)
from tiny_adapters import SEEDS, adapter_configs, logits_of

from adapterlab import AdapterLab, AdapterLabError, AdapterLabWarning, TrainingRun
from adapterlab.cards import base_of

BASE = "org/tiny-llama"
CLOSE = {"atol": 5e-5, "rtol": 1e-4}
HOSTILE = "3 rows | <script>alert(1)</script> `x` [l](u) **b** _i_ &lt; $x$\n\n# head\n---\n~~s~~ ![p](q)"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PushHub(StandinHub):
    """The loopback Hub, which also takes what is pushed, and has it to download from then on.

    `failures`: the last word of an endpoint (create, preupload, commit, …) → (status, headers) to answer instead.
    `commits`: (repository, branch, message, files) in their order; `bodies`: what was asked for, by that last word.
    """

    def __init__(self, repos: dict[str, Path], root: Path) -> None:
        super().__init__(repos)
        self.root = root
        self.failures: dict[str, tuple[int, dict[str, str]]] = {}
        self.commits: list[tuple[str, str, str, dict[str, bytes]]] = []
        self.bodies: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.meanwhile: Callable[[], None] = lambda: None
        self._server.RequestHandlerClass.do_POST = lambda handler: self.answer(handler)  # type: ignore[attr-defined]

    def answer(self, handler: Any) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(f"POST {path}")
        self.tokens.add(handler.headers.get("Authorization"))
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0)).decode()
        word = path.split("/")[-1 if path.count("/") < 5 else 5]
        self.bodies[word] = body
        if word in self.failures:
            status, headers = self.failures[word]
            handler._send(status, {"error": headers.get("X-Error-Message", "no")}, headers, body=True)
            return
        handler._send(200, getattr(self, word.replace("-", "_"))(path, body), body=True)

    def create(self, path: str, body: str) -> dict[str, Any]:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or 'alice'}/{asked['name']}"
        return {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": "0"}

    def validate_yaml(self, path: str, body: str) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def branch(self, path: str, body: str) -> dict[str, Any]:
        return {}

    def preupload(self, path: str, body: str) -> dict[str, Any]:
        names = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}

    def commit(self, path: str, body: str) -> dict[str, Any]:
        owner, name, _, branch = path.split("/")[3:7]
        repo_id = f"{owner}/{name}"
        told = [json.loads(line) for line in body.splitlines()]
        files = {
            one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in told if one["key"] == "file"
        }
        message = next(one["value"]["summary"] for one in told if one["key"] == "header")
        self.commits.append((repo_id, branch, message, files))
        folder = self.root / repo_id.replace("/", "--")
        folder.mkdir(exist_ok=True)
        for each, content in files.items():
            (folder / each).write_bytes(content)
        self.repos[repo_id] = folder
        self.meanwhile()
        return {"commitUrl": f"{self.url}/{repo_id}/commit/{commit_of(repo_id)}", "commitOid": commit_of(repo_id)}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "my_llama", tiny_llama(), tiny_tokenizer(chat=True))


@pytest.fixture
def hub(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    """A Hub with the base, an empty cache, and a folder for temporary files of its own, which is left empty."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "pushed").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with PushHub({BASE: base_folder}, tmp_path / "pushed") as hub, hub_environment(tmp_path / "cache", url=hub.url):
        yield hub
    assert not list((tmp_path / "scratch").iterdir())


@pytest.fixture
def named() -> Iterator[AdapterLab]:
    """A lab whose base has a name on the Hub; nobody asks the Hub."""
    model = tiny_llama()
    model.name_or_path = BASE
    lab = AdapterLab(model, tokenizer=tiny_tokenizer(chat=True))
    yield lab
    lab.close()


@pytest.fixture
def full(named: AdapterLab, adapter_folders: dict[str, Path]) -> AdapterLab:
    for name, folder in adapter_folders.items():
        named.load_adapter(folder, name)
    return named


def a_run(**changes: Any) -> TrainingRun:
    history = pd.DataFrame(
        {
            "step": [0, 1, 2, 3],
            "loss": [np.nan, 3.25, 2.5, 1.125],
            "eval_loss": [4.0, np.nan, np.inf, 1.75],
            "learning_rate": [np.nan, 1e-3, 1e-3, 1e-3],
            "seconds": [0.0, 1.0, 2.0, 3.0],
        }
    )
    settings = {
        "max_steps": 3,
        "num_train_epochs": 3.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "bf16": False,
    }
    run = TrainingRun(
        "pirate", "LoRA", history, pd.DataFrame(), steps=3, total_steps=3, seconds=2.75, settings=settings,
        data="36 of 40 chats from pirate.jsonl", eval_data="4 of 40 chats from pirate.jsonl",
    )  # fmt: skip
    return replace(run, **changes)


def trained(lab: AdapterLab, name: str, *runs: TrainingRun) -> str:
    lab._adapters.records[name].runs.extend(runs)
    return str(lab.model_card(name))


def metadata(card: Any) -> dict[str, Any]:
    """The YAML of a card, as read back by the library of the Hub."""
    return ModelCard(str(card)).data.to_dict()


def snippets(card: Any) -> dict[str, str]:
    """With what → code, as a renderer of Markdown finds it."""
    tree = mistune.create_markdown(renderer=None)(ModelCard(str(card)).text)
    found = {}
    for before, block in zip(tree, tree[2:]):
        if block["type"] == "block_code":
            found[before["children"][0]["raw"].removeprefix("With ").rstrip(":")] = block["raw"]
    return found


def rendered(card: Any) -> str:
    return mistune.create_markdown(escape=False, plugins=["table", "strikethrough"])(ModelCard(str(card)).text)  # type: ignore[return-value]


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(AdapterLabError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def saved_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What plain PEFT makes of a folder, on a fresh model."""
    plain = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    with torch.no_grad():
        return plain(ids).logits


# -- the card: what it says --------------------------------------------------------------------------------------------


def test_the_metadata_is_what_peft_and_the_hub_look_for(full: AdapterLab) -> None:
    card = full.model_card("pirate")
    assert isinstance(card, ModelCard)
    assert metadata(card) == {
        "base_model": BASE,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["adapterlab", f"base_model:adapter:{BASE}", "lora", "transformers"],
    }
    assert "lora" not in metadata(full.model_card("poet"))["tags"]


def test_tags_are_those_that_peft_writes_itself(full: AdapterLab, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = tiny_llama()
    model.name_or_path = model.config.name_or_path = BASE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, adapter_configs()["pirate"]).create_or_update_model_card(str(tmp_path))
    theirs = ModelCard.load(tmp_path / "README.md").data.to_dict()
    ours = metadata(full.model_card("pirate"))
    assert set(ours["tags"]) - {"adapterlab"} == set(theirs["tags"])
    assert {key: ours[key] for key in theirs if key != "tags"} == {k: v for k, v in theirs.items() if k != "tags"}


def test_sizes_are_counted_as_in_the_formula(full: AdapterLab) -> None:
    # r (in + out) for q (32 → 32) and v (32 → 16) in two layers, four bytes each
    parameters = 2 * (4 * (32 + 32) + 4 * (32 + 16))
    base = sum(p.numel() for p in tiny_llama().parameters())
    text = str(full.model_card("pirate"))
    assert f"{parameters:,} parameters: {100 * parameters / base:.3g} % of the base's {base:,}." in text
    assert f"{4 * parameters / 1e6:.3g} MB (10⁶ bytes) in memory, float32" in text


def test_the_method_tells_what_is_set_and_only_that(full: AdapterLab) -> None:
    lines = str(full.model_card("wide")).splitlines()
    for line in (
        "- method: LoRA", "- r: `3`", "- lora_alpha: `7`", "- use_rslora: `True`", "- rank_pattern: `{'down_proj': 5}`",
        f"- target_modules: `{', '.join(sorted(LINEAR))}`", "- lora_dropout: `0.0`",
    ):  # fmt: skip
        assert line in lines
    told = {line.split(":")[0] for line in lines if line.startswith("- ")}
    assert not told & {
        "- use_dora",
        "- modules_to_save",
        "- base_model_name_or_path",
        "- peft_type",
        "- inference_mode",
    }
    ada = str(full.model_card("ada"))
    assert "- init_r: `4`\n" in ada
    assert "- target_r: `2`\n" in ada
    assert "- r: " not in ada, "AdaLoRA has init_r; its r is not used"
    full.add_adapter("adalora", "fresh", target_modules=["q_proj"])
    assert "total_step" not in str(full.model_card("fresh")), "a provisional number is nobody's choice"
    assert "total_step: `10`" in ada


def test_modules_that_peft_chose_are_named(named: AdapterLab) -> None:
    named.add_adapter("lora", "usual")
    assert "- target_modules: `q_proj, v_proj`" in str(named.model_card("usual"))


def test_a_training_is_told_with_its_numbers(full: AdapterLab) -> None:
    text = trained(full, "pirate", a_run())
    assert (
        "Trained on 36 of 40 chats from pirate.jsonl, measured on 4 of 40 chats from pirate.jsonl: 3 steps in 2.8 s."
        in text
    )
    assert "Loss in nats per token: 3.250 (step 1) → 1.125 (step 3)." in text
    assert "Held-out loss in nats per token: 4.000 (step 0) → 1.750 (step 3)." in text
    assert "| 1 | 4 of 40 chats from pirate.jsonl | 4.000 (step 0) | 1.750 (step 3) |" in text
    assert "| `learning_rate` | 0.001 |" in text
    assert "| `lr_scheduler_type` | linear |" in text
    assert "num_train_epochs" not in text, "max_steps was in force"
    assert "bf16" not in text
    assert "Run 1" not in text
    assert "It was loaded and trained from there." in text


def test_several_runs_stand_in_their_order_with_how_they_ended(full: AdapterLab) -> None:
    error = a_run(steps=2, error="OSError: /home/alice/secret is full")
    epochs = {"max_steps": -1, "num_train_epochs": 2.0}
    text = trained(full, "pirate", a_run(settings=epochs), error, a_run(steps=1, stopped_early=True, eval_data=""))
    places = [text.index(f"### Run {n} of 3") for n in (1, 2, 3)]
    assert places == sorted(places)
    assert "2 of 3 steps in 2.8 s; an error ended it." in text
    assert "1 of 3 steps in 2.8 s; it was stopped." in text
    assert "/home/alice" not in text
    assert "| `num_train_epochs` | 2.0 |" in text
    assert "`max_steps` | -1" not in text


def test_a_run_without_numbers_has_none(full: AdapterLab) -> None:
    nothing = a_run().history.iloc[:0]
    text = trained(full, "pirate", a_run(history=nothing, settings={}, data="", eval_data=""))
    assert "Trained: 3 steps in 2.8 s." in text
    assert "## Scores" not in text
    assert "nats" not in text


def test_what_was_not_trained_here_says_what_it_is(full: AdapterLab, ids: torch.Tensor) -> None:
    full.add_adapter("lora", "fresh", target_modules=["q_proj"])
    full.add_adapter("lora", "drawn", target_modules=["q_proj"], init_lora_weights=False)
    full.add_weighted_adapter(["pirate", "wide"], [0.5, 1.0], "made")
    full.add_adapter("lora", "mine", target_modules=["q_proj"])
    for p in full.model.parameters():
        if p.requires_grad:
            p.data.add_(0.1)  # what a Trainer of one's own does
    said = {
        "pirate": "Not trained in this lab, only loaded.",
        "fresh": "Not trained in this lab, nor anywhere else: it changes nothing.",
        "drawn": "Not trained in this lab, nor anywhere else: its weights are random numbers, as they were drawn.",
        "made": "Not trained in this lab: made there of other adapters, and equals pirate × 0.5 + wide.",
        "mine": "Its weights were changed in the lab by other means than `lab.train`",
    }
    for name, words in said.items():
        assert f"## Training\n\n{words}" in str(full.model_card(name)), name
    assert "It was made of other adapters (equals pirate × 0.5 + wide) and trained from there." in trained(
        full, "made", a_run()
    )


def test_the_versions_are_those_at_work(full: AdapterLab) -> None:
    import peft
    import transformers

    assert f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}." in str(
        full.model_card("pirate")
    )


def test_the_card_leaves_the_lab_and_saving_writes_none(full: AdapterLab, tmp_path: Path, ids: torch.Tensor) -> None:
    before, summary = logits_of(full, ids), full.summary()
    full.model_card("poet").save(tmp_path / "card" / "README.md")
    assert ModelCard.load(tmp_path / "card" / "README.md").data.base_model == BASE
    assert torch.equal(logits_of(full, ids), before)
    pd.testing.assert_frame_equal(full.summary(), summary)
    folder = full.save_adapter("poet", tmp_path / "poet")
    assert not (folder / "README.md").exists()
    full.model_card("poet").save(folder / "README.md")
    full.save_adapter("poet", folder)
    assert (folder / "README.md").is_file(), "a card that was put there stays"


def test_strange_words_are_words(full: AdapterLab) -> None:
    run = a_run(data=HOSTILE, eval_data=HOSTILE, settings={"optim": HOSTILE})
    card = trained(full, "pirate", run)
    html = rendered(card)
    assert not re.search(r"<(script|strong|em|del|img)\b|<h1>head|href=\"u\"", html)
    seen = html.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert seen.count(" ".join(HOSTILE.split())) == 4
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    assert {len(re.findall("<t[hd]", row)) for row in rows} == {2, 4}, "a bar in a cell splits none"
    assert metadata(card) == metadata(full.model_card("poet")) | {"tags": metadata(card)["tags"]}


def test_a_pattern_of_modules_is_shown_as_it_is(named: AdapterLab) -> None:
    pattern = r".*\.(q_proj|v_proj)"
    named.add_adapter("lora", "pattern", target_modules=pattern)
    assert f"target_modules: <code>{pattern}</code>" in rendered(named.model_card("pattern"))


def test_an_adapter_from_the_hub_is_named_and_a_folder_is_not(
    hub: PushHub, named: AdapterLab, adapter_folders: dict[str, Path]
) -> None:
    hub.repos["org/pirate"] = adapter_folders["pirate"]
    named.load_adapter("org/pirate")
    assert "only loaded from [org/pirate](https://huggingface.co/org/pirate)." in str(named.model_card("pirate"))
    named.load_adapter(adapter_folders["poet"], "poet")
    assert str(adapter_folders["poet"].parent) not in str(named.model_card("poet"))


def test_who_there_is_no_card_of(full: AdapterLab) -> None:
    assert "No adapter named 'nobody'" in refusal(full.model_card, "nobody")
    assert "'base' is the model itself" in refusal(full.model_card, "base")
    assert "'a b' is no Hub id" in refusal(full.model_card, "pirate", "a b")


def test_encoder_decoders_are_loaded_as_such() -> None:
    model = tiny_t5()
    model.name_or_path = "org/tiny-t5"
    lab = AdapterLab(model, tokenizer=tiny_tokenizer(seq2seq=True))
    lab.add_adapter("lora", "t", target_modules=["q", "v"])
    card = lab.model_card("t", "alice/t")
    assert "pipeline_tag" not in metadata(card)
    assert 'AutoModelForSeq2SeqLM.from_pretrained("alice/t")' in snippets(card)["transformers"]
    assert "CausalLM" not in str(card)
    lab.close()


def test_the_base_s_revision_is_kept(named: AdapterLab) -> None:
    named.add_adapter(LoraConfig(target_modules=["q_proj"], revision="v1"), "old")
    card = named.model_card("old", "alice/old")
    assert "- revision: `v1`" in str(card)
    ways = snippets(card)
    for way in ("transformers", "PEFT"):
        assert 'AutoModelForCausalLM.from_pretrained(base, revision="v1")' in ways[way]
        assert 'AutoTokenizer.from_pretrained(base, revision="v1")' in ways[way]
    assert 'model.load_adapter("alice/old")' in ways["transformers"]
    assert "revision" not in ways["AdapterLab"], "which reads it from the config"


# -- the base's name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "lab_says", "name", "is_local"),
    [
        ("org/a", "org/b", "org/a", False),
        (None, "org/b", "org/b", False),
        ("gpt2", "", "gpt2", False),
        ("/home/alice/models/a v2", "org/b", "org/b", False),
        ("/home/alice/models/a v2/", "/data/b", "a v2", True),
        (r"C:\Users\alice\a", "", "a", True),
        ("../runs/a", "", "a", True),
        ("~/a", "", "a", True),
        ("", "/data/b", "b", True),
        (None, "", "", False),
        ("/x/models--org--a/snapshots/0123", "", "org/a", False),
        ("here", "/data/b", "here", True),
        ("beside", "/data/b", "beside", True),
    ],
)
def test_the_base_has_a_name_that_tells_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Any, lab_says: str, name: str, is_local: bool
) -> None:
    (tmp_path / "cwd" / "here").mkdir(parents=True)
    (tmp_path / "runs" / "beside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    record: Any = SimpleNamespace(files=SimpleNamespace(folder=tmp_path / "runs" / "adapter"))
    base = base_of(record, SimpleNamespace(base_model_name_or_path=said), lab_says)
    assert (base.name, base.is_local) == (name, is_local)
    assert base.hub_id == (name if name and not is_local else None)


def test_a_local_base_is_called_local(base_folder: Path) -> None:
    lab = AdapterLab(base_folder)
    lab.add_adapter("lora", "mine", target_modules=["q_proj"])
    card = lab.model_card("mine")
    assert "base_model" not in metadata(card)
    assert not any("base_model" in tag for tag in metadata(card)["tags"])
    assert "`my_llama`" in str(card)
    assert "This is a local model" in str(card)
    assert str(base_folder.parent) not in str(card)
    lab.close()


def test_a_model_without_a_name_has_none(lab: AdapterLab) -> None:
    lab.add_adapter("lora", "mine", target_modules=["q_proj"])
    card = str(lab.model_card("mine"))
    assert "adapter for a model without a name:" in card
    assert 'base = "the-base-model"' in card
    assert "This is a local model" not in card


# -- to the Hub and back -----------------------------------------------------------------------------------------------


def make(lab: AdapterLab, name: str) -> torch.Tensor:
    """Let an adapter of random numbers be there and unsaved."""
    extra: dict[str, Any] = {
        "head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 9]),
    }
    config = {**adapter_configs(), **extra}[name]
    if getattr(config, "total_step", None):
        config.total_step = 10
    lab.add_adapter(config, name)
    generator = torch.Generator().manual_seed(SEEDS.get(name, 9))
    with torch.no_grad():
        for p in lab._adapters.mounts.adapters[name].trainable:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    lab._adapters.refresh()
    return logits_of(lab, torch.arange(3, 15)[None])


@pytest.mark.filterwarnings("ignore:.*`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("name", ["pirate", "wide", "poet", "ada", "dora", "head", "tokens"])
def test_what_is_pushed_can_be_loaded_in_every_way_that_its_card_shows(
    hub: PushHub, named: AdapterLab, name: str
) -> None:
    ids = torch.arange(3, 15)[None]
    expected = make(named, name)
    address = named.push_adapter_to_hub(name, f"alice/{name}", token="hf_secret", commit_message="Ahoy")
    [(repo_id, branch, message, files)] = hub.commits
    assert (repo_id, branch, message) == (f"alice/{name}", "main", "Ahoy")
    assert address == f"{hub.url}/alice/{name}/commit/{commit_of(repo_id)}"
    pictures = {"ranks.png"} if name == "ada" else set()
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"} | pictures
    assert torch.allclose(saved_logits(hub.repos[repo_id], ids), expected, **CLOSE)
    ways = snippets(files["README.md"].decode())
    assert set(ways) == {"transformers", "PEFT", "AdapterLab"}
    beside = name in ("head", "tokens")
    assert ("transformers 5.15 loads it without" in files["README.md"].decode()) is beside
    if beside and parse(transformers.__version__) < parse("5.23"):
        del ways["transformers"]
    for way, code in ways.items():
        scope: dict[str, Any] = {}
        exec(code, scope)
        model = scope["lab"].model if way == "AdapterLab" else scope["model"].eval()
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, expected, **CLOSE), way
        if way == "AdapterLab":
            scope["lab"].close()


def test_a_push_counts_as_saved_and_changes_nothing_else(hub: PushHub, named: AdapterLab) -> None:
    expected = make(named, "pirate")
    assert named.adapters["pirate"].status == "unsaved"
    told: list[str] = []
    named.on_change(told.append)
    before = named.adapters["pirate"]
    named.push_adapter_to_hub("pirate", "alice/pirate", token="hf_secret", private=True)
    assert told == ["adapters"]
    assert named.adapters["pirate"].status == "trained here"
    assert named.adapters["pirate"].source == before.source
    assert named.adapters["pirate"].peft_config.to_dict() == before.peft_config.to_dict()
    assert torch.equal(logits_of(named, torch.arange(3, 15)[None]), expected)
    assert hub.tokens == {"Bearer hf_secret"}
    asked = json.loads(hub.bodies["create"])
    assert asked.get("private", asked.get("visibility")) in (True, "private")
    assert hub.commits[0][2] == "Upload pirate with AdapterLab"


def test_an_id_without_a_name_before_it_gets_the_user_s(hub: PushHub, named: AdapterLab) -> None:
    make(named, "pirate")
    assert "/alice/pirate/commit/" in named.push_adapter_to_hub("pirate", "pirate", token="hf_secret")
    card = hub.commits[0][3]["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("alice/pirate")' in card
    assert "Write its repository's id" not in card
    assert "this repository" not in card
    assert metadata(card)["base_model"] == BASE


def test_a_branch_is_made_and_filled(hub: PushHub, named: AdapterLab) -> None:
    make(named, "pirate")
    named.push_adapter_to_hub("pirate", "alice/pirate", token="hf_secret", revision="v2")
    assert "POST /api/models/alice/pirate/branch/v2" in hub.requests
    assert [(repo, branch) for repo, branch, *_ in hub.commits] == [("alice/pirate", "v2")]


def test_adalora_brings_its_ranks(hub: PushHub, full: AdapterLab) -> None:
    with torch.no_grad():  # what an allocation leaves: some λ are zero
        for place, layer in enumerate(full._adapters.mounts.adapters["ada"].layers.values()):
            layer.lora_E["ada"][: place % 4] = 0.0  # type: ignore[index]
    with rc_context():
        style.use("dark_background")
        full.push_adapter_to_hub("ada", "alice/ada", token="hf_secret")
    files = hub.commits[0][3]
    corner = imread(io.BytesIO(files["ranks.png"]), format="png")[0, 0]
    assert corner.tolist() == [1, 1, 1, 1], "on white, whatever the notebook's style"
    card = files["README.md"].decode()
    assert "](ranks.png)" in card
    stored = load_file(hub.repos["alice/ada"] / "adapter_model.safetensors")
    kept = {key.split(".")[-2]: 0 for key in stored if key.endswith("lora_E")}
    for key, scale in stored.items():
        if key.endswith("lora_E"):
            kept[key.split(".")[-2]] += int(torch.count_nonzero(scale))
    assert 0 < sum(kept.values()) < 16
    assert f"{sum(kept.values())} of 16 ranks are kept, {sum(kept.values()) / 4:.1f} on average over 4 places." in card
    for module, ranks in kept.items():
        assert f"| `{module}` | 2 | {ranks} | {ranks / 2:.1f} |" in card
    assert "ranks.png" not in str(full.model_card("pirate"))


def test_a_local_base_goes_by_its_last_part_with_a_warning(hub: PushHub, base_folder: Path) -> None:
    lab = AdapterLab(base_folder)
    make(lab, "pirate")
    with pytest.warns(
        AdapterLabWarning, match=r"a local model, called 'my_llama'.*others can't load it by that"
    ) as seen:
        lab.push_adapter_to_hub("pirate", "alice/pirate", token="hf_secret")
    assert seen[0].filename == __file__, "it points at the caller"
    files = hub.commits[0][3]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "my_llama"
    assert not any(str(base_folder.parent).encode() in content for content in files.values())
    assert lab.adapters["pirate"].peft_config.base_model_name_or_path == str(base_folder), "the lab's own stays"
    lab.close()


@pytest.mark.filterwarnings("ignore:.*`is_gradient_checkpointing` is deprecated")
def test_on_a_local_base_the_card_s_code_works_where_the_base_is(
    hub: PushHub, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = AdapterLab(base_folder)
    expected = make(lab, "pirate")
    with pytest.warns(AdapterLabWarning):
        lab.push_adapter_to_hub("pirate", "alice/pirate", token="hf_secret")
    lab.close()
    monkeypatch.chdir(base_folder.parent)
    ways = snippets(hub.commits[0][3]["README.md"].decode())
    assert set(ways) == {"transformers", "PEFT", "AdapterLab"}
    for way, code in ways.items():
        scope: dict[str, Any] = {}
        exec(code, scope)
        with torch.no_grad():
            logits = (scope["lab"].model if way == "AdapterLab" else scope["model"].eval())(
                torch.arange(3, 15)[None]
            ).logits
        assert torch.allclose(logits, expected, **CLOSE), way


def test_an_adapter_that_does_nothing_is_pushed_with_a_warning(hub: PushHub, named: AdapterLab) -> None:
    named.add_adapter("lora", "fresh", target_modules=["q_proj"])
    with pytest.warns(AdapterLabWarning, match="'fresh' is untrained"):
        named.push_adapter_to_hub("fresh", "alice/fresh", token="hf_secret")
    assert len(hub.commits) == 1
    assert named.adapters["fresh"].status == "untrained"


def test_weights_that_changed_meanwhile_are_not_called_saved(hub: PushHub, named: AdapterLab) -> None:
    make(named, "pirate")

    def learn() -> None:
        for p in named._adapters.mounts.adapters["pirate"].trainable:
            p.data.add_(1.0)

    hub.meanwhile = learn
    named.push_adapter_to_hub("pirate", "alice/pirate", token="hf_secret")
    named._adapters.refresh()
    assert named.adapters["pirate"].status == "unsaved"


def test_the_lab_can_be_used_and_closed_while_files_are_sent(hub: PushHub, named: AdapterLab) -> None:
    make(named, "pirate")
    free: list[bool] = []

    def use() -> None:  # in the Hub's thread
        free.append(named.is_free())
        named.close()

    hub.meanwhile = use
    assert named.push_adapter_to_hub("pirate", "alice/pirate", token="hf_secret")
    assert free == [True]


def test_an_adapter_trained_in_the_lab_tells_of_it(hub: PushHub, named: AdapterLab) -> None:
    pairs = [("Who?", "Arr, a captain."), ("Where?", "Arr, at sea."), ("Why?", "Arr!")]
    run = named.train(
        "new", pairs, method="adalora", init_r=4, target_r=2, target_modules=["q_proj", "v_proj"], max_steps=10,
        eval_dataset=pairs[:1], disable_tqdm=True,
    )  # fmt: skip
    named.push_adapter_to_hub("new", "alice/new", token="hf_secret")
    card = hub.commits[0][3]["README.md"].decode()
    held_out = run.history["eval_loss"].dropna()
    assert (
        f"Held-out loss in nats per token: {held_out.iloc[0]:.3f} (step 0) → {held_out.iloc[-1]:.3f} (step 10)." in card
    )
    assert f"{int(run.history['total_rank'].dropna().iloc[-1])} of 16 ranks are kept" in card
    assert named.ranks("new")["rank"].tolist() == run.ranks[run.ranks.step == run.ranks.step.max()]["rank"].tolist()


# -- what can go wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ({"create": (401, {})}, "not logged in to the Hub, or your token is not valid. Log in with `hf auth login`"),
        ({"create": (403, {"X-Error-Message": "no rights"})}, "your token may not write there (no rights)"),
        ({"commit": (403, {"X-Error-Message": "read only"})}, "a place in 'alice'"),
        ({"commit": (404, {"X-Error-Code": "RevisionNotFound"})}, "it has no revision 'v9'"),
        ({"preupload": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "gone"})}, "refused it (404): gone"),
        ({"commit": (400, {"X-Error-Message": "bad metadata"})}, "refused it (400): bad metadata"),
        ({"commit": (503, {})}, "the Hub is out of order (503)"),
    ],
)
def test_the_hub_s_refusals_are_said_in_words(
    hub: PushHub, named: AdapterLab, failures: dict[str, Any], said: str
) -> None:
    expected = make(named, "pirate")
    hub.failures = failures
    summary = named.summary()
    message = refusal(named.push_adapter_to_hub, "pirate", "alice/pirate", token="hf_secret", revision="v9")
    assert message.startswith("'alice/pirate' was not pushed: ")
    assert said in message
    assert "hf_secret" not in message
    assert "\n" not in message
    assert named.adapters["pirate"].status == "unsaved"
    pd.testing.assert_frame_equal(named.summary(), summary)
    assert torch.equal(logits_of(named, torch.arange(3, 15)[None]), expected)
    assert not hub.commits


def test_without_a_token_that_was_asked_for(hub: PushHub, named: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import _headers

    make(named, "pirate")
    monkeypatch.setattr(_headers, "get_token", lambda: None)
    assert "you are not logged in" in refusal(named.push_adapter_to_hub, "pirate", "alice/pirate", token=True)


@pytest.mark.parametrize(("offline", "said"), [(True, "HF_HUB_OFFLINE is set"), (False, "the Hub can't be reached (")])
def test_without_a_hub_nothing_is_sent(named: AdapterLab, tmp_path: Path, offline: bool, said: str) -> None:
    make(named, "pirate")
    with hub_environment(tmp_path / "cache", offline=offline):
        assert said in refusal(named.push_adapter_to_hub, "pirate", "alice/pirate", token="hf_secret")
    assert named.adapters["pirate"].status == "unsaved"


@pytest.mark.parametrize(
    "repo_id", ["a b", "alice/", "https://huggingface.co/alice/pirate", "a/b/c", "", None, 7, "x--y", "ü/x"]
)
def test_what_is_no_hub_id_is_refused_before_anything(hub: PushHub, named: AdapterLab, repo_id: Any) -> None:
    make(named, "pirate")
    assert f"{repo_id!r} is no Hub id" in refusal(named.push_adapter_to_hub, "pirate", repo_id)
    assert not hub.requests


def test_who_can_not_be_pushed(hub: PushHub, named: AdapterLab) -> None:
    assert "No adapter named 'nobody'" in refusal(named.push_adapter_to_hub, "nobody", "alice/pirate")
    assert "'base' is the model itself" in refusal(named.push_adapter_to_hub, "base", "alice/pirate")
    named.close()
    assert "closed" in refusal(named.push_adapter_to_hub, "nobody", "alice/pirate")
    assert not hub.requests


def test_a_disk_that_is_full_leaves_nothing_on_the_hub(
    hub: PushHub, named: AdapterLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    make(named, "pirate")
    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    assert "No space left on device" in refusal(named.push_adapter_to_hub, "pirate", "alice/pirate")
    assert not hub.requests


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_are_what_the_allocation_left(full: AdapterLab) -> None:
    frame = full.ranks("ada")
    assert list(frame.columns) == ["layer", "module", "rank", "init_r"]
    assert list(zip(frame["layer"], frame["module"])) == [
        (0, "q_proj"), (0, "down_proj"), (1, "q_proj"), (1, "down_proj"),
    ]  # fmt: skip
    assert frame["rank"].tolist() == [4] * 4
    layers = full._adapters.mounts.adapters["ada"].layers
    layers["model.layers.1.mlp.down_proj"].lora_E["ada"].data[[0, 2, 3]] = 0.0  # type: ignore[index]
    layers["model.layers.0.self_attn.q_proj"].lora_E["ada"].data[:] = 0.0  # type: ignore[index]
    assert full.ranks("ada")["rank"].tolist() == [0, 4, 4, 1]
    assert full.ranks("ada")["init_r"].tolist() == [4] * 4
    labels = [label.get_text() for label in full.plot_ranks("ada").axes[0].get_xticklabels()]
    assert labels == ["q_proj\n(4)", "down_proj\n(5)"]


def test_a_fresh_adapter_has_all_its_ranks(named: AdapterLab) -> None:
    named.add_adapter("adalora", "fresh", init_r=6, target_r=2, target_modules=["q_proj", "lm_head"])
    frame = named.ranks("fresh")
    assert frame["rank"].tolist() == frame["init_r"].tolist() == [6, 6, 6]
    assert frame[frame["module"] == "lm_head"]["layer"].isna().all()


@pytest.mark.filterwarnings("ignore:.*`is_gradient_checkpointing` is deprecated")
def test_a_file_without_the_pruned_ranks_tells_where_it_started_and_is_pushed_whole(
    hub: PushHub, named: AdapterLab, ids: torch.Tensor, tmp_path: Path
) -> None:
    """PEFT's own allocation and its own save: the file's tensors are smaller than init_r, and transformers can't load it."""
    from peft import get_peft_model

    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8, target_modules=["q_proj", "v_proj"])
    plain = get_peft_model(tiny_llama(), config)
    random_adapter_state(plain)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    for step in range(8):
        plain(ids, labels=ids).loss.backward()
        optimizer.step()
        plain.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have invalid shape")  # a triplet pruned to rank 0, which PEFT mistakes
        plain.save_pretrained(tmp_path / "shrunk", save_embedding_layers=False)
    pattern = plain.peft_config["default"].rank_pattern
    named.load_adapter(tmp_path / "shrunk", "shrunk")
    frame = named.ranks("shrunk")
    expected = {tuple(key.split(".")[-5:-1]): sum(kept) for key, kept in pattern.items()}
    assert frame["rank"].sum() == sum(expected.values()) == 8
    for layer, module, rank in zip(frame["layer"], frame["module"], frame["rank"]):
        assert rank == next(n for key, n in expected.items() if str(layer) in key and module in key)
    assert set(frame["init_r"]) == {4}
    named.push_adapter_to_hub("shrunk", "alice/shrunk", token="hf_secret")
    ways = snippets(hub.commits[0][3]["README.md"].decode())
    assert set(ways) == {"transformers", "PEFT", "AdapterLab"}
    expected_logits = logits_of(named, ids)
    scope: dict[str, Any] = {}
    exec(ways["transformers"], scope)
    with torch.no_grad():
        assert torch.allclose(scope["model"].eval()(ids).logits, expected_logits, **CLOSE)
    assert torch.allclose(saved_logits(hub.repos["alice/shrunk"], ids), expected_logits, **CLOSE)


def test_other_methods_have_no_ranks_to_show(full: AdapterLab) -> None:
    assert "'pirate' is of the method LoRA, which allocates no ranks" in refusal(full.ranks, "pirate")
    assert "IA3" in refusal(full.plot_ranks, "poet")
    assert "No adapter named 'nobody'" in refusal(full.ranks, "nobody")
