"""Writes into notebooks how they are opened elsewhere: the badges below the title, and the cell that installs.

    python scripts/notebook_links.py [notebooks/quickstart.ipynb ...]

The repository's address stands in one place, `[project.urls]` of pyproject.toml; after a change of it, run this. A notebook
without badges or without such a cell gets them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com"
BINDER = "https://mybinder.org"
BADGES = re.compile(r"\n*^\[!\[[^\n]*" + re.escape(COLAB) + r"[^\n]*$\n*", re.MULTILINE)


def repository() -> str:
    """The address in pyproject.toml, as https://github.com/owner/name."""
    found = re.search(r'^Repository = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("pyproject.toml names no Repository in [project.urls].")
    return found[1]


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").rglob("*.ipynb"))


def badges(path: Path) -> str:
    place, name = path.relative_to(ROOT).as_posix(), repository().removeprefix("https://github.com/")
    in_colab, in_binder = (
        f"{COLAB}/github/{name}/blob/main/{place}",
        f"{BINDER}/v2/gh/{name}/main?urlpath=lab/tree/{place}",
    )
    return (
        f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({in_colab}) "
        f"[![Open in Binder]({BINDER}/badge_logo.svg)]({in_binder})"
    )


def install() -> str:
    """What brings the lab to a place that has torch and a notebook, and leaves those as they are."""
    return (
        "import importlib.util\n"
        "\n"
        'if importlib.util.find_spec("adapterlab") is None:  # on Colab and the like; leaves torch and ipywidgets as they are\n'
        f"    %pip install --quiet git+{repository()}"
    )


def with_links(path: Path, notebook: Any) -> Any:
    """The notebook with its badges and its cell that installs; `notebook` itself is changed."""
    import nbformat

    title = notebook.cells[0]
    first, _, rest = BADGES.sub("\n\n", title.source).partition("\n")
    title.source = f"{first}\n\n{badges(path)}\n\n{rest.strip()}".rstrip()
    for cell in notebook.cells:
        if cell.cell_type == "code" and 'find_spec("adapterlab")' in cell.source:
            cell.source = install()
            break
    else:
        cell = nbformat.v4.new_code_cell(install(), metadata={"tags": ["nbval-skip"]})
        notebook.cells.insert(1, cell)
    return notebook


def main() -> None:
    import nbformat

    for path in [Path(name).resolve() for name in sys.argv[1:]] or notebooks():
        notebook = nbformat.read(path, as_version=4)
        nbformat.write(with_links(path, notebook), path)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
