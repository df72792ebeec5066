"""A text, token by token, shaded where an adapter leaves the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError
from adapterlab.plots.glyphs import NO_GLYPH, drawable, families_for, plain, visible, wrapped
from adapterlab.plots.style import USUAL_TEXT, check_columns, make_figure, short_number, text_colour

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 120  # of text in one figure, shared out among its blocks
_MOST_LETTERS = MOST_LINES * 200  # of a token: more would not be in so many lines
FEWEST_LINES = 3  # that a block has; where that is too many in all, the last blocks are left out
# Half transparent at most: words in the style's own colour can be read on both, on a light ground and on a dark one.
MORE, LESS = "#d55e00", "#0072b2"
_STRONGEST = 0.8
_WIDTH, _MARGIN = 518.4, 12.0  # points
_SIZE, _LINE, _HEAD, _GAP, _TOP = 10.0, 19.0, 19.0, 9.0, 46.0  # points: words, a line of them, a name, between blocks


@dataclass
class _Token:
    text: str
    value: float
    left_here: bool
    ends_line: bool


@dataclass
class _Piece:
    """A token, or the part of one that stands in one line."""

    text: str
    x: float
    width: float
    indent: float  # what its leading space takes: in an SVG that would fall away
    token: _Token


@dataclass
class _Block:
    title: str
    tokens: list[_Token]
    lines: list[list[_Piece]] = field(default_factory=list)
    hidden: int = 0  # tokens that are not shown


def plot_divergence(frame: pd.DataFrame) -> Figure:
    """Draw a text itself, each token shaded by how far the column is from the base there, one block for each column.

    `frame`: one row per column and token with `column`, `position` and `token`, as `lab.divergence(text)` gives it;
    optional `prompt_index` (a block for each) and `first_difference` (true at the token where a column's answer left the
    base's: it gets a border). The shade is `kl` in nats, from none at 0 to full at the largest, by its square root so
    that small ones are seen too. Where there is no `kl`, it is `logprob` − `base_logprob` in nats: orange where the column
    finds the token likelier than base does, blue where less. A missing value has no shade.

    Newlines end a line and are shown as ↵, tabs as →, spaces that would not be seen as ·, and □ stands for what no font
    of this machine has. At most 120 lines (`MOST_LINES`) are shown, shared out among the blocks with 3 each at least; below
    a block that was cut stands how many of its tokens are not shown. The figure is as high as its text and displays itself
    in a notebook. `frame` is unchanged. Raises `AdapterLabError` when a column is missing or there is nothing to draw.
    """
    check_columns(frame, ("column", "position", "token"), "plot_divergence", "lab.divergence(text)")
    if not len(frame):
        raise AdapterLabError("There is nothing to draw: the frame has no rows.")
    values, is_kl = _values(frame)
    blocks = _blocks(frame, values)
    texts = [token.text for block in blocks for token in block.tokens] + [block.title for block in blocks]
    families = families_for(texts)
    _set_lines(blocks, families)
    shown = [block for block in blocks if block.lines]
    height = _TOP + sum(_height(block) for block in shown) + (_LINE if len(shown) < len(blocks) else 0) + _MARGIN
    figure = make_figure(width=_WIDTH / 72, height=height / 72)
    figure.set_layout_engine("none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, _WIDTH), ylim=(height, 0))
    ax.set_axis_off()
    finite = values[values.notna()]
    most = max(float(finite.abs().max()) if len(finite) else 0.0, 1e-9)
    marked = any(token.left_here for block in shown for token in block.tokens)
    _draw_key(figure, ax, most if len(finite) and finite.any() else 1.0, is_kl, height)
    left = _key_of_border(ax) if marked else _MARGIN
    if any(NO_GLYPH in piece.text for block in shown for line in block.lines for piece in line):
        _write(ax, left, 33, f"{NO_GLYPH} no font here has it", **plain(families))
    y = _TOP
    for block in shown:
        _draw_block(ax, block, y, most, families)
        y += _height(block)
    if len(shown) < len(blocks):
        _write(
            ax, _MARGIN, y + _LINE / 2, f"{len(blocks) - len(shown)} more columns or prompts are not shown", alpha=0.7
        )
    return figure


# -- what is to be drawn -----------------------------------------------------------------------------------------------


def _values(frame: pd.DataFrame) -> tuple[pd.Series[float], bool]:
    """(one number for each row, whether it is the KL divergence)."""
    if "kl" in frame.columns and frame["kl"].notna().any():
        return frame["kl"].astype(float), True
    if "logprob" in frame.columns and "base_logprob" in frame.columns:
        return frame["logprob"].astype(float) - frame["base_logprob"].astype(float), False
    raise AdapterLabError(
        "plot_divergence needs the column 'kl', or 'logprob' and 'base_logprob', as lab.divergence(text) gives them."
    )


def _blocks(frame: pd.DataFrame, values: pd.Series[float]) -> list[_Block]:
    """One block for each prompt and column, prompts ascending, columns in the frame's order, tokens by position."""
    several = "prompt_index" in frame.columns and frame["prompt_index"].nunique() > 1
    left = frame["first_difference"].eq(True).to_list() if "first_difference" in frame.columns else [False] * len(frame)
    prompts = frame["prompt_index"].to_list() if several else [0] * len(frame)
    numbers = values.to_list()
    found: dict[tuple[Any, str], list[tuple[Any, _Token]]] = {}
    order = {str(column): place for place, column in enumerate(dict.fromkeys(frame["column"]))}
    for row, (column, position, token) in enumerate(zip(frame["column"], frame["position"], frame["token"])):
        here = _Token(visible(str(token)), numbers[row], left[row], str(token).endswith(("\n", "\r")))
        found.setdefault((prompts[row], str(column)), []).append((position, here))
    blocks = []
    for prompt, column in sorted(found, key=lambda key: (key[0], order[key[1]])):
        tokens = [token for _, token in sorted(found[prompt, column], key=lambda pair: pair[0])]
        title = wrapped(column, 64, 1) + (f" · prompt {prompt}" if several else "")
        blocks.append(_Block(title, tokens))
    return blocks


def _set_lines(blocks: Sequence[_Block], families: list[str]) -> None:
    """Break each block into lines, and share out the lines that may be shown; a block without lines is left out."""
    measure = _measure(families)
    budget = MOST_LINES
    for place, block in enumerate(blocks):
        if budget < FEWEST_LINES and place:
            break
        fair = max(budget // (len(blocks) - place), FEWEST_LINES)
        block.lines, shown = _break(block.tokens, fair, families, measure)
        block.hidden = len(block.tokens) - shown
        budget -= len(block.lines)


def _break(
    tokens: Sequence[_Token], most: int, families: list[str], measure: Callable[[str], float]
) -> tuple[list[list[_Piece]], int]:
    """(at most `most` lines, how many tokens are in them whole)."""
    room = _WIDTH - 2 * _MARGIN
    lines: list[list[_Piece]] = [[]]
    x = 0.0
    for number, token in enumerate(tokens):
        for text in _fitting(drawable(token.text, families), room, measure):
            width = measure(text)
            if x and x + width > room:
                lines.append([])
                x = 0.0
            if len(lines) > most:
                return lines[:most], number
            word = text.lstrip(" ")
            lines[-1].append(_Piece(text, x, width, width - measure(word) if word != text else 0.0, token))
            x += width + 1
        if token.ends_line and number + 1 < len(tokens):
            lines.append([])
            x = 0.0
            if len(lines) > most:
                return lines[:most], number + 1
    return lines, len(tokens)


def _fitting(text: str, room: float, measure: Callable[[str], float]) -> list[str]:
    """A token in pieces that each fit in a line: itself, as a rule."""
    text = text[:_MOST_LETTERS]
    if not text or measure(text) <= room:
        return [text] if text else []
    length = max(int(len(text) * room / measure(text) * 0.9), 1)
    while length > 1 and any(measure(text[k : k + length]) > room for k in range(0, len(text), length)):
        length = max(length * 3 // 4, 1)
    return [text[k : k + length] for k in range(0, len(text), length)]


def _measure(families: list[str]) -> Callable[[str], float]:
    """How wide a text is, in points."""
    from functools import cache

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    dots = 192
    renderer = FigureCanvasAgg(Figure(figsize=(1, 1), dpi=dots)).get_renderer()
    font = FontProperties(family=families, size=_SIZE)

    @cache
    def measure(text: str) -> float:
        width: float = renderer.get_text_width_height_descent(text, font, ismath=False)[0]
        return width * 72 / dots + 1.5

    return measure


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def _height(block: _Block) -> float:
    return _HEAD + _LINE * (len(block.lines) + bool(block.hidden)) + _GAP


def _draw_block(ax: Axes, block: _Block, y: float, most: float, families: list[str]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    _write(ax, _MARGIN, y + _HEAD / 2, drawable(block.title, families), fontsize=11, **plain(families))
    boxes, colours, edges = [], [], []
    look: dict[str, Any] = {"fontsize": _SIZE, **plain(families)}
    for number, line in enumerate(block.lines):
        top = y + _HEAD + _LINE * number
        for piece in line:
            box = Rectangle((_MARGIN + piece.x, top + 1.5), piece.width, _LINE - 3)
            boxes.append(box)
            value = piece.token.value
            colours.append(to_rgba(LESS if value < 0 else MORE, _shade(value, most)))
            if piece.token.left_here:
                edges.append(box)
            if piece.text.strip(" "):
                _write(ax, _MARGIN + piece.x + 0.75 + piece.indent, top + _LINE / 2, piece.text.lstrip(" "), **look)
    ax.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="none", linewidths=0), autolim=False)
    if edges:
        ax.add_collection(
            PatchCollection(edges, facecolors="none", edgecolors=[text_colour()], linewidths=1.6), autolim=False
        )
    if block.hidden:
        below = y + _HEAD + _LINE * (len(block.lines) + 0.5)
        _write(ax, _MARGIN, below, f"{block.hidden:,} more tokens are not shown", alpha=0.7)


def _shade(value: float, most: float) -> float:
    """How opaque a token's ground is: by the square root, 0 where there is no number."""
    return 0.0 if value != value else float(_STRONGEST * min(abs(value) / most, 1) ** 0.5)


def _write(ax: Axes, x: float, y: float, text: str, **look: Any) -> None:
    """Text whose letters stand on one line whatever they are: centred by the font's height, not by the text's."""
    ax.text(x, y + 0.35 * look.get("fontsize", USUAL_TEXT), text, va="baseline", **{"fontsize": USUAL_TEXT, **look})


def _draw_key(figure: Figure, ax: Axes, most: float, is_kl: bool, height: float) -> None:
    """The colour bar at the top, in nats."""
    import numpy as np
    from matplotlib.colors import to_rgba

    ends = np.linspace(0 if is_kl else -most, most, 257)
    shades = np.array([[to_rgba(LESS if v < 0 else MORE, _shade(v, most)) for v in (ends[1:] + ends[:-1]) / 2]])
    wide, left = 150.0, _WIDTH - _MARGIN - 160
    bar = figure.add_axes((left / _WIDTH, 1 - 20 / height, wide / _WIDTH, 9 / height))
    bar.imshow(shades, aspect="auto", extent=(ends[0], ends[-1], 0, 1))
    bar.set_yticks([])
    ticks = [0, most / 2, most] if is_kl else [-most, 0, most]
    bar.set_xticks(ticks, [short_number(abs(tick)) if tick >= 0 else f"−{short_number(-tick)}" for tick in ticks])
    bar.tick_params(labelsize=USUAL_TEXT - 1, length=2)
    bar.spines[:].set_linewidth(0.6)
    words = "KL(column ‖ base), nats: the stronger, the further from base"
    if not is_kl:
        words = "log-probability, column − base, nats: orange likelier, blue less"
    _write(ax, _MARGIN, 15.5, words)


def _key_of_border(ax: Axes) -> float:
    """What the border means; gives where the next word of the key may begin."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((_MARGIN + 0.8, 28), 14, 10, facecolor="none", edgecolor=text_colour(), linewidth=1.6))
    _write(ax, _MARGIN + 20, 33, "here the adapter left the base")
    return _MARGIN + 190
