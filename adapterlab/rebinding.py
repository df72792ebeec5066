"""`lab = AdapterLab(…)` run a second time: find the lab that the name holds now, so that two never sit in memory."""

from __future__ import annotations

import ast
import linecache
import sys
from types import FrameType
from typing import Any


def held_by_target(kind: type) -> Any:
    """The object of type `kind` that the assignment being executed by the user will overwrite, or None.

    Looks at the first frame outside this package, and only at `name = …` on the line that runs there.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "adapterlab":
        frame = frame.f_back
    if frame is None:
        return None
    name = _target(_statement(frame))
    held = frame.f_locals.get(name) if name else None
    return held if isinstance(held, kind) else None


def _statement(frame: FrameType) -> ast.stmt | None:
    source = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with magics: better not to guess
        return None
    found = None
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.lineno <= frame.f_lineno <= (node.end_lineno or 0):
            found = node
    return found


def _target(statement: ast.stmt | None) -> str | None:
    """The name in `name = AdapterLab(…)` or `name = AdapterLab.demo(…)`; None for any other statement."""
    call = getattr(statement, "value", None)
    if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith(("AdapterLab", "AdapterLab.demo")):
        return None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None
