"""Comparisons of several labs side by side: text, divergence, memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import standins
import torch

from adapterlab import AdapterLab, AdapterLabError, Comparison
from adapterlab.comparison import Generation

PROMPTS = ["Hello there", "What is the moon?"]
KINDS: dict[str, dict[str, Any]] = {"fp32": {}, "8bit": {"quantization": "8bit"}, "4bit": {"quantization": "4bit"}}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Comparison]:
    """fp32, 8-bit and 4-bit, opened one after another with one adapter; all are closed."""
    from peft import LoraConfig

    root = tmp_path_factory.mktemp("three")
    model = standins.tiny_llama(hidden_size=64, intermediate_size=128)
    standins.write_model(root / "base", model, standins.tiny_tokenizer(chat=True))
    standins.write_adapter(root / "a", model, LoraConfig(r=4, target_modules=["q_proj"]), seed=1)
    found = []
    for settings in KINDS.values():
        lab = AdapterLab(root / "base", dtype=torch.float32, **settings)
        lab.load_adapter(root / "a", "a")
        found.append(lab.compare(PROMPTS, [None, "a"], max_new_tokens=8))
        if not settings:
            found[0].tokens()  # while its lab is open
        lab.close()
    return found


@pytest.fixture
def both(three: list[Comparison]) -> Comparison:
    return Comparison.concat(three, labels=list(KINDS))


def said(column: str, ids: list[int], logprobs: list[float], index: int = 0) -> Generation:
    """A generation of these tokens with these logprobs."""
    return Generation(
        column=column, asked=() if column == "base" else ((column, 1.0),), prompt_index=index, prompt=f"prompt {index}",
        text=" ".join(map(str, ids)), token_ids=tuple(ids), tokens=tuple(map(str, ids)), logprobs=tuple(logprobs),
        leads=(1.0,) * len(ids), finish_reason="length", seconds=1.0, active_adapters=(), multipliers=(),
        logit_shift=0.0, weights_digest="0123456789",
    )  # fmt: skip


def comparison(*generations: Generation, **model: Any) -> Comparison:
    prompts = [f"prompt {i}" for i in range(1 + max(g.prompt_index for g in generations))]
    ids = [(1, 2, i) for i in range(len(prompts))]
    about = {"name": "m", "dtype": "float32", "quantization": None, **model}
    return Comparison(prompts, [f"<s>{p}" for p in prompts], ids, {"temperature": 0.0}, about, list(generations), "now")


class TestWhereAndHowFar:
    """By hand: the first lab says 5 6 7 and the second 5 6 8, with other probabilities for what they share."""

    @pytest.fixture
    def made(self) -> Comparison:
        first = comparison(said("base", [5, 6, 7], [-1.0, -2.0, -3.0]), said("a", [4, 4], [-0.5, -0.5]))
        second = comparison(
            said("base", [5, 6, 8], [-1.25, -1.5, -9.0]), said("a", [4, 4, 9], [-0.5, -0.75, -1.0]), quantization="8bit"
        )
        third = comparison(said("a", [3, 4], [-0.5, -0.5]), said("new", [1], [-1.0]), quantization="4bit")
        return Comparison.concat([first, second, third])

    def test_in_the_frame(self, made: Comparison) -> None:
        frame = made.to_frame().set_index("column")
        assert frame.lab.to_dict() == {
            "float32 · base": "float32", "float32 · a": "float32", "8bit · base": "8bit", "8bit · a": "8bit",
            "4bit · a": "4bit", "4bit · new": "4bit",
        }  # fmt: skip
        places = frame.lab_first_difference
        assert str(places.dtype) == "Int64"
        assert places["8bit · base"] == 2
        assert places["4bit · a"] == 0
        assert places.drop(["8bit · base", "4bit · a"]).isna().all(), "the first lab, a longer text, no counterpart"
        changes = frame.lab_logprob_change
        assert changes["8bit · base"] == (0.25 + 0.5) / 2
        assert changes["8bit · a"] == 0.25 / 2, "of the two tokens that both said"
        assert changes.drop(["8bit · base", "8bit · a"]).isna().all(), "nothing shared with the others"

    def test_in_the_tokens(self, made: Comparison) -> None:
        tokens = made.tokens()
        rows = tokens[tokens.column == "8bit · base"]
        assert list(rows.lab) == ["8bit"] * 3
        assert list(rows.first_lab_logprob)[:2] == [-1.0, -2.0]
        assert math.isnan(rows.first_lab_logprob.iloc[2]), "there the texts part"
        assert tokens[tokens.lab == "float32"].first_lab_logprob.isna().all()
        assert list(tokens[tokens.column == "8bit · a"].first_lab_logprob)[:2] == [-0.5, -0.5]

    def test_on_the_page(self, made: Comparison) -> None:
        html = made._repr_html_()
        assert "first leaves float32 · base at token 3; mean |Δlogprob| until there 0.38" in html
        assert "<br>as float32 · a; mean |Δlogprob| until there 0.12" in html
        assert "first leaves float32 · a at token 1</small>" in html

    def test_a_plain_comparison_has_none_of_it(self, made: Comparison) -> None:
        one = comparison(said("base", [5], [-1.0]))
        assert "lab" not in one.to_frame()
        assert list(one.tokens()) == ["prompt_index", "column", "position", "token", "logprob", "base_logprob"]
        assert "lab_first_difference" not in one.to_frame()
        assert Comparison.concat([one]).to_frame().lab.tolist() == ["float32"]

    def test_no_generations(self) -> None:
        one = replace(comparison(said("base", [5], [-1.0])), generations=[])
        both = Comparison.concat([one, one], labels=["x", "y"])
        assert both.to_frame().empty
        assert list(both.tokens())[-2:] == ["lab", "first_lab_logprob"]


class TestMemory:
    MEMORY = {"base_bytes": 538_000_000, "adapter_bytes": 1_500_000, "peak_bytes": None}

    @pytest.fixture
    def made(self) -> Comparison:
        known = comparison(said("base", [5], [-1.0]), memory=self.MEMORY, device="cpu")
        unknown = comparison(said("base", [5], [-1.0]), quantization="4bit")
        return Comparison.concat([known, unknown])

    def test_in_the_frame(self, made: Comparison) -> None:
        frame = made.to_frame()
        assert frame.base_megabytes.iloc[0] == 538.0
        assert frame.adapter_megabytes.iloc[0] == 1.5
        assert frame.peak_megabytes.isna().all()
        assert frame.base_megabytes.isna().tolist() == [False, True]

    def test_on_the_page(self, made: Comparison) -> None:
        html = made._repr_html_()
        assert "<p><b>float32</b>: m · float32 · cpu · base 538.0 MB, adapters 1.5 MB</p>" in html
        assert "<p><b>4bit</b>: m · float32 · 4bit</p>" in html

    def test_what_a_run_took_is_said_to_be_on_top(self) -> None:
        one = comparison(said("base", [5], [-1.0]), memory={"base_bytes": 1_200_000_000, "peak_bytes": 18_000_000})
        both = Comparison.concat([one])
        assert "base 1,200.0 MB, 18.0 MB more while it ran</p>" in both._repr_html_()
        assert both.to_frame().peak_megabytes.tolist() == [18.0]

    def test_kept_for_each_lab(self, made: Comparison) -> None:
        assert made.model["labs"]["float32"]["memory"] == self.MEMORY
        assert list(made.model["labs"]) == ["float32", "4bit"]
        assert made.model["name"] == "m"


class TestWhatWasNotAlike:
    def test_a_prompt_that_was_read_otherwise_is_noted_and_not_measured(self, tmp_path: Path) -> None:
        first = comparison(said("base", [5], [-1.0]), said("base", [5], [-1.0], 1))
        other = replace(
            comparison(said("base", [6], [-1.0]), said("base", [6], [-1.0], 1), name="n"),
            rendered=["<s>prompt 0", "<bos>prompt 1"],
            prompt_ids=[(1, 2, 0), (9, 9)],
        )
        both = Comparison.concat([first, other], labels=["x", "y"])
        assert both.prompt_ids == first.prompt_ids
        assert both.model["labs"]["y"]["rendered"] == other.rendered
        assert both.model["labs"]["y"]["prompt_ids"] == [[1, 2, 0], [9, 9]]
        frame = both.to_frame().set_index(["lab", "prompt"])
        assert frame.lab_first_difference["y", "prompt 0"] == 0
        assert frame.lab_first_difference.isna()["y", "prompt 1"]
        assert "another tokenizer or chat template" in frame.lab_note["y", "prompt 1"]
        assert frame.lab_note["x", "prompt 1"] == ""
        assert "another tokenizer or chat template" in both._repr_html_()
        assert Comparison.from_json(both.to_json(tmp_path / "c.json")) == both
        back = Comparison.concat([both], labels=["p", "q"])
        assert back.model["labs"]["q"]["rendered"] == other.rendered
        turned = Comparison.concat([other, both], labels=["z", "x", "y"])
        assert turned.rendered == other.rendered
        assert "another tokenizer" in turned.model["labs"]["x"]["note"]
        assert "note" not in turned.model["labs"]["y"], "it reads as the first one does now"

    def test_other_settings_are_noted(self) -> None:
        first = comparison(said("base", [5], [-1.0]))
        other = replace(first, settings={"temperature": 0.7, "typical_p": 0.9})
        both = Comparison.concat([first, other], labels=["x", "y"])
        assert both.settings == first.settings
        assert both.model["labs"]["y"]["settings"] == other.settings
        assert both.to_frame().lab_note.tolist() == [
            "",
            "other settings than in the first lab: temperature=0.7, typical_p=0.9",
        ]
        assert "settings" not in both.model["labs"]["x"]


class TestLabels:
    def test_concatenations_come_apart_into_their_labs(self, three: list[Comparison], both: Comparison) -> None:
        pair = Comparison.concat(three[:2], labels=["fp32", "8bit"])
        again = Comparison.concat([pair, three[2]])
        assert again == both
        renamed = Comparison.concat([pair, three[2]], labels=["a", "b · c", "d"])
        assert renamed.columns == ["a · base", "a · a", "b · c · base", "b · c · a", "d · base", "d · a"]
        assert renamed.to_frame().lab.unique().tolist() == ["a", "b · c", "d"]

    @pytest.mark.parametrize("labels", [["x"], ["x", "x"], "xy", ["x", 3], ["x", " "], ["x", "y", "z"], 5], ids=repr)
    def test_that_do_not_fit_are_refused(self, labels: Any) -> None:
        one = comparison(said("base", [5], [-1.0]))
        with pytest.raises(AdapterLabError, match=r"2 comparisons need as many different labels.*give labels="):
            Comparison.concat([one, one], labels=labels)

    def test_a_refusal_asks_no_lab(self) -> None:
        one = comparison(said("base", [5], [-1.0]))

        def score(comparison: Comparison) -> Any:
            raise AssertionError("asked")

        one._score = score
        with pytest.raises(AdapterLabError, match="as many different labels, not \\['float32', 'float32'\\]"):
            Comparison.concat([one, one])
        with pytest.raises(AdapterLabError, match="same prompts"):
            Comparison.concat([one, replace(one, prompts=["other"])], labels=["x", "y"])


class TestThreeLabs:
    def test_they_stand_side_by_side_when_all_are_closed(self, three: list[Comparison], both: Comparison) -> None:
        assert both.columns == [f"{kind} · {column}" for kind in KINDS for column in ("base", "a")]
        for kind, own in zip(KINDS, three):
            for index in range(2):
                for column in ("base", "a"):
                    assert both[f"{kind} · {column}", index].text == own[column, index].text
        labs = both.model["labs"]
        assert [labs[kind]["quantization"] for kind in KINDS] == [None, "8bit", "4bit"]
        assert len({labs[kind]["base_digest"] for kind in KINDS}) == 3
        frame = both.to_frame()
        changed = frame[frame.lab != "fp32"]
        assert (changed.lab_logprob_change.isna() == (changed.lab_first_difference == 0)).all()
        assert (changed.lab_logprob_change.dropna() > 1e-4).all(), "quantization moves every probability"
        for lab, prompt, column, place in changed[["lab", "prompt", "column", "lab_first_difference"]].values.tolist():
            own, index = column.removeprefix(f"{lab} · "), PROMPTS.index(prompt)
            pairs = zip(both[column, index].token_ids, both[f"fp32 · {own}", index].token_ids)
            assert [i for i, (mine, first) in enumerate(pairs) if mine != first][:1] == (
                [] if pd.isna(place) else [place]
            )

    def test_base_logprobs_are_those_that_were_asked_for_in_time(self, both: Comparison) -> None:
        tokens = both.tokens()
        assert tokens[tokens.lab == "fp32"].base_logprob.notna().all()
        assert tokens[tokens.lab != "fp32"].base_logprob.isna().all()

    def test_a_file_gives_it_back(self, both: Comparison, tmp_path: Path) -> None:
        again = Comparison.from_json(both.to_json(tmp_path / "c.json"))
        assert again == both
        assert again._repr_html_() == both._repr_html_()
        assert again.to_frame().equals(both.to_frame())

    def test_memory_is_the_labs_own(self, three: list[Comparison], both: Comparison) -> None:
        sizes = both.to_frame().groupby("lab").base_megabytes.first()
        assert sizes["4bit"] < sizes["8bit"] < sizes["fp32"]
        for kind, own in zip(KINDS, three):
            assert sizes[kind] == own.model["memory"]["base_bytes"] / 1e6

    def test_one_lab_can_not_verify_several(self, both: Comparison, lab: AdapterLab) -> None:
        lab.name = both.model["name"]
        with pytest.raises(AdapterLabError, match="several labs side by side"):
            lab.verify(both)


def test_files_from_before_still_load(both: Comparison, tmp_path: Path) -> None:
    """Then a concatenation kept the models' names and nothing else of the labs."""
    content = json.loads(both.to_json(tmp_path / "new.json").read_text())
    content["model"] = {"name": "m"}
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = Comparison.from_json(tmp_path / "old.json")
    assert old.columns == both.columns
    assert "lab" not in old.to_frame()
    assert "fp32 · base" in old._repr_html_()


@pytest.mark.parametrize(
    ("labs", "said"),
    [
        ([], "labs are mappings"),
        ({"fp32": 3}, "labs are mappings"),
        ({"fp32": {}}, "a column names a lab that is not there"),
        ({"fp32": {"memory": 3}}, "memory is a mapping"),
        ({"fp32": {"memory": {"base_bytes": "much"}}}, "bytes are numbers"),
        ({"fp32": {"note": 3}}, "note is a text"),
        ({"fp32": {"settings": 3}}, "settings a mapping"),
        ({"fp32": {"prompt_ids": [[1]]}}, "not as many prompts"),
    ],
    ids=repr,
)
def test_a_damaged_file_says_what_is_wrong(both: Comparison, tmp_path: Path, labs: Any, said: str) -> None:
    content = json.loads(both.to_json(tmp_path / "c.json").read_text())
    content["model"]["labs"] = labs
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(AdapterLabError, match=f"damaged.*{said}"):
        Comparison.from_json(tmp_path / "bad.json")


def test_labels_and_notes_are_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    one = comparison(said("base", [5], [-1.0]), name=bad, device=bad)
    both = Comparison.concat([one, replace(one, settings={bad: bad})], labels=[bad, "y"])
    for html in (both._repr_html_(), both.to_html(tmp_path / "c.html").read_text()):
        assert "<script" not in html
        assert "&lt;script&gt;" in html
