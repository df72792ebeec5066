"""The Train tab in JupyterLab in a real browser, on the real demo model: a person teaches it something and looks on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from jupyterlab_page import json_from_kernel, jupyterlab, need_browser, notebook_page, run_all_cells, write_notebook

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.demo]

OPEN = "from adapterlab import AdapterLab\n\nlab = AdapterLab.demo()"
PATIENCE = 120_000  # ms
PAIRS = [
    ("What is the moon?", "Arr, a lantern, matey!"),
    ("What is rain?", "Arr, water from above, matey!"),
    ("Who are you?", "Arr, a captain, matey!"),
    ("What is a friend?", "Arr, one who shares, matey!"),
    ("Why is the sky blue?", "Arr, it mirrors the sea, matey!"),
    ("What is tea?", "Arr, leaves in a cup, matey!"),
]
PASTED = "\n".join(f"{prompt} => {answer}" for prompt, answer in PAIRS)
LOSSES = "[loss for loss in lab.adapters[{name!r}].runs[-1].history.loss.dropna()]"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A notebook with a panel, run from top to bottom, and Train open in it."""
    need_browser("jupyterlab")
    root, scratch = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("server")
    write_notebook(root / "panel.ipynb", OPEN, "lab.show()")
    with jupyterlab(root, scratch) as url, notebook_page(url, "panel.ipynb", width=1400, height=3000) as page:
        run_all_cells(page)
        yield page


@pytest.fixture
def panel(page: Page) -> Locator:
    """The panel with Train open, the examples pasted."""
    panel = page.locator(".alab-panel")
    button(panel, "Train").click()
    panel.get_by_label("Examples", exact=True).fill(PASTED)
    return panel


def button(panel: Locator, name: str) -> Locator:
    return panel.get_by_role("button", name=name, exact=True)


def start(panel: Locator, name: str, steps: int) -> None:
    panel.locator(".alab-train").get_by_label("Name").fill(name)
    panel.get_by_label("Steps", exact=True).fill(str(steps))
    button(panel, "Start training").click()


def wait_for(panel: Locator, phase: str) -> None:
    panel.locator(f'.alab-run[data-phase="{phase}"]').wait_for(timeout=PATIENCE)
    button(panel, "Start training").wait_for(timeout=PATIENCE)


def watch(panel: Locator) -> None:
    """From now on keep the different headings and pictures that appear, as `window.seen`."""
    panel.page.evaluate(
        """() => {
            window.seen = new Set();
            const look = () => document.querySelectorAll('.alab-run-facts, .alab-plot svg').forEach(node =>
                window.seen.add(node.getAttribute('aria-label') || node.innerText));
            new MutationObserver(look).observe(document.querySelector('.alab-training'),
                {subtree: true, childList: true, characterData: true, attributes: true});
        }"""
    )


def test_what_is_pasted_is_learned_before_ones_eyes(panel: Locator) -> None:
    button(panel, "Check data").click()
    panel.locator(".alab-lesson").get_by_text("6 prompt/completion pairs").wait_for(timeout=PATIENCE)
    watch(panel)
    start(panel, "mine", 4)
    wait_for(panel, "done")
    losses = json_from_kernel(panel.page, "", LOSSES.format(name="mine"))
    assert len(losses) == 4
    seen = "\n".join(panel.page.evaluate("[...window.seen]"))
    for step, loss in enumerate(losses, 1):
        assert f"{loss:.3f} at step {step}" in seen, "each loss was on the screen while it trained"
    assert "Time left" in seen.replace("\u00a0", " ")
    assert f"loss {losses[0]:.3f} → {losses[-1]:.3f}" in panel.locator(".alab-notice-box").inner_text()
    label = panel.locator(".alab-plot svg").get_attribute("aria-label")
    assert label == f"Loss over 4 steps: training from {losses[0]:.3f} at step 1 to {losses[-1]:.3f} at step 4"


def test_it_is_a_column_in_compare(panel: Locator) -> None:
    button(panel, "See it in Compare").click()
    panel.get_by_role("button", name="Sampling").click()
    panel.get_by_label("New tokens").fill("4")
    assert panel.get_by_role("checkbox", name="mine", exact=True).is_checked()
    button(panel, "Generate").click()
    panel.locator('.alab-asked-line[data-shown="1"]').wait_for(timeout=PATIENCE)
    columns, shift = json_from_kernel(panel.page, "", "[lab.last.columns, lab.last['mine'].logit_shift]")
    assert panel.locator(".alab-card h4").all_inner_texts() == columns
    assert columns[-1] == "mine"
    assert shift > 0


def test_the_code_that_is_shown_teaches_the_same(panel: Locator) -> None:
    button(panel, "▸ Code of this training").click()
    code = panel.locator(".alab-training .alab-code pre").inner_text()
    assert "lab.train(" in code
    losses = json_from_kernel(panel.page, "", LOSSES.format(name="mine"))
    again = code.replace("'mine'", "'again'").replace("max_steps=4", "max_steps=4, disable_tqdm=True")
    assert json_from_kernel(panel.page, again, LOSSES.format(name="again")) == pytest.approx(losses, rel=1e-5)
    panel.get_by_role("checkbox", name="again", exact=True).wait_for()
    assert not panel.get_by_text("another panel has started").is_visible(), "it has ended"


def test_stop_ends_it_after_a_step_and_keeps_what_was_learned(panel: Locator) -> None:
    start(panel, "short", 500)
    panel.locator('.alab-run[data-phase="training"]:not([data-step="0"])').wait_for(timeout=PATIENCE)
    button(panel, "Stop").click()
    wait_for(panel, "stopped")
    steps, early = json_from_kernel(
        panel.page, "run = lab.adapters['short'].runs[-1]", "[run.steps, run.stopped_early]"
    )
    assert 1 <= steps < 20
    assert early
    assert f"after {steps} of 500 steps" in panel.locator(".alab-notice-box").inner_text()
    assert panel.get_by_role("checkbox", name="short", exact=True).is_checked()


def test_adalora_shows_where_its_ranks_go(panel: Locator) -> None:
    panel.locator(".alab-train").get_by_label("Method").select_option("AdaLoRA")
    start(panel, "ranks", 3)
    panel.locator(".alab-ranks").wait_for(timeout=PATIENCE)
    wait_for(panel, "done")
    cells = [int(text) for text in panel.locator(".alab-rank").all_inner_texts()]
    frame = json_from_kernel(
        panel.page, "frame = lab.ranks('ranks').sort_values(['module', 'layer'])", "frame['rank'].tolist()"
    )
    assert cells == frame
    assert sum(cells) < 8 * len(cells)


def test_nothing_nameless_and_nothing_cut_off(panel: Locator) -> None:
    nameless = panel.evaluate(
        """panel => [...panel.querySelectorAll('button, input, select, textarea, progress, [role=region]')]
            .filter(control => control.offsetParent && !(control.innerText || '').trim() && !control.labels?.length
                && !control.getAttribute('aria-label')).map(control => control.outerHTML)"""
    )
    assert nameless == []
    page = panel.page
    assert page.viewport_size is not None
    before = page.viewport_size
    try:
        for width in (1000, 600):
            box = panel.bounding_box()
            assert box is not None
            assert page.viewport_size is not None
            wanted = width + page.viewport_size["width"] - round(box["width"])
            page.set_viewport_size({"width": wanted, "height": before["height"]})
            page.wait_for_function(
                "([panel, w]) => Math.abs(panel.clientWidth - w) < 8", arg=[panel.element_handle(), width]
            )
            too_wide = panel.evaluate(
                """panel => [...panel.querySelectorAll('*')].filter(node => node.offsetParent
                    && node.getBoundingClientRect().right > panel.getBoundingClientRect().right + 1
                    && !node.closest('.alab-ranks, .alab-targets')).map(node => node.className)"""
            )
            assert too_wide == []
    finally:
        page.set_viewport_size(before)


def test_the_keyboard_reaches_all_of_it(panel: Locator) -> None:
    panel.get_by_label("Examples", exact=True).focus()
    reached = set()
    for _ in range(20):
        panel.page.keyboard.press("Tab")
        reached.add(
            panel.page.evaluate(
                "(a => (a.labels?.[0]?.innerText || a.ariaLabel || a.innerText || '').trim())(document.activeElement)"
            )
        )
    wanted = {"Check data", "Adapter", "Name", "Method", "Target modules", "Learning rate", "Steps", "Held-out share"}
    assert wanted | {"Start training", "Ranks kept, by module and layer", "See it in Compare"} <= reached
