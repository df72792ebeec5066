from __future__ import annotations

import pytest

from adapterlab import AdapterLabError, Column
from adapterlab.columns import check_name, make_safe_name


@pytest.mark.parametrize(
    ("value", "parts", "label"),
    [
        (None, (), "base"),
        ("base", (), "base"),
        ([], (), "base"),
        ({"a": 0}, (), "base"),
        ("a", (("a", 1.0),), "a"),
        (["a", "b"], (("a", 1.0), ("b", 1.0)), "a + b"),
        ({"a": 0.7, "b": 0.3}, (("a", 0.7), ("b", 0.3)), "a × 0.7 + b × 0.3"),
        ({"a": 1, "b": 0}, (("a", 1.0),), "a"),
        ({"a": -0.5}, (("a", -0.5),), "a × -0.5"),
    ],
)
def test_every_form_of_a_column(value: object, parts: tuple, label: str) -> None:
    column = Column.of(value)  # type: ignore[arg-type]
    assert column.parts == parts
    assert column.label == label
    assert Column.of(column) == column
    assert Column.of(column.as_dict()) == column


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "no column"),
        ([1, 2], "no adapter name"),
        (["a", "a"], "'a' stands twice"),
        (["base", "a"], "acts in every column"),
        ({"a": float("nan")}, "finite number"),
        ({"a": "1"}, "finite number"),
        ({"a": True}, "finite number"),
    ],
)
def test_what_is_no_column_says_why(value: object, said: str) -> None:
    with pytest.raises(AdapterLabError, match=said):
        Column.of(value)  # type: ignore[arg-type]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AdapterLabError, match="No adapter named 'pirat'; the lab has 'pirate', 'poet'"):
        Column.of("pirat").check(["pirate", "poet"])
    with pytest.raises(AdapterLabError, match="no adapters yet"):
        Column.of("pirate").check([])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base", "the model itself"),
        ("", "no adapter name"),
        (None, "no adapter name"),
        ("a.b", "'a-b' would do"),
        ("../up", "would do"),
        ("<b>x</b>", "would do"),
        ("a b", "'a-b' would do"),
        ("x" * 65, "64 at most"),
        ("my_lora_A", "'my-my-lora-A' would do"),
        ("q_proj", "parameters"),
        ("taken", "already"),
    ],
)
def test_a_name_that_will_not_do_says_what_would(name: object, said: str) -> None:
    with pytest.raises(AdapterLabError, match=said):
        check_name(name, ["taken"], ["q_proj"])


def test_a_name_that_is_taken_is_said_to_be_taken() -> None:
    """What is mounted stands among the words of the model's parameters too."""
    with pytest.raises(AdapterLabError, match="There is an adapter named 'mine' already"):
        check_name("mine", ["mine"], ["mine", "q_proj"])


def test_close_names_live_side_by_side() -> None:
    assert check_name("r1", ["r16"]) == "r1"
    assert check_name("r16", ["r1"]) == "r16"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ybelkada/opt-350m-lora", "opt-350m-lora"),
        ("some/folder/my.adapter v2/", "my-adapter-v2"),
        ("x/my_lora_v2", "my_lora-v2"),
        ("x/base", "base-adapter"),
        ("x/…", "adapter"),
    ],
)
def test_safe_names_pass_their_own_check(text: str, name: str) -> None:
    assert make_safe_name(text) == name
    assert check_name(name, []) == name
