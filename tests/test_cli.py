"""The command: what it prints, where it puts the notebook, and how it ends."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from fakelab import FakeLab

import adapterlab
from adapterlab import cli
from adapterlab.demo import DEMO_QUESTIONS
from adapterlab.errors import AdapterLabError

PIRATE = "Arr, the moon be a silver doubloon that hangs above every ship that sails the seven seas"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> FakeLab:
    lab = FakeLab({"pirate": ("LORA", 8, 460_800), "robot": ("IA3", None, 92_160)})
    lab.answers = {"base": "The moon is a moon .", "pirate": PIRATE, "robot": "BEEP ."}
    monkeypatch.setattr("adapterlab.lab.AdapterLab.demo", lambda: lab)
    return lab


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled when the notebook would be opened."""
    calls: list[bool] = []

    def open_notebook() -> int:
        calls.append(True)
        return 0

    monkeypatch.setattr(cli, "open_notebook", open_notebook)
    return calls


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"adapterlab {adapterlab.__version__}\n"


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


class TestDemo:
    @pytest.mark.parametrize("arguments", [["demo"], ["demo", "--headless"]])
    def test_without_a_terminal_it_prints_and_ends(
        self, lab: FakeLab, opened: list[bool], capsys: pytest.CaptureFixture[str], arguments: list[str]
    ) -> None:
        assert cli.main(arguments) == 0
        printed = capsys.readouterr()
        assert "some/model · 135 M" in printed.out
        assert DEMO_QUESTIONS[0] in printed.out
        for word in ("base", "pirate", "robot", "doubloon", "BEEP", "logit shift 4.25"):
            assert word in printed.out
        assert "pirate: 17 tokens, eos" in printed.err
        assert not opened
        assert lab.closed

    def test_at_a_terminal_the_notebook_opens_when_the_lab_is_closed(
        self, lab: FakeLab, opened: list[bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert cli.main(["demo"]) == 0
        assert opened
        assert lab.closed

    def test_headless_at_a_terminal_opens_nothing(
        self, lab: FakeLab, opened: list[bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert cli.main(["demo", "--headless"]) == 0
        assert not opened

    def test_options_reach_compare(self, lab: FakeLab) -> None:
        options = ["--prompt", "Why?", "--max-new-tokens", "5", "--seed", "3", "--temperature", "0.5"]
        assert cli.main(["demo", *options]) == 0
        settings = {"max_new_tokens": 5, "seed": 3, "temperature": 0.5}
        assert lab.calls == [("compare", ("Why?", ["base", "pirate", "robot"], settings))]

    def test_a_users_error_is_a_sentence_and_2(self, lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
        lab.fail_with = AdapterLabError("The prompt is empty: write something.")
        assert cli.main(["demo", "--prompt", ""]) == 2
        assert capsys.readouterr().err == "adapterlab: The prompt is empty: write something.\n"
        assert lab.closed

    def test_interrupting_shows_no_traceback(
        self, lab: FakeLab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(lab, "compare", interrupt)
        assert cli.main(["demo"]) == 130
        assert capsys.readouterr().err.endswith("adapterlab: interrupted.\n")
        assert lab.closed


class TestSideBySide:
    @pytest.fixture
    def comparison(self, lab: FakeLab) -> Any:
        return lab.compare("Hm", ["base", "pirate", "robot"], on_token=lambda event: None)

    @pytest.mark.parametrize("width", [30, 60, 80, 120, 200])
    def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(self, comparison: Any, width: int) -> None:
        text = cli.side_by_side(comparison, width)
        assert max(map(len, text.splitlines())) <= width
        assert all(word in text for word in PIRATE.replace(",", "").split())

    def test_columns_stand_beside_one_another_where_there_is_room(self, comparison: Any) -> None:
        assert cli.side_by_side(comparison, 100).splitlines()[0].split() == ["base", "pirate", "robot"]
        assert cli.side_by_side(comparison, 52).splitlines()[0].split() == ["base", "pirate"]
        assert cli.side_by_side(comparison, 30).splitlines()[0].split() == ["base"]

    def test_escape_codes_of_a_model_do_not_reach_the_terminal(self, lab: FakeLab) -> None:
        lab.answers["base"] = "\x1b]0;title\x07 \x1b[31mred"
        comparison = lab.compare("Hm", [None], on_token=lambda event: None)
        assert "\x1b" not in cli.side_by_side(comparison, 80)


class TestNotebook:
    def test_a_copy_is_made_in_the_folder(self, tmp_path: Path) -> None:
        path = cli.copy_notebook(tmp_path)
        assert path == tmp_path / cli.COPY_NAME
        assert path.read_bytes() == cli.notebook_source().read_bytes()

    def test_the_users_edits_are_never_touched(self, tmp_path: Path) -> None:
        (tmp_path / cli.COPY_NAME).write_text("mine", encoding="utf-8")
        assert cli.copy_notebook(tmp_path).read_text(encoding="utf-8") == "mine"

    def test_where_the_folder_cannot_be_written_the_users_data_folder_is_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path / name)
        file = tmp_path / "no-folder"
        file.write_text("", encoding="utf-8")
        assert cli.copy_notebook(file / "below") == tmp_path / "adapterlab" / cli.COPY_NAME

    def test_jupyterlab_is_started_on_the_copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[list[str]] = []

        class Server:
            """Is interrupted once, as by Ctrl-C in its terminal, goes on, and ends later."""

            waits = iter([KeyboardInterrupt(), None])

            def __init__(self, command: list[str]) -> None:
                started.append(command)

            def wait(self) -> int:
                interruption = next(self.waits)
                if interruption:
                    raise interruption
                return 0

        monkeypatch.setattr(cli.subprocess, "Popen", Server)
        monkeypatch.setattr(cli.util, "find_spec", lambda name: object())
        monkeypatch.chdir(tmp_path)
        assert cli.open_notebook() == 0
        assert started[0][:4] == [sys.executable, "-m", "jupyterlab", str(tmp_path / cli.COPY_NAME)]

    def test_without_jupyterlab_it_says_what_to_install(
        self, lab: FakeLab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(cli.util, "find_spec", lambda name: None)
        with pytest.raises(AdapterLabError, match=r"pip install 'adapterlab\[lab\]'"):
            cli.open_notebook()
