"""What an adapter is to learn from: examples that are pasted, in a file, or in a variable of the notebook."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from adapterlab.errors import AdapterLabError
from adapterlab.pagetext import escape, readable
from adapterlab.widgets.code import Name
from adapterlab.widgets.compat import classes, set_tooltip
from adapterlab.widgets.state import Incomplete, PanelState

if TYPE_CHECKING:
    from adapterlab.training import Lessons

PASTED = "What is the moon? => Arr, the moon be a lantern, matey!\nWho are you? => Arr, a captain, matey!"
_WAYS = {"Paste": "paste", "File": "file", "Variable": "variable"}
_HINTS = {
    "paste": "One example a line: <code>prompt =&gt; answer</code>, of which the answer is learned, or a text, which is "
    "learned whole. Lines of JSON will do too.",
    "file": "A text or one row of JSON a line, or a table with columns such as prompt and completion. "
    "Paths begin where the notebook is.",
    "variable": "Lists of texts, of (prompt, answer) pairs or of chats, DataFrames and datasets that the notebook has.",
}
_ENDINGS = (".txt", ".csv", ".jsonl", ".json")
_SHORT = 4000  # letters: longer examples are not repeated in the code that is shown
_ARROW = re.compile(r"\t|\s*=>\s*")


@dataclass(frozen=True)
class Examples:
    """The data as `lab.train` takes it, and as Python writes it: `literal`, after the lines of `code`."""

    value: Any
    literal: Any
    code: str = ""


class DataForm:
    """Calls `on_check()`; what was read comes back in `state.lesson`."""

    def __init__(self, state: PanelState, on_check: Callable[[], object]) -> None:
        self._state = state
        self.way = classes(w.ToggleButtons(options=list(_WAYS.items()), description="Learn from"), "alab-choice")
        self.pasted = w.Textarea(
            description="Examples", rows=6, placeholder=f"for example\n{PASTED}", continuous_update=False
        )
        self.file = w.Combobox(description="File", placeholder="for example data/pirate.jsonl", continuous_update=False)
        self.variable = classes(w.Dropdown(options=[("none yet", "")], description="Variable"), "alab-wide")
        classes(self.pasted, "alab-paste")
        classes(self.file, "alab-wide")
        self.refresh_button = classes(w.Button(description="Refresh"), "alab-quiet")
        set_tooltip(self.refresh_button, "Look again for what the notebook has by now")
        self.check = classes(w.Button(description="Check data"), "alab-quiet")
        set_tooltip(self.check, "Read it as training would, and say what is there; nothing is trained")
        self.hint = classes(w.HTML(), "alab-muted")
        self.read = classes(w.HTML(), "alab-lesson")
        where = classes(w.HBox([self.way, self.file, self.variable, self.refresh_button]), "alab-form")
        line = classes(w.HBox([self.check, self.read]), "alab-data-line")
        self.box = classes(w.VBox([where, self.pasted, self.hint, line]), "alab-group")
        self.check.on_click(lambda _: on_check())
        self.refresh_button.on_click(lambda _: self.refresh())
        self.way.observe(lambda _: self.refresh(), "value")
        for control in (self.way, self.pasted, self.file, self.variable):
            control.observe(lambda _: self.forget(), "value")
        state.observe(lambda _: self._render(), ["busy", "closed", "lesson"])
        self.refresh()

    def refresh(self) -> None:
        """Look again for variables and files."""
        with self._state.lock:
            found = [(f"{name} · {words}", name) for name, words in user_variables().items()]
            options = [("choose one" if found else "none yet", ""), *found]
            if list(self.variable.options) != options:
                chosen = self.variable.value
                self.variable.options = options
                self.variable.value = chosen if chosen in dict(map(reversed, options)) else ""  # type: ignore[arg-type]
            self.file.options = tuple(data_files())
            self._draw()

    def asked(self) -> Examples:
        """The examples; `Incomplete` where there are none, `AdapterLabError` where pasted lines can't be read."""
        if self.way.value == "paste":
            return pasted_examples(self.pasted.value)
        if self.way.value == "file":
            path = self.file.value.strip()
            if not path:
                raise Incomplete("Which file? Give the path of a .txt, .csv, .jsonl or .json file.")
            return Examples(path, path)
        name = self.variable.value
        if not name:
            raise Incomplete("Which variable? Choose one, or make one in a cell and press Refresh.")
        if name not in user_namespace():
            raise Incomplete(f"The notebook has no variable {name!r} any more: press Refresh.")
        return Examples(user_namespace()[name], Name(name))

    def forget(self) -> None:
        """What was read is not what would be learned now."""
        self._state.lesson = ""

    def _render(self) -> None:
        with self._state.lock:
            self._draw()

    def _draw(self) -> None:
        way, locked = self.way.value, bool(self._state.busy) or self._state.closed
        only = {"paste": [self.pasted], "file": [self.file], "variable": [self.variable, self.refresh_button]}
        for name, controls in only.items():
            for control in controls:
                control.layout.display = None if name == way else "none"
        self.hint.value = _HINTS[way]
        self.check.disabled = locked
        self.read.value = escape(self._state.lesson)
        self.read.layout.display = None if self._state.lesson else "none"


def pasted_examples(text: str) -> Examples:
    """Pasted text as a list: JSON, a list or a row a line, where it begins so; else a text or a pair for each line.

    A line is a pair where `=>` or a tab parts it. Raises `Incomplete` for nothing, `AdapterLabError` for a line of JSON
    that is none.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise Incomplete("Nothing to learn from: paste examples, one a line.")
    rows = _json_rows(text, lines)
    if rows is None:
        rows = [_example(line) for _, line in lines]
    code = "examples = [\n" + "".join(f"    {row!r},\n" for row in rows) + "]"
    if len(code) > _SHORT:
        code = f"examples = ...  # the {len(rows)} examples that were pasted, too long to show them here"
    return Examples(rows, Name("examples"), code)


def _example(line: str) -> str | tuple[str, str]:
    parts = _ARROW.split(line, maxsplit=1)
    return line if len(parts) == 1 else (parts[0].strip(), parts[1].strip())


def _json_rows(text: str, lines: list[tuple[int, str]]) -> list[Any] | None:
    """The rows, or None where the text is no JSON."""
    if lines[0][1][0] not in "[{":
        return None
    whole = _parsed(text)
    if whole is not None:
        return whole if _are_rows(whole) else [whole]
    if _parsed(lines[0][1]) is None:
        return None
    rows = [_parsed(line) for _, line in lines]
    wrong = [str(number) for (number, _), row in zip(lines, rows) if row is None]
    if wrong:
        what = "line {} is" if len(wrong) == 1 else "lines {} are"
        raise AdapterLabError(f"The examples begin as JSON, but {what.format(', '.join(wrong[:5]))} none: mend it.")
    return rows


def _are_rows(whole: Any) -> bool:
    """Whether it is a list of examples, and not one: a pair of texts or a chat."""
    if not isinstance(whole, list) or not whole:
        return False
    if all(isinstance(item, str) for item in whole):
        return len(whole) != 2
    return not all(isinstance(item, dict) and "role" in item for item in whole)


def _parsed(text: str) -> Any:
    odd: list[str] = []  # NaN and Infinity: neither JSON nor, in the code that is shown, Python
    try:
        value = json.loads(text, parse_constant=odd.append)
    except ValueError:
        return None
    if odd:
        raise AdapterLabError(f"The examples hold {odd[0]}, which is no JSON: put a text there.")
    return value


def user_namespace() -> dict[str, Any]:
    """The notebook's variables; none where there is no IPython."""
    from IPython import get_ipython

    shell = get_ipython()
    return {} if shell is None else shell.user_ns


def user_variables() -> dict[str, str]:
    """The notebook's variables that could be examples → what they are, in words."""
    told = {name: _what(value) for name, value in list(user_namespace().items()) if _is_own(name)}
    return {name: words for name, words in told.items() if words}


def _is_own(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_") and name not in ("In", "Out")


def _what(value: Any) -> str:
    """Looks at its type, its length and its first item only: others may do anything when they are asked."""
    kind = type(value)
    if kind.__module__.split(".")[0] in ("pandas", "datasets") and kind.__name__ in ("DataFrame", "Series", "Dataset"):
        return f"{kind.__name__}, {len(value)} rows"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (str, dict, list, tuple)):
        return f"{kind.__name__} of {len(value)}"
    return ""


def data_files() -> list[str]:
    """Files in the kernel's folder that could hold examples, but those whose names are no text: no message could name them."""
    try:
        names = [entry.name for entry in os.scandir() if entry.name.lower().endswith(_ENDINGS)]
    except OSError:  # the folder has gone
        return []
    return sorted(name for name in names if readable(name) == name)[:100]


def lesson_words(lessons: Lessons) -> str:
    """What was read, in a line: `12 prompt/completion pairs: 430 tokens, of which 230 are learned, 41 in the longest`."""
    train, held_out = lessons.train, lessons.held_out
    learned = "all of them learned" if train.learned == train.tokens else f"{train.learned:,} of them learned"
    words = f"{train.source}: {train.tokens:,} tokens, {learned}, {train.longest:,} in the longest"
    return words if held_out is None else f"{words}; {len(held_out)} held out"
