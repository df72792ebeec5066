"""The few places where ipywidgets 7.7 and 8.1 differ, so that nothing else has to ask which one it is."""

from __future__ import annotations

import os
import sys
from html import escape
from typing import Any

import ipywidgets

_RENDERS_DESCRIPTIONS = int(ipywidgets.__version__.split(".")[0]) < 8


def needs_foreground() -> bool:
    """Whether work has to run where clicks are handled: Colab shows no change that another thread makes.

    ADAPTERLAB_FOREGROUND=1 asks for it anywhere.
    """
    return "google.colab" in sys.modules or os.environ.get("ADAPTERLAB_FOREGROUND") == "1"


def label_text(text: str) -> str:
    """Text for a `description` that must stay text: version 7 puts descriptions into the page as HTML."""
    return escape(text) if _RENDERS_DESCRIPTIONS else text


def set_tooltip(widget: Any, text: str) -> None:
    """Show `text` when the pointer rests on `widget`."""
    widget.set_trait("tooltip" if widget.has_trait("tooltip") else "description_tooltip", text)


def classes(widget: Any, *names: str) -> Any:
    """`widget`, with the CSS classes `names` added: for use inside an expression."""
    for name in names:
        widget.add_class(name)
    return widget


def on_enter(text_box: Any, callback: Any) -> None:
    """Call `callback()` when Enter is pressed in a `Text` box, and not when the focus leaves it."""

    def handle(_: Any, content: dict[str, Any], __: Any) -> None:
        if content.get("event") == "submit":
            callback()

    # The message itself, since `on_submit` is deprecated in version 8 and `continuous_update=False` fires on blur too.
    text_box.on_msg(handle)
