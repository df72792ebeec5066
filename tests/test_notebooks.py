"""What every notebook must have, whether or not it is run today."""

from __future__ import annotations

import ast
import copy
import re
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import nbformat
import pytest
from packaging.requirements import Requirement

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

    def test_its_links_lead_somewhere(self, path: Path) -> None:
        for cell in read(path).cells:
            if cell.cell_type == "markdown":
                for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", cell.source):
                    assert (path.parent / target).resolve().exists(), target

    def test_it_compares_facts(self, path: Path) -> None:
        facts = [cell for cell in code(read(path)) if "# NBVAL_CHECK_OUTPUT" in cell.source]
        assert facts, "no cell is compared"
        assert all(cell.outputs for cell in facts), "run scripts/run_notebooks.py: nbval compares with what is written"


JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
IN_JAPANESE = [path for path in NOTEBOOKS if path.parent.name == "ja"]


def twin(path: Path) -> Path:
    return path.parent.parent / path.name


def told_apart(english: str, japanese: str) -> tuple[str, str]:
    """Both as what they do: without comments, and without the words of strings that the second says in Japanese."""
    trees = [ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.MULTILINE)) for source in (english, japanese)]
    for ours, theirs in zip(*(list(ast.walk(tree)) for tree in trees)):
        if not isinstance(ours, ast.Constant) or not isinstance(theirs, ast.Constant):
            continue
        if isinstance(ours.value, str) and isinstance(theirs.value, str) and JAPANESE.search(theirs.value):
            ours.value = theirs.value = ""
    return ast.dump(trees[0]), ast.dump(trees[1])


@pytest.mark.parametrize("path", IN_JAPANESE, ids=lambda path: path.name)
class TestInStepWithTheEnglish:
    def test_the_same_cells_in_the_same_order(self, path: Path) -> None:
        english, japanese = read(twin(path)).cells, read(path).cells
        assert [cell.cell_type for cell in japanese] == [cell.cell_type for cell in english]
        for theirs, ours in zip(english, japanese):
            assert ours.metadata.get("tags") == theirs.metadata.get("tags")
            if ours.cell_type == "code":
                first, second = told_apart(theirs.source, ours.source)
                assert second == first, ours.source
                assert ("# NBVAL_CHECK_OUTPUT" in ours.source) == ("# NBVAL_CHECK_OUTPUT" in theirs.source)

    def test_the_same_headings_blocks_and_numbers_of_links(self, path: Path) -> None:
        for theirs, ours in zip(read(twin(path)).cells, read(path).cells, strict=True):
            if ours.cell_type == "markdown":
                assert JAPANESE.search(ours.source), ours.source
                for pattern in (r"^#+(?= )", r"^```\w*$", r"\]\("):
                    found = [re.findall(pattern, text, re.MULTILINE) for text in (ours.source, theirs.source)]
                    assert found[0] == found[1], ours.source


def test_told_apart_sees_what_matters() -> None:
    assert len(set(told_apart("print('a', 1)  # b", "print('あ', 1)"))) == 1
    assert len(set(told_apart("print('a', 1)", "print('あ', 2)"))) == 2
    assert len(set(told_apart("f('a')", "f('b')"))) == 2
    assert len(set(told_apart("f(a)", "f(b)"))) == 2


def test_installing_leaves_colabs_torch_and_widgets_as_they_are() -> None:
    """pip changes what is there only where it does not do: Colab's versions all do."""
    ours = {
        asked.name.lower(): asked.specifier
        for asked in map(Requirement, requires("adapterlab") or [])
        if not asked.marker
    }
    lines = (ROOT / ".ci" / "colab.txt").read_text(encoding="utf-8").splitlines()
    there = {line.partition("==")[0].lower(): line.partition("==")[2] for line in lines if "==" in line}
    assert {"ipywidgets", "transformers", "peft"} <= set(there)
    for name, version in there.items():
        assert name not in ours or version in ours[name], f"pip would exchange {name} {version}"
    assert all(asked.operator != "==" for asked in ours["torch"])
    assert "2.6.0" in ours["torch"]
