"""The panel as a whole: puts the parts together and is the only one that talks to the lab."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from adapterlab.columns import BASE
from adapterlab.inspection import linear_shapes, people_count
from adapterlab.methods import method_label
from adapterlab.widgets.code import call_code, column_literal, compare_code
from adapterlab.widgets.columns import ColumnsView
from adapterlab.widgets.compat import classes, needs_foreground, on_enter
from adapterlab.widgets.fold import Fold
from adapterlab.widgets.forms import AddForm, LoadForm, SaveForm
from adapterlab.widgets.header import Header, NoticeBar
from adapterlab.widgets.prompt import PromptBox
from adapterlab.widgets.results import ResultsBar
from adapterlab.widgets.rows import AdapterRows, close_all
from adapterlab.widgets.sizes import SizesView
from adapterlab.widgets.state import Notice, PanelState
from adapterlab.widgets.worker import Worker

if TYPE_CHECKING:
    from adapterlab.comparison import TokenEvent
    from adapterlab.lab import AdapterLab
    from adapterlab.preflight import Preflight

CHAT_EXAMPLES = ("What is the moon?", "How do I make a cup of tea?", "Why is the sky blue?")
ENTER_GRACE = 0.05
COMPLETION_EXAMPLES = ("The capital of France is", "Once upon a time", "The best thing about mornings is")


NO_SOURCE = "Which adapter? Give a folder, or a Hub id such as user/adapter."


class Panel(w.VBox):
    """What `lab.show()` displays. Every button calls the lab's method of the same name on the panel's one thread.

    It follows the lab from now on: changes made in Python show here. `close()` ends the thread, stops following
    and removes the panel from the page; the lab stays as it is. Closing the lab closes the panel's controls.
    """

    def __init__(self, lab: AdapterLab) -> None:
        self._lab = lab
        self._stop = threading.Event()
        self.state = PanelState()
        self.state.read(lab)
        self.state.read_history(lab)
        self.state.targets = linear_shapes(lab.model)
        self.worker = Worker(self.state, lab.track, foreground=needs_foreground())
        self._build()
        super().__init__([_style(), *self._parts])
        classes(self, "alab-panel")
        self._unsubscribe = lab.on_change(self._on_lab_change)

    def _build(self) -> None:
        state, examples = self.state, examples_for(self._lab)
        state.prompt = examples[0]
        self.header = Header(state, self.set_enabled)
        self.notice = NoticeBar(state)
        self.rows = AdapterRows(state, self.use, self.delete)
        self.load_form = LoadForm(state, self.load, self.check, self.find)
        self.add_form = AddForm(state, self.add)
        self.save_form = SaveForm(state, self.save)
        self.prompt = PromptBox(state, examples, self.generate, self.stop)
        on_enter(self.prompt.text, lambda: self.generate(grace=ENTER_GRACE))
        self.results = ResultsBar(state, self.mark)
        self.columns = ColumnsView(state)
        self.sizes = SizesView(state)
        folds: list[Fold] = [self.load_form.fold, self.add_form.fold, self.save_form.fold]
        for fold in folds[:2]:
            fold.open = not state.adapter_names
        buttons = classes(w.HBox([fold.button for fold in folds]), "alab-folds")
        title = w.HTML(
            '<div class="alab-title">Adapters<span class="alab-muted"> ticked rows get a column</span></div>'
        )
        adapters = classes(w.VBox([title, self.rows.box, buttons, *(fold.body for fold in folds)]), "alab-section")
        self._parts = [
            self.header.box,
            adapters,
            self.prompt.box,
            self.notice.html,
            self.results.box,
            self.columns.box,
            self.sizes.html,
        ]

    # What the buttons do. Each returns at once.

    def generate(self, *, grace: float = 0.0) -> None:
        """Put the prompt to the ticked columns; the result is `lab.last`.

        `grace`: seconds to leave the page for sending the prompt's last letters, when Enter ran ahead of them.
        """
        columns, sampling, asked = self.state.columns, self.state.sampling, self.state.question
        if not columns and not self.state.busy:
            self.state.notice = Notice("info", "No column is ticked: tick base or an adapter in the list above.")
            return
        lab = self._lab

        def on_token(event: TokenEvent) -> None:
            self.columns.token(event)
            if self._stop.is_set():  # pressed before the lab had begun to listen
                lab.stop()

        def job() -> None:
            if grace:
                self._stop.wait(grace)
            prompt = self.state.question if grace else asked
            self.state.code = compare_code(prompt, columns, sampling)
            self.columns.begin(self.state.prompt, columns)
            try:
                if not self._stop.is_set():
                    comparison = lab.compare(prompt, columns=list(columns), on_token=on_token, **sampling)
                    if self.state.marks == "likelihood":
                        comparison.tokens()
            finally:
                self.columns.finish()

        if not self.state.busy:
            self._stop.clear()
        self.worker.start("Generating…", job, stoppable=True)

    def stop(self) -> None:
        """End the running generation after the current token."""
        self._stop.set()
        self._lab.stop()

    def use(self, name: str) -> None:
        """Let a row act in `lab.model`, at the row's multiplier."""
        column = self.state.column(name)
        code = call_code("lab.set_adapter", column_literal(column))
        self._start("Switching…", lambda: self._lab.set_adapter(None if name == BASE else column), code)

    def delete(self, name: str) -> None:
        code = call_code("lab.delete_adapter", name)
        self._start(f"Deleting {name}…", lambda: self._lab.delete_adapter(name), code)

    def mark(self, marks: str) -> None:
        """Set words off otherwise; for "likelihood" the base reads the answers that are shown, once."""
        shown = self.state.shown

        def job() -> None:
            if shown is not None:
                shown.comparison.tokens()
            self.state.marks = marks

        if marks == "likelihood" and shown is not None:
            self.worker.start("Reading…", job)
        else:
            self.state.marks = marks

    def set_enabled(self, enabled: bool) -> None:
        """Turn all adapters in `lab.model` on or off; the selection stays."""
        call = self._lab.enable_adapters if enabled else self._lab.disable_adapters
        code = call_code("lab.enable_adapters" if enabled else "lab.disable_adapters")
        self._start("Switching…", lambda: call(), code)

    def load(self, source: str, name: str | None) -> None:
        """Load an adapter as one more row; what acts in `lab.model` stays as it was."""
        if not source:
            self.state.notice = Notice("info", NO_SOURCE)
            return
        selection = column_literal(self.state.selection)
        names = {} if name is None else {"adapter_name": name}
        lines = [call_code("lab.load_adapter", source, **names), call_code("lab.set_adapter", selection)]
        lines += [] if self.state.enabled else [call_code("lab.disable_adapters")]
        self._start(f"Loading {source}…", lambda: self._load(source, name), "\n".join(lines))

    def check(self, source: str) -> None:
        """Say whether an adapter would load here; nothing is touched."""
        if not source:
            self.state.notice = Notice("info", NO_SOURCE)
            return

        def job() -> None:
            self.state.notice = Notice("info", verdict(self._lab.check_adapter(source)))

        self._start(f"Checking {source}…", job, call_code("lab.check_adapter", source))

    def find(self) -> None:
        """Ask the Hub for adapters of this base."""

        def job() -> None:
            rows = self._lab.find_adapters().to_dict("records")
            self.state.found = tuple(
                (row["repo_id"], f"{row['repo_id']} · {row['downloads']:,} downloads") for row in rows
            )
            if not rows:
                self.state.notice = Notice("info", "The Hub lists no adapter for this base.")

        self._start("Asking the Hub…", job, call_code("lab.find_adapters"))

    def add(self, method: str, name: str, config: dict[str, Any]) -> None:
        """Add a new adapter as one more row; see `lab.add_adapter`."""
        code = call_code("lab.add_adapter", method, name, **config)
        self._start(f"Adding {name}…", lambda: self._lab.add_adapter(method, name, **config), code)

    def save(self, name: str, folder: str) -> None:
        """Save an adapter into a folder; see `lab.save_adapter`."""
        if not folder:
            self.state.notice = Notice("info", "Where to? Give a folder, such as adapters/mine.")
            return

        def job() -> None:
            self._lab.save_adapter(name, folder)
            self.state.notice = Notice("info", f"{name!r} is saved in {folder!r}.")

        self._start(f"Saving {name}…", job, call_code("lab.save_adapter", name, folder))

    def _start(self, doing: str, job: Callable[[], object], code: str) -> None:
        if self.worker.start(doing, job):
            self.state.code = code

    def close(self) -> None:
        """End the panel's thread, stop following the lab, and take the panel off the page. The lab stays."""
        self._shut()
        for child in self.children:
            close_all(child)
        super().close()

    def __repr__(self) -> str:
        return f"<AdapterLab panel: {self.state.status}>"

    def _shut(self) -> None:
        if self.state.closed:
            return
        if self.state.busy:
            self.stop()
        self.state.closed = True
        self._unsubscribe()
        self.worker.close()

    def _on_lab_change(self, kind: str) -> None:
        if kind == "closed":
            self._shut()
            self.state.notice = Notice("info", "This lab is closed. Open another with AdapterLab(…).show().")
        elif kind == "adapters":
            self.state.read(self._lab)
        elif kind == "state":
            self.state.read_selection(self._lab)
        elif kind == "history":
            self.state.read_history(self._lab)

    def _load(self, source: str, name: str | None) -> None:
        lab = self._lab
        selection, enabled = lab.selection, lab.enabled
        lab.load_adapter(source, name)
        # In Python loading selects; here it adds a row to compare and leaves what lab.model does alone.
        lab.set_adapter(selection)
        if not enabled:
            lab.disable_adapters()


def verdict(flight: Preflight) -> str:
    """A preflight in words."""
    if not flight.ok:
        return f"{flight.source} does not fit: {' Also, '.join(flight.problems)}"
    size = f"{people_count(flight.parameters)} parameters, {flight.tensors} of {flight.expected} tensors"
    return " ".join([f"{flight.source} fits: {method_label(flight.method)}, {size}.", *flight.notes])


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
