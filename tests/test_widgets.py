"""The panel without a browser: every binding in both directions, on a lab that says what it is told to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import html
import io
import random
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from fakelab import BASE_PARAMETERS, HOSTILE, FakeLab

from adapterlab import AdapterLab
from adapterlab.columns import Column
from adapterlab.comparison import Comparison
from adapterlab.errors import AdapterLabError
from adapterlab.inspection import people_bytes, people_count
from adapterlab.notices import AdapterLabWarning, say, say_meanwhile, warn
from adapterlab.widgets import Panel, build_panel
from adapterlab.widgets.actions import UNREADABLE
from adapterlab.widgets.columns import ColumnsView, hue_of
from adapterlab.widgets.compat import label_text, needs_foreground
from adapterlab.widgets.forms import EXAMPLE_ID
from adapterlab.widgets.panel import UNREAD
from adapterlab.widgets.state import MOST_TOLD, PanelState, short_share

CALLS = [
    "set_adapter",
    "enable_adapters",
    "disable_adapters",
    "load_adapter",
    "add_adapter",
    "delete_adapter",
    "save",
    "save_adapter",
    "set_trainable",
]


def as_said(call: tuple[str, Any]) -> tuple[str, Any]:
    """A call as the fake lab notes it, columns as columns, and without the settings that do nothing."""
    name, arguments = call
    if name == "set_adapter":
        return name, Column.of(arguments[0])
    if name == "compare":
        return name, (*arguments[:2], {key: value for key, value in arguments[2].items() if value})
    return call


@pytest.fixture
def lab() -> FakeLab:
    return FakeLab({"pirate": ("LORA", 8, 460_800), "robot": ("IA3", None, 92_160)})


@pytest.fixture
def panel(lab: FakeLab) -> Iterator[Panel]:
    panel = build_panel(lab)  # type: ignore[arg-type]
    yield panel
    lab.wait()
    panel.close()


def ignore(event: Any) -> None:
    pass


def press_enter(panel: Panel) -> None:
    panel.prompt.text._handle_custom_msg({"event": "submit"}, [])


@contextlib.contextmanager
def before_it_settles(panel: Panel, lab: FakeLab) -> Iterator[None]:
    """What is done inside comes in after the click and before the panel reads what was set; then the work is awaited."""
    worker, gate = panel.do.worker, threading.Event()
    closing, worker._closing = worker._closing, SimpleNamespace(wait=lambda seconds: gate.wait(20))  # type: ignore[assignment]
    yield
    gate.set()
    lab.wait()
    worker._closing = closing


def tooltip(widget: Any) -> str:
    return str(widget.tooltip if widget.has_trait("tooltip") else widget.description_tooltip)


def texts(panel: Panel) -> dict[str, str]:
    """What each card's body shows, tags and what base said instead left out."""
    return {
        label: re.sub(r"<[^>]*>", "", re.sub(r"<del>.*?</del>", "", card.body.value))
        for label, card in panel.columns.cards.items()
    }


class TestFirstScreen:
    def test_shows_status_rows_prompt_and_a_card_for_every_row(self, panel: Panel, lab: FakeLab) -> None:
        assert "some/model" in panel.header.line.value
        assert "acting now: base" in panel.header.line.value
        assert list(panel.rows.by_name) == ["base", "pirate", "robot"]
        assert "LoRA · rank 8" in panel.rows.by_name["pirate"].facts.value
        assert "461 k parameters · 1.84 MB" in panel.rows.by_name["pirate"].facts.value
        assert "loaded" in panel.rows.by_name["pirate"].facts.value
        assert panel.prompt.text.value == panel.prompt.examples[0].description
        assert list(panel.columns.cards) == ["base", "pirate", "robot"]
        assert not panel.prompt.sampling.fold.open
        assert not panel.load_form.fold.open
        assert not panel.add_form.fold.open

    def test_without_adapters_the_forms_are_open(self) -> None:
        lab = FakeLab()
        panel = build_panel(lab)  # type: ignore[arg-type]
        assert panel.load_form.fold.open
        assert panel.add_form.fold.open
        assert EXAMPLE_ID in panel.load_form.source.placeholder
        assert list(panel.columns.cards) == ["base"]
        assert panel.header.switch.layout.display == "none"
        panel.close()

    def test_demo_offers_its_own_questions(self) -> None:
        from adapterlab.demo import DEMO_MODEL_ID, DEMO_QUESTIONS

        panel = build_panel(FakeLab(name=DEMO_MODEL_ID))  # type: ignore[arg-type]
        assert [button.description for button in panel.prompt.examples] == list(DEMO_QUESTIONS)
        panel.close()

    def test_opening_the_panel_changes_nothing(self, panel: Panel, lab: FakeLab) -> None:
        assert lab.calls == []


class TestPanelToLab:
    def test_generate_compares_the_ticked_columns_with_the_settings_shown(self, panel: Panel, lab: FakeLab) -> None:
        panel.prompt.text.value = "Why?"
        panel.rows.by_name["robot"].compare.value = False
        panel.rows.by_name["pirate"].multiplier.value = 0.5
        panel.prompt.sampling.temperature.value = 0.8
        panel.prompt.sampling.max_new_tokens.value = 12
        panel.prompt.sampling.seed.value = 7
        panel.prompt.generate.click()
        lab.wait()
        settings = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 1.0, "top_k": 0, "seed": 7}
        assert lab.calls == [("compare", ("Why?", ["base", "pirate × 0.5"], settings))]
        assert texts(panel) == {g.column: g.text for g in lab.last.generations}

    def test_a_prompt_of_several_lines_gets_a_box_of_several_lines(self, panel: Panel, lab: FakeLab) -> None:
        box = panel.prompt
        assert box.lines.layout.display == "none"
        box.several.value = True
        assert box.text.layout.display == "none"
        box.lines.value = "one\n  two"
        box.generate.click()
        lab.wait()
        assert lab.calls[0][1][0] == "one\n  two"
        box.several.value = False
        assert box.several.value, "one line can't hold it"
        box.lines.value = "one"
        box.several.value = False
        assert box.text.value == "one"
        assert box.text.layout.display is None

    def test_a_system_turn_makes_chat_messages(self, lab: FakeLab) -> None:
        lab.tokenizer.chat_template = "there is one"
        panel = build_panel(lab)  # type: ignore[arg-type]
        panel.prompt.text.value = "Why?"
        panel.prompt.generate.click()
        lab.wait()
        panel.prompt.chat.system.value = "Be brief."
        panel.prompt.generate.click()
        lab.wait()
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
        assert [arguments[0] for name, arguments in lab.calls] == ["Why?", messages]
        assert f"lab.compare(\n    {messages!r}," in panel.state.code
        panel.close()

    def test_without_a_chat_template_there_is_no_system_turn(self, panel: Panel, lab: FakeLab) -> None:
        assert panel.prompt.chat.fold.button.layout.display == "none"

    def test_enter_generates(self, panel: Panel, lab: FakeLab) -> None:
        press_enter(panel)
        lab.wait()
        assert lab.last.columns == ["base", "pirate", "robot"]

    def test_letters_that_arrive_just_after_enter_are_in_the_prompt(self, panel: Panel, lab: FakeLab) -> None:
        with before_it_settles(panel, lab):
            press_enter(panel)
            panel.prompt.text.value = "What is rain?"  # the page sends the text after the key
        assert lab.last.prompts == ["What is rain?"]

    def test_an_example_fills_the_prompt(self, panel: Panel) -> None:
        panel.prompt.examples[1].click()
        assert panel.state.prompt == panel.prompt.text.value == panel.prompt.examples[1].description

    def test_a_row_at_zero_is_the_base_and_stands_once(self, panel: Panel) -> None:
        panel.rows.by_name["pirate"].multiplier.value = 0.0
        assert list(panel.columns.cards) == ["base", "robot"]

    def test_use_lets_the_row_act_at_its_multiplier(self, panel: Panel, lab: FakeLab) -> None:
        panel.rows.by_name["pirate"].multiplier.value = 1.5
        panel.rows.by_name["pirate"].use.click()
        lab.wait()
        assert lab.selection == Column.of({"pirate": 1.5})
        assert panel.rows.by_name["pirate"].use.disabled
        panel.rows.by_name["base"].use.click()
        lab.wait()
        assert lab.selection == Column()

    def test_switch_turns_all_adapters_off_and_on(self, panel: Panel, lab: FakeLab) -> None:
        panel.header.switch.value = False
        lab.wait()
        assert not lab.enabled
        assert panel.header.switch.description == "Adapters off"
        assert "adapters disabled" in panel.header.line.value
        panel.header.switch.value = True
        lab.wait()
        assert lab.enabled
        assert panel.header.switch.description == "Adapters on"

    def test_delete_takes_row_and_card_away(self, panel: Panel, lab: FakeLab) -> None:
        row = panel.rows.by_name["robot"]
        row.delete.click()
        assert row.delete.description == "Really delete?"
        panel.rows.by_name["pirate"].compare.value = True
        panel.rows.by_name["pirate"].compare.value = False
        assert row.delete.description == "Delete", "another click forgets the first one"
        panel.rows.by_name["pirate"].compare.value = True
        row.delete.click()
        row.delete.click()
        lab.wait()
        assert list(lab.adapters) == ["pirate"] == [n for n in panel.rows.by_name if n != "base"]
        assert list(panel.columns.cards) == ["base", "pirate"]

    @pytest.mark.parametrize("where", ["a click", "a click that fails", "a cell", "a selection"])
    def test_the_row_of_an_adapter_that_went_without_a_word_goes_with_the_next_call(
        self, panel: Panel, lab: FakeLab, where: str
    ) -> None:
        """`lab.model.delete_adapter` in a cell: the lab notices it at its next call."""
        del lab.adapters["robot"]
        if where == "a cell":
            lab.compare("Who is there?", on_token=lambda event: None)
        elif where == "a selection":
            lab.set_adapter("pirate")
        else:
            lab.fail_with = AdapterLabError("No adapter named 'robot'.") if "fails" in where else None
            panel.do.use("pirate")
            lab.wait()
        assert list(panel.rows.by_name) == ["base", "pirate"]
        assert "robot" not in panel.columns.cards

    def test_deleting_what_is_saved_nowhere_asks_first(self, panel: Panel, lab: FakeLab) -> None:
        lab.adapters["robot"].status = "unsaved"
        lab._emit("adapters")
        row = panel.rows.by_name["robot"]
        row.delete.click()
        assert "robot" in lab.adapters
        assert "Not saved" in row.delete.description
        row.delete.click()
        lab.wait()
        assert "robot" not in lab.adapters

    def test_load_adds_a_row_and_leaves_lab_model_alone(self, panel: Panel, lab: FakeLab) -> None:
        lab.set_adapter("pirate")
        lab.disable_adapters()
        panel.load_form.source.value = "  someone/poet "
        panel.load_form.button.click()
        lab.wait()
        assert ("load_adapter", ("someone/poet", None)) in lab.calls
        assert list(panel.rows.by_name) == ["base", "pirate", "robot", "poet"]
        assert "poet" in panel.columns.cards
        assert lab.selection == Column.of("pirate")
        assert not lab.enabled
        assert panel.header.switch.description == "Adapters off"

    def test_check_says_the_verdict_and_touches_nothing(self, panel: Panel, lab: FakeLab) -> None:
        panel.load_form.source.value = "someone/poet"
        panel.load_form.check.click()
        lab.wait()
        assert lab.calls == [("check_adapter", ("someone/poet",))]
        assert "someone/poet fits: LoRA, 461 k parameters, 60 of 60 tensors." in panel.notice.html.value
        lab.flight.tell("It is of another base.", [("shapes", HOSTILE, [2, 3], [4, 5])], problem=True)
        lab.flight.tell("It names another one.", [("base model", "name", "a", "b")], problem=False)
        panel.load_form.check.click()
        lab.wait()
        said = panel.notice.html.value
        assert "someone/poet does not fit: It is of another base. It names another one." in said
        assert "<summary>All that differs</summary>" in said
        assert "[2, 3]; expected [4, 5]" in said
        assert "base model · name: a; expected b" in said
        assert HOSTILE not in said
        panel.load_form.source.value = " "
        panel.load_form.check.click()
        lab.wait()
        assert "Which adapter?" in panel.notice.html.value
        assert len(lab.calls) == 2

    def test_what_the_hub_has_can_be_chosen(self, panel: Panel, lab: FakeLab) -> None:
        form = panel.load_form
        assert form.found.layout.display == "none"
        form.find.click()
        lab.wait()
        assert form.found.options[1] == ("someone/poet · 12,345 downloads", "someone/poet")
        form.found.value = "someone/poet"
        assert form.source.value == "someone/poet"
        lab.fail_with = AdapterLabError("The Hub can't be asked.")
        form.find.click()
        lab.wait()
        assert "The Hub can't be asked." in html.unescape(panel.notice.html.value)

    def test_load_without_a_source_says_so_and_calls_nothing(self, panel: Panel, lab: FakeLab) -> None:
        panel.load_form.button.click()
        lab.wait()
        assert lab.calls == []
        assert "Which adapter?" in panel.notice.html.value

    @pytest.mark.parametrize(
        ("method", "expected"),
        [("lora", {"r": 4}), ("adalora", {"init_r": 4, "target_r": 2}), ("ia3", {})],
    )
    def test_add_passes_method_name_rank_and_targets(
        self, panel: Panel, lab: FakeLab, method: str, expected: dict[str, int]
    ) -> None:
        form = panel.add_form
        form.new.method.value, form.name.value, form.new.r.value = method, "mine", 4
        form.new.targets.value = ("q_proj", "v_proj")
        form.button.click()
        lab.wait()
        config = {**expected, "target_modules": ["q_proj", "v_proj"]}
        assert lab.calls == [("add_adapter", (method, "mine", config))]
        assert "untrained" in panel.rows.by_name["mine"].facts.value

    @pytest.mark.parametrize(
        ("method", "targets", "expected"),
        [  # three layers of each name, 64 → 64 and 64 → 16
            ("lora", ["q_proj", "v_proj"], 3 * 4 * (64 + 64 + 64 + 16)),
            ("lora", ["v_proj"], 3 * 4 * (64 + 16)),
            ("adalora", ["v_proj"], 3 * 4 * (64 + 16 + 1)),
            ("ia3", ["q_proj", "v_proj"], 3 * (64 + 16)),
        ],
    )
    def test_the_size_of_what_would_be_added_is_said_at_once(
        self, panel: Panel, method: str, targets: list[str], expected: int
    ) -> None:
        form = panel.add_form.new
        assert form.targets.options == ("q_proj", "v_proj")
        form.method.value, form.r.value, form.targets.value = method, 4, tuple(targets)
        assert f"{', '.join(targets)}: {people_count(expected)} parameters" in form.size.value
        assert people_bytes(4 * expected) in form.size.value

    def test_save_goes_into_the_folder_and_says_so(self, panel: Panel, lab: FakeLab) -> None:
        form = panel.save_form
        assert form.box.layout.display == "none"
        panel.rows.by_name["robot"].save.click()
        assert form.box.layout.display is None
        assert "Save robot" in form.heading.value
        assert form.folder.value == "adapters/robot"
        form.folder.value = " here/it is "
        form.button.click()
        lab.wait()
        assert lab.calls == [("save_adapter", ("robot", "here/it is"))]
        assert "saved in 'here/it is'" in html.unescape(panel.notice.html.value)
        assert "trained here" in panel.rows.by_name["robot"].facts.value
        form.cancel.click()
        assert form.box.layout.display == "none"

    def test_the_whole_lab_is_saved(self, panel: Panel, lab: FakeLab) -> None:
        form = panel.lab_form
        form.fold.open = True
        form.folder.value = " my-lab "
        form.button.click()
        lab.wait()
        assert lab.calls == [("save", ("my-lab",))]
        assert "AdapterLab('my-lab') opens it again" in html.unescape(panel.notice.html.value)
        form.folder.value = ""
        form.button.click()
        lab.wait()
        assert len(lab.calls) == 1
        assert "Give a folder" in panel.notice.html.value

    def test_save_without_a_folder_says_so(self, panel: Panel, lab: FakeLab) -> None:
        panel.rows.by_name["pirate"].save.click()
        panel.save_form.folder.value = ""
        panel.save_form.button.click()
        lab.wait()
        assert lab.calls == []
        assert "Give a folder" in panel.notice.html.value

    def test_what_arrives_just_after_the_click_still_counts(self, panel: Panel, lab: FakeLab) -> None:
        """JupyterLab hands a click and what was typed before it to different threads, in whichever order."""
        with before_it_settles(panel, lab):
            panel.prompt.generate.click()
            panel.prompt.sampling.max_new_tokens.value = 12
            panel.rows.by_name["robot"].compare.value = False
        _, columns, settings = lab.calls[-1][1]
        assert columns == ["base", "pirate"]
        assert settings["max_new_tokens"] == 12
        with before_it_settles(panel, lab):
            panel.load_form.button.click()
            panel.load_form.source.value = "someone/poet"
        assert ("load_adapter", ("someone/poet", None)) in lab.calls
        with before_it_settles(panel, lab):
            panel.add_form.button.click()
            panel.add_form.name.value = "mine"
        assert "mine" in lab.adapters
        with before_it_settles(panel, lab):
            panel.rows.by_name["pirate"].use.click()
            panel.rows.by_name["pirate"].multiplier.value = 0.5
        assert lab.selection == Column.of({"pirate": 0.5})

    def test_earlier_turns_make_a_chat(self, lab: FakeLab) -> None:
        lab.tokenizer.chat_template = "there is one"
        panel = build_panel(lab)  # type: ignore[arg-type]
        chat = panel.prompt.chat
        for _ in range(3):
            chat.add.click()
        assert panel.state.turns == (("user", ""), ("assistant", ""), ("user", ""))
        for place, said in enumerate(["Hello", "Arr!", "gone again"]):
            chat._boxes[place][1].value = said
        panel.prompt.text.value = "Who are you?"
        chat.turns.children[2].children[-1].click()
        assert len(chat.turns.children) == 2
        assert chat.fold.button.description.endswith("Chat: 2 earlier turns")
        panel.prompt.generate.click()
        lab.wait()
        asked = [("user", "Hello"), ("assistant", "Arr!"), ("user", "Who are you?")]
        assert lab.calls[0][1][0] == [{"role": role, "content": content} for role, content in asked]
        panel.state.turns = (("assistant", "Set in Python"),)
        assert [(role.value, words.value) for role, words in chat._boxes] == [("assistant", "Set in Python")]
        panel.close()

    def test_a_blend_gets_a_row_and_a_column_of_its_own(self, panel: Panel, lab: FakeLab) -> None:
        form = panel.blend_form
        assert list(form.numbers) == ["pirate", "robot"]
        form.numbers["pirate"].value, form.numbers["robot"].value = 0.7, 0.3
        form.button.click()
        lab.wait()
        label = "pirate × 0.7 + robot × 0.3"
        assert list(panel.rows.by_name) == ["base", "pirate", "robot", label]
        assert "blend of 2" in panel.rows.by_name[label].facts.value
        panel.prompt.generate.click()
        lab.wait()
        assert lab.last.columns == ["base", "pirate", "robot", label]
        assert texts(panel)[label] == lab.last[label].text
        assert panel.columns.cards[label]._hue == 3
        panel.rows.by_name[label].use.click()
        lab.wait()
        assert lab.selection == Column.of({"pirate": 0.7, "robot": 0.3})
        assert panel.rows.by_name[label].use.disabled
        form.button.click()
        lab.wait()
        assert "has a row already" in panel.notice.html.value
        lab.delete_adapter("robot")
        assert list(panel.rows.by_name) == ["base", "pirate"], "a blend goes with its adapters"
        assert form.fold.button.layout.display == "none", "one adapter is no blend"

    def test_blends_are_the_labs(self, panel: Panel, lab: FakeLab) -> None:
        """Made in one panel, in another, or in a cell: all show the same, and a panel that comes later does too."""
        other = build_panel(lab)
        panel.blend_form.button.click()
        lab.wait()
        assert [blend.label for blend in lab.blends] == ["pirate × 0.5 + robot × 0.5"]
        lab.blends = [*lab.blends, Column.of(["robot", "pirate"])]
        rows = ["base", "pirate", "robot", "pirate × 0.5 + robot × 0.5", "robot + pirate"]
        later = build_panel(lab)
        assert [list(one.rows.by_name) for one in (panel, other, later)] == [rows] * 3
        other.rows.by_name["robot + pirate"].delete.click()
        assert list(panel.rows.by_name) == rows[:-1]
        for one in (other, later):
            one.close()

    def test_a_blend_is_removed_without_touching_the_lab(self, panel: Panel, lab: FakeLab) -> None:
        panel.blend_form.button.click()
        lab.wait()
        row = panel.rows.by_name["pirate × 0.5 + robot × 0.5"]
        assert row.delete.description == "Remove"
        row.delete.click()
        assert list(panel.rows.by_name) == ["base", "pirate", "robot"]
        lab.blends = [Column.of(["pirate", "robot"]), Column.of({"pirate": 0.5, "robot": 0.5})]
        exec(panel.state.code, {"lab": lab})  # what is shown is what the click did, and not the blending before it
        assert [blend.label for blend in lab.blends] == ["pirate + robot"]
        lab.blends = []
        panel.blend_form.numbers["robot"].value = 0.0
        panel.blend_form.button.click()
        lab.wait()
        assert "two adapters or more" in panel.notice.html.value
        assert lab.calls == []

    def test_a_multiplier_without_a_meaning_can_t_be_moved_and_says_why(self, panel: Panel, lab: FakeLab) -> None:
        lab.adapters["pirate"].multiplier_obstacle = "Dora is no plain ΔW that could be scaled"
        lab._emit("adapters")
        slider = panel.rows.by_name["pirate"].multiplier
        assert slider.disabled
        assert slider.description == "fixed at"
        assert "no plain ΔW" in (slider.tooltip if slider.has_trait("tooltip") else slider.description_tooltip)
        assert not panel.rows.by_name["robot"].multiplier.disabled

    def test_what_can_t_be_done_is_grey_and_says_why(self, panel: Panel, lab: FakeLab) -> None:
        lab.add_adapter("loha", "bard")
        form, row = panel.blend_form, panel.rows.by_name["bard"]
        assert not form.numbers["bard"].disabled
        assert not row.save.disabled
        lab.obstacles["bard"] = {
            "blend": "It scales nothing. Run it alone.",
            "batch": "it is shy",
            "save": f"No {HOSTILE}",
        }
        lab._emit("adapters")
        assert form.numbers["bard"].disabled
        assert form.numbers["bard"].value == 0
        assert "It scales nothing. Run it alone." in tooltip(form.numbers["bard"])
        assert row.multiplier.disabled
        assert "multiplier always 1: It scales nothing</span>" in row.facts.value
        assert "runs in turn: it is shy" in tooltip(row.compare)
        assert row.save.disabled
        assert tooltip(row.save) == f"No {HOSTILE}"
        assert tooltip(panel.rows.by_name["pirate"].save).startswith("lab.save_adapter")
        assert "in turn" not in tooltip(panel.rows.by_name["pirate"].compare)
        form.button.click()
        lab.wait()
        assert "pirate × 0.5 + robot × 0.5" in panel.rows.by_name
        lab.obstacles["robot"] = {"blend": "It is alone, too."}
        lab._emit("adapters")
        assert form.button.disabled, "one adapter is no blend"
        assert "two adapters" in tooltip(form.button)
        lab.obstacles.clear()
        lab._emit("adapters")
        assert not form.button.disabled
        assert {name: number.value for name, number in form.numbers.items()} == {
            "pirate": 0.5,
            "robot": 0.5,
            "bard": 0.5,
        }

    def test_an_empty_target_field_leaves_the_choice_to_peft(self, panel: Panel, lab: FakeLab) -> None:
        panel.add_form.button.click()
        lab.wait()
        assert lab.calls == [("add_adapter", ("lora", "default", {"r": 8}))]

    def test_nothing_ticked_says_so(self, panel: Panel, lab: FakeLab) -> None:
        for row in panel.rows.by_name.values():
            row.compare.value = False
        panel.prompt.generate.click()
        lab.wait()
        assert lab.calls == []
        assert "No column" in panel.notice.html.value


class TestLabToPanel:
    def test_set_adapter_and_disable_show(self, panel: Panel, lab: FakeLab) -> None:
        lab.set_adapter({"pirate": 0.5})
        assert "acting now: pirate × 0.5" in panel.header.line.value
        assert "in lab.model × 0.5" in panel.rows.by_name["pirate"].facts.value
        assert not panel.rows.by_name["pirate"].use.disabled  # the row itself stands at 1
        lab.disable_adapters()
        assert panel.header.switch.value is False
        assert [name for name, _ in lab.calls] == ["set_adapter", "disable_adapters"]  # no echo

    def test_load_and_delete_show_and_keep_the_other_rows_widgets(self, panel: Panel, lab: FakeLab) -> None:
        before = dict(panel.rows.by_name)
        card = panel.columns.cards["pirate"]
        panel.rows.by_name["pirate"].compare.value = True
        panel.rows.by_name["robot"].compare.value = False
        lab.load_adapter("someone/poet")
        assert list(panel.rows.by_name) == ["base", "pirate", "robot", "poet"]
        lab.delete_adapter("poet")
        assert panel.rows.by_name == before
        assert panel.columns.cards["pirate"] is card
        assert panel.rows.by_name["robot"].compare.value is False

    def test_two_panels_stay_in_step(self, panel: Panel, lab: FakeLab) -> None:
        other = build_panel(lab)  # type: ignore[arg-type]
        panel.rows.by_name["robot"].use.click()
        lab.wait()
        assert "acting now: robot" in other.header.line.value
        other.close()

    def test_state_set_in_python_reaches_every_control(self, panel: Panel) -> None:
        state = panel.state
        state.prompt, state.top_p, state.top_k, state.seed, state.temperature = "Hm", 0.5, 3, 4, 1.0
        state.compared = {**state.compared, "pirate": False}
        state.multipliers = {**state.multipliers, "robot": 2.0}
        sampling = panel.prompt.sampling
        assert (sampling.top_p.value, sampling.top_k.value, sampling.seed.value) == (0.5, 3, 4)
        assert panel.prompt.text.value == "Hm"
        assert panel.rows.by_name["pirate"].compare.value is False
        assert panel.rows.by_name["robot"].multiplier.value == 2.0
        assert list(panel.columns.cards) == ["base", "robot × 2"]
        assert "temperature 1, top-p 0.5, top-k 3, seed 4" in sampling.fold.button.description

    def test_greedy_locks_what_has_no_effect(self, panel: Panel) -> None:
        sampling = panel.prompt.sampling
        assert sampling.seed.disabled
        assert sampling.top_p.disabled
        assert sampling.top_k.disabled
        panel.state.temperature = 0.7
        assert not (sampling.seed.disabled)
        assert not (sampling.top_p.disabled)
        assert not (sampling.top_k.disabled)


class TestTabs:
    def test_one_body_at_a_time(self, panel: Panel) -> None:
        tabs = panel.tabs
        assert tabs.open == "Compare"
        for name in ("Train", "Inspect", "Compare"):
            tabs.open = name
            assert tabs.buttons.value == name
            assert [key for key, body in tabs.bodies.items() if body.layout.display is None] == [name]

    def test_who_learns_is_the_same_in_python_and_in_the_panel(self, panel: Panel, lab: FakeLab) -> None:
        panel.train.own.name.value = "robot"
        lab.wait()
        assert lab.trainable == "robot"
        assert "lab.set_trainable('robot')" in html.unescape(panel.train.own.code.value)
        lab.set_trainable("pirate")
        assert panel.train.own.name.value == "pirate"
        lab.fail_with = AdapterLabError("No.")
        panel.train.own.name.value = "robot"
        lab.wait()
        assert panel.train.own.name.value == "pirate", "what is, not what was wished"

    def test_verify_shows_the_verdict_on_the_columns_shown(self, panel: Panel, lab: FakeLab) -> None:
        assert panel.trust.button.disabled
        panel.prompt.generate.click()
        lab.wait()
        panel.trust.button.click()
        lab.wait()
        assert lab.calls[-1] == ("verify", (lab.last,))
        assert panel.state.code == "lab.verify(lab.history[0])"
        rows = re.findall(r"<th scope='row'>(\w+)</th><td>yes</td>", panel.trust.table.value)
        assert rows == ["base", "pirate", "robot"]
        assert "2.0e-06" in panel.trust.table.value
        panel.prompt.generate.click()
        lab.wait()
        assert panel.trust.table.value == "", "a verdict is on what it was made of"


class TestWhileGenerating:
    @pytest.fixture
    def running(self, panel: Panel, lab: FakeLab) -> Iterator[threading.Semaphore]:
        """The panel in mid-generation: one word of the base is out, the rest waits for permits."""
        lab.gate = threading.Semaphore(1)
        lab.answers["base"] = "one two three four"
        panel.prompt.generate.click()
        assert lab.said.wait(20)
        yield lab.gate
        lab.gate.release(100)
        lab.wait()

    def test_text_streams_in_and_the_click_has_returned(self, panel: Panel, running: threading.Semaphore) -> None:
        assert panel.state.busy == "Generating…"
        assert texts(panel)["base"] == "one"
        assert "waiting" in panel.columns.cards["pirate"].head.value

    def test_a_second_generate_is_refused_visibly(
        self, panel: Panel, lab: FakeLab, running: threading.Semaphore
    ) -> None:
        assert panel.prompt.generate.disabled
        press_enter(panel)
        assert "still generating" in panel.notice.html.value
        running.release(100)
        lab.wait()
        assert len(lab.history) == 1

    def test_what_touches_the_lab_is_locked_and_stop_is_not(self, panel: Panel, running: threading.Semaphore) -> None:
        row = panel.rows.by_name["pirate"]
        assert row.use.disabled
        assert row.delete.disabled
        assert panel.header.switch.disabled
        assert panel.load_form.button.disabled
        assert panel.add_form.button.disabled
        assert not panel.prompt.stop.disabled
        assert not row.compare.disabled

    def test_stop_ends_it_and_keeps_what_is_there(
        self, panel: Panel, lab: FakeLab, running: threading.Semaphore
    ) -> None:
        panel.prompt.stop.click()
        running.release(100)
        lab.wait()
        assert lab.last["base"].finish_reason == "stopped"
        assert texts(panel)["base"] == lab.last["base"].text == "one two"
        assert "stopped by you" in panel.columns.cards["base"].foot.value
        assert panel.state.busy == ""
        assert not panel.prompt.generate.disabled

    def test_unticking_meanwhile_waits_for_the_end(
        self, panel: Panel, lab: FakeLab, running: threading.Semaphore
    ) -> None:
        panel.rows.by_name["robot"].compare.value = False
        assert "robot" in panel.columns.cards
        running.release(100)
        lab.wait()
        assert list(panel.columns.cards) == ["base", "pirate"]

    def test_a_second_panel_sees_it_and_can_stop_it(
        self, panel: Panel, lab: FakeLab, running: threading.Semaphore
    ) -> None:
        other = build_panel(lab)  # type: ignore[arg-type]
        assert not panel.state.elsewhere
        assert "another panel has started" in other.notice.html.value
        assert not other.prompt.stop.disabled
        other.prompt.generate.click()
        assert "Not started" in other.notice.html.value
        other.prompt.stop.click()
        running.release(100)
        lab.wait()
        assert lab.last["base"].finish_reason == "stopped"
        assert len(lab.history) == 1
        assert not other.state.elsewhere
        other.prompt.generate.click()
        lab.wait()
        assert len(lab.history) == 2
        other.close()

    def test_closing_the_panel_stops_it(self, panel: Panel, lab: FakeLab, running: threading.Semaphore) -> None:
        panel.close()
        running.release(100)
        lab.wait()
        assert lab.last["base"].finish_reason == "stopped"


def test_a_lost_word_of_the_end_does_not_lock_the_panel(panel: Panel, lab: FakeLab) -> None:
    """Ctrl-C can cut off the word that somebody's comparison has ended."""
    panel.state.elsewhere = True
    panel.prompt.text.value = "Well?"
    panel.prompt.generate.click()
    lab.wait()
    assert len(lab.history) == 1
    assert not panel.state.elsewhere


def test_two_threads_that_change_the_state_do_not_meet_in_a_part_of_the_panel(panel: Panel, lab: FakeLab) -> None:
    """A click is handled while the worker still tells the parts that it is done: both redraw the list of results."""
    inside, entered, errors = threading.Event(), [], []
    render = panel.results._render

    def slow() -> None:
        entered.append(threading.current_thread())
        if len(entered) == 1:
            inside.set()
            other.join(0.2)  # comes in meanwhile, unless it has to wait
            errors.extend(thread for thread in entered if thread is not entered[0])
        render()

    panel.results._render = slow  # type: ignore[method-assign]

    def change() -> None:
        assert inside.wait(20)
        panel.state.busy = "Loading…"

    other = threading.Thread(target=change)
    other.start()
    panel.state.busy = "Generating…"
    other.join()
    assert not errors
    assert len(entered) == 2
    panel.state.busy = ""


@pytest.mark.parametrize("trait", ["busy", "stoppable"])
def test_a_part_that_fails_leaves_the_panel_usable(panel: Panel, lab: FakeLab, trait: str) -> None:
    def fail(change: Any) -> None:
        if change["new"]:
            raise ZeroDivisionError

    panel.state.observe(fail, trait)
    with pytest.raises(ZeroDivisionError):
        panel.do.generate()
    panel.state.unobserve(fail, trait)
    assert panel.state.busy == ""
    panel.do.generate()
    lab.wait()
    assert len(lab.history) == 1


class TestForeground:
    """Colab shows nothing that comes from another thread, so there the work runs where the click is handled."""

    @pytest.fixture
    def front(self, lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Panel]:
        monkeypatch.setenv("ADAPTERLAB_FOREGROUND", "1")
        panel = build_panel(lab)  # type: ignore[arg-type]
        yield panel
        panel.close()

    def test_colab_is_recognised(self, lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not needs_foreground()
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
        assert needs_foreground()

    def test_everything_happens_in_the_thread_of_the_click(self, front: Panel, lab: FakeLab) -> None:
        threads: set[str] = set()
        front.columns.title.observe(lambda _: threads.add(threading.current_thread().name), "value")
        before = set(threading.enumerate())  # the threads of closed panels may end meanwhile
        front.prompt.text.value = "Another?"
        front.prompt.generate.click()
        assert texts(front) == {g.column: g.text for g in lab.last.generations}
        assert threads == {threading.current_thread().name}
        front.do.use("pirate")
        assert lab.selection == Column.of("pirate")
        assert front.state.busy == ""
        assert set(threading.enumerate()) <= before
        lab.wait()

    def test_answers_of_a_cell_are_read_when_the_cell_has_ended(self, front: Panel, lab: FakeLab) -> None:
        """Not while it runs: it has the lab. Marks said Likelihood, and the cards marked words for good."""
        lab.compare("First?", on_token=ignore)
        front.do.mark("likelihood")

        async def cell() -> bool:
            lab.compare("Second?", on_token=ignore)
            return lab.last["pirate"].base_logprobs is None

        async def kernel() -> None:
            assert await cell()
            await asyncio.sleep(0)

        asyncio.run(kernel())
        assert front.state.marks == "likelihood"
        assert "alab-likelier" in front.columns.cards["pirate"].body.value

    def test_answers_that_come_where_there_is_no_event_loop_are_marked_by_words(
        self, front: Panel, lab: FakeLab
    ) -> None:
        lab.compare("First?", on_token=ignore)
        front.do.mark("likelihood")
        lab.compare("Second?", on_token=ignore)
        assert front.results.marks.value == front.state.marks == "words"
        assert UNREAD in front.notice.html.value
        front.results.marks.value = "likelihood"
        assert "alab-likelier" in front.columns.cards["pirate"].body.value

    def test_it_says_how_to_stop_and_an_interrupt_does(self, front: Panel, lab: FakeLab) -> None:
        said: list[str] = []

        def interrupted(*args: Any, **kwargs: Any) -> None:
            said.append(front.notice.html.value)
            assert front.prompt.stop.disabled
            raise KeyboardInterrupt

        lab.compare = interrupted  # type: ignore[method-assign,assignment]
        front.prompt.generate.click()
        assert "Interrupt execution" in said[0]
        assert "Interrupted" in front.notice.html.value
        assert front.state.busy == ""
        assert not front.prompt.generate.disabled
        lab.wait()


def test_stop_before_the_lab_listens_still_stops(panel: Panel, lab: FakeLab) -> None:
    lab.gate = threading.Semaphore(0)
    lab.answers["base"] = "one two three four"
    panel.prompt.generate.click()
    panel.do._stop.set()  # what Stop sets first; the lab's own flag is cleared when compare begins
    lab.gate.release(100)
    lab.wait()
    assert lab.history == [] or lab.last["base"].finish_reason == "stopped"


class TestResult:
    def test_card_says_who_spoke_how_fast_and_why_it_ended(self, panel: Panel, lab: FakeLab) -> None:
        panel.rows.by_name["pirate"].multiplier.value = 0.5
        panel.prompt.generate.click()
        lab.wait()
        foot = panel.columns.cards["pirate × 0.5"].foot.value
        generation = lab.last["pirate × 0.5"]
        assert "<dd>pirate × 0.5</dd>" in foot
        assert generation.weights_digest[:12] in foot
        assert "4.25" in foot
        assert "20.0 tokens/s" in foot
        assert "(eos)" in foot
        assert "<dd>none</dd>" in panel.columns.cards["base"].foot.value

    def test_an_empty_answer_is_shown_as_one(self, panel: Panel, lab: FakeLab) -> None:
        lab.answers["base"] = ""
        panel.prompt.generate.click()
        lab.wait()
        assert texts(panel)["base"] == "(empty)"

    def test_cards_outlive_generations_and_come_back_with_their_result(self, panel: Panel, lab: FakeLab) -> None:
        panel.prompt.generate.click()
        lab.wait()
        bodies = {label: card.body for label, card in panel.columns.cards.items()}
        panel.prompt.generate.click()
        lab.wait()
        assert {label: card.body for label, card in panel.columns.cards.items()} == bodies
        panel.rows.by_name["robot"].compare.value = False
        assert "robot" not in panel.columns.cards
        panel.rows.by_name["robot"].compare.value = True
        assert texts(panel)["robot"] == lab.last["robot"].text


class TestMarks:
    def test_words_that_differ_from_base_are_set_off_and_those_of_base_struck_out(
        self, panel: Panel, lab: FakeLab
    ) -> None:
        lab.answers = {"base": "the sky is <b> blue", "pirate": "the sea is <b> deep and blue", "robot": "I compute."}
        panel.prompt.generate.click()
        lab.wait()
        body = panel.columns.cards["pirate"].body.value
        assert "the <del>sky </del><ins>sea</ins> is &lt;b&gt; <ins>deep and</ins> blue" in body
        assert not re.search("<(ins|del)>", panel.columns.cards["base"].body.value)
        assert "<ins>I compute.</ins>" in panel.columns.cards["robot"].body.value
        assert "<del>" not in panel.columns.cards["robot"].body.value, "all of base struck out would tell nothing"
        panel.results.marks.value = "none"
        assert not re.search("<(ins|del)>", panel.columns.cards["pirate"].body.value)

    @pytest.mark.parametrize("marks", ["words", "likelihood"])
    def test_the_first_token_that_leaves_base_has_a_sign(self, panel: Panel, lab: FakeLab, marks: str) -> None:
        lab.answers = {"base": "the sky is blue", "pirate": "the sky be <b> blue"}
        panel.prompt.generate.click()
        lab.wait()
        lab.last.generations[1] = replace(lab.last["pirate"], first_difference=2, tie=True)
        panel.do.mark(marks)
        lab.wait()
        panel.columns._render()
        body = re.sub('<(?!span class="alab-leaves")[^>]*>', "", panel.columns.cards["pirate"].body.value)
        sign = re.escape("Leaves base here, at token 3: a tie, rounding could have done it")
        assert re.search(f'the sky ?(is )?<span class="alab-leaves" role="img" aria-label="{sign}"[^>]*>▸ ?be', body)
        assert "alab-leaves" not in panel.columns.cards["base"].body.value

    def test_likelihood_shades_tokens_with_the_numbers_on_hover_and_in_a_table(
        self, panel: Panel, lab: FakeLab
    ) -> None:
        lab.answers = {"pirate": "a <i>b"}
        panel.prompt.generate.click()
        lab.wait()
        panel.results.marks.value = "likelihood"
        lab.wait()
        assert panel.state.marks == "likelihood"
        card = panel.columns.cards["pirate"]
        # the fake's logprobs are 0, and its base's -2 for each place: likelier by 0 and 2 nats
        assert (
            'style="--alab-shade:0.25" title="+2.00 nats: 0.00 here, -2.00 under base"> &lt;i&gt;b</span>'
            in card.body.value
        )
        assert re.sub("<[^>]*>", "", card.body.value) == "a &lt;i&gt;b"
        assert "<td>2</td><td><code> &lt;i&gt;b</code></td><td>0.00</td><td>-2.00</td><td>+2.00</td>" in card.foot.value
        panel.prompt.generate.click()
        lab.wait()
        assert "alab-likelier" in panel.columns.cards["pirate"].body.value, "the next answers are read at once"

    def test_answers_that_come_while_the_panel_works_are_read_when_it_has_ended(
        self, panel: Panel, lab: FakeLab
    ) -> None:
        """Marks said Likelihood, and the cards marked words for good."""
        lab.compare("First?", on_token=ignore)
        panel.do.mark("likelihood")
        lab.wait()
        gate = threading.Event()
        panel.do._start("Working…", lambda: (gate.wait(20), say("It is done.")))
        lab.compare("Second?", on_token=ignore)
        assert "alab-likelier" not in panel.columns.cards["pirate"].body.value
        gate.set()
        lab.wait()  # for the work, which the reading follows
        lab.wait()
        assert panel.state.shown is not None
        assert panel.state.shown.prompt == "Second?"
        assert "alab-likelier" in panel.columns.cards["pirate"].body.value
        assert panel.state.marks == "likelihood"
        assert "It is done." in panel.notice.html.value, "nobody has clicked"

    @pytest.mark.parametrize("failing", [True, False])
    def test_answers_that_can_t_be_read_are_tried_once_and_marked_by_words(
        self, panel: Panel, lab: FakeLab, monkeypatch: pytest.MonkeyPatch, failing: bool
    ) -> None:
        lab.compare("First?", on_token=ignore)
        panel.do.mark("likelihood")
        lab.wait()
        tried: list[Comparison] = []

        def fill(comparison: Comparison) -> None:
            tried.append(comparison)
            if failing:
                raise AdapterLabError("No memory.")

        monkeypatch.setattr(Comparison, "_fill_base_logprobs", fill)
        lab.compare("Second?", on_token=ignore)
        lab.wait()
        lab.wait()
        assert tried == [lab.last]
        assert panel.results.marks.value == panel.state.marks == "words"
        assert ("No memory." if failing else UNREADABLE) in html.unescape(panel.notice.html.value)
        panel.do.mark("likelihood")
        lab.wait()
        assert panel.results.marks.value == "words"
        assert len(tried) == 2

    def test_marks_that_need_the_model_are_refused_while_it_runs(self, panel: Panel, lab: FakeLab) -> None:
        panel.prompt.generate.click()
        lab.wait()
        lab.gate = threading.Semaphore(0)
        panel.prompt.generate.click()
        assert panel.results.marks.disabled
        panel.do.mark("likelihood")
        assert "still generating" in panel.notice.html.value
        assert panel.results.marks.value == panel.state.marks == "words"
        lab.gate.release(100)


class TestWhatTheLabSaysDuringAClick:
    """It was printed where nobody who looks at the panel sees it."""

    def test_it_follows_the_notice_each_text_once(
        self, panel: Panel, lab: FakeLab, capsys: pytest.CaptureFixture[str]
    ) -> None:
        load = lab.load_adapter

        def loading(*arguments: Any, **keywords: Any) -> str:
            for _ in range(2):
                say("Half of it is missing.")
            warn(f"The base is another {HOSTILE}.")
            say_meanwhile("Waiting.")
            return load(*arguments, **keywords)

        def load_and_wait() -> None:
            panel.load_form.button.click()
            lab.wait()

        lab.load_adapter = loading  # type: ignore[method-assign]
        panel.load_form.source.value = "someone/poet"
        with pytest.warns(AdapterLabWarning, match="The base is another"):
            load_and_wait()
        shown = panel.notice.html.value
        assert HOSTILE not in shown
        text = html.unescape(re.sub("<[^>]*>", "", shown))
        done = "'poet' is loaded and has a column; lab.model is as it was."
        assert text == f"Note {done} Half of it is missing. The base is another {HOSTILE}."
        assert capsys.readouterr().out == "Half of it is missing.\n" * 2 + "Waiting.\n", "it is printed as ever"
        panel.do.use("pirate")
        lab.wait()
        assert panel.state.notice is None, "the next click begins anew"
        say("For nobody.")

    @pytest.mark.filterwarnings("error::adapterlab.notices.AdapterLabWarning")
    def test_an_error_comes_first_and_what_it_says_is_not_said_twice(self, panel: Panel, lab: FakeLab) -> None:
        def failing(*arguments: Any, **keywords: Any) -> None:
            say("Half of it is missing.")
            warn("The base is another.")

        lab.set_adapter = failing  # type: ignore[method-assign,assignment]
        panel.do.use("pirate")
        lab.wait()
        assert panel.state.notice is not None
        assert panel.state.notice.kind == "error"
        assert panel.state.notice.text == "AdapterLabWarning: The base is another. Half of it is missing."
        assert "in failing" in panel.state.notice.detail

    def test_what_is_long_is_folded_away(self, panel: Panel, lab: FakeLab) -> None:
        panel.do._start("Talking…", lambda: [say(f"Thing {i} is missing.") for i in range(100)])
        lab.wait()
        notice = panel.state.notice
        assert notice is not None
        assert notice.text.startswith("Thing 0 is missing. Thing 1 is")
        assert notice.text.endswith(" …")
        assert len(notice.text) <= MOST_TOLD + 2
        assert notice.detail == " ".join(f"Thing {i} is missing." for i in range(100))
        assert notice.about == "All that was said"

    def test_of_a_real_lab(self, tmp_path: Path, adapter_folders: dict[str, Path]) -> None:
        from safetensors.torch import load_file, save_file
        from standins import tiny_llama, tiny_tokenizer

        half = shutil.copytree(adapter_folders["pirate"], tmp_path / "half")
        tensors = load_file(half / "adapter_model.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if "layers.1" not in key}
        save_file(kept, half / "adapter_model.safetensors", metadata={"format": "pt"})
        real = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
        panel = build_panel(real)
        panel.load_form.source.value, panel.load_form.name.value = str(half), "poet"
        panel.load_form.button.click()
        real.wait()
        assert panel.state.notice is not None
        assert f"poet: {len(kept)} of {len(tensors)} tensors" in panel.state.notice.text
        real.set_adapter("poet")
        panel.do.delete("poet")
        real.wait()
        assert panel.state.notice is not None
        assert panel.state.notice.text == "'poet' was selected: base is selected now."
        panel.close()
        real.close()


class TestHistory:
    def test_earlier_comparisons_can_be_shown_again_with_their_own_columns(self, panel: Panel, lab: FakeLab) -> None:
        assert panel.results.history.disabled
        panel.prompt.text.value = "First?"
        panel.rows.by_name["robot"].compare.value = False
        panel.prompt.generate.click()
        lab.wait()
        panel.rows.by_name["robot"].compare.value = True
        panel.prompt.text.value = "Second?"
        panel.prompt.generate.click()
        lab.wait()
        titles = [title for title, _ in panel.results.history.options]
        assert titles == ["2 · Second? · base, pirate, robot", "1 · First? · base, pirate"]
        assert list(panel.columns.cards) == ["base", "pirate", "robot"]
        panel.results.history.value = 0
        assert list(panel.columns.cards) == ["base", "pirate"]
        assert "First?" in panel.columns.title.value
        assert texts(panel) == {g.column: g.text for g in lab.history[0].generations}

    def test_what_python_compared_shows_in_every_panel(self, panel: Panel, lab: FakeLab) -> None:
        other = build_panel(lab)  # type: ignore[arg-type]
        lab.compare("From a cell", [None, {"pirate": 0.25}], on_token=lambda event: None)
        for each in (panel, other):
            assert list(each.columns.cards) == ["base", "pirate × 0.25"]
            assert texts(each)["pirate × 0.25"] == lab.last["pirate × 0.25"].text
            assert "From a cell" in each.columns.title.value
        panel.prompt.generate.click()
        lab.wait()
        assert texts(other) == texts(panel)
        other.close()

    def test_a_new_panel_shows_the_last_comparison(self, panel: Panel, lab: FakeLab) -> None:
        panel.prompt.generate.click()
        lab.wait()
        other = build_panel(lab)  # type: ignore[arg-type]
        assert texts(other) == texts(panel)
        other.close()


class TestShowCode:
    def test_the_code_of_each_click_does_the_same_again(self, panel: Panel, lab: FakeLab) -> None:
        assert panel.results.code_fold.button.layout.display == "none", "nothing was clicked"
        panel.results.code_fold.open = True
        panel.prompt.text.value = 'What\'s "that"?\n'
        panel.rows.by_name["robot"].compare.value = False
        panel.rows.by_name["pirate"].multiplier.value = 0.5
        panel.prompt.sampling.temperature.value = 0.8
        clicks = [
            panel.prompt.generate.click,
            lambda: panel.do.use("pirate"),
            lambda: panel.do.set_enabled(False),
            lambda: panel.do.load(lambda: ("some/where", None)),
            lambda: panel.do.load(lambda: ("some/where", "here")),
            lambda: panel.do.add(lambda: ("lora", "mine", {"r": 4, "target_modules": ["q_proj"]})),
            lambda: panel.do.save(lambda: ("robot", "some/folder")),
            lambda: panel.do.save_lab(lambda: "my-lab"),
            lambda: panel.do.set_trainable("robot"),
            lambda: panel.do.set_trainable(None),
            lambda: panel.do.delete("robot"),
            lambda: panel.do.use("base"),
        ]
        for click in clicks:
            del lab.calls[:]
            click()
            lab.wait()
            assert panel.state.notice is None or panel.state.notice.kind == "info"
            shown = html.unescape(re.sub("<[^>]*>", "", panel.results.code.value))
            assert shown == panel.state.code
            again = FakeLab({"pirate": ("LORA", 8, 460_800), "robot": ("IA3", None, 92_160)})
            compare = functools.partial(again.compare, on_token=lambda event: None)
            exec(shown, {"lab": SimpleNamespace(**{n: getattr(again, n) for n in CALLS}, compare=compare)})
            assert list(map(as_said, again.calls)) == list(map(as_said, lab.calls))

    def test_greedy_code_leaves_the_dice_out(self, panel: Panel, lab: FakeLab) -> None:
        panel.prompt.text.value = "Why?"
        panel.prompt.generate.click()
        lab.wait()
        assert panel.state.code == "lab.compare('Why?', columns=[None, 'pirate', 'robot'], max_new_tokens=64)"

    def test_a_refused_click_leaves_the_code(self, panel: Panel, lab: FakeLab) -> None:
        lab.gate = threading.Semaphore(0)
        panel.prompt.generate.click()
        panel.do.use("pirate")
        lab.gate.release(100)
        lab.wait()
        assert panel.state.code.startswith("lab.compare(")

    def test_a_new_panel_shows_the_newest_of_several(self, panel: Panel, lab: FakeLab) -> None:
        for prompt in ("One?", "Two?", "Three?"):
            lab.compare(prompt, [None], on_token=lambda event: None)
        other = build_panel(lab)  # type: ignore[arg-type]
        assert "Three?" in other.columns.title.value
        assert "Three?" in panel.columns.title.value
        other.close()

    def test_what_is_shown_stands_in_the_list_however_long_that_is(self, panel: Panel, lab: FakeLab) -> None:
        for number in range(60):
            lab.compare(f"q{number}", [None], on_token=lambda event: None)
        panel.state.show(panel.state.history[0])
        assert panel.results.history.value == 0
        assert dict(map(reversed, panel.results.history.options))[0].startswith("1 · q0")  # type: ignore[arg-type]

    def test_what_has_left_the_history_can_still_be_drawn(self, panel: Panel, lab: FakeLab) -> None:
        lab.compare("Gone?", [None], on_token=lambda event: None)
        panel.state.history = ()  # as between two steps of taking over a history that somebody has cleared
        panel.state.marks = "none"
        assert "Gone?" in panel.columns.title.value
        assert "data-shown" not in panel.columns.title.value

    def test_the_sampling_of_what_is_shown_is_said(self, panel: Panel, lab: FakeLab) -> None:
        panel.prompt.sampling.temperature.value = 0.7
        panel.prompt.generate.click()
        lab.wait()
        panel.prompt.sampling.temperature.value = 0.1
        assert "temperature 0.7, seed 0" in panel.columns.title.value


class TestKeep:
    def test_links_hold_what_the_files_would(self, panel: Panel, lab: FakeLab, tmp_path: Path) -> None:
        assert panel.results.files_fold.button.layout.display == "none", "nothing to keep yet"
        panel.prompt.generate.click()
        lab.wait()
        assert panel.results.files.value == "", "made when asked for"
        panel.results.files_fold.open = True
        found = dict(
            re.findall(r'download="comparison\.(\w+)" href="data:[^,]*;base64,([^"]*)"', panel.results.files.value)
        )
        held = {kind: base64.b64decode(data).decode() for kind, data in found.items()}
        lab.last._score = None
        assert held["json"] == lab.last.to_json(tmp_path / "a.json").read_text(encoding="utf-8")
        assert held["html"] == lab.last.to_html(tmp_path / "a.html").read_text(encoding="utf-8")
        frame = pd.read_csv(io.StringIO(held["csv"]))
        assert frame["text"].tolist() == lab.last.to_frame()["text"].tolist()


class TestBlind:
    @pytest.fixture
    def hidden(self, panel: Panel, lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> Panel:
        monkeypatch.setattr(random, "sample", lambda columns, count: list(reversed(columns)))
        lab.answers = {name: f"answer {i}" for i, name in enumerate(["base", "pirate", "robot"])}
        panel.results.files_fold.open = True
        panel.results.blind.value = True
        panel.prompt.generate.click()
        lab.wait()
        return panel

    def test_nothing_in_the_columns_tells_a_name(self, hidden: Panel, lab: FakeLab) -> None:
        cards = list(hidden.columns.cards.values())
        shown = " ".join(part.value for card in cards for part in (card.head, card.body, card.foot))
        assert not re.search("base|pirate|robot|Weights|shift", shown)
        assert [re.search("<h4>(.*)</h4>", card.head.value)[1] for card in cards] == [
            "Column 1",
            "Column 2",
            "Column 3",
        ]  # type: ignore[index]
        assert [text.strip() for text in texts(hidden).values()] == ["answer 2", "answer 1", "answer 0"]
        assert {name for card in cards for name in card.box._dom_classes} == {"alab-card", "alab-hue-0"}
        assert hidden.results.files_fold.button.layout.display == "none"
        assert hidden.results.files.value == ""
        assert hidden.results.reveal.layout.display is None

    def test_touching_the_rows_moves_no_card(self, hidden: Panel, lab: FakeLab) -> None:
        before = [(card.head.value, card.body.value) for card in hidden.columns.cards.values()]
        hidden.rows.by_name["robot"].compare.value = False
        hidden.rows.by_name["pirate"].multiplier.value = 0.5
        lab.load_adapter("someone/poet")
        assert [(card.head.value, card.body.value) for card in hidden.columns.cards.values()] == before
        hidden.results.reveal.click()
        assert list(hidden.columns.cards) == ["base", "pirate × 0.5", "poet"], "what is ticked now"

    def test_nobody_sees_who_begins(self, panel: Panel, lab: FakeLab) -> None:
        panel.results.blind.value = True
        lab.gate = threading.Semaphore(2)
        panel.prompt.generate.click()
        assert lab.said.wait(20)
        assert {card.body.value for card in panel.columns.cards.values()} == {
            f'<div class="alab-text alab-writing" data-column="{card.alias}"></div>'
            for card in panel.columns.cards.values()
        }
        lab.gate.release(100)
        lab.wait()

    def test_an_earlier_one_stays_hidden_until_it_is_revealed(self, hidden: Panel, lab: FakeLab) -> None:
        hidden.results.blind.value = False
        hidden.prompt.generate.click()
        lab.wait()
        assert not hidden.state.hidden
        shown: list[str] = []
        for card in hidden.columns.cards.values():
            card.head.observe(lambda change: shown.append(change["new"]), "value")
        hidden.results.history.value = 0
        assert hidden.state.hidden
        assert shown
        assert not re.search("<h4>(base|pirate|robot)", "".join(shown))
        hidden.results.reveal.click()
        hidden.results.history.value = 1
        hidden.results.history.value = 0
        assert not hidden.state.hidden, "revealed once is revealed"

    def test_after_a_failure_what_stood_there_has_its_names(self, panel: Panel, lab: FakeLab) -> None:
        panel.prompt.generate.click()
        lab.wait()
        panel.results.blind.value = True
        lab.fail_with = AdapterLabError("No.")
        panel.prompt.generate.click()
        lab.wait()
        assert not panel.state.hidden
        assert "<h4>base</h4>" in panel.columns.cards["base"].head.value

    def test_reveal_names_them_where_they_stand(self, hidden: Panel, lab: FakeLab) -> None:
        hidden.results.reveal.click()
        cards = list(hidden.columns.cards.values())
        assert [re.search("<h4>(.*)</h4>", card.head.value)[1] for card in cards] == ["robot", "pirate", "base"]  # type: ignore[index]
        assert "alab-hue-2" in cards[0].box._dom_classes
        assert "Weights" in cards[0].foot.value
        assert hidden.results.reveal.layout.display == "none"


class TestErrors:
    def test_an_error_shows_in_words_with_its_traceback_folded(self, panel: Panel, lab: FakeLab) -> None:
        lab.fail_with = AdapterLabError("The prompt is empty: write something.")
        panel.prompt.generate.click()
        lab.wait()
        html = panel.notice.html.value
        assert "The prompt is empty: write something." in html
        assert "<details><summary>Traceback</summary>" in html
        assert "Traceback (most recent call last)" in html
        assert panel.state.busy == ""
        assert "not run yet" in panel.columns.cards["base"].head.value

    def test_an_unforeseen_error_says_its_type(self, panel: Panel, lab: FakeLab) -> None:
        lab.fail_with = ZeroDivisionError("division by zero")
        panel.header.switch.value = False
        lab.wait()
        assert "ZeroDivisionError: division by zero" in panel.notice.html.value
        assert panel.header.switch.value is True  # the switch shows what is, not what was wished

    def test_a_refusal_is_true_only_while_it_runs(self, panel: Panel, lab: FakeLab) -> None:
        lab.gate = threading.Semaphore(0)
        panel.prompt.generate.click()
        press_enter(panel)
        assert "still generating" in panel.notice.html.value
        assert panel.notice.dismiss.layout.display == "none"
        lab.gate.release(100)
        lab.wait()
        assert panel.state.notice is None

    def test_a_message_can_be_dismissed(self, panel: Panel, lab: FakeLab) -> None:
        lab.fail_with = AdapterLabError("No.")
        panel.prompt.generate.click()
        lab.wait()
        panel.notice.dismiss.click()
        assert panel.notice.html.value == ""
        assert panel.notice.box.layout.display == "none"

    def test_waiting_for_the_lab_is_said(self, panel: Panel, lab: FakeLab) -> None:
        lab.free = False
        said: list[str] = []
        panel.notice.html.observe(lambda change: said.append(change["new"]), "value")
        panel.prompt.generate.click()
        lab.wait()
        assert any("Waiting: a cell or another panel" in text for text in said)
        assert panel.state.notice is None

    def test_line_breaks_are_not_dropped_in_silence(self, panel: Panel) -> None:
        panel.state.prompt = "one\ntwo"
        panel.prompt.several.value = False
        assert panel.prompt.several.value
        assert "line breaks" in panel.notice.html.value

    def test_the_next_success_clears_it(self, panel: Panel, lab: FakeLab) -> None:
        lab.fail_with = AdapterLabError("No.")
        panel.prompt.generate.click()
        lab.wait()
        panel.prompt.generate.click()
        lab.wait()
        assert panel.state.notice is None
        assert panel.notice.html.layout.display == "none"


class TestHostileText:
    def test_nothing_hostile_reaches_the_page_as_html(self) -> None:
        lab = FakeLab({HOSTILE: ("LORA", 8, 1000)}, name=HOSTILE)
        lab.adapters[HOSTILE].status = HOSTILE
        panel = build_panel(lab)  # type: ignore[arg-type]
        lab.answers = {HOSTILE: f"{HOSTILE} and {HOSTILE}", "base": HOSTILE}
        panel.results.code_fold.open = panel.results.files_fold.open = True
        panel.prompt.text.value = HOSTILE
        pages = []
        for marks in ("words", "likelihood", "none"):
            panel.do.mark(marks)
            lab.wait()
            panel.prompt.generate.click()
            lab.wait()
            pages += [widget.value for widget in _html_widgets(panel) if "<style>" not in widget.value]
        panel.do.find()
        lab.wait()
        lab.flight.source = HOSTILE
        panel.do.check(lambda: (HOSTILE, None))
        lab.wait()
        pages.append(panel.notice.html.value)
        lab.fail_with = AdapterLabError(HOSTILE)
        panel.load_form.source.value = HOSTILE
        panel.load_form.button.click()
        lab.wait()
        pages += [widget.value for widget in _html_widgets(panel) if "<style>" not in widget.value]
        assert any("&lt;script&gt;" in page for page in pages)
        assert not any(re.search(r"<(img|script)", page) for page in pages)
        assert panel.rows.by_name[HOSTILE].compare.description == label_text(HOSTILE)
        panel.close()


class TestClosing:
    def test_close_ends_thread_and_subscription(self, panel: Panel, lab: FakeLab) -> None:
        panel.prompt.generate.click()
        lab.wait()
        threads = [t for t in threading.enumerate() if t.name.startswith("adapterlab-panel")]
        assert threads
        panel.close()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert lab.listeners == 0
        panel.close()  # twice is fine

    def test_closing_a_panel_ends_its_own_generation_only(self, panel: Panel, lab: FakeLab) -> None:
        other = build_panel(lab)  # type: ignore[arg-type]
        lab.gate = threading.Semaphore(1)
        lab.answers["base"] = "one two three"
        panel.prompt.generate.click()
        assert lab.said.wait(20)
        other.close()
        lab.gate.release(100)
        lab.wait()
        assert lab.last["base"].finish_reason == "eos"

    def test_a_panel_that_opens_meanwhile_learns_of_the_end(
        self, lab: FakeLab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The comparison ends, and an adapter comes, while the widgets are being made."""
        build = Panel._build

        def slow(panel: Panel) -> Any:
            made = build(panel)
            lab.running = False
            lab.load_adapter("someone/poet")
            lab.compare("Meanwhile", [None], on_token=lambda event: None)
            return made

        lab.running = True
        monkeypatch.setattr(Panel, "_build", slow)
        panel = build_panel(lab)  # type: ignore[arg-type]
        assert not panel.state.elsewhere
        assert "poet" in panel.rows.by_name
        assert "Meanwhile" in panel.columns.title.value
        panel.close()

    def test_closing_the_lab_locks_the_panel_and_says_so(self, panel: Panel, lab: FakeLab) -> None:
        lab.close()
        assert panel.prompt.generate.disabled
        assert panel.prompt.text.disabled
        assert "closed" in panel.notice.html.value
        assert repr(panel) == "<AdapterLab panel: some/model · closed>"
        assert "acting now" not in panel.header.line.value
        assert lab.listeners == 0
        panel.prompt.generate.click()
        press_enter(panel)
        assert lab.calls == []

    def test_a_closed_panel_has_closed_all_its_widgets(self, lab: FakeLab) -> None:
        panel = build_panel(lab)  # type: ignore[arg-type]
        panel.prompt.generate.click()
        lab.wait()
        widgets = list(_all_widgets(panel))
        assert len(widgets) > 50
        belongings = [own for widget in widgets for own in (widget.layout, getattr(widget, "style", None))]
        panel.close()
        assert all(widget.comm is None for widget in widgets)
        assert all(own.comm is None for own in belongings if hasattr(own, "comm"))


def test_flush_is_held_to_ten_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterlab.comparison import TokenEvent
    from adapterlab.widgets import columns

    lab = FakeLab()
    state = PanelState()
    state.read(lab)  # type: ignore[arg-type]
    view = ColumnsView(state)
    clock = [100.0]
    monkeypatch.setattr(columns.time, "monotonic", lambda: clock[0])
    drawn = []
    view.cards["base"].body.observe(lambda change: drawn.append(change["new"]), "value")
    view.begin("Hm", [Column()])
    drawn.clear()
    for position in range(1000):  # a hundred tokens a second, for ten seconds
        view.token(TokenEvent(0, "base", position, 7, "x"))
        clock[0] += 0.01
    assert 90 <= len(drawn) <= 101


def test_rows_read_from_the_lab(lab: FakeLab) -> None:
    lab.selection = Column.of({"pirate": 0.5, "robot": 1})
    state = PanelState()
    state.read(lab)  # type: ignore[arg-type]
    base, pirate, robot = state.rows
    assert (base.name, base.parameters, base.bytes) == ("base", BASE_PARAMETERS, 4 * BASE_PARAMETERS)
    assert (pirate.kind, robot.kind) == ("LoRA · rank 8", "IA3")
    assert pirate.share == 460_800 / BASE_PARAMETERS
    assert [row.in_model for row in state.rows] == [None, 0.5, 1.0]


def test_switching_in_python_does_not_count_the_weights_again(
    panel: Panel, lab: FakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "parameters", lambda: pytest.fail("parameters() was asked for"))
    lab.set_adapter("robot")
    assert "acting now: robot" in panel.header.line.value


def test_a_share_has_two_figures_that_matter() -> None:
    assert [short_share(x) for x in (0.00342, 0.25, 1.0)] == ["0.34 %", "25 %", "100 %"]


def test_a_column_has_its_rows_hue() -> None:
    names = ["base", *"abcdefgh"]
    assert [hue_of(Column.of(n), names) for n in ("base", "a", "f", "g")] == [0, 1, 6, 1]
    assert hue_of(Column.of({"b": 0.5, "a": 0.5}), names) == 2


def _all_widgets(widget: Any) -> Iterator[Any]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from _all_widgets(child)


def _html_widgets(panel: Panel) -> list[Any]:
    import ipywidgets

    return [widget for widget in _all_widgets(panel) if isinstance(widget, ipywidgets.HTML)]
