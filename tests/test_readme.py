"""What the README says to type is typed here: snippets run, commands work, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from standins import (
    OPT_350M,
    OPT_350M_LORA,
    StandinHub,
    hub_environment,
    write_opt_350m,
    write_opt_350m_lora,
)
from tiny_adapters import tiny_demo

from adapterlab import AdapterLab, cli
from adapterlab.app import app_cell

ROOT = Path(__file__).parent.parent
PAGES = [name for name in ("README.md", "README.ja.md") if (ROOT / name).exists()]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> Iterator[list[str]]:
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if words:
                    yield words


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandinHub]:
    repos = {OPT_350M: write_opt_350m(tmp_path / "opt"), OPT_350M_LORA: write_opt_350m_lora(tmp_path / "lora")}
    with StandinHub(repos) as hub, hub_environment(tmp_path / "cache", url=hub.url):
        yield hub


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::adapterlab.AdapterLabWarning")
def test_every_snippet_runs(page: str, hub: StandinHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order: the first opens the Hub's model by its name, the others go on with the demo's adapters."""
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AdapterLab, "show", lambda lab: None)  # a panel wants a notebook; test_browser.py has one
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "What is a star?", "completion": "A far sun."}\n' * 3, encoding="utf-8"
    )
    first, *others = blocks(page, "python")
    assert len(others) >= 3
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["lab"].active_adapters == {"opt-350m-lora": 1.0}
    assert names["lab"].last is not None
    names["lab"].close()
    names["lab"] = tiny_demo(tmp_path / "demo")
    names["lab"].compare("What is the moon?", max_new_tokens=4)
    for block in others:
        exec(block, names)
    names["lab"].close()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_works(page: str, hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installs are what CI begins with, `adapterlab demo` runs in test_demo.py, the app's page is made here."""
    extras = metadata("adapterlab").get_all("Provides-Extra") or []
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    seen = set()
    for words in commands(page):
        seen.add(" ".join(words[:2]))
        if words[:2] == ["pip", "install"]:
            assert words[2] == "-e"
            asked = re.fullmatch(r"\.\[([\w,]+)\]", words[3])
            assert asked is not None, words
            assert set(asked[1].split(",")) <= set(extras), words
        elif words[:2] == ["adapterlab", "demo"]:
            assert cli._parser().parse_args(words[1:]).run is cli.run_demo
        elif words[:2] == ["adapterlab", "app"]:
            arguments = cli._parser().parse_args(words[1:])
            assert arguments.run is cli.run_app
            shown: list[AdapterLab] = []
            monkeypatch.setattr(AdapterLab, "show", lambda lab, shown=shown: shown.append(lab))
            exec(app_cell(arguments.model, arguments.adapter, arguments.quantization), {})
            assert list(shown[0].adapters) == [name.rpartition("/")[2] for name in arguments.adapter]
            shown[0].close()
        else:
            assert words == ["pytest"], f"a command that no test knows: {words}"
    assert {"pip install", "adapterlab demo", "pytest"} <= seen
    assert 'pip install --quiet -e ".[lab,test]"' in ci


@pytest.mark.parametrize(
    "page", [*PAGES, "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/saved-lab.md"]
)
def test_every_link_leads_somewhere(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in targets:
        name, _, anchor = target.partition("#")
        to = (path.parent / name).resolve() if name else path
        assert to.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", to.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", PAGES)
def test_its_badges_are_of_the_one_address(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import notebook_links as links

    badges = (ROOT / page).read_text(encoding="utf-8").splitlines()[2]
    assert badges == links.badges(ROOT / "notebooks" / "quickstart.ipynb")
    sys.modules.pop("notebook_links")


def test_every_notebook_is_listed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"](notebooks/{path.name})" in text, path.name
