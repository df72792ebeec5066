"""`AdaLoraCallback` under a plain Trainer against a loop written by hand with PEFT's own PeftModel and allocator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from standins import tiny_llama, tiny_tokenizer
from transformers import Trainer, TrainingArguments

from adapterlab import AdaLoraCallback, AdapterLab, AdapterLabError

STEPS, TINIT, TFINAL = 12, 2, 4
WEIGHT = 0.5


def config_of(**fields: Any) -> AdaLoraConfig:
    given = {
        "init_r": 6,
        "target_r": 3,
        "total_step": STEPS,
        "tinit": TINIT,
        "tfinal": TFINAL,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "orth_reg_weight": WEIGHT,
        "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM",  # without one PEFT's own forward leaves its orthogonal term out
    }
    return AdaLoraConfig(**{**given, **fields})


def rows(count: int = 2 * STEPS, width: int = 16) -> list[dict[str, list[int]]]:
    ids = torch.randint(7, 300, (count, width), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * width, "labels": row} for row in ids]


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    usual = {
        "max_steps": STEPS,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.3,
    }
    return TrainingArguments(str(folder), **{**usual, **given})


def start(seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(tiny_llama(), config_of(**fields))


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix("base_model.model.").replace(".default", "").replace(".ada", ""): p.detach().clone()
        for key, p in model.named_parameters()
        if "lora_" in key
    }


def by_hand(accumulate: int = 1, **fields: Any) -> tuple[Any, list[float]]:
    """What a careful person writes: PEFT's loss with its term, backward, clip, step, allocate."""
    model = start(**fields).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=0.0)
    data, losses = rows(), []
    for step in range(STEPS):
        batches = [data[(2 * (step * accumulate + i)) % len(data) :][:2] for i in range(accumulate)]
        total = torch.zeros(())
        for batch in batches:
            ids = torch.tensor([row["input_ids"] for row in batch])
            task = model.base_model.model(input_ids=ids, labels=ids).loss
            total = total + task / accumulate
        ids = torch.tensor([row["input_ids"] for row in batches[0]])
        both = model(input_ids=ids, labels=ids).loss
        orthogonal = both - model.base_model.model(input_ids=ids, labels=ids).loss
        (total + orthogonal).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.3)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(total.item())
    return model, losses


def lab_of(tmp_path: Path) -> AdapterLab:
    """A lab whose adapter "ada" has the very tensors that `start()` draws."""
    start().save_pretrained(tmp_path / "start", save_embedding_layers=False)
    lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
    lab.load_adapter(tmp_path / "start", "ada")
    return lab


def assert_same_run(model: Any, callback: AdaLoraCallback, oracle: Any) -> None:
    expected = adapter_tensors(oracle)
    found = adapter_tensors(model)
    assert set(found) == set(expected)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)
    theirs = oracle.peft_config["default"].rank_pattern
    assert callback.rank_pattern == {key.replace(".lora_E.default", ""): kept for key, kept in theirs.items()}
    kept = {key: (value != 0).view(-1).tolist() for key, value in found.items() if key.endswith("lora_E")}
    assert kept == {f"{key}.lora_E": pattern for key, pattern in callback.rank_pattern.items()}


class TestAgainstALoopByHand:
    # PEFT's own words on what its loop and its loader do: a triplet pruned to rank 0 is taken for a missing shard, and
    # AdaLoRA's rank_pattern is read as if it were LoRA's
    @pytest.mark.filterwarnings("ignore:Adapter 'default'. .*LoRA tensor.s. have invalid shape")
    @pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_peft_model(self, tmp_path: Path, accumulate: int) -> None:
        oracle, losses = by_hand(accumulate)
        model, callback = start(), AdaLoraCallback()
        args = arguments(tmp_path, gradient_accumulation_steps=accumulate)
        trainer = Trainer(model=model, args=args, train_dataset=rows(), callbacks=[callback])
        trainer.train()
        assert_same_run(model, callback, oracle)
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged == pytest.approx(losses, rel=1e-4), "the loss told is the task's, without the orthogonal term"
        # the small file, as PEFT saves it from its own loop
        model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
        oracle.save_pretrained(tmp_path / "oracle", save_embedding_layers=False)
        ids = torch.tensor([rows()[0]["input_ids"]])
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
        sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("saved", "oracle")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02)

    def test_native_model(self, tmp_path: Path) -> None:
        oracle, _ = by_hand()
        model = tiny_llama()
        torch.manual_seed(0)
        model.add_adapter(config_of(), "ada")
        callback = AdaLoraCallback()
        Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()
        assert_same_run(model, callback, oracle)
        model.save_pretrained(tmp_path / "saved")  # which fails natively once the config has a pattern
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved").eval()
        ids = torch.tensor([rows()[0]["input_ids"]])
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)

    def test_a_trainer_of_ones_own_on_the_labs_model(self, tmp_path: Path) -> None:
        oracle, _ = by_hand()
        lab = lab_of(tmp_path)
        lab.set_trainable("ada")
        callback = AdaLoraCallback()
        with lab.using("ada") as model:
            Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()
            assert_same_run(model, callback, oracle)
        lab.close()

    def test_the_labs_trainer(self, tmp_path: Path) -> None:
        oracle, losses = by_hand()
        lab = lab_of(tmp_path)
        trainer = lab.trainer("ada", rows(), arguments(tmp_path))
        trainer.train()
        assert trainer.allocation is not None
        with lab.using("ada") as model:
            assert_same_run(model, trainer.allocation, oracle)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["loss"] for entry in logged] == pytest.approx(losses, rel=1e-4)
        layers = len(oracle.peft_config["default"].rank_pattern)
        assert [entry["total_rank"] for entry in logged][-1] == 3 * layers
        assert all(entry["total_rank"] <= entry["budget"] for entry in logged)
        lab.close()

    def test_without_the_callback_nothing_is_pruned(self, tmp_path: Path) -> None:
        """The trap that the callback is for; when this fails, transformers has learned it."""
        model = tiny_llama()
        model.add_adapter(config_of(), "ada")
        Trainer(model=model, args=arguments(tmp_path), train_dataset=rows()).train()
        assert model.peft_config["ada"].rank_pattern is None
        assert all(bool((p != 0).all()) for key, p in model.named_parameters() if "lora_E" in key)


class TestOrthogonality:
    def test_it_is_told_apart_and_pulls(self, tmp_path: Path) -> None:
        def run(weight: float) -> tuple[AdaLoraCallback, Any]:
            model, callback = start(orth_reg_weight=weight), AdaLoraCallback()
            Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()
            return callback, model

        with_term, _ = run(5.0)
        without, _ = run(0.0)
        assert with_term.history.orthogonality.iloc[-1] < without.history.orthogonality.iloc[-1]
        norms = []
        for key, p in start().named_parameters():
            if "lora_A" in key or "lora_B" in key:
                gram = p @ p.T if "lora_A" in key else p.T @ p
                norms.append(torch.linalg.norm(gram - torch.eye(6)).item())
        assert without.history.orthogonality.iloc[0] == pytest.approx(sum(norms) / len(norms), rel=1e-5)

    def test_the_evaluation_loss_is_free_of_it(self, tmp_path: Path) -> None:
        model = start()
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, eval_strategy="steps", eval_steps=STEPS),
            train_dataset=rows(),
            eval_dataset=rows()[:4],
            callbacks=[AdaLoraCallback()],
        )
        trainer.train()
        told = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
        ids = torch.tensor([row["input_ids"] for row in rows()[:4]])
        with torch.no_grad():
            bare = model.eval().base_model.model(input_ids=ids, labels=ids).loss
            with_term = model(input_ids=ids, labels=ids).loss
        assert told == pytest.approx(float(bare), rel=1e-5)
        assert float(with_term) > told + 0.1, "PEFT's own forward adds it again once training has ended"


class TestWhatHappened:
    @pytest.fixture
    def done(self, tmp_path: Path) -> tuple[AdaLoraCallback, Any]:
        model, callback = start(), AdaLoraCallback()
        args = arguments(tmp_path)
        Trainer(model=model, args=args, train_dataset=rows(), callbacks=[callback]).train()
        return callback, model

    def test_history(self, done: Any) -> None:
        history = done[0].history
        assert history.step.tolist() == list(range(1, STEPS + 1))
        full = 6 * len(done[0].rank_pattern)
        assert history.budget.iloc[:TINIT].tolist() == [full] * TINIT
        assert history.budget.iloc[-TFINAL:].tolist() == [full // 2] * TFINAL
        assert history.budget.is_monotonic_decreasing
        assert (history.total_rank <= history.budget).all()
        assert history.threshold.notna().sum() == STEPS - TINIT - TFINAL
        assert (history.revived >= 0).all()

    def test_ranks(self, done: Any) -> None:
        callback, model = done
        ranks = callback.ranks
        assert list(ranks.columns) == ["step", "layer", "module", "rank", "score"]
        last = ranks[ranks.step == ranks.step.max()]
        counted = {key: int((p != 0).sum()) for key, p in adapter_tensors(model).items() if key.endswith("lora_E")}
        assert last["rank"].tolist() == list(counted.values())
        assert set(ranks.module) == {"q_proj", "v_proj", "down_proj"}
        assert (ranks.score > 0).all()
        summed = ranks.groupby("step")["rank"].sum()
        planned = callback.history.set_index("step").budget
        assert (summed <= planned[summed.index]).all()

    def test_the_config_has_the_real_number_of_steps(self, tmp_path: Path) -> None:
        model = start(total_step=1000, tinit=0, tfinal=0)
        args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
        Trainer(model=model, args=args, train_dataset=rows(20), callbacks=[AdaLoraCallback()]).train()
        config = model.peft_config["default"]
        assert config.total_step == 10  # 20 rows, 2 a batch, 2 batches a step: 5 steps an epoch
        assert (config.tinit, config.tfinal, config.deltaT) == (1, 4, 1)
        assert sum(map(sum, config.rank_pattern.values())) == 3 * len(config.rank_pattern)


class TestResume:
    def test_it_goes_on_where_it_was(self, tmp_path: Path) -> None:
        whole, first = start(), AdaLoraCallback()
        args = arguments(tmp_path / "a", save_strategy="steps", save_steps=5, save_total_limit=3)
        Trainer(model=whole, args=args, train_dataset=rows(), callbacks=[first]).train()
        again, second = start(seed=9), AdaLoraCallback()
        resumed = arguments(tmp_path / "a", save_strategy="no")
        Trainer(model=again, args=resumed, train_dataset=rows(), callbacks=[second]).train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5")
        )
        assert second.rank_pattern == first.rank_pattern
        for key, value in adapter_tensors(again).items():
            assert torch.equal(value, adapter_tensors(whole)[key]), key
        assert first.history.equals(second.history)
        assert first.ranks.equals(second.ranks)

    def test_without_the_averages_it_is_refused(self, tmp_path: Path) -> None:
        args = arguments(tmp_path, save_strategy="steps", save_steps=5)
        Trainer(model=start(), args=args, train_dataset=rows(), callbacks=[AdaLoraCallback()]).train()
        (tmp_path / "checkpoint-5" / "adalora_state.safetensors").unlink()
        trainer = Trainer(model=start(), args=args, train_dataset=rows(), callbacks=[AdaLoraCallback()])
        with pytest.raises(AdapterLabError, match=r"has no adalora_state\.safetensors"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


class TestBadInput:
    def test_no_adalora(self, tmp_path: Path) -> None:
        model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[AdaLoraCallback()])
        with pytest.raises(AdapterLabError, match="found 0 trainable AdaLoRA adapters"):
            trainer.train()

    def test_a_name_of_another_kind(self, tmp_path: Path) -> None:
        model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        callback = AdaLoraCallback("default")
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
        with pytest.raises(AdapterLabError, match=r"'default' is no AdaLoRA adapter .* 'default' \(LORA\)"):
            trainer.train()

    def test_target_r_not_below_init_r(self, tmp_path: Path) -> None:
        model = start(target_r=6)
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[AdaLoraCallback()])
        with pytest.raises(AdapterLabError, match="target_r=6 is not below init_r=6"):
            trainer.train()
        assert "forward" not in model.base_model.__dict__

    def test_asked_before_any_training(self) -> None:
        with pytest.raises(AdapterLabError, match="has seen no training yet"):
            _ = AdaLoraCallback().rank_pattern
        assert AdaLoraCallback().history.empty
        assert AdaLoraCallback().ranks.empty
