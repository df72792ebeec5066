"""What the panel shows and what the user chose in it, as traits that its parts observe. Knows no widget."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import traitlets as t

from adapterlab.columns import BASE, Column
from adapterlab.errors import AdapterLabError
from adapterlab.methods import method_label

if TYPE_CHECKING:
    from adapterlab.comparison import Comparison, Generation
    from adapterlab.lab import AdapterLab

MOST_TOLD = 500  # letters of what the lab tells during a click


@dataclass(frozen=True)
class Row:
    """A line of the adapter list: the base, an adapter, or a blend of them that was made in the panel.

    `in_model`: its multiplier in the lab's selection. `blend`: the column of a blend, None for the others. `method`: PEFT's
    type of an adapter, as in `LORA`. `obstacles`: what can't be done with it and why, of `lab.capabilities()`.
    """

    name: str
    kind: str
    parameters: int
    bytes: int
    share: float
    status: str = ""
    in_model: float | None = None
    blend: Column | None = None
    method: str = ""
    obstacles: Mapping[str, str] = field(default_factory=dict, hash=False)

    def obstacle(self, capability: str) -> str:
        """Why this can't be done with the adapter, "" if it can."""
        return self.obstacles.get(capability, "")

    @property
    def fixed(self) -> str:
        """Why its multiplier can't be moved and it can't be in a blend, "" if it can."""
        return self.obstacle("blend")

    @property
    def is_base(self) -> bool:
        return self.name == BASE

    @property
    def is_adapter(self) -> bool:
        return not self.is_base and self.blend is None


class Incomplete(AdapterLabError):
    """Something in a form is still to be given."""


@dataclass(frozen=True)
class Notice:
    """One thing to tell the user. `kind` is "info" or "error"; `detail` is folded away under it, and `about` says what it
    is. passing: true only while something runs."""

    kind: str
    text: str
    detail: str = ""
    passing: bool = False
    about: str = "Traceback"

    @classmethod
    def from_error(cls, error: BaseException, doing: str = "") -> Notice:
        """The error in words, its traceback as the detail. What is no `AdapterLabError` says its type too. What is
        `Incomplete` is no error."""
        text = str(error) or type(error).__name__
        if isinstance(error, Incomplete):
            return cls("info", text)
        if not isinstance(error, AdapterLabError):
            text = f"{type(error).__name__}: {text}" if str(error) else text
        return cls("error", f"{doing}: {text}" if doing else text, "".join(traceback.format_exception(error)))

    @classmethod
    def with_told(cls, notice: Notice | None, told: Sequence[str]) -> Notice | None:
        """The notice, and after it what the lab has told meanwhile, each text once. If that is long, its end is left to the
        detail."""
        said = notice.text if notice is not None else ""
        more = " ".join(text for text in dict.fromkeys(told) if text not in said)
        if not more:
            return notice
        notice = notice or cls("info", "")
        if len(more) > MOST_TOLD:
            notice = notice if notice.detail else replace(notice, detail=more, about="All that was said")
            more = f"{more[:MOST_TOLD].rsplit(' ', 1)[0]} …"
        return replace(notice, text=f"{said} {more}".strip())


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


@dataclass(frozen=True)
class View:
    """What the Inspect tab shows: which picture, of which adapter ("" for none), held against which other one."""

    what: str = "Sizes"
    adapter: str = ""
    other: str = ""


class PanelState(t.HasTraits):
    """Everything on the screen but the generated text.

    Mirrored from the lab: `status`, `rows` (base first, blends last), `enabled`, `selection`, `trainable` ("" for none),
    `has_chat`, `targets` (what target_modules can name → shapes of those layers), `knows_feedforward` (whether PEFT knows
    IA3's modules here), `history` (`Shown`, oldest first),
    `elsewhere` (a comparison or a training runs that this panel did not start).
    Chosen by the user: `prompt`, `system` (a chat's system turn, "" for none), `turns` (what was said before the prompt,
    as (role, words)), `compared` (row → has a column), `multipliers` (name → 0 to 2), `blends` (columns that have rows of
    their own), the sampling, `marks` (what sets words off), `blind` (hide names from the next generation on).
    About the columns: `shown` (of the history, or None), `hidden` (their names are hidden now), `scored` (grows when base
    has read answers that are shown), `verdict` (the rows of `lab.verify` for what is shown), `code` (the Python of the
    last click). `found`: adapters on the Hub for this base, as (id, words).
    Under Inspect: `view` (what to show), `picture` (what was drawn of it, as HTML).
    `lesson`: what was read to be trained on, in words; "" as long as nobody has looked.
    About the panel itself: `busy` (what runs now, in words; "" when idle), `stoppable`, `notice`, `closed`.
    """

    status = t.Unicode()
    rows = t.Tuple()
    targets = t.Dict()
    knows_feedforward = t.Bool(True)
    enabled = t.Bool(True)
    selection = t.Instance(Column, args=())
    trainable = t.Unicode()
    elsewhere = t.Bool(False)

    prompt = t.Unicode()
    system = t.Unicode()
    turns = t.Tuple()
    has_chat = t.Bool(False)
    compared = t.Dict(value_trait=t.Bool(), key_trait=t.Unicode())
    multipliers = t.Dict(value_trait=t.Float(), key_trait=t.Unicode())
    blends = t.Tuple()
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
    verdict = t.Tuple()

    view = t.Instance(View, args=())
    picture = t.Unicode()

    found = t.Tuple()
    lesson = t.Unicode()
    busy = t.Unicode()
    stoppable = t.Bool(False)
    notice = t.Instance(Notice, allow_none=True)
    closed = t.Bool(False)

    scored = t.Int(0)

    def __init__(self, **traits: Any) -> None:
        self.lock = threading.RLock()
        self._veiled: set[int] = set()  # comparisons whose names are still hidden, by id: `history` keeps them alive
        super().__init__(**traits)

    def notify_change(self, change: Any) -> None:
        """Tell the parts, one thread at a time: the panel's worker and the kernel's own both change the state, and a
        widget whose options one thread exchanges must not get a value from the other."""
        with self.lock:
            super().notify_change(change)

    def read(self, lab: AdapterLab) -> None:
        """Take over what the lab says of itself. New adapters get a column of their own, at multiplier 1; blends of
        adapters that are gone go too."""
        self._set_rows(read_rows(lab), lab.blends)
        self.has_chat = bool(getattr(lab.tokenizer, "chat_template", None))
        self.read_selection(lab)

    def read_missed(self, lab: AdapterLab) -> None:
        """Take over adapters that went without a word, deleted by `lab.model.delete_adapter` and found out later."""
        if list(lab.adapters) != self.adapter_names:
            self.read(lab)

    def set_blends(self, blends: tuple[Column, ...]) -> None:
        """Let these blends, and no others, have rows."""
        self._set_rows([row for row in self.rows if row.blend is None], blends)

    def _set_rows(self, rows: list[Row], blends: tuple[Column, ...]) -> None:
        with self.lock:
            self._replace_rows(rows, blends)

    def _replace_rows(self, rows: list[Row], blends: tuple[Column, ...]) -> None:
        known = {row.name: row for row in rows}
        self.blends = tuple(blend for blend in blends if all(name in known for name in blend.names))
        rows = rows + [_blend_row(blend, known) for blend in self.blends]
        names = [row.name for row in rows]
        self.compared = {name: self.compared.get(name, True) for name in names}
        self.multipliers = {row.name: self.multipliers.get(row.name, 1.0) for row in rows if row.blend is None}
        self.rows = tuple(rows)

    def read_selection(self, lab: AdapterLab) -> None:
        """Take over what acts in `lab.model`, which changes often and costs little to ask for."""
        in_model = {BASE: 1.0} if lab.selection.is_base else lab.selection.as_dict()
        self.selection = lab.selection
        self.enabled = lab.enabled
        self.trainable = lab.trainable or ""
        with self.lock:
            self.rows = tuple(replace(row, in_model=in_model.get(row.name)) for row in self.rows)
        self.status = lab.status()

    def read_badges(self, lab: AdapterLab) -> None:
        """Take over the adapters' status, which a comparison has looked at anew."""
        status = {name: info.status for name, info in lab.adapters.items()}
        with self.lock:
            self.rows = tuple(replace(row, status=status.get(row.name, row.status)) for row in self.rows)

    def read_history(self, lab: AdapterLab, *, own: bool = False) -> None:
        """Take over the lab's comparisons, whoever made them, and show the newest if there is a new one. own: this panel
        has made it, and says itself what is hidden of it."""
        before = {id(shown.comparison) for shown in self.history}
        kept = {(id(shown.comparison), shown.index): shown for shown in self.history}
        self.history = tuple(
            kept.get((id(comparison), index)) or Shown(comparison, index)
            for comparison in lab.history
            for index in range(len(comparison.prompts))
        )
        fresh = [shown for shown in self.history if id(shown.comparison) not in before]
        if fresh and own:
            self.shown = fresh[-1]  # the panel asks one prompt
        elif fresh:
            self.show(next(shown for shown in fresh if shown.comparison is fresh[-1].comparison))
        elif self.shown not in self.history:
            self.show(None)

    def show(self, shown: Shown | None) -> None:
        """Show this of the history, its names hidden if they are still to be revealed."""
        with self.lock:
            hidden = shown is not None and id(shown.comparison) in self._veiled
            if hidden:  # before its names could be seen
                self.hidden = True
            self.shown = shown
            self.hidden = hidden

    def veil(self, comparison: Comparison) -> None:
        """Keep the names of this comparison hidden until `reveal`, also when it is shown again later."""
        self._veiled.add(id(comparison))

    def reveal(self) -> None:
        """Name the columns that are shown."""
        if self.shown is not None:
            self._veiled.discard(id(self.shown.comparison))
        self.hidden = False

    def column(self, name: str) -> Column:
        """The column of a row: the base, its adapter at the row's multiplier, or its blend."""
        blend = next((row.blend for row in self.rows if row.name == name), None)
        if blend is not None:
            return blend
        return Column() if name == BASE else Column.of({name: self.multipliers.get(name, 1.0)})

    def acts(self, row: Row) -> bool:
        """Whether what the row's button would select is what is selected."""
        here = row.in_model is not None or row.blend is not None  # an adapter at multiplier 0 is not the base's row
        return here and self.selection == self.column(row.name)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns to compare, in the order of the rows. A row at multiplier 0 is the base, which stands once."""
        wanted = (self.column(row.name) for row in self.rows if self.compared.get(row.name))
        return tuple(dict.fromkeys(wanted))

    @property
    def question(self) -> str | list[dict[str, str]]:
        """The prompt as `lab.compare` takes it: a text, or chat messages if there is a system turn or an earlier one."""
        before = [(role, words) for role, words in (("system", self.system), *self.turns) if words.strip()]
        if not (self.has_chat and before):
            return self.prompt
        turns = (*before, ("user", self.prompt))
        return [{"role": role, "content": content} for role, content in turns]

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings as keywords of `lab.compare`."""
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}

    @property
    def adapter_names(self) -> list[str]:
        return [row.name for row in self.rows if row.is_adapter]


def read_rows(lab: AdapterLab) -> list[Row]:
    """The base and the adapters as the list shows them, selection left out; sizes come from `lab.parameters()`, and what
    can't be done with them from `lab.capabilities()`."""
    frame = lab.parameters()
    parameters, size = frame.loc[frame["owner"] == BASE, ["parameters", "bytes"]].sum()
    base = Row(BASE, "base model", int(parameters), int(size), 1.0)
    obstacles: dict[str, dict[str, str]] = {}
    for name, capability, possible, reason in lab.capabilities().itertuples(index=False):
        if not possible:
            obstacles.setdefault(name, {})[capability] = reason
    rows = [base]
    for name, info in lab.adapters.items():
        kind = method_label(info.method) + (f" · rank {info.r}" if info.r else "")
        share = info.parameters / max(base.parameters, 1)
        sizes = (info.parameters, info.bytes, share)
        rows.append(Row(name, kind, *sizes, info.status, method=info.method, obstacles=obstacles.get(name, {})))
    return rows


def _blend_row(blend: Column, known: dict[str, Row]) -> Row:
    of = [known[name] for name in blend.names]
    parameters, size = sum(row.parameters for row in of), sum(row.bytes for row in of)
    return Row(blend.label, f"blend of {len(of)}", parameters, size, sum(row.share for row in of), blend=blend)


def short_share(share: float) -> str:
    """A share of the base as a percentage with two figures that matter: `0.37 %`, `12 %`."""
    return f"{share * 100:.2g} %" if share < 0.1 else f"{share * 100:.0f} %"
