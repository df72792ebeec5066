"""The quickstart notebook in JupyterLab in a real browser: what a newcomer does, and what must then be on the screen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jupyterlab_page import find_chromium, json_from_kernel, jupyterlab, notebook_page, run_all_cells, run_in_kernel

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.demo]

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
PATIENCE = 60_000  # ms: two slow cores generate a few dozen tokens in each of three columns
PROMPT = "What is rain?"
TOKENS = 24
ANSWERS = "{g.column: g.text for g in lab.last.generations}"


def missing() -> str | None:
    """What this machine lacks for a browser test, and how to get it."""
    if find_spec("playwright") is None or find_spec("jupyterlab") is None:
        return "playwright or JupyterLab is not installed: pip install 'adapterlab[lab,test]'"
    if find_chromium() is None:
        return (
            "no Chromium found: install one (Debian: apt-get install chromium) or set ADAPTERLAB_CHROMIUM to its path"
        )
    return None


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The quickstart notebook, copied, opened and run from top to bottom."""
    reason = missing()
    if reason and os.environ.get("CI"):
        pytest.fail(f"The browser test can't run: {reason}.")
    if reason:
        pytest.skip(reason)
    root, scratch = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("server")
    shutil.copy(NOTEBOOK, root / "quickstart.ipynb")
    with (
        jupyterlab(root, scratch) as url,
        notebook_page(url, "quickstart.ipynb", width=1400, height=2000) as page,
    ):
        run_all_cells(page)
        page.get_by_role("button", name="Sampling").click()
        page.get_by_label("New tokens").fill(str(TOKENS))
        yield page


def card_texts(page: Page) -> dict[str, str]:
    """The text on screen in each column, what base said instead left out, by the column's heading."""
    said = "text => { const copy = text.cloneNode(true); copy.querySelectorAll('del').forEach(word => word.remove()); "
    cards = page.locator(".alab-card")
    return {
        card.get_by_role("heading").inner_text(): card.locator(".alab-text").evaluate(
            said + "return copy.textContent }"
        )
        for card in cards.all()
    }


def wait_until_done(page: Page) -> None:
    """Until the kernel has ended what was clicked, and the page shows the columns that it made."""
    from playwright.sync_api import expect

    columns = json_from_kernel(page, "lab.wait()", "[g.column for g in lab.last.generations]")
    expect(page.locator(".alab-card h4")).to_have_text(columns)
    expect(page.locator(".alab-card .alab-done")).to_have_count(len(columns))
    button(page, "Generate").wait_for(timeout=PATIENCE)


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def test_generate_shows_in_each_column_what_compare_returns(page: Page) -> None:
    prompt = page.get_by_label("Prompt")
    prompt.fill(PROMPT)
    button(page, "Generate").click()
    wait_until_done(page)
    shown = card_texts(page)
    assert list(shown) == ["base", "pirate", "robot"]
    assert shown == json_from_kernel(page, "", ANSWERS)
    again = f"lab.compare({PROMPT!r}, max_new_tokens={TOKENS})"
    assert shown == json_from_kernel(page, f"again = {again}", "{g.column: g.text for g in again.generations}")
    assert shown["base"] not in ("", shown["pirate"], shown["robot"])
    assert shown["pirate"] != shown["robot"]


def test_each_column_names_the_weights_that_spoke(page: Page) -> None:
    digests = json_from_kernel(page, "", "{g.column: g.weights_digest for g in lab.last.generations}")
    for card in page.locator(".alab-card").all():
        assert digests[card.get_by_role("heading").inner_text()][:12] in card.inner_text()


def test_stop_ends_generation_and_the_kernel_keeps_what_was_said(page: Page) -> None:
    page.get_by_label("New tokens").fill("2000")
    button(page, "Generate").click()
    page.locator(".alab-writing").first.wait_for(timeout=PATIENCE)
    button(page, "Stop").click()
    button(page, "Generate").wait_for(timeout=PATIENCE)
    last = json_from_kernel(page, "lab.wait()", "{g.column: [g.text, g.finish_reason] for g in lab.last.generations}")
    assert last["base"][1] == "stopped"
    assert card_texts(page)["base"] == last["base"][0]
    page.get_by_label("New tokens").fill(str(TOKENS))


def test_python_shows_in_the_panel_and_the_panel_in_python(page: Page) -> None:
    status = page.locator(".alab-status-line")
    run_in_kernel(page, "lab.set_adapter({'pirate': 0.5})")
    status.get_by_text("acting now: pirate × 0.5").wait_for()
    button(page, "Use in lab.model").last.click()
    status.get_by_text("acting now: robot × 1").wait_for()
    assert json_from_kernel(page, "", "lab.active_adapters") == {"robot": 1.0}
    button(page, "Adapters on").click()
    status.get_by_text("adapters disabled").wait_for()
    assert json_from_kernel(page, "", "lab.active_adapters") == {}
    run_in_kernel(page, "lab.enable_adapters(); lab.set_adapter(None)")
    status.get_by_text("acting now: base").wait_for()


def test_hostile_text_stays_text(page: Page) -> None:
    hostile = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
    page.get_by_label("Prompt").fill(hostile)
    page.get_by_label("New tokens").fill("2")
    page.get_by_label("Prompt").press("Enter")
    page.locator(".alab-asked-line").get_by_text(hostile).wait_for(timeout=PATIENCE)
    wait_until_done(page)
    button(page, "▸ Load an adapter").click()
    page.get_by_label("Folder or Hub id").fill(hostile)
    button(page, "Load").click()
    page.locator(".alab-notice-box.alab-error").wait_for()
    assert page.locator(".alab-panel img, .alab-panel script").count() == 0
    assert page.evaluate("window.hacked") is None
