"""The panel in JupyterLab in a real browser, on the real demo model: what people do, and what must then be on the screen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from fakelab import HOSTILE
from jupyterlab_page import (
    chromium_page,
    json_from_kernel,
    jupyterlab,
    need_browser,
    notebook_page,
    run_all_cells,
    run_in_kernel,
    wait_for_kernel,
    write_notebook,
)

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.demo]

QUICKSTART = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
OPEN = "from adapterlab import AdapterLab\n\nlab = AdapterLab.demo()"
PATIENCE = 60_000  # ms: two slow cores generate a few dozen tokens in each of a few columns
PROMPT = "What is rain?"
TOKENS = 16
LAST = "{g.column: g.text for g in lab.last.generations}"
COUNT = "sum(len(comparison.prompts) for comparison in lab.history)"
ALL = ["base", "pirate", "robot", "bard"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A notebook with two panels on one lab, run from top to bottom."""
    need_browser("jupyterlab")
    root, scratch = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("server")
    write_notebook(root / "panel.ipynb", OPEN, "lab.show()", "lab.show()")
    with jupyterlab(root, scratch) as url, notebook_page(url, "panel.ipynb", width=1400, height=3600) as page:
        run_all_cells(page)
        panel = panels(page).first
        panel.get_by_role("button", name="Sampling").click()
        panel.get_by_label("New tokens").fill(str(TOKENS))
        yield page


@pytest.fixture
def panel(page: Page) -> Locator:
    """The first panel, at rest and as it opens, but for the number of tokens."""
    first = panels(page).first
    first.get_by_label("New tokens").fill(str(TOKENS))
    for name in ALL:
        first.get_by_role("checkbox", name=name, exact=True).set_checked(True)
    return first


def panels(page: Page) -> Locator:
    return page.locator(".alab-panel")


def button(panel: Locator, name: str) -> Locator:
    return panel.get_by_role("button", name=name, exact=True)


def headings(panel: Locator) -> list[str]:
    return panel.locator(".alab-card h4").all_inner_texts()


def card_texts(panel: Locator) -> dict[str, str]:
    """The text on screen in each column, by its heading; what base said instead, and the sign where it is left, put
    aside."""
    said = (
        "text => { const copy = text.cloneNode(true);"
        "copy.querySelectorAll('del, .alab-leaves').forEach(mark => mark.remove()); return copy.textContent }"
    )
    return dict(zip(headings(panel), [text.evaluate(said) for text in panel.locator(".alab-text").all()], strict=True))


def generate(panel: Locator, prompt: str = PROMPT) -> None:
    """Ask, and wait until this panel shows the answers."""
    before = json_from_kernel(panel.page, "", COUNT)
    panel.get_by_label("Prompt", exact=True).fill(prompt)
    button(panel, "Generate").click()
    wait_for_comparison(panel, before + 1)


def wait_for_comparison(panel: Locator, number: int) -> None:
    panel.locator(f'.alab-asked-line[data-shown="{number}"]').wait_for(timeout=PATIENCE)
    enabled(button(panel, "Generate"))


def enabled(control: Locator) -> None:
    from playwright.sync_api import expect

    expect(control).to_be_enabled(timeout=PATIENCE)


def in_mid_stream(panel: Locator, prompt: str) -> None:
    """Ask for more than anybody waits for, and go on when text comes in."""
    panel.get_by_label("New tokens").fill("2000")
    panel.get_by_label("Prompt", exact=True).fill(prompt)
    button(panel, "Generate").click()
    panel.locator(".alab-writing").first.wait_for(timeout=PATIENCE)


def test_generate_shows_in_each_column_what_compare_returns(panel: Locator) -> None:
    generate(panel)
    shown = card_texts(panel)
    assert list(shown) == ALL
    assert shown == json_from_kernel(panel.page, "", LAST)
    again = f"lab.clear_cache()\nagain = lab.compare({PROMPT!r}, max_new_tokens={TOKENS})"
    assert shown == json_from_kernel(panel.page, again, "{g.column: g.text for g in again.generations}")
    assert len(set(shown.values())) == len(ALL)
    assert shown["base"]


def test_each_column_names_the_weights_that_spoke(panel: Locator) -> None:
    generate(panel)
    digests = json_from_kernel(panel.page, "", "{g.column: g.weights_digest for g in lab.last.generations}")
    for card in panel.locator(".alab-card").all():
        assert digests[card.get_by_role("heading").inner_text()][:12] in card.inner_text()


def test_an_unticked_row_has_no_column(panel: Locator) -> None:
    panel.get_by_role("checkbox", name="robot", exact=True).uncheck()
    generate(panel)
    assert headings(panel) == [name for name in ALL if name != "robot"]


def test_stop_ends_generation_and_the_kernel_keeps_what_was_said(panel: Locator) -> None:
    before = json_from_kernel(panel.page, "", COUNT)
    in_mid_stream(panel, "Tell me a long story.")
    button(panel, "Stop").click()
    wait_for_comparison(panel, before + 1)
    reasons = json_from_kernel(panel.page, "", "{g.column: g.finish_reason for g in lab.last.generations}")
    assert reasons["base"] == "stopped"
    assert card_texts(panel) == json_from_kernel(panel.page, "", LAST)
    assert json_from_kernel(panel.page, "", "lab.last['base'].new_tokens") < 1000


def test_nodes_and_scroll_position_survive_streaming(panel: Locator) -> None:
    before = json_from_kernel(panel.page, "", COUNT)
    body = panel.locator(".alab-card-body").first
    panel.evaluate("panel => panel.querySelectorAll('.alab-card *').forEach(node => { node.known = true })")
    panel.page.add_style_tag(content=".alab-panel .alab-card-body { max-height: 60px; min-height: 60px }")
    in_mid_stream(panel, "Tell me another story.")
    scrollable = "body => body.scrollHeight > body.clientHeight + 30"
    panel.page.wait_for_function(scrollable, arg=body.element_handle(), timeout=PATIENCE)
    body.evaluate("body => { body.scrollTop = 20 }")
    length = body.evaluate("body => body.textContent.length")
    longer = "([body, length]) => body.textContent.length > length + 60"
    panel.page.wait_for_function(longer, arg=[body.element_handle(), length], timeout=PATIENCE)
    assert body.evaluate("body => body.scrollTop") == 20
    kept = panel.locator(".alab-card, .alab-card-head, .alab-card-body, .alab-card-foot")
    assert kept.evaluate_all(
        "nodes => nodes.length >= 12 && nodes.every(node => node.known || node.matches('.alab-card'))"
    )
    button(panel, "Stop").click()
    wait_for_comparison(panel, before + 1)
    panel.page.locator("style").last.evaluate("style => style.remove()")


def test_a_blend_speaks_in_a_column_of_its_own(panel: Locator) -> None:
    button(panel, "▸ Blend adapters").click()
    button(panel, "Add blend").click()
    label = "pirate × 0.5 + robot × 0.5 + bard × 0.5"
    panel.locator(".alab-card h4").get_by_text(label).wait_for()
    generate(panel)
    assert headings(panel) == [*ALL, label]
    parts = dict.fromkeys(ALL[1:], 0.5)
    blend = f"lab.compare({PROMPT!r}, [{parts!r}], max_new_tokens={TOKENS}).generations[0].text"
    assert card_texts(panel)[label] == json_from_kernel(panel.page, "", blend)
    panel.locator(".alab-row").last.get_by_role("button", name="Remove").click()
    panel.locator(".alab-row").nth(len(ALL)).wait_for(state="detached")
    button(panel, "▾ Blend adapters").click()


def test_earlier_comparisons_come_back(panel: Locator) -> None:
    generate(panel)
    number = json_from_kernel(panel.page, "", COUNT)
    earlier = card_texts(panel)
    generate(panel, "What is snow?")
    assert card_texts(panel) != earlier
    panel.get_by_label("History").select_option(index=1)
    panel.locator(f'.alab-asked-line[data-shown="{number}"]').wait_for()
    assert card_texts(panel) == earlier
    assert panel.locator(".alab-asked-prompt").inner_text() == PROMPT


def test_a_comparison_can_be_downloaded(panel: Locator, tmp_path: Path) -> None:
    generate(panel)
    button(panel, "▸ Download").click()
    held = {}
    for kind in ("JSON", "CSV", "HTML"):
        with panel.page.expect_download() as download:
            panel.get_by_role("link", name=kind).click()
        assert download.value.suggested_filename == f"comparison.{kind.lower()}"
        download.value.save_as(tmp_path / kind)
        held[kind] = (tmp_path / kind).read_text(encoding="utf-8")
    shown = card_texts(panel)
    assert {g["column"]: g["text"] for g in json.loads(held["JSON"])["generations"]} == shown
    assert all(name in held["CSV"] and name in held["HTML"] for name in ALL)
    button(panel, "▾ Download").click()


def test_the_code_that_is_shown_does_the_same(panel: Locator) -> None:
    panel.get_by_label("Temperature").fill("0.9")
    panel.get_by_label("Temperature").press("Tab")
    panel.get_by_label("Seed").fill("5")
    generate(panel)
    button(panel, "▸ Show code").click()
    code = panel.locator(".alab-results .alab-code pre").inner_text()
    assert "temperature=0.9" in code
    assert "seed=5" in code
    shown = card_texts(panel)
    run_in_kernel(panel.page, f"lab.clear_cache()\n{code}")
    assert json_from_kernel(panel.page, "", LAST) == shown
    panel.get_by_label("Temperature").fill("0")
    button(panel, "▾ Show code").click()


def test_likelihood_has_its_numbers_on_hover_and_in_a_table(panel: Locator) -> None:
    generate(panel)
    panel.get_by_label("Marks").select_option("Likelihood")
    table = panel.locator(".alab-card").nth(1).locator(".alab-tokens")
    table.wait_for(timeout=PATIENCE)
    table.locator("summary").press("Enter")
    values = json_from_kernel(
        panel.page, "frame = lab.last.tokens()", "frame[frame.column == 'pirate'].round(2).logprob.tolist()"
    )
    cells = [float(text) for text in table.locator("tbody td:nth-child(3)").all_inner_texts()]
    assert cells == pytest.approx(values, abs=0.006)
    titles = panel.locator(".alab-card").nth(1).locator("[title*=nats]").evaluate_all("all => all.map(t => t.title)")
    assert len(titles) == len(values)
    panel.get_by_label("Marks").select_option("Words")
    table.wait_for(state="detached")


def test_an_error_is_in_words_and_the_next_click_works(panel: Locator) -> None:
    button(panel, "▸ Load an adapter").click()
    panel.get_by_label("Folder or Hub id").fill("./no/such/folder")
    button(panel, "Load").click()
    alert = panel.get_by_role("alert")
    alert.wait_for(timeout=PATIENCE)
    assert "no/such/folder" in alert.inner_text()
    assert not alert.locator("pre").is_visible(), "the traceback is folded"
    assert headings(panel) == ALL
    generate(panel)
    assert alert.count() == 0
    button(panel, "▾ Load an adapter").click()


def test_two_panels_are_in_step_and_one_stops_the_other(panel: Locator) -> None:
    other = panels(panel.page).nth(1)
    before = json_from_kernel(panel.page, "", COUNT)
    in_mid_stream(panel, "Tell me a third story.")
    other.get_by_text("another panel has started").wait_for()
    button(other, "Generate").click()
    other.get_by_text("Not started").wait_for()
    button(other, "Stop").click()
    for each in (panel, other):
        wait_for_comparison(each, before + 1)
    assert card_texts(panel) == card_texts(other) == json_from_kernel(panel.page, "", LAST)
    assert json_from_kernel(panel.page, "", COUNT) == before + 1


def test_python_shows_in_the_panel_and_the_panel_in_python(panel: Locator) -> None:
    status = panel.locator(".alab-status-line")
    run_in_kernel(panel.page, "lab.set_adapter({'pirate': 0.5})")
    status.get_by_text("acting now: pirate × 0.5").wait_for()
    button(panel, "Use in lab.model").last.click()
    status.get_by_text("acting now: bard × 1").wait_for()
    assert json_from_kernel(panel.page, "", "lab.active_adapters") == {"bard": 1.0}
    enabled(button(panel, "Adapters on"))
    button(panel, "Adapters on").click()
    status.get_by_text("adapters disabled").wait_for()
    assert json_from_kernel(panel.page, "", "lab.active_adapters") == {}
    run_in_kernel(panel.page, "lab.enable_adapters(); lab.set_adapter(None)")
    status.get_by_text("acting now: base").wait_for()


def test_verify_says_that_plain_peft_agrees(panel: Locator) -> None:
    generate(panel)
    button(panel, "Inspect").click()
    button(panel, "Verify the columns").click()
    panel.locator(".alab-verdict table").wait_for(timeout=PATIENCE)
    assert panel.locator(".alab-verdict tbody b").all_inner_texts() == ["yes"] * len(ALL)
    assert panel.get_by_text("134,515,008").is_visible()
    button(panel, "Compare").click()
    button(panel, "Generate").wait_for()


def test_every_control_has_a_name_and_the_keyboard_reaches_it(panel: Locator) -> None:
    nameless = panel.evaluate(
        """panel => [...panel.querySelectorAll('button, input, select, textarea, [role=slider]')]
            .filter(control => control.offsetParent && !(control.innerText || '').trim() && !control.labels?.length
                && !control.getAttribute('aria-label') && !control.getAttribute('aria-labelledby')
                && !control.closest('.widget-slider')?.querySelector('.widget-label')?.innerText)
            .map(control => control.outerHTML)"""
    )
    assert nameless == []
    panel.get_by_label("Prompt", exact=True).fill("What is a river?")
    before = json_from_kernel(panel.page, "", COUNT)
    panel.page.keyboard.press("Tab")
    focused = panel.page.evaluate("document.activeElement.innerText")
    assert focused == "Generate"
    panel.page.keyboard.press("Space")
    wait_for_comparison(panel, before + 1)
    panel.get_by_label("Prompt", exact=True).focus()
    reached = set()
    for _ in range(60):
        panel.page.keyboard.press("Tab")
        reached.add(
            panel.page.evaluate("(document.activeElement.innerText || document.activeElement.ariaLabel || '').trim()")
        )
    assert {"Generate", "Several lines", "Blind test", "▸ Show code", "▸ Download"} <= reached


def test_dark_theme_is_dark_and_readable(panel: Locator) -> None:
    change = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
    for theme, dark in (("JupyterLab Dark", True), ("JupyterLab Light", False)):
        panel.page.evaluate(change, theme)
        panel.page.wait_for_function(f"document.body.dataset.jpThemeLight === '{str(not dark).lower()}'")
        for where in (".alab-text", ".alab-status-line", ".alab-card-foot dd", ".alab-muted", ".alab-badge"):
            text, ground = _colours(panel.locator(where).first)
            assert (_luminance(ground) < 0.2) == dark, (theme, where, ground)
            assert _contrast(text, ground) >= 4.5, (theme, where, text, ground)


@pytest.mark.parametrize("width", [600, 1000, 1600])
def test_nothing_is_cut_off_at_any_width(panel: Locator, width: int) -> None:
    page = panel.page
    assert page.viewport_size is not None
    before = page.viewport_size
    box = panel.bounding_box()
    assert box is not None
    try:
        page.set_viewport_size({"width": width + before["width"] - round(box["width"]), "height": before["height"]})
        page.wait_for_function(
            "([panel, w]) => Math.abs(panel.clientWidth - w) < 8", arg=[panel.element_handle(), width]
        )
        too_wide = panel.evaluate(
            """panel => [...panel.querySelectorAll('*')].filter(node => node.offsetParent
                && node.getBoundingClientRect().right > panel.getBoundingClientRect().right + 1
                && !node.closest('.alab-verdict, .alab-targets')).map(node => node.className)"""
        )
        assert too_wide == []
        lefts = {round(card.bounding_box()["x"]) for card in panel.locator(".alab-card").all()}  # type: ignore[index]
        assert len(lefts) == {600: 2, 1000: 3, 1600: 4}[width]
    finally:
        page.set_viewport_size(before)


def test_hostile_text_stays_text(panel: Locator) -> None:
    page = panel.page
    panel.get_by_label("New tokens").fill("2")
    before = json_from_kernel(page, "", COUNT)
    prompt = panel.get_by_label("Prompt", exact=True)
    prompt.fill(HOSTILE)
    prompt.press("Enter")
    wait_for_comparison(panel, before + 1)
    assert HOSTILE in panel.locator(".alab-asked-line").inner_text()
    button(panel, "▸ Show code").click()
    button(panel, "▸ Load an adapter").click()
    panel.get_by_label("Folder or Hub id").fill(HOSTILE)
    for action in ("Load", "Check first"):
        button(panel, action).click()
        panel.locator(".alab-notice-box.alab-error").wait_for()
        enabled(button(panel, action))
    said = """
        from dataclasses import replace
        hostile = {hostile!r}
        lab.last.generations = [
            replace(g, text=hostile, tokens=(hostile,) * g.new_tokens, note=hostile) for g in lab.last.generations
        ]"""
    run_in_kernel(page, dedent(said).format(hostile=HOSTILE))
    panel.get_by_label("Marks").select_option("None")
    panel.get_by_label("Marks").select_option("Likelihood")
    panel.locator(".alab-tokens").first.wait_for(timeout=PATIENCE)
    assert HOSTILE in panel.locator(".alab-text").nth(1).inner_text()
    shown = "from IPython.display import display\ndisplay(lab.last)\nlab.last.to_html('hostile.html')"
    run_in_kernel(page, shown)
    assert page.locator(".alab-panel img, .alab-panel script").count() == 0
    assert page.evaluate("window.hacked") is None
    panel.get_by_label("Marks").select_option("Words")
    button(panel, "▾ Show code").click()
    button(panel, "▾ Load an adapter").click()


def test_the_panel_comes_back_when_the_page_is_reloaded(panel: Locator) -> None:
    page = panel.page
    generate(panel)
    shown = card_texts(panel)
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.goto(page.url.split("?")[0])
    wait_for_kernel(page)
    panel.locator(".alab-card h4").first.wait_for(timeout=PATIENCE)
    assert card_texts(panel) == shown
    generate(panel, "What is a cloud?")
    assert card_texts(panel) == json_from_kernel(page, "", LAST)


def test_the_quickstart_runs_and_its_panel_answers(tmp_path: Path) -> None:
    need_browser("jupyterlab")
    (tmp_path / "root").mkdir()
    shutil.copy(QUICKSTART, tmp_path / "root" / "quickstart.ipynb")
    with (
        jupyterlab(tmp_path / "root", tmp_path / "server") as url,
        notebook_page(url, "quickstart.ipynb", width=1400, height=2400) as page,
    ):
        run_all_cells(page)
        panel = panels(page).first
        generate(panel, "What is a friend?")
        assert card_texts(panel) == json_from_kernel(page, "", LAST)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locator]:
    """A panel that works in the foreground, with the page's messages in the kernel's main thread."""
    need_browser("jupyterlab")
    root, scratch = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("server")
    write_notebook(root / "panel.ipynb", OPEN, "lab.show()")
    with (
        jupyterlab(root, scratch, subshells=False, ADAPTERLAB_FOREGROUND="1") as url,
        notebook_page(url, "panel.ipynb", width=1400, height=2000) as page,
    ):
        run_all_cells(page)
        panel = panels(page).first
        panel.get_by_role("button", name="Sampling").click()
        panel.get_by_label("New tokens").fill(str(TOKENS))
        yield panel


class TestForeground:
    """As on Colab: one thread for all, and a click that comes while it works waits for it."""

    def test_generate_streams_and_ends(self, front: Locator) -> None:
        generate(front)
        assert card_texts(front) == json_from_kernel(front.page, "", LAST)
        front.locator(".alab-notice-box").wait_for(state="detached")

    def test_enter_asks_what_was_typed_just_before(self, front: Locator) -> None:
        before = json_from_kernel(front.page, "", COUNT)
        prompt = front.get_by_label("Prompt", exact=True)
        prompt.fill("What is fog?")
        prompt.press("Enter")
        wait_for_comparison(front, before + 1)
        assert front.locator(".alab-asked-prompt").inner_text() == "What is fog?"

    def test_interrupt_execution_is_the_stop(self, front: Locator) -> None:
        before = json_from_kernel(front.page, "", COUNT)
        in_mid_stream(front, "Tell me a long story.")
        assert "Interrupt execution" in front.locator(".alab-notice-box").inner_text()
        assert button(front, "Stop").is_disabled()
        front.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()")
        front.get_by_text("Interrupted").wait_for(timeout=PATIENCE)
        front.get_by_label("New tokens").fill(str(TOKENS))
        generate(front)
        assert json_from_kernel(front.page, "", COUNT) == before + 1
        assert card_texts(front) == json_from_kernel(front.page, "", LAST)


def test_an_exported_comparison_needs_no_kernel(tmp_path: Path) -> None:
    """`_repr_html_` in a notebook that nbconvert exports, hostile text in every string of it."""
    need_browser("nbconvert")
    import nbformat
    from nbconvert import HTMLExporter

    from adapterlab import Comparison, Generation

    def said(column: str, text: str, asked: tuple[tuple[str, float], ...] = ()) -> Generation:
        return Generation(
            column=column, asked=asked, prompt_index=0, prompt=HOSTILE, text=text, token_ids=(1,), tokens=(text,),
            logprobs=(-1.0,), leads=(1.0,), finish_reason=HOSTILE, seconds=1.0, active_adapters=(HOSTILE,),
            multipliers=(1.0,), logit_shift=1.0, weights_digest=HOSTILE, note=HOSTILE,
        )  # fmt: skip

    both = [said("base", "plain words"), said(HOSTILE, f"plain {HOSTILE}", ((HOSTILE, 1.0),))]
    about = {"name": HOSTILE}
    comparison = Comparison([HOSTILE], [HOSTILE], [(1,)], {}, about, both)
    output = nbformat.v4.new_output("execute_result", {"text/html": comparison._repr_html_(), "text/plain": "…"})
    cell = nbformat.v4.new_code_cell("lab.compare(…)", outputs=[output])
    page_html, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    (tmp_path / "notebook.html").write_text(page_html, encoding="utf-8")
    comparison.to_html(tmp_path / "comparison.html")
    for name, where in (("notebook.html", ".jp-OutputArea"), ("comparison.html", "body")):
        with chromium_page((tmp_path / name).as_uri()) as page:
            area = page.locator(where).first
            assert f"plain {HOSTILE}" in area.inner_text()
            assert area.locator("th").all_inner_texts() == ["base", HOSTILE]
            assert area.locator("img, script").count() == 0
            assert page.evaluate("window.hacked") is None


def _colours(element: Locator) -> tuple[list[float], list[float]]:
    """The element's text colour and the ground that it stands on, as (r, g, b) from 0 to 1."""
    found: Any = element.evaluate(
        """element => {
            const paint = colour => { const canvas = new OffscreenCanvas(1, 1).getContext('2d');
                canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data] };
            let at = element, ground = [0, 0, 0, 0];
            while (at && ground[3] < 255) { ground = paint(getComputedStyle(at).backgroundColor); at = at.parentElement }
            return [paint(getComputedStyle(element).color), ground] }"""
    )
    text, ground = ([channel / 255 for channel in colour[:3]] for colour in found)
    return text, ground


def _luminance(colour: list[float]) -> float:
    """Relative luminance as in WCAG 2.2."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)
