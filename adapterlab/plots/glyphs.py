"""Any text in a plot: what would not be seen is made visible, and what no font has is replaced. Names are no formulas."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from adapterlab.plots.style import for_a_page

NO_GLYPH = "\N{WHITE SQUARE}"
NEWLINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
_SPACE, _TAB, _MARK = "\N{MIDDLE DOT}", "\N{RIGHTWARDS ARROW}", "\N{DOTTED CIRCLE}"
_UNSEEN_SPACE = re.compile(r" (?=\s|$)|(?<=\s) ")  # at an end, or beside another
_GENERIC = {"sans-serif", "serif", "monospace", "cursive", "fantasy"}
# They have a glyph for every character, or other glyphs than the characters they answer to.
_NO_FALLBACK = (
    "lastresort",
    "last resort",
    ".lastresort",
    "cm",
    "stixsiz",
    "stixnonuni",
    "symbol",
    "wingdings",
    "webdings",
)
_MOST_FONTS = 400


def visible(token: str) -> str:
    """`token` with all of it to be seen: · for spaces that do not stand alone before a word, ↵ → for newline and tab,
    ◌ under a combining mark without its letter, the code of what has no shape at all. "" stays ""."""
    text = _UNSEEN_SPACE.sub(_SPACE, token.replace("\r\n", "\n"))
    shown = "".join(map(_shown, text))
    if text and not shown.strip(" "):
        shown += "".join(f"U+{ord(letter):04X}" for letter in text.strip(" ")[:2])
    word = shown.lstrip(" ")
    if word and unicodedata.category(word[0]).startswith("M"):
        shown = shown[: len(shown) - len(word)] + _MARK + word
    return shown


def _shown(letter: str) -> str:
    if letter in "\n\r\v\f\u2028\u2029\x85":
        return NEWLINE
    if letter == "\t":
        return _TAB
    category = unicodedata.category(letter)
    if category == "Zs" and letter != " ":
        return _SPACE
    if category in ("Cc", "Cs") or letter in "\ufffe\uffff":
        return NO_GLYPH
    # Joiners, direction marks and variants have no shape of their own, and would turn the order of what follows.
    return "" if category == "Cf" or "\ufe00" <= letter <= "\ufe0f" else letter


def families_for(texts: Iterable[str]) -> list[str]:
    """matplotlib's font families, and after them those on this machine that have what those lack."""
    from matplotlib import rcParams

    families = list(rcParams["font.family"])
    missing = {letter for text in texts for letter in text if letter != "\n"} - _letters(
        tuple(families), tuple(_chosen())
    )
    return families + list(_fallbacks(frozenset(missing))) if missing and not for_a_page() else families


def drawable(text: str, families: list[str]) -> str:
    """`text` with □ for each character that none of the fonts has. A page has fonts of its own: there it stays."""
    if for_a_page():
        return text
    known = _letters(tuple(families), tuple(_chosen()))
    return "".join(letter if letter in known or letter == "\n" else NO_GLYPH for letter in text)


def wrapped(name: str, width: int = 26, lines: int = 3) -> str:
    """A name in lines of at most `width` characters, broken after a - _ . / or space where there is one in the last
    half of the line; the middle of what is longer than `lines` is left out."""
    shown = visible(name)
    if len(shown) > width * lines:
        half = width * lines // 2 - 1
        shown = shown[:half] + "…" + shown[-half:]
    found = []
    while len(shown) > width:
        cut = max((shown.rfind(mark, width // 2, width) + 1 for mark in "-_./ "), default=0) or width
        found.append(shown[:cut])
        shown = shown[cut:]
    return "\n".join([*found, shown])


def plain(families: list[str]) -> dict[str, Any]:
    """The properties of a text that is a name or somebody's words: these fonts, and no formula between two $."""
    return {"fontfamily": families, "parse_math": False}


def _chosen() -> list[str]:
    """Which fonts stand for the generic families: they are part of the style."""
    from matplotlib import rcParams

    settings: Mapping[str, Any] = rcParams  # type: ignore[assignment]
    return [name for family in settings["font.family"] if family in _GENERIC for name in settings[f"font.{family}"]]


@lru_cache(maxsize=16)
def _letters(families: tuple[str, ...], chosen: tuple[str, ...]) -> frozenset[str]:
    """All characters that these families have; `chosen` is what the generic ones stand for, and part of the key."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    found: set[str] = set()
    for family in families:
        try:
            path = findfont(FontProperties(family=[family]), fallback_to_default=False)
        except ValueError:
            continue  # matplotlib passes over it too
        found.update(map(chr, get_font(path).get_charmap()))
    return frozenset(found or map(chr, get_font(findfont(FontProperties())).get_charmap()))


@lru_cache(maxsize=64)
def _fallbacks(missing: frozenset[str]) -> tuple[str, ...]:
    """Families of this machine's fonts that together have as much of `missing` as there is."""
    from matplotlib.font_manager import fontManager, get_font

    left, found = set(missing), []
    regular = [
        entry for entry in fontManager.ttflist if entry.style == "normal" and str(entry.weight) in ("400", "normal")
    ]
    regular = [entry for entry in regular if not entry.name.lower().startswith(_NO_FALLBACK)]
    for entry in sorted(regular, key=_preference)[:_MOST_FONTS]:
        try:
            font = get_font(entry.fname)
        except (OSError, RuntimeError):
            continue  # a font that is gone or broken
        covered = {letter for letter in left if font.get_char_index(ord(letter))}
        if covered:
            left -= covered
            found.append(entry.name)
        if not left:
            break
    return tuple(dict.fromkeys(found))


def _preference(entry: Any) -> tuple[int, str]:
    """Large collections first, emoji after letters."""
    name = entry.name.lower()
    likely = ("dejavu sans", "noto sans", "cjk", "unicode", "hiragino", "yahei", "pingfang", "emoji")
    return next((place for place, word in enumerate(likely) if word in name), len(likely)), name
