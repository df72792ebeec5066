"""JupyterLab on a notebook in a real browser: for the browser tests and for the screenshots."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

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
def jupyterlab(root: Path, scratch: Path, *, theme: str = "JupyterLab Light") -> Iterator[str]:
    """A JupyterLab server on `root`, on this machine only and with a token of its own; yields its URL.

    Everything it writes goes below `scratch`. The server and its kernels are ended on leaving.
    """
    settings = scratch / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}), encoding="utf-8")
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet), encoding="utf-8")
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
    # A core for the browser: torch's threads wait for one another busily, and with as many threads as cores each
    # repaint of the page holds all of them up (measured on two cores: the notebook takes 114 s instead of 32 s).
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1))}
    with subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, **threads, **folders},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield f"{_wait_for_url(server)}|{token}"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for_url(server: subprocess.Popen[str]) -> str:
    """The URL the server says it listens at. Goes on reading its log afterwards, so that the pipe never fills."""
    found: list[str] = []
    log: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert server.stderr is not None
        for line in server.stderr:
            log.append(line)
            match = re.search(r"(http://127\.0\.0\.1:\d+)/lab", line)
            if match and not found:
                found.append(match.group(1))
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    ready.wait(START_SECONDS)
    assert found, "JupyterLab did not start:\n" + "".join(log[-30:])
    return found[0]


@contextmanager
def notebook_page(
    url: str, notebook: str, *, width: int = 1400, height: int = 1000, scale: float = 1.0
) -> Iterator[Page]:
    """`notebook` (a path below the server's root) open in Chromium, its kernel ready. `url` is what `jupyterlab` gave."""
    from playwright.sync_api import sync_playwright

    address, token = url.split("|")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
            page.set_default_timeout(60_000)
            page.goto(f"{address}/lab/tree/{notebook}?reset&token={token}")
            page.wait_for_function(
                "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
            )
            yield page
        finally:
            browser.close()


def run_all_cells(page: Page) -> None:
    """Run the notebook from top to bottom; returns when the last cell has ended. Fails if a cell fails or hangs."""
    assert page.evaluate(_RUN_ALL_CELLS, RUN_SECONDS * 1000), "a cell of the notebook failed"


def run_in_kernel(page: Page, code: str) -> str:
    """What `code` prints in the notebook's own kernel."""
    return str(page.evaluate(_RUN_IN_KERNEL, code))


def json_from_kernel(page: Page, code: str, expression: str) -> Any:
    """The value of `expression` in the notebook's kernel, after `code`."""
    return json.loads(run_in_kernel(page, f"{code}\nimport json as _json\nprint(_json.dumps({expression}))"))
