"""The benchmark: what it makes of numbers, and one tiny run from beginning to end. No time is asserted."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import tiny_llama, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import checks
import compare
import train
from measure import run_part
from record import Check, Memory, Part, Results, Timing
from report import markdown
from rounds import Timed, in_turn, summarise
from targets import target_rows
from tensors import StorageCounter
from train_memory import METHODS, footprint, measure_footprint
from train_record import Agreement, Footprint, Padding, Race, StepTimes, TrainResults, Work
from train_report import markdown as train_page
from train_report import target_rows as train_targets
from train_steps import (
    TrainPlan,
    batch_widths,
    equal_tensors,
    equal_triplets,
    padding_share,
    padding_shares,
    run_padding,
    run_race,
)
from workloads import ADAPTERS, MODELS, Plan, adapter_configs


def part(adapters: str = "lora", lab: float = 4.4, **changes: Any) -> Part:
    """Round numbers: one base generation takes 2 s, the floor of nine 4 s."""
    numbers = {
        ("one", 1): 2.0, ("lab_base", 1): 2.0, ("lab_one", 1): 2.2, ("in_turn_one", 1): 2.5, ("one_more", 1): 2.1,
        ("floor", 9): 4.0, ("lab", 9): lab, ("rerun", 9): 0.02, ("in_turn", 9): 22.0, ("merged", 9): 18.0,
    }  # fmt: skip
    if adapters == "lora":
        numbers["peft_batch", 9] = 8.0
    timings = tuple(Timing(who, n, (s, 2 * s, s / 2), who == "in_turn") for (who, n), s in numbers.items())
    made = Part(
        model=MODELS["demo"],
        adapters=ADAPTERS[adapters],
        dtype="float32",
        parameters=134_515_008,
        adapted_layers=210,
        prompt_tokens=41,
        new_tokens=64,
        rounds=3,
        timings=timings,
        switches={"lab": (0.1, 0.2, 0.3), **({"peft": (30.0,)} if adapters == "lora" else {})},
        checks=tuple(Check(who, 9, 9, 1, 0.0005) for who, _ in numbers if who != "in_turn_one"),
        noise=1e-4,
        tolerance=1e-3,
        memory=Memory(500, 100, 40, 600, 672, 600, (("aten.mm (9, 49152) float32", 32),)),
    )
    return replace(made, **changes)


def results(*parts: Part) -> Results:
    return Results({"processor": "a machine"}, "2030-01-01 00:00 UTC", parts)


def test_results_survive_json_and_nothing_else_is_taken_for_them() -> None:
    made = results(part(), part("mixed"))
    assert Results.from_json(made.to_json()) == made
    with pytest.raises(ValueError, match="no adapterlab-benchmark"):
        Results.from_json(json.dumps({"format": "something else"}))


def test_a_ratio_is_the_median_of_the_ratios_within_a_round() -> None:
    slow, fast = Timing("a", 1, (2.0, 9.0, 40.0)), Timing("b", 1, (1.0, 3.0, 10.0))
    assert slow.over(fast) == (3.0, 2.0, 4.0)
    assert slow.median == 9.0


def test_the_page_has_seconds_ratios_and_a_note_for_each_estimate() -> None:
    page = markdown(results(part(notes=("the lab's column x: run in turn: why",)), part("mixed")))
    assert "| **(f) the lab: `compare`** | 4.40 (2.20) |" in page
    assert "| (c) in turn: `set_adapter`, `generate` | ≈ 22.00 (11.00) |" in page
    assert "| (c) in turn: the lab's `set_adapter`, `lab.model.generate` | ≈ 22.00 (11.00) |" in page
    assert page.count("(e) PEFT's mixed batch") == 1, "the mixed set has none"
    assert "≈: a round times the base and some" in page
    assert "| (j) the same comparison again | 20.0 ms |" in page
    assert "The peak is 1.050 of weights, adapters and cache" in page
    assert "- the lab's column x: run in turn: why" in page


def test_targets_are_met_or_not_by_the_numbers() -> None:
    rows = {row.text: row for row in target_rows(results(part(), part("mixed", lab=4.8)))}
    assert rows["base + 8 LoRA: lab / floor"].measured == "1.100 (1.10 to 1.10)"
    assert rows["base + 8 LoRA: in turn / lab"].met
    assert rows["base + 8 LoRA: PEFT `adapter_names` / lab"].verdict == "**not met**"  # 8 / 4.4
    assert rows["base + 8 LoRA: lab / one base generation"].verdict == ""
    assert not rows["one adapter through the lab / base alone"].met  # 1.1
    assert rows["one column more on a finished comparison / one generation"].met
    assert rows["unchanged rerun"].met
    assert rows["`set_adapter`, 8 adapters on 210 layers"].met
    assert not rows["base + 8 mixed: lab / floor"].met  # 1.2
    assert rows["base + 8 mixed: pre-merged in turn / lab"].met is False  # 18 / 4.8
    assert target_rows(results(part(dtype="bfloat16"))) == [], "the targets are set in fp32"


def test_render_writes_page_and_picture_from_json_alone(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(results(part(), part("mixed")).to_json(), encoding="utf-8")
    compare.main(["--render", "--output", str(tmp_path)])
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "## Targets" in (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "matplotlib.pyplot" not in Path(compare.HERE / "picture.py").read_text(encoding="utf-8")


def test_the_command_line_chooses_and_changes_parts() -> None:
    everything = compare.plans(compare.parse([]))
    assert {(plan.model, plan.dtype) for plan in everything} >= {
        (m, d) for m in MODELS for d in ("float32", "bfloat16")
    }
    assert all(plan.rounds >= 5 for plan in everything)
    (one,) = compare.plans(
        compare.parse(
            ["--model", "demo", "--adapters", "mixed", "--dtype", "float32", "--columns", "4", "1", "--rounds", "7"]
        )
    )
    assert (one.columns, one.rounds, one.new_tokens) == ((1, 4), 7, 64)
    quick = compare.plans(compare.parse(["--quick", "--new-tokens", "3"]))
    assert {(plan.columns, plan.rounds, plan.new_tokens) for plan in quick} == {((1, 2), 1, 3)}
    with pytest.raises(SystemExit):
        compare.parse(["--columns", "9"])
    with pytest.raises(SystemExit, match="no part"):
        compare.plans(compare.parse(["--model", "opt-350m", "--adapters", "mixed"]))


def test_the_mixed_set_is_three_three_two() -> None:
    methods = [config.peft_type.value for config in adapter_configs("mixed", 8).values()]
    assert {method: methods.count(method) for method in methods} == {"LORA": 3, "IA3": 3, "ADALORA": 2}


def test_runs_in_turn_add_up_and_an_adapter_not_timed_counts_as_its_method() -> None:
    names = ["lora-1", "ia3-2", "lora-3"]
    seconds = {"base": 1.0, "lora-1": 10.0, "ia3-2": 100.0}
    timed = [Timed(who, 1, name, s) for who in ("in_turn", "merged") for name, s in seconds.items()]
    found = {(t.contender, t.columns): t for t in summarise([[*timed, Timed("one", 1, "base", 1.0)]], names, (2, 3))}
    assert found["in_turn", 3].seconds == (111.0,)
    assert not found["in_turn", 3].estimated
    assert found["in_turn", 4].seconds == (121.0,)
    assert found["in_turn", 4].estimated
    assert found["one", 1].seconds == (1.0,)


def test_every_round_times_other_adapters_of_each_method() -> None:
    names = ["lora-1", "ia3-2", "lora-3", "ia3-4", "lora-5"]
    rounds = [in_turn(names, 1, number) for number in range(3)]
    assert rounds == [["lora-1", "ia3-2"], ["lora-3", "ia3-4"], ["ia3-2", "lora-5"]]
    assert in_turn(names, 8, 2) == names


def test_storages_are_counted_once_and_until_they_go() -> None:
    with torch.no_grad(), StorageCounter() as counter:
        first = torch.zeros(1000)
        view = first.view(10, 100)[2:]
        held = counter.current - counter.before
        del first
        assert counter.current - counter.before == held == 4000
        second = torch.zeros(500)
        del view, second
        assert counter.current == counter.before
    assert counter.peak - counter.before == 6000
    assert counter.at_peak["aten.zeros (1000,) float32"] == 4000


@pytest.mark.parametrize("adapters", ["lora", "mixed"])
def test_a_tiny_run_from_beginning_to_end(adapters: str) -> None:
    plan = Plan("tiny", adapters, "float32", columns=(2,), rounds=1, new_tokens=5, timed_in_turn=1)
    base = tiny_llama()
    before = {name: parameter.tolist() for name, parameter in base.named_parameters()}  # no tensors: they are counted
    made = run_part(plan, report=lambda line: None, model=base, tokenizer=tiny_tokenizer(chat=True))
    assert {t.contender for t in made.timings} >= {"one", "floor", "in_turn", "merged", "lab", "rerun", "one_more"}
    assert (made.find("peft_batch", 3) is not None) is (adapters == "lora")
    assert made.adapted_layers == 14  # two layers of seven
    assert not made.notes, "all columns shared the batch"
    lab = next(check for check in made.checks if check.contender == "lab")
    assert (lab.texts, lab.equal) == (3, 3)
    assert made.memory.before >= made.memory.base + made.memory.adapters
    config = base.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    assert made.memory.kv_cache == row * (made.prompt_tokens + 5) * 3 * 4
    assert made.memory.peak > made.memory.before
    assert before == {name: parameter.tolist() for name, parameter in base.named_parameters()}
    assert "## tiny" in markdown(results(made))


def test_a_wrong_token_of_the_lab_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from contenders import Stage

    honest = Stage.compare

    def wrong(self: Stage, columns: list[str]) -> dict[str, list[int]]:
        return {label: [7] * len(ids) for label, ids in honest(self, columns).items()}

    monkeypatch.setattr(Stage, "compare", wrong)
    plan = Plan("tiny", "lora", "float32", columns=(1,), rounds=2, new_tokens=4)
    with pytest.raises(checks.WrongToken, match="logits below plain PEFT's choice"):
        run_part(plan, report=lambda line: None, model=tiny_llama(), tokenizer=tiny_tokenizer(chat=True))


# Training


def race(lab: float = 1.01, adalora: float = 1.05, **changes: Any) -> Race:
    """Plain Trainer takes 1 s for one batch and 2 s for the other; the others so many times that."""
    factors = {"plain_lora": 1.0, "plain_lora_again": 1.0, "lab_lora": lab, "lab_adalora": adalora, "peft_adalora": 1.3}
    made = Race(
        layers=210,
        r=12,
        target_r=8,
        batch=8,
        warm=2,
        widths=(74, 60),
        times=tuple(StepTimes(who, ((f, 2 * f), (1.1 * f, 2.2 * f), (f, 3 * f))) for who, f in factors.items()),
        work=tuple(
            Work(who, what, (0.02, 0.01, 0.03))
            for who in ("lab_adalora", "peft_adalora")
            for what in ("orthogonal term", "scoring and pruning")
        ),
        equal=(Agreement("tensors", 420, 420), Agreement("triplets", 2519, 2520)),
    )
    return replace(made, **changes)


def padding() -> Padding:
    times = (StepTimes("random", ((1.0, 1.0), (1.0, 3.0))), StepTimes("group_by_length", ((1.0, 0.9), (1.9, 1.9))))
    shares = {"random": (0.08, 0.12), "transformers": (0.1, 0.1), "group_by_length": (0.01, 0.03)}
    return Padding(58, 8, (59, 66.7, 74), shares, times)


def train_results(**parts: Any) -> TrainResults:
    footprints = tuple(
        Footprint(method, 100, 1_000_000, 400, 400, 800, 0, 3_000_000, 4_000_000, 500, (("aten.mm (8, 9)", 9),))
        for method in METHODS
    )
    made = TrainResults(
        {"processor": "a machine"}, "2030-01-01 00:00 UTC", MODELS["demo"], race(), padding(), footprints
    )
    return made.having(**parts)


def test_training_results_survive_json_and_nothing_else_is_taken_for_them() -> None:
    for made in (train_results(), train_results(race=None, padding=None, memory=())):
        assert TrainResults.from_json(made.to_json()) == made
    with pytest.raises(ValueError, match="no adapterlab-training-benchmark"):
        TrainResults.from_json(results(part()).to_json())


def test_steps_are_held_against_those_on_the_same_batch() -> None:
    mine = StepTimes("a", ((1.1, 10.0, 33.0), (2.0, 2.0, 20.0)))
    theirs = StepTimes("b", ((1.0, 10.0, 30.0), (1.0, 2.0, 10.0)))
    assert mine.over(theirs) == (pytest.approx(1.55), pytest.approx(1.1), 2.0)
    assert mine.median == 6.0
    assert mine.epoch_over(theirs)[1] == pytest.approx(44.1 / 41)


def test_training_targets_are_met_or_not_by_the_numbers() -> None:
    rows = {row.text: row for row in train_targets(train_results())}
    assert rows["LoRA step: lab / plain `Trainer`"].measured == "1.010 (1.01 to 1.01)"
    assert rows["LoRA step: lab / plain `Trainer`"].met
    assert rows["AdaLoRA step / LoRA step, both in the lab, r = 12"].met  # 1.05 / 1.01
    assert rows["AdaLoRA step by PEFT's own / LoRA step by plain `Trainer`"].verdict == ""
    assert rows["LoRA weights after the run: lab and plain `Trainer` equal to the bit"].met
    triplets = rows["AdaLoRA after the run: lab and PEFT keep the same triplets"]
    assert (triplets.measured, triplets.verdict) == ("2519 of 2520 triplets", "**not met**")
    slow = {row.text: row for row in train_targets(train_results(race=race(lab=1.03, adalora=1.2)))}
    assert not slow["LoRA step: lab / plain `Trainer`"].met
    assert not slow["AdaLoRA step / LoRA step, both in the lab, r = 12"].met


def test_the_training_page_has_every_part_and_only_those_measured() -> None:
    page = train_page(train_results())
    assert "| **(c) AdaLoRA: `lab.trainer`** | 1.733 | 1.050 (1.05 to 1.05) |" in page
    assert "| (d) PEFT: orthogonal term | 20.0 |" in page
    assert "| **rows of like length together, the lab's default** | 2.0 % | 2.85 | 0.950 (0.95 to 0.95) |" in page
    assert "| transformers' `group_by_length` | 10.0 % | – | – |" in page
    assert "| of these above the model | 2.0 | 2.0 | 2.0 | 2.0 |" in page
    assert "The largest at the peak, IA3: aten.mm (8, 9) 0 MB." in page
    alone = train_page(train_results(race=None, padding=None))
    assert "## Memory" in alone
    assert "## Padding" not in alone


def test_training_is_rendered_from_json_alone(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(train_results().to_json(), encoding="utf-8")
    train.main(["--render", "--output", str(tmp_path)])
    assert (tmp_path / "train.md").read_text(encoding="utf-8") == train_page(train_results())


def test_the_training_command_line() -> None:
    assert train.plan_of(train.parse([])) == TrainPlan()
    assert TrainPlan().rounds >= 5
    quick = train.plan_of(train.parse(["--quick", "--steps", "3", "--part", "steps"]))
    assert (quick.rounds, quick.steps, quick.total) == (1, 3, 5)
    for wrong in (["--rounds", "0"], ["--part", "nothing"]):
        with pytest.raises(SystemExit):
            train.parse(wrong)


def test_the_share_of_padding() -> None:
    assert padding_share([2, 4, 1], batch=2) == pytest.approx(2 / 9)  # a last batch of one has none
    shares = padding_shares([3, 9] * 32, batch=8, epochs=5)
    assert set(shares["group_by_length"]) == {0.0}
    assert all(share > 0.1 for share in shares["random"])
    assert {len(epochs) for epochs in shares.values()} == {5}


def test_batches_come_round_and_the_last_rows_are_left_out() -> None:
    plan = TrainPlan(steps=3, batch=2)
    assert list(batch_widths([1, 2, 3, 4, 5, 6, 99], plan)) == [6, 2, 4]


def test_tensors_are_equal_to_the_bit_and_under_the_same_name() -> None:
    one, almost = torch.ones(2), torch.ones(2) + 1e-7
    assert equal_tensors({"a": one, "b": one}, {"a": one.clone(), "b": almost}) == (1, 2)
    assert equal_tensors({"a": one}, {"b": one}) == (0, 2)
    assert Agreement.fewest("tensors", [(2, 2), (1, 2), (2, 2)]) == Agreement("tensors", 1, 2)


def test_triplets_are_equal_where_both_keep_or_both_drop() -> None:
    assert equal_triplets({"a": [True, False], "b": [True, True]}, {"a": [True, True], "b": [True, True]}) == (3, 4)
    assert equal_triplets({"a": [True, False]}, {}) == (0, 2)


def tiny_lessons() -> tuple[Any, Any, list[dict[str, list[int]]]]:
    rows = [list(range(7, 7 + length)) for length in (5, 9, 4, 8, 6, 7, 5, 9)]
    lessons = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows]
    return tiny_llama(), tiny_tokenizer(chat=True), lessons


def test_a_tiny_race_ends_equal() -> None:
    model, tokenizer, lessons = tiny_lessons()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan = TrainPlan("tiny", rounds=2, steps=3, batch=2, r=6)
    told: list[str] = []
    made = run_race(plan, model, tokenizer, lessons, told.append)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert {len(steps) for times in made.times for steps in times.rounds} == {3}
    assert (made.rounds, made.layers, made.widths) == (2, 14, (7, 9, 9))
    assert {len(work.seconds) for work in made.work} == {6}
    tensors, triplets = made.equal
    assert (tensors.equal, tensors.of) == (28, 28), "A and B of 14 layers"
    assert triplets.equal == triplets.of == 14 * 6
    assert len(told) == 2
    assert TrainResults.from_json(train_results(race=made).to_json()).race == made


def test_tiny_epochs_in_both_orders() -> None:
    made = run_padding(TrainPlan("tiny", rounds=1, batch=4, r=2), *tiny_lessons(), lambda line: None)
    assert [(times.contender, len(times.rounds[0])) for times in made.times] == [("random", 2), ("group_by_length", 2)]
    assert made.lengths == (4, 6.625, 9)
    assert "## Padding" in train_page(train_results(padding=made))


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_a_tiny_training(method: str) -> None:
    model, tokenizer, lessons = tiny_lessons()
    found = measure_footprint(method, TrainPlan("tiny", steps=1, batch=2, r=6), model, tokenizer, lessons)
    assert found.parameters == found.gradients == 4 * found.trained
    assert 2 * found.parameters <= found.optimizer <= 2 * found.parameters + 400 * 4, "two moments, and steps counted"
    averages = 2 * found.parameters + 14 * 6 if method == "adalora" else 0  # and which triplets stay
    assert found.allocation == averages
    assert found.checkpoint >= found.parameters
    held = found.optimizer + found.allocation + (0 if method == "full" else found.parameters)
    assert found.peak > found.base + held
    assert footprint(json.dumps(asdict(found))) == found
