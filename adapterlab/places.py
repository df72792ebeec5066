"""Where a model or an adapter is: a folder or a Hub repository, what is in it, and why it can't be had."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from adapterlab.errors import AdapterLabError
from adapterlab.notices import say

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
_MODEL_WEIGHTS = re.compile(r"(model|pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?")
_SNAPSHOT = re.compile(r"models--(.+?)[/\\]snapshots[/\\][^/\\]+[/\\]?$")


@dataclass(frozen=True)
class Place:
    """A folder, or a repository of the Hub at one revision, that exists.

    `names` are the files directly in it (in its `subfolder`, which only a repository has), `below` the
    folders in it that hold an adapter. `local_files_only` is true as well when the Hub could not be reached:
    `offline` says why.
    """

    typed: str
    folder: Path | None
    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False
    offline: str = ""
    names: frozenset[str] = frozenset()
    below: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """What `from_pretrained` takes, and what a saved adapter names: an absolute path or a Hub id."""
        return self.typed if self.folder is None else str(self.folder)

    @property
    def title(self) -> str:
        """What to call it: the Hub id, or the folder's own name."""
        return portable_name(self.target) if self.folder is None else _folder_title(self.folder)

    @property
    def source(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        subfolder = f"/{self.subfolder}" if self.subfolder else ""
        return f"{self.typed.rstrip('/') or self.typed}{subfolder}{revision}"

    @property
    def has_model_weights(self) -> bool:
        return any(_MODEL_WEIGHTS.fullmatch(name) for name in self.names)

    @property
    def is_model(self) -> bool:
        """A config with weights; where there is no adapter, a config (the loader says what lacks)."""
        return MODEL_CONFIG in self.names and (self.has_model_weights or not self.is_adapter)

    @property
    def is_adapter(self) -> bool:
        return ADAPTER_CONFIG in self.names

    def fetch(self, name: str) -> Path:
        """The local path of one of `names`, downloaded if need be."""
        if self.folder is not None:
            return self.folder / name
        from huggingface_hub import hf_hub_download

        with explained(self):
            path = hf_hub_download(
                self.typed,
                name,
                subfolder=self.subfolder or None,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
            )
        return Path(path)

    def weights_bytes(self) -> int | None:
        """Bytes of the files that hold a model's weights, of the format that `from_pretrained` reads; downloads nothing, and
        gives None where they are not all here."""
        local = replace(self, local_files_only=True)
        for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
            names = {f"{stem}.{ending}"} & self.names
            try:
                if not names and f"{stem}.{ending}.index.json" in self.names:
                    index = json.loads(local.fetch(f"{stem}.{ending}.index.json").read_text(encoding="utf-8"))
                    names = set(index["weight_map"].values())
                if names:
                    return sum(local.fetch(name).stat().st_size for name in names)
            except (AdapterLabError, OSError, ValueError, KeyError, TypeError, AttributeError):
                return None  # somebody took a file away meanwhile, or the index is none: not known
        return None

    def holds(self) -> str:
        """What there is, in words, for an error message; with the subfolders that would do."""
        if not self.names and not self.below:
            return "It is empty."
        shown = sorted(self.names)[:12]
        more = f" and {len(self.names) - len(shown)} more" if len(self.names) > len(shown) else ""
        files = f"It holds: {', '.join(shown)}{more}." if shown else "It holds no files of its own."
        hint = f" There is an adapter in it: pass subfolder={self.below[0]!r}." if len(self.below) == 1 else ""
        if len(self.below) > 1:
            hint = f" There are adapters in it: pass subfolder= one of {', '.join(map(repr, self.below))}."
        return files + hint


def locate(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    tell: bool = True,
) -> Place:
    """Find a folder or a Hub repository. An existing folder wins over a Hub id of the same name.

    If the Hub can't be reached, the local cache answers, and says so (unless `tell` is False).
    Raises `AdapterLabError` if there is nothing of this name, or no such revision or subfolder.
    """
    if not isinstance(model, (str, os.PathLike)) or not isinstance(subfolder, (str, type(None))):
        wrong = subfolder if isinstance(model, (str, os.PathLike)) else model
        raise AdapterLabError(f"{wrong!r} names no folder and no Hub id: give text, or a path.")
    try:
        typed, path = os.fspath(model), Path(os.fspath(model)).expanduser()
    except RuntimeError as error:
        raise AdapterLabError(f"{str(model)!r} can't be read as a path: {error}") from error
    if not typed.strip():
        raise AdapterLabError("The name of the model is empty: give a Hub id such as 'facebook/opt-350m', or a folder.")
    if is_folder(path):
        if revision is not None:
            raise AdapterLabError(
                f"{typed} is a local folder, and revision={revision!r} belongs to the Hub: leave it out."
            )
        return _local_place(typed, path.resolve(), subfolder or "")
    if is_file(path):
        raise AdapterLabError(f"{typed} is a file: give the folder it is in, {str(path.parent)!r}.")
    if url := re.match(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", typed):
        raise AdapterLabError(f"{typed} is an address: give the Hub id alone, {url[1]!r}.")
    if not isinstance(model, str) or _looks_like_path(typed):
        raise AdapterLabError(f"There is no folder {typed} (looked for {path.absolute()}): check the path.")
    asked = Place(
        typed=typed,
        folder=None,
        revision=revision,
        subfolder=(subfolder or "").strip("/"),
        token=token,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        local_files_only=local_files_only,
    )
    return _hub_place(asked, tell)


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name; also for names that none can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long for this system, or with a NUL in it
        return False


def is_file(path: Path) -> bool:
    """Whether there is an ordinary file of this name; also for names that none can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def portable_name(name_or_path: str) -> str:
    """A name that holds on other machines too, if there is one: the Hub id behind a path into its cache."""
    snapshot = _SNAPSHOT.search(name_or_path)
    return snapshot[1].replace("--", "/") if snapshot else name_or_path


@contextlib.contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turn what huggingface_hub and transformers raise in the block into an `AdapterLabError` on `place`."""
    try:
        yield
    except AdapterLabError:
        raise
    except Exception as error:
        raise AdapterLabError(_explanation(error, place)) from error


def _folder_title(folder: Path) -> str:
    hub_id = portable_name(str(folder))
    return hub_id if hub_id != str(folder) else folder.name or str(folder)


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith(("/", ".", "~"))
        or text.endswith("/")
        or "\\" in text
        or text.count("/") > 1
        or bool(re.match(r"[A-Za-z]:", text))
    )


def _local_place(typed: str, folder: Path, subfolder: str) -> Place:
    names, below = _list_folder(folder)
    whole = Place(typed=typed, folder=folder, names=names, below=below)
    if not subfolder:
        return whole
    if not (folder / subfolder).is_dir():
        raise AdapterLabError(f"The folder {typed} has no subfolder {subfolder!r}. {whole.holds()}")
    return _local_place(f"{typed.rstrip('/')}/{subfolder}", folder / subfolder, "")


def _list_folder(folder: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    entries = sorted(folder.iterdir())
    below = tuple(entry.name for entry in entries if (entry / ADAPTER_CONFIG).is_file())
    return frozenset(entry.name for entry in entries if entry.is_file()), below


def _hub_place(asked: Place, tell: bool) -> Place:
    """Ask the Hub for the repository's list of files; where that can't be, the cache's snapshot."""
    from huggingface_hub import HfApi, constants

    if asked.local_files_only or constants.HF_HUB_OFFLINE:
        reason = "local_files_only=True" if asked.local_files_only else "HF_HUB_OFFLINE is set"
        return _cached_place(replace(asked, local_files_only=True, offline=reason))
    with explained(asked):
        try:
            info = HfApi().model_info(
                asked.typed, revision=asked.revision, token=asked.token, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        except Exception as error:
            if not _is_unreachable(error):
                raise
            reason = f"the Hub cannot be reached ({type(error).__name__})"
            found = _cached_place(replace(asked, local_files_only=True, offline=reason))
            if tell:
                say(f"{asked.typed}: {reason}, so the files in the local cache are used.")
            return found
    prefix = f"{asked.subfolder}/" if asked.subfolder else ""
    paths = [file.rfilename for file in info.siblings or ()]
    inside = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    adapters = (path.removesuffix(f"/{ADAPTER_CONFIG}") for path in inside if path.endswith(f"/{ADAPTER_CONFIG}"))
    if prefix and not inside:
        raise AdapterLabError(f"{asked.typed} on the Hub has no subfolder {asked.subfolder!r}.")
    return replace(asked, names=frozenset(path for path in inside if "/" not in path), below=tuple(sorted(adapters)))


def _cached_place(asked: Place) -> Place:
    from huggingface_hub import snapshot_download

    with explained(asked):
        snapshot = snapshot_download(
            asked.typed, revision=asked.revision, cache_dir=asked.cache_dir, local_files_only=True
        )
    inner = Path(snapshot) / asked.subfolder
    if not inner.is_dir():
        raise AdapterLabError(
            f"{asked.typed} has no subfolder {asked.subfolder!r} in the local cache, and {asked.offline}."
        )
    names, below = _list_folder(inner)
    return replace(asked, names=names, below=below)


def _is_unreachable(error: Exception) -> bool:
    """Whether the Hub gave no answer at all, or only that it is out of order."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    # The HTTP library changes with huggingface_hub's releases; that it comes from there is what matters.
    transport = type(error).__module__.partition(".")[0] in {
        "httpx",
        "httpx2",
        "httpcore",
        "requests",
        "urllib3",
    }
    return transport or isinstance(error, (OfflineModeIsEnabled, OSError))


def _explanation(error: Exception, place: Place) -> str:
    from huggingface_hub import errors as hub

    causes = list(_chain(error))

    def any_is(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    name = place.typed
    if any_is(hub.GatedRepoError):
        return (
            f"{name} is gated: accept its terms on its page on the Hub, then pass token=… "
            "or log in with `hf auth login`."
        )
    if any_is(hub.RevisionNotFoundError):
        return f"{name} has no revision {place.revision!r} on the Hub: give a branch, tag or commit of it."
    if any_is(hub.RepositoryNotFoundError):
        return (
            f"There is no {name!r} on the Hub (or it is private), and no folder of this name here: "
            "check the spelling; a private repository needs token=…"
        )
    if any_is(hub.HFValidationError):
        return f"{name!r} is neither a folder here nor a Hub id: a Hub id looks like 'facebook/opt-350m'."
    if any_is(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) or (place.offline and any_is(OSError)):
        why = place.offline or "the Hub cannot be reached"
        forbids = " forbids asking the Hub" if why == "local_files_only=True" else ""
        return (
            f"{name} is not in the local cache, or not wholly, and {why}{forbids}; "
            "load it once while online, or give a local folder."
        )
    if any_is(pickle.UnpicklingError):  # torch's own words advise to run it
        return (
            f"{place.source} could not be loaded: its weights are a pickle of more than tensors, which could run any code, so "
            "they are not read. Ask for a version with .safetensors."
        )
    if "out of memory" in str(error).lower() or any_is(MemoryError):
        return f"{place.source} does not fit into memory: try quantization='8bit' or '4bit', or a smaller model."
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{place.source} could not be loaded: {type(error).__name__}: {first_line[:600]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
