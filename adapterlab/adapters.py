"""The adapters of one lab and its state: load, add, select, blend, delete; what is true after each is in the table of
ARCHITECTURE.md. PEFT mixes selection, enabling and training; here they are apart, and imposed after every call."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.columns import BASE, Column, ColumnLike, check_name, make_safe_name
from adapterlab.errors import AdapterLabError
from adapterlab.guards import put_back
from adapterlab.notices import say, warn
from adapterlab.records import AdapterInfo, Record

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from adapterlab.hub import AdapterFiles
    from adapterlab.labfiles import SavedAdapter
    from adapterlab.mounts import Mounted, Site
    from adapterlab.preflight import Preflight


ACTS_NOW: Any = object()  # the column "what acts now", where None already means base


@dataclass(frozen=True)
class State:
    """The state at one moment: whoever does not hold the lock sees this one, and what fails goes back to it."""

    selection: Column
    enabled: bool
    trainable: str | None
    records: dict[str, Record]
    mounted: dict[str, Mounted]
    sites: dict[str, Site]


class Adapters:
    """Adapters hung on one bare model, with `selection`, `enabled` and `trainable` held apart from PEFT's own state.

    Not thread-safe: the lab holds the lock; who does not reads `seen()`. The base is frozen as long as it is here.
    """

    def __init__(self, model: PreTrainedModel, base_path: str, base_file: int | None = None) -> None:
        from adapterlab.fingerprints import base_digest
        from adapterlab.mounts import Mounts
        from adapterlab.quantization import packed_as, stay_whole

        self.model: Any = model
        self.base_path = base_path
        self.base_file = base_file  # bytes of the files that the base was read from, if known
        self.selection = Column()
        self.enabled = True
        self.trainable: str | None = None
        self._imposed: str | None = None  # whose gradients were last switched on: what drift is measured against
        self._depth = 0  # of nested `using` blocks: inside one, what is mounted is not the selection
        self._changing = False  # the state: what others see is still the old one
        self._only_seen = False  # this is a view, which leaves the model alone
        self.records: dict[str, Record] = {}
        self.trainers: weakref.WeakSet[Any] = weakref.WeakSet()  # those alive: their optimizers take memory
        self.base_bytes: dict[str, int] = {}  # by device, once memory.py has counted
        self._given = _remember(model)
        self.mounts = Mounts(model)
        brought = self.mounts.adopt()
        self.base: dict[str, Any] = dict(model.named_parameters())  # the bare base's own, whatever is mounted later
        self.tied, self.stay_whole = _tied(model), stay_whole(model)
        self.packed = [module for module in model.modules() if packed_as(module) is not None]
        for parameter in self.base.values():
            parameter.requires_grad_(False)
        self.base_reference = base_digest(model)
        for name, (config, state) in brought.items():
            self._take(config, self._adopted_name(name), state, source="came with the model")
        self._shown = self._state()

    # -- the state ---------------------------------------------------------------------------------------------

    @property
    def effective(self) -> Column:
        """What acts on the model's next forward: inside `using`, its column."""
        if self._depth:
            return self.mounts.column
        return self.selection if self.enabled else Column()

    def column(self, value: ColumnLike) -> Column:
        """`value` as a column of adapters that exist and can be combined so; `AdapterLabError` otherwise."""
        self.impose()  # what was deleted natively exists no more
        column = Column.of(value).check(self.records)
        if column.single is None and not column.is_base:
            self._check_blend(column)
        return column

    def columns(self, values: Any) -> list[Column]:
        """The columns of a comparison, checked: by default base and every adapter; a column given twice is refused."""
        self.impose()
        if values is ACTS_NOW:
            return [self.effective]
        if values is None:
            return [Column(), *(Column.of(name) for name in self.records)]
        if isinstance(values, (str, dict, Column)):
            raise AdapterLabError(f"columns is a list, one entry for each column: use columns=[{values!r}].")
        if not isinstance(values, Iterable):
            raise AdapterLabError(f"columns={values!r} is no list of columns: give one entry for each column.")
        columns = [self.column(value) for value in values]
        labels = [column.label for column in columns]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice or not columns:
            what = f"{', '.join(map(repr, twice))} stands twice" if twice else "there is no column"
            raise AdapterLabError(f"Nothing to compare so: {what} in columns={list(values)!r}.")
        return columns

    def _state(self) -> State:
        records, mounted, sites = dict(self.records), dict(self.mounts.adapters), dict(self.mounts.sites)
        return State(self.selection, self.enabled, self.trainable, records, mounted, sites)

    def seen(self) -> Adapters:
        """The same as others see it: between two changes of the state, whatever is at work now. Only to be looked at."""
        view = copy.copy(self)
        view.mounts = copy.copy(view.mounts)
        state = view._shown
        view.selection, view.enabled, view.trainable = state.selection, state.enabled, state.trainable
        view.records, view.mounts.adapters, view.mounts.sites = state.records, state.mounted, state.sites
        view._depth, view._only_seen = 0, True
        return view

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """What the block changes of the state is changed as a whole: after an exception the state is what it was, and
        nobody else sees one between."""
        if self._changing:
            yield
            return
        with put_back(self._settle):
            self._changing = True
            yield
            self._shown = self._state()  # the one step from the old state to the new one
            self._changing = False

    def _settle(self) -> None:
        """Go back to the state that others see, if a change of it was cut short."""
        if not self._changing:
            return
        if self.model is None:  # given back meanwhile
            self._changing = False
            return
        state = self._shown
        if self.mounts.drift():
            self.mounts.repair(Column())
        else:
            self.mounts.mount(Column())
        self.selection, self.enabled, self.trainable = state.selection, state.enabled, state.trainable
        self.records, self.mounts.adapters, self.mounts.sites = (
            dict(state.records), dict(state.mounted), dict(state.sites),
        )  # fmt: skip
        self.mounts.tidy()
        self.mounts.mount(self.effective)
        self._impose_gradients()
        self._changing = False

    def select(self, value: ColumnLike) -> None:
        column = self.column(value)
        with self.whole():
            self.selection = column
            if not column.is_base:
                self.enabled = True
            self.impose()

    def set_enabled(self, enabled: bool) -> None:
        with self.whole():
            self.enabled = enabled
            self.impose()

    def set_trainable(self, name: str | None) -> None:
        if name == BASE:
            raise AdapterLabError("The base is frozen in a lab: make an adapter trainable, or None for nothing.")
        wanted = None if name is None else self.known(name)
        with self.whole():
            self._make_trainable(wanted)
            self.impose()

    def _make_trainable(self, name: str | None) -> None:
        if self.trainable in self.records:
            self.refresh([self.trainable])  # what it learned until now is what it is
        if name is not None:
            self.mounts.release(name)  # an optimizer gets plain tensors
        self.trainable = name

    def known(self, name: Any) -> str:
        """`name`, if it is that of an adapter; `AdapterLabError` with those there are otherwise."""
        if not isinstance(name, str):
            raise AdapterLabError(f"{name!r} is no adapter's name: give one name, as text.")
        if name == BASE:
            raise AdapterLabError(
                "'base' is the model itself, no adapter: lab.merge_and_unload(None, folder) saves it."
            )
        self.impose()  # what was deleted natively exists no more
        Column.of(name).check(self.records)
        return name

    def check_idle(self) -> None:
        """Raise unless the state may change: not inside `using`, nor from a callback of a running comparison."""
        if self._depth:
            raise AdapterLabError(
                "Inside `with lab.using(…)`, and while a comparison runs, the lab's state can't change: do it before or after."
            )

    def impose(self) -> None:
        """Make the model be what the state says; undo, and tell, what somebody did to it behind the lab's back."""
        if self._depth or self._only_seen:
            return
        said = self.mounts.drift() + self._drifted_gradients()
        if said:
            with self.whole():
                self._forget(self.mounts.lost())
                self.mounts.repair(self.effective)
        if self.mounts.column != self.effective:
            self.mounts.mount(self.effective)
        self._impose_gradients()
        if said:
            warn("The model was changed behind the lab's back and is set right again: " + "; ".join(said[:3]) + ".")

    def _forget(self, names: list[str]) -> None:
        """Drop adapters that were deleted natively, and what the state says of them."""
        if any(name in self.mounts.column.names for name in names):
            self.mounts.mount(Column())
        for name in names:
            self.mounts.remove(name)
            del self.records[name]
            if name in self.selection.names:
                self.selection = Column()
            if self.trainable == name:
                self.trainable = None

    @contextlib.contextmanager
    def using(self, value: ColumnLike) -> Iterator[Any]:
        """The model with `value` acting, whatever the selection; the state found is restored, also after an exception."""
        column = self.column(value)
        self.impose()
        before, depth = self.mounts.column, self._depth

        def undo() -> None:
            self._depth = depth
            if self.model is None:
                return  # given back meanwhile: an opening that failed in here has closed the lab
            if self.mounts.drift():
                self.mounts.repair(before)
            else:
                self.mounts.mount(before)

        with put_back(undo):
            self._depth = depth + 1
            self.mounts.mount(column)
            yield self.model

    @contextlib.contextmanager
    def training(self, name: str) -> Iterator[Any]:
        """The model with `name` mounted and requiring gradients, in float32, base and other adapters frozen; afterwards
        all but its weights is as it was, and what it learned is what it is."""
        from adapterlab.sessions import float32, kept

        self.known(name)
        self.impose()
        before = self.trainable

        def undo() -> None:
            if self.model is not None:
                self._make_trainable(before)
                self._impose_gradients()

        with put_back(undo):
            self._make_trainable(name)
            mounted = self.mounts.adapters[name]
            with self.using(name) as model, kept(model), float32(mounted.layers.values(), mounted.trainable):
                self._impose_gradients()
                yield model
        self.impose()

    def _impose_gradients(self) -> None:
        for name, mounted in self.mounts.adapters.items():
            wanted = name == self.trainable
            for parameter in mounted.trainable:
                if parameter.requires_grad is not wanted:
                    parameter.requires_grad_(wanted)
        for parameter in self.base.values():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
        self._imposed = self.trainable

    def _drifted_gradients(self) -> list[str]:
        single = self.mounts.column.single
        if single is None:
            return []
        wanted = single == self._imposed
        flags = {p.requires_grad for p in self.mounts.adapters[single].trainable}
        if flags - {wanted}:
            return [f"{single!r} was made {'trainable' if not wanted else 'untrainable'}"]
        return []

    def _check_blend(self, column: Column) -> None:
        from adapterlab.equation import multiplier_advice, multiplier_obstacle

        for name, multiplier in column.parts:
            found = multiplier_obstacle(self.mounts.adapters[name].layers, name)
            if found is not None:
                what = f"{name!r} × {multiplier:g}" if len(column.parts) == 1 else f"A blend with {name!r}"
                raise AdapterLabError(f"{what} has no meaning: at {found[0]}, {multiplier_advice(found[1])}")

    # -- coming and going --------------------------------------------------------------------------------------

    def load(self, files: AdapterFiles, name: str | None, tokenizer: Any = None, *, select: bool = True) -> str:
        """Load a resolved adapter, select it, and give its name; all or nothing. tokenizer: the lab's."""
        from adapterlab.preflight import read_weights

        chosen = name if name is not None else self._default_name(files.default_name)
        self.check_new_name(chosen)
        config, flight = self.preflight(files, tokenizer)
        flight.raise_for_problems()
        assert config is not None  # it has no problems
        for note in flight.notes:
            say(f"{chosen}: {note}")
        weights = {
            key: tensor for key, tensor in read_weights(files.weights_file).items() if key not in flight.left_out
        }
        with self.whole():
            self._take(config, chosen, weights, files.source, files)
            if select:
                self.select(chosen)
        if name is None:
            say(f"Loaded {files.source!r} as {chosen!r}.")
        return chosen

    def restore(self, files: AdapterFiles, saved: SavedAdapter, tokenizer: Any = None) -> None:
        """Take in an adapter of a saved lab under its name, with what was known of it as long as its weights are the same."""
        from adapterlab.preflight import read_weights

        self.check_new_name(saved.name, saved=True)
        config, flight = self.preflight(files, tokenizer)
        flight.raise_for_problems()
        assert config is not None  # it has no problems
        found = read_weights(files.weights_file, finite=False)
        weights = {key: tensor for key, tensor in found.items() if key not in flight.left_out}
        with self.whole():
            self._take(config, saved.name, weights, saved.source, files)
            record = self.records[saved.name]
            if record.digest == saved.digest:
                record.initial, record.loaded, record.saved = saved.initial, saved.loaded, saved.saved
                record.noop = saved.noop

    def preflight(self, files: AdapterFiles, tokenizer: Any = None) -> tuple[PeftConfig | None, Preflight]:
        """The adapter's config, if it can be used, and the verdict on it; nothing is changed."""
        from adapterlab.checks import examine

        with self.using(None):
            return examine(self.model, files, self.base_path, tokenizer)

    def add(self, config_or_method: Any, name: str, **fields: Any) -> None:
        """Add a fresh adapter, select it and make it trainable; all or nothing. The config given is never changed."""
        from adapterlab.fingerprints import adapter_digest
        from adapterlab.methods import check_config, is_noop, make_config

        self.check_new_name(name)
        config = make_config(config_or_method, **fields)
        check_config(config, name, fresh=True)
        config.base_model_name_or_path = self.base_path
        size = self._check_size(config, name)
        self.impose()
        with self.whole():
            try:
                mounted = self.mounts.inject(config, name)
            except AdapterLabError:
                raise
            except Exception as error:  # PEFT's own verdict on target_modules, layers or values, in its words
                raise AdapterLabError(f"{name!r} can't be added: {self._pefts_words(error)}") from error
            self.mounts.add(name, mounted)
            digest = adapter_digest(mounted.layers, name)
            self.records[name] = Record(
                "added here", digest, is_noop(mounted, name), digest, initial=digest, file_bytes=size
            )
            self._make_trainable(name)
            self.select(name)

    def add_unselected(self, config_or_method: Any, name: str, seed: int, fields: dict[str, Any]) -> None:
        """Add a fresh adapter whose numbers are drawn from `seed`, and leave selection, enabled and trainable as they were."""
        from transformers import set_seed

        selection, enabled, trainable = self.selection, self.enabled, self.trainable
        set_seed(seed)
        with self.whole():
            self.add(config_or_method, name, **fields)
            self.selection, self.enabled = selection, enabled
            self._make_trainable(trainable)
            self.impose()

    def delete(self, name: str) -> int:
        """Delete the adapter and give the bytes that its tensors held. If it was in the selection, base acts next."""
        self.known(name)
        self.impose()
        held, selected = self.info(name).bytes, name in self.selection.names
        with self.whole():
            if selected:
                self.selection = Column()
            if self.trainable == name:
                self.trainable = None
            self.impose()
            self.mounts.remove(name)
            del self.records[name]
        if selected:
            say(f"{name!r} was selected: base is selected now.")
        return held

    def take_made(self, config: PeftConfig, name: str, state: dict[str, Any], source: str) -> None:
        """Take in an adapter that the lab made of others, and select it; on no disk yet, so *unsaved*."""
        with self.whole():
            self._take(config, name, state, source)
            self.records[name].loaded = None
            self.select(name)

    def note_saved(self, name: str, size: int | None = None) -> None:
        """Remember that the weights as they are now are on disk, in a file of `size` bytes."""
        record, digest = self.records[name], self.refresh([name])[name]
        known = {"saved": digest, "reference": digest}
        vars(record).update(known if size is None else {**known, "file_bytes": size})  # at once, for whoever looks

    def _take(
        self, config: PeftConfig, name: str, state: dict[str, Any], source: str, files: AdapterFiles | None = None
    ) -> None:
        """Inject with these weights and remember it as loaded; neither selects nor trains it."""
        from adapterlab.fingerprints import adapter_digest, file_digest
        from adapterlab.methods import check_config, is_noop
        from adapterlab.mounts import load_state
        from adapterlab.storage import file_bytes

        check_config(config, source)
        try:
            mounted = self.mounts.inject(config, name, lambda tuner: load_state(tuner, state, name))
        except AdapterLabError:
            raise
        except Exception as error:  # PEFT's and torch's loaders raise many types; the words are theirs
            raise AdapterLabError(f"{source!r} can't be loaded: {' '.join(str(error).split())}") from error
        for parameter in mounted.trainable:
            parameter.requires_grad_(False)
        self.mounts.add(name, mounted)
        digest = adapter_digest(mounted.layers, name)
        noop = is_noop(mounted, name, fresh=False)
        file = None if files is None else file_digest(files.weights_file)
        size = file_bytes(state) if files is None else files.weights_file.stat().st_size
        self.records[name] = Record(
            source, digest, noop, digest, loaded=digest, files=files, file=file, filed=digest, file_bytes=size
        )

    def _check_size(self, config: PeftConfig, name: str) -> int:
        """Refuse what would not fit into memory, and PEFT's objections, before a real tensor is made; gives the bytes of
        the adapter's file."""
        import psutil

        from adapterlab.preflight import expected_tensors
        from adapterlab.storage import file_bytes

        with self.using(None):
            try:
                tensors = expected_tensors(self.model, config, name)
            except Exception as error:  # PEFT's own verdict, in its words
                raise AdapterLabError(f"{name!r} can't be added: {self._pefts_words(error)}") from error
        wanted = sum(4 * tensor.numel() for tensor in tensors.values())
        free = psutil.virtual_memory().available
        if wanted > free:
            raise AdapterLabError(
                f"{name!r} would take {wanted / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: choose a smaller rank or "
                "fewer target_modules."
            )
        return file_bytes(tensors)

    def _pefts_words(self, error: BaseException) -> str:
        """PEFT's own verdict in one line; where it misses target modules, with those that this model has."""
        words = " ".join(str(error).split()) or type(error).__name__
        if "not found in the base model" in words:
            last = {
                key.rsplit(".", 1)[-1]
                for key in self.base
                if key.endswith(".weight")
                for key in [key[: -len(".weight")]]
            }
            words += f" This model has {', '.join(sorted(last))}."
        return words

    def check_new_name(self, name: str, *, saved: bool = False) -> None:
        """Raise `AdapterLabError` if no adapter can be called so. saved: one was, in a lab that is opened again."""
        words = {word for key, _ in self.model.named_modules() for word in key.split(".")}
        check_name(name, self.records, words | {"weight", "bias", "default_0"})
        if not saved and _is_torchs(name):  # LoRA can be `copy` or `get`, and was
            raise AdapterLabError(
                f"{name!r} is a word of torch's own, by which PEFT can't call an adapter. "
                f"{('my-' + name).replace('_', '-')!r} would do."
            )

    def _adopted_name(self, name: str) -> str:
        try:
            self.check_new_name(name)
        except AdapterLabError:
            chosen = self._free_name(make_safe_name(f"my-{name}"))
            say(f"The model's adapter {name!r} is called {chosen!r} here: the lab can't use that name.")
            return chosen
        return name

    def _default_name(self, wanted: str) -> str:
        return self._free_name(make_safe_name(f"my-{wanted}") if _is_torchs(wanted) else wanted)

    def _free_name(self, wanted: str) -> str:
        name, number = wanted, 2
        while name in self.records:
            name, number = f"{wanted}-{number}", number + 1
        return name

    # -- looking -----------------------------------------------------------------------------------------------

    def info(self, name: str) -> AdapterInfo:
        """What is known of one adapter; reads no weights: the status is the one last seen."""
        from adapterlab.equation import multiplier_obstacle
        from adapterlab.methods import rank_of
        from adapterlab.reading import adapter_tensors

        Column.of(name).check(self.records)
        mounted, record = self.mounts.adapters[name], self.records[name]
        tensors = [tensor for _, tensor in adapter_tensors(mounted.layers.values(), name)]
        trained = {p.data_ptr() for p in mounted.trainable if p.numel()}
        return AdapterInfo(
            name=name,
            method=str(getattr(mounted.config.peft_type, "value", mounted.config.peft_type)),
            r=rank_of(mounted.config),
            parameters=sum(t.numel() for t in tensors if t.data_ptr() in trained),
            bytes=sum(t.numel() * t.element_size() for t in tensors),
            target_modules=tuple(sorted({path.rsplit(".", 1)[-1] for path in mounted.layers})),
            source=record.source,
            status=record.status,
            peft_config=mounted.config,
            multiplier_obstacle=(multiplier_obstacle(mounted.layers, name) or ("", ""))[1],
            runs=tuple(record.runs),
        )

    def refresh(self, names: Any = None) -> dict[str, str]:
        """Read the adapters' weights and bring their digests and statuses up to date: name → digest.

        The trainable adapter is meant to change, by whatever trainer; what others hold is compared with their reference.
        """
        from adapterlab.methods import is_noop
        from adapterlab.reading import AdapterReader

        fresh = {}
        for name in self.records if names is None else names:
            mounted, record = self.mounts.adapters[name], self.records[name]
            if record.reader is None or record.reader.layers is not mounted.layers:
                record.reader = AdapterReader(mounted.layers, name)
            digest = record.reader.digest()
            if digest != record.digest:
                noop = is_noop(mounted, name, fresh=digest == record.initial)
                vars(record).update(digest=digest, noop=noop)  # one is never seen alone
            if name == self.trainable:
                record.reference = digest
            fresh[name] = digest
        return fresh

    def state(self, name: str) -> tuple[PeftConfig, dict[str, Any]]:
        """The adapter's config (a copy) and its tensors under the keys PEFT saves, not copied; the base stays out."""
        import copy

        from adapterlab.mounts import adapter_state

        with self.using(name) as model:
            state = adapter_state(model, name)
            return copy.deepcopy(model.peft_config[name]), {key: value.detach() for key, value in state.items()}

    def plain(self, name: str) -> tuple[PeftConfig, dict[str, Any]]:
        """Config and tensors for a second opinion: from the adapter's own file, as long as it is what was loaded."""
        from adapterlab.fingerprints import file_digest
        from adapterlab.preflight import read_config, read_weights

        record = self.records[name]
        files = record.files
        if files is not None and record.reference == record.filed and file_digest(files.weights_file) == record.file:
            return read_config(files.config, files.source), read_weights(files.weights_file, finite=False)
        return self.state(name)

    def release(self, mark: str) -> None:
        """Take everything out and give the model back as it came: bare, or with the adapters it came with. Nothing is here
        afterwards: a view of the lab, or an error that somebody still has, would keep the model in memory. mark: what the lab
        has written on it."""
        from adapterlab.mounts import Mounts

        if self.model is not None:
            self.mounts.leave()
            _restore(self.model, self._given, mark)
        nothing: Any = None
        self.model, self.mounts = nothing, Mounts(nothing)  # the model first: `seen` looks for it
        self.base, self.records, self._given, self.packed = {}, {}, {}, []
        self._shown = self._state()


def _is_torchs(name: str) -> bool:
    """Whether the dicts in which PEFT keeps adapters by name have an attribute of this name: `half`, `train`, `type`, …"""
    from torch import nn

    return any(hasattr(kind(), name) for kind in (nn.ModuleDict, nn.ParameterDict))


def _tied(model: Any) -> dict[str, list[str]]:
    """Modules that share their weight with others: path → paths of those."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    return {
        path: [other for other in paths if other != path] for paths in owners.values() for path in paths if paths[1:]
    }


def _remember(model: Any) -> dict[str, Any]:
    return {
        "children": {module: dict(module._modules) for module in model.modules()},
        "modes": {module: module.training for module in model.modules()},
        "flags": [(p, p.requires_grad) for p in model.parameters()],
        "peft_config": model.__dict__.get("peft_config"),
        "loaded": model.__dict__.get("_hf_peft_config_loaded"),
    }


@contextlib.contextmanager
def given_back(model: Any, mark: str, taken: Callable[[], bool]) -> Iterator[None]:
    """The block takes the model into a lab; if it is not `taken` in the end, it is given back as it came."""
    given = _remember(model)

    def undo() -> None:
        if not taken():
            _restore(model, given, mark)

    with put_back(undo):
        yield


def _restore(model: Any, given: dict[str, Any], mark: str) -> None:
    from adapterlab.mounts import follow_mode

    for module, children in given["children"].items():
        for key, child in children.items():
            there = module._modules.get(key)
            # a layer of an adapter that it came with, which `model.train()` has not reached meanwhile
            if there is not None and there is not child and there.training != given["modes"].get(there, there.training):
                follow_mode(child, there)
        module._modules.clear()
        module._modules.update(children)
    for parameter, flag in given["flags"]:
        parameter.requires_grad_(flag)
    model.__dict__.pop("peft_config", None)
    if given["peft_config"] is not None:
        model.peft_config = given["peft_config"]
    model.__dict__.pop("_hf_peft_config_loaded", None)
    if given["loaded"] is not None:
        model._hf_peft_config_loaded = given["loaded"]
    model.__dict__.pop(mark, None)
