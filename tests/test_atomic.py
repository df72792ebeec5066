"""Saving is all or nothing: killed at any moment, on a full disk, in a folder that can't be written, by two at once."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from adapterlab import AdapterLab, AdapterLabError, Comparison, atomic, demo
from adapterlab.atomic import building, replace_folder, scratch_beside, write_text
from adapterlab.reopening import SavedFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests kill forked processes"),
]


def in_a_child(work: Callable[[], object]) -> int:
    """Fork, work there, and give the child's process id; it ends with 0, or 1 after an exception that it prints."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    raise AssertionError  # not reached


def ended(child: int) -> int:
    """Wait for the child; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(path: Path) -> dict[str, str]:
    """Digests of a file or of all files of a folder, by name; {} where there is nothing."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(_timeless(file.read_bytes())).hexdigest() for file in files}


def _timeless(data: bytes) -> bytes:
    """A saved lab's manifest holds the time of saving."""
    return re.sub(rb'"created": "[^"]*"', b"", data)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# -- killed ------------------------------------------------------------------------------------------------------------


class Saver:
    """Something that can be saved in two states, and looked at afterwards. `written`: the contents that are whole."""

    def __init__(self, target: Path, save: Callable[[int], object], read: Callable[[], object]) -> None:
        self.target, self.save, self.read = target, save, read
        self.written: list[dict[str, str]] = []
        self.seconds = 0.0
        for state in (1, 0):  # the last one stays: there is always something to lose
            started = time.perf_counter()
            save(state)
            self.seconds = time.perf_counter() - started
            self.written.append(content(target))
        assert self.written[0] != self.written[1]

    def check(self) -> None:
        assert content(self.target) in self.written, "neither the old nor the new, but something between"
        self.read()


@pytest.fixture
def savers(full_lab: AdapterLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Saver]:
    names = ["pirate", "poet"]
    comparisons = [full_lab.compare(text, ["pirate", None], max_new_tokens=3) for text in ("The moon", "The sea")]
    for one in comparisons:
        one.tokens()  # so that base has read it already
    folders = {kind: tmp_path / kind for kind in ("adapter", "lab", "json", "html", "cache")}
    for folder in folders.values():
        folder.mkdir()

    def save_lab(state: int) -> None:
        full_lab.history[:] = comparisons[: state + 1]
        full_lab.save(folders["lab"] / "x")

    monkeypatch.setattr(
        AdapterLab, "_about", lambda lab: {**ABOUT, "name": lab.name}
    )  # no version look-ups in the child
    cached = folders["cache"]

    def fill(state: int) -> None:
        def build(target: Path, scratch: Path, progress: bool) -> None:
            target.mkdir()
            for name in ("config.json", "model.safetensors"):
                (target / name).write_bytes(b"x" * (1000 + state))

        demo._build = build
        (cached / demo._FOLDER / "config.json").unlink(missing_ok=True)  # damaged: it is filled again
        demo.fetch_demo_model(cached, progress=False)

    monkeypatch.setattr(demo, "_build", None)
    made = {
        "adapter": Saver(
            folders["adapter"] / "x",
            lambda state: full_lab.save_adapter(names[state], folders["adapter"] / "x"),
            lambda: full_lab.check_adapter(folders["adapter"] / "x").raise_for_problems(),
        ),
        "lab": Saver(folders["lab"] / "x", save_lab, lambda: _open(full_lab, folders["lab"] / "x")),
        "json": Saver(
            folders["json"] / "x.json",
            lambda state: comparisons[state].to_json(folders["json"] / "x.json"),
            lambda: Comparison.from_json(folders["json"] / "x.json"),
        ),
        "html": Saver(
            folders["html"] / "x.html",
            lambda state: comparisons[state].to_html(folders["html"] / "x.html"),
            lambda: (folders["html"] / "x.html").read_text(encoding="utf-8").rstrip().endswith("</html>") or 1 / 0,
        ),
    }
    made["cache"] = _Cache(cached / demo._FOLDER, fill)
    return made


ABOUT = {"dtype": "float32", "quantization": None, "device": "cpu", "versions": {"adapterlab": "0"}}


class _Cache(Saver):
    """The demo's cache is whole, or is seen to be none and filled again."""

    def __init__(self, target: Path, fill: Callable[[int], object]) -> None:
        self.target, self.save, self.written = target, fill, []
        started = time.perf_counter()
        fill(0)
        self.seconds = time.perf_counter() - started

    def check(self) -> None:
        if demo._is_finished(self.target):
            sizes = {(self.target / name).stat().st_size for name in ("config.json", "model.safetensors")}
            assert sizes <= {1000, 1001}
            assert len(sizes) == 1
        self.save(0)
        assert demo._is_finished(self.target)


def _open(lab: AdapterLab, folder: Path) -> None:
    found = SavedFolder.read(folder)
    for files in found.adapters.values():
        lab.check_adapter(files.folder).raise_for_problems()


@pytest.mark.parametrize("kind", ["adapter", "lab", "json", "html", "cache"])
def test_killed_at_a_random_moment_the_old_or_the_new_is_there(
    savers: dict[str, Saver], kind: str, long: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """200 moments in all (1,000 in the long form): between before the save's beginning and after its end."""
    saver, dice = savers[kind], random.Random(kind)
    killed = 0
    for number in range(200 if long else 40):
        child = in_a_child(lambda number=number: saver.save(1 - number % 2))  # type: ignore[misc]
        time.sleep(dice.uniform(0.0, 1.3 * saver.seconds))  # the random moment itself
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        assert code in (0, -signal.SIGKILL), capfd.readouterr().err
        killed += code != 0
        saver.check()
    assert killed > 10
    saver.save(0)
    remain = [saver.target.parent / name for name in leftovers(saver.target.parent)]
    assert not any(any(folder.iterdir()) for folder in remain), "the next save sweeps what was killed"


@pytest.mark.parametrize("kind", ["adapter", "lab", "json", "cache"])
def test_killed_at_every_line_the_old_or_the_new_is_there(savers: dict[str, Saver], kind: str, long: bool) -> None:
    """Each line that atomic.py runs in a save, and in the long form each line of the package."""
    saver = savers[kind]
    where = str(Path(atomic.__file__).parent if long else Path(atomic.__file__))
    lines = sum(1 for _ in _each_line(lambda: saver.save(1), where))
    assert lines > 30
    for line in range(1, lines + 1, 1 if long or lines < 150 else 3):
        child = in_a_child(lambda line=line: _killed_at(line, where, lambda: saver.save(line % 2)))  # type: ignore[misc]
        assert ended(child) == -signal.SIGKILL
        saver.check()


def _each_line(work: Callable[[], object], where: str) -> Iterator[int]:
    seen: list[int] = []
    _traced(work, where, lambda: seen.append(len(seen)))
    yield from seen


def _killed_at(line: int, where: str, work: Callable[[], object]) -> None:
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == line:
            os.kill(os.getpid(), signal.SIGKILL)

    _traced(work, where, count)


def _traced(work: Callable[[], object], where: str, at_line: Callable[[], object]) -> None:
    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            at_line()
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(where) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "lab", "json", "html"])
def test_a_full_disk_is_said_and_the_old_stays(
    savers: dict[str, Saver], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands in for the full disk: the system's refusal comes from the same calls."""
    saver = savers[kind]
    before = content(saver.target)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        with pytest.raises(
            AdapterLabError, match=r"x(\.json|\.html)?' can't be written: .*([Ff]ile too large|os error 27)"
        ):
            saver.save(1)

    assert ended(in_a_child(fill)) == 0, capfd.readouterr().err
    assert content(saver.target) == before
    assert leftovers(saver.target.parent) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs a user to become another one")
@pytest.mark.parametrize("kind", ["adapter", "lab", "json", "html"])
def test_a_folder_that_may_not_be_written_is_said(
    savers: dict[str, Saver], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    saver = savers[kind]
    before = content(saver.target)
    for folder in (saver.target.parent, *saver.target.parent.parents):
        if folder.stat().st_uid == 0 and str(folder).startswith(str(Path("/tmp"))) and folder != Path("/tmp"):
            folder.chmod(0o755)

    def write() -> None:
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(AdapterLabError, match=r"can't be written: Permission denied"):
            saver.save(1)

    assert ended(in_a_child(write)) == 0, capfd.readouterr().err
    assert content(saver.target) == before


# -- two at once, links, rights, leftovers -----------------------------------------------------------------------------


def test_two_processes_save_into_one_place_at_once(savers: dict[str, Saver], capfd: pytest.CaptureFixture[str]) -> None:
    saver = savers["adapter"]
    both = [in_a_child(lambda k=k: [saver.save(k) for _ in range(10)]) for k in (0, 1)]  # type: ignore[misc]
    assert [ended(child) for child in both] == [0, 0], capfd.readouterr().err
    saver.check()
    assert leftovers(saver.target.parent) == []


def test_what_another_process_writes_is_not_swept(tmp_path: Path) -> None:
    target = tmp_path / "x"
    ready, go = os.pipe(), os.pipe()

    def write_slowly() -> None:
        with building(target) as built:
            (built / "file").write_text("whole")
            os.write(ready[1], b".")
            os.read(go[0], 1)

    child = in_a_child(write_slowly)
    os.read(ready[0], 1)
    with scratch_beside(target):
        assert len(leftovers(tmp_path)) == 2
    os.write(go[1], b".")
    assert ended(child) == 0
    assert (target / "file").read_text() == "whole"
    for handle in (*ready, *go):
        os.close(handle)


def test_the_empty_leftover_of_an_hour_ago_goes_and_a_young_one_stays(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".x.1.part", ".x.2.part", ".y.1.part"))
    for folder in (old, young, other):
        folder.mkdir()
    hour = time.time() - 2 * atomic._YOUNG
    for folder in (old, other):
        os.utime(folder, (hour, hour))
    write_text(tmp_path / "x", "")
    assert sorted(leftovers(tmp_path)) == [".x.2.part", ".y.1.part"]


def test_a_link_stays_a_link_to_what_is_new(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "far" / "x")
    (tmp_path / "file").symlink_to(tmp_path / "far" / "y")
    for text in ("old", "new"):
        with building(tmp_path / "folder") as built:
            (built / "z").write_text(text)
        assert write_text(tmp_path / "file", text) == tmp_path / "file"
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "far" / "x" / "z").read_text() == (tmp_path / "far" / "y").read_text() == "new"


@pytest.mark.parametrize("here", ["lab", "lab/adapters"])
@pytest.mark.parametrize("named", [".", "link", "absolute"])
def test_the_folder_that_python_works_in_is_not_replaced(
    full_lab: AdapterLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, named: str
) -> None:
    folder = full_lab.save(tmp_path / "lab")
    (tmp_path / "link").symlink_to("lab")
    before = content(tmp_path)
    monkeypatch.chdir(tmp_path / here)
    target = {".": "." if here == "lab" else "..", "link": tmp_path / "link", "absolute": folder}[named]
    with pytest.raises(AdapterLabError, match=r"lab' can't be written: Python works in '.*os\.chdir"):
        full_lab.save(target)
    assert os.getcwd() == str(tmp_path / here)
    assert content(tmp_path) == before


def test_an_adapter_into_the_empty_folder_that_python_works_in(
    full_lab: AdapterLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterLabError, match="such as one inside it"):
        full_lab.save_adapter("pirate", ".")
    assert list(tmp_path.iterdir()) == []
    full_lab.save_adapter("pirate", "inside")
    assert sorted(path.name for path in Path("inside").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_where_the_working_directory_is_gone(
    full_lab: AdapterLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with building(tmp_path / "folder") as built:
        (built / "x").write_text("new")
    assert (tmp_path / "folder" / "x").read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_rights_of_new_files(full_lab: AdapterLab, tmp_path: Path, mask: int) -> None:
    """safetensors itself writes for the owner alone, whatever the user has set."""
    before = os.umask(mask)
    try:
        folder = full_lab.save_adapter("pirate", tmp_path / "x")
        write_text(tmp_path / "y", "")
    finally:
        os.umask(before)
    rights = {path.stat().st_mode & 0o777 for path in (*folder.iterdir(), tmp_path / "y")}
    assert rights == {0o666 & ~mask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_without_an_exchange_it_takes_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_swap", lambda: None)
    _replaced_twice(tmp_path)


def test_a_disk_that_refuses_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    def refuse(one: bytes, other: bytes) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(atomic, "_swap", lambda: refuse)
    _replaced_twice(tmp_path)


def _replaced_twice(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with building(tmp_path / "x") as built:
            (built / "file").write_text(text)
    assert (tmp_path / "x" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failed_second_step_takes_the_first_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_swap", lambda: None)
    for name in ("built", "x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename = os.rename

    def fail(one: Any, other: Any) -> None:
        if Path(one).name == "built":
            raise OSError(errno.EIO, "Input/output error")
        rename(one, other)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        replace_folder(tmp_path / "built", tmp_path / "x")
    assert (tmp_path / "x" / "file").read_text() == "x"
    assert not (tmp_path / "old").exists()


def test_a_text_that_can_not_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x", "old\r\n")
    with pytest.raises(AdapterLabError, match=r"can't be written: .*surrogates"):
        write_text(path, "\ud800")
    assert path.read_bytes() == b"old\r\n"
    assert [one.name for one in tmp_path.iterdir()] == ["x"]
