"""What every notebook must have, whether or not it is run today."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import notebook_links

    yield notebook_links
    sys.modules.pop("notebook_links")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "notebooks").as_posix())
class TestEveryNotebook:
    def test_its_badges_and_its_install_are_of_the_one_address(self, path: Path, links: Any) -> None:
        notebook = read(path)
        assert links.with_links(path, copy.deepcopy(notebook)) == notebook, "run scripts/notebook_links.py"
        assert notebook.cells[0].cell_type == "markdown"
        assert notebook.cells[0].source.startswith("# ")
        assert "nbval-skip" in code(notebook)[0].metadata.tags, (
            "the cell that installs comes first, and no test runs it"
        )

    def test_it_is_valid_and_carries_outputs_that_need_no_kernel(self, path: Path) -> None:
        notebook = read(path)
        nbformat.validate(notebook)
        assert "widgets" not in notebook.metadata, "GitHub refuses widgets without their state"
        for cell in code(notebook):
            for output in cell.outputs:
                assert output.output_type != "error", cell.source
                assert not (output.output_type == "stream" and output.name == "stderr"), cell.source
                assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), cell.source

    def test_it_compares_facts(self, path: Path) -> None:
        facts = [cell for cell in code(read(path)) if "# NBVAL_CHECK_OUTPUT" in cell.source]
        assert facts, "no cell is compared"
        assert all(cell.outputs for cell in facts), "run scripts/run_notebooks.py: nbval compares with what is written"
