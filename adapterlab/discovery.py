"""Adapters for a base, as the Hub knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    import pandas as pd


def find_adapters(base_id: str, limit: int = 20) -> pd.DataFrame:
    """The Hub's adapters for the base `base_id`, most downloaded first: repo_id, downloads, likes, last_modified.

    Asks the Hub over the network. Raises `AdapterLabError` when it is out of reach or `limit` is no number from 1 up.
    """
    import httpx
    import pandas as pd
    from huggingface_hub import list_models
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not isinstance(limit, int) or limit < 1:
        raise AdapterLabError(f"limit={limit!r} is no whole number from 1 up.")
    try:
        found = list(list_models(filter=f"base_model:adapter:{base_id}", sort="downloads", limit=limit))
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise AdapterLabError(
            f"The Hub can't be asked for adapters of {base_id!r} ({type(error).__name__}): check the connection, or load "
            "an adapter from a folder."
        ) from error
    rows = [(m.id, m.downloads, m.likes, m.last_modified) for m in found]
    return pd.DataFrame(rows, columns=["repo_id", "downloads", "likes", "last_modified"])
