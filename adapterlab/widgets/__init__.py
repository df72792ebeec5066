"""The panel: what `lab.show()` opens. Core ipywidgets only, the same on 7.7 and 8.1.

`state.py` holds what the panel shows and what the user chose in it; every other file is one part of the screen
that reads and writes that state, and `panel.py` is the only one that talks to the lab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterlab.widgets.panel import Panel

if TYPE_CHECKING:
    from adapterlab.lab import AdapterLab

__all__ = ["Panel", "build_panel"]


def build_panel(lab: AdapterLab) -> Panel:
    """A new panel on `lab`, to be displayed or put into a layout of one's own. The lab is not changed.

    The panel follows the lab until `panel.close()` or `lab.close()`; several panels on one lab stay in step.
    """
    return Panel(lab)
