"""binder/ makes an environment in which the quickstart runs: from its own files, in a fresh place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import requires, version
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
BINDER = ROOT / "binder"
CONDAS_NAMES = {"pytorch-cpu": "torch"}  # what conda-forge calls otherwise


def conda_packages() -> list[Requirement]:
    """What environment.yml asks of conda, as pip would be asked; `python` and `pip` are there anyway."""
    lines = (BINDER / "environment.yml").read_text(encoding="utf-8").split("dependencies:", 1)[1]
    asked = re.findall(r"^ *- *([\w-]+)\s*([=<>].*)?$", lines, re.MULTILINE)
    return [
        Requirement(CONDAS_NAMES.get(name, name) + re.sub("^=(?!=)", "==", limits.strip()))
        for name, limits in asked
        if name not in ("python", "pip")
    ]


def test_torch_is_the_cpu_build_and_new_enough() -> None:
    """pip's would bring several GB of CUDA, so conda brings it, and pip finds it there."""
    ours = {r.name: r for r in map(Requirement, requires("adapterlab") or []) if r.marker is None}
    asked = {r.name: r for r in conda_packages()}
    assert set(asked) == {"torch"}
    assert "pytorch-cpu" in (BINDER / "environment.yml").read_text(encoding="utf-8")
    assert asked["torch"].specifier == ours["torch"].specifier


def test_the_badge_opens_what_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (opened,) = set(re.findall(r"mybinder\.org/v2/gh/[^)]*urlpath=lab/tree/([^)]*)\)", readme))
    assert opened == "notebooks/quickstart.ipynb"
    assert (ROOT / opened).is_file()


@pytest.mark.demo
def test_a_fresh_environment_from_these_files_runs_the_quickstart(tmp_path: Path, long: bool) -> None:
    """As repo2docker does it: a copy of the repository, what environment.yml asks, then postBuild, then the notebook."""
    if not long:
        pytest.skip("three minutes of pip: .ci/run asks for it with --long")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    home = tmp_path / "home"
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, home / name)
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env = {**clean, "PATH": f"{programs}:{os.environ['PATH']}", "VIRTUAL_ENV": str(programs.parent)}

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    for asked in conda_packages():
        there = version(asked.name).partition("+")[0]  # the build that this machine has: conda's is not to be had here
        assert there in asked.specifier
        run("pip", "install", "--quiet", f"{asked.name}=={there}")
    run("bash", "binder/postBuild")
    run("jupyter", "execute", "--inplace", "--timeout=600", "notebooks/quickstart.ipynb")
    ran = nbformat.read(home / "notebooks" / "quickstart.ipynb", as_version=4)
    kept = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    compared = 0
    for now, then in zip(ran.cells, kept.cells, strict=True):
        if "# NBVAL_CHECK_OUTPUT" in now.source:
            said = ["".join(o.get("text", "") for o in c.outputs if o.get("name") == "stdout") for c in (now, then)]
            assert said[0] == said[1]
            compared += bool(said[0])
    assert compared >= 3
    from_here = subprocess.run(
        [programs / "python", "-c", "import adapterlab; print(adapterlab.__file__)"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert str(programs.parent) in from_here, "the environment used something else than what was installed into it"
    assert sys.prefix not in from_here
