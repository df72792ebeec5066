"""AdaLoRA's allocation against PEFT's own allocator, and against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer
from standins import tiny_llama

from adapterlab import AdapterLabError
from adapterlab.allocation import Allocator, Schedule, choose_schedule
from adapterlab.layers import layer_and_module

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def config_of(**fields: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"init_r": 6, "target_r": 3, "total_step": 20, "target_modules": TARGETS, **fields})


def peft_model(config: AdaLoraConfig, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(tiny_llama(), config)


def layers_of(model: Any) -> dict[str, Any]:
    inner = model.base_model.model
    return {path: module for path, module in inner.named_modules() if isinstance(module, AdaLoraLayer)}


def fill(model: Any, seed: int) -> None:
    """Random λ and gradients, the same for the same seed."""
    numbers = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.grad = torch.randn(parameter.shape, generator=numbers)
            if "lora_E" in key:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=numbers))


class TestAgainstPeft:
    @pytest.mark.parametrize("deltaT", [1, 3])
    def test_a_whole_run_prunes_the_same_triplets(self, deltaT: int) -> None:
        config = config_of(tinit=2, tfinal=5, deltaT=deltaT)
        theirs, ours = peft_model(config), peft_model(config)
        tuner = theirs.base_model
        layers = layers_of(ours)
        allocator = Allocator(layers, "default", config.beta1, config.beta2)
        schedule = Schedule(20, 2, 5, deltaT, allocator.initial, 3 * len(layers))
        pruned = 0
        for step in range(20):
            for model in (theirs, ours):
                fill(model, seed=step)
            tuner.update_and_allocate(step)
            if step < schedule.last:
                assert allocator.observe()
            if schedule.prunes(step):
                allocator.prune(schedule.budget(step))
                pruned += 1
            elif step > schedule.last:
                allocator.hold()
            for (path, layer), other in zip(layers.items(), layers_of(theirs).values()):
                assert torch.equal(layer.lora_E["default"], other.lora_E["default"]), (step, path)
        assert pruned == (13 if deltaT == 1 else 5)
        theirs_pattern = {
            key.removesuffix(".lora_E.default"): kept for key, kept in tuner.peft_config["default"].rank_pattern.items()
        }
        assert allocator.pattern() == theirs_pattern
        assert sum(allocator.ranks) == 3 * len(layers)

    def test_the_schedule_is_pefts(self) -> None:
        config = config_of(tinit=3, tfinal=7, deltaT=2, total_step=40)
        tuner = peft_model(config).base_model
        schedule = Schedule(40, 3, 7, 2, tuner.rankallocator.init_bgt, tuner.rankallocator.target_bgt)
        for step in range(40):
            budget, masks = tuner.rankallocator.budget_schedule(step)
            assert schedule.budget(step) == budget
            if step < schedule.last:
                assert schedule.prunes(step) == masks
        assert [step for step in range(33, 40) if schedule.prunes(step)] == [33]

    def test_the_orthogonal_term_is_what_autograd_gives(self) -> None:
        model = peft_model(config_of())
        layers = layers_of(model)
        parameters = [
            layer_part[key]
            for layer in layers.values()
            for layer_part in (layer.lora_A, layer.lora_B)
            for key in layer_part
        ]
        norms = []
        for layer in layers.values():
            A, B = layer.lora_A["default"], layer.lora_B["default"]
            norms += [torch.linalg.norm(A @ A.T - torch.eye(6)), torch.linalg.norm(B.T @ B - torch.eye(6))]
        torch.stack(norms).sum().backward()
        expected = {id(parameter): parameter.grad.clone() for parameter in parameters}
        allocator = Allocator(layers, "default", 0.85, 0.85)
        found = list(allocator.compute_orthogonality())
        assert {id(parameter) for parameter, _, _ in found} == set(expected)
        torch.testing.assert_close(sum(norm for _, norm, _ in found), torch.stack(norms).sum().detach())
        for parameter, _, slope in found:
            torch.testing.assert_close(slope, expected[id(parameter)])

    def test_orthogonal_factors_have_no_gradient_and_no_nan(self) -> None:
        model = peft_model(config_of())
        layers = layers_of(model)
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_A["default"].copy_(torch.eye(6, layer.lora_A["default"].shape[1]))
        for parameter, norm, slope in Allocator(layers, "default", 0.85, 0.85).compute_orthogonality():
            if parameter.shape[0] == 6:
                assert norm == 0
                assert not slope.any()

    def test_another_adapter_whose_name_contains_this_one_is_left_alone(self) -> None:
        """PEFT takes every parameter for "ada"'s whose name has "ada" in it."""
        model = peft_model(config_of())
        for layer in layers_of(model).values():
            layer.update_layer("default2", 6, 8, config=config_of(inference_mode=True))
            with torch.no_grad():
                layer.lora_E["default2"].fill_(1.0)
        allocator = Allocator(layers_of(model), "default", 0.85, 0.85)
        fill(model, 0)
        for layer in layers_of(model).values():
            layer.lora_E["default2"].data.fill_(1.0)
        allocator.observe()
        allocator.prune(5)
        assert sum(allocator.ranks) == 5
        assert all(bool((layer.lora_E["default2"] == 1).all()) for layer in layers_of(model).values())


class TestAllocator:
    def test_scores_are_the_papers_formula_over_two_steps(self) -> None:
        model = peft_model(config_of(beta1=0.7, beta2=0.6))
        layers = layers_of(model)
        allocator = Allocator(layers, "default", 0.7, 0.6)
        average: dict[str, Any] = {}
        uncertainty: dict[str, Any] = {}
        for step in range(2):
            fill(model, seed=step)
            allocator.observe()
            for path, layer in layers.items():
                for part in ("lora_A", "lora_E", "lora_B"):
                    w = getattr(layer, part)["default"]
                    key = f"{path}.{part}"
                    importance = (w * w.grad).abs().detach()
                    average[key] = 0.7 * average.get(key, torch.zeros(())) + 0.3 * importance
                    uncertainty[key] = (
                        0.6 * uncertainty.get(key, torch.zeros(())) + 0.4 * (importance - average[key]).abs()
                    )
        for path, score in zip(allocator.paths, allocator.scores()):
            s = {
                part: average[f"{path}.{part}"] * uncertainty[f"{path}.{part}"]
                for part in ("lora_A", "lora_E", "lora_B")
            }
            expected = s["lora_E"].view(-1) + s["lora_A"].mean(1) + s["lora_B"].mean(0)
            torch.testing.assert_close(score, expected)

    def test_a_gradient_that_is_not_finite_changes_nothing(self) -> None:
        model = peft_model(config_of())
        allocator = Allocator(layers_of(model), "default", 0.85, 0.85)
        fill(model, 0)
        assert allocator.observe()
        before = {key: value.clone() for key, value in allocator.state().items()}
        fill(model, 1)
        next(iter(layers_of(model).values())).lora_A["default"].grad[0, 0] = float("inf")
        assert not allocator.observe()
        assert all(torch.equal(value, before[key]) for key, value in allocator.state().items())

    def test_a_whole_budget_prunes_nothing(self) -> None:
        model = peft_model(config_of())
        allocator = Allocator(layers_of(model), "default", 0.85, 0.85)
        fill(model, 0)
        allocator.observe()
        allocator.prune(allocator.initial)
        assert sum(allocator.ranks) == allocator.initial

    def test_state_goes_on_where_it_was(self) -> None:
        model, other = peft_model(config_of()), peft_model(config_of())
        first = Allocator(layers_of(model), "default", 0.85, 0.85)
        fill(model, 0)
        first.observe()
        first.prune(10)
        second = Allocator(layers_of(other), "default", 0.85, 0.85)
        second.restore(first.state())
        for one in (model, other):
            fill(one, 1)
        for one in (first, second):
            one.observe()
            one.prune(7)
        assert first.pattern() == second.pattern()
        assert first.ranks == second.ranks
        assert all(torch.equal(a, b) for a, b in zip(first.scores(), second.scores()))

    def test_state_of_other_layers_is_refused(self) -> None:
        first = Allocator(layers_of(peft_model(config_of())), "default", 0.85, 0.85)
        second = Allocator(layers_of(peft_model(config_of(target_modules=["q_proj"]))), "default", 0.85, 0.85)
        with pytest.raises(AdapterLabError, match="other layers"):
            second.restore(first.state())

    def test_a_pruned_adapter_starts_with_what_it_has(self) -> None:
        model = peft_model(config_of())
        fill(model, 0)
        with torch.no_grad():
            for layer in layers_of(model).values():
                layer.lora_E["default"][2:] = 0
        assert Allocator(layers_of(model), "default", 0.85, 0.85).initial == 2 * len(layers_of(model))


class TestSchedule:
    def test_the_lab_chooses_where_the_config_says_nothing(self) -> None:
        tinit, tfinal, delta = choose_schedule(config_of(), 40, "ada")
        assert (tinit, tfinal, delta) == (4, 16, 1)
        assert choose_schedule(config_of(), 3, "ada") == (0, 1, 1)
        assert choose_schedule(config_of(), 10_000, "ada")[2] == 50

    def test_what_the_config_says_stands_and_the_end_is_reached(self) -> None:
        assert choose_schedule(config_of(tinit=2, tfinal=0, deltaT=5), 40, "ada") == (2, 1, 5)

    def test_a_choice_of_an_earlier_run_is_made_anew(self) -> None:
        config = config_of(total_step=100, tinit=10, tfinal=40, deltaT=1)
        assert choose_schedule(config, 20, "ada") == (2, 8, 1)

    @pytest.mark.parametrize(
        ("fields", "steps", "words"),
        [
            ({"target_r": 6}, 40, "target_r=6 is not below init_r=6"),
            ({"target_r": 9}, 40, "target_r=9 is not below init_r=6"),
            ({}, 2, "3 steps at least"),
            ({"tinit": 10, "tfinal": 5}, 15, "leave none of the 15 steps"),
        ],
    )
    def test_what_leaves_nothing_to_allocate_is_refused(self, fields: Any, steps: int, words: str) -> None:
        with pytest.raises(AdapterLabError, match=words):
            choose_schedule(config_of(**fields), steps, "ada")


class TestLayers:
    def test_layer_and_module(self) -> None:
        assert layer_and_module(["model.layers.3.self_attn.q_proj", "model.layers.10.mlp.up_proj"]) == [
            (3, "q_proj"),
            (10, "up_proj"),
        ]

    def test_the_name_grows_until_it_tells_them_apart(self) -> None:
        paths = ["decoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q"]
        found = layer_and_module(paths)
        assert [layer for layer, _ in found] == [0, 0]
        assert len({module for _, module in found}) == 2

    def test_no_number_and_no_paths(self) -> None:
        assert layer_and_module(["lm_head"]) == [(None, "lm_head")]
        assert layer_and_module([]) == []
