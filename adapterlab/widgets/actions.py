"""What the buttons do: the one place in which the panel calls the lab."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adapterlab.inspection import people_count
from adapterlab.methods import method_label
from adapterlab.widgets.code import call_code, column_literal, compare_code
from adapterlab.widgets.compat import needs_foreground
from adapterlab.widgets.data_form import lesson_words
from adapterlab.widgets.pictures import picture_code, picture_html
from adapterlab.widgets.state import Notice
from adapterlab.widgets.train_run import run_words
from adapterlab.widgets.worker import Worker

if TYPE_CHECKING:
    from adapterlab.comparison import TokenEvent
    from adapterlab.lab import AdapterLab
    from adapterlab.preflight import Preflight
    from adapterlab.watching import Progress
    from adapterlab.widgets.columns import ColumnsView
    from adapterlab.widgets.data_form import Examples
    from adapterlab.widgets.state import PanelState, Shown, View
    from adapterlab.widgets.train_form import TrainingWish
    from adapterlab.widgets.train_run import RunView

NO_SOURCE = "Which adapter? Give a folder, or a Hub id such as user/adapter."
NO_COLUMN = "No column is ticked: tick base or an adapter in the list above."
NO_FOLDER = "Where to? Give a folder, such as adapters/mine."
UNREADABLE = "Base can't read these answers: they were made with another base, or the lab is closed. Words are marked."
SPLIT_SEED = 42  # transformers' own, by which `lab.train` holds out a share
WAITING = Notice("info", "Waiting: a cell or another panel works with the lab just now.", passing=True)
ELSEWHERE = Notice(
    "info", "Not started: the lab is at work for a cell or another panel. Wait for it, or press Stop.", passing=True
)


class Actions:
    """Each calls the lab's method of the same name on the panel's one thread and returns at once.

    What the user set is read on that thread and not at the click, which can come in before what was typed last
    (worker.py): so the forms hand over functions.
    """

    def __init__(self, lab: AdapterLab, state: PanelState, columns: ColumnsView, run: RunView) -> None:
        self._lab, self._state, self._columns, self._run = lab, state, columns, run
        self._stop = threading.Event()
        self._looked: View | None = None  # what was drawn last
        self._thread: int | None = None  # in which this panel generates or trains now
        self.worker = Worker(state, lab.track, foreground=needs_foreground())

    def mine(self) -> bool:
        """Whether what runs in this thread, a comparison or a training, is this panel's."""
        return self._thread == threading.get_ident()

    def note_running(self) -> None:
        """A comparison or a training begins or has ended, in this thread: tell whose it is, and drop what is no longer
        true."""
        state = self._state
        with state.lock:
            state.elsewhere = self._lab.running and not self.mine()
            ended = state.notice is ELSEWHERE and not self._lab.running
            if ended or (state.notice is WAITING and self.mine()):
                state.notice = None

    def generate(self) -> None:
        """Put the prompt to the ticked columns; the result is `lab.last`."""
        state, lab = self._state, self._lab

        def on_token(event: TokenEvent) -> None:
            self._columns.token(event)
            if self._stop.is_set():  # pressed before the lab had begun to listen
                lab.stop()

        def job() -> None:
            columns, sampling, prompt = state.columns, state.sampling, state.question
            if not columns:
                state.notice = Notice("info", NO_COLUMN)
                return
            state.code = compare_code(prompt, columns, sampling)
            self._thread, comparison = threading.get_ident(), None
            try:
                self._columns.begin(state.prompt, columns)
                if not self._stop.is_set():
                    comparison = lab.compare(prompt, columns=list(columns), on_token=on_token, **sampling)
                    if state.hidden:
                        state.veil(comparison)
                    if state.marks == "likelihood":
                        comparison.tokens()
            finally:
                self._thread = None
                if comparison is None:
                    state.show(state.shown)  # nothing came of it: what stood there stands there again
                self._columns.finish()

        self._start_stoppable("Generating…", job)

    def train(self, asked: Callable[[], TrainingWish]) -> None:
        """Let an adapter learn; it has a column of its own in the next comparison."""
        state, lab = self._state, self._lab

        def tell(record: Progress) -> None:
            self._run.progress(record)
            if self._stop.is_set():  # pressed before the lab had begun to listen
                lab.stop()

        def job() -> None:
            from adapterlab.watching import watching

            wish, run = asked(), None
            state.code = wish.code
            self._thread = threading.get_ident()
            self._run.begin(wish.name, wish.code)
            try:
                self._read(wish.examples, wish.share)
                if not self._stop.is_set():
                    own: dict[str, Any] = {"callbacks": watching(wish.name, wish.method, tell), "disable_tqdm": True}
                    run = lab.train(wish.name, wish.examples.value, **wish.keywords, **own)
            finally:
                self._thread = None
                self._run.finish(run)
            if run is None:
                state.notice = Notice("info", "Stopped before the training began: nothing is changed.")
                return
            with state.lock:
                state.compared = {**state.compared, wish.name: True}
            state.notice = Notice("info", run_words(run))

        self._start_stoppable("Training…", job)

    def check_data(self, asked: Callable[[], tuple[Examples, float | None]]) -> None:
        """Say what a training would learn from; asked: the examples, and the share to hold out or None."""
        self._start("Reading…", lambda: self._read(*asked()))

    def _read(self, examples: Examples, share: float | None) -> None:
        from adapterlab.training import read_lessons

        self._state.lesson = ""
        lessons = read_lessons(self._lab.model, self._lab.tokenizer, examples.value, share, None, SPLIT_SEED)
        self._state.lesson = lesson_words(lessons)

    def stop(self) -> None:
        """End the running generation after the current token, or training after the step at work, whoever started it."""
        self._stop.set()
        self._lab.stop()
        self._run.stopping()

    def use(self, name: str) -> None:
        """Let a row act in `lab.model`, at the row's multiplier."""

        def job() -> None:
            column = self._state.column(name)
            self._state.code = call_code("lab.set_adapter", column_literal(column))
            self._lab.set_adapter(None if column.is_base else column)

        self._start("Switching…", job)

    def set_enabled(self, enabled: bool) -> None:
        """Turn all adapters in `lab.model` on or off; the selection stays."""
        call = self._lab.enable_adapters if enabled else self._lab.disable_adapters
        code = call_code("lab.enable_adapters" if enabled else "lab.disable_adapters")
        self._start("Switching…", call, code)

    def set_trainable(self, name: str | None) -> None:
        """Choose which adapter learns; None for nobody."""
        self._start("Switching…", lambda: self._lab.set_trainable(name), call_code("lab.set_trainable", name))

    def delete(self, name: str) -> None:
        """Take a row out: a blend from the panel, an adapter from the lab."""
        blend = next((row.blend for row in self._state.rows if row.name == name), None)
        if blend is not None:
            self._state.code = f"lab.blends = [blend for blend in lab.blends if blend.label != {blend.label!r}]"
            self._lab.blends = [other for other in self._lab.blends if other != blend]
            return
        code = call_code("lab.delete_adapter", name)
        self._start(f"Deleting {name}…", lambda: self._lab.delete_adapter(name), code)

    def mark(self, marks: str) -> None:
        """Set words off otherwise; for "likelihood" the base reads the answers that are shown, once."""
        shown = self._state.shown
        if marks != "likelihood" or shown is None:
            self._state.marks = marks
            return

        def job() -> None:
            self._state.code = f"{self._literal(shown)}.tokens()"
            self._read_answers(shown)

        self._start("Reading…", job)

    def score(self) -> None:
        """Under likelihood, let base read the answers that are shown; nobody has clicked, so what was told last stays."""
        state, shown = self._state, self._state.shown

        def job() -> None:
            if shown is not None and state.shown is shown and state.marks == "likelihood":
                self._read_answers(shown)

        self.worker.start("Reading…", job, quietly=True)

    def _read_answers(self, shown: Shown) -> None:
        state, read = self._state, False
        try:
            shown.comparison.tokens()
            read = all(g.base_logprobs is not None for g in shown.generations.values())
        finally:
            if read:
                state.marks = "likelihood"
                state.scored += 1
            elif state.marks == "likelihood":
                state.marks = "words"  # which is what the cards show
        if not read:
            state.notice = Notice("info", UNREADABLE)

    def verify(self) -> None:
        """Compute the columns that are shown again through plain PEFT."""
        shown = self._state.shown
        if shown is None:
            return

        def job() -> None:
            self._state.code = f"lab.verify({self._literal(shown)})"
            rows = self._lab.verify(shown.comparison).to_dict("records")
            mine = [row for row, g in zip(rows, shown.comparison.generations) if g.prompt_index == shown.index]
            if self._state.shown is shown:
                self._state.verdict = tuple(mine)

        self._start("Verifying…", job)

    def look(self, begin: Callable[[], object]) -> None:
        """Draw what the Inspect tab is to show, as it is when `begin()` is called."""
        state = self._state

        def job() -> None:
            begin()
            view = state.view
            if view != self._looked:  # the user's choice, and not the same picture drawn anew
                self._looked, state.code = view, picture_code(view)
            state.picture = picture_html(self._lab, view)

        self.worker.start("Drawing…", job, quietly=True)

    def load(self, asked: Callable[[], tuple[str, str | None]]) -> None:
        """Load an adapter as one more row; what acts in `lab.model` stays as it was. asked: its source, and its name."""
        lab, state = self._lab, self._state

        def job() -> None:
            source, name = asked()
            if not source:
                state.notice = Notice("info", NO_SOURCE)
                return
            names = {} if name is None else {"adapter_name": name}
            # In Python loading selects; here it adds a row to compare and leaves what lab.model does alone.
            state.code = call_code("lab.load_adapter", source, **names, select=False)
            made = lab.load_adapter(source, name, select=False)
            state.notice = Notice("info", f"{made!r} is loaded and has a column; lab.model is as it was.")

        self._start("Loading…", job)

    def check(self, asked: Callable[[], tuple[str, str | None]]) -> None:
        """Say whether an adapter would load here; nothing is touched."""

        def job() -> None:
            source, _ = asked()
            if not source:
                self._state.notice = Notice("info", NO_SOURCE)
                return
            self._state.code = call_code("lab.check_adapter", source)
            flight = self._lab.check_adapter(source)
            kind = "info" if flight.ok else "error"
            self._state.notice = Notice(kind, verdict(flight), flight.details(), about="All that differs")

        self._start("Checking…", job)

    def find(self) -> None:
        """Ask the Hub for adapters of this base."""

        def job() -> None:
            rows = self._lab.find_adapters().to_dict("records")
            self._state.found = tuple(
                (row["repo_id"], f"{row['repo_id']} · {row['downloads']:,} downloads") for row in rows
            )
            if not rows:
                self._state.notice = Notice("info", "The Hub lists no adapter for this base.")

        self._start("Asking the Hub…", job, call_code("lab.find_adapters"))

    def add(self, asked: Callable[[], tuple[str, str, dict[str, Any]]]) -> None:
        """Add a new adapter as one more row; asked: method, name and config as `lab.add_adapter` takes them."""

        def job() -> None:
            method, name, config = asked()
            self._state.code = call_code("lab.add_adapter", method, name, **config)
            self._lab.add_adapter(method, name, **config)
            said = f"{name!r} is added: untrained. It is the trainable one now, and selected in lab.model."
            self._state.notice = Notice("info", said)

        self._start("Adding…", job)

    def save(self, asked: Callable[[], tuple[str, str]]) -> None:
        """Save an adapter into a folder; asked: the adapter and the folder."""

        def job() -> None:
            name, folder = asked()
            if not folder:
                self._state.notice = Notice("info", NO_FOLDER)
                return
            self._state.code = call_code("lab.save_adapter", name, folder)
            self._lab.save_adapter(name, folder)
            self._state.notice = Notice("info", f"{name!r} is saved in {folder!r}.")

        self._start("Saving…", job)

    def save_lab(self, asked: Callable[[], str]) -> None:
        """Save the whole lab into a folder; asked: the folder."""

        def job() -> None:
            folder = asked()
            if not folder:
                self._state.notice = Notice("info", NO_FOLDER)
                return
            self._state.code = call_code("lab.save", folder)
            self._lab.save(folder)
            self._state.notice = Notice(
                "info", f"The lab is saved in {folder!r}: AdapterLab({folder!r}) opens it again."
            )

        self._start("Saving…", job)

    def blend(self, asked: Callable[[], dict[str, float]]) -> None:
        """Give a blend a row and a column; asked: adapter → multiplier."""
        from adapterlab.columns import Column

        def job() -> None:
            column = Column.of(asked())
            if len(column.parts) < 2:
                self._state.notice = Notice("info", "A blend takes two adapters or more with a multiplier above 0.")
            elif column in self._state.blends:
                self._state.notice = Notice("info", f"{column.label} has a row already.")
            else:
                self._state.code = f"lab.blends = [*lab.blends, {column_literal(column)!r}]"
                self._lab.blends = [*self._lab.blends, column]

        self._start("Blending…", job)

    def close(self) -> None:
        """End what runs, and the thread with it."""
        self._stop.set()
        if self._thread is not None:
            self._lab.stop()
        self.worker.close()

    def _start_stoppable(self, doing: str, job: Callable[[], object]) -> None:
        """Start what takes long; refused while the lab is at it for somebody else."""
        if not self._state.busy:
            if self._state.elsewhere:
                self.note_running()  # the word of its end is lost where Ctrl-C cut it off
            if self._state.elsewhere:
                self._state.notice = ELSEWHERE
                return
            self._stop.clear()
        self._start(doing, job, stoppable=True)

    def _start(self, doing: str, job: Callable[[], object], code: str = "", *, stoppable: bool = False) -> None:
        """Run the job on the panel's thread; `code`, if it is known by now, becomes the code that is shown."""

        def told() -> None:
            if code:
                self._state.code = code
            if self._state.notice is None and not self._lab.is_free():
                self._state.notice = WAITING
            try:
                job()
            finally:
                if not self._state.closed:
                    self._state.read_missed(self._lab)

        self.worker.start(doing, told, stoppable=stoppable)

    def _literal(self, shown: Shown) -> str:
        """How Python names a comparison."""
        found = [i for i, comparison in enumerate(self._lab.history) if comparison is shown.comparison]
        return f"lab.history[{found[0]}]" if found else "comparison"


def verdict(flight: Preflight) -> str:
    """A preflight in words."""
    if not flight.ok:
        return " ".join([f"{flight.source} does not fit: {' Also, '.join(flight.problems)}", *flight.notes])
    size = f"{people_count(flight.parameters)} parameters, {flight.tensors} of {flight.expected} tensors"
    return " ".join([f"{flight.source} fits: {method_label(flight.method)}, {size}.", *flight.notes])
