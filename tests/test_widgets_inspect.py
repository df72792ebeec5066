"""The Inspect tab without a browser: what it draws, when, and what it says where there is nothing to draw."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from fakelab import HOSTILE, FakeLab

from adapterlab.errors import AdapterLabError
from adapterlab.plots import make_figure
from adapterlab.widgets import Panel, build_panel
from adapterlab.widgets.inspect import ABOUT
from adapterlab.widgets.state import Notice


class PictureLab(FakeLab):
    """Its pictures are their own names. `looks`: what was drawn, as (method, arguments)."""

    def __init__(self, *arguments: Any) -> None:
        self.looks: list[tuple[str, tuple[str, ...]]] = []
        super().__init__(*arguments)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("plot_"):
            raise AttributeError(name)

        def draw(*arguments: str) -> Any:
            self.looks.append((name, arguments))
            if self.fail_with is not None:
                error, self.fail_with = self.fail_with, None
                raise error
            figure = make_figure()
            figure.text(0.1, 0.5, f"{name} {' '.join(arguments)}")
            return figure

        return draw

    def capabilities(self) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "adapter": name,
                "capability": what,
                "possible": what == "batch",
                "reason": "" if what == "batch" else HOSTILE,
            }
            for name in self.adapters
            for what in ("batch", "merge")
        )


@pytest.fixture
def lab() -> PictureLab:
    return PictureLab({"pirate": ("LORA", 8, 460_800), "robot": ("IA3", None, 92_160), "bard": ("ADALORA", 4, 1000)})


@pytest.fixture
def panel(lab: PictureLab) -> Iterator[Panel]:
    panel = build_panel(lab)  # type: ignore[arg-type]
    yield panel
    lab.wait()
    panel.close()


def look(panel: Panel, lab: FakeLab, what: str, **choice: str) -> str:
    """Open the tab and choose: what is there then."""
    panel.tabs.open = "Inspect"
    lab.wait()
    panel.inspect.what.value = what
    lab.wait()
    for name, value in choice.items():
        getattr(panel.inspect, name).value = value
        lab.wait()
    return str(panel.inspect.picture.value)


def test_nothing_is_drawn_before_somebody_looks(panel: Panel, lab: PictureLab) -> None:
    lab.add_adapter("lora", "more")
    assert not lab.looks
    panel.tabs.open = "Inspect"
    lab.wait()
    assert lab.looks == [("plot_parameters", ())]
    assert panel.inspect.picture.value.startswith("<svg")
    panel.tabs.open = "Compare"
    panel.tabs.open = "Inspect"
    lab.wait()
    assert len(lab.looks) == 1, "what was drawn is still true"


@pytest.mark.parametrize(
    ("what", "choice", "call"),
    [
        ("Sizes", {}, ("plot_parameters", ())),
        ("Memory", {}, ("plot_memory", ())),
        ("Ranks", {}, ("plot_ranks", ("bard",))),
        ("Weights", {}, ("plot_delta_norms", ("pirate",))),
        ("Weights", {"adapter": "robot"}, ("plot_delta_norms", ("robot",))),
        ("Weights", {"other": "bard"}, ("plot_subspace_overlap", ("pirate", "bard"))),
    ],
)
def test_each_picture_is_a_call_of_the_lab(
    panel: Panel, lab: PictureLab, what: str, choice: dict[str, str], call: tuple[str, tuple[str, ...]]
) -> None:
    html = look(panel, lab, what, **choice)
    name, arguments = call
    assert lab.looks[-1] == call
    assert f"{name} {' '.join(arguments)}".strip() in html
    assert panel.state.code == f"lab.{name}({', '.join(map(repr, arguments))})"
    assert ABOUT[what] in panel.inspect.about.value


def test_the_choices_are_those_that_can_be_drawn(panel: Panel, lab: PictureLab) -> None:
    look(panel, lab, "Ranks")
    assert panel.inspect.adapter.options == ("bard",)
    assert panel.inspect.other.layout.display == "none"
    look(panel, lab, "Weights", adapter="robot")
    assert panel.inspect.adapter.options == ("pirate", "robot", "bard")
    assert panel.inspect.other.options == ("alone", "pirate", "bard")
    look(panel, lab, "Memory")
    assert panel.inspect.adapter.layout.display == "none"
    look(panel, lab, "Weights")
    assert lab.looks[-1] == ("plot_delta_norms", ("robot",)), "the choice is remembered"


def test_it_is_drawn_anew_when_the_lab_changes(panel: Panel, lab: PictureLab) -> None:
    look(panel, lab, "Weights", adapter="robot")
    drawn = len(lab.looks)
    lab.delete_adapter("robot")
    lab.wait()
    assert lab.looks[drawn:] == [("plot_delta_norms", ("pirate",))]
    look(panel, lab, "Memory")
    panel.do.generate()
    lab.wait()
    lab.wait()  # the drawing begins when the generation has ended
    assert [call for call, _ in lab.looks].count("plot_memory") == 2, "a comparison has a peak of its own"


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("Weights", lambda lab: lab._emit("adapters")),
        ("Sizes", lambda lab: lab.set_trainable("pirate")),
        ("Memory", lambda lab: lab._emit("memory")),
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
def test_it_is_drawn_anew_when_nothing_in_the_rows_tells_the_change(
    panel: Panel, lab: PictureLab, what: str, change: Callable[[FakeLab], None], is_open: bool
) -> None:
    """After a second training the picture of the first one stayed; after an evaluation, a training's peak."""
    look(panel, lab, what)
    call, drawn = lab.looks[-1], len(lab.looks)
    panel.tabs.open = "Inspect" if is_open else "Train"
    change(lab)
    lab.wait()
    assert lab.looks[drawn:] == [call] * is_open
    panel.tabs.open = "Inspect"
    lab.wait()
    assert lab.looks[drawn:] == [call]


def test_memory_is_drawn_anew_whenever_somebody_looks(panel: Panel, lab: PictureLab) -> None:
    """It changes with whatever the notebook does; the others only when the lab changes."""
    for what, drawings in (("Memory", 1), ("Sizes", 0)):
        look(panel, lab, what)
        drawn = len(lab.looks)
        panel.tabs.open = "Train"
        lab._emit("running")
        panel.tabs.open = "Inspect"
        lab.wait()
        assert len(lab.looks) - drawn == drawings


def test_changes_that_come_together_are_drawn_once(panel: Panel, lab: PictureLab) -> None:
    look(panel, lab, "Sizes")
    drawn, gate = len(lab.looks), threading.Event()
    panel.do.worker._closing = SimpleNamespace(wait=lambda seconds: gate.wait(20), set=gate.set)  # type: ignore[assignment]
    for name in ("pirate", "robot"):
        lab.set_trainable(name)
        lab._emit("adapters")
    gate.set()
    lab.wait()
    assert lab.looks[drawn:] == [("plot_parameters", ())]


def test_in_the_foreground_the_changes_of_a_cell_are_drawn_once_when_it_has_ended(
    lab: PictureLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERLAB_FOREGROUND", "1")
    panel = build_panel(lab)  # type: ignore[arg-type]
    look(panel, lab, "Sizes")
    drawn = len(lab.looks)

    async def kernel() -> int:
        for name in ("pirate", "robot", "bard"):
            lab.set_trainable(name)
        within = len(lab.looks)
        await asyncio.sleep(0)
        return within

    assert asyncio.run(kernel()) == drawn
    assert lab.looks[drawn:] == [("plot_parameters", ())]
    panel.close()


def test_a_selection_draws_nothing_that_does_not_depend_on_it(panel: Panel, lab: PictureLab) -> None:
    look(panel, lab, "Weights")
    drawn = len(lab.looks)
    lab.set_adapter("pirate")
    lab.wait()
    assert len(lab.looks) == drawn


@pytest.mark.parametrize(
    ("what", "other", "label"),
    [
        ("Sizes", "", "Sizes of base and adapters"),
        ("Memory", "", "Memory of base and adapters"),
        ("Ranks", "", "Ranks of bard"),
        ("Weights", "", "Weights of pirate"),
        ("Weights", "bard", "Weights of pirate against bard"),
    ],
)
def test_the_label_names_what_the_picture_is_of(
    panel: Panel, lab: PictureLab, what: str, other: str, label: str
) -> None:
    html = look(panel, lab, what, **({"other": other} if other else {}))
    assert f'aria-label="{label}"' in html


def test_what_was_told_before_stays(panel: Panel, lab: PictureLab) -> None:
    look(panel, lab, "Sizes")
    panel.do.add(lambda: ("lora", "new", {}))
    lab.wait()
    lab.wait()
    assert lab.looks[-1] == ("plot_parameters", ())
    assert panel.state.notice is not None
    assert "'new' is added" in panel.state.notice.text
    assert panel.state.code.startswith("lab.add_adapter"), "a picture drawn anew is no click"


def test_weights_are_not_read_while_somebody_else_changes_them(panel: Panel, lab: PictureLab) -> None:
    look(panel, lab, "Weights")
    drawn = len(lab.looks)
    lab.set_running(True)
    lab._emit("adapters")
    panel.inspect.adapter.value = "robot"
    lab.wait()
    assert len(lab.looks) == drawn
    panel.inspect.what.value = "Memory"
    lab.wait()
    assert lab.looks[-1] == ("plot_memory", ()), "what is in memory can be looked at meanwhile"
    panel.inspect.what.value = "Weights"
    lab.set_running(False)
    lab.wait()
    assert lab.looks[-1] == ("plot_delta_norms", ("robot",))


def test_why_there_is_no_picture_is_said_in_its_place(panel: Panel, lab: PictureLab) -> None:
    look(panel, lab, "Sizes")
    panel.state.notice = Notice("info", "Something else.")
    lab.fail_with = AdapterLabError(f"no factors {HOSTILE}")
    html = look(panel, lab, "Weights")
    assert "no factors &lt;img" in html
    assert "<img" not in html
    assert panel.state.notice.text == "Something else."
    lab.fail_with = RuntimeError("broken")
    look(panel, lab, "Memory")
    assert panel.state.notice.kind == "error"
    assert "RuntimeError: broken" in panel.state.notice.text


def test_abilities_are_a_table_with_the_reasons(panel: Panel, lab: PictureLab) -> None:
    html = look(panel, lab, "Abilities")
    assert html.count("<td>yes</td>") == 3
    assert html.count(">no</td>") == 3
    assert "<img" not in html
    assert "<script" not in html
    assert panel.state.code == "lab.capabilities()"


def test_a_lab_without_adapters_says_so() -> None:
    lab = PictureLab()
    panel = build_panel(lab)  # type: ignore[arg-type]
    assert "There is no adapter yet" in look(panel, lab, "Weights")
    assert panel.state.code == ""
    assert "No adapter here allocates ranks" in look(panel, lab, "Ranks")
    assert panel.state.code == "", "there is no call to show"
    assert "There is no adapter yet" in look(panel, lab, "Abilities")
    assert look(panel, lab, "Sizes").startswith("<svg")
    panel.close()


def test_names_come_out_escaped(lab: PictureLab) -> None:
    lab.adapters[HOSTILE] = lab.adapters.pop("robot")
    panel = build_panel(lab)  # type: ignore[arg-type]
    html = look(panel, lab, "Weights", adapter=HOSTILE)
    assert lab.looks[-1] == ("plot_delta_norms", (HOSTILE,))
    assert "<img" not in html
    assert "<script" not in html
    panel.close()


def test_a_closed_lab_closes_it(panel: Panel, lab: PictureLab) -> None:
    look(panel, lab, "Sizes")
    drawn = len(lab.looks)
    lab.close()
    assert panel.inspect.what.disabled
    panel.inspect.what.value = "Memory"
    assert len(lab.looks) == drawn
