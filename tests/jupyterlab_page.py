"""JupyterLab and Voila in a real browser: for the browser tests, the screenshots and the benchmark of the panel."""

from __future__ import annotations

import atexit
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page, Playwright

START_SECONDS = 120
RUN_SECONDS = 600

_RUN_ALL_CELLS = """patience => Promise.race([
    window.jupyterapp.commands.execute('notebook:run-all-cells'),
    new Promise((_, fail) => setTimeout(() => fail(new Error('the notebook ran too long')), patience)),
])"""

# Runs code in the notebook's kernel and resolves to what it printed, once the kernel is idle again.
_RUN_IN_KERNEL = """async code => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({code, store_history: false});
    let printed = '', failed = '';
    future.onIOPub = message => {
        if (message.header.msg_type === 'stream' && message.content.name === 'stdout') printed += message.content.text;
        if (message.header.msg_type === 'error') failed = message.content.traceback.join('\\n');
    };
    await future.done;
    if (failed) throw new Error(failed);
    return printed;
}"""


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome: `ADAPTERLAB_CHROMIUM`, else whatever of that kind is on the PATH."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("ADAPTERLAB_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextmanager
def jupyterlab(
    root: Path, scratch: Path, *, theme: str = "JupyterLab Light", subshells: bool = True, **environment: str
) -> Iterator[str]:
    """A JupyterLab server on `root`, on this machine only and with a token of its own; yields its URL.

    Everything it writes goes below `scratch`. The server and its kernels are ended on leaving. subshells: let the
    page's messages to widgets have threads of their own, as is the default. environment: further variables of the server
    and its kernels.
    """
    settings = scratch / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}), encoding="utf-8")
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet), encoding="utf-8")
    comms = {"commsOverSubshells": "perCommTarget" if subshells else "disabled"}
    (settings / "kernels-settings.jupyterlab-settings").write_text(json.dumps(comms), encoding="utf-8")
    token = secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": 0,
        "ServerApp.open_browser": False,
        "ServerApp.root_dir": root,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": True,
        "LabApp.workspaces_dir": scratch / "workspaces",
        "LabApp.user_settings_dir": scratch / "settings",
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{key}={value}" for key, value in options.items())]
    folders = {
        name: str(scratch / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    with _served(command, r"(http://127\.0\.0\.1:\d+)/lab", cwd=root, env={**folders, **environment}) as url:
        yield f"{url}|{token}"


@contextmanager
def voila_app(model: str) -> Iterator[str]:
    """`adapterlab app` on a model, without opening a browser; yields the address that it says, token included."""
    command = [sys.executable, "-m", "adapterlab.cli", "app", model, "--no-browser"]
    with _served(command, r"(http://127\.0\.0\.1:\d+/\S*)", own_group=True) as url:
        yield url


@contextmanager
def _served(
    command: list[str],
    address: str,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    own_group: bool = False,
) -> Iterator[str]:
    """The command as a process that says where it listens; ended on leaving. own_group: with the processes it started."""
    # A core for the browser: torch's threads wait for one another busily, and with as many threads as cores each
    # repaint of the page holds all of them up (measured on two cores: the notebook takes 114 s instead of 32 s).
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1))}
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **threads, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=own_group,
    ) as server:
        try:
            yield _wait_for_url(server, address)
        finally:
            if own_group:
                os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
            else:
                server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                if own_group:
                    os.killpg(server.pid, signal.SIGKILL)  # where Ctrl-C is ignored, as in a shell's background
                server.kill()


def _wait_for_url(server: subprocess.Popen[str], address: str) -> str:
    """The URL the server says it listens at. Goes on reading its log afterwards, so that the pipe never fills."""
    found: list[str] = []
    log: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert server.stderr is not None
        for line in server.stderr:
            log.append(line)
            match = re.search(address, line)
            if match and not found:
                found.append(match.group(1))
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    ready.wait(START_SECONDS)
    assert found, "the server did not start:\n" + "".join(log[-30:])
    return found[0]


@contextmanager
def notebook_page(
    url: str, notebook: str, *, width: int = 1400, height: int = 1000, scale: float = 1.0
) -> Iterator[Page]:
    """`notebook` (a path below the server's root) open in Chromium, its kernel ready. `url` is what `jupyterlab` gave."""
    address, token = url.split("|")
    with chromium_page(f"{address}/lab/tree/{notebook}?reset&token={token}", width, height, scale) as page:
        wait_for_kernel(page)
        yield page


_said: dict[Page, list[str]] = {}  # each page that is open → its console, and what was thrown there

_WHAT_IS_SHOWN = """() => ({
    panels: [...document.querySelectorAll('.alab-panel')].map(panel => panel.innerText.slice(0, 400)),
    outputs: [...document.querySelectorAll('.jp-OutputArea-output')].map(output => output.outerHTML.slice(0, 200)),
    dialogs: [...document.querySelectorAll('.jp-Dialog')].map(dialog => dialog.innerText),
    kernel: window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status,
    focus: document.activeElement?.outerHTML.slice(0, 200),
})"""


def what_pages_say() -> str:
    """For the report of a test that failed: of every open page what is on it now and what its console said last."""
    reports = []
    for page, said in _said.items():
        try:
            shown = json.dumps(page.wait_for_function(_WHAT_IS_SHOWN, timeout=10_000).json_value(), indent=1)
        except Exception as error:  # a page that doesn't answer is a finding too
            shown = f"the page does not answer: {error}"
        reports.append("\n".join([page.url.split("?")[0], shown, "console:", *said[-30:]]))
    return "\n\n".join(reports)


@contextmanager
def chromium_page(url: str, width: int = 1400, height: int = 1000, scale: float = 1.0) -> Iterator[Page]:
    """A page of a fresh Chromium."""
    browser = _playwright().chromium.launch(
        executable_path=find_chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"]
    )
    try:
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
        page.set_default_timeout(30_000)
        said = _said.setdefault(page, [])
        page.on("console", lambda message: said.append(f"{message.type}: {message.text[:300]}"))
        page.on("pageerror", lambda error: said.append(f"thrown: {error}"[:600]))
        try:
            page.goto(url)
            yield page
        except Exception:
            print(what_pages_say())  # before it is closed
            raise
        finally:
            del _said[page]
    finally:
        browser.close()


@cache
def _playwright() -> Playwright:
    """One for the whole process: a second one can't start while the first is at work."""
    from playwright.sync_api import sync_playwright

    started = sync_playwright().start()
    atexit.register(started.stop)
    return started


def wait_for_kernel(page: Page) -> None:
    """Until JupyterLab has opened the notebook, and its kernel is idle."""
    page.wait_for_function(
        "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    )


def need_browser(*modules: str) -> None:
    """Skip the test where Chromium, playwright or one of `modules` is missing; in CI, fail."""
    reason = None
    for module in ("playwright", *modules):
        if find_spec(module) is None:
            reason = f"{module} is not installed: pip install 'adapterlab[lab,test]'"
    if find_chromium() is None:
        reason = "no Chromium: install one (Debian: apt-get install chromium) or set ADAPTERLAB_CHROMIUM to its path"
    if reason and os.environ.get("CI"):
        pytest.fail(f"The browser test can't run: {reason}.")
    if reason:
        pytest.skip(reason)


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of these code cells, not run."""
    import nbformat

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": kernel}), path)


def run_all_cells(page: Page) -> None:
    """Run the notebook from top to bottom; returns when the last cell has ended. Fails if a cell fails or hangs."""
    assert page.evaluate(_RUN_ALL_CELLS, RUN_SECONDS * 1000), "a cell of the notebook failed"


def run_in_kernel(page: Page, code: str) -> str:
    """What `code` prints in the notebook's own kernel."""
    return str(page.evaluate(_RUN_IN_KERNEL, code))


def json_from_kernel(page: Page, code: str, expression: str) -> Any:
    """The value of `expression` in the notebook's kernel, after `code`."""
    return json.loads(run_in_kernel(page, f"{code}\nimport json as _json\nprint(_json.dumps({expression}))"))
