"""The command: `adapterlab demo` answers one question side by side in the terminal, then opens the notebook; `adapterlab
app` serves the panel as a page of its own."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    from adapterlab.comparison import Comparison, Generation, TokenEvent
    from adapterlab.lab import AdapterLab

NOTEBOOK = "quickstart.ipynb"
COPY_NAME = "adapterlab-quickstart.ipynb"
NARROWEST = 24
GAP = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own) and return its exit code.

    0: done. 2: something the user can mend, said in a sentence on stderr. 130: interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except AdapterLabError as error:
        print(f"adapterlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nadapterlab: interrupted.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from adapterlab import __version__

    parser = argparse.ArgumentParser(
        prog="adapterlab", description="See side by side what each adapter does to a language model."
    )
    parser.add_argument("--version", action="version", version=f"adapterlab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="a real small chat model and its adapters answer one question; then the quickstart notebook opens",
        description="A real 135M chat model answers one question as itself and through each of its adapters. Then "
        "JupyterLab opens on the quickstart notebook, unless --headless is given or nobody is at a terminal.",
    )
    demo.add_argument("--prompt", help="the question (default: the demo's first)")
    demo.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most this many per column (64)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="dice for sampling (0)")
    demo.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    demo.add_argument("--headless", action="store_true", help="print the comparison and end")
    demo.set_defaults(run=run_demo)
    app = commands.add_parser(
        "app",
        help="the panel as a page of its own, without a notebook",
        description="Serve the panel with Voila, on this machine only, until Ctrl-C. Each visitor gets a lab of their own.",
    )
    app.add_argument(
        "model", metavar="MODEL", help="a folder or Hub id of a model or an adapter; demo for the demo model"
    )
    app.add_argument(
        "--adapter", action="append", default=[], metavar="PATH", help="a folder or Hub id; may be given several times"
    )
    app.add_argument("--quantization", choices=["8bit", "4bit"], help="hold the base in 8 or 4 bits")
    app.add_argument("--port", type=int, metavar="N", help="where to listen (a free port from 8866 on)")
    app.add_argument("--no-browser", action="store_true", help="only say the address")
    app.set_defaults(run=run_app)
    return parser


def run_demo(arguments: argparse.Namespace) -> int:
    """Print the demo's comparison; then, at a terminal and without `--headless`, open the notebook."""
    from adapterlab import AdapterLab
    from adapterlab.demo import DEMO_QUESTIONS

    interactive = sys.stdout.isatty() and not arguments.headless
    prompt = DEMO_QUESTIONS[0] if arguments.prompt is None else arguments.prompt
    lab = AdapterLab.demo()
    try:
        print_comparison(
            lab,
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            seed=arguments.seed,
            temperature=arguments.temperature,
        )
    finally:
        lab.close()
    return open_notebook() if interactive else 0


def run_app(arguments: argparse.Namespace) -> int:
    """Serve the panel until it is interrupted."""
    from adapterlab.app import serve_app

    return serve_app(
        arguments.model, arguments.adapter, arguments.quantization, arguments.port, not arguments.no_browser
    )


def print_comparison(lab: AdapterLab, prompt: str, **settings: Any) -> Comparison:
    """Generate and print the columns side by side; until they are there, stderr shows how far each has come."""
    print(lab.status())
    print(f"\nAsked: {_printable(prompt)}\n", flush=True)
    comparison = lab.compare(prompt, on_token=_Progress(), **settings)
    print("\n" + side_by_side(comparison, shutil.get_terminal_size((100, 24)).columns), flush=True)
    return comparison


class _Progress:
    """A line on stderr for each column when it has ended; at a terminal the text of one column runs by meanwhile."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._texts: dict[str, str] = {}
        self._shown: str | None = None  # columns grow together, and only one fits the line

    def __call__(self, event: TokenEvent) -> None:
        text = self._texts[event.column] = self._texts.get(event.column, "") + event.text
        if self._shown is None:
            self._shown = event.column
        if event.finish_reason:
            self._shown = None if self._shown == event.column else self._shown
            end = f"  {event.column}: {event.position + 1} tokens, {event.finish_reason}\n"
        elif self._live and self._shown == event.column:
            room = max(shutil.get_terminal_size((100, 24)).columns - len(event.column) - 5, 0)
            end = f"  {event.column}: {_printable(text)[-room:] if room else ''}"
        else:
            return
        # Return to the line's start and clear it, so that the tail of the text seems to run through the line.
        print(("\r\x1b[K" if self._live else "") + end, end="", file=sys.stderr, flush=True)


def side_by_side(comparison: Comparison, width: int) -> str:
    """The first prompt's columns as text, `width` characters wide; as many beside one another as stay readable."""
    generations = [g for g in comparison.generations if g.prompt_index == 0]
    beside = max(1, min(len(generations), (width + GAP) // (NARROWEST + GAP)))
    each = max((width + GAP) // beside - GAP, 1)
    columns = [_column_lines(generation, each) for generation in generations]
    blocks = [_beside(columns[start : start + beside], each) for start in range(0, len(columns), beside)]
    return "\n\n".join(blocks) + "\n"


def _column_lines(generation: Generation, width: int) -> list[str]:
    facts = [
        f"{generation.new_tokens} tokens, {generation.tokens_per_second:.1f}/s, {generation.finish_reason}",
        f"weights {generation.weights_digest[:8]}",
        f"logit shift {generation.logit_shift:.3g}",
    ]
    proof = [line for fact in facts for line in _wrap(fact, width)]
    return [*_wrap(generation.column, width), "─" * width, *_wrap(generation.text, width), "", *proof]


def open_notebook() -> int:
    """Open JupyterLab on a copy of the quickstart notebook and stay until it ends; returns its exit code."""
    if util.find_spec("jupyterlab") is None:
        raise AdapterLabError(
            "The notebook needs JupyterLab: run pip install 'adapterlab[lab]', then adapterlab demo again."
        )
    path = copy_notebook(Path.cwd())
    print(f"\nOpening {path} in JupyterLab. Ctrl-C here ends it.", flush=True)
    command = [sys.executable, "-m", "jupyterlab", str(path)]
    # In a container one is usually root, which Jupyter refuses unless told; it listens on this machine only, with a token.
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    server = subprocess.Popen(command)
    while True:
        try:
            return server.wait()
        except KeyboardInterrupt:
            continue  # Jupyter heard it too: it asks before it ends its kernels, and may go on


def copy_notebook(folder: Path) -> Path:
    """The user's copy of the quickstart notebook, made now if there is none yet; an existing one is never touched.

    It lies in `folder`, or in the user's data folder where `folder` can't be written.
    """
    from platformdirs import user_data_path

    source = notebook_source()
    for place in (folder, user_data_path("adapterlab")):
        path = place / COPY_NAME
        if path.exists():
            return path
        try:
            place.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(source.read_bytes())
            return path
        except OSError as error:
            reason = error
    raise AdapterLabError(f"The notebook could not be copied to {path} ({reason}): change into a folder of your own.")


def notebook_source() -> Path:
    """The quickstart notebook as it came: in the repository beside the package, or where a wheel put it."""
    beside = Path(__file__).resolve().parent.parent / "notebooks"
    for path in (beside / NOTEBOOK, Path(sys.prefix) / "share" / "adapterlab" / NOTEBOOK):
        if path.is_file():
            return path
    raise AdapterLabError(f"This installation of AdapterLab has no {NOTEBOOK}: install it again.")


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    lines = []
    for line in text.splitlines() or [""]:
        lines += textwrap.wrap(_printable(line), width) or [""]
    return lines


def _printable(text: str) -> str:
    # What a model writes may hold escape codes, which a terminal would obey.
    return "".join(character if character.isprintable() else " " for character in text)


def _beside(columns: list[list[str]], width: int) -> str:
    from itertools import zip_longest

    gap = " " * GAP
    return "\n".join(
        gap.join(f"{line:<{width}}" for line in lines).rstrip() for lines in zip_longest(*columns, fillvalue="")
    )


if __name__ == "__main__":
    sys.exit(main())
