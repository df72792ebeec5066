"""An adapter's way to the Hub, in one commit: its files, its card, and for AdaLoRA the picture of its ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.cards import HERE, RANKS_PICTURE, base_of, make_card
from adapterlab.errors import AdapterLabError
from adapterlab.notices import warn

if TYPE_CHECKING:
    from adapterlab.adapters import Adapters
    from adapterlab.records import Record


@dataclass(frozen=True)
class Package:
    """An adapter as it will be on the Hub: a folder with its files, its card, and whose weights they are (`record`,
    `digest`)."""

    folder: Path
    name: str
    repo_id: str
    card: str
    record: Record
    digest: str

    def write_card(self, repo_id: str) -> None:
        (self.folder / "README.md").write_text(self.card.replace(HERE, repo_id), encoding="utf-8")

    def is_still(self, adapters: Adapters) -> bool:
        """Whether the lab's adapter is the same and has the same weights as what was packed."""
        same = adapters.records.get(self.name) is self.record
        return same and adapters.refresh([self.name])[self.name] == self.digest


def check_repo_id(repo_id: Any) -> None:
    """Raise `AdapterLabError` if no repository can be called so."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if not isinstance(repo_id, str):
            raise HFValidationError("no text")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise AdapterLabError(
            f"{repo_id!r} is no Hub id: use 'your-name/my-adapter', of letters, digits, '-', '_' and '.'."
        ) from error


def check_online() -> None:
    """Raise `AdapterLabError` if the Hub is off by the user's own wish."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise AdapterLabError(_OFFLINE)


def pack(adapters: Adapters, name: str, about: dict[str, Any], repo_id: str, scratch: Path) -> Package:
    """Write the adapter's files, and for AdaLoRA the picture of its ranks, into a folder in `scratch`; `push` adds the card.

    The lab is left as it is. Warns where others will have no use of it: it does nothing, or its base is a local model.
    """
    from matplotlib import style

    from adapterlab.atomic import building
    from adapterlab.inspection import ranks_frame_of
    from adapterlab.plots import plot_ranks
    from adapterlab.storage import with_all_triplets, write_files

    card = str(make_card(adapters, name, about, HERE))
    record = adapters.records[name]
    config, state = adapters.state(name)
    state = with_all_triplets(config, state)
    base = base_of(record, config, adapters.base_path)
    config.base_model_name_or_path = base.name or None
    package = Package(scratch / name, name, repo_id, card, record, record.digest)
    with building(package.folder) as beside:
        write_files(beside, config, state, base.name)
        if adapters.info(name).method == "ADALORA":
            with style.context("default"):  # for every reader, whatever this notebook's style is
                figure: Any = plot_ranks(ranks_frame_of(adapters.mounts.adapters[name], name)).get_figure(root=True)
                figure.savefig(beside / RANKS_PICTURE, format="png", dpi=150)
    if record.status == "untrained":
        warn(f"{name!r} is untrained: what others load from {repo_id!r} changes nothing.")
    if not base.hub_id:
        what = f"a local model, called {base.name!r} in the files" if base.name else "a model without a name"
        warn(
            f"The base of {name!r} is {what}: others can't load it by that. Push the base too, and open the lab from "
            "its id."
        )
    return package


def push(
    package: Package, *, private: bool | None, token: str | bool | None, message: str | None, revision: str | None
) -> str:
    """Make the repository if it is not there, and send the package in one commit; gives the commit's address.

    Raises `AdapterLabError` in words. A repository that was made before something failed stays, without files.
    """
    from huggingface_hub import HfApi

    with _explained(package.repo_id, revision):
        api = HfApi(token=token)
        full_id = api.create_repo(package.repo_id, private=private, exist_ok=True).repo_id
        package.write_card(full_id)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(full_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=full_id,
            folder_path=package.folder,
            commit_message=message or f"Upload {package.name} with AdapterLab",
            revision=revision,
        )
    return commit.commit_url


_OFFLINE = (
    "HF_HUB_OFFLINE is set, so nothing was sent: start the kernel anew without it, or lab.save_adapter(name, folder) now and "
    "push later."
)
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}  # they change with huggingface_hub's releases


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into an `AdapterLabError` on the repository."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise AdapterLabError(_OFFLINE) from error
    except Exception as error:
        raise AdapterLabError(f"{repo_id!r} was not pushed: {_reason(error, repo_id, revision)}") from error


def _reason(error: Any, repo_id: str, revision: str | None) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RevisionNotFoundError

    said = " ".join(str(getattr(error, "server_message", None) or error).split())
    if not isinstance(error, (HfHubHTTPError, LocalTokenNotFoundError)):
        lost = type(error).__module__.partition(".")[0] in _TRANSPORTS or isinstance(
            error, (ConnectionError, TimeoutError)
        )
        if lost:
            return f"the Hub can't be reached ({type(error).__name__}). Check the connection and try again."
        return f"{type(error).__name__}: {said}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return (
            "you are not logged in to the Hub, or your token is not valid. Log in with `hf auth login`, or pass token=…"
        )
    if status == 403:
        owner = repr(repo_id.partition("/")[0]) if "/" in repo_id else "this account"
        return f"your token may not write there ({said}). It needs the role 'write', and you a place in {owner}."
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}. Leave it out, or name a branch."
    if status is not None and status >= 500:
        return f"the Hub is out of order ({status}). Try again later."
    return f"the Hub refused it ({status}): {said}"
