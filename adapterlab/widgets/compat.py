"""The few places where ipywidgets 7.7 and 8.1 differ, so that nothing else has to ask which one it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import ipywidgets

from adapterlab.pagetext import escape, readable

_AFTER_ENTER = 0.1  # seconds
_RENDERS_DESCRIPTIONS = int(ipywidgets.__version__.split(".")[0]) < 8


def needs_foreground() -> bool:
    """Whether work has to run where clicks are handled: Colab shows no change that another thread makes.

    ADAPTERLAB_FOREGROUND=1 asks for it anywhere.
    """
    return "google.colab" in sys.modules or os.environ.get("ADAPTERLAB_FOREGROUND") == "1"


def label_text(text: str) -> str:
    """Text for a `description` that must stay text: version 7 puts descriptions into the page as HTML."""
    return escape(text) if _RENDERS_DESCRIPTIONS else readable(text)


def set_tooltip(widget: Any, text: str) -> None:
    """Show `text` when the pointer rests on `widget`."""
    widget.set_trait("tooltip" if widget.has_trait("tooltip") else "description_tooltip", readable(text))


def classes(widget: Any, *names: str) -> Any:
    """`widget`, with the CSS classes `names` added: for use inside an expression."""
    for name in names:
        widget.add_class(name)
    return widget


def on_enter(text_box: Any, callback: Callable[[], object]) -> None:
    """Call `callback()` when Enter is pressed in a `Text` box, and not when the focus leaves it.

    The page tells of the key before it tells the text, so in the foreground, where nothing comes in while the callback
    works, the kernel's event loop calls it a moment later.
    """

    def handle(_: Any, content: dict[str, Any], __: Any) -> None:
        if content.get("event") != "submit":
            return
        if needs_foreground():
            with contextlib.suppress(RuntimeError):  # no loop: nobody types
                asyncio.get_running_loop().call_later(_AFTER_ENTER, callback)
                return
        callback()

    # The message itself, since `on_submit` is deprecated in version 8 and `continuous_update=False` fires on blur too.
    text_box.on_msg(handle)


def soon(callback: Callable[[], object]) -> bool:
    """Have the kernel's event loop call it when what is at work in this thread has ended; False where there is no loop."""
    try:
        asyncio.get_running_loop().call_soon(callback)
    except RuntimeError:
        return False
    return True


def close_all(widget: Any) -> None:
    """Close a widget and all that belongs to it."""
    for child in getattr(widget, "children", ()):
        close_all(child)
    for own in (getattr(widget, "style", None), getattr(widget, "layout", None)):
        if own is not None and hasattr(own, "close"):  # "style" is a plain string in some widgets of version 7
            own.close()
    widget.close()
