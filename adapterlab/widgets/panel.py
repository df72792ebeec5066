"""The panel as a whole: puts the parts together and follows the lab. What the buttons do stands in actions.py."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w

from adapterlab.inspection import linear_shapes
from adapterlab.widgets.actions import Actions
from adapterlab.widgets.columns import ColumnsView
from adapterlab.widgets.compat import classes, close_all, on_enter, soon
from adapterlab.widgets.fold import Fold
from adapterlab.widgets.forms import AddForm, BlendForm, LabForm, LoadForm, SaveForm
from adapterlab.widgets.header import Header, NoticeBar
from adapterlab.widgets.inspect import InspectView
from adapterlab.widgets.new_adapter import knows_feedforward
from adapterlab.widgets.prompt import PromptBox
from adapterlab.widgets.results import ResultsBar
from adapterlab.widgets.rows import AdapterRows
from adapterlab.widgets.state import Notice, PanelState, Shown
from adapterlab.widgets.tabs import Tabs
from adapterlab.widgets.train import TrainView
from adapterlab.widgets.train_run import RunView
from adapterlab.widgets.trust import TrustView

if TYPE_CHECKING:
    from adapterlab.lab import AdapterLab

CHAT_EXAMPLES = ("What is the moon?", "How do I make a cup of tea?", "Why is the sky blue?")
COMPLETION_EXAMPLES = ("The capital of France is", "Once upon a time", "The best thing about mornings is")
UNREAD = "Marks is back to words: base has not read these answers. Choose Likelihood again to let it."


class Panel(w.VBox):
    """What `lab.show()` displays. `do` is what its buttons do, `state` what it shows.

    It follows the lab from now on: changes made in Python show here. `close()` ends the thread, stops following
    and removes the panel from the page; the lab stays as it is. Closing the lab closes the panel's controls.
    """

    def __init__(self, lab: AdapterLab) -> None:
        self._lab = lab
        self.state = PanelState()
        self.state.read(lab)
        self.state.read_history(lab)
        self.state.targets = linear_shapes(lab.model)
        self.state.knows_feedforward = knows_feedforward(lab.model)
        self.columns = ColumnsView(self.state)
        self.run = RunView(self.state, lambda: self._open("Compare"))
        self.do = Actions(lab, self.state, self.columns, self.run)
        super().__init__([_style(), *self._build()])
        classes(self, "alab-panel")
        self._unsubscribe = lab.on_change(self._on_lab_change)
        for kind in ("adapters", "history", "running"):  # what has changed since the first look
            self._on_lab_change(kind)
        self._scored: Shown | None = None  # what base was last asked to read: a failure is not repeated
        self.state.observe(lambda _: self._score(), ["shown", "busy"])

    def _build(self) -> list[w.Widget]:
        state, do, examples = self.state, self.do, examples_for(self._lab)
        state.prompt = examples[0]
        self.header = Header(state, do.set_enabled)
        self.notice = NoticeBar(state)
        self.save_form = SaveForm(state, do.save)
        self.rows = AdapterRows(state, do.use, self.save_form.open_for, do.delete)
        self.load_form = LoadForm(state, do.load, do.check, do.find)
        self.add_form = AddForm(state, do.add)
        self.blend_form = BlendForm(state, do.blend)
        self.lab_form = LabForm(state, do.save_lab)
        self.prompt = PromptBox(state, examples, do.generate, do.stop)
        on_enter(self.prompt.text, do.generate)
        self.results = ResultsBar(state, do.mark)
        self.train = TrainView(state, self.run, do.train, do.check_data, do.stop, do.set_trainable)
        self.inspect = InspectView(state, do.look)
        self.trust = TrustView(state, do.verify)
        self.tabs = Tabs(
            {
                "Compare": [self.prompt.box, self.results.box, self.columns.box],
                "Train": [self.train.box],
                "Inspect": [self.inspect.box, self.trust.box],
            }
        )
        self.tabs.buttons.observe(lambda _: self.train.form.data.refresh(), "value")  # what the notebook has by now
        self.tabs.buttons.observe(lambda _: self.inspect.show(self.tabs.open == "Inspect"), "value")
        return [self.header.box, self._adapters(), self.notice.box, self.tabs.box]

    def _open(self, tab: str) -> None:
        self.tabs.open = tab

    def _adapters(self) -> w.Widget:
        folds: list[Fold] = [self.load_form.fold, self.add_form.fold, self.blend_form.fold, self.lab_form.fold]
        for fold in folds[:2]:
            fold.open = not self.state.adapter_names
        title = w.HTML(
            '<div class="alab-title">Adapters<span class="alab-muted"> ticked rows get a column</span></div>'
        )
        buttons = classes(w.HBox([fold.button for fold in folds]), "alab-folds")
        forms = [self.save_form.box, *(fold.body for fold in folds)]
        return classes(w.VBox([title, self.rows.box, buttons, *forms]), "alab-section")

    def close(self) -> None:
        """End the panel's thread, stop following the lab, and take the panel off the page. The lab stays."""
        self._shut()
        self.rows.close()
        for child in self.children:
            close_all(child)
        self.layout.close()
        super().close()

    def __repr__(self) -> str:
        return f"<AdapterLab panel: {self.state.status}>"

    def _shut(self) -> None:
        if self.state.closed:
            return
        self._unsubscribe()
        self.do.close()
        self.state.closed = True

    def _on_lab_change(self, kind: str) -> None:
        if kind == "closed":
            self._shut()
            self.state.status = self._lab.status()
            self.state.notice = Notice("info", "This lab is closed. Open another with AdapterLab(…).show().")
        elif kind == "adapters":
            self.state.read(self._lab)
        elif kind == "state":
            self.state.read_missed(self._lab)
            self.state.read_selection(self._lab)
        elif kind == "blends":
            self.state.set_blends(self._lab.blends)
        elif kind == "history":
            self.state.read_missed(self._lab)
            self.state.read_history(self._lab, own=self.do.mine())
            self.state.read_badges(self._lab)
        elif kind == "running":
            self.do.note_running()
        self.inspect.note(kind)

    def _score(self) -> None:
        """Under likelihood, let base read the answers that are shown now, if it has not yet; when what runs has ended."""
        state, shown = self.state, self.state.shown
        if shown is None or shown is self._scored or state.marks != "likelihood" or state.busy or state.closed:
            return
        if all(g.base_logprobs is not None for g in shown.generations.values()):
            return
        self._scored = shown
        if not self.do.worker.foreground:
            self.do.score()
        elif not soon(self.do.score):  # and not here: whoever changed the state may hold the lab
            state.marks = "words"
            state.notice = Notice("info", UNREAD)


def examples_for(lab: AdapterLab) -> tuple[str, ...]:
    """Prompts to start from: the demo's own questions, or questions for a chat model, or beginnings to complete."""
    from adapterlab.demo import DEMO_MODEL_ID, DEMO_QUESTIONS

    if lab.name == DEMO_MODEL_ID:
        return tuple(DEMO_QUESTIONS)
    return CHAT_EXAMPLES if getattr(lab.tokenizer, "chat_template", None) else COMPLETION_EXAMPLES


@cache
def _css() -> str:
    return (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


def _style() -> w.HTML:
    style = w.HTML(f"<style>{_css()}</style>")
    style.layout.display = "none"
    return style
