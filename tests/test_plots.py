"""Plots: frames in, Axes out, and every number to be read."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from adapterlab.errors import AdapterLabError
from adapterlab.plots import make_figure, plot_parameters, plot_ranks, plot_training

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
    assert shown == ["134,515,008", "460,800 · 0.34 % of base", "92,160 · 0.069 % of base"]


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
    ends = [text.get_window_extent().x1 for text in ax.texts]
    right = ax.get_window_extent().x1
    assert right - 12 < max(ends) <= right, "inside, and the bars take what room there is"


def test_colours_are_those_of_okabe_and_ito_and_names_stand_beside(frame: pd.DataFrame) -> None:
    from matplotlib.colors import to_hex

    assert [to_hex(bar.get_facecolor()) for bar in plot_parameters(frame).patches] == ["#7d7d7d", "#0072b2", "#e69f00"]


def test_rows_of_one_owner_are_added_up() -> None:
    frame = pd.DataFrame({"owner": ["base", "a", "a"], "parameters": [1000, 10, 20]})
    assert [text.get_text() for text in plot_parameters(frame).texts] == ["1,000", "30 · 3 % of base"]


@pytest.fixture
def sizes() -> pd.DataFrame:
    """As `lab.parameters()`: an adapter with a whole module beside its factors, and a pruned AdaLoRA."""
    rows = [
        ("base", "weights", "bfloat16", 331_196_416, 331_196_416, 662_392_832, 662_510_000),
        ("lora", "weights", "float32", 1_572_864, 1_572_864, 6_291_456, 109_322_000),
        ("lora", "modules_to_save", "float32", 25_755_648, 25_755_648, 103_022_592, 0),
        ("ada", "weights", "float32", 400_000, 100_000, 1_600_000, None),
    ]
    columns = ["owner", "kind", "dtype", "parameters", "effective", "bytes", "bytes_on_disk"]
    return pd.DataFrame(rows, columns=columns).astype({"bytes_on_disk": "Int64"})


def test_bytes_stand_beside_each_bar_and_parts_have_thin_bars_of_their_own(sizes: pd.DataFrame) -> None:
    ax = plot_parameters(sizes)
    # 662392832 B = 662.4 MB; 6291456 + 103022592 = 109314048 B = 109.3 MB; 27328512 / 331196416 = 8.25 %
    assert [text.get_text() for text in ax.texts] == [
        "331,196,416\n662.4 MB in memory (bfloat16) · 662.5 MB on disk",
        "27,328,512 · 8.3 % of base\n109.3 MB in memory (float32) · 109.3 MB on disk",
        "25,755,648 of these in modules_to_save · 103.0 MB",
        "400,000 · 0.12 % of base\n1.60 MB in memory (float32)",
        "100,000 of these effective, the rest is pruned",
    ]
    assert [round(bar.get_width()) for bar in ax.patches] == [331_196_416, 27_328_512, 25_755_648, 400_000, 100_000]
    assert [bar.get_height() < 0.3 for bar in ax.patches] == [False, False, True, False, True]
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, False, True, False, False]
    assert len(ax.get_yticks()) == 3, "a name for each owner, and none for parts"
    boxes = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches)
    assert all(upper[1] < lower[0] for upper, lower in pairwise(boxes)), "no bar covers another"


@pytest.mark.parametrize("count", [1, 4, 9])
def test_long_names_and_many_adapters_stay_in_the_figure(count: int) -> None:
    names = [f"pirate_speech-opt-350m.rank16_alpha32-all-linear-layers-seed{k:04d}" for k in range(count)]
    assert len(names[0]) == 64
    names[-1] = "W" * (26 if count == 1 else 64)  # as wide as a line can be
    frame = pd.DataFrame({"owner": ["base", *names], "parameters": [BASE, *[PIRATE // (k + 1) for k in range(count)]]})
    frame = frame.assign(bytes=4 * frame["parameters"], dtype="float32", bytes_on_disk=4 * frame["parameters"] + 999)
    ax = plot_parameters(frame)
    ax.figure.draw_without_rendering()
    labels = ax.get_yticklabels()
    assert ["".join(label.get_text().split("\n")) for label in labels] == ["base", *names]
    assert all(text.get_window_extent().x1 <= ax.get_window_extent().x1 for text in ax.texts)
    boxes = [thing.get_window_extent() for thing in (*labels, *ax.texts)]
    assert all(box.x0 >= 0 and box.x1 <= ax.figure.bbox.x1 for box in boxes)
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])


def test_a_name_is_no_formula_and_needs_no_font(frame: pd.DataFrame) -> None:
    frame["owner"] = ["base", "$\\nothing$", "\N{PILE OF POO}\u4f60\n"]
    ax = plot_parameters(frame)
    assert ax.figure._repr_png_()  # type: ignore[union-attr]
    assert ax.get_yticklabels()[1].get_text() == "$\\nothing$"
    assert ax.get_yticklabels()[2].get_text() == "□□↵"


def test_an_owner_without_parameters_has_its_zero_written_out() -> None:
    frame = pd.DataFrame({"owner": ["base", "empty"], "parameters": [1000, 0]})
    ax = plot_parameters(frame)
    assert ax.texts[1].get_text() == "0 · 0 % of base"
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


def test_importing_the_plots_loads_no_matplotlib_and_drawing_no_pyplot() -> None:
    code = """
import sys
from adapterlab.plots import *
assert not {"matplotlib", "pandas", "numpy"} & set(sys.modules)
import pandas as pd
owner = {"owner": ["base"], "parameters": [3]}
cell = {"layer": [0], "module": ["q"]}
plot_parameters(pd.DataFrame(owner)).figure._repr_png_()
plot_ranks(pd.DataFrame(cell | {"rank": [3], "init_r": [4]})).figure._repr_png_()
plot_training(pd.DataFrame({"step": [1], "loss": [3.0]}))._repr_png_()
memory = pd.DataFrame({"owner": ["base"], "kind": ["weights"], "device": ["cpu"], "bytes": [3]})
plot_memory(memory).figure._repr_png_()
plot_delta_norms(pd.DataFrame(cell | {"norm": [1.0], "relative_norm": [0.1]})).figure._repr_png_()
plot_divergence(pd.DataFrame({"column": ["a"], "position": [0], "token": ["b"], "kl": [1.0]}))._repr_png_()
draw_svg(lambda: plot_memory(memory), "memory")
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- a training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def history() -> pd.DataFrame:
    """As `TrainingRun.history` of an AdaLoRA run: the row of step 0 is from before the first step."""
    nan = np.nan
    return pd.DataFrame(
        {
            "step": [0, 1, 2, 3, 4],
            "loss": [nan, 4.0, 3.0, 2.5, 2.25],
            "eval_loss": [4.5, nan, 3.5, nan, 3.0],
            "learning_rate": [nan, 1e-3, 1e-3, 1e-3, 1e-3],
            "seconds": [0.1, 0.2, 0.3, 0.4, 0.5],
            "budget": [nan, 12, 10, 8, 8],
            "total_rank": [nan, 12, 12, 8, 8],
        }
    )


def lines(ax: object) -> dict[str, list[tuple[float, float]]]:
    """Label → points of the lines that are drawn."""
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in ax.get_lines()}  # type: ignore[attr-defined]


def test_a_training_shows_its_losses_and_its_ranks(history: pd.DataFrame) -> None:
    before = history.copy()
    figure = plot_training(history, title="ada_$1$")
    losses, ranks = figure.axes
    assert lines(losses) == {
        "training loss": [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.25)],
        "held-out loss": [(0, 4.5), (2, 3.5), (4, 3.0)],
    }
    assert lines(ranks) == {
        "kept": [(1, 12), (2, 12), (3, 8), (4, 8)],
        "planned": [(1, 12), (2, 10), (3, 8), (4, 8)],
    }
    assert [line.get_marker() for line in losses.get_lines()] == ["None", "o"]
    assert [line.get_linestyle() for line in ranks.get_lines()] == ["-", "--"]
    assert (losses.get_ylabel(), ranks.get_ylabel(), ranks.get_xlabel()) == (
        "loss (nats per token)", "ranks, all layers", "step",
    )  # fmt: skip
    assert [text.get_text() for ax in figure.axes for text in ax.get_legend().get_texts()] == [
        "training loss", "held-out loss", "kept", "planned",
    ]  # fmt: skip
    assert losses.get_title(loc="left") == "ada_$1$"
    assert ranks.get_ylim()[0] == 0
    figure.draw_without_rendering()  # a name is a name, and no formula
    pd.testing.assert_frame_equal(history, before)


def test_a_training_without_ranks_or_held_out_data_is_one_line(history: pd.DataFrame) -> None:
    [ax] = plot_training(history[["step", "loss"]]).axes
    assert list(lines(ax)) == ["training loss"]
    assert ax.get_xlabel() == "step"
    nothing = history.assign(eval_loss=np.nan, budget=np.nan, total_rank=np.nan)
    [ax] = plot_training(nothing).axes
    assert list(lines(ax)) == ["training loss"]


def test_held_out_loss_alone_is_drawn(history: pd.DataFrame) -> None:
    [ax] = plot_training(history.assign(loss=np.nan).drop(columns=["budget", "total_rank"])).axes
    assert list(lines(ax)) == ["held-out loss"]


def test_what_is_no_number_is_left_out(history: pd.DataFrame) -> None:
    history.loc[2, "loss"] = np.inf
    assert lines(plot_training(history).axes[0])["training loss"] == [(1, 4.0), (3, 2.5), (4, 2.25)]


@pytest.mark.parametrize("row", [0, 1])
def test_one_step_can_be_seen(history: pd.DataFrame, row: int) -> None:
    figure = plot_training(history.iloc[[row]])
    for ax in figure.axes:
        assert all(line.get_marker() == "o" for line in ax.get_lines())
        assert ax.get_xlim() == (row - 1, row + 1)
    assert figure._repr_png_()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (
            lambda history: history.drop(columns="loss"),
            "plot_training needs the columns 'step' and 'loss'.*missing: 'loss'",
        ),
        (lambda history: history.drop(columns="step"), "missing: 'step'"),
        (lambda history: history.iloc[:0], "nothing to draw"),
        (lambda history: history.assign(loss=np.nan, eval_loss=np.nan), "nothing to draw"),
    ],
)
def test_a_history_that_cannot_be_drawn_is_refused(history: pd.DataFrame, change: object, word: str) -> None:
    with pytest.raises(AdapterLabError, match=word):
        plot_training(change(history))  # type: ignore[operator]


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranks() -> pd.DataFrame:
    rows = [(1, "q_proj", 2), (0, "q_proj", 1), (0, "down_proj", 4), (1, "down_proj", 0), (None, "lm_head", 3)]
    frame = pd.DataFrame(rows, columns=["layer", "module", "rank"]).assign(init_r=4)
    return frame.astype({"layer": "Int64"})


def test_the_budget_stands_below_when_the_run_is_known(ranks: pd.DataFrame, history: pd.DataFrame) -> None:
    before = history.copy()
    ax = plot_ranks(ranks, history=history)
    below = next(other for other in ax.figure.axes if other.get_xlabel() == "step")
    assert lines(below) == {
        "kept": [(1, 12), (2, 12), (3, 8), (4, 8)],
        "planned": [(1, 12), (2, 10), (3, 8), (4, 8)],
    }
    assert ax.get_ylabel() == "layer", "what comes back is the heatmap"
    ax.figure.draw_without_rendering()
    assert below.get_window_extent().y1 < ax.get_window_extent().y0
    pd.testing.assert_frame_equal(history, before)


def test_a_history_without_ranks_is_no_panel(ranks: pd.DataFrame, history: pd.DataFrame) -> None:
    without = history.assign(total_rank=np.nan)
    assert len(plot_ranks(ranks, history=without).figure.axes) == len(plot_ranks(ranks).figure.axes) == 2
    ax = Figure().add_subplot()
    plot_ranks(ranks, history=history, ax=ax)
    assert len(ax.figure.axes) == 2, "heatmap and colour bar: who gives the axes gets the heatmap alone"
    with pytest.raises(AdapterLabError, match=r"plot_ranks' history.*missing: 'step'"):
        plot_ranks(ranks, history=history.drop(columns="step"))


def test_a_note_is_written_above_and_broken_into_lines(ranks: pd.DataFrame) -> None:
    note = "Allocation never ran: every rank is init_r = 4. " * 4
    ax = plot_ranks(ranks, note=note)
    assert ax.get_title(loc="left").split() == note.split()
    ax.figure.draw_without_rendering()
    [title] = [text for text in ax.findobj(Text) if text.get_text().startswith("Allocation")]
    assert title.get_window_extent().x1 <= ax.figure.bbox.x1


def texts(labels: list[object]) -> list[str]:
    return [label.get_text() for label in labels]  # type: ignore[attr-defined]


def test_each_rank_stands_at_its_layer_and_module_and_sums_at_the_edges(ranks: pd.DataFrame) -> None:
    before = ranks.copy()
    ax = plot_ranks(ranks)
    assert texts(ax.get_xticklabels()) == ["q_proj\n(3)", "down_proj\n(4)", "lm_head\n(3)"]
    assert texts(ax.get_yticklabels()) == ["0", "1", "–"], "from the bottom up, what is in no layer on top"
    [beside] = ax.child_axes
    assert texts(beside.get_yticklabels()) == ["(5)", "(2)", "(3)"]
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0.5, 0.5): "1", (1.5, 0.5): "4", (0.5, 1.5): "2", (1.5, 1.5): "0", (2.5, 2.5): "3",
    }  # fmt: skip
    [mesh] = ax.collections
    assert mesh.get_array().mask.sum() == 3 * 3 - 5, "combinations that are not there are blank"
    assert not ax.get_title()
    pd.testing.assert_frame_equal(ranks, before)


def test_colours_have_the_uniform_rank_in_their_middle(ranks: pd.DataFrame) -> None:
    ax = plot_ranks(ranks)
    [mesh] = ax.collections
    assert [float(mesh.norm(value)) for value in (0, 2, 4)] == [0, 0.5, 1]  # (2 + 1 + 4 + 0 + 3) / 5 = 2
    bar = ax.figure.axes[1]
    assert bar.get_ylabel() == "rank kept\n(uniform would be 2.0)"
    assert bar.get_ylim() == (0, 4)


@pytest.mark.parametrize(("rank", "middle"), [(4, "4.0"), (0, "0.0")])
def test_all_alike_is_all_in_the_middle(ranks: pd.DataFrame, rank: int, middle: str) -> None:
    ax = plot_ranks(ranks.assign(rank=rank))
    [mesh] = ax.collections
    assert float(mesh.norm(rank)) == 0.5
    assert ax.figure.axes[1].get_ylim() == (0, 4)
    assert middle in ax.figure.axes[1].get_ylabel()
    assert ax.figure._repr_png_()  # type: ignore[union-attr]


def test_the_colours_grow_lighter_so_that_grey_prints_can_be_read() -> None:
    from matplotlib import colormaps

    from adapterlab.plots.style import RANK_COLOURS

    colours = colormaps[RANK_COLOURS](np.linspace(0, 1, 64))[:, :3]
    assert (np.diff(colours @ [0.299, 0.587, 0.114]) > 0).all()


@pytest.mark.parametrize(("layers", "modules"), [(2, 2), (30, 7), (80, 7), (6, 12)])
def test_numbers_stand_in_their_cells_and_labels_in_the_figure(layers: int, modules: int) -> None:
    names = [f"{part}.{kind}_proj" for part in ("encoder", "decoder") for kind in "qkvoud"][:modules]
    rows = [(layer, name, (layer + k) % 13) for layer in range(layers) for k, name in enumerate(names)]
    ax = plot_ranks(pd.DataFrame(rows, columns=["layer", "module", "rank"]).assign(init_r=12))
    figure = ax.figure
    figure.draw_without_rendering()
    cell = ax.get_window_extent().height / layers, ax.get_window_extent().width / modules
    assert len(ax.texts) == layers * modules
    for text in ax.texts:
        box = text.get_window_extent()
        assert (box.height, box.width) < cell
    for axis in (ax.xaxis, ax.yaxis, ax.child_axes[0].yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= figure.bbox.y0 for box in boxes)
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_ranks_go_into_the_axes_they_are_given_and_numbers_only_where_they_fit() -> None:
    rows = [(layer, module, layer % 5) for layer in range(48) for module in ("q", "v")]
    frame = pd.DataFrame(rows, columns=["layer", "module", "rank"]).assign(init_r=4)
    ax = Figure(figsize=(3, 2)).add_subplot()
    assert plot_ranks(frame, ax=ax) is ax
    assert not ax.texts
    assert len(ax.get_yticklabels()) < 48, "labels are thinned out"


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (pd.DataFrame({"layer": [0], "module": ["q"], "rank": [1]}), "plot_ranks needs .*missing: 'init_r'"),
        (pd.DataFrame({"layer": [], "module": [], "rank": [], "init_r": []}), "nothing to draw"),
    ],
)
def test_ranks_that_cannot_be_drawn_are_refused(broken: pd.DataFrame, word: str) -> None:
    with pytest.raises(AdapterLabError, match=word):
        plot_ranks(broken)
