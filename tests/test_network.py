"""The network is used for what the user asked of the Hub, and for nothing else.

Everything runs in a process of its own, watched by an audit hook: Python tells it of each attempt to connect or to look up a
name, whatever library makes it, from the first import on; none is let through.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from standins import tiny_llama, tiny_tokenizer, write_model

from adapterlab import AdapterLabError
from adapterlab.discovery import find_adapters

WATCH = """
import json, sys

tried = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if len(arguments) > 1 and isinstance(arguments[1], (str, bytes)):
            return  # a socket of this machine, by its path
        tried.append([event, str(arguments[1])])
        raise OSError("no network: " + event)
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "urllib.Request"):
        tried.append([event, str(arguments[0])])
        raise OSError("no network: " + event)

sys.addaudithook(watch)
"""

HERE = """
import warnings
from pathlib import Path
warnings.simplefilter("ignore")
import adapterlab
from adapterlab import AdapterLab

base, work = Path(sys.argv[1]), Path(sys.argv[2])
lab = AdapterLab(base)
pairs = [("What is the moon?", "A lantern."), ("Who are you?", "A captain.")] * 2
kinds = {"mine": ("lora", {"r": 2}), "scales": ("ia3", {}), "ranks": ("adalora", {"init_r": 3, "target_r": 2})}
for name, (method, more) in kinds.items():
    lab.train(name, pairs, method=method, max_steps=3, eval_dataset=0.5, disable_tqdm=True, **more)
    lab.save_adapter(name, work / name)
lab.load_adapter(work / "mine", "again")
lab.check_adapter(work / "ranks")
comparison = lab.compare("Hello", max_new_tokens=3)
lab.generate("Hello", max_new_tokens=2, temperature=0.7)
lab.verify()
comparison.tokens()
comparison.to_html(work / "c.html")
comparison.to_json(work / "c.json")
adapterlab.Comparison.from_json(work / "c.json")
lab.divergence("The moon is", ["mine"])
lab.evaluate(["The moon is a lantern."])
lab.add_weighted_adapter(["mine", "again"], [0.5, 0.5], "both")
lab.merge_and_unload("mine", work / "merged")
str(lab.model_card("ranks"))
lab.summary(), lab.parameters(), lab.memory(), lab.capabilities(), lab._repr_html_()
for figure in (lab.plot_memory(), lab.plot_parameters(), lab.plot_ranks("ranks"), lab.plot_delta_norms("mine")):
    figure.savefig(work / "picture.svg")
lab.plot_divergence("The moon", ["mine"]).savefig(work / "picture.png")
AdapterLab.estimate(base, ["lora"], training=True, length=8, batch_size=1)
AdapterLab.estimate(lab.model, ["ia3"], quantization="8bit")
panel = lab.panel()
panel.prompt.generate.click()
lab.wait(60)
panel.tabs.open = "Inspect"
lab.wait(60)
panel.close()
trainer = lab.trainer("mine", pairs, eval_dataset=0.5, max_steps=1, output_dir=str(work / "trainer"), disable_tqdm=True)
trainer.train()
trainer.evaluate()
SAVED
lab.close()
AdapterLab(work / "mine").close()
AdapterLab(work / "merged").close()
print(json.dumps(tried))
"""

ASKED = {
    "lab": "AdapterLab('somebody/model')",
    "quantised": "AdapterLab('somebody/model', quantization='8bit')",
    "adapter": "lab.load_adapter('somebody/adapter')",
    "check": "lab.check_adapter('somebody/adapter')",
    "find": "lab.find_adapters()",
    "push": "lab.push_adapter_to_hub('mine', 'somebody/adapter')",
    "estimate": "AdapterLab.estimate('somebody/model')",
    "estimate of an adapter": "AdapterLab.estimate('somebody/model', ['somebody/adapter'])",
}

OFFLINE = """
import time, traceback, warnings
warnings.simplefilter("ignore")
from adapterlab import AdapterLab, AdapterLabError

lab = AdapterLab(sys.argv[1])
lab._adapters.base_path = "somebody/model"  # as if it had come from there
lab.add_adapter("lora", "mine", r=2)
said = {}
for name, call in json.loads(sys.argv[2]).items():
    began = time.perf_counter()
    try:
        eval(call)
        said[name] = ["nothing was raised", ""]
    except AdapterLabError as error:
        said[name] = ["AdapterLabError", str(error), time.perf_counter() - began]
    except Exception as error:
        said[name] = [type(error).__name__, traceback.format_exc()]
print(json.dumps({"said": said, "tried": tried}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base", tiny_llama(), tiny_tokenizer(chat=True))


def watched(code: str, *arguments: object, home: Path, **environment: str) -> str:
    """The last line that a fresh Python prints, in which nothing can connect; its caches are empty."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "HUGGINGFACE_", "PIP_"))}
    places = {"HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache"), "MPLCONFIGDIR": str(home / "mpl")}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCH + code), *map(str, arguments)],
        env={**kept, **places, "OMP_NUM_THREADS": "1", **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout.strip().splitlines()[-1]


def test_the_hook_sees_what_connects(tmp_path: Path) -> None:
    """That the silence below is one: each way of asking the network is noticed, threads' and libraries' too."""
    code = """
import socket, threading, httpx
for call in (
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: socket.socket().connect(("127.0.0.1", 9)),
    lambda: socket.socket().connect_ex(("127.0.0.1", 9)),
    lambda: socket.getaddrinfo("localhost", 80),
    lambda: httpx.get("http://127.0.0.1:9"),
):
    before = len(tried)
    def ask():
        try:
            call()
        except Exception:
            pass
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(tried) > before, call
print(len(tried))
"""
    assert int(watched(code, home=tmp_path)) >= 5


def test_nothing_is_asked_of_the_network_in_a_whole_day_of_work(base: Path, tmp_path: Path) -> None:
    code = HERE.replace("SAVED", 'lab.save(work / "lab")\nAdapterLab(work / "lab").close()')
    assert json.loads(watched(code, base, tmp_path / "work", home=tmp_path)) == []


def test_offline_means_offline(base: Path, tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE set, what would ask the Hub says so in words, and asks nobody."""
    told = json.loads(watched(OFFLINE, base, json.dumps(ASKED), home=tmp_path, HF_HUB_OFFLINE="1"))
    assert told["tried"] == []
    for name, said in told["said"].items():
        assert said[0] == "AdapterLabError", (name, said[1])
        assert "HF_HUB_OFFLINE" in said[1], (name, said[1])
        assert said[2] < 10, name


@pytest.mark.parametrize("path", ["/home/me/private/base", "C:\\Users\\me", "", "~/base", "a/b/c"])
def test_no_path_of_this_machine_is_told_to_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "list_models", lambda **_: pytest.fail("the Hub was asked"))
    with pytest.raises(AdapterLabError, match="Hub id"):
        find_adapters(path)


@pytest.mark.parametrize("library", ["httpx", "httpx2", "requests", "of_tomorrow"])
def test_whatever_library_fails_to_connect_it_is_said_in_words(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    error = type("ConnectError", (Exception,), {"__module__": library})

    def fail(**_: object) -> None:
        raise error("no route")

    monkeypatch.setattr(huggingface_hub, "list_models", fail)
    with pytest.raises(AdapterLabError, match=r"'some/model' \(ConnectError\)"):
        find_adapters("some/model")


def test_each_test_that_security_md_names_is_there() -> None:
    here = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (here.parent / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, function in named:
        defined = re.findall(r"^ *def (test_\w+)\(", (here / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert defined if not function else function in defined, f"{file}::{function}"


def test_without_it_the_same_calls_do_ask(base: Path, tmp_path: Path) -> None:
    calls = {name: ASKED[name] for name in ("lab", "adapter")}
    told = json.loads(watched(OFFLINE, base, json.dumps(calls), home=tmp_path))
    assert len(told["tried"]) >= len(calls)
    for name, said in told["said"].items():
        assert said[0] == "AdapterLabError", (name, said[1])
