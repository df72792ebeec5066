"""Plots: frames in, Axes out, and every number to be read."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest
from matplotlib.figure import Figure

from adapterlab.errors import AdapterLabError
from adapterlab.plots import make_figure, plot_parameters

BASE, PIRATE, ROBOT = 134_515_008, 460_800, 92_160


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame({"owner": ["base", "pirate", "robot"], "parameters": [BASE, PIRATE, ROBOT]})


def test_one_bar_per_owner_with_the_exact_numbers_written_beside(frame: pd.DataFrame) -> None:
    ax = plot_parameters(frame)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["base", "pirate", "robot"]
    assert [round(bar.get_width()) for bar in ax.patches] == [BASE, PIRATE, ROBOT]
    shown = [text.get_text() for text in ax.texts]
    # 460800 / 134515008 = 0.342 %, 92160 / 134515008 = 0.0685 %
    assert shown == ["134,515,008", "460,800  (0.34 % of base)", "92,160  (0.069 % of base)"]


def test_numbers_a_thousand_apart_both_have_a_bar_to_see(frame: pd.DataFrame) -> None:
    ax = plot_parameters(frame)
    figure = ax.figure
    figure.draw_without_rendering()
    whole = ax.get_window_extent().width
    widths = [bar.get_window_extent().width / whole for bar in ax.patches]
    assert ax.get_xscale() == "log"
    assert "logarithmic" in ax.get_xlabel()
    assert widths == sorted(widths, reverse=True)
    assert min(widths) > 0.05


def test_numbers_stay_inside_the_axes(frame: pd.DataFrame) -> None:
    ax = plot_parameters(frame)
    ax.figure.draw_without_rendering()
    for text in ax.texts:
        assert text.get_window_extent().x1 <= ax.figure.bbox.x1


def test_colours_are_those_of_okabe_and_ito_and_names_stand_beside(frame: pd.DataFrame) -> None:
    from matplotlib.colors import to_hex

    assert [to_hex(bar.get_facecolor()) for bar in plot_parameters(frame).patches] == ["#7d7d7d", "#0072b2", "#e69f00"]


def test_rows_of_one_owner_are_added_up() -> None:
    frame = pd.DataFrame({"owner": ["base", "a", "a"], "parameters": [1000, 10, 20]})
    assert [text.get_text() for text in plot_parameters(frame).texts] == ["1,000", "30  (3 % of base)"]


def test_an_owner_without_parameters_has_its_zero_written_out() -> None:
    frame = pd.DataFrame({"owner": ["base", "empty"], "parameters": [1000, 0]})
    ax = plot_parameters(frame)
    assert ax.texts[1].get_text() == "0  (0 % of base)"
    assert ax.patches[1].get_width() <= ax.get_xlim()[0]  # nothing of it inside the axes


def test_draws_into_the_axes_it_is_given_and_leaves_the_frame(frame: pd.DataFrame) -> None:
    before = frame.copy()
    ax = Figure().add_subplot()
    assert plot_parameters(frame, ax=ax) is ax
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (pd.DataFrame({"owner": ["base"]}), "parameters"),
        (pd.DataFrame({"parameters": [3]}), "owner"),
        (pd.DataFrame({"owner": ["base"], "parameters": [0]}), "nothing to draw"),
        (pd.DataFrame({"owner": [], "parameters": []}), "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(broken: pd.DataFrame, word: str) -> None:
    with pytest.raises(AdapterLabError, match=word):
        plot_parameters(broken)


def test_text_follows_the_style_of_the_page(frame: pd.DataFrame) -> None:
    from matplotlib import rc_context, style

    with rc_context():
        style.use("dark_background")
        ax = plot_parameters(frame)
    assert ax.texts[0].get_color() == "white"
    assert ax.figure.get_facecolor() == (0, 0, 0, 1)


def test_a_figure_shows_itself_sharply_at_its_size() -> None:
    from struct import unpack

    image, size = make_figure(width=5, height=2)._repr_png_()  # type: ignore[attr-defined]
    assert image.startswith(b"\x89PNG")
    assert unpack(">II", image[16:24]) == (5 * 2 * 96, 2 * 2 * 96)
    assert size == {"width": 5 * 96, "height": 2 * 96}


def test_no_pyplot_is_imported() -> None:
    code = (
        "import sys, pandas as pd; from adapterlab.plots import plot_parameters;"
        "plot_parameters(pd.DataFrame({'owner': ['base'], 'parameters': [3]})).figure._repr_png_();"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
