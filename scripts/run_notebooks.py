"""Runs notebooks from top to bottom and writes their outputs into them, without what only lives in a kernel.

    python scripts/run_notebooks.py [--real-hub] [notebooks/quickstart.ipynb ...]

The Hub's names are answered by stand-ins (tests/standins.py: published shapes and formats, random weights) unless
`--real-hub` says otherwise.

Widgets need a kernel, and a notebook that carries their state is refused by GitHub: both are left out. So are
progress bars and other lines on stderr. Cells tagged nbval-skip are not run.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_SECONDS = 900


def run(path: Path) -> None:
    """Run one notebook in place. A failing cell ends the run and leaves the file as it was."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        skip_cells_with_tag="nbval-skip",
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(settled, cell.outputs) if output]
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def settled(output: Any) -> Any:
    """An output as it should be kept, or None: no stderr, and of a widget only its words."""
    if output.output_type == "stream" and output.name == "stderr":
        return None
    if WIDGET in output.get("data", {}):
        del output.data[WIDGET]
        # What is left of a progress bar is the moment it was drawn at.
        return output if output.data.get("text/plain", "").startswith("<AdapterLab") else None
    return output


def main() -> None:
    names = [name for name in sys.argv[1:] if name != "--real-hub"]
    paths = [Path(name).resolve() for name in names] or sorted((ROOT / "notebooks").rglob("*.ipynb"))
    with contextlib.ExitStack() as hub:
        if "--real-hub" not in sys.argv:
            sys.path.insert(0, str(ROOT / "tests"))
            from standins import hub_for_kernels

            hub.enter_context(hub_for_kernels(Path(hub.enter_context(tempfile.TemporaryDirectory()))))
        for path in paths:
            began = time.monotonic()
            run(path)
            print(f"{path.relative_to(ROOT)}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
