"""The arrows of the house, and that opening its door is quick."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import adapterlab

HOUSE = Path(adapterlab.__file__).parent
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "ipywidgets", "matplotlib", "pandas"}
# Subclasses of torch's and transformers' classes need them where they are written; nobody imports these before a model
# is there.
NEEDS_TORCH = {
    "adalora.py",
    "dryrun.py",
    "equation.py",
    "kvcache.py",
    "linear.py",
    "rows.py",
    "spans.py",
    "stacks.py",
    "trainer.py",
    "valueless.py",
    "watching.py",
}


def modules() -> list[Path]:
    return sorted(path for path in HOUSE.rglob("*.py"))


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Modules that a file imports, leaving out what stands under TYPE_CHECKING; at its top level, or everywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = list(ast.walk(tree)) if everywhere else [*tree.body]
    found = set()
    for node in nodes:
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, json, adapterlab; adapterlab.AdapterLabError; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(HOUSE)))
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    if path.name in NEEDS_TORCH or path.parent.name == "widgets":
        return
    heavy = {name for name in imports(path, everywhere=False) if name.split(".")[0] in HEAVY}
    assert not heavy


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(HOUSE)))
def test_arrows(path: Path) -> None:
    inner = {name for name in imports(path, everywhere=True) if name.startswith("adapterlab")}
    if path.parent.name == "widgets":
        model_rooms = ("mounts", "equation", "adapters", "generation", "verification", "merging", "storage")
        assert not {name for name in inner if name.split(".")[-1] in model_rooms}, "widgets see the lab, not its rooms"
    elif path.name not in ("lab.py", "cli.py"):
        assert not {name for name in inner if name.startswith("adapterlab.widgets")}, "only the façade opens the panel"
    if path.parent.name == "plots":
        assert {n for n in inner if not n.startswith("adapterlab.plots")} <= {
            "adapterlab.errors",
            "adapterlab.quiet",
        }, "plots see DataFrames only"
        assert not {n for n in imports(path, everywhere=True) if n.split(".")[0] in {"torch", "transformers", "peft"}}
    if path.name == "errors.py":
        assert not inner


def test_no_pyplot_anywhere() -> None:
    for path in modules():
        assert "matplotlib.pyplot" not in imports(path, everywhere=True), path


def test_public_names_resolve_and_are_documented() -> None:
    for name in adapterlab.__all__:
        thing = getattr(adapterlab, name)
        assert name == "__version__" or thing.__doc__, name
    assert set(adapterlab.__all__) <= set(dir(adapterlab))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adapterlab.nothing
    public = [n for n in dir(adapterlab.AdapterLab) if not n.startswith("_")]
    undocumented = [n for n in public if not (getattr(adapterlab.AdapterLab, n).__doc__ or "").strip()]
    assert undocumented in ([], ["enabled", "selection", "trainable"]), undocumented
