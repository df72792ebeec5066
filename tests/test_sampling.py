"""Common random numbers: an exact sample from the softmax, shared by all columns."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import tiny_llama, tiny_tokenizer

from adapterlab import AdapterLab
from adapterlab.sampling import Row, Sampler, choose, compute_noise


def test_noise_is_gumbel_and_a_function_of_seed_prompt_and_step() -> None:
    noise = compute_noise(0, (1, 2, 3), 0, 200_000)
    euler = 0.5772156649
    assert noise.mean().item() == pytest.approx(euler, abs=0.02)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.05)
    assert torch.isfinite(noise).all()
    assert torch.equal(noise, compute_noise(0, (1, 2, 3), 0, 200_000))
    for other in [(1, (1, 2, 3), 0), (0, (1, 2), 0), (0, (12, 3), 0), (0, (1, 2, 3), 1)]:
        assert not torch.equal(noise, compute_noise(*other, 200_000))


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    compute_noise(0, (1,), 0, 10)
    assert torch.equal(torch.rand(3), expected)


def rows_for(temperature: float, seeds: list[int]) -> list[Row]:
    return [Row(Sampler(seed, temperature, (5,)), lambda row, reason: None) for seed in seeds]


def test_choices_are_distributed_as_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    n = 20_000
    tokens, _ = choose(logits.repeat(n, 1), rows_for(1.0, list(range(n))))
    counts = torch.bincount(torch.tensor(tokens), minlength=5)
    expected = torch.softmax(logits, -1) * n
    chi2 = (((counts - expected) ** 2)[:4] / expected[:4]).sum().item()
    assert counts[4] == 0
    assert chi2 < 16.3, "chi-squared with 3 degrees of freedom, p = 0.001"


def test_greedy_takes_argmax_and_tells_its_lead() -> None:
    scores = torch.tensor([[0.5, 3.0, 2.25], [1.0, 1.0, 0.0]])
    assert choose(scores, rows_for(0.0, [0, 1])) == ([1, 0], [0.75, 0.0])


def test_a_row_draws_the_same_whatever_its_place_in_the_batch() -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    forwards, _ = choose(scores.clone(), rows_for(1.0, [1, 2, 3, 4]))
    backwards, _ = choose(scores.flip(0).clone(), rows_for(1.0, [4, 3, 2, 1]))
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}], ids=str)
def test_greedy_equals_transformers_own_generate(full_lab: AdapterLab, settings: dict[str, Any]) -> None:
    """Base and an adapter, token by token, against plain `generate`."""
    for column in (None, "pirate", "poet"):
        generation = full_lab.generate("Tell me a tale", column, max_new_tokens=20, **settings)
        with full_lab.using(column) as model:
            ids = torch.tensor([full_lab.compare("Tell me a tale", [column], max_new_tokens=1).prompt_ids[0]])
            plain = model.generate(ids, max_new_tokens=20, do_sample=False, **settings)
        assert plain[0, ids.shape[1] :].tolist() == list(generation.token_ids)


def test_sampling_applies_temperature_top_k_and_top_p_in_transformers_order(full_lab: AdapterLab) -> None:
    """An independent loop: raw logits, transformers' own warpers, the shared noise, argmax."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    settings: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5}
    comparison = full_lab.compare("Tell me a tale", ["pirate"], max_new_tokens=10, **settings)
    prompt = comparison.prompt_ids[0]
    ids = torch.tensor([prompt])
    with full_lab.using("pirate") as model, torch.no_grad():
        for step in range(10):
            scores = model(ids).logits[:, -1].float()
            for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(40), TopPLogitsWarper(0.9)):
                scores = warper(ids, scores)
            token = int((scores[0] + compute_noise(5, prompt, step, scores.shape[-1])).argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            if token == model.config.eos_token_id:
                break
    assert tuple(ids[0, len(prompt) :].tolist()) == comparison["pirate"].token_ids


def test_columns_share_the_dice(lab: AdapterLab) -> None:
    """A fresh adapter is a no-op: sampled with the same dice it says exactly what base says."""
    lab.add_adapter("lora", "fresh")
    lab.add_adapter("ia3", "ones")
    comparison = lab.compare("Roll", temperature=1.5, seed=3, max_new_tokens=24)
    texts = {g.token_ids for g in comparison.generations}
    assert len(texts) == 1
    assert lab.compare("Roll", temperature=1.5, seed=4, max_new_tokens=24)["base"].token_ids not in texts


def test_a_column_does_not_depend_on_its_neighbours(full_lab: AdapterLab) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 2, "max_new_tokens": 12}
    together = full_lab.compare(["Roll", "Again"], **settings)
    alone = full_lab.compare("Again", ["poet"], **settings)
    assert alone["poet"].token_ids == together["poet", 1].token_ids


def test_the_published_generation_config_does_not_slip_in(adapter_folders: dict[str, Path]) -> None:
    """Its end-of-text stays, its temperature and penalties don't."""
    from transformers import GenerationConfig

    model = tiny_llama()
    plain = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer()).generate("Hello", max_new_tokens=16)
    model.generation_config = GenerationConfig(
        eos_token_id=[2, int(plain.token_ids[3])], do_sample=True, temperature=5.0, repetition_penalty=9.0
    )
    published = model.generation_config
    lab = AdapterLab(model, tokenizer=tiny_tokenizer())
    ended = lab.generate("Hello", max_new_tokens=16)
    first = plain.token_ids.index(plain.token_ids[3]) + 1
    assert ended.token_ids == plain.token_ids[:first]
    assert ended.finish_reason == "eos"
    assert model.generation_config is published


def test_stop_ends_within_a_token(full_lab: AdapterLab) -> None:
    seen: list[str] = []

    def stop_after_three(event: Any) -> None:
        seen.append(event.finish_reason)
        if len(seen) == 3:
            full_lab.stop()

    full_lab.add_adapter("loha", "alone", r=2, target_modules=["v_proj"])
    comparison = full_lab.compare("Go on", max_new_tokens=50, min_new_tokens=50, on_token=stop_after_three)
    assert "alone" not in comparison.columns, "a column that runs in turn and had not begun is not there"
    assert {g.finish_reason for g in comparison.generations} == {"stopped"}
    assert {g.new_tokens for g in comparison.generations} == {1}, "all columns of a batch stop at the same token"
    assert seen.count("stopped") == len(comparison)
    assert full_lab.compare("Go on", [None], max_new_tokens=5, min_new_tokens=5)["base"].new_tokens == 5


def test_stop_from_another_thread(full_lab: AdapterLab) -> None:
    started = threading.Event()
    results: list[Any] = []
    worker = threading.Thread(
        target=lambda: results.append(
            full_lab.compare("Go", [None], max_new_tokens=100, min_new_tokens=100, on_token=lambda e: started.set())
        )
    )
    worker.start()
    assert started.wait(30)
    full_lab.stop()
    worker.join(30)
    assert results[0]["base"].finish_reason in ("stopped", "length")
    assert not worker.is_alive()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_leaves_everything_as_it_was(full_lab: AdapterLab, error: type[BaseException]) -> None:
    def interrupt(event: Any) -> None:
        if event.column == "poet":
            raise error

    full_lab.set_adapter("pirate")
    full_lab.model.train()
    config = full_lab.model.generation_config
    with pytest.raises(error):
        full_lab.compare("Go on", max_new_tokens=4, on_token=interrupt)
    assert full_lab.active_adapters == {"pirate": 1.0}
    assert list(full_lab._adapters.mounts.standing()) == ["pirate"]
    assert all(module.training for module in full_lab.model.modules())
    assert full_lab.model.generation_config is config
    assert full_lab.history == []


def test_where_one_token_is_left_its_lead_is_over_those_put_aside() -> None:
    """top-k or top-p leaves one of two equal tokens: rounding decided which, and that is no firm lead."""
    logits = torch.tensor([[1.0, 1.0 + 1e-6, -3.0], [5.0, 1.0, 0.0]])
    scores = torch.tensor([[-torch.inf, 2.0, -torch.inf], [10.0, -torch.inf, -torch.inf]])
    tokens, leads = choose(scores, rows_for(0.5, [0, 1]), logits)
    assert tokens == [1, 0]
    assert leads == pytest.approx([2e-6, 8.0], abs=1e-6)
