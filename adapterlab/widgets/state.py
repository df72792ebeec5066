"""What the panel shows and what the user chose in it, as traits that its parts observe. Knows no widget."""

from __future__ import annotations

import threading
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import traitlets as t

from adapterlab.columns import BASE, Column
from adapterlab.methods import method_label

if TYPE_CHECKING:
    from adapterlab.comparison import Comparison, Generation
    from adapterlab.lab import AdapterLab


@dataclass(frozen=True)
class Row:
    """A line of the adapter list: the base or an adapter. `in_model`: its multiplier in the lab's selection.

    `fixed`: why its multiplier can't be moved, "" if it can.
    """

    name: str
    kind: str
    parameters: int
    bytes: int
    share: float
    status: str = ""
    in_model: float | None = None
    fixed: str = ""

    @property
    def is_base(self) -> bool:
        return self.name == BASE


@dataclass(frozen=True)
class Notice:
    """One thing to tell the user. `kind` is "info" or "error"; `detail` is folded away under it."""

    kind: str
    text: str
    detail: str = ""

    @classmethod
    def from_error(cls, error: BaseException, doing: str = "") -> Notice:
        """The error in words, its traceback as the detail. What is no `AdapterLabError` says its type too."""
        from adapterlab.errors import AdapterLabError

        text = str(error) or type(error).__name__
        if not isinstance(error, AdapterLabError):
            text = f"{type(error).__name__}: {text}" if str(error) else text
        return cls("error", f"{doing}: {text}" if doing else text, "".join(traceback.format_exception(error)))


@dataclass(frozen=True, eq=False)
class Shown:
    """One prompt of one comparison, as the columns show it."""

    comparison: Comparison
    index: int = 0

    @property
    def prompt(self) -> str:
        return self.comparison.prompts[self.index]

    @property
    def generations(self) -> dict[str, Generation]:
        """What answered this prompt, by the column's label."""
        return {g.column: g for g in self.comparison.generations if g.prompt_index == self.index}


class PanelState(t.HasTraits):
    """Everything on the screen but the generated text.

    Mirrored from the lab: `status`, `rows` (base first), `enabled`, `selection`, `has_chat`, `targets` (what
    target_modules can name → shapes of those layers), `history` (`Shown`, oldest first).
    Chosen by the user: `prompt`, `system` (a chat's system turn, "" for none), `compared` (name → has a column),
    `multipliers` (name → 0 to 2), the sampling, `marks` (what sets words off), `blind` (hide names from the next
    generation on).
    About the columns: `shown` (of the history, or None), `hidden` (their names are hidden now), `code` (the Python of
    the last click). `found`: adapters on the Hub for this base, as (id, words).
    About the panel itself: `busy` (what runs now, in words; "" when idle), `stoppable`, `notice`, `closed`.
    """

    status = t.Unicode()
    rows = t.Tuple()
    targets = t.Dict()
    enabled = t.Bool(True)
    selection = t.Instance(Column, args=())

    prompt = t.Unicode()
    system = t.Unicode()
    has_chat = t.Bool(False)
    compared = t.Dict(value_trait=t.Bool(), key_trait=t.Unicode())
    multipliers = t.Dict(value_trait=t.Float(), key_trait=t.Unicode())
    max_new_tokens = t.Int(64, min=1)
    temperature = t.Float(0.0, min=0.0)
    top_p = t.Float(1.0, min=0.0, max=1.0)
    top_k = t.Int(0, min=0)
    seed = t.Int(0, min=0)

    history = t.Tuple()
    shown = t.Instance(Shown, allow_none=True)
    marks = t.Unicode("words")
    blind = t.Bool(False)
    hidden = t.Bool(False)
    code = t.Unicode()

    found = t.Tuple()
    busy = t.Unicode()
    stoppable = t.Bool(False)
    notice = t.Instance(Notice, allow_none=True)
    closed = t.Bool(False)

    def __init__(self, **traits: Any) -> None:
        self.lock = threading.RLock()
        super().__init__(**traits)

    def notify_change(self, change: Any) -> None:
        """Tell the parts, one thread at a time: the panel's worker and the kernel's own both change the state, and a
        widget whose options one thread exchanges must not get a value from the other."""
        with self.lock:
            super().notify_change(change)

    def read(self, lab: AdapterLab) -> None:
        """Take over what the lab says of itself. New adapters get a column of their own, at multiplier 1."""
        rows = read_rows(lab)
        names = [row.name for row in rows]
        self.compared = {name: self.compared.get(name, True) for name in names}
        self.multipliers = {name: self.multipliers.get(name, 1.0) for name in names}
        self.rows = tuple(rows)
        self.has_chat = bool(getattr(lab.tokenizer, "chat_template", None))
        self.read_selection(lab)

    def read_selection(self, lab: AdapterLab) -> None:
        """Take over what acts in `lab.model`, which changes often and costs little to ask for."""
        in_model = {BASE: 1.0} if lab.selection.is_base else lab.selection.as_dict()
        self.selection = lab.selection
        self.enabled = lab.enabled
        self.rows = tuple(replace(row, in_model=in_model.get(row.name)) for row in self.rows)
        self.status = lab.status()

    def read_history(self, lab: AdapterLab) -> None:
        """Take over the lab's comparisons, whoever made them, and show the newest if there is a new one."""
        before = {id(shown.comparison) for shown in self.history}
        kept = {(id(shown.comparison), shown.index): shown for shown in self.history}
        self.history = tuple(
            kept.get((id(comparison), index)) or Shown(comparison, index)
            for comparison in lab.history
            for index in range(len(comparison.prompts))
        )
        fresh = [shown for shown in self.history if id(shown.comparison) not in before]
        if fresh:
            self.shown = fresh[0]
        elif self.shown not in self.history:
            self.shown = None

    def column(self, name: str) -> Column:
        """The column of a row: the base, or its adapter at the row's multiplier."""
        return Column() if name == BASE else Column.of({name: self.multipliers.get(name, 1.0)})

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns to compare, in the order of the rows. A row at multiplier 0 is the base, which stands once."""
        wanted = (self.column(row.name) for row in self.rows if self.compared.get(row.name))
        return tuple(dict.fromkeys(wanted))

    @property
    def question(self) -> str | list[dict[str, str]]:
        """The prompt as `lab.compare` takes it: a text, or chat messages if there is a system turn."""
        if not (self.has_chat and self.system.strip()):
            return self.prompt
        turns = (("system", self.system), ("user", self.prompt))
        return [{"role": role, "content": content} for role, content in turns]

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings as keywords of `lab.compare`."""
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}

    @property
    def adapter_names(self) -> list[str]:
        return [row.name for row in self.rows if not row.is_base]


def read_rows(lab: AdapterLab) -> list[Row]:
    """The base and the adapters as the list shows them, selection left out; sizes come from `lab.parameters()`."""
    sizes = {row["owner"]: row for row in lab.parameters().to_dict("records")}
    base = Row(BASE, "base model", int(sizes[BASE]["parameters"]), int(sizes[BASE]["bytes"]), 1.0)
    rows = [base]
    for name, info in lab.adapters.items():
        kind = method_label(info.method) + (f" · rank {info.r}" if info.r else "")
        share = info.parameters / max(base.parameters, 1)
        fixed = info.multiplier_obstacle
        rows.append(Row(name, kind, info.parameters, info.bytes, share, info.status, fixed=fixed))
    return rows


def short_share(share: float) -> str:
    """A share of the base as a percentage with two figures that matter: `0.37 %`, `12 %`."""
    return f"{share * 100:.2g} %" if share < 0.1 else f"{share * 100:.0f} %"
