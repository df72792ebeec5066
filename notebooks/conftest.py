"""Runs the notebooks as tests: by the Hub's names, against stand-ins of what the Hub has.

    pytest notebooks                  # the English ones, and one of the Japanese
    pytest notebooks notebooks/ja     # all of them
    pytest notebooks --real-hub       # the same cells on the real models

The stand-ins of `facebook/opt-350m` and `ybelkada/opt-350m-lora` have the published shapes and file formats, and random
weights. What a cell marked NBVAL_CHECK_OUTPUT compares is true of both.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
from standins import hub_for_kernels

JAPANESE_IN_CI = "load.ipynb"

_hub = contextlib.ExitStack()
_started = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-hub", action="store_true", help="run the notebooks on the Hub's own models")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of the Japanese notebooks one, unless their folder or the notebook itself was asked for."""
    if collection_path.suffix != ".ipynb" or collection_path.parent.name != "ja":
        return None
    asked = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    if collection_path.parent in asked or collection_path in asked:
        return None
    return collection_path.name != JAPANESE_IN_CI or None


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What is compared is what a cell says; progress bars and log lines go to stderr."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the first kernel starts: it takes the Hub's address from this process."""
    if item.path.suffix != ".ipynb" or item.config.getoption("--real-hub") or item.config.stash.get(_started, False):
        return
    folder = _hub.enter_context(tempfile.TemporaryDirectory(prefix="adapterlab-hub-"))
    _hub.enter_context(hub_for_kernels(Path(folder)))
    item.config.stash[_started] = True


def pytest_unconfigure() -> None:
    _hub.close()
