"""An exception at every point at which the lab calls what a user handed over: the lab is as before, and works."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from standins import tiny_llama, tiny_tokenizer
from tiny_adapters import logits_of
from transformers import TrainerCallback

from adapterlab import AdaLoraCallback, AdapterLab, AdapterLabError, scoring
from adapterlab.widgets.pictures import picture_html
from adapterlab.widgets.state import View

TEXTS = ["The moon is round.", "One adapter learns.", "The sea and the ship."]
STEPS = 3
HOOKS = [
    "on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step",
    "on_optimizer_step", "on_step_end", "on_log", "on_prediction_step", "on_evaluate", "on_save", "on_epoch_end",
    "on_train_end",
]  # fmt: skip


class Odd(BaseException):
    """No `Exception`, and none that Python knows."""


ERRORS = [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit, Odd]


@pytest.fixture
def lab(adapter_folders: dict[str, Any]) -> Iterator[AdapterLab]:
    lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
    for name in ("pirate", "poet"):
        lab.load_adapter(adapter_folders[name], name)
    lab.set_trainable("poet")
    lab.model.train()
    yield lab
    lab.close()


def tensors(lab: AdapterLab, name: str) -> list[torch.Tensor]:
    return [p.detach().clone() for p in lab._adapters.mounts.adapters[name].trainable]


def alike(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def told(lab: AdapterLab, ids: torch.Tensor) -> Any:
    model = lab.model
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    kept = lab.selection, lab.enabled, lab.trainable, sorted(lab.adapters), model.config.use_cache, lab.running
    return kept, modes, hooks, flags, id(model.generation_config), logits_of(lab, ids).tolist()


def goes_on(lab: AdapterLab) -> None:
    comparison = lab.compare("And then", max_new_tokens=2)
    assert lab.verify(comparison)["agrees"].all()
    answers: list[bool] = []
    other = threading.Thread(target=lambda: answers.append(lab.is_free()))
    other.start()
    other.join(30)
    assert answers == [True]


class Recorder(TrainerCallback):
    """The adapter's weights before the first step and after each."""

    def __init__(self, lab: AdapterLab, name: str) -> None:
        self.lab, self.name = lab, name
        self.after = [tensors(lab, name)] if name in lab.adapters else []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(tensors(self.lab, self.name))


def failing(hook: str, error: type[BaseException], at: int) -> tuple[TrainerCallback, list[int]]:
    """A callback that raises at the so-manieth call of `hook`, and how often it was called."""
    calls: list[int] = []

    def called(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        calls.append(state.global_step)
        if len(calls) == at:
            raise error("by a callback of the user's")

    return type("Failing", (TrainerCallback,), {hook: called})(), calls


def arguments(tmp_path: Any) -> dict[str, Any]:
    return {
        "max_steps": STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "eval_dataset": TEXTS[:1],
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "output_dir": str(tmp_path), "disable_tqdm": True,
        "logging_steps": 1, "seed": 3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def known(adapter_folders: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[list[torch.Tensor]]:
    """The weights after 0, 1, … steps, of a lab of its own."""
    other = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
    other.load_adapter(adapter_folders["pirate"], "pirate")
    recorder = Recorder(other, "pirate")
    other.train("pirate", TEXTS, callbacks=[recorder], **arguments(tmp_path_factory.mktemp("known")))
    other.close()
    assert len(recorder.after) == 1 + STEPS
    return recorder.after


@pytest.mark.parametrize("hook", HOOKS)
def test_a_callback_of_the_trainer_fails(
    hook: str,
    lab: AdapterLab,
    adapter_folders: dict[str, Any],
    known: list[list[torch.Tensor]],
    ids: torch.Tensor,
    tmp_path: Any,
    long: bool,
) -> None:
    """All steps that are in the weights are in a run, and no half of one."""
    before = told(lab, ids)
    first = HOOKS.index(hook)
    for error in ERRORS if long else [ERRORS[first % 5]]:
        lab.delete_adapter("pirate")
        lab.load_adapter(adapter_folders["pirate"], "pirate", select=False)
        lab.set_adapter("poet")
        at = 2 if hook not in ("on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin") else 1
        callback, calls = failing(hook, error, at)
        with contextlib.suppress(error):  # Ctrl-C after a step is no error
            lab.train("pirate", TEXTS, callbacks=[callback], **arguments(tmp_path / error.__name__))
        assert len(calls) >= at, "it was never called"
        runs = lab.adapters["pirate"].runs
        steps = runs[0].steps if runs else 0
        assert alike(tensors(lab, "pirate"), known[steps]), f"{error.__name__} after {steps} steps"
        assert steps <= STEPS
        goes_on(lab)
    assert told(lab, ids)[0][2:] == before[0][2:]
    assert told(lab, ids)[1] == before[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_between_a_step_and_its_count_takes_the_step_back(
    error: type[BaseException], lab: AdapterLab
) -> None:
    """It used to leave the first step in an existing adapter, of which no run told."""
    before, callback = tensors(lab, "pirate"), failing("on_optimizer_step", error, 1)[0]
    with pytest.raises(error):
        lab.train("pirate", TEXTS, max_steps=2, callbacks=[callback], disable_tqdm=True)
    assert alike(tensors(lab, "pirate"), before)
    assert lab.adapters["pirate"].runs == ()
    assert lab.adapters["pirate"].status == "loaded"


def test_half_a_step_of_adalora_is_taken_back_with_its_ranks(lab: AdapterLab) -> None:
    config = {"method": "adalora", "init_r": 3, "target_r": 1, "target_modules": ["q_proj"], "learning_rate": 0.05}
    callback, calls = failing("on_optimizer_step", RuntimeError, 8)
    recorder = Recorder(lab, "ada")
    callbacks = [AdaLoraCallback("ada"), callback, recorder]  # so that the step's ranks are allocated by then
    with pytest.raises(RuntimeError):
        lab.train("ada", TEXTS, max_steps=10, callbacks=callbacks, disable_tqdm=True, **config)
    run = lab.adapters["ada"].runs[0]
    assert (run.steps, run.total_steps) == (calls[-1], 10) == (7, 10)
    assert len(recorder.after) == 7
    assert alike(tensors(lab, "ada"), recorder.after[-1])
    assert run.ranks["step"].max() <= 7
    last = run.ranks[run.ranks["step"] == run.ranks["step"].max()]
    assert list(lab.ranks("ada")["rank"]) == list(last["rank"])


def test_a_new_adapter_that_failed_before_its_first_step_is_gone(lab: AdapterLab, ids: torch.Tensor) -> None:
    before = told(lab, ids)
    for hook, error in (("on_train_begin", KeyboardInterrupt), ("on_optimizer_step", RuntimeError)):
        with pytest.raises(error):
            lab.train("new", TEXTS, method="lora", max_steps=2, callbacks=[failing(hook, error, 1)[0]])
        assert told(lab, ids) == before
    goes_on(lab)


WHERE = ["data_collator", "compute_loss_func", "dataset", "forward hook"]


@pytest.mark.parametrize("where", WHERE)
def test_what_a_training_is_given_fails(where: str, lab: AdapterLab, ids: torch.Tensor, long: bool) -> None:
    before, weights = told(lab, ids), tensors(lab, "pirate")
    for error in ERRORS if long else [ERRORS[WHERE.index(where)], Odd]:

        def fail(*arguments: Any, error: type[BaseException] = error, **keywords: Any) -> Any:
            raise error("by the user's own")

        class Rows:
            def __len__(self) -> int:
                return 2

            def __getitem__(self, place: int, fail: Callable[..., Any] = fail) -> str:
                return TEXTS[place] if place == 0 else fail()

        keywords: dict[str, Any] = {where: fail} if where in ("data_collator", "compute_loss_func") else {}
        handle = lab.model.lm_head.register_forward_hook(fail) if where == "forward hook" else None
        data: Any = Rows() if where == "dataset" else TEXTS
        with pytest.raises(error):
            lab.train("pirate", data, max_steps=2, disable_tqdm=True, **keywords)
        if handle is not None:
            handle.remove()
        assert told(lab, ids) == before
        assert alike(tensors(lab, "pirate"), weights)
    goes_on(lab)


@pytest.mark.parametrize("call", ["compare", "generate", "cached", "hook"])
def test_what_a_comparison_calls_fails(call: str, lab: AdapterLab, ids: torch.Tensor) -> None:
    lab.compare("Hello", max_new_tokens=3)
    before, history = told(lab, ids), len(lab.history)
    for error in ERRORS:

        def fail(*arguments: Any, error: type[BaseException] = error) -> Any:
            raise error("by the user's own")

        handle = lab.model.lm_head.register_forward_hook(fail) if call == "hook" else None
        run = lab.generate if call == "generate" else lab.compare
        keywords: dict[str, Any] = {} if call == "hook" else {"on_token": fail}
        with pytest.raises(error):
            run("Hello" if call == "cached" else "Another", max_new_tokens=3, **keywords)
        if handle is not None:
            handle.remove()
        assert told(lab, ids) == before
        assert len(lab.history) == history
    goes_on(lab)


def test_a_body_of_using_fails(lab: AdapterLab, ids: torch.Tensor) -> None:
    before = told(lab, ids)
    for error in ERRORS:
        with pytest.raises(error), lab.using("pirate"), lab.using({"poet": 0.5}), lab.using(None):
            raise error
        assert told(lab, ids) == before
    goes_on(lab)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Odd])
def test_a_listener_that_is_cut_short_keeps_nothing_from_the_others(
    error: type[BaseException], lab: AdapterLab
) -> None:
    """It used to leave the lab "running" for ever, and panels that came after it out of step."""
    heard: list[str] = []

    def cut(kind: str) -> None:
        if kind in wanted:
            wanted.remove(kind)
            raise error

    wanted = ["running"]
    lab.on_change(cut)
    lab.on_change(heard.append)
    with pytest.raises(error):
        lab.compare("Hello", max_new_tokens=1)
    assert heard == ["running", "running"]
    assert not lab.running
    wanted[:] = ["adapters"]
    with pytest.raises(error):
        lab.delete_adapter("pirate")
    assert list(lab.adapters) == ["poet"], "it was told when it was done"
    goes_on(lab)


def test_a_listener_that_is_cut_short_when_the_lab_closes(adapter_folders: dict[str, Any]) -> None:
    model = tiny_llama()
    lab = AdapterLab(model, tokenizer=tiny_tokenizer())
    lab.load_adapter(adapter_folders["pirate"], "pirate")

    def cut(kind: str) -> None:
        raise KeyboardInterrupt

    lab.on_change(cut)
    with pytest.raises(KeyboardInterrupt):
        lab.close()
    assert "closed" in repr(lab)
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())
    lab.close()


@pytest.mark.parametrize("name", ["stopping_criteria", "logits_processor"])
def test_what_can_not_be_handed_to_a_comparison_is_refused(name: str, lab: AdapterLab) -> None:
    with pytest.raises(AdapterLabError, match=name):
        lab.compare("Hello", max_new_tokens=1, **{name: [lambda ids, scores: scores]})
    goes_on(lab)


# ----- Stop -----


def test_a_stop_that_came_when_nothing_ran_cuts_nothing(lab: AdapterLab) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: lab.compare("Hello", ["poet"], max_new_tokens=3)["poet"].new_tokens,
        lambda: lab.generate("Well", max_new_tokens=3).new_tokens,
        lambda: lab.train("pirate", TEXTS, max_steps=3, disable_tqdm=True).steps,
        lambda: len(lab.evaluate(TEXTS)),
        lambda: lab.divergence("The sea")["column"].nunique() + 1,
    ]
    for call in calls:
        lab.stop()
        assert call() == 3


@pytest.mark.parametrize("call", ["divergence", "evaluate", "own answers"])
def test_stop_ends_a_reading(call: str, lab: AdapterLab, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to go on to the end. What was read so far would look like the whole."""
    monkeypatch.setattr(scoring, "_PIECE_TOKENS", 24)
    said = lab.compare("Hello", max_new_tokens=2)
    before, passes = told(lab, ids), 0

    def stop(*arguments: Any) -> None:
        nonlocal passes
        passes += 1
        lab.stop()

    handle = lab.model.lm_head.register_forward_hook(stop)
    reading: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: lab.evaluate(TEXTS * 5),
        "divergence": lambda: lab.divergence("The sea and the moon. " * 5, ["pirate", "poet"]),
        "own answers": lambda: lab.divergence(said),
    }
    with pytest.raises(AdapterLabError, match="Stopped before all was read"):
        reading[call]()
    assert passes == 1
    handle.remove()
    assert told(lab, ids) == before
    goes_on(lab)


def test_stop_in_a_reading_within_a_training_ends_the_training_well(lab: AdapterLab) -> None:
    class Evaluating(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                lab.stop()
                lab.evaluate(TEXTS)

    run = lab.train("pirate", TEXTS, max_steps=5, callbacks=[Evaluating()], disable_tqdm=True)
    assert (run.steps, run.stopped_early, run.error) == (2, True, "")
    goes_on(lab)


def test_a_picture_does_not_hold_matplotlib_while_it_waits_for_the_lab(lab: AdapterLab) -> None:
    """A panel's picture took matplotlib's settings and then waited; who worked with the lab and drew waited for ever."""
    from adapterlab.plots import draw_svg, plot_parameters

    frame = lab.parameters()
    draw_svg(lambda: plot_parameters(frame), "")  # matplotlib looks for its fonts the first time
    waiting, drawn = threading.Event(), []

    def look() -> None:
        waiting.set()
        drawn.append(picture_html(lab, View("Weights", "pirate", "")))

    other = threading.Thread(target=look, daemon=True)
    with lab.using(None):
        turn = lab._turn
        lab._turn = lambda: (asked.set(), turn())[1]  # type: ignore[method-assign]
        asked = threading.Event()
        other.start()
        assert waiting.wait(30)
        assert asked.wait(30), "it never came to the lab"
        mine: list[str] = []
        drawing = threading.Thread(
            target=lambda: mine.append(draw_svg(lambda: plot_parameters(frame), "")), daemon=True
        )
        drawing.start()
        drawing.join(60)
        assert mine, "matplotlib is held by who waits for the lab"
    other.join(30)
    assert drawn[0].startswith("<svg")
