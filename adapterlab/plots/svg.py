"""A plot as a part of a page: SVG that takes the page's colours, safe to put into HTML."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from adapterlab.plots.style import INK
from adapterlab.quiet import warnings_ignored

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ONE_AT_A_TIME = threading.RLock()
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def draw_svg(draw: Callable[[], Figure | Axes], label: str) -> str:
    """Call `draw`, and give what it drew as an inline `<svg>` that follows the theme of the page around it.

        html = draw_svg(lambda: plot_parameters(frame), "Parameters of base and adapters")

    The ground is transparent; text, axes and ticks are in the page's text colour (`currentColor`), text is text. As wide
    as its figure, and never wider than its place. `label` is what a screen reader says (`aria-label`). Names and tokens
    come out escaped. No ids are shared between two pictures.

    matplotlib's settings are those of one process: while `draw` runs, they are this picture's, for every thread. Pictures
    wait for one another; afterwards the settings are as they were. What `draw` raises passes through.
    """
    with page_style():
        drawn: Any = draw()
        return figure_svg(drawn if hasattr(drawn, "savefig") else drawn.get_figure(root=True), label)


def figure_svg(figure: Figure, label: str = "") -> str:
    """A figure as an inline `<svg>`, as in `draw_svg`. Only what was drawn inside `page_style()` takes the page's colours."""
    from io import StringIO
    from xml.etree import ElementTree

    image = StringIO()
    with page_style():
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(_NO_XML.sub("", image.getvalue()).encode())
    _into_a_page(root, label)
    return ElementTree.tostring(root, encoding="unicode")


@contextmanager
def page_style() -> Iterator[None]:
    """matplotlib's default style, with text and lines in a colour that `figure_svg` changes to the page's own."""
    from matplotlib import rcParams, style

    lines = ("axes.edgecolor", "axes.labelcolor", "grid.color", "hatch.color", "patch.edgecolor", "text.color",
             "xtick.color", "ytick.color")  # fmt: skip
    grounds = ("axes.facecolor", "figure.facecolor", "savefig.facecolor")
    changed = dict.fromkeys(lines, INK) | dict.fromkeys(grounds, "none") | {"svg.fonttype": "none"}
    # The page has fonts of its own, and more of them: nothing is amiss where matplotlib's lack a character.
    with _ONE_AT_A_TIME, warnings_ignored("Glyph .* missing from", UserWarning):
        fonts = {key: rcParams[key] for key in ("font.family", "font.sans-serif")}  # those the user has chosen
        with style.context("default"):
            rcParams.update(changed | fonts)
            yield


def _into_a_page(root: Element, label: str) -> None:
    """Make a document of its own into a part of another one."""
    parents = list(root.iter())
    for parent in parents:
        for child in list(parent):
            # A style sheet inside would hold for the whole page; it says two things, which the root can say.
            if _local(child.tag) in ("metadata", "style", "title"):
                parent.remove(child)
    used = {name for element in root.iter() for name in _references(element)}
    prefix = f"p{uuid4().hex[:12]}-"
    for element in root.iter():
        element.tag = _local(element.tag)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id":
                if value not in used:
                    continue
                value = prefix + value
            elif _local(key) == "href" and value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            element.set(_local(key), _REFERENCE.sub(rf"url(#{prefix}\1)", value).replace(INK, "currentColor"))
    wide = float(root.get("viewBox", "0 0 0 0").split()[2]) * 96 / 72
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update(
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": box,
            "width": f"{wide:.0f}",
            "style": "max-width: 100%; height: auto; overflow: visible; stroke-linejoin: round; stroke-linecap: butt",
            "role": "img",
            "aria-label": _NO_XML.sub("", label),
        }
    )


def _local(name: Any) -> str:
    return str(name).rpartition("}")[2]


def _references(element: Element) -> Iterator[str]:
    for key, value in element.attrib.items():
        if _local(key) == "href" and value.startswith("#"):
            yield value[1:]
        yield from _REFERENCE.findall(value)
