"""What the lab silences is heard again afterwards, whatever other threads silence meanwhile."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from adapterlab import quiet as module
from adapterlab.demo import _quiet_transformers
from adapterlab.guards import Work
from adapterlab.quiet import no_conversion_requests, quiet, warnings_ignored

LIBRARIES = ("transformers", "peft")
Block = Callable[[], contextlib.AbstractContextManager[None]]


def heard() -> tuple[object, ...]:
    """Everything process-wide that the blocks change."""
    from transformers.utils import logging as transformers_logging

    levels = [logging.getLogger(name).level for name in LIBRARIES]
    variable = os.environ.get("DISABLE_SAFETENSORS_CONVERSION")
    return levels, list(warnings.filters), transformers_logging.is_progress_bar_enabled(), variable


class Other(threading.Thread):
    """Goes into a block and out again in a thread of its own, each when told."""

    def __init__(self, block: Block) -> None:
        super().__init__(daemon=True)
        self.block, self.inside, self.go, self.failed = block, threading.Event(), threading.Event(), list[str]()

    def run(self) -> None:
        with self.block():
            self.inside.set()
            if not self.go.wait(60):
                self.failed.append("nobody told it to go on")


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = heard()
    yield
    assert heard() == before


@pytest.mark.parametrize("block", [quiet, warnings_ignored, no_conversion_requests])
def test_two_threads_that_overlap_leave_nothing_behind(block: Block) -> None:
    """First in, first out: each would put back what the other had set, if each had noted it for itself."""
    before = heard()
    other = Other(block)
    with block():
        other.start()
        assert other.inside.wait(60)
        assert heard() != before
    assert heard() != before  # the other is still inside
    other.go.set()
    other.join(60)
    assert not other.failed
    assert heard() == before


def test_other_peoples_catch_warnings_brings_nothing_back() -> None:
    """It keeps the list of filters from within the block, and puts that list back after the block."""
    before = list(warnings.filters)
    with contextlib.ExitStack() as block, warnings.catch_warnings():
        block.enter_context(quiet())
        block.close()
        assert list(warnings.filters) == before
    assert list(warnings.filters) == before
    with contextlib.ExitStack() as somebody:
        with quiet():
            somebody.enter_context(warnings.catch_warnings())
        assert list(warnings.filters) == before
    assert list(warnings.filters) == before


def test_a_filter_of_the_users_own_that_says_the_same_stays() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = list(warnings.filters)
        with quiet():
            assert len(warnings.filters) == len(before) + 1
        assert list(warnings.filters) == before


def test_only_the_warnings_that_match_are_ignored(recwarn: pytest.WarningsRecorder) -> None:
    with warnings_ignored("Glyph .* missing", UserWarning):
        warnings.warn("Glyph 9731 missing from font", UserWarning, stacklevel=1)
        warnings.warn("Glyph 9731 missing from font", FutureWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(one.message) for one in recwarn] == ["Glyph 9731 missing from font", "something else"]


def test_a_level_set_within_another_block_is_not_what_comes_back() -> None:
    logger = logging.getLogger("peft")
    before = logger.level
    with quiet(), quiet():
        assert logger.level == logging.ERROR
    assert logger.level == before


def test_cut_anywhere_it_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between any two steps of going in and coming out, in a call of a lab."""
    before = heard()
    real = logging.Logger.setLevel
    for cut in range(2 * len(module._LOUD_LOGGERS)):
        calls = iter(range(10_000))

        def stopped(self: logging.Logger, level: int, cut: int = cut, calls: Iterator[int] = calls) -> None:
            if next(calls) == cut:
                raise KeyboardInterrupt
            real(self, level)

        lab = SimpleNamespace(_works=[])
        with monkeypatch.context() as patch:
            patch.setattr(logging.Logger, "setLevel", stopped)
            with pytest.raises(KeyboardInterrupt), Work(lab), quiet():
                assert logging.getLogger("peft").level == logging.ERROR
        assert heard() == before, cut
        assert not lab._works


def test_the_conversion_of_the_demo_puts_transformers_bars_and_voice_back() -> None:
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as transformers_logging

    before, bar = heard(), gguf.tqdm
    with contextlib.suppress(ZeroDivisionError), _quiet_transformers(progress=False):
        assert not transformers_logging.is_progress_bar_enabled()
        assert logging.getLogger("transformers").level == logging.ERROR
        assert gguf.tqdm is not bar
        raise ZeroDivisionError
    assert heard() == before
    assert gguf.tqdm is bar
