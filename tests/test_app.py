"""`adapterlab app`: the notebook that it serves, the command, and the page itself in a browser."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jupyterlab_page import chromium_page, need_browser, voila_app

from adapterlab import cli
from adapterlab.app import app_cell, app_command, app_notebook
from adapterlab.errors import AdapterLabError


def run_cell(cell: str, monkeypatch: pytest.MonkeyPatch, fail: Exception | None = None) -> tuple[list[Any], list[str]]:
    """What the cell calls, on a lab that only listens, and what it displays."""
    calls: list[Any] = []
    shown: list[str] = []

    class Lab:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            if fail is not None:
                raise fail
            calls.append(("open", arguments, keywords))

        @classmethod
        def demo(cls, **keywords: Any) -> Lab:
            calls.append(("demo", (), keywords))
            return cls.__new__(cls)

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: calls.append((name, arguments, {}))

    monkeypatch.setitem(
        sys.modules,
        "adapterlab",
        SimpleNamespace(AdapterLab=Lab, AdapterLabError=AdapterLabError),  # type: ignore[arg-type]
    )
    monkeypatch.setattr("IPython.display.display", lambda shows: shown.append(shows.data))
    exec(cell, {})
    return calls, shown


def test_the_cell_opens_loads_and_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    calls, _ = run_cell(app_cell("some/model", ["mine", "some/adapter", "./gone"], "8bit"), monkeypatch)
    assert calls == [
        ("open", ("some/model",), {"quantization": "8bit"}),
        ("load_adapter", (str(tmp_path / "mine"),), {}),
        ("load_adapter", ("some/adapter",), {}),
        ("load_adapter", (str(tmp_path / "gone"),), {}),  # looked for where the user is, not where the kernel runs
        ("set_adapter", (None,), {}),
        ("show", (), {}),
    ]
    assert run_cell(app_cell("demo"), monkeypatch)[0][0] == ("demo", (), {})


def test_what_was_typed_is_a_literal(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "'); import os; os.abort() #\n{opening}\""
    calls, _ = run_cell(app_cell(hostile, [hostile]), monkeypatch)
    assert calls[0] == ("open", (hostile,), {})
    assert calls[1] == ("load_adapter", (hostile,), {})


def test_what_the_user_can_mend_is_said_in_the_page_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, shown = run_cell(app_cell("nowhere"), monkeypatch, fail=AdapterLabError("No <b>model</b> there."))
    assert not calls
    assert "No &lt;b&gt;model&lt;/b&gt; there." in shown[0]


def test_the_notebook_is_one(tmp_path: Path) -> None:
    import nbformat

    nbformat.validate(nbformat.reads(app_notebook(app_cell("demo")), as_version=4))


def test_voila_listens_here_only_and_with_a_token(tmp_path: Path) -> None:
    command = app_command(tmp_path / "a.ipynb", 9000, browser=False)
    assert command[1:4] == ["-m", "voila", str(tmp_path / "a.ipynb")]
    assert set(command[4:]) == {"--Voila.ip=127.0.0.1", "--Voila.auto_token=True", "--port=9000", "--no-browser"}


def test_without_voila_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("adapterlab.app.util.find_spec", lambda name: None)
    assert cli.main(["app", "demo"]) == 2
    assert "pip install 'adapterlab[app]'" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.demo
def test_the_app_generates_in_a_browser() -> None:
    need_browser("voila")
    with voila_app("demo") as url, chromium_page(url) as page:
        button = page.get_by_role("button", name="Generate", exact=True)
        button.wait_for(timeout=120_000)
        page.get_by_role("button", name="Sampling").click()
        page.get_by_label("New tokens").fill("12")
        button.click()
        page.locator('.alab-asked-line[data-shown="1"]').wait_for(timeout=120_000)
        said = page.locator(".alab-text").all_inner_texts()
        assert page.locator(".alab-card h4").all_inner_texts() == ["base", "pirate", "robot", "bard"]
        assert "Arr" in said[1]
        assert "BEEP" in said[2]
        assert page.get_by_text("from adapterlab import").count() == 0, "an app shows no code"
