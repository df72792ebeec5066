"""Norms and overlaps as heatmaps: zeros are zeros, units are said, an untrained adapter is seen as one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from adapterlab.errors import AdapterLabError
from adapterlab.plots import plot_delta_norms, plot_overlap


def frame_of(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["layer", "module", "norm", "relative_norm", "effective_rank"])
    nothing = dict.fromkeys(("scale_min", "scale_mean", "scale_max"), np.nan)
    return frame.assign(rank=8, **nothing).astype({"layer": "Int64", "rank": "Int64"})


@pytest.fixture
def frame() -> pd.DataFrame:
    """As `lab.delta_norms(name)` of a LoRA, one of whose layers does nothing."""
    return frame_of(
        [
            (0, "q_proj", 1.0, 0.01, 5.5),
            (0, "v_proj", 2.0, 0.02, 8.0),
            (1, "q_proj", 0.0, 0.0, 0.0),
            (1, "v_proj", 4.0, 0.04, 1.0),
            (None, "lm_head", 0.5, 0.00123, 2.0),
        ]
    )


def written(ax: Any) -> dict[tuple[float, float], str]:
    return {text.get_position(): text.get_text() for text in ax.texts}


def label_of(ax: Any, number: int = 0) -> str:
    """What stands at the colour bar of the figure's `number`-th heatmap."""
    bars = [other for other in ax.figure.axes if hasattr(other, "_colorbar")]
    return bars[number].get_xlabel() if bars else ""


def test_each_cell_has_its_percent_and_the_second_panel_its_effective_rank(frame: pd.DataFrame) -> None:
    before = frame.copy()
    ax = plot_delta_norms(frame)
    places = {"q0": (0.5, 0.5), "v0": (1.5, 0.5), "q1": (0.5, 1.5), "v1": (1.5, 1.5), "head": (2.5, 2.5)}
    cells = dict(zip(places.values(), ["1.0", "2.0", "0", "4.0", "0.12"]))
    assert written(ax) == cells
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "–"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["q_proj", "v_proj", "lm_head"]
    ranks = ax.figure.axes[1]
    assert written(ranks) == dict(zip(places.values(), ["5.5", "8.0", "0", "1.0", "2.0"]))
    assert label_of(ax) == "‖ΔW‖ / ‖W‖ in %\n(hatched: exactly 0)"
    assert label_of(ax, 1) == "effective rank of ΔW\n(of 8)\n(hatched: exactly 0)"
    assert not ax.get_title(loc="left")
    pd.testing.assert_frame_equal(frame, before)


def test_colours_are_linear_from_zero_and_a_zero_is_hatched(frame: pd.DataFrame) -> None:
    ax = plot_delta_norms(frame)
    mesh, marks = ax.collections
    assert [float(mesh.norm(value)) for value in (0, 2, 4)] == [0, 0.5, 1]
    assert [path.get_extents().bounds for path in marks.get_paths()] == [(0, 1, 1, 1)], "q_proj in layer 1"
    assert marks.get_hatch()
    clean = plot_delta_norms(frame[frame["norm"] > 0])
    assert len(clean.collections) == 1
    assert label_of(clean) == "‖ΔW‖ / ‖W‖ in %"


def test_colours_are_logarithmic_where_one_is_far_above_the_others(frame: pd.DataFrame) -> None:
    frame.loc[0, "relative_norm"] = 0.9  # the median of those above 0 is (0.02 + 0.04) / 2
    ax = plot_delta_norms(frame)
    assert not isinstance(ax.collections[0].norm, LogNorm), "30 times the median is not beyond 30"
    frame.loc[0, "relative_norm"] = 0.93
    ax = plot_delta_norms(frame)
    assert isinstance(ax.collections[0].norm, LogNorm)
    assert label_of(ax) == "‖ΔW‖ / ‖W‖ in %\n(logarithmic colours, hatched: exactly 0)"
    assert len(ax.collections) == 2, "the zero is hatched still"
    assert ax.figure._repr_png_()  # type: ignore[union-attr]


def test_an_untrained_adapter_is_seen_as_one(frame: pd.DataFrame) -> None:
    ax = plot_delta_norms(frame.assign(norm=0.0, relative_norm=0.0, effective_rank=0.0))
    assert ax.get_title(loc="left") == "changes nothing yet: ΔW = 0 everywhere"
    assert set(written(ax).values()) == {"0"}
    assert len(ax.collections[1].get_paths()) == 5
    assert ax.figure.axes == [ax], "there are no colours to explain and no ranks to show"


def test_without_a_base_norm_the_norm_itself_is_drawn_and_said(frame: pd.DataFrame) -> None:
    ax = plot_delta_norms(frame.assign(relative_norm=np.nan))
    assert sorted(written(ax).values()) == ["0", "0.50", "1.0", "2.0", "4.0"]
    assert label_of(ax).startswith("‖ΔW‖ (Frobenius; ‖W‖ is not known)")


def test_where_some_have_no_base_norm_theirs_stands_in_brackets(frame: pd.DataFrame) -> None:
    frame.loc[3, "relative_norm"] = np.nan
    ax = plot_delta_norms(frame)
    assert written(ax)[1.5, 1.5] == "(4.0)"
    assert ax.collections[0].get_array().mask[1, 1], "and it has no colour: another unit"
    assert "in brackets" in ax.get_xlabel()


def test_scales_have_their_range_instead_of_a_rank(frame: pd.DataFrame) -> None:
    frame = frame.assign(effective_rank=np.nan, rank=pd.NA, scale_min=0.9, scale_mean=1.0, scale_max=1.2)
    frame.loc[1, ["scale_min", "scale_mean", "scale_max"]] = [0.7, 0.8, 1.1]
    ax = plot_delta_norms(frame)
    panel = ax.figure.axes[1]
    spans = [segment for lines in panel.collections for segment in lines.get_segments()]
    found = [(lane[0, 0], lane[1, 0], int(lane[0, 1])) for lane in spans]
    assert found == [(0.9, 1.2, 0), (0.9, 1.2, 1), (0.7, 1.1, 0), (0.9, 1.2, 1), (0.9, 1.2, 2)]
    means = [tuple(line.get_xdata()) for line in panel.get_lines()]
    assert means == [(1.0, 1.0), (0.8, 1.0), (1.0,), (1, 1)], "the last is the line at 1"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["q_proj", "v_proj", "lm_head"]
    assert "1 changes nothing" in panel.get_xlabel()


@pytest.mark.parametrize(("layers", "modules"), [(2, 2), (24, 7), (48, 7), (6, 14)])
def test_numbers_stand_in_their_cells_and_labels_in_the_figure(layers: int, modules: int) -> None:
    names = [f"{part}.{kind}_proj" for part in ("encoder", "decoder") for kind in "qkvoudg"][:modules]
    rows = [(i, name, 1.0 + i, (1 + i + k) / 1000, 1.5 + k) for i in range(layers) for k, name in enumerate(names)]
    ax = plot_delta_norms(frame_of(rows))
    figure: Any = ax.figure
    figure.draw_without_rendering()
    for panel in figure.axes[:2]:
        cell = panel.get_window_extent().height / layers, panel.get_window_extent().width / modules
        assert len(panel.texts) == layers * modules
        for text in panel.texts:
            box = text.get_window_extent()
            assert (box.height, box.width) < cell
    for axis in (ax.xaxis, ax.yaxis, figure.axes[1].xaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_given_axes_get_the_heatmap_alone_and_numbers_only_where_they_fit(frame: pd.DataFrame) -> None:
    figure = Figure(figsize=(5, 4))
    ax = figure.add_subplot()
    assert plot_delta_norms(frame, ax=ax) is ax
    assert len(figure.axes) == 2, "with its colour bar"
    rows = [(layer, "q", 1.0, 0.01, 1.0) for layer in range(48)]
    small = Figure(figsize=(3, 2)).add_subplot()
    plot_delta_norms(frame_of(rows), ax=small)
    assert not small.texts
    assert len(small.get_yticklabels()) < 48, "labels are thinned out"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda frame: frame.drop(columns="norm"), "plot_delta_norms needs .*missing: 'norm'"),
        (lambda frame: frame.iloc[:0], "nothing to draw"),
        (lambda frame: frame.assign(norm=np.nan), "nothing to draw"),
    ],
)
def test_norms_that_cannot_be_drawn_are_refused(frame: pd.DataFrame, change: Any, word: str) -> None:
    with pytest.raises(AdapterLabError, match=word):
        plot_delta_norms(change(frame))


# -- overlap -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def overlap() -> pd.DataFrame:
    rows = [(0, "q", 0.5, 1.0, 0.25, 0.125), (1, "q", 0.031, np.nan, 0.25, np.nan), (1, "v", 0.0, 0.25, 0.0625, 0.125)]
    columns = ["layer", "module", "output_overlap", "input_overlap", "output_chance", "input_chance"]
    return pd.DataFrame(rows, columns=columns)


def test_overlaps_go_from_none_to_all_and_chance_is_named(overlap: pd.DataFrame) -> None:
    before = overlap.copy()
    ax = plot_overlap(overlap)
    inputs = ax.figure.axes[1]
    assert written(ax) == {(0.5, 0.5): ".50", (0.5, 1.5): ".03", (1.5, 1.5): ".00"}
    assert written(inputs) == {(0.5, 0.5): "1", (1.5, 1.5): ".25"}
    for panel in (ax, inputs):
        assert [float(panel.collections[0].norm(value)) for value in (0, 0.5, 1)] == [0, 0.5, 1]
    assert label_of(ax).startswith("overlap of output directions\n(by chance 0.062 to 0.25)")
    assert label_of(ax, 1) == "overlap of input directions\n(by chance 0.12)"
    bars = [other for other in ax.figure.axes if hasattr(other, "_colorbar")]
    assert [line.get_xdata()[0] for line in bars[0].get_lines()] == [0.0625, 0.25]
    pd.testing.assert_frame_equal(overlap, before)
    alone = Figure(figsize=(5, 4)).add_subplot()
    assert plot_overlap(overlap, ax=alone) is alone
    assert written(alone) == written(ax)


def test_overlaps_that_cannot_be_drawn_are_refused(overlap: pd.DataFrame) -> None:
    with pytest.raises(AdapterLabError, match=r"plot_overlap needs .*missing: 'input_chance'"):
        plot_overlap(overlap.drop(columns="input_chance"))
    with pytest.raises(AdapterLabError, match="nothing to draw"):
        plot_overlap(overlap.iloc[:0])
