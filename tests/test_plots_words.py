"""A text token by token, in any script; and plots as parts of a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context, rcParams, rcParamsDefault
from matplotlib.collections import PatchCollection

from adapterlab.errors import AdapterLabError
from adapterlab.plots import draw_svg, figure_svg, make_figure, plot_delta_norms, plot_divergence, plot_parameters
from adapterlab.plots.glyphs import drawable, families_for, visible, wrapped
from adapterlab.plots.words import FEWEST_LINES, LESS, MORE, MOST_LINES

STRANGE = ["$\\nothing$", "\\frac", " <b>", "&amp;", "e\u0301", "\u0301", "\u4f60\u597d", "\U0001f3f4\u200d\u2620\ufe0f",
           "\u0645", "\x00", "\x1b[0m", "\u202e", "\ufeff", "\ufffd", "%", "{}", "_", "\ue000", "\u2028", ""]  # fmt: skip


def frame_of(tokens: list[str], column: str = "pirate", **columns: Any) -> pd.DataFrame:
    known = {"column": column, "position": range(len(tokens)), "token": tokens}
    return pd.DataFrame(known | ({"kl": 1.0} if "logprob" not in columns else {}) | columns)


def words(figure: Any) -> list[str]:
    """The tokens and titles as they are written, from the top down, without the key's."""
    return [text.get_text() for text in figure.axes[0].texts if text.get_position()[1] > 46]


def shades(figure: Any) -> list[tuple[str, float]]:
    from matplotlib.colors import to_hex

    [boxes, *_] = [c for c in figure.axes[0].collections if isinstance(c, PatchCollection)]
    return [(to_hex(colour), round(float(colour[3]), 6)) for colour in boxes.get_facecolor()]


# -- letters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", " the"), ("a b", "a b"), (" ", "·"), ("  ", "··"), ("  x", "··x"), ("x ", "x·"), ("\n", "↵"),
        ("\r\n", "↵"), (" \n\n", "·↵↵"), ("\t", "→"), ("\u00a0", "·"), ("\u0301", "◌\u0301"), (" \u0301", " ◌\u0301"),
        ("e\u0301", "e\u0301"), ("\u200d", "U+200D"), ("a\u200db", "ab"), ("\x07", "□"), ("\ud800", "□"), ("", ""),
        ("$", "$"),
    ],
)  # fmt: skip
def test_nothing_of_a_token_vanishes(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_fonts_of_the_machine_stand_in_where_the_style_lacks_a_letter() -> None:
    with rc_context({"font.family": ["cmr10"]}):
        families = families_for(["Ж"])  # Computer Modern has no Cyrillic; DejaVu, which comes with matplotlib, has
        assert families == ["cmr10", "DejaVu Sans"]
        assert drawable("Ж\U0010fffd", families) == "Ж□"
        assert families_for(["abc"]) == ["cmr10"]


def test_a_long_name_is_broken_and_the_middle_of_an_endless_one_left_out() -> None:
    name = "pirate_speech-opt-350m.rank16_alpha32-all-linear-layers-seed0001"
    lines = wrapped(name).split("\n")
    assert "".join(lines) == name
    assert len(lines) == 3
    assert all(len(line) <= 26 for line in lines)
    short = wrapped("x" * 500)
    assert "…" in short
    assert len(short) < 3 * 27


# -- the picture -------------------------------------------------------------------------------------------------------


def test_the_text_is_there_in_its_order_with_a_block_for_each_column() -> None:
    one, two = frame_of(["Ahoy", " there", "\n", "matey"]), frame_of(["Ahoy"], column="$\\robot$")
    frame = pd.concat([one.iloc[::-1], two])
    before = frame.copy()
    figure = plot_divergence(frame)
    assert words(figure) == ["pirate", "Ahoy", "there", "↵", "matey", "$\\robot$", "Ahoy"]
    rows = [text.get_position()[1] for text in figure.axes[0].texts if text.get_text() in ("there", "↵", "matey")]
    assert rows[0] == rows[1] < rows[2], "a newline ends its line"
    pd.testing.assert_frame_equal(frame, before)


def test_prompts_have_blocks_of_their_own() -> None:
    frame = pd.concat([frame_of(["b"], prompt_index=1), frame_of(["a"], prompt_index=0)])
    assert words(plot_divergence(frame)) == ["pirate · prompt 0", "a", "pirate · prompt 1", "b"]


def test_the_shade_is_the_square_root_of_the_divergence() -> None:
    figure = plot_divergence(frame_of(list("abcd"), kl=[0.0, 1.0, 4.0, np.nan]))
    # strongest at the largest, half of that at a quarter of it, none at 0 and where there is no number
    assert shades(figure) == [(MORE, 0.0), (MORE, 0.4), (MORE, 0.8), (MORE, 0.0)]
    bar = figure.axes[1]
    assert [label.get_text() for label in bar.get_xticklabels()] == ["0", "2.0", "4.0"]
    assert any("nats" in text.get_text() for text in figure.axes[0].texts)


def test_without_a_divergence_the_difference_of_logprobs_is_drawn_on_two_sides() -> None:
    frame = frame_of(list("abc"), logprob=[-1.0, -3.0, -2.0], base_logprob=[-3.0, -2.5, -2.0])
    for known in (frame, frame.assign(kl=np.nan)):
        figure = plot_divergence(known)
        assert shades(figure) == [(MORE, 0.8), (LESS, 0.4), (MORE, 0.0)]  # +2, −0.5, 0
        assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["−2.0", "0", "2.0"]


def test_the_first_difference_has_a_border_and_the_key_says_what_it_means() -> None:
    figure = plot_divergence(frame_of(list("abc"), first_difference=[False, True, None]))
    _, borders = figure.axes[0].collections
    assert len(borders.get_paths()) == 1
    at = {text.get_text(): text.get_position()[0] for text in figure.axes[0].texts}
    box = borders.get_paths()[0].get_extents()
    assert at["a"] < box.x0 <= at["b"] < box.x1 <= at["c"]
    assert "here the adapter left the base" in at
    assert len(plot_divergence(frame_of(list("abc"))).axes[0].collections) == 1


def test_any_letter_can_be_drawn_without_a_warning() -> None:
    figure = plot_divergence(frame_of(STRANGE))
    assert figure._repr_png_()  # type: ignore[attr-defined]
    found = words(figure)
    assert {"$\\nothing$", "\\frac", "<b>", "&amp;", "□", "◌\u0301", "U+202E", "_", "{}"} <= set(found)
    assert any("no font here has it" in text.get_text() for text in figure.axes[0].texts)


def test_tokens_neither_cover_one_another_nor_leave_the_figure() -> None:
    tokens = [f" {'word' * (1 + k % 7)}{k}" for k in range(150)] + ["x" * 400]
    figure: Any = plot_divergence(frame_of(tokens))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    assert "".join(words(figure)[1:]) == "".join(token.strip() for token in tokens), "nothing is lost"
    ground = figure.axes[0].collections[0]
    spans = sorted((path.get_extents().y0, path.get_extents().x0, path.get_extents().x1) for path in ground.get_paths())
    assert all(one[2] <= other[1] for one, other in pairwise(spans) if one[0] == other[0])


def test_long_texts_are_cut_and_say_how_much_is_hidden() -> None:
    tokens = ["line\n"] * 500
    figure = plot_divergence(pd.concat([frame_of(tokens), frame_of(tokens[:10], column="short")]))
    found = words(figure)
    first = MOST_LINES // 2
    assert found[: first + 2] == ["pirate", *["line↵"] * first, f"{500 - first} more tokens are not shown"]
    assert found[first + 2 :] == ["short", *["line↵"] * 10]
    higher = plot_divergence(frame_of(tokens[:20])).get_figheight()
    assert higher - plot_divergence(frame_of(tokens[:10])).get_figheight() == pytest.approx(10 * 19 / 72)


def test_very_many_columns_are_cut_too() -> None:
    count = MOST_LINES // FEWEST_LINES + 7
    frame = pd.concat([frame_of(["line\n"] * 9, column=f"a{k}") for k in range(count)])
    found = words(plot_divergence(frame))
    assert found.count("line↵") == MOST_LINES
    assert found[-1] == "7 more columns or prompts are not shown"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda frame: frame.drop(columns="token"), "plot_divergence needs .*missing: 'token'"),
        (lambda frame: frame.drop(columns="kl"), "'kl', or 'logprob' and 'base_logprob'"),
        (lambda frame: frame.iloc[:0], "nothing to draw"),
    ],
)
def test_words_that_cannot_be_drawn_are_refused(change: Any, word: str) -> None:
    with pytest.raises(AdapterLabError, match=word):
        plot_divergence(change(frame_of(["a"])))


# -- in a page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser makes of it: elements with their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data)


DRAWING = {"svg", "g", "defs", "path", "rect", "text", "use", "clippath", "image", "pattern"}


def parameters(name: str = "lora") -> pd.DataFrame:
    return pd.DataFrame({"owner": ["base", name], "parameters": [10**6, 10**4]})


def norms() -> pd.DataFrame:
    return pd.DataFrame({"layer": [0, 1], "module": "q", "norm": [0.0, 1.0], "relative_norm": [0.0, 0.1]})


def test_a_plot_is_one_svg_without_a_document_around_it() -> None:
    html = draw_svg(lambda: plot_parameters(parameters()), "Parameters")
    tag, root = Page(html).elements[0]
    assert html.startswith("<svg ")
    assert html.endswith("</svg>")
    assert not re.search(r"<\?xml|<!DOCTYPE|<!--|<style|<metadata|<title", html)
    assert tag == "svg"
    assert (root["role"], root["aria-label"]) == ("img", "Parameters")
    assert "max-width: 100%" in str(root["style"])
    width, height = (float(number) for number in str(root["viewbox"]).split()[2:])
    assert (width, "height" in root) == (7.2 * 72, False)
    assert height == pytest.approx(72 * plot_parameters(parameters()).figure.get_figheight())  # type: ignore[union-attr]
    assert float(str(root["width"])) == pytest.approx(7.2 * 96, abs=0.5)


def test_words_are_words_in_the_colour_of_the_page_on_no_ground_of_its_own() -> None:
    for style in ({}, {"text.color": "red", "axes.facecolor": "blue", "figure.facecolor": "green"}):
        with rc_context(style):
            page = Page(draw_svg(lambda: plot_parameters(parameters()), "Parameters"))
        assert {"base", "lora", "1,000,000", "10,000 · 1 % of base", "parameters (logarithmic scale)"} <= set(page.text)
        words = [attributes for tag, attributes in page.elements if tag == "text"]
        assert all("fill: currentColor" in str(attributes["style"]) for attributes in words)
        fills = {
            found
            for _, attributes in page.elements
            for found in re.findall(r"fill: ([^;]+)", attributes.get("style") or "")
        }
        assert fills == {"currentColor", "none", "#7d7d7d", "#0072b2"}


def test_numbers_in_cells_keep_the_colour_that_can_be_read_on_them() -> None:
    html = draw_svg(lambda: plot_delta_norms(norms().replace(0.0, 0.01)), "Weights")
    assert "stroke: #ffffff" not in html, "no lines between the cells in a colour that the page may not have"
    page = Page(html)
    styles = [str(attributes["style"]) for tag, attributes in page.elements if tag == "text"]
    cells = [(text, style) for text, style in zip(page.text, styles) if "currentColor" not in style]
    assert [text for text, _ in cells] == ["1.0", "10"]
    assert "fill: #ffffff" in cells[0][1]
    assert "fill: #010101" in cells[1][1]


def test_two_pictures_share_no_id_and_every_reference_is_met() -> None:
    html = [draw_svg(lambda: plot_delta_norms(norms()), "Weights") for _ in range(2)]
    ids = [re.findall(r'\bid="([^"]+)"', one) for one in html]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    for one, known in zip(html, ids):
        used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', one))
        assert {first or second for first, second in used} == set(known)
        assert len(known) == len(set(known))


@pytest.mark.parametrize(
    "name", ["<script>alert('1')</script>", '"><img src=x onerror="x">', "a&b", "&lt;b&gt;", "]]>"]
)
def test_names_and_tokens_come_out_as_words(name: str) -> None:
    drawings = (
        draw_svg(lambda: plot_parameters(parameters(name)), name),
        draw_svg(lambda: plot_divergence(frame_of([name, "a"], column=name)), name),
    )
    for html in drawings:
        page = Page(html)
        assert {tag for tag, _ in page.elements} <= DRAWING
        assert not any(key.startswith("on") or key == "src" for _, attributes in page.elements for key in attributes)
        assert page.elements[0][1]["aria-label"] == name
        assert name in "".join(page.text)


def test_a_page_has_fonts_of_its_own_for_what_is_missing_here() -> None:
    html = draw_svg(lambda: plot_divergence(frame_of(STRANGE)), "\x00 words")
    page = Page(html)
    assert "\u4f60\u597d" in page.text
    assert "\U0001f3f4" in "".join(page.text)
    assert page.elements[0][1]["aria-label"] == " words", "what no document may contain is left out"
    html.encode()


def test_the_style_is_as_it_was_also_after_an_error() -> None:
    def fail() -> Any:
        assert rcParams["svg.fonttype"] == "none"
        assert rcParams["axes.linewidth"] == rcParamsDefault["axes.linewidth"], "the user's style is not the page's"
        raise AdapterLabError("no picture")

    with rc_context({"text.color": "red", "svg.fonttype": "path", "axes.linewidth": 9, "font.family": ["serif"]}):
        before = dict(rcParams)
        with pytest.raises(AdapterLabError, match="no picture"):
            draw_svg(fail, "nothing")
        assert dict(rcParams) == before
        draw_svg(lambda: plot_parameters(parameters()), "Parameters")
        assert dict(rcParams) == before


def test_a_figure_that_is_there_can_be_put_into_a_page() -> None:
    figure = make_figure(3, 2)
    figure.add_subplot().set_title("a < b", color="red")
    page = Page(figure_svg(figure, "Mine"))
    assert "a < b" in page.text
    assert page.elements[0][1]["aria-label"] == "Mine"
