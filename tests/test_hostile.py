"""Files that strangers made (hostile_corpus.py) are refused in words, quickly, in little memory, and nothing else happens.

Each case runs in a child of its own, which is stopped after five seconds of its time (twenty by the clock, on machines that
are busy), and may take 300 MB on top of what was there. `--long` also opens each adapter's folder as a lab.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_corpus import CASES, Case, Good, build, make_good
from standins import tiny_llama, tiny_tokenizer

from adapterlab import AdapterLab, AdapterLabError, Comparison
from adapterlab.notices import AdapterLabWarning

SECONDS, BY_THE_CLOCK = 5, 20
MOST_BYTES = 300_000_000
LONGEST = 1500
RAW = re.compile(r"Traceback \(most recent|File \".*\", line \d+|<[\w.]+ object at|\bat 0x[0-9a-f]{6}|\x1b|\x00|\u202e")
Doing = Callable[[], "dict[str, Any]"]


@dataclass
class World:
    """What the cases are run against. outside: empty folders, watched: HOME and the working directory."""

    good: Good
    outside: list[Path]
    lab: AdapterLab
    ids: torch.Tensor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("hostile")
    good = make_good(root / "corpus")
    outside = [root / "home", root / "here"]
    for folder in outside:
        folder.mkdir()
    lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
    lab.load_adapter(good.adapter("lora"), "keeper")
    lab.load_adapter(good.adapter("ia3"), "other")
    lab.set_trainable("other")
    lab.set_adapter("keeper")
    ids = torch.randint(7, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    world = World(good, outside, lab, ids)
    _warm(world, root / "warm")
    gc.collect()
    gc.freeze()  # a collection in a child would copy all that is here
    yield world
    gc.unfreeze()
    lab.close()


def _warm(world: World, folder: Path) -> None:
    """What is imported and remembered at a first call of each kind is here before the children are made."""
    path, bad = world.good.adapter("lora"), next(one for one in CASES if one.name == "tensors-extra")
    for act in (check, load):
        assert "error" in outcome(lambda act=act: act(world, build(bad, folder / act.__name__, world.good)))  # type: ignore[misc]
        assert "given" in outcome(lambda act=act: act(world, path))  # type: ignore[misc]
    open_lab(path)
    open_lab(world.good.lab)
    open_comparison(world.good.comparison)
    shutil.rmtree(folder)
    state(world)


# ----- a child that can be stopped -----


def contained(work: Doing, seconds: float = SECONDS, by_the_clock: float = BY_THE_CLOCK) -> dict[str, Any]:
    """What `work` gives, run in a child with limits on time and memory; where it did not end, `{"killed": why}`."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 on forks beside threads: this child runs Python code alone
        child = os.fork()
    if child == 0:
        _in_child(work, writer, seconds)
    os.close(writer)
    try:
        return _hear(reader, by_the_clock)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _in_child(work: Doing, writer: int, seconds: float) -> None:
    try:
        os.setpgid(0, 0)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # at its end the process does
        room = (
            _memory("VmSize") + 3 * MOST_BYTES
        )  # a stop for what would take the machine; the bound itself is measured
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        before = _memory("VmHWM")
        told = work()
        told["grown"] = _memory("VmHWM") - before
    except BaseException:
        told = {"crashed": traceback.format_exc()}
    with os.fdopen(writer, "w") as pipe:
        json.dump(told, pipe)
    os._exit(0)


def _hear(reader: int, seconds: float) -> dict[str, Any]:
    import time

    heard, end = b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return {"killed": f"it had not ended after {seconds} s"}
        part = os.read(reader, 1 << 16)
        if not part:
            return json.loads(heard) if heard else {"killed": "the process died, or its time was over"}
        heard += part


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@contextlib.contextmanager
def watched(world: World) -> Iterator[list[str]]:
    """HOME and the working directory are empty folders, the canary's folder is importable, and no address is asked."""
    asked: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(repr(arguments[-1])[:100])
        raise OSError("no network here")

    os.environ["HOME"] = str(world.outside[0])
    os.chdir(world.outside[1])
    sys.path.insert(0, str(world.good.canary.parent))
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, refuse)
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    yield asked


def tree(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with its size and when it was changed."""
    found = {}
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                stat = os.lstat(os.path.join(where, name))
                found[os.path.join(where, name)] = (stat.st_size, stat.st_mtime_ns)
    return found


def state(world: World) -> list[str]:
    """Everything that a failed call may not change, the logits to the bit, as texts."""
    lab, model = world.lab, world.lab.model
    with torch.no_grad():
        logits = model(world.ids).logits
    base = [(name, hash(p.detach().numpy().tobytes()), p.requires_grad) for name, p in model.named_parameters()]
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    parts = [
        list(lab.adapters), str(lab.selection), lab.enabled, lab.trainable, lab.active_adapters, list(model.peft_config),
        [id(config) for config in model.peft_config.values()], lab._adapters.mounts.drift(),
    ]  # fmt: skip
    return [repr(part) for part in (parts, hash(logits.numpy().tobytes()), base, modules)]


# ----- what is done with each case -----


def outcome(act: Callable[[], Any]) -> dict[str, Any]:
    """What it gave and said, or the error's text: `escaped` is an error of a kind that people should not see."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            given = act()
        except AdapterLabError as error:
            return {"error": str(error)}
        except BaseException:
            return {"escaped": traceback.format_exc()[-2000:]}
    said = [str(one.message) for one in warned if isinstance(one.message, AdapterLabWarning)]
    return {"given": given, "said": "\n".join([printed.getvalue(), *said])}


def check(world: World, path: Path) -> Any:
    """The preflight's problems as an error; what it shows is read too."""
    flight = world.lab.check_adapter(path)
    assert "<script" not in flight._repr_html_()
    assert flight.verdict in str(flight)
    flight.raise_for_problems()
    return flight.verdict


def load(world: World, path: Path) -> Any:
    """Load it, run it, and delete it: base and selection are afterwards what they were."""
    name = world.lab.load_adapter(path)
    with torch.no_grad():
        world.lab.model(world.ids)
    world.lab.delete_adapter(name)
    world.lab.set_adapter("keeper")
    return name


def open_lab(path: Path) -> Any:
    lab = AdapterLab(path)
    lab.compare("Hello", max_new_tokens=1, chat=False)
    names = list(lab.adapters)
    lab.close()
    return names


def open_comparison(path: Path) -> Any:
    comparison = Comparison.from_json(path)
    html = comparison._repr_html_()
    assert "<script" not in html
    assert "<img" not in html
    assert repr(comparison)
    assert len(comparison.to_frame()) == len(comparison)
    comparison.tokens()
    comparison._json()
    return comparison.columns[:3]


def deeds(world: World, one: Case, path: Path, everything: bool) -> dict[str, Callable[[], Any]]:
    if one.what == "comparison":
        return {"read": lambda: open_comparison(path)}
    if one.what == "data":
        return {"train": lambda: world.lab.train("other", path, max_steps=1).steps}
    if one.what in ("base", "lab"):
        return {"open": lambda: open_lab(path)}
    both: dict[str, Callable[[], Any]] = {"check": lambda: check(world, path), "load": lambda: load(world, path)}
    if everything or "base" in one.tags:
        both["open"] = lambda: open_lab(path)
    return both


def run(world: World, one: Case, path: Path, everything: bool) -> dict[str, Any]:
    """What came of each deed, by its name, and which addresses were asked."""
    told: dict[str, Any] = {}
    with watched(world) as asked:
        before = state(world)
        for name, act in deeds(world, one, path, everything).items():
            told[name] = outcome(act)
            told[name]["changed"] = state(world) != before
    return {"deeds": told, "asked": asked}


def wrong(one: Case, told: dict[str, Any], everything: bool = False) -> list[str]:
    """What is not as it should be, in words."""
    if "deeds" not in told:
        return [str(told)]
    said = [f"it asked {address}" for address in told["asked"]]
    if told["grown"] > MOST_BYTES:
        said.append(f"it took {told['grown'] / 1e6:.0f} MB")
    for name, came in told["deeds"].items():
        legal = one.legal and not (name == "open" and "base" in one.tags)
        if not one.header and name == "check":
            legal = True
        if "escaped" in came:
            said.append(f"{name}: {came['escaped']}")
        elif "error" in came:
            if legal:
                said.append(f"{name}: refused, though it may be used: {came['error']}")
            said += [f"{name}: {what}: {came['error'][:600]!r}" for what in unclear(came["error"], one)]
        elif not legal and "either" not in one.tags:
            said.append(f"{name}: it was taken: {came['given']}")
        elif name != "check" and one.tells not in came["said"]:
            said.append(f"{name}: {one.tells!r} is not said: {came['said'][:600]!r}")
        if came["changed"]:
            said.append(f"{name}: the lab is another now")
    return said


def unclear(text: str, one: Case) -> list[str]:
    """What is wrong with an error's words."""
    said = []
    if not re.match(r"['\"A-Z/~]|dataset|dtype=", text) and not text.startswith(one.name):
        said.append("it begins like no sentence")
    if len(text) > LONGEST:
        said.append(f"it has {len(text)} letters")
    if found := RAW.search(text):
        said.append(f"it shows {found[0]!r}")
    words = re.sub(r"/\S*/" + re.escape(one.name), "", text).lower()
    if one.said and one.said.lower() not in (text if one.said == one.name else words).lower():
        said.append(f"it does not name {one.said!r}")
    if one.name not in text and not one.said and "base" not in one.tags:
        said.append("it names no file")
    return said


@pytest.mark.parametrize("one", CASES, ids=[one.name for one in CASES])
def test_it_is_refused_in_words_and_nothing_else_happens(one: Case, world: World, long: bool) -> None:
    folder = world.good.root / "cases" / one.name
    try:
        path = build(one, folder, world.good)
        before = tree(world.good.root, *world.outside)
        told = contained(lambda: run(world, one, path, long))
        assert not world.good.canary.exists(), "code was run"
        assert tree(world.good.root, *world.outside) == before, "something was written"
        assert not wrong(one, told)
    finally:
        world.good.canary.unlink(missing_ok=True)
        shutil.rmtree(folder)


def test_every_kind_of_file_is_there() -> None:
    names = [one.name for one in CASES]
    assert len(set(names)) == len(names) >= 60
    assert {one.what for one in CASES} == {"adapter", "base", "comparison", "lab", "data"}


class TestTheGuards:
    """What stands round each case notices what it is there to notice."""

    def test_what_does_not_end(self) -> None:
        assert "had not ended" in contained(lambda: {"x": signal.pause()}, by_the_clock=0.2)["killed"]

    def test_what_works_without_end(self) -> None:
        assert "time was over" in contained(lambda: {"x": all(itertools.count(1))}, seconds=0.2)["killed"]

    def test_memory(self) -> None:
        told = contained(lambda: {"deeds": {}, "asked": [], "n": len(bytes(MOST_BYTES) + bytes(MOST_BYTES // 2))})
        assert "MB" in wrong(CASES[0], told)[0]

    def test_more_memory_than_there_may_be(self) -> None:
        assert "MemoryError" in contained(lambda: {"n": len(bytearray(10 * MOST_BYTES))})["crashed"]

    def test_code_and_files_and_addresses(self, world: World) -> None:
        def harm() -> dict[str, Any]:
            with watched(world) as asked:
                __import__("hostile_import")
                Path("here").write_text("x")
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", 9))
            return {"asked": asked}

        before = tree(*world.outside)
        try:
            assert contained(harm)["asked"]
            assert world.good.canary.exists()
            assert tree(*world.outside) != before
        finally:
            world.good.canary.unlink(missing_ok=True)
            (world.outside[1] / "here").unlink(missing_ok=True)

    def test_every_payload_works_where_it_is_let(self, world: World, tmp_path: Path) -> None:
        """Unpickled carelessly, each pickle of the corpus does run: the canary is no dead letter."""
        payloads = ["pickle-system", "pickle-system-legacy", "pickle-exec", "pickle-import", "pickle-numpy"]
        for one in CASES:
            if one.name in payloads:
                path = build(one, tmp_path / one.name, world.good)

                def careless(path: Path = path) -> dict[str, Any]:
                    sys.path[:0] = [str(world.good.canary.parent)]
                    torch.load(path / "adapter_model.bin", weights_only=False)
                    return {}

                told = contained(careless)
                assert world.good.canary.exists(), (one.name, told)
                world.good.canary.unlink()

    def test_a_lab_that_changed(self, world: World) -> None:
        def change() -> dict[str, Any]:
            before = state(world)
            with torch.no_grad():
                next(iter(world.lab.model.parameters())).view(-1)[0] += 1e-3
            return {"same": state(world) == before}

        assert contained(change)["same"] is False
