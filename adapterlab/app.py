"""The panel as a page of its own: a notebook of one cell, served by Voila."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory

from adapterlab.errors import AdapterLabError

DEMO = "demo"
NOTEBOOK = "adapterlab.ipynb"

_CELL = """\
from IPython.display import HTML, display

from adapterlab import AdapterLab, AdapterLabError
from adapterlab.pagetext import escape, without_maths

try:
    lab = {opening}
    for source in {adapters!r}:
        lab.load_adapter(source)
    lab.set_adapter(None)
    lab.show()
except AdapterLabError as error:
    display(HTML(without_maths("<h1>AdapterLab</h1><p>" + escape(error) + "</p>")))
"""


def app_cell(model: str, adapters: Sequence[str] = (), quantization: str | None = None) -> str:
    """The Python that opens the lab and its panel; `model` "demo" is the demo, with its own adapters too.

    Everything that was typed stands in it as a literal.
    """
    options = "" if quantization is None else f", quantization={quantization!r}"
    if model == DEMO:
        opening = f"AdapterLab.demo({options.removeprefix(', ')})"
    else:
        opening = f"AdapterLab({_place(model)!r}{options})"
    return _CELL.format(opening=opening, adapters=[_place(adapter) for adapter in adapters])


def app_notebook(cell: str) -> str:
    """A notebook of this one cell, as JSON."""
    code: dict[str, object] = {
        "cell_type": "code",
        "execution_count": None,
        "id": "panel",
        "metadata": {},
        "outputs": [],
        "source": cell,
    }
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps({"cells": [code], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})


def app_command(notebook: Path, port: int | None, browser: bool) -> list[str]:
    """Voila on this notebook: this machine only, with a token of its own, opening the page unless `browser` is false."""
    options = ["--Voila.ip=127.0.0.1", "--Voila.auto_token=True"]
    options += [] if port is None else [f"--port={port}"]
    options += [] if browser else ["--no-browser"]
    return [sys.executable, "-m", "voila", str(notebook), *options]


def serve_app(
    model: str,
    adapters: Sequence[str] = (),
    quantization: str | None = None,
    port: int | None = None,
    browser: bool = True,
) -> int:
    """Serve the panel until Ctrl-C; returns Voila's exit code. Each visitor gets a kernel and a lab of their own.

    Raises `AdapterLabError` where Voila is not installed. What goes wrong with the model is said in the page.
    """
    if util.find_spec("voila") is None:
        raise AdapterLabError("The app needs Voila: run pip install 'adapterlab[app]', then the same command again.")
    with TemporaryDirectory(prefix="adapterlab-app-") as folder:
        notebook = Path(folder) / NOTEBOOK
        notebook.write_text(app_notebook(app_cell(model, adapters, quantization)), encoding="utf-8")
        server = subprocess.Popen(app_command(notebook, port, browser))
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            server.wait()
            return 0


def _place(source: str) -> str:
    """A folder by its whole path, since the kernel works elsewhere; a Hub id as it is."""
    try:
        path = Path(source).expanduser()
        return str(path.absolute()) if path.exists() or source.startswith((".", "~")) else source
    except (OSError, RuntimeError):  # no path can be called so; the lab says what is wrong with it
        return source
