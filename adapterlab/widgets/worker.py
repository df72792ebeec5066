"""One thread for whatever takes time, so that a click returns at once and Stop is always heard."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from adapterlab.notices import listening
from adapterlab.widgets.state import Notice

if TYPE_CHECKING:
    from adapterlab.widgets.state import PanelState


# JupyterLab hands what the page says to several threads of the kernel ("subshells"), so that a click can come in before
# what was typed just before it: measured, a few milliseconds and about once in thirty clicks. A job waits that long.
SETTLE = 0.05

_HOW_TO_STOP = Notice(
    "info",
    "Running. This notebook can't deliver a click on Stop meanwhile: use Interrupt execution.",
    passing=True,
)


class Worker:
    """Runs one job at a time and refuses another meanwhile; what happens is told through `state`.

    `track`: gets the future of each job. `state.busy` says what runs; a job's error becomes `state.notice`, and what the lab
    said and warned of meanwhile follows it. A job reads what the user set, so that it finds what was set just before the
    click.
    `foreground`: run each job where it is started, for front ends that show nothing from another thread.
    """

    def __init__(self, state: PanelState, track: Callable[[Future[None]], object], *, foreground: bool = False) -> None:
        self._state, self.foreground = state, foreground
        self._track = track
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapterlab-panel")
        self._closing = threading.Event()

    def start(self, doing: str, job: Callable[[], object], *, stoppable: bool = False, quietly: bool = False) -> bool:
        """Start `job` and return True; while another runs, say so in the notice and return False.

        `doing`: what it does, in words. `stoppable`: the Stop button can end it. `quietly`: what was told last stays.
        """
        state = self._state
        with state.lock:  # the one lock there is: a second could be taken the other way round
            if state.closed:
                return False
            if state.busy:
                stop = ", or press Stop" if state.stoppable else ""
                state.notice = Notice(
                    "info", f"Not started: still {_lower(state.busy)}. Wait for it{stop}.", passing=True
                )
                return False
            try:
                state.busy = doing
                state.stoppable = stoppable and not self.foreground
                # In the foreground no click arrives before this one is dealt with.
                if not quietly:
                    state.notice = _HOW_TO_STOP if stoppable and self.foreground else None
                if not self.foreground:
                    self._track(self._pool.submit(self._run, job))
                    return True
            except BaseException:  # a part that can't follow the state must not leave the panel busy for ever
                state.busy = ""
                raise
        try:
            self._run(job)
        except KeyboardInterrupt:
            state.busy = ""
            kept = ": nothing was kept of it" if stoppable else ": look at the rows for what it did"
            state.notice = Notice("info", f"Interrupted{kept}.")
        return True

    def close(self) -> None:
        """Take no more jobs; the thread ends with the job it is on. Returns at once."""
        self._closing.set()
        self._pool.shutdown(wait=False)

    def _run(self, job: Callable[[], object]) -> None:
        state = self._state
        with listening() as told:
            try:
                if not self.foreground:
                    self._closing.wait(SETTLE)
                if not state.closed:
                    job()
            except Exception as error:  # shown to the user, whatever it is; a thread has nobody else to tell
                state.notice = Notice.from_error(error)
            finally:
                with state.lock:
                    if state.notice is not None and state.notice.passing:
                        state.notice = None
                    state.notice = Notice.with_told(state.notice, told)
                    state.busy = ""


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip("….")
