"""Adapters for a base, as the Hub knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    import pandas as pd


def find_adapters(base_id: str, limit: int = 20) -> pd.DataFrame:
    """The Hub's adapters for the base `base_id`, most downloaded first: repo_id, downloads, likes, last_modified.

    Asks the Hub over the network, and tells it nothing but the base's Hub id. Raises `AdapterLabError` when the base has
    none, the Hub is out of reach or off by HF_HUB_OFFLINE, or `limit` is no number from 1 up.
    """
    import pandas as pd
    from huggingface_hub import constants, list_models

    if not isinstance(limit, int) or limit < 1:
        raise AdapterLabError(f"limit={limit!r} is no whole number from 1 up.")
    _check_hub_id(base_id)
    if constants.HF_HUB_OFFLINE:
        raise AdapterLabError(
            "HF_HUB_OFFLINE is set, so the Hub was not asked: start the kernel anew without it, or load an adapter from a "
            "folder."
        )
    try:
        found = list(list_models(filter=f"base_model:adapter:{base_id}", sort="downloads", limit=limit))
    except Exception as error:  # of whatever library this release of huggingface_hub talks with
        raise AdapterLabError(
            f"The Hub can't be asked for adapters of {base_id!r} ({type(error).__name__}): check the connection, or load "
            "an adapter from a folder."
        ) from error
    rows = [(m.id, m.downloads, m.likes, m.last_modified) for m in found]
    return pd.DataFrame(rows, columns=["repo_id", "downloads", "likes", "last_modified"])


def _check_hub_id(base_id: str) -> None:
    """Refuse a folder's path: the Hub knows no adapters by it, and it is nobody else's business."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(base_id)
    except HFValidationError as error:
        what = f"is a folder here ({base_id!r})" if base_id else "has no name"
        raise AdapterLabError(
            f"The Hub lists adapters by their base's Hub id, and this base {what}: open the lab by the id, or load an "
            "adapter by its own."
        ) from error
