"""What is known of each adapter: for people (`AdapterInfo`) and for the lab itself (`Record`). Data only."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    from peft import PeftConfig

    from adapterlab.adapters import Adapters
    from adapterlab.hub import AdapterFiles
    from adapterlab.reading import AdapterReader
    from adapterlab.runs import TrainingRun


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter, as people ask about it. `bytes` are those in memory; `r` is the config's rank, None without one.

    `status`: *untrained* (changes nothing), *random weights* (as it was drawn), *loaded* (as its file),
    *trained here* (changed in this lab and saved), *unsaved* (changed in this lab, on no disk).
    `runs`: its trainings in this lab, oldest first.
    `multiplier_obstacle`: why multipliers other than 0 and 1, and blends, have no meaning for it; "" if they have.

    >>> info = lab.adapters["pirate"]
    >>> info.method, info.r, info.target_modules, info.status
    ('LORA', 8, ('q_proj', 'v_proj'), 'loaded')
    """

    name: str
    method: str
    r: int | None
    parameters: int
    bytes: int
    target_modules: tuple[str, ...]
    source: str
    status: str
    peft_config: PeftConfig = field(repr=False)
    multiplier_obstacle: str = field(default="", repr=False)
    runs: tuple[TrainingRun, ...] = field(default=(), repr=False)


@dataclass
class Record:
    """What the lab remembers of an adapter beside its layers.

    Digests: `digest` as last seen; `reference`: the weights that the lab took in, made or trained under this name, which
    is what a run must show to be believed; `initial`, `loaded`, `saved`: as drawn, as read, as last written.
    """

    source: str
    digest: str
    noop: bool
    reference: str
    initial: str | None = None
    loaded: str | None = None
    saved: str | None = None
    files: AdapterFiles | None = None
    file: str | None = None  # digest of the file it was loaded from
    filed: str | None = None  # digest of the weights in that file
    file_bytes: int | None = None  # of the file on disk, or of the one that saving would write
    runs: list[TrainingRun] = field(default_factory=list, repr=False)
    reader: AdapterReader | None = field(default=None, repr=False, compare=False)  # made at the first refresh

    @property
    def status(self) -> str:
        if self.digest == self.loaded:
            return "loaded"
        if self.noop:
            return "untrained"
        if self.digest == self.initial:
            return "random weights"
        return "trained here" if self.digest == self.saved else "unsaved"


class AdapterView(Mapping[str, AdapterInfo]):
    """`lab.adapters`: read-only, with the names for tab completion. An unknown name says which there are."""

    def __init__(self, seen: Callable[[], Adapters]) -> None:
        self._seen = seen  # the adapters as they are whenever it is asked

    def __getitem__(self, name: str) -> AdapterInfo:
        adapters = self._seen()
        if not isinstance(name, str) or name not in adapters.records:
            raise UnknownAdapterError(name, list(adapters.records))
        return adapters.info(name)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._seen().records))

    def __len__(self) -> int:
        return len(self._seen().records)

    def items(self) -> ItemsView[str, AdapterInfo]:
        return ItemsView(self._now())

    def values(self) -> ValuesView[AdapterInfo]:
        return ValuesView(self._now())

    def _now(self) -> AdapterView:
        """Those of one moment: somebody may delete one before its turn comes."""
        adapters = self._seen()
        return AdapterView(lambda: adapters)

    def __repr__(self) -> str:
        return f"adapters({', '.join(self) or 'none yet'})"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class UnknownAdapterError(AdapterLabError, KeyError):
    """A name that no adapter has; a `KeyError` too, so that `in` and `.get` work as on any mapping."""

    def __init__(self, name: object, known: list[str]) -> None:
        super().__init__(f"No adapter named {name!r}; the lab has {', '.join(map(repr, known)) or 'none yet'}.")

    __str__ = Exception.__str__
