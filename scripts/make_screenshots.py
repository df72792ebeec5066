"""Takes the pictures of the panel in docs/images, from the demo in a real JupyterLab: look at them afterwards.

    python scripts/make_screenshots.py [panel panel-dark panel-narrow panel-error …]

Needs Chromium (or ADAPTERLAB_CHROMIUM), playwright, JupyterLab and the demo model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from jupyterlab_page import jupyterlab, notebook_page, run_all_cells, write_notebook  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Page

CELLS = ("from adapterlab import AdapterLab\n\nlab = AdapterLab.demo()", "lab.show()")
PATIENCE = 120_000
TALL = 2600


def compare(page: Page) -> None:
    """Press Generate and wait until every column is there."""
    page.get_by_role("button", name="Generate").click()
    page.locator(".alab-card").last.locator(".alab-done").wait_for(timeout=PATIENCE)


def fail_to_add(page: Page) -> None:
    """After a comparison, add an adapter under a name that is taken."""
    compare(page)
    page.get_by_role("button", name="Add a new adapter").click()
    form = page.locator(".alab-inset:visible").filter(has_text="Target modules")
    form.get_by_label("Target modules").select_option(["q_proj", "v_proj"])
    form.get_by_label("Name").fill("pirate")
    form.get_by_role("button", name="Add", exact=True).click()
    page.locator(".alab-notice-box.alab-error").wait_for(timeout=PATIENCE)


def blind(page: Page) -> None:
    """A comparison whose names are hidden."""
    page.get_by_role("button", name="Blind test").click()
    compare(page)


def likelihood(page: Page) -> None:
    """A comparison shaded by likelihood, with the code of the last click."""
    compare(page)
    page.get_by_label("Marks").select_option("Likelihood")
    page.locator(".alab-tokens").first.wait_for(timeout=PATIENCE)
    page.get_by_role("button", name="Show code").click()


def inspect(page: Page) -> None:
    """What the adapters weigh, and plain PEFT's verdict on the columns."""
    compare(page)
    page.get_by_role("button", name="Inspect").click()
    page.get_by_role("button", name="Verify the columns").click()
    page.locator(".alab-verdict table").wait_for(timeout=PATIENCE)


def train(page: Page) -> None:
    """An AdaLoRA adapter that learns the pirate's first dozen answers anew, in the middle of it."""
    from adapterlab.demo import demo_training_pairs

    pairs = demo_training_pairs("pirate")[:15]
    page.get_by_role("button", name="Train", exact=True).click()
    form = page.locator(".alab-train")
    form.get_by_label("Examples", exact=True).fill("\n".join(f"{question} => {answer}" for question, answer in pairs))
    form.get_by_label("Name").fill("mine")
    form.get_by_label("Method").select_option("AdaLoRA")
    form.get_by_label("Target modules").select_option(["q_proj", "v_proj", "up_proj", "down_proj"])
    form.get_by_label("Held-out share").fill("0.2")
    page.get_by_role("button", name="Start training").click()
    page.locator('.alab-run[data-step="26"]').wait_for(timeout=2 * PATIENCE)


def in_mid_stream(page: Page) -> None:
    """While the columns are being written, one of them a blend."""
    page.get_by_role("button", name="Blend adapters").click()
    page.get_by_role("button", name="Add blend").click()
    page.get_by_role("button", name="Remove").wait_for(timeout=PATIENCE)
    page.get_by_role("button", name="Blend adapters").click()
    page.get_by_role("button", name="Generate").click()
    page.locator(".alab-writing").nth(2).wait_for(timeout=PATIENCE)


@dataclass(frozen=True)
class Shot:
    width: int
    theme: str = "JupyterLab Light"
    act: Callable[[Page], None] = compare


SHOTS = {
    "panel": Shot(1200),
    "panel-dark": Shot(1200, theme="JupyterLab Dark"),
    "panel-narrow": Shot(600),
    "panel-error": Shot(1200, act=fail_to_add),
    "panel-blind": Shot(1200, act=blind),
    "panel-likelihood": Shot(1200, act=likelihood),
    "panel-streaming": Shot(1200, act=in_mid_stream),
    "panel-wide": Shot(1600),
    "panel-inspect": Shot(1200, act=inspect),
    "panel-train": Shot(1200, act=train),
}


def take(name: str, shot: Shot, folder: Path) -> Path:
    """One picture of the panel, `shot.width` pixels wide, into `folder`."""
    with TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        root.mkdir()
        write_notebook(root / "panel.ipynb", *CELLS)
        with (
            jupyterlab(root, Path(scratch) / "server", theme=shot.theme) as url,
            notebook_page(url, "panel.ipynb", width=shot.width + 200, height=TALL) as page,
        ):
            page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
            run_all_cells(page)
            panel = page.locator(".alab-panel")
            panel.wait_for(timeout=PATIENCE)
            fit_width(page, shot.width)
            shot.act(page)
            page.mouse.move(2, 2)  # no button looks touched
            path = folder / f"{name}.png"
            panel.screenshot(path=path, animations="disabled")
    return path


def fit_width(page: Page, width: int) -> None:
    """Make the window as wide as the panel needs to be `width` pixels wide; the rest of the page has a fixed width."""
    box = page.locator(".alab-panel").bounding_box()
    assert box is not None
    assert page.viewport_size is not None
    around = page.viewport_size["width"] - round(box["width"])
    page.set_viewport_size({"width": width + around, "height": TALL})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SHOTS), metavar="NAME", help=f"of {', '.join(SHOTS)}")
    folder = ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name in parser.parse_args().names:
        print(take(name, SHOTS[name], folder))


if __name__ == "__main__":
    main()
