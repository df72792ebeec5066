"""What came out: one `Generation` per prompt and column, and the `Comparison` that holds them. Data only: no model."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.columns import Column, ColumnLike
from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "adapterlab-comparison"
VERSION = 1
_HALF = re.compile("[\ud800-\udfff]")  # of a character: pandas' texts have none


@dataclass(frozen=True)
class TokenEvent:
    """One token of one column, as it comes: what `on_token` is called with.

    `text` is what became readable with it, "" while a character is incomplete. `finish_reason` is None until the
    column's last event.

    >>> events = []
    >>> said = lab.generate("What is the moon?", "pirate", max_new_tokens=8, on_token=events.append)
    >>> [event.position for event in events] == list(range(said.new_tokens))
    True
    >>> "".join(event.text for event in events) == said.text
    True
    """

    prompt_index: int
    column: str
    position: int
    token_id: int
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Generation:
    """What one column said to one prompt, and the proof of who spoke.

    asked: the column as (name, multiplier) pairs. active_adapters: names read off the model while it ran.
    weights_digest: of the tensors that really acted (base: of the base's). logit_shift: largest |Δlogit| against base
    on the prompt's last position. logprobs: of each token under this column's own unprocessed logits; base_logprobs
    the same under base, None until asked for. leads: by how much each token won, in processed-score units.
    seconds: wall time from prompt to last token. batch_size: rows that shared the forward at its start.
    cached: taken from an earlier run of the lab with the same weights, prompt and settings; seconds, batched and
    batch_size are those of its making. first_difference: the first position at which the token is another than the
    base's in the same comparison, None without a base or a difference; tie: rounding alone could have made that one.

    >>> said = lab.generate("What is the moon?", {"pirate": 0.5}, max_new_tokens=8)
    >>> said.column, said.active_adapters, said.multipliers
    ('pirate × 0.5', ('pirate',), (0.5,))
    """

    column: str
    asked: tuple[tuple[str, float], ...]
    prompt_index: int
    prompt: str
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    leads: tuple[float, ...]
    finish_reason: str
    seconds: float
    active_adapters: tuple[str, ...]
    multipliers: tuple[float, ...]
    logit_shift: float
    weights_digest: str
    batched: bool = False
    note: str = ""
    base_logprobs: tuple[float, ...] | None = None
    batch_size: int = 1
    cached: bool = False
    first_difference: int | None = None
    tie: bool = False

    @property
    def new_tokens(self) -> int:
        """How many tokens it is.

        >>> said = lab.generate("What is the moon?", "pirate", max_new_tokens=8)
        >>> said.new_tokens == len(said.token_ids)
        True
        """
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """`new_tokens` per second of `seconds`; NaN where no time was measured.

        >>> said = lab.generate("What is the moon?", "pirate", max_new_tokens=8)
        >>> said.tokens_per_second == said.new_tokens / said.seconds
        True
        """
        return self.new_tokens / self.seconds if self.seconds > 0 else math.nan

    def __str__(self) -> str:
        return self.text


@dataclass
class Comparison:
    """Prompts × columns. `settings`: what was asked for; `model`: name, dtype, quantization and digest of the base, and
    the memory that the lab took. Of a concatenation, `model` holds the names, and all that for each of its `labs`.

    `prompts` as they were given, `rendered` as the model saw them (chat template applied), `prompt_ids` unpadded.

    >>> comparison = lab.compare(["What is the moon?", "Who are you?"], [None, "pirate"], max_new_tokens=8)
    >>> len(comparison)
    4
    >>> comparison["pirate", 1].prompt
    'Who are you?'
    """

    prompts: list[str]
    rendered: list[str]
    prompt_ids: list[tuple[int, ...]]
    settings: dict[str, Any]
    model: dict[str, Any]
    generations: list[Generation]
    created: str = ""
    _score: Callable[[Comparison], list[tuple[float, ...] | None]] | None = field(
        default=None, repr=False, compare=False
    )

    @property
    def columns(self) -> list[str]:
        """Labels, in the order of the columns.

        >>> lab.compare("What is the moon?", ["pirate", "base"], max_new_tokens=8).columns
        ['pirate', 'base']
        """
        return list(dict.fromkeys(generation.column for generation in self.generations))

    def __getitem__(self, key: ColumnLike | tuple[ColumnLike, int]) -> Generation:
        """`cmp["pirate"]`, or `cmp["pirate", 1]` for the second of several prompts."""
        column, index = key if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], int) else (key, None)
        label = column if isinstance(column, str) else Column.of(column).label
        found = [g for g in self.generations if g.column == label and index in (None, g.prompt_index)]
        if not found:
            raise AdapterLabError(f"No column {label!r} here; there are {', '.join(map(repr, self.columns))}.")
        if len(found) > 1:
            raise AdapterLabError(
                f"{label!r} answered {len(found)} prompts: say which, as in comparison[{label!r}, 0]."
            )
        return found[0]

    def __len__(self) -> int:
        return len(self.generations)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and column, the proof included; seconds are wall time, when the column was generated.

        `first_difference` counts tokens from 0, and is missing where there is none; `tie`: rounding could have made it.

        A concatenation has more columns. lab: its label. lab_first_difference: the first token that is another than the
        first lab's in the same column, counted from 0. lab_logprob_change: mean |Δlogprob|, in nats, of the tokens before
        it. Both are missing for the first lab itself, for what it has not, and where it read the prompt otherwise.
        base_megabytes, adapter_megabytes: the lab's memory in 10⁶ bytes, and peak_megabytes, what the run took on top at the
        most; missing where that is not known.
        lab_note: what else was not as in the first lab.

        >>> frame = lab.compare("What is the moon?", [None, "pirate"], max_new_tokens=8).to_frame()
        >>> frame.set_index("column")["active_adapters"].to_dict()
        {'base': '', 'pirate': 'pirate'}
        """
        import pandas as pd

        from adapterlab.concatenation import lab_rows

        rows = [
            {
                "prompt": self.prompts[g.prompt_index],
                "column": g.column,
                "text": g.text,
                "new_tokens": g.new_tokens,
                "seconds": g.seconds,
                "tokens_per_second": g.tokens_per_second,
                "finish_reason": g.finish_reason,
                "active_adapters": ", ".join(g.active_adapters),
                "logit_shift": g.logit_shift,
                "batched": g.batched,
                "batch_size": g.batch_size,
                "cached": g.cached,
                "first_difference": g.first_difference,
                "tie": g.tie,
                "weights_digest": g.weights_digest,
                "note": g.note,
            }
            for g in self.generations
        ]
        rows = [{key: _HALF.sub("\ufffd", v) if isinstance(v, str) else v for key, v in row.items()} for row in rows]
        whole = ["first_difference"]
        for row, more in zip(rows, lab_rows(self)):
            row.update(more)
            whole = ["first_difference", "lab_first_difference"]
        return pd.DataFrame(rows).astype(dict.fromkeys(whole, "Int64") if rows else {})

    def tokens(self) -> pd.DataFrame:
        """One row per token: prompt_index, column, position, token, logprob, base_logprob.

        `base_logprob` is what the bare base gives the same token after the same text. It is computed at the first
        call, as long as the lab is open; otherwise it is NaN. A concatenation has more columns: lab, and
        first_lab_logprob, what the first lab's same column gave the same token after the same text; NaN from their first
        difference on, since there the texts are not the same.

        >>> frame = lab.compare("What is the moon?", [None, "pirate"], max_new_tokens=8).tokens()
        >>> list(frame.columns)
        ['prompt_index', 'column', 'position', 'token', 'logprob', 'base_logprob']
        """
        import pandas as pd

        from adapterlab.concatenation import token_columns

        self._fill_base_logprobs()
        rows = [
            (
                g.prompt_index,
                _HALF.sub("\ufffd", g.column),
                i,
                _HALF.sub("\ufffd", g.tokens[i]),
                g.logprobs[i],
                g.base_logprobs[i] if g.base_logprobs else math.nan,
            )
            for g in self.generations
            for i in range(g.new_tokens)
        ]
        names = ["prompt_index", "column", "position", "token", "logprob", "base_logprob"]
        return pd.DataFrame(rows, columns=names).assign(**token_columns(self))

    def _fill_base_logprobs(self) -> None:
        if self._score is None or all(g.base_logprobs is not None for g in self.generations):
            return
        scores = self._score(self)
        self.generations = [
            g if score is None else replace(g, base_logprobs=score) for g, score in zip(self.generations, scores)
        ]

    def _repr_html_(self) -> str:
        from adapterlab.render import comparison_html

        return comparison_html(self)

    def __repr__(self) -> str:
        heads = [f"{g.column}: {g.text[:60]!r}" for g in self.generations[:4]]
        more = f", and {len(self.generations) - 4} more" if len(self.generations) > 4 else ""
        return f"Comparison({len(self.prompts)} prompt(s) × {len(self.columns)} column(s): {'; '.join(heads)}{more})"

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that stands alone, readable without a kernel. An existing file is replaced whole.

        >>> lab.compare("What is the moon?", max_new_tokens=8).to_html(folder / "moon.html").name
        'moon.html'
        """
        from adapterlab.atomic import write_text
        from adapterlab.render import comparison_page

        return write_text(_at_home(path), comparison_page(self))

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything, base logprobs included while the lab is open. An existing file is replaced whole.

        >>> written = lab.compare("What is the moon?", max_new_tokens=8).to_json(folder / "moon.json")
        >>> Comparison.from_json(written) == lab.last
        True
        """
        from adapterlab.atomic import write_text

        target = _at_home(path)
        self._fill_base_logprobs()
        return write_text(target, self._json())

    def _json(self) -> str:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "created": self.created,
            "model": self.model,
            "settings": self.settings,
            "prompts": self.prompts,
            "rendered": self.rendered,
            "prompt_ids": self.prompt_ids,
            "generations": [_plain(asdict(g)) for g in self.generations],
        }
        text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
        # Half a character, as JSON can say it and UTF-8 can't.
        return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what `to_json` wrote. Raises `AdapterLabError` for anything else, saying what is wrong with it.

        >>> written = lab.compare("What is the moon?", max_new_tokens=8).to_json(folder / "moon.json")
        >>> lab.close()
        >>> Comparison.from_json(written).columns
        ['base', 'pirate', 'robot', 'bard']
        """
        from adapterlab.comparison_files import read_parts
        from adapterlab.concatenation import check_labs

        comparison = cls(**read_parts(_at_home(path), FORMAT, VERSION))
        try:
            check_labs(comparison)
        except (TypeError, ValueError) as error:
            raise AdapterLabError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}.") from error
        return comparison

    @classmethod
    def concat(cls, comparisons: Iterable[Comparison], labels: Iterable[str] | None = None) -> Comparison:
        """Put comparisons of the same prompts side by side, say of labs in fp32, 8-bit and 4-bit.

        Columns get the lab's quantization or dtype before their label (or `labels`, one per comparison). The first
        comparison is what the others are measured against: see `to_frame` and `tokens`. `model["labs"]` holds what each
        lab said of itself, its memory included. Where a lab read the prompts otherwise (another tokenizer or chat template)
        or answered with other settings, a note there says so. Concatenations can be concatenated: their labs then stand one
        by one, and `labels` names each.

        The labs may be closed by now: only `base_logprob` of `tokens()` needs them, and is NaN unless `tokens()`,
        `to_json()` or this was called while the lab was open.

        >>> before = lab.compare("What is the moon?", [None, "pirate"], max_new_tokens=8)
        >>> run = lab.train("pirate", pairs, max_steps=4)
        >>> after = lab.compare("What is the moon?", ["pirate"], max_new_tokens=8)
        >>> Comparison.concat([before, after], labels=["before", "after"]).columns
        ['before · base', 'before · pirate', 'after · pirate']
        """
        from adapterlab.concatenation import checked_labels, make_concatenation

        comparisons = list(comparisons) if isinstance(comparisons, Iterable) else []
        if not all(isinstance(comparison, Comparison) for comparison in comparisons):
            raise AdapterLabError("Comparison.concat takes a list of comparisons, as lab.compare(…) gives them.")
        if not comparisons:
            raise AdapterLabError("Nothing to concatenate: give at least one Comparison.")
        names = checked_labels(comparisons, labels)
        for comparison in comparisons:
            comparison._fill_base_logprobs()
        return cls(**make_concatenation(comparisons, names))


def _at_home(path: Any) -> Path:
    """The file that is meant, `~` being somebody's home as everywhere in the lab."""
    try:
        return Path(path).expanduser()
    except (TypeError, RuntimeError) as error:  # no path, or the home of nobody
        raise AdapterLabError(f"{repr(path)[:80]} names no file: {error}.") from error


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity or NaN: the lead of a vocabulary of one, a time never measured.
    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value

    return {key: finite(value) for key, value in row.items()}
