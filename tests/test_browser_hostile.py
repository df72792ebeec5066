"""Strangers' strings in a real page: no script of theirs runs, nothing is fetched, and all of it is to be read.

What test_hostile_text.py finds by a parser, here by Chromium, whose own idea of broken HTML is the one that counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from jupyterlab_page import chromium_page, need_browser
from test_hostile_text import ALL, HOSTILE, PAGES, PICTURES, Drive, comparison_of, concatenation_of

from adapterlab.pagetext import readable
from adapterlab.plots import draw_svg

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

ACTIVE = (
    "script, iframe, object, embed, base, form, link, img, [onload], [onerror], [onmouseover], "
    "body [style*='url(']:not([style*='url(#'])"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    need_browser()
    with chromium_page("about:blank") as page:
        yield page


class Watched:
    """A page that notes what it should not do: what it asks the network for, what its console says, what was run."""

    def __init__(self, page: Page) -> None:
        self.page, self.asked, self.said = page, [], []
        page.route("**/*", self._refuse)
        page.on("console", self._note)
        page.on("pageerror", self._note)
        page.on("dialog", self._note)

    def _refuse(self, route: Any) -> None:
        if route.request.url.startswith(("file:", "about:")):
            route.continue_()
            return
        self.asked.append(route.request.url)
        route.abort()

    def _note(self, what: Any) -> None:
        self.said.append(getattr(what, "text", str(what)))

    def look(self) -> None:
        """Touch everything that could do something when it is touched, and fail if anything was done."""
        self.page.evaluate(
            """() => { for (const node of document.querySelectorAll('body *'))
                for (const kind of ['mouseover', 'focus', 'error', 'load', 'toggle'])
                    node.dispatchEvent(new Event(kind)) }"""
        )
        assert self.page.evaluate("window.hacked") is None
        assert self.asked == []
        assert self.said == []
        assert self.page.locator(ACTIVE).count() == 0

    def end(self) -> None:
        self.page.unroute("**/*", self._refuse)
        for event in ("console", "pageerror", "dialog"):
            self.page.remove_listener(event, self._note)


@pytest.fixture
def watched(chromium: Page) -> Iterator[Watched]:
    chromium.goto("about:blank")  # no policy of an earlier page's
    watched = Watched(chromium)
    yield watched
    watched.end()


def text_of(page: Page) -> str:
    return str(page.evaluate("document.body.textContent"))


def test_the_watch_sees_what_is_done(watched: Watched) -> None:
    """That the silence below is one."""
    watched.page.set_content(
        '<body><img src="http://evil.example/x.png" onerror="window.hacked=1"><script>console.log("ran")</script></body>'
    )
    watched.page.wait_for_function("window.hacked === 1")
    assert watched.asked == ["http://evil.example/x.png"]
    assert "ran" in watched.said
    watched.page.evaluate("delete window.hacked")


@pytest.mark.parametrize("make", [comparison_of, concatenation_of], ids=["one lab", "two labs"])
def test_an_exported_comparison(make: Any, watched: Watched, tmp_path: Any) -> None:
    for place, text in enumerate([ALL, *HOSTILE.values()]):
        path = make(text).to_html(tmp_path / f"{place}.html")
        watched.page.goto(path.as_uri())
        watched.look()
        assert readable(text) in text_of(watched.page)


def test_an_exported_page_would_run_no_script_even_if_one_were_in_it(watched: Watched, tmp_path: Any) -> None:
    """Its own policy forbids it: the second lock on the door."""
    page = comparison_of("x").to_html(tmp_path / "c.html").read_text(encoding="utf-8")
    planted = '<script>window.hacked=1</script><img src="http://evil.example/x.png" onerror="window.hacked=1">'
    (tmp_path / "planted.html").write_text(page.replace("</body>", f"{planted}</body>"), encoding="utf-8")
    watched.page.goto((tmp_path / "planted.html").as_uri())
    assert watched.page.evaluate("window.hacked") is None
    assert watched.asked == []
    assert any("Content Security Policy" in said for said in watched.said)


@pytest.mark.parametrize("sink", [sink for sink in PAGES if sink != "exported page"])
def test_a_part_of_a_page(sink: str, watched: Watched) -> None:
    # Each string alone, and all in one page, since what one opens another could close.
    parts = [f"<section>{PAGES[sink](text)}</section>" for key, text in HOSTILE.items() if key != "long"]
    watched.page.set_content(f"<!doctype html><meta charset='utf-8'><body>{''.join(parts)}</body>")
    watched.look()
    assert watched.page.locator("body > section").count() == len(parts), "each ends where it ended"


def test_the_panel(watched: Watched) -> None:
    text = readable(ALL)
    watched.page.set_content(f"<!doctype html><meta charset='utf-8'><body>{Drive(text).page}</body>")
    watched.page.evaluate("() => document.querySelectorAll('a[download]').forEach(link => link.remove())")
    watched.look()
    assert text in text_of(watched.page)


@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture(picture: str, watched: Watched) -> None:
    drawn = [
        draw_svg(lambda text=text: PICTURES[picture](text), text) for text in (HOSTILE["markup"], HOSTILE["script"])
    ]  # type: ignore[misc]
    watched.page.set_content(f"<!doctype html><meta charset='utf-8'><body>{''.join(drawn)}</body>")
    watched.look()
    assert watched.page.locator("svg[role=img]").count() == len(drawn)
