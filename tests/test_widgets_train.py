"""The Train tab without a browser: the form, the training to look at, and what of it is on the screen while it runs."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from fakelab import HOSTILE, FakeLab
from standins import tiny_llama, tiny_phi3, tiny_tokenizer

from adapterlab import AdapterLab, AdapterLabError
from adapterlab.runs import TrainingRun, history_frame, ranks_frame
from adapterlab.training import DEFAULT_LEARNING_RATE, LEARNING_RATES
from adapterlab.watching import Progress, watching
from adapterlab.widgets import Panel, build_panel, data_form, train_run
from adapterlab.widgets.charts import loss_chart, ranks_table
from adapterlab.widgets.data_form import pasted_examples
from adapterlab.widgets.state import Incomplete, PanelState
from adapterlab.widgets.train_run import RunView, Track, head_html, people_seconds, people_speed, run_words

LINES = "What is rain? => Arr, water!\nWho are you?\tA captain.\n\nWhy? => Arr => !"
PAIRS = [("What is rain?", "Arr, water!"), ("Who are you?", "A captain."), ("Why?", "Arr => !")]


@pytest.fixture
def lab() -> FakeLab:
    return FakeLab({"pirate": ("LORA", 8, 460_800), "robot": ("IA3", None, 92_160)})


@pytest.fixture
def panel(lab: FakeLab) -> Iterator[Panel]:
    panel = build_panel(lab)  # type: ignore[arg-type]
    panel.train.form.data.pasted.value = LINES
    yield panel
    lab.wait()
    panel.close()


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The notebook's variables."""
    variables: dict[str, Any] = {}
    monkeypatch.setattr(data_form, "user_namespace", lambda: variables)
    return variables


def said(widget: Any) -> str:
    """What an HTML widget says, tags left out."""
    return html.unescape(re.sub(r"<[^>]*>", " ", widget.value))


def trained(lab: FakeLab) -> tuple[Any, ...]:
    return next(arguments for name, arguments in reversed(lab.calls) if name == "train")


class TestForm:
    def test_a_new_lora_on_what_was_pasted(self, panel: Panel, lab: FakeLab) -> None:
        form = panel.train.form
        form.new.targets.value = ("q_proj",)
        form.steps.value = 3
        form.train.click()
        lab.wait()
        wanted = {
            "method": "lora",
            "r": 8,
            "target_modules": ["q_proj"],
            "max_steps": 3,
            "learning_rate": DEFAULT_LEARNING_RATE,
        }
        assert trained(lab) == ("mine", PAIRS, wanted)
        assert "Trained 'mine': 3 steps in 6.0 s, loss 4.000 → 1.333. It is a column in Compare." in said(
            panel.notice.html
        )
        assert panel.rows.by_name["mine"].compare.value
        assert "mine" in panel.columns.cards
        assert form.name.value == "mine-2", "the next one needs another name"
        panel.run.compare.click()
        assert panel.tabs.open == "Compare"

    @pytest.mark.parametrize(
        ("method", "config"),
        [("lora", {"r": 6}), ("adalora", {"init_r": 6, "target_r": 3}), ("ia3", {})],
    )
    def test_methods_and_their_ranks(self, panel: Panel, lab: FakeLab, method: str, config: dict[str, int]) -> None:
        form = panel.train.form
        form.new.method.value, form.new.r.value, form.steps.value = method, 6, 1
        shown = {name: getattr(form.new, name).layout.display is None for name in ("r", "target_r")}
        assert shown == {"r": method != "ia3", "target_r": method == "adalora"}
        form.train.click()
        lab.wait()
        _, _, keywords = trained(lab)
        rate = LEARNING_RATES.get(method.upper(), DEFAULT_LEARNING_RATE)
        assert keywords == {"method": method, **config, "max_steps": 1, "learning_rate": rate}

    def test_a_learning_rate_of_ones_own_stays(self, panel: Panel) -> None:
        form = panel.train.form
        form.learning_rate.value = 0.02
        form.new.method.value = "ia3"
        assert form.learning_rate.value == 0.02

    def test_a_kept_rank_of_ones_own_stays_and_has_to_be_smaller(self, panel: Panel) -> None:
        new = panel.train.form.new
        new.method.value = "adalora"
        new.r.value = 12
        assert new.target_r.value == 6
        new.target_r.value = 5
        new.r.value = 4
        assert new.target_r.value == 5
        assert "has to be below" in new.size.value

    def test_the_name_that_is_proposed_is_free_in_a_panel_that_comes_later(self, lab: FakeLab) -> None:
        lab.add_adapter("lora", "mine")
        lab.add_adapter("lora", "default")
        panel = build_panel(lab)  # type: ignore[arg-type]
        assert (panel.train.form.name.value, panel.add_form.name.value) == ("mine-2", "default-2")
        panel.close()

    def test_an_adalora_that_keeps_all_its_ranks_is_not_made(self, panel: Panel, lab: FakeLab) -> None:
        """It was added, and could not be trained."""
        for form, button in ((panel.train.form, panel.train.form.train), (panel.add_form, panel.add_form.button)):
            form.new.method.value = "adalora"
            for rank, kept in ((8, 8), (8, 9), (2, 2)):
                form.new.r.value, form.new.target_r.value = rank, kept
                button.click()
                lab.wait()
                assert "The kept rank has to be below the starting rank" in said(panel.notice.html)
        assert not lab.calls

    def test_the_ranks_that_adalora_proposes_will_do(self, panel: Panel) -> None:
        new = panel.train.form.new
        new.r.value = 1
        new.method.value = "adalora"
        assert new.config() == {"init_r": 2, "target_r": 1}
        new.r.value = 1
        assert new.config() == {"init_r": 2, "target_r": 1}
        new.method.value = "lora"
        new.r.value = 1
        assert new.config() == {"r": 1}

    @pytest.mark.parametrize("make", [tiny_phi3, tiny_llama])
    def test_ia3_on_any_base_once_its_modules_are_picked(self, make: Callable[[], Any]) -> None:
        """PEFT asks for feedforward_modules where it knows none."""
        lab = AdapterLab(make(), tokenizer=tiny_tokenizer(chat=True))
        panel = build_panel(lab)
        form, target = panel.add_form, [name for name in panel.state.targets if "q" in name][:1]
        form.new.method.value, form.new.targets.value = "ia3", target
        form.button.click()
        lab.wait()
        assert lab.adapters["default"].target_modules == tuple(target), said(panel.notice.html)
        scales = sum(m.out_features for name, m in make().named_modules() if name.endswith(target[0]))
        assert lab.adapters["default"].parameters == scales
        assert ("feedforward_modules=[]" in panel.state.code) == (make is tiny_phi3), "where PEFT knows them, its own"
        panel.close()
        lab.close()

    def test_one_that_is_there_goes_on(self, panel: Panel, lab: FakeLab) -> None:
        form = panel.train.form
        panel.rows.by_name["robot"].compare.value = False
        form.adapter.value = "robot"
        assert form.learning_rate.value == LEARNING_RATES["IA3"]
        assert "IA3, 92.2 k parameters, loaded: it goes on" in form.known.value
        assert [control.layout.display for control in (form.name, form.new.method, form.new.size)] == ["none"] * 3
        form.steps.value = 2
        form.train.click()
        lab.wait()
        assert trained(lab) == ("robot", PAIRS, {"max_steps": 2, "learning_rate": LEARNING_RATES["IA3"]})
        assert panel.rows.by_name["robot"].compare.value, "one wants to see what it has learned"
        lab.delete_adapter("robot")
        assert form.adapter.value == ""

    def test_one_that_can_t_be_trained_says_why(self, panel: Panel, lab: FakeLab) -> None:
        form = panel.train.form
        lab.obstacles["pirate"] = {"train": f"Its base is on disk {HOSTILE}"}
        lab._emit("adapters")
        assert not form.train.disabled, "a new one can"
        form.adapter.value = "pirate"
        assert form.train.disabled
        tooltip = form.train.tooltip if form.train.has_trait("tooltip") else form.train.description_tooltip
        assert tooltip == f"Its base is on disk {HOSTILE}"
        assert "it can't be trained: Its base is on disk" in said(form.known)
        assert HOSTILE not in form.known.value
        panel.do.train(form.asked)  # as Enter would, which no button holds back
        lab.wait()
        assert "'pirate' can't be trained" in said(panel.notice.html)
        assert not [call for call in lab.calls if call[0] == "train"]
        form.adapter.value = ""
        assert not form.train.disabled

    def test_what_is_missing_is_said_and_nothing_is_trained(self, panel: Panel, lab: FakeLab) -> None:
        form = panel.train.form
        for name, pasted, words in (
            ("", LINES, "What is the adapter to be called?"),
            ("pirate", LINES, "'pirate' is there already"),
            ("mine", " \n", "Nothing to learn from"),
        ):
            form.name.value, form.data.pasted.value = name, pasted
            form.train.click()
            lab.wait()
            assert words in said(panel.notice.html)
            assert "Traceback" not in panel.notice.html.value
        form.data.pasted.value = '{"prompt": "a", "completion": "b"}\n{"prompt": "a"'
        form.train.click()
        lab.wait()
        assert "line 2 is none: mend it" in said(panel.notice.html)
        assert lab.calls == []
        assert panel.run.box.layout.display == "none"

    def test_what_arrives_just_after_the_click_still_counts(self, panel: Panel, lab: FakeLab) -> None:
        worker, gate = panel.do.worker, threading.Event()
        worker._closing = SimpleNamespace(wait=lambda seconds: gate.wait(20), set=lambda: None)  # type: ignore[assignment]
        panel.train.form.train.click()
        panel.train.form.steps.value = 2
        gate.set()
        lab.wait()
        assert trained(lab)[2]["max_steps"] == 2


class TestExamples:
    @pytest.mark.parametrize(
        ("text", "rows"),
        [
            (LINES, PAIRS),
            ("A text.\n\n  Another one.\n", ["A text.", "Another one."]),
            ('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}', None),
            ('["a", "b"]\n["c", "d"]', [["a", "b"], ["c", "d"]]),
            ('["a", "b"]', [["a", "b"]]),
            ('[["a", "b"],\n ["c", "d"]]', [["a", "b"], ["c", "d"]]),
            ('["one", "two", "three"]', ["one", "two", "three"]),
            ('{\n"prompt": "a",\n"completion": "b"}', [{"prompt": "a", "completion": "b"}]),
            ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', None),
            ("[INST] no JSON [/INST]\nat all", ["[INST] no JSON [/INST]", "at all"]),
        ],
    )
    def test_what_can_be_pasted(self, text: str, rows: Any) -> None:
        examples = pasted_examples(text)
        if rows is None:
            whole = text.splitlines() if text.startswith("{") else [text]
            rows = [json.loads(line) for line in whole]
        assert examples.value == rows
        names: dict[str, Any] = {}
        exec(examples.code, names)
        assert names[str(examples.literal)] == rows

    def test_nothing_is_incomplete(self) -> None:
        with pytest.raises(Incomplete):
            pasted_examples("\n \t\n")

    def test_what_is_long_is_not_repeated_in_the_code(self) -> None:
        examples = pasted_examples("\n".join(["a long line"] * 1000))
        assert len(examples.value) == 1000
        assert examples.code == "examples = ...  # the 1000 examples that were pasted, too long to show them here"

    def test_a_file(self, panel: Panel, lab: FakeLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "pairs.csv").write_text("prompt,completion\na,b\n", encoding="utf-8")
        (tmp_path / "picture.png").write_bytes(b"")
        monkeypatch.chdir(tmp_path)
        form = panel.train.form
        form.data.way.value = "file"
        assert form.data.file.options == ("pairs.csv",)
        form.train.click()
        lab.wait()
        assert "Which file?" in said(panel.notice.html)
        form.data.file.value = " pairs.csv "
        form.train.click()
        lab.wait()
        assert trained(lab)[1] == "pairs.csv"
        assert panel.state.code.startswith("lab.train('mine', 'pairs.csv', method='lora'")
        assert "1 prompt/completion pair from pairs.csv: 2 tokens" in panel.state.lesson

    def test_a_variable_of_the_notebook(self, panel: Panel, lab: FakeLab, namespace: dict[str, Any]) -> None:
        form = panel.train.form
        form.data.way.value = "variable"
        assert form.data.variable.options == (("none yet", ""),)
        form.train.click()
        lab.wait()
        assert "Which variable?" in said(panel.notice.html)
        frame = pd.DataFrame({"prompt": ["a"], "completion": ["b"]})
        lists = {"texts": ["a text"], "numbers": [1, 2], "empty": [], "_": ["old"], "In": ["a cell"], "no name": ["x"]}
        namespace.update(pairs=PAIRS, frame=frame, lab=lab, text="a text", **lists)
        form.data.refresh_button.click()
        assert form.data.variable.options == (
            ("choose one", ""),
            ("pairs · list of 3", "pairs"),
            ("frame · DataFrame, 1 rows", "frame"),
            ("texts · list of 1", "texts"),
        )
        form.data.variable.value = "frame"
        namespace["more"] = ["another text"]
        panel.tabs.open = "Train"
        assert len(form.data.variable.options) == 5
        assert form.data.variable.value == "frame"
        form.train.click()
        lab.wait()
        assert trained(lab)[1] is frame
        assert panel.state.code.startswith("lab.train('mine', frame, method='lora'")
        del namespace["frame"]
        form.train.click()
        lab.wait()
        assert "has no variable 'frame' any more" in said(panel.notice.html)

    def test_check_says_what_is_there_and_trains_nothing(self, panel: Panel, lab: FakeLab) -> None:
        form = panel.train.form
        form.data.check.click()
        lab.wait()
        # the fake tokenizer has a token for each word
        prompts, answers = (sum(len(text.split()) for text in texts) for texts in zip(*PAIRS))
        counts = f"{prompts + answers} tokens, {answers} of them learned, 5 in the longest"
        assert said(form.data.read) == f"3 prompt/completion pairs: {counts}"
        assert lab.calls == []
        form.share.value = 0.3
        assert form.data.read.value == "", "how many are learned is another number now"
        form.data.check.click()
        lab.wait()
        assert said(form.data.read).startswith("2 of 3 prompt/completion pairs: ")
        assert said(form.data.read).endswith("; 1 held out")
        form.data.pasted.value = "only a text"
        assert form.data.read.value == "", "it was of what stood there before"
        form.data.pasted.value = "a text\nprompt => answer"
        form.data.check.click()
        lab.wait()
        assert "row 2: prompt/completion pairs among texts" in said(panel.notice.html)


class TestCode:
    @pytest.mark.parametrize("existing", ["", "pirate"])
    def test_the_code_that_is_shown_does_the_same(self, panel: Panel, lab: FakeLab, existing: str) -> None:
        form = panel.train.form
        form.adapter.value, form.steps.value, form.share.value = existing, 2, 0.5
        form.new.targets.value = ("v_proj",)
        form.train.click()
        lab.wait()
        panel.run.code_fold.open = True
        shown = said(panel.run.code).strip()
        assert shown == panel.state.code
        again = FakeLab({"pirate": ("LORA", 8, 460_800)})
        exec(shown, {"lab": SimpleNamespace(train=again.train)})
        assert trained(again) == trained(lab)


class TestWhileTraining:
    @pytest.fixture
    def running(self, panel: Panel, lab: FakeLab) -> Iterator[threading.Semaphore]:
        """The panel after one step of 20: the others wait for permits."""
        lab.gate = threading.Semaphore(1)
        panel.train.form.steps.value = 20
        panel.train.form.train.click()
        assert lab.said.wait(20)
        yield lab.gate
        lab.gate.release(100)
        lab.wait()

    def step(self, lab: FakeLab, gate: threading.Semaphore) -> None:
        lab.said.clear()
        gate.release()
        assert lab.said.wait(20)

    def test_it_tells_where_it_is(
        self, panel: Panel, lab: FakeLab, running: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(train_run, "FLUSH_SECONDS", 0.0)
        self.step(lab, running)
        head = said(panel.run.head)
        assert "mine" in head
        assert "training…" in head
        assert "2 of 20" in head
        assert "2.000" in head
        assert "Time left" in head
        assert "Loss over 20 steps: training from 4.000 at step 1 to 2.000 at step 2" in panel.run.chart.value
        assert panel.state.busy == "Training…"
        assert panel.train.form.train.description == "Training…"
        assert panel.run.compare.layout.display == "none"

    def test_everything_else_waits(self, panel: Panel, lab: FakeLab, running: threading.Semaphore) -> None:
        panel.do.use("pirate")
        assert "Not started: still training. Wait for it, or press Stop." in said(panel.notice.html)
        assert panel.train.form.train.disabled
        assert panel.rows.by_name["pirate"].use.disabled
        assert not panel.train.form.stop.disabled
        assert not panel.prompt.stop.disabled
        assert not panel.state.elsewhere

    def test_stop_keeps_what_was_learned(self, panel: Panel, lab: FakeLab, running: threading.Semaphore) -> None:
        panel.train.form.stop.click()
        assert "stopping after this step" in said(panel.run.head)
        running.release(100)
        lab.wait()
        words = said(panel.notice.html)
        assert re.search(r"Stopped 'mine' after \d of 20 steps", words)
        assert "What it learned is kept" in words
        assert "stopped" in said(panel.run.head)
        assert "mine" in panel.rows.by_name
        assert panel.train.form.stop.disabled
        assert not panel.train.form.train.disabled

    def test_another_panel_sees_it_and_can_stop_it(
        self, panel: Panel, lab: FakeLab, running: threading.Semaphore
    ) -> None:
        other = build_panel(lab)  # type: ignore[arg-type]
        assert "another panel has started" in other.notice.html.value
        other.train.form.data.pasted.value = LINES
        other.train.form.train.click()
        assert "Not started: the lab is at work" in said(other.notice.html)
        other.train.form.stop.click()
        running.release(100)
        lab.wait()
        assert "Stopped" in said(panel.notice.html)
        assert not other.state.elsewhere
        assert "mine" in other.rows.by_name
        other.close()

    def test_closing_the_panel_stops_it(self, panel: Panel, lab: FakeLab, running: threading.Semaphore) -> None:
        panel.close()
        running.release(100)
        lab.wait()
        assert "Stopped" in said(panel.notice.html)

    def test_an_error_is_said_and_the_chart_stays(
        self, panel: Panel, lab: FakeLab, running: threading.Semaphore
    ) -> None:
        lab.fail_with = AdapterLabError("The loss became nan at step 2.")
        running.release(100)
        lab.wait()
        assert "The loss became nan at step 2." in said(panel.notice.html)
        assert "ended by an error" in said(panel.run.head)
        assert "training 4.000 at step 1" in panel.run.chart.value


def test_stop_before_the_lab_listens_still_stops(panel: Panel, lab: FakeLab) -> None:
    lab.gate = threading.Semaphore(0)
    panel.train.form.train.click()
    panel.do._stop.set()  # what Stop sets first; the lab's own flag is cleared when the training begins
    lab.gate.release(1000)
    lab.wait()
    assert "Stopped" in said(panel.notice.html)


def test_stop_while_the_data_is_read_trains_nothing(
    panel: Panel, lab: FakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = panel.do._read
    monkeypatch.setattr(panel.do, "_read", lambda *asked: (read(*asked), panel.do.stop()))
    panel.train.form.train.click()
    lab.wait()
    assert "Stopped before the training began: nothing is changed." in said(panel.notice.html)
    assert lab.calls == []
    assert panel.run.box.layout.display == "none"


def test_what_never_began_leaves_the_last_training_on_the_screen(panel: Panel, lab: FakeLab) -> None:
    panel.train.form.train.click()
    lab.wait()
    shown = panel.run.head.value
    lab.fail_with = AdapterLabError("No such file.")
    panel.train.form.train.click()
    lab.wait()
    assert "No such file." in said(panel.notice.html)
    assert panel.run.head.value == shown


def test_adalora_shows_its_ranks_while_it_runs(panel: Panel, lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_run, "FLUSH_SECONDS", 0.0)
    drawn: list[int] = []
    panel.run.ranks.observe(lambda change: drawn.extend(map(int, re.findall(r"<b>(\d+)</b>", change["new"]))), "value")
    form = panel.train.form
    form.new.method.value, form.new.r.value, form.steps.value = "adalora", 4, 5
    form.train.click()
    lab.wait()
    assert drawn == [3 * rank for rank in (4, 3, 2, 1)], "once for each change, of three layers"
    form.new.method.value = "lora"
    form.train.click()
    lab.wait()
    assert panel.run.ranks.layout.display == "none"


def test_the_held_out_loss_has_a_line_of_its_own(panel: Panel, lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_run, "FLUSH_SECONDS", 0.0)
    phases: list[str] = []
    panel.run.head.observe(lambda change: phases.append(re.search('data-phase="(.*?)"', change["new"])[1]), "value")  # type: ignore[index]
    form = panel.train.form
    form.share.value, form.steps.value = 0.5, 3
    form.train.click()
    lab.wait()
    assert list(dict.fromkeys(phases)) == ["ready", "training", "measuring", "done"]
    assert "held out 3.000 at step 2" in panel.run.chart.value


class TestForeground:
    @pytest.fixture
    def front(self, lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Panel]:
        monkeypatch.setenv("ADAPTERLAB_FOREGROUND", "1")
        panel = build_panel(lab)  # type: ignore[arg-type]
        panel.train.form.data.pasted.value = LINES
        yield panel
        panel.close()

    def test_everything_happens_in_the_thread_of_the_click(self, front: Panel, lab: FakeLab) -> None:
        threads: list[str] = []
        front.run.head.observe(lambda _: threads.append(threading.current_thread().name), "value")
        front.train.form.steps.value = 2
        front.train.form.train.click()
        assert set(threads) == {threading.current_thread().name}
        assert "Trained 'mine': 2 steps" in said(front.notice.html)
        assert front.state.busy == ""

    def test_it_says_how_to_stop_and_an_interrupt_does(self, front: Panel, lab: FakeLab) -> None:
        seen: list[str] = []

        def interrupted(*args: Any, **kwargs: Any) -> None:
            seen.append(front.notice.html.value)
            assert front.train.form.stop.disabled
            raise KeyboardInterrupt

        lab.train = interrupted  # type: ignore[method-assign,assignment]
        front.train.form.train.click()
        assert "Interrupt execution" in seen[0]
        assert "Interrupted" in front.notice.html.value
        assert front.state.busy == ""


def test_drawing_is_held_to_ten_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, drawn = [100.0], []
    monkeypatch.setattr(train_run.time, "monotonic", lambda: clock[0])
    view = RunView(PanelState(), lambda: None)
    view.begin("mine", "")
    view.head.observe(lambda change: drawn.append(change["new"]), "value")
    for step in range(1000):  # a hundred steps a second, for ten seconds
        view.progress(Progress(step, 1000, step / 100, loss=1.0))
        clock[0] += 0.01
    assert 90 <= len(drawn) <= 101


class TestPictures:
    def test_points_stand_where_their_numbers_say(self) -> None:
        chart = loss_chart([(1, 3.0), (2, 2.0), (4, 1.0)], [(0, 2.5)], 8)
        path = re.search(r'<path class="alab-line alab-trained" d="M([^"]*)"/></?', chart.split("alab-plot")[1])
        points = [tuple(map(float, point.split())) for point in path[1].split("L")]  # type: ignore[index]
        # step/8 of 1000 across; from 3 at the top to 1 at the bottom of 200
        assert points == [(125.0, 0.0), (250.0, 100.0), (500.0, 200.0)]
        assert 'd="M0.0 50.0h0"' in chart, "a dot at step 0, a quarter down"
        said = "Loss over 8 steps: training from 3.000 at step 1 to 1.000 at step 4; held out 2.500 at step 0"
        assert f'role="img" aria-label="{said}"' in chart

    @pytest.mark.parametrize("points", [[(1, 0.0)], [(1, 2.0), (2, 2.0)], [(1, 1e-9), (5, 1e6)], [(3, 1e4)]])
    def test_any_numbers_have_axes_around_them(self, points: list[tuple[int, float]]) -> None:
        chart = loss_chart(points, [], 5)
        ticks = [float(tick) for tick in re.findall(r'<span style="top:[^"]*">([^<]*)</span>', chart)]
        assert ticks == sorted(ticks)
        assert ticks[0] <= min(loss for _, loss in points)
        assert ticks[-1] >= max(loss for _, loss in points)
        assert 2 <= len(ticks) <= 7

    def test_what_is_not_finite_is_left_out(self) -> None:
        assert loss_chart([(1, math.nan), (2, math.inf)], [], 8) == ""
        assert loss_chart([], [], 0) == ""
        assert "held out" not in loss_chart([(1, 2.0)], [(1, math.nan)], 8)

    def test_the_table_of_ranks_has_each_number_and_the_sums(self) -> None:
        rows = [(0, "q_proj", 4), (0, "v_proj", 0), (1, "q_proj", 2), (None, HOSTILE, 1)]
        frame = pd.DataFrame([(*row, 4) for row in rows], columns=["layer", "module", "rank", "init_r"])
        table = ranks_table(frame.astype({"layer": "Int64"}))
        assert "<b>7</b> of 16, 1.8 in a layer" in table
        cells = [re.findall(r"<td[^>]*>(\d*)</td>", row) for row in table.split("<tr>")[2:]]
        assert cells == [["4", "2", "", "6"], ["0", "", "", "0"], ["", "", "1", "1"], ["4", "2", "1", "7"]]
        assert [float(x) for x in re.findall(r"--alab-shade:([\d.]+)", table)] == [1.0, 0.5, 0.0, 0.25]
        assert re.findall(r'<th scope="col">([^<]*)', table) == ["layer", "0", "1", "–", "sum"]
        assert not re.search("<(img|script)", table)

    def test_names_stay_text(self) -> None:
        track = Track(HOSTILE, phase="training", step=1, total=2, seconds=1.0)
        assert not re.search("<(img|script)", head_html(track))

    def test_times_in_words(self) -> None:
        assert [people_seconds(s) for s in (0.4, 9.96, 62, 600, 7500)] == [
            "0.4 s",
            "10 s",
            "62 s",
            "10 min",
            "2 h 5 min",
        ]

    def test_speed_in_words(self) -> None:
        assert [people_speed(s) for s in (0.4, 2.54, 162.3)] == ["2.5 s a step", "2.5 steps/s", "162 steps/s"]

    def test_runs_in_words(self) -> None:
        log = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
        run = TrainingRun("mine", "LoRA", history_frame(log), ranks_frame([], []), 2, 2, 5.0)
        assert run_words(run) == "Trained 'mine': 2 steps in 5.0 s, loss 3.000 → 2.000. It is a column in Compare."
        run = TrainingRun("mine", "LoRA", history_frame([]), ranks_frame([], []), 0, 2, 5.0, stopped_early=True)
        assert run_words(run).startswith("Stopped before the first step: 'mine' has learned nothing by it.")


class TestOnARealLab:
    """tiny_llama: two layers, seven linear modules in each."""

    @pytest.fixture
    def lab(self) -> Iterator[AdapterLab]:  # type: ignore[override]
        lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
        yield lab
        lab.close()

    def test_records_tell_what_the_run_tells(self, lab: AdapterLab) -> None:
        records: list[Progress] = []
        how = {"method": "adalora", "init_r": 4, "target_r": 2, "target_modules": ["q_proj", "v_proj"]}
        callbacks = watching("mine", "adalora", records.append)
        run = lab.train("mine", PAIRS, max_steps=12, eval_dataset=0.3, callbacks=callbacks, disable_tqdm=True, **how)  # type: ignore[arg-type]
        assert (records[0].step, records[0].total) == (0, 12)
        losses = {record.step: record.loss for record in records if record.loss is not None}
        held_out = {record.step: record.eval_loss for record in records if record.eval_loss is not None}
        assert losses == dict(run.history.set_index("step").loss.dropna())
        assert held_out == dict(run.history.set_index("step").eval_loss.dropna())
        assert any(record.measuring for record in records)
        assert [record.seconds for record in records] == sorted(record.seconds for record in records)
        totals = {record.step: record.ranks["rank"].sum() for record in records if record.ranks is not None}
        kept = run.history.set_index("step").total_rank.dropna()
        assert {step: totals[step] for step in kept.index} == dict(kept)
        assert records[-1].ranks is not None
        pd.testing.assert_frame_equal(records[-1].ranks, lab.ranks("mine"))
        frames = [record.ranks for record in records]
        assert all(a is b for a, b in itertools.pairwise(frames) if a.equals(b))  # type: ignore[union-attr,arg-type]

    @pytest.mark.parametrize("method", ["lora", "ia3", "adalora"])
    def test_what_is_pasted_is_learned(self, lab: AdapterLab, method: str) -> None:
        panel = build_panel(lab)
        form = panel.train.form
        form.data.pasted.value = "\n".join(f"{prompt}\t{answer}" for prompt, answer in PAIRS)
        form.new.method.value, form.steps.value, form.share.value = method, 8, 0.3
        form.train.click()
        lab.wait(60)
        run = lab.adapters["mine"].runs[-1]
        assert run.data == "2 of 3 prompt/completion pairs"
        assert said(panel.notice.html).strip().endswith(run_words(run))
        assert said(form.data.read).startswith("2 of 3 prompt/completion pairs: ")
        history = run.history
        told = f"Loss over 8 steps: training from {history.loss.dropna().iloc[0]:.3f} at step 1 to {run.loss:.3f} at step 8"
        assert told in panel.run.chart.value
        assert f"to {run.eval_loss:.3f} at step 8" in panel.run.chart.value
        if method == "adalora":
            assert panel.run.ranks.value == ranks_table(lab.ranks("mine"))
        assert lab.trainable is None
        assert lab.selection.is_base
        panel.prompt.sampling.max_new_tokens.value = 2
        panel.prompt.generate.click()
        lab.wait(60)
        assert lab.last is not None
        assert lab.last.columns == ["base", "mine"]
        assert lab.last["mine"].logit_shift > 0
        names: dict[str, Any] = {"lab": AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))}
        exec(panel.run._track.code.replace("max_steps=8", "max_steps=8, disable_tqdm=True"), names)  # type: ignore[union-attr]
        again = names["lab"].adapters["mine"].runs[-1]
        assert again.history.loss.tolist() == pytest.approx(run.history.loss.tolist(), nan_ok=True)
        names["lab"].close()
        panel.close()

    def test_stop_and_go_on(self, lab: AdapterLab) -> None:
        panel = build_panel(lab)
        form = panel.train.form
        form.data.pasted.value = LINES
        form.steps.value = 100_000
        begun = threading.Event()
        panel.run.head.observe(lambda change: "training" in change["new"] and begun.set(), "value")
        form.train.click()
        assert begun.wait(60)
        assert lab.running
        form.stop.click()
        lab.wait(60)
        first = lab.adapters["mine"].runs[0]
        assert first.stopped_early
        assert first.steps < 100_000
        assert "Stopped 'mine' after" in said(panel.notice.html)
        form.adapter.value, form.steps.value = "mine", 2
        form.train.click()
        lab.wait(60)
        assert [run.steps for run in lab.adapters["mine"].runs] == [first.steps, 2]
        panel.close()

    def test_what_a_cell_trains_is_seen(self, lab: AdapterLab) -> None:
        panel, seen = build_panel(lab), []
        panel.state.observe(lambda change: seen.append(change["new"]), "elsewhere")
        lab.train("mine", PAIRS, method="lora", max_steps=2, disable_tqdm=True)
        assert seen == [True, False]
        assert "mine" in panel.columns.cards
        panel.close()
