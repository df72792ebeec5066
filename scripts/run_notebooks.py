"""Runs notebooks from top to bottom and writes their outputs into them, without what only lives in a kernel.

    python scripts/run_notebooks.py [notebooks/quickstart.ipynb ...]

Widgets need a kernel, and a notebook that carries their state is refused by GitHub: both are left out. So are
progress bars and other lines on stderr. Cells tagged nbval-skip are not run.
"""

from __future__ import annotations

import sys
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
    paths = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in paths:
        run(path)
        print(path)


if __name__ == "__main__":
    main()
