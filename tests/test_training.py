"""`lab.train` and `lab.trainer`: against plain Trainer and PEFT, and what they leave alone."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from standins import tiny_llama, tiny_mixtral, tiny_t5, tiny_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from adapterlab import AdapterLab, AdapterLabError, TrainingRun, training
from adapterlab.fingerprints import base_digest
from adapterlab.training_data import make_collator, read_training_data

PAIRS = [
    ("What is the moon?", "Arr, the moon be a lantern."),
    ("What is the sea?", "Arr, the sea be wide, and deep, and full of fish."),
    ("Who are you?", "Arr, a captain."),
    ("Where is the ship?", "Arr, in the harbour, behind the wall."),
    ("Why?", "Arr!"),
    ("What is an adapter?", "Arr, a small chest of numbers."),
]
LORA = {"method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
ADALORA = {"method": "adalora", "init_r": 6, "target_r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
QUIET = {"disable_tqdm": True}
BEYOND = [{"input_ids": [1, 2]}, {"input_ids": [1, 320]}]  # the tiny Llama has rows for the tokens 0 to 319


def tensors(lab: AdapterLab, name: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in lab._adapters.state(name)[1].items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def ids_of(lab: AdapterLab, text: str = "What is the moon?") -> torch.Tensor:
    return lab.tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[misc]


class At(TrainerCallback):
    """Do something after a step."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.do()


class TestItLearns:
    @pytest.mark.parametrize(
        "how",
        [
            LORA,
            {"method": "ia3"},
            ADALORA,
            {"method": "lora", "use_dora": True, "target_modules": ["v_proj"]},
            {"method": "loha", "r": 2, "target_modules": ["q_proj"]},
            {"method": LoraConfig(r=2, use_rslora=True, target_modules=["up_proj"])},
        ],
        ids=["lora", "ia3", "adalora", "dora", "loha", "a config"],
    )
    def test_the_loss_falls_and_the_adapter_is_there(self, lab: AdapterLab, how: dict[str, Any]) -> None:
        run = lab.train("new", PAIRS, max_steps=30, learning_rate=3e-2, eval_dataset=PAIRS[:2], **how, **QUIET)
        assert isinstance(run, TrainingRun)
        assert (run.steps, run.total_steps, run.stopped_early, run.error) == (30, 30, False, "")
        held_out = run.history.eval_loss.dropna()
        assert run.history.step[held_out.index[0]] == 0
        assert held_out.iloc[-1] < held_out.iloc[0] - 0.05
        assert lab.adapters["new"].status == "unsaved"
        assert lab.adapters["new"].runs == (run,)
        _, tuned = lab.compare("What is the moon?", max_new_tokens=3).generations
        assert tuned.logit_shift > 0

    def test_the_first_held_out_loss_is_the_bases_own(self, lab: AdapterLab) -> None:
        run = lab.train("new", PAIRS, max_steps=2, eval_dataset=PAIRS[:1], **LORA, **QUIET)
        row = read_training_data(PAIRS[:1], lab.tokenizer).rows[0]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            expected = tiny_llama()(input_ids=ids, labels=labels).loss.item()
        assert run.history.eval_loss.iloc[0] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
    def test_held_out_loss_is_the_mean_over_tokens_whatever_the_batch_size(self, make: Any) -> None:
        """Plain Trainer weighs the batches' means by rows: with unequal rows the batch size decides."""
        lab = AdapterLab(make(), tokenizer=tiny_tokenizer(chat=True, seq2seq=make is tiny_t5))
        rows = read_training_data(PAIRS, lab.tokenizer, encoder_decoder=make is tiny_t5).rows
        base, losses, tokens = make(), 0.0, 0
        for row in rows:
            given = {key: torch.tensor([value]) for key, value in row.items() if isinstance(value, list)}
            count = int((given["labels"][:, 0 if make is tiny_t5 else 1 :] != -100).sum())
            with torch.no_grad():
                losses, tokens = losses + base(**given).loss.item() * count, tokens + count
        method = {"method": "lora", "r": 2, "target_modules": "all-linear"}
        for size in (1, 4, 6):
            run = lab.train(
                f"of-{size}", PAIRS, max_steps=1, eval_dataset=PAIRS, per_device_eval_batch_size=size, **method, **QUIET
            )
            assert run.history.eval_loss.iloc[0] == pytest.approx(losses / tokens, rel=1e-5)

    def test_training_again_goes_on(self, lab: AdapterLab) -> None:
        first = lab.train("new", PAIRS, max_steps=10, learning_rate=2e-2, eval_dataset=PAIRS[:2], **LORA, **QUIET)
        second = lab.train("new", PAIRS, max_steps=10, learning_rate=2e-2, eval_dataset=PAIRS[:2], **LORA, **QUIET)
        assert second.history.eval_loss.iloc[0] == pytest.approx(first.eval_loss, rel=1e-5)
        assert lab.adapters["new"].runs == (first, second)

    def test_an_adapter_that_was_loaded(self, full_lab: AdapterLab) -> None:
        before = tensors(full_lab, "poet")
        full_lab.train("poet", PAIRS, max_steps=2, **QUIET)
        assert not same(before, tensors(full_lab, "poet"))
        assert full_lab.adapters["poet"].status == "unsaved"
        assert full_lab.verify(full_lab.compare("Why?", ["poet"], max_new_tokens=4)).agrees.all()

    def test_the_same_call_gives_the_same_weights(self) -> None:
        found = []
        for _ in range(2):
            lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
            torch.rand(3)  # whatever was drawn before
            lab.train("new", PAIRS, max_steps=4, seed=5, lora_dropout=0.2, **LORA, **QUIET)
            found.append(tensors(lab, "new"))
            lab.close()
        assert same(*found)

    def test_an_encoder_decoder(self) -> None:
        lab = AdapterLab(tiny_t5(), tokenizer=tiny_tokenizer(seq2seq=True))
        run = lab.train(
            "new", PAIRS, method="lora", target_modules=["q", "v"], max_steps=20, learning_rate=3e-2,
            eval_dataset=PAIRS[:2], **QUIET,
        )  # fmt: skip
        assert run.history.eval_loss.dropna().iloc[-1] < run.history.eval_loss.iloc[0]
        lab.close()


class TestAgainstPlainTrainerAndPeft:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_same_seed_same_weights(self, lab: AdapterLab, tmp_path: Path, accumulate: int) -> None:
        lab.add_adapter("lora", "new", r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        lab.save_adapter("new", tmp_path / "start")
        given = {
            "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "seed": 3, "report_to": "none",
            "use_cpu": True, "gradient_accumulation_steps": accumulate, "disable_tqdm": True, "save_strategy": "no",
            "logging_steps": 1, "dataloader_pin_memory": False,
        }  # fmt: skip
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "start", is_trainable=True)
        rows = read_training_data(PAIRS, lab.tokenizer).rows
        theirs = Trainer(
            model=plain,
            args=TrainingArguments(str(tmp_path / "plain"), **given),
            train_dataset=rows,
            data_collator=make_collator(lab.tokenizer),
        )
        theirs.train()
        ours = lab.trainer("new", PAIRS, TrainingArguments(str(tmp_path / "ours"), **given))
        ours.train()
        expected = {
            key.removeprefix("base_model.model.").replace(".default", ""): value
            for key, value in plain.state_dict().items()
            if "lora_" in key
        }
        assert same(tensors(lab, "new"), expected)
        losses = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (ours, theirs)]
        assert losses[0] == losses[1]

    def test_a_trainer_of_ones_own(self, lab: AdapterLab, tmp_path: Path) -> None:
        """As the guide has it: `Trainer(model=lab.model, …)` trains the adapter that is selected and trainable."""
        lab.add_adapter("lora", "new", r=4, target_modules=["q_proj", "v_proj"])
        base = base_digest(lab.model) if lab.selection.is_base else None
        before = tensors(lab, "new")
        args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
                                 save_strategy="no", dataloader_pin_memory=False)  # fmt: skip
        rows = read_training_data(PAIRS, lab.tokenizer).rows
        Trainer(model=lab.model, args=args, train_dataset=rows, data_collator=make_collator(lab.tokenizer)).train()
        assert not same(before, tensors(lab, "new"))
        assert base is None
        assert lab.verify(lab.compare("Why?", ["new"], max_new_tokens=4)).agrees.all()

    @pytest.mark.parametrize("checkpointing", ["gradient_checkpointing", "activation_checkpointing"])
    def test_gradient_checkpointing_changes_nothing_but_memory(self, lab: AdapterLab, checkpointing: str) -> None:
        for name, more in (("plain", {}), ("sparing", {checkpointing: True})):
            lab.train(name, PAIRS, max_steps=3, **LORA, **more, **QUIET)
        for key, value in tensors(lab, "plain").items():
            torch.testing.assert_close(tensors(lab, "sparing")[key], value)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in lab.model.modules())


class TestOnlyThatAdapterLearns:
    @pytest.mark.parametrize("name", ["pirate", "poet", "ada", "wide", "dora"])
    def test_base_and_others_keep_every_bit(self, full_lab: AdapterLab, name: str) -> None:
        base, others = base_digest(full_lab.model), {n: tensors(full_lab, n) for n in full_lab.adapters}
        full_lab.train(name, PAIRS, max_steps=4, weight_decay=0.1, **QUIET)
        assert base_digest(full_lab.model) == base
        for other, before in others.items():
            assert same(tensors(full_lab, other), before) is (other != name), other

    @pytest.mark.parametrize("selection", [None, "pirate", "poet", {"pirate": 0.5, "poet": 0.5}])
    def test_the_state_is_what_it_was(self, full_lab: AdapterLab, selection: Any) -> None:
        lab = full_lab
        lab.set_adapter(selection)
        lab.set_trainable("wide")
        lab.model.train()
        lab.model.config.use_cache = False
        wanted = dict(lab.model.config.__dict__)
        generation = dict(lab.model.generation_config.__dict__)
        before = lab.selection, lab.active_adapters, lab.enabled, lab.trainable
        modes = {path: module.training for path, module in lab.model.named_modules()}
        hooks = {path: len(module._forward_hooks) for path, module in lab.model.named_modules()}
        lab.train("ada", PAIRS, max_steps=3, eval_dataset=PAIRS[:2], neftune_noise_alpha=1.0, **QUIET)
        assert (lab.selection, lab.active_adapters, lab.enabled, lab.trainable) == before
        assert {path: module.training for path, module in lab.model.named_modules()} == modes
        assert {path: len(module._forward_hooks) for path, module in lab.model.named_modules()} == hooks
        assert lab.model.config.__dict__ == wanted
        assert lab.model.generation_config.__dict__ == generation
        assert "forward" not in lab.model.__dict__
        learns = {key for key, p in lab.model.named_parameters() if p.requires_grad}
        assert all("lora_" in key for key in learns)
        assert all(p.grad is None for p in lab.model.parameters())

    def test_while_disabled(self, full_lab: AdapterLab) -> None:
        full_lab.set_adapter("pirate")
        full_lab.disable_adapters()
        full_lab.train("pirate", PAIRS, max_steps=2, **QUIET)
        assert not full_lab.enabled
        assert full_lab.active_adapters == {}
        assert str(full_lab.selection) == str(type(full_lab.selection).of("pirate"))

    def test_a_new_adapter_is_not_selected(self, full_lab: AdapterLab) -> None:
        full_lab.set_adapter("poet")
        full_lab.set_trainable("poet")
        full_lab.train("new", PAIRS, max_steps=2, **LORA, **QUIET)
        assert full_lab.active_adapters == {"poet": 1.0}
        assert full_lab.trainable == "poet"

    def test_special_tokens_of_the_model_stay(self, lab: AdapterLab, tmp_path: Path) -> None:
        lab.model.generation_config.eos_token_id = [2, 7]
        lab.model.config.pad_token_id = None
        trainer = lab.trainer(_new(lab), PAIRS, max_steps=1, output_dir=str(tmp_path / "unused"), **QUIET)
        trainer.processing_class = lab.tokenizer
        trainer.train()
        assert lab.model.generation_config.eos_token_id == [2, 7]
        assert lab.model.config.pad_token_id is None


def _new(lab: AdapterLab, **config: Any) -> str:
    lab.add_adapter("lora", "new", **{"r": 4, "target_modules": ["q_proj", "v_proj"], **config})
    return "new"


class TestPrecision:
    def test_adapters_are_float32_on_a_half_precision_base(self) -> None:
        lab = AdapterLab(tiny_llama().to(torch.bfloat16), tokenizer=tiny_tokenizer(chat=True))
        lab.train("new", PAIRS, max_steps=2, **LORA, **QUIET)
        assert {value.dtype for value in tensors(lab, "new").values()} == {torch.float32}
        lab.close()

    def test_whole_modules_learn_in_float32_and_are_what_the_file_says(self, tmp_path: Path) -> None:
        """In bfloat16 an update of a thousandth of a weight would be rounded away."""
        model = tiny_llama().to(torch.bfloat16)
        lab = AdapterLab(model, tokenizer=tiny_tokenizer(chat=True))
        seen: set[torch.dtype] = set()
        look = At(1, lambda: seen.update(p.dtype for p in lab.model.parameters() if p.requires_grad))
        before = lab.model.lm_head.weight.clone()
        lab.train(
            "new",
            PAIRS,
            max_steps=8,
            learning_rate=1e-4,
            modules_to_save=["lm_head"],
            callbacks=[look],
            **LORA,
            **QUIET,
        )
        assert seen == {torch.float32}
        kept = tensors(lab, "new")
        head = next(value for key, value in kept.items() if "lm_head" in key)
        assert head.dtype == torch.bfloat16
        assert not torch.equal(head, before)
        assert torch.equal(lab.model.lm_head.weight, before)
        lab.save_adapter("new", tmp_path / "new")
        plain = PeftModel.from_pretrained(tiny_llama().to(torch.bfloat16), tmp_path / "new").eval()
        with torch.no_grad(), lab.using("new") as mounted:
            assert torch.equal(plain(ids_of(lab)).logits, mounted(ids_of(lab)).logits)
        lab.close()

    @pytest.mark.parametrize(
        ("make", "fields"),
        [
            (
                partial(tiny_llama, tie_word_embeddings=True),
                {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
            ),
            (tiny_mixtral, {"modules_to_save": ["gate"]}),
        ],
        ids=["a tied head", "a router that gives a tuple"],
    )
    def test_so_do_tied_ones_and_routers(self, make: Any, fields: dict[str, Any], tmp_path: Path) -> None:
        lab = AdapterLab(make().to(torch.bfloat16), tokenizer=tiny_tokenizer(chat=True))
        seen: set[torch.dtype] = set()
        look = At(1, lambda: seen.update(p.dtype for p in lab.model.parameters() if p.requires_grad))
        lab.add_adapter("lora", "new", r=4, target_modules=["q_proj"], **fields)
        before = {key: value for key, value in tensors(lab, "new").items() if "lora_" not in key}
        lab.train("new", PAIRS, max_steps=8, learning_rate=1e-3, callbacks=[look], **QUIET)
        assert seen == {torch.float32}
        kept = tensors(lab, "new")
        assert {kept[key].dtype for key in before} == {torch.bfloat16}
        assert not any(torch.equal(kept[key], value) for key, value in before.items())
        lab.save_adapter("new", tmp_path / "new")
        plain = PeftModel.from_pretrained(make().to(torch.bfloat16), tmp_path / "new").eval()
        with torch.no_grad(), lab.using("new") as mounted:
            assert torch.equal(plain(ids_of(lab)).logits, mounted(ids_of(lab)).logits)
        lab.close()

    def test_bf16_autocast_on_a_cpu(self, lab: AdapterLab) -> None:
        run = lab.train("new", PAIRS, max_steps=3, bf16=True, **LORA, **QUIET)
        assert np.isfinite(run.loss)
        assert "forward" not in lab.model.__dict__
        assert {value.dtype for value in tensors(lab, "new").values()} == {torch.float32}


class TestTheRun:
    def test_history_plot_and_words(self, lab: AdapterLab) -> None:
        run = lab.train("new", PAIRS, max_steps=6, eval_dataset=0.34, per_device_train_batch_size=2, **LORA, **QUIET)
        assert list(run.history.columns) == ["step", "loss", "eval_loss", "learning_rate", "seconds"]
        assert run.history.step.tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert run.history.loss.notna().tolist() == [False] + [True] * 6
        assert run.history.seconds.is_monotonic_increasing
        assert run.data == "4 prompt/completion pairs" or run.data.startswith("4 ")
        assert run.eval_data.startswith("2 ")
        assert run.settings["max_steps"] == 6
        assert "6 steps" in repr(run)
        assert run.plot()._repr_png_()[0].startswith(b"\x89PNG")  # type: ignore[attr-defined]
        assert "<table" in run._repr_html_()
        assert run.ranks.empty

    def test_adalora_tells_its_ranks(self, lab: AdapterLab) -> None:
        run = lab.train("ada", PAIRS, max_steps=15, learning_rate=2e-2, **ADALORA, **QUIET)
        assert {"orthogonality", "budget", "total_rank"} <= set(run.history.columns)
        layers = 3 * lab.model.config.num_hidden_layers
        assert run.history.total_rank.iloc[-1] == 3 * layers
        last = run.ranks[run.ranks.step == run.ranks.step.max()]
        assert last["rank"].sum() == 3 * layers
        with lab.using("ada") as model:
            counted = sum(int((p != 0).sum()) for key, p in model.named_parameters() if "lora_E" in key)
        assert counted == 3 * layers
        assert run.plot()._repr_png_()[0].startswith(b"\x89PNG")  # type: ignore[attr-defined]

    def test_padding_is_counted_and_rows_of_like_length_go_together(self, lab: AdapterLab) -> None:
        texts = ["a b", "one two three four five six seven eight nine ten eleven twelve thirteen"] * 8
        shares = {}
        for strategy in ("random", "group_by_length"):
            name = strategy.replace("_", "-")
            run = lab.train(name, texts, max_steps=4, per_device_train_batch_size=4, train_sampling_strategy=strategy,
                            **LORA, **QUIET)  # fmt: skip
            shares[strategy] = run.padding
        assert shares["group_by_length"] == 0.0
        assert shares["random"] > 0.1

    def test_a_bar_with_loss_and_speed(self, lab: AdapterLab, capfd: pytest.CaptureFixture[str]) -> None:
        lab.train("new", PAIRS, max_steps=3, **LORA)
        told = capfd.readouterr().err
        assert "3/3" in told
        assert "loss" in told
        assert "step/s" in told


@pytest.fixture
def ctrl_c() -> Iterator[Any]:
    """Python's own handler, also where the tests were started with Ctrl-C ignored, as a shell does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


class TestStop:
    def test_stop_keeps_what_was_learned(self, lab: AdapterLab) -> None:
        run = lab.train("new", PAIRS, max_steps=50, callbacks=[At(3, lab.stop)], **LORA, **QUIET)
        assert (run.steps, run.total_steps, run.stopped_early, run.error) == (3, 50, True, "")
        assert lab.adapters["new"].status == "unsaved"
        other = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
        stop = At(3, lambda: None)
        stop.on_step_end = lambda args, state, control, **kw: setattr(
            control, "should_training_stop", state.global_step == 3
        )  # type: ignore[method-assign]
        other.train("new", PAIRS, max_steps=50, callbacks=[stop], **LORA, **QUIET)
        assert same(tensors(lab, "new"), tensors(other, "new"))
        other.close()

    def test_between_accumulated_batches(self, lab: AdapterLab) -> None:
        class Halfway(TrainerCallback):
            def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    lab.stop()

        run = lab.train("new", PAIRS, max_steps=9, per_device_train_batch_size=1, gradient_accumulation_steps=3,
                        callbacks=[Halfway()], **LORA, **QUIET)  # fmt: skip
        assert (run.steps, run.stopped_early) == (1, True)

    def test_in_the_middle_of_an_evaluation(self, lab: AdapterLab) -> None:
        class Evaluating(TrainerCallback):
            seen = 0

            def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.seen += 1
                if state.global_step == 2:
                    lab.stop()

        run = lab.train("new", PAIRS, max_steps=9, eval_dataset=PAIRS, eval_steps=2, eval_strategy="steps",
                        per_device_eval_batch_size=1, callbacks=[Evaluating()], **LORA, **QUIET)  # fmt: skip
        assert (run.steps, run.stopped_early) == (2, True)
        assert lab.trainable is None

    def test_ctrl_c_finishes_the_step_and_gives_the_run(self, lab: AdapterLab, ctrl_c: Any) -> None:
        before = signal.getsignal(signal.SIGINT)
        press = At(2, ctrl_c)
        run = lab.train("new", PAIRS, max_steps=50, callbacks=[press], **LORA, **QUIET)
        assert (run.steps, run.stopped_early) == (2, True)
        assert signal.getsignal(signal.SIGINT) is before

    def test_a_trainer_stops_too(self, lab: AdapterLab, tmp_path: Path) -> None:
        class Evaluating(TrainerCallback):
            def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                lab.stop()

        trainer = lab.trainer(_new(lab), PAIRS, output_dir=str(tmp_path), eval_dataset=PAIRS, eval_steps=2, max_steps=9,
                              eval_on_start=False, per_device_eval_batch_size=1, callbacks=[Evaluating()], **QUIET)  # fmt: skip
        assert trainer.train().global_step == 2
        trainer.remove_callback(Evaluating)
        assert trainer.evaluate()["eval_loss"] > 0, "an old Stop is not for what comes later"

    def test_a_second_ctrl_c_does_not_wait(self, lab: AdapterLab, ctrl_c: Any) -> None:
        class Twice(TrainerCallback):
            def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 2:
                    ctrl_c()
                    ctrl_c()

        run = lab.train("new", PAIRS, max_steps=9, per_device_train_batch_size=1, gradient_accumulation_steps=3,
                        callbacks=[Twice()], **LORA, **QUIET)  # fmt: skip
        assert (run.steps, run.stopped_early) == (2, True)
        assert lab.compare("Why?", max_new_tokens=2).columns == ["base", "new"]

    def test_adalora_stopped_in_mid_run_is_what_its_pattern_says(self, lab: AdapterLab, tmp_path: Path) -> None:
        run = lab.train("ada", PAIRS, max_steps=30, learning_rate=2e-2, deltaT=3, tinit=2, tfinal=5,
                        callbacks=[At(11, lab.stop)], **ADALORA, **QUIET)  # fmt: skip
        assert run.stopped_early
        kept = run.ranks[run.ranks.step == run.ranks.step.max()]["rank"].sum()
        with lab.using("ada") as model:
            assert sum(int((p != 0).sum()) for key, p in model.named_parameters() if "lora_E" in key) == kept
        assert kept > 3 * 3 * lab.model.config.num_hidden_layers, "the budget had not fallen to its target"
        again = lab.train("ada", PAIRS, max_steps=20, learning_rate=2e-2, **QUIET)
        assert again.history.budget.iloc[0] == kept, "a further run starts from the ranks that are left"
        assert again.history.total_rank.iloc[-1] == 3 * 3 * lab.model.config.num_hidden_layers

    def test_closing_the_lab_ends_it(self) -> None:
        lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
        reached = threading.Event()
        ended: list[Any] = []

        def work() -> None:
            ended.append(lab.train("new", PAIRS, max_steps=100_000, callbacks=[At(2, reached.set)], **LORA, **QUIET))

        thread = threading.Thread(target=work)
        thread.start()
        assert reached.wait(60)
        assert lab.running
        lab.close()
        thread.join(60)
        assert not thread.is_alive()
        assert ended[0].stopped_early


class TestCallbacksOfTheUser:
    def test_generating_in_one_changes_nothing(self, lab: AdapterLab) -> None:
        said: list[str] = []
        ask = At(2, lambda: said.append(lab.generate("What is the moon?", "new", max_new_tokens=4).text))
        lab.train("new", PAIRS, max_steps=4, lora_dropout=0.0, callbacks=[ask], **LORA, **QUIET)
        asked = tensors(lab, "new")
        lab.delete_adapter("new")
        lab.train("new", PAIRS, max_steps=4, lora_dropout=0.0, **LORA, **QUIET)
        assert len(said) == 1
        assert same(asked, tensors(lab, "new"))

    def test_comparing_with_others_in_one(self, full_lab: AdapterLab) -> None:
        seen: list[Any] = []
        ask = At(2, lambda: seen.append(full_lab.compare("Why?", max_new_tokens=3)))
        full_lab.train("pirate", PAIRS, max_steps=4, callbacks=[ask], **QUIET)
        assert seen[0].columns == ["base", *full_lab.adapters]
        assert full_lab.verify(full_lab.compare("Why?", max_new_tokens=3)).agrees.all()

    def test_the_state_cant_change_in_one(self, full_lab: AdapterLab) -> None:
        for change in (
            lambda: full_lab.set_adapter("pirate"),
            lambda: full_lab.delete_adapter("pirate"),
            lambda: full_lab.train("poet", PAIRS, max_steps=1, **QUIET),
        ):
            with pytest.raises(AdapterLabError, match="state can't change"):
                full_lab.train("pirate", PAIRS, max_steps=4, callbacks=[At(1, change)], **QUIET)
        assert full_lab.active_adapters == {}

    def test_an_exception_comes_through_and_what_was_learned_stays(self, lab: AdapterLab) -> None:
        def fail() -> None:
            raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine"):
            lab.train("new", PAIRS, max_steps=9, callbacks=[At(3, fail)], **LORA, **QUIET)
        (run,) = lab.adapters["new"].runs
        assert (run.steps, run.error, run.stopped_early) == (3, "ZeroDivisionError: mine", False)
        assert lab.adapters["new"].status == "unsaved"
        assert lab.trainable is None

    def test_an_exception_before_the_first_step_leaves_nothing(self, lab: AdapterLab) -> None:
        class Early(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError):
            lab.train("new", PAIRS, callbacks=[Early()], **LORA, **QUIET)
        assert list(lab.adapters) == []
        assert lab.selection.is_base


class TestNotFinite:
    def losses(self, bad: int) -> Any:
        count = [0]

        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            count[0] += 1
            return outputs.logits.mean() * (float("nan") if count[0] == bad else 1.0)

        return loss

    def test_the_loss_at_once(self, lab: AdapterLab) -> None:
        with pytest.raises(AdapterLabError, match=r"loss became nan at step 1, and that step was not taken"):
            lab.train("new", PAIRS, compute_loss_func=self.losses(1), **LORA, **QUIET)
        assert list(lab.adapters) == []

    def test_the_loss_later(self, lab: AdapterLab) -> None:
        with pytest.raises(AdapterLabError, match=r"at step 4.*What 'new' learned in 3 steps is kept"):
            lab.train("new", PAIRS, compute_loss_func=self.losses(4), **LORA, **QUIET)
        assert all(value.isfinite().all() for value in tensors(lab, "new").values())
        assert lab.adapters["new"].runs[0].steps == 3

    def test_a_gradient(self, lab: AdapterLab) -> None:
        """The square root's slope at 0 is infinite, times 0 is NaN: the loss looks well."""

        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            return outputs.logits.mean() + (outputs.logits.mean() * 0).abs().sqrt() * 0

        with pytest.raises(AdapterLabError, match=r"A gradient is not finite at step 1"):
            lab.train("new", PAIRS, compute_loss_func=loss, **LORA, **QUIET)
        assert list(lab.adapters) == []

    def test_a_learning_rate_that_explodes_leaves_finite_weights(self, lab: AdapterLab) -> None:
        with pytest.raises(AdapterLabError, match="is kept"):
            lab.train("new", PAIRS, learning_rate=1e30, max_steps=50, max_grad_norm=0.0, **LORA, **QUIET)
        assert all(value.isfinite().all() for value in tensors(lab, "new").values())


class TestCheckpoints:
    @pytest.mark.parametrize(
        "how", [{**LORA, "lora_dropout": 0.3}, {"method": "ia3"}, ADALORA], ids=["lora", "ia3", "adalora"]
    )
    def test_resuming_reaches_the_weights_of_an_uninterrupted_run(self, tmp_path: Path, how: Any) -> None:
        given = {"max_steps": 10, "learning_rate": 2e-2, "per_device_train_batch_size": 2, "save_steps": 4, **QUIET}
        whole = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
        full = whole.train("new", PAIRS, output_dir=str(tmp_path / "a"), **how, **given)
        broken = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
        broken.train("new", PAIRS, output_dir=str(tmp_path / "b"), callbacks=[At(6, broken.stop)], **how, **given)
        again = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
        run = again.train("new", PAIRS, output_dir=str(tmp_path / "b"), resume_from_checkpoint=True, **how, **given)
        assert same(tensors(whole, "new"), tensors(again, "new"))
        assert run.history.drop(columns="seconds").equals(full.history.drop(columns="seconds"))
        assert run.ranks.equals(full.ranks)
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
            "checkpoint-10",
            "checkpoint-4",
            "checkpoint-8",
        ]
        for lab in (whole, broken, again):
            lab.close()

    def test_a_checkpoint_is_an_adapter_for_everyone(self, lab: AdapterLab, tmp_path: Path) -> None:
        lab.train("new", PAIRS, max_steps=4, save_steps=4, output_dir=str(tmp_path), **LORA, **QUIET)
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-4").eval()
        lab.load_adapter(tmp_path / "checkpoint-4", "loaded")
        with torch.no_grad(), lab.using("new") as model:
            assert torch.equal(plain(ids_of(lab)).logits, model(ids_of(lab)).logits)
        assert same(tensors(lab, "new"), tensors(lab, "loaded"))

    def test_the_best_is_taken_at_the_end(self, lab: AdapterLab, tmp_path: Path) -> None:
        run = lab.train(
            "new", PAIRS, max_steps=12, learning_rate=3.0, eval_dataset=PAIRS[:2], eval_strategy="steps", eval_steps=2,
            save_steps=2, output_dir=str(tmp_path), load_best_model_at_end=True, metric_for_best_model="eval_loss",
            greater_is_better=False, **LORA, **QUIET,
        )  # fmt: skip
        best = run.history[run.history.step > 0].eval_loss.min()
        trainer = lab.trainer("new", PAIRS, eval_dataset=PAIRS[:2], output_dir=str(tmp_path / "x"), **QUIET)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)

    @pytest.mark.parametrize(
        "name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"]
    )
    def test_half_a_checkpoint_is_passed_over(
        self, lab: AdapterLab, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A process killed while it wrote. transformers goes on with a fresh optimizer, without a word."""
        how: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "output_dir": str(tmp_path / "a"), **LORA, **QUIET}
        lab.train("new", PAIRS, **how)
        expected = lab._adapters.refresh(["new"])
        again = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
        shutil.rmtree(tmp_path / "a" / "checkpoint-6")
        (tmp_path / "a" / "checkpoint-4" / name).unlink()
        with pytest.raises(AdapterLabError, match=rf"checkpoint-4' is no checkpoint to resume from: it has no {name}"):
            again.train("new", PAIRS, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"), **how)
        assert list(again.adapters) == []
        again.train("new", PAIRS, resume_from_checkpoint=True, **how)
        assert f"checkpoint-4 is passed over: it has no {name}." in capsys.readouterr().out
        assert again._adapters.refresh(["new"]) == expected, "from checkpoint-2, to the same weights"

    @pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_a_checkpoint_cut_off_is_refused(self, lab: AdapterLab, tmp_path: Path, name: str) -> None:
        lab.train("new", PAIRS, max_steps=2, save_steps=2, output_dir=str(tmp_path), **LORA, **QUIET)
        path = tmp_path / "checkpoint-2" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(AdapterLabError, match=rf"no checkpoint to resume from: its {name} .*may have been cut off"):
            lab.train("more", PAIRS, max_steps=4, resume_from_checkpoint=str(path.parent), **LORA, **QUIET)
        assert list(lab.adapters) == ["new"]

    def test_a_checkpoint_without_optimizer_is_said(
        self, lab: AdapterLab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lab.train(
            "new", PAIRS, max_steps=2, save_steps=2, save_only_model=True, output_dir=str(tmp_path), **LORA, **QUIET
        )
        lab.train("more", PAIRS, max_steps=3, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **LORA, **QUIET)
        assert "without the optimizer's state (save_only_model): it begins anew" in capsys.readouterr().out

    @pytest.mark.parametrize("where", ["nowhere", "empty"])
    def test_no_checkpoint_to_resume_from(self, lab: AdapterLab, tmp_path: Path, where: str) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(AdapterLabError, match=r"is no checkpoint to resume from"):
            lab.train("new", PAIRS, resume_from_checkpoint=str(tmp_path / where), **LORA, **QUIET)
        with pytest.raises(AdapterLabError, match=r"no checkpoint in"):
            lab.train("new", PAIRS, output_dir=str(tmp_path / "empty"), resume_from_checkpoint=True, **LORA, **QUIET)
        assert list(lab.adapters) == []

    def test_a_checkpoint_of_another_adapter(self, lab: AdapterLab, tmp_path: Path) -> None:
        lab.train("one", PAIRS, max_steps=2, save_steps=2, output_dir=str(tmp_path), **LORA, **QUIET)
        with pytest.raises(AdapterLabError, match=r"checkpoint of another adapter: \d+ tensors differ"):
            lab.train(
                "two", PAIRS, max_steps=4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), method="ia3", **QUIET
            )
        assert list(lab.adapters) == ["one"]

    def test_a_full_disk_loses_nothing(self, lab: AdapterLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import safetensors.torch
        from safetensors import SafetensorError

        def full(*args: Any, **kwargs: Any) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(
            AdapterLabError, match=r"checkpoint-4' can't be written: .*No space left.*in 4 steps is kept"
        ):
            lab.train("new", PAIRS, max_steps=9, save_steps=4, output_dir=str(tmp_path), **LORA, **QUIET)
        monkeypatch.undo()
        assert not (tmp_path / "checkpoint-4").exists()
        assert lab.adapters["new"].runs[0].steps == 4
        lab.save_adapter("new", tmp_path / "saved")


class TestNumbersOfNumPy:
    """JSON has none of them, and what the lab writes is JSON."""

    def test_a_training(self, lab: AdapterLab, tmp_path: Path) -> None:
        numbers = {
            "max_steps": np.int64(2),
            "learning_rate": np.float32(0.25),  # a number that float32 holds
            "seed": np.int64(3),
            "eval_dataset": np.float32(0.25),
            "r": np.int64(4),
            "lora_alpha": np.float32(8),
            "rank_pattern": {"v_proj": np.int64(2)},
            "layers_to_transform": [np.int64(0)],
        }
        run = lab.train("new", PAIRS, **{**LORA, **numbers}, **QUIET)
        lab.save(tmp_path / "lab")
        lab.save_adapter("new", tmp_path / "new")
        assert "0.25" in str(lab.model_card("new"))
        (written,) = (json.loads(path.read_text()) for path in (tmp_path / "lab" / "runs").iterdir())
        assert (run.settings["learning_rate"], written["settings"]["learning_rate"]) == (0.25, 0.25)
        assert (written["steps"], written["total_steps"], written["settings"]["seed"]) == (2, 2, 3)
        config = PeftConfig.from_pretrained(str(tmp_path / "new"))
        assert (config.r, config.lora_alpha) == (4, 8)
        assert (config.rank_pattern, config.layers_to_transform) == ({"v_proj": 2}, [0])

    def test_a_config_in_hand_and_arguments_of_ones_own(self, lab: AdapterLab, tmp_path: Path) -> None:
        mine = LoraConfig(r=np.int64(4), target_modules=np.array(["q_proj", "v_proj"]), lora_alpha=np.float32(8))
        lab.add_adapter(mine, "new")
        lab.save_adapter("new", tmp_path / "new")
        assert isinstance(mine.r, np.int64)  # the caller's own is as it was
        assert PeftConfig.from_pretrained(str(tmp_path / "new")).r == 4
        args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, learning_rate=np.float32(0.25), report_to="none")
        assert training._settings(args)["learning_rate"] == 0.25
        json.dumps(training._settings(args))


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "given", "words"),
        [
            ("nobody", {}, r"No adapter named 'nobody'"),
            ("base", {}, r"The base is frozen in a lab"),
            ("nobody", {}, r"lab\.train\('nobody', dataset, method='lora'\)"),
            ("new", {**LORA, "lerning_rate": 1}, r"'lerning_rate' \(did you mean 'learning_rate'\?\)"),
            ("new", {"method": "lorra"}, r"'lorra' is no PEFT method"),
            ("new", {**LORA, "max_steps": 0}, r"max_steps=0 is no whole number"),
            ("new", {**LORA, "max_steps": -1}, r"max_steps=-1 leaves .* to num_train_epochs: give that too"),
            ("new", {**LORA, "num_train_epochs": 0}, r"num_train_epochs=0 is no number above 0"),
            ("new", {**LORA, "num_train_epochs": -2}, r"num_train_epochs=-2 is no number above 0"),
            ("new", {**LORA, "num_train_epochs": "3"}, r"num_train_epochs='3' is no number above 0"),
            ("new", {**LORA, "num_train_epochs": float("nan")}, r"num_train_epochs=nan is no number above 0"),
            ("new", {**LORA, "max_steps": 3, "num_train_epochs": float("inf")}, r"num_train_epochs=inf is no number"),
            ("new", {**LORA, "eval_dataset": BEYOND}, r"eval_dataset can't be used: row 2: token 320, .*320 rows"),
            ("new", {**LORA, "learning_rate": float("nan")}, r"learning_rate=nan"),
            ("new", {**LORA, "per_device_train_batch_size": 0}, r"per_device_train_batch_size=0"),
            ("new", {**LORA, "lr_scheduler_type": "zigzag"}, r"zigzag"),
            ("new", {**LORA, "eval_dataset": 1.5}, r"eval_dataset|held|share"),
            ("new", {**LORA, "eval_dataset": []}, r"eval_dataset"),
            ("new", {**ADALORA, "target_r": 6}, r"target_r=6 is not below init_r=6"),
            ("new", {**ADALORA, "max_steps": 2}, r"3 steps at least"),
            ("new", {**LORA, "target_modules": ["nothing"]}, r"can't be added"),
        ],
    )
    def test_said_and_nothing_changed(self, lab: AdapterLab, name: str, given: Any, words: str) -> None:
        with pytest.raises(AdapterLabError, match=words):
            lab.train(name, PAIRS, **given, **QUIET)
        assert list(lab.adapters) == []
        assert lab.trainable is None
        assert lab.selection.is_base
        assert not lab.running

    def test_data_that_will_not_do(self, lab: AdapterLab) -> None:
        for data in ([], [("only a prompt",)], [{"foo": "bar"}], ["word " * 5000], "no/such/file.jsonl", 7):
            with pytest.raises(AdapterLabError):
                lab.train("new", data, **LORA, **QUIET)
            assert list(lab.adapters) == []

    def test_tokens_that_the_base_lacks(self, lab: AdapterLab) -> None:
        labels = [{"input_ids": [1, 2], "labels": [1, token]} for token in (319, 320, -5)]
        with pytest.raises(
            AdapterLabError, match=r"row 2: token 320, where the base has 320 rows of the head.*row 3: token -5"
        ):
            lab.train("new", labels, **LORA, **QUIET)
        lab.train("new", labels[:1], max_steps=1, **LORA, **QUIET)
        lab.set_adapter(None)
        lab.tokenizer.add_tokens(["<ship>"])  # its id is 320
        with pytest.raises(
            AdapterLabError, match=r"rows 1 and 3: token 320.*resize_token_embeddings\(len\(tokenizer\)\)"
        ):
            lab.train("other", ["A <ship>", "A whale", "<ship>!"], **LORA, **QUIET)
        assert list(lab.adapters) == ["new"]

    def test_a_tokenizer_and_a_base_that_grew_together(self) -> None:
        tokenizer, model = tiny_tokenizer(), tiny_llama()
        tokenizer.add_tokens(["<ship>"])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        lab = AdapterLab(model, tokenizer=tokenizer)
        config = LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"])
        lab.train("new", ["A <ship>"], method=config, max_steps=1, **QUIET)
        assert (
            lab.train("new", ["A <ship>"], max_steps=1, **QUIET).steps == 1
        )  # its layers stand over the embeddings now

    def test_epochs_that_are_not_given(self, lab: AdapterLab) -> None:
        run = lab.train("new", PAIRS, max_steps=2, num_train_epochs=None, **LORA, **QUIET)
        assert (run.steps, run.total_steps) == (2, 2)
        run = lab.train("new", PAIRS, max_steps=-1, num_train_epochs=2, **QUIET)
        assert run.steps == 2  # six rows are one batch

    def test_another_adapter_of_that_name(self, lab: AdapterLab) -> None:
        lab.train("new", PAIRS, max_steps=1, **LORA, **QUIET)
        before = tensors(lab, "new")
        with pytest.raises(AdapterLabError, match=r"'new' is there already, and otherwise: r 4, not 8"):
            lab.train("new", PAIRS, **{**LORA, "r": 8}, **QUIET)
        with pytest.raises(AdapterLabError, match=r"otherwise: peft_type LORA, not IA3"):
            lab.train("new", PAIRS, method="ia3", **QUIET)
        assert same(before, tensors(lab, "new"))

    def test_arguments_twice(self, lab: AdapterLab, tmp_path: Path) -> None:
        args = TrainingArguments(str(tmp_path), use_cpu=True)
        with pytest.raises(AdapterLabError, match=r"'learning_rate' given beside args"):
            lab.trainer(_new(lab), PAIRS, args, learning_rate=1.0)

    def test_from_inside_a_comparison(self, lab: AdapterLab) -> None:
        _new(lab)
        said = []

        def train(event: Any) -> None:
            with pytest.raises(AdapterLabError) as caught:
                lab.train("new", PAIRS, max_steps=1, **QUIET)
            said.append(str(caught.value))

        lab.compare("Why?", max_new_tokens=1, on_token=train)
        assert "a comparison runs" in said[0] or "comparison is running" in said[0]

    def test_inside_using(self, lab: AdapterLab) -> None:
        _new(lab)
        with lab.using("new"), pytest.raises(AdapterLabError, match="can't change"):
            lab.train("new", PAIRS, **QUIET)

    def test_on_a_closed_lab(self, lab: AdapterLab, tmp_path: Path) -> None:
        trainer = lab.trainer(_new(lab), PAIRS, output_dir=str(tmp_path / "unused"), **QUIET)
        lab.close()
        with pytest.raises(AdapterLabError, match="closed"):
            lab.train("new", PAIRS)
        with pytest.raises(AdapterLabError, match="closed"):
            trainer.train()

    def test_a_trainer_whose_adapter_is_gone(self, lab: AdapterLab, tmp_path: Path) -> None:
        trainer = lab.trainer(_new(lab), PAIRS, output_dir=str(tmp_path / "unused"), **QUIET)
        lab.delete_adapter("new")
        with pytest.raises(AdapterLabError, match="No adapter named 'new'"):
            trainer.train()


class TestThreads:
    def test_a_cell_that_waits_is_told_for_what(self, lab: AdapterLab, capsys: pytest.CaptureFixture[str]) -> None:
        _new(lab)
        reached, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            reached.set()
            go_on.wait(60)

        thread = threading.Thread(target=lambda: lab.train("new", PAIRS, max_steps=3, callbacks=[At(2, hold)], **QUIET))
        thread.start()
        assert reached.wait(60)
        threading.Timer(0.2, go_on.set).start()
        comparison = lab.compare("Why?", ["new"], max_new_tokens=2)
        thread.join(60)
        assert "Waiting for the training of 'new' to end" in capsys.readouterr().out
        assert comparison["new"].active_adapters == ("new",)

    def test_a_comparison_waits_for_the_training(self, lab: AdapterLab) -> None:
        _new(lab)
        reached, results = threading.Event(), []

        def compare() -> None:
            reached.wait(60)
            results.append(lab.compare("Why?", ["new"], max_new_tokens=3))

        thread = threading.Thread(target=compare)
        thread.start()
        lab.train("new", PAIRS, max_steps=6, callbacks=[At(2, reached.set)], **QUIET)
        thread.join(60)
        again = lab.compare("Why?", ["new"], max_new_tokens=3)
        assert results[0]["new"].weights_digest == again["new"].weights_digest
