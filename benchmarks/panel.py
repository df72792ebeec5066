"""What the panel costs: from click to first token on screen, and while nine columns stream.

    python benchmarks/panel.py [--rounds 7] [--output benchmarks/results]

Writes panel.md. Everything runs in one JupyterLab, in one Chromium, on the demo model with base and eight adapters: each
round asks the same prompt through the panel and through `lab.compare` in a cell, in turns, the cache of finished columns
empty before each. Needs what the browser tests need.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from jupyterlab_page import (  # noqa: E402
    json_from_kernel,
    jupyterlab,
    notebook_page,
    run_all_cells,
    run_in_kernel,
    write_notebook,
)
from record import describe_machine  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

OPEN = """
import time

from adapterlab import AdapterLab

lab = AdapterLab.demo()
for i in range(6):
    lab.add_adapter("lora", f"random{i}", r=8, init_lora_weights=False)
lab.set_adapter(None)

def ask(prompt, tokens):
    lab.clear_cache()
    seen = []
    started = time.perf_counter()
    lab.compare(prompt, max_new_tokens=tokens, on_token=lambda event: seen.append(time.perf_counter()))
    return seen[0] - started
"""
FEW, MANY = 8, 64
PATIENCE = 120_000
# From the click on Generate until text stands in a column that is being written, by the page's own clock.
WATCH = """panel => { window.firstText = new Promise(resolve => {
    let clicked = 0;
    panel.addEventListener('click', event => { clicked ||= performance.now() }, {capture: true, once: true});
    const look = () => { for (const text of panel.querySelectorAll('.alab-writing'))
        if (clicked && text.textContent) { observer.disconnect();
            requestAnimationFrame(() => resolve((performance.now() - clicked) / 1000)); return } };
    const observer = new MutationObserver(look);
    observer.observe(panel, {subtree: true, childList: true, characterData: true}) }) }"""


@dataclass(frozen=True)
class Round:
    """Seconds. first: to the first token, in a cell and on screen. streamed: nine columns, without and with the panel."""

    first_in_cell: float
    first_on_screen: float
    streamed_in_cell: float
    streamed_in_panel: float


def run_rounds(page: Page, count: int) -> list[Round]:
    panel = page.locator(".alab-panel")
    panel.get_by_role("button", name="Sampling").click()
    one_round(panel, "Which colour is the sea?")  # warm
    return [one_round(panel, f"Question {number}: why is the sky blue at noon?") for number in range(1, count + 1)]


def one_round(panel: Locator, prompt: str) -> Round:
    page = panel.page
    first_in_cell = json_from_kernel(page, "", f"ask({prompt!r}, {FEW})")
    first_on_screen = through_panel(panel, prompt, FEW)
    run_in_kernel(page, f"ask({prompt!r}, {MANY})")
    streamed_in_cell = slowest(page)
    through_panel(panel, prompt, MANY)
    return Round(first_in_cell, first_on_screen, streamed_in_cell, slowest(page))


def through_panel(panel: Locator, prompt: str, tokens: int) -> float:
    """Ask through the panel; gives the seconds from click to text when all columns have ended."""
    page = panel.page
    number = json_from_kernel(page, "lab.clear_cache()", "len(lab.history)") + 1
    panel.get_by_label("New tokens").fill(str(tokens))
    panel.get_by_label("Prompt", exact=True).fill(prompt)
    panel.evaluate(WATCH)
    panel.get_by_role("button", name="Generate", exact=True).click()
    seconds: float = page.evaluate("window.firstText")
    panel.locator(f'.alab-asked-line[data-shown="{number}"]').wait_for(timeout=PATIENCE)
    return seconds


def slowest(page: Page) -> float:
    """Seconds of the last comparison, from its prompt to its last token."""
    seconds: Any = json_from_kernel(page, "", "max(g.seconds for g in lab.last.generations)")
    return float(seconds)


def markdown(rounds: Sequence[Round], machine: dict[str, str]) -> str:
    above = [1000 * (r.first_on_screen - r.first_in_cell) for r in rounds]
    cost = [r.streamed_in_panel / r.streamed_in_cell - 1 for r in rounds]
    lines = [
        "# What the panel costs",
        "",
        f"Written by `benchmarks/panel.py` on {datetime.now(timezone.utc):%Y-%m-%d %H:%M UTC}. {len(rounds)} rounds, base "
        "and eight adapters on the demo model, JupyterLab and Chromium on the same machine, one core left to the browser.",
        "",
        "| machine |  |",
        "| --- | ---: |",
        *(f"| {key} | {value} |" for key, value in machine.items()),
        "",
        "| medians | target | measured (lowest to highest round) |",
        "| --- | ---: | ---: |",
        f"| first token in a cell, `on_token` |  | {_spread([1000 * r.first_in_cell for r in rounds], ' ms')} |",
        f"| first token on screen, from the click |  | {_spread([1000 * r.first_on_screen for r in rounds], ' ms')} |",
        f"| click to screen above the model's own | ≤ 150 ms | {_spread(above, ' ms')} |",
        f"| nine columns of {MANY} tokens in a cell |  | {_spread([r.streamed_in_cell for r in rounds], ' s', 2)} |",
        f"| the same through the panel |  | {_spread([r.streamed_in_panel for r in rounds], ' s', 2)} |",
        f"| what streaming into the panel adds | ≤ 5 % | {_spread([100 * c for c in cost], ' %', 1)} |",
    ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], unit: str, digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f}{unit} ({min(values):.{digits}f} to {max(values):.{digits}f}{unit})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the panel against the same calls in a cell.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds starts at 1")
    with TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        root.mkdir()
        write_notebook(root / "panel.ipynb", OPEN, "lab.show()")
        with (
            jupyterlab(root, Path(scratch) / "server") as url,
            notebook_page(url, "panel.ipynb", width=1400, height=2600) as page,
        ):
            run_all_cells(page)
            rounds = run_rounds(page, asked.rounds)
    asked.output.mkdir(parents=True, exist_ok=True)
    text = markdown(rounds, describe_machine())
    (asked.output / "panel.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
