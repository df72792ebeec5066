"""Memory and estimates as bars: small beside huge, and every byte to be read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from adapterlab.errors import AdapterLabError
from adapterlab.plots import plot_memory

BASE, LORA, IA3, PROCESS = 662_392_832, 6_291_456, 123_456, 540_000_000


@pytest.fixture
def frame() -> pd.DataFrame:
    """As `lab.memory()` after a comparison."""
    rows = [
        ("base", "weights", "cpu", BASE, "measured"),
        ("ia3", "weights", "cpu", IA3, "measured"),
        ("lora", "gradients", "cpu", LORA + 1, "computed"),
        ("lora", "weights", "cpu", LORA, "measured"),
        ("lab", "kept batches", "cpu", 0, "measured"),
        ("process", "Python and libraries", "cpu", PROCESS, "computed"),
        ("last operation", "peak of compare: KV cache", "cpu", 40_000_000, "measured"),
        ("last operation", "peak of compare: activations", "cpu", 22_000_000, "computed"),
    ]
    return pd.DataFrame(rows, columns=["owner", "kind", "device", "bytes", "source"])


def bars(ax: Any) -> list[tuple[float, float, float]]:
    """(row, where it begins, how long) of each segment of a bar."""
    return [(round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width()) for bar in ax.patches]


def table(figure: Any) -> list[tuple[str, ...]]:
    """The table below the bars, line by line."""
    found: dict[float, list[tuple[float, str]]] = {}
    for text in figure.axes[-1].texts:
        x, y = text.get_position()
        found.setdefault(y, []).append((x, text.get_text()))
    return [tuple(text for _, text in sorted(line)) for _, line in sorted(found.items())]


def test_segments_lie_end_to_end_and_the_operation_on_top_of_what_is_resident(frame: pd.DataFrame) -> None:
    before = frame.copy()
    ax = plot_memory(frame)
    resident = BASE + PROCESS + 2 * LORA + 1 + IA3
    assert bars(ax) == [
        (1, 0, resident),  # only a shade
        (0, 0, BASE),
        (0, BASE, PROCESS),
        (0, BASE + PROCESS, LORA + 1),
        (0, BASE + PROCESS + LORA + 1, LORA),
        (0, BASE + PROCESS + 2 * LORA + 1, IA3),
        (1, resident, 40_000_000),
        (1, resident + 40_000_000, 22_000_000),
    ]
    assert ax.get_xscale() == "linear"
    assert ax.get_xlim()[0] == 0
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cpu", "peak of compare\non cpu"]
    assert [text.get_text() for text in ax.texts] == ["1.22 GB", "+ 62.0 MB"]  # 1215.1 MB
    pd.testing.assert_frame_equal(frame, before)


def test_what_is_small_has_a_panel_and_a_scale_of_its_own(frame: pd.DataFrame) -> None:
    everything, close, _ = plot_memory(frame).figure.axes
    assert bars(close) == [
        (0, 0, LORA + 1),
        (0, LORA + 1, LORA),
        (0, 2 * LORA + 1, IA3),
        (1, 0, 40_000_000),
        (1, 40_000_000, 22_000_000),
    ]
    assert close.get_title(loc="left") == "the same without base and process"
    assert close.get_xlim()[1] < 1.5 * 62_000_000 < everything.get_xlim()[1]


def test_without_anything_huge_there_is_one_panel() -> None:
    frame = pd.DataFrame({"owner": ["base", "lora"], "kind": "weights", "device": "cpu", "bytes": [1000, 900]})
    assert len(plot_memory(frame).figure.axes) == 2, "bars and table"
    assert len(plot_memory(frame.iloc[:1]).figure.axes) == 2


def test_the_table_has_every_part_in_the_order_of_the_bars(frame: pd.DataFrame) -> None:
    assert table(plot_memory(frame).figure) == [
        ("base", "weights", "cpu", "662.4 MB", "measured"),
        ("process", "Python and libraries", "cpu", "540.0 MB", "computed"),
        ("lora", "gradients", "cpu", "6.29 MB", "computed"),
        ("lora", "weights", "cpu", "6.29 MB", "measured"),
        ("ia3", "weights", "cpu", "123.5 kB", "measured"),
        ("last operation", "KV cache", "cpu", "40.0 MB", "measured"),
        ("last operation", "activations", "cpu", "22.0 MB", "computed"),
    ]


def test_owners_have_colours_kinds_their_shades_and_what_is_computed_is_hatched(frame: pd.DataFrame) -> None:
    ax = plot_memory(frame)
    looks = [
        (to_hex(bar.get_facecolor()), bar.get_facecolor()[3], bar.get_hatch() is not None) for bar in ax.patches[1:]
    ]
    assert looks[0] == ("#7d7d7d", 1, False)
    assert looks[2] == ("#e69f00", 0.62, True), "the weights have the full colour, whatever is largest"
    assert looks[3] == ("#e69f00", 1, False)
    assert looks[4] == ("#0072b2", 1, False)
    assert [hatched for _, _, hatched in looks] == [False, True, True, False, False, False, True]
    swatches = ax.figure.axes[-1].patches
    assert [swatch.get_facecolor() for swatch in swatches] == [bar.get_facecolor() for bar in ax.patches[1:]]
    plain = plot_memory(frame.assign(source="computed"))
    assert not any(bar.get_hatch() for bar in plain.patches), "nothing to tell apart"


def test_a_bar_for_each_device(frame: pd.DataFrame) -> None:
    other = frame.assign(device="cuda:0").query("owner in ['base', 'last operation']")
    ax = plot_memory(pd.concat([frame[frame["owner"] == "process"], other]))
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["cpu", "cuda:0", "peak of compare\non cuda:0"]
    assert (2, BASE, 40_000_000) in bars(ax), "on top of what is on its own device"


@pytest.mark.parametrize("count", [1, 4, 9])
def test_words_stay_in_the_figure_and_off_one_another(frame: pd.DataFrame, count: int) -> None:
    names = [f"pirate_speech-opt-350m.rank16_$alpha$-all-linear-layers-seed{k:05d}" for k in range(count)]
    more = pd.DataFrame({"owner": names, "kind": "weights", "device": "cpu", "bytes": 10**6, "source": "measured"})
    figure: Any = plot_memory(pd.concat([frame, more])).figure
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for ax in figure.axes for text in ax.texts]
    assert len(boxes) == 2 + 2 + 5 * (7 + count)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    colours = {to_hex(swatch.get_facecolor()) for swatch in figure.axes[-1].patches}
    assert len(colours) >= 2 + count, "no adapter looks like another"


def test_given_axes_get_the_bars_and_a_legend(frame: pd.DataFrame) -> None:
    figure = Figure(figsize=(9, 3), layout="constrained")
    ax = figure.add_subplot()
    assert plot_memory(frame, ax=ax) is ax
    assert figure.axes == [ax]
    assert [text.get_text() for text in ax.get_legend().get_texts()][2:4] == [
        "6.29 MB  lora · gradients",
        "6.29 MB  lora · weights",
    ]


# -- estimates ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def estimate() -> pd.DataFrame:
    rows = [
        ("inference", "base", "weights", 13_476_831_232),
        ("inference", "lora", "weights", 80_000_000),
        ("inference", "", "KV cache", 400_000_000),
        ("training, LoRA", "base", "weights", 13_476_831_232),
        ("training, LoRA", "lora", "optimizer", 320_000_000),
        ("training, LoRA", "", "something new", 6_000_000_000),
        ("training, LoRA", "", "logits", 0),
    ]
    return pd.DataFrame(rows, columns=["case", "owner", "kind", "bytes"]).assign(parameters=0, source="computed")


def test_a_bar_for_each_case_with_its_total(estimate: pd.DataFrame) -> None:
    before = estimate.copy()
    ax = plot_memory(estimate)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["inference", "training, LoRA"]
    assert sorted(bars(ax)) == [
        (0, 0, 13_556_831_232),
        (0, 13_556_831_232, 400_000_000),
        (1, 0, 13_476_831_232),
        (1, 13_476_831_232, 320_000_000),
        (1, 13_796_831_232, 6_000_000_000),
    ]
    written = [text.get_text() for text in ax.texts]
    assert written[:2] == ["14.0 GB", "19.8 GB"]
    assert set(written[2:]) <= {"13.6 GB", "13.5 GB", "6.00 GB"}
    assert "6.00 GB" in written, "there is room in it"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "weights", "optimizer", "KV cache", "something new",
    ]  # fmt: skip
    assert ax.get_xlabel() == "memory, computed"
    assert not any(bar.get_hatch() for bar in ax.patches)
    ax.figure.draw_without_rendering()
    assert all(text.get_window_extent().x1 <= ax.figure.bbox.x1 for text in ax.texts)
    pd.testing.assert_frame_equal(estimate, before)


def test_kinds_have_one_colour_in_all_cases_and_neighbours_differ(estimate: pd.DataFrame) -> None:
    ax = plot_memory(estimate)
    segments = sorted((row, start, to_hex(bar.get_facecolor())) for (row, start, _), bar in zip(bars(ax), ax.patches))
    assert segments[0][2] == segments[2][2] == "#7d7d7d"
    assert all(one[2] != other[2] for one, other in pairwise(segments))


def test_computed_parts_of_an_estimate_are_hatched_beside_measured_ones(estimate: pd.DataFrame) -> None:
    estimate.loc[estimate["kind"] == "weights", "source"] = "measured"
    ax = plot_memory(estimate)
    assert {bar.get_x() > 0 for bar in ax.patches if bar.get_hatch()} == {True}
    assert ax.get_xlabel() == "memory"


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (pd.DataFrame({"owner": ["base"], "kind": ["weights"], "bytes": [3]}), "lab.memory.*missing: 'device'"),
        (pd.DataFrame({"case": ["a"], "bytes": [3]}), "AdapterLab.estimate.*missing: 'kind'"),
        (pd.DataFrame({"owner": ["base"], "kind": ["w"], "device": ["cpu"], "bytes": [0]}), "nothing to draw"),
        (pd.DataFrame({"case": [], "kind": [], "bytes": []}), "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(broken: pd.DataFrame, word: str) -> None:
    with pytest.raises(AdapterLabError, match=word):
        plot_memory(broken)
