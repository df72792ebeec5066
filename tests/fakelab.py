"""A lab without a model, for tests of what stands on it: the same calls, answers made up, tokens let out one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import SimpleNamespace
from typing import Any

import pandas as pd

from adapterlab.columns import BASE, Column
from adapterlab.comparison import Comparison, Generation, TokenEvent
from adapterlab.errors import AdapterLabError
from adapterlab.preflight import Preflight
from adapterlab.runs import TrainingRun, history_frame, ranks_frame

HOSTILE = '<img src=x onerror="window.hacked=1"></div><script>window.hacked=1</script>&amp;'

BASE_PARAMETERS = 134_515_008


class FakeLab:
    """Says `answers[label]` word by word. With `gate` set to a semaphore, each word waits for a permit.

    `calls` lists what was called, as (name, arguments). `fail_with` is raised by the next call that could fail.
    """

    def __init__(
        self, adapters: dict[str, tuple[str, int | None, int]] | None = None, name: str = "some/model"
    ) -> None:
        self.name = name
        self.tokenizer = FakeTokenizer()
        layers = {f"layers.{i}.{name}": (64, out) for i in range(3) for name, out in (("q_proj", 64), ("v_proj", 16))}
        modules = [(path, SimpleNamespace(in_features=n_in, out_features=out)) for path, (n_in, out) in layers.items()]
        self.model = SimpleNamespace(
            named_modules=lambda: modules,
            config=FakeConfig(),
            get_input_embeddings=lambda: None,
            get_output_embeddings=lambda: None,
        )
        self.adapters: dict[str, Any] = {}
        self.selection, self.enabled, self.closed = Column(), True, False
        self.trainable: str | None = None
        self.running, self.free = False, True
        self.history: list[Comparison] = []
        self._blends: tuple[Column, ...] = ()
        self.answers: dict[str, str] = {}
        self.calls: list[tuple[str, Any]] = []
        self.gate: threading.Semaphore | None = None
        self.flight = Preflight("someone/poet", "LORA", 60, 60, 460_800)
        self.obstacles: dict[str, dict[str, str]] = {}  # adapter → what can't be done with it → why
        self.fail_with: Exception | None = None
        self.said = threading.Event()
        self._stopped = threading.Event()
        self._callbacks: list[Callable[[str], None]] = []
        self._futures: list[Future[None]] = []
        for adapter_name, (method, r, parameters) in (adapters or {}).items():
            self._attach(adapter_name, method, r, parameters, "loaded")

    # What a lab says of itself.

    def status(self) -> str:
        if self.closed:
            return f"{self.name} · closed"
        acts = f"acting now: {self.selection.label}" if self.enabled else "adapters disabled"
        return f"{self.name} · 135 M · fp32 · 538 MB · cpu · {acts}"

    def _drawing(self, method: str, *arguments: str) -> Callable[[], Any]:
        return lambda: getattr(self, method)(*arguments)

    def parameters(self) -> pd.DataFrame:
        owners = [(BASE, BASE_PARAMETERS), *((name, info.parameters) for name, info in self.adapters.items())]
        rows = [{"owner": o, "parameters": n, "bytes": 4 * n, "share_of_base": n / BASE_PARAMETERS} for o, n in owners]
        return pd.DataFrame(rows)

    def capabilities(self) -> pd.DataFrame:
        rows = []
        for name, info in self.adapters.items():
            reasons = {"blend": info.multiplier_obstacle, **self.obstacles.get(name, {})}
            reasons.setdefault("ranks", "" if info.method == "ADALORA" else "It has none.")
            for capability in ("batch", "blend", "train", "save", "ranks"):
                why = reasons.get(capability, "")
                rows.append({"adapter": name, "capability": capability, "possible": not why, "reason": why})
        return pd.DataFrame(rows, columns=["adapter", "capability", "possible", "reason"])

    @property
    def last(self) -> Comparison:
        return self.history[-1]

    def on_change(self, callback: Callable[[str], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    @property
    def listeners(self) -> int:
        return len(self._callbacks)

    def track(self, future: Future[None]) -> None:
        self._futures.append(future)

    def wait(self) -> None:
        done = wait(self._futures, timeout=20)
        assert not done.not_done, "a job of the panel did not end"
        for future in self._futures:
            future.result()

    # What changes it.

    def set_adapter(self, column: Any) -> None:
        self._called("set_adapter", column)
        self.selection = Column.of(column).check(self.adapters)
        self._emit("state")

    def enable_adapters(self) -> None:
        self._called("enable_adapters")
        self.enabled = True
        self._emit("state")

    def disable_adapters(self) -> None:
        self._called("disable_adapters")
        self.enabled = False
        self._emit("state")

    def set_trainable(self, name: str | None) -> None:
        self._called("set_trainable", name)
        self.trainable = name
        self._emit("state")

    def load_adapter(self, source: str, adapter_name: str | None = None, *, select: bool = True) -> str:
        self._called("load_adapter", source, adapter_name)
        name = adapter_name or source.rsplit("/", 1)[-1]
        self._attach(name, "LORA", 8, 460_800, "loaded")
        if select:
            self.selection, self.enabled = Column.of(name), True
        self._emit("adapters")
        return name

    def add_adapter(self, method: str, adapter_name: str = "default", **config: Any) -> None:
        self._called("add_adapter", method, adapter_name, config)
        self._attach(adapter_name, method.upper(), config.get("r"), 1000, "untrained")
        self.selection = Column.of(adapter_name)
        self._emit("adapters")

    @property
    def blends(self) -> tuple[Column, ...]:
        return tuple(blend for blend in self._blends if all(name in self.adapters for name in blend.names))

    @blends.setter
    def blends(self, columns: list[Column]) -> None:
        self._blends = tuple(columns)
        self._emit("blends")

    def save(self, folder: str) -> None:
        self._called("save", folder)

    def delete_adapter(self, name: str) -> None:
        self._called("delete_adapter", name)
        del self.adapters[name]
        if name in self.selection.names:
            self.selection = Column()
        self._emit("adapters")

    def save_adapter(self, name: str, folder: str) -> None:
        self._called("save_adapter", name, folder)
        self.adapters[name].status = "trained here"
        self._emit("adapters")

    def check_adapter(self, source: str) -> Preflight:
        self._called("check_adapter", source)
        return self.flight

    def find_adapters(self) -> pd.DataFrame:
        self._called("find_adapters")
        return pd.DataFrame({"repo_id": ["someone/poet", HOSTILE], "downloads": [12345, 1]})

    def stop(self) -> None:
        self._stopped.set()
        if self.gate:
            self.gate.release()

    def close(self) -> None:
        self.closed = True
        self._emit("closed")

    def compare(self, prompt: str, columns: Any = None, *, on_token: Any = None, **settings: Any) -> Comparison:
        self._stopped.clear()
        columns = [None, *self.adapters] if columns is None else columns
        self._called("compare", prompt, [Column.of(column).label for column in columns], settings)
        self.set_running(True)
        generations = [self._say(str(prompt), Column.of(column), on_token) for column in columns]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        comparison = Comparison(
            prompts=[text],
            rendered=[text],
            prompt_ids=[(1, 2)],
            settings=settings,
            model={"name": self.name},
            generations=generations,
        )
        self.set_running(False)
        comparison._score = lambda c: [tuple(-2.0 * i for i in range(g.new_tokens)) for g in c.generations]
        self.history.append(comparison)
        self._emit("history")
        return comparison

    def train(
        self,
        adapter_name: str,
        dataset: Any,
        *,
        method: str | None = None,
        callbacks: Any = (),
        disable_tqdm: bool = False,
        **settings: Any,
    ) -> TrainingRun:
        """Step k has the loss 4 / k, and step 2 a held-out loss of 3 where something is held out. With `gate` each step
        waits for a permit; `fail_with` set meanwhile is raised by the next step. AdaLoRA loses a rank of each of three
        layers with each step."""
        self._stopped.clear()
        self._called("train", adapter_name, dataset, {**({} if method is None else {"method": method}), **settings})
        self.set_running(True)
        try:
            log = self._learn(settings, list(callbacks))
        finally:
            self.set_running(False)
        if adapter_name not in self.adapters:
            rank = settings.get("init_r", settings.get("r"))
            self._attach(adapter_name, str(method).upper(), rank, 1000, "unsaved")
        self._emit("adapters")
        steps = max([entry["step"] for entry in log], default=0)
        return TrainingRun(
            adapter_name=adapter_name,
            method=str(method),
            history=history_frame(log),
            ranks=ranks_frame([], []),
            steps=steps,
            total_steps=settings["max_steps"],
            seconds=2.0 * steps,
            stopped_early=steps < settings["max_steps"],
        )

    def _learn(self, settings: dict[str, Any], callbacks: list[Any]) -> list[dict[str, Any]]:
        state = SimpleNamespace(global_step=0, max_steps=settings["max_steps"])
        control = SimpleNamespace(should_log=True)
        allocations = [callback for callback in callbacks if hasattr(callback, "allocator")]
        watchers = [callback for callback in callbacks if callback not in allocations]
        rank = settings.get("init_r", 0)
        config = SimpleNamespace(
            peft_config=dict.fromkeys([c.adapter_name for c in allocations], SimpleNamespace(init_r=rank))
        )
        paths = [f"layers.{layer}.q_proj" for layer in range(3)]

        def tell(event: str, **more: Any) -> None:
            for allocation in allocations:
                ranks = [max(rank - state.global_step, 1)] * len(paths)
                allocation.allocator = SimpleNamespace(ranks=ranks, paths=paths)
            for watcher in watchers:
                getattr(watcher, event)(None, state, control, **more)

        log: list[dict[str, Any]] = []
        tell("on_train_begin", model=config)
        while state.global_step < state.max_steps and not self._stopped.is_set():
            if self.gate:
                assert self.gate.acquire(timeout=20), "no permit for the next step"
            if self.fail_with is not None:
                error, self.fail_with = self.fail_with, None
                raise error
            state.global_step += 1
            tell("on_step_end")
            losses = [{"loss": 4 / state.global_step}]
            if settings.get("eval_dataset") and state.global_step == 2:
                tell("on_prediction_step")
                losses.append({"eval_loss": 3.0})
            for loss in losses:
                tell("on_log", logs=loss)
                log.append({"step": state.global_step, **loss})
            self.said.set()
        return log

    def is_free(self) -> bool:
        return self.free

    def verify(self, comparison: Comparison) -> pd.DataFrame:
        self._called("verify", comparison)
        agreeing = {"weights_agree": True, "active_agree": True, "tokens_agree": True, "logprob_error": 2e-6}
        return pd.DataFrame(
            {"prompt": g.prompt, "column": g.column, **agreeing, "agrees": True, "note": ""}
            for g in comparison.generations
        )

    def set_running(self, running: bool) -> None:
        self.running = running
        self._emit("running")

    def _say(self, prompt: str, column: Column, on_token: Any) -> Generation:
        words = self.answers.get(column.label, f"I am {column.label} .").split(" ")
        said: list[str] = []
        for position, word in enumerate(words):
            if self.gate:
                assert self.gate.acquire(timeout=20), "no permit for the next token"
            reason = "stopped" if self._stopped.is_set() else "eos" if position == len(words) - 1 else None
            text = word if position == 0 else f" {word}"
            said.append(text)
            on_token(TokenEvent(0, column.label, position, position, text, reason))
            self.said.set()
            if reason:
                break
        count = len(said)
        return Generation(
            column=column.label,
            asked=column.parts,
            prompt_index=0,
            prompt=prompt,
            text="".join(said),
            token_ids=tuple(range(count)),
            tokens=tuple(said),
            logprobs=(0.0,) * count,
            leads=(0.0,) * count,
            finish_reason=reason or "eos",
            seconds=count / 20,
            active_adapters=column.names,
            multipliers=tuple(m for _, m in column.parts),
            logit_shift=0.0 if column.is_base else 4.25,
            weights_digest=("ab" if column.is_base else "cd") * 16,
        )

    def _attach(self, name: str, method: str, r: int | None, parameters: int, status: str) -> None:
        self.adapters[name] = SimpleNamespace(
            name=name,
            method=method,
            r=r,
            parameters=parameters,
            bytes=4 * parameters,
            status=status,
            multiplier_obstacle="",
        )

    def _called(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, arguments))
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error

    def _emit(self, kind: str) -> None:
        for callback in list(self._callbacks):
            callback(kind)


class FakeTokenizer:
    """A word, a token: enough to count what is given to learn."""

    chat_template = None
    eos_token_id = None

    def __call__(self, texts: list[str] | str, **options: Any) -> dict[str, Any]:
        ids = [[len(word) for word in text.split()] for text in ([texts] if isinstance(texts, str) else texts)]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}


class FakeConfig:
    model_type = "fake"
    model_type = "llama"
    is_encoder_decoder = False
    max_position_embeddings = 100

    def get_text_config(self) -> FakeConfig:
        return self


def refuse(text: str) -> AdapterLabError:
    return AdapterLabError(text)
