"""Strings of strangers stay strings: in HTML, SVG, Markdown, YAML, JSON and Python that the lab writes.

Each string of `HOSTILE` goes through each sink, once as it is and once as a harmless one of the same shape. Both pages must
have the same elements with the same attributes, and the string must be found among the text, whole.
"""

from __future__ import annotations

import ast
import base64
import html
import io
import json
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mistune
import pandas as pd
import pytest
from fakelab import HOSTILE as MARKUP
from fakelab import FakeLab
from huggingface_hub import ModelCard
from standins import tiny_llama

from adapterlab import AdapterLab, AdapterLabError, Comparison, Generation, TrainingRun
from adapterlab.app import app_cell
from adapterlab.cards import make_card
from adapterlab.columns import Column
from adapterlab.inspection import summary_html
from adapterlab.pagetext import escape, readable
from adapterlab.plots import (
    draw_svg,
    plot_delta_norms,
    plot_divergence,
    plot_memory,
    plot_overlap,
    plot_parameters,
    plot_ranks,
    plot_training,
)
from adapterlab.plots.glyphs import visible
from adapterlab.preflight import Preflight
from adapterlab.render import comparison_html, comparison_page, mark_words
from adapterlab.runs import history_frame, ranks_frame
from adapterlab.widgets import build_panel
from adapterlab.widgets.charts import ranks_table
from adapterlab.widgets.code import call_code, column_literal, compare_code
from adapterlab.widgets.data_form import data_files, pasted_examples
from adapterlab.widgets.header import notice_html, status_html
from adapterlab.widgets.own_trainer import trainer_code
from adapterlab.widgets.pictures import abilities_html
from adapterlab.widgets.results import files_html
from adapterlab.widgets.rows import facts_html
from adapterlab.widgets.state import Notice, Row, Shown
from adapterlab.widgets.text import result_html, sampling_words, text_html, tokens_html
from adapterlab.widgets.train_run import Track, head_html
from adapterlab.widgets.trust import verdict_html

HOSTILE = {
    "markup": MARKUP,
    "script": "</script><script>window.hacked=1</script>",
    "style": "</style><style>*{display:none}</style>",
    "page": "</body></html><base href=//evil.example><meta http-equiv=refresh content=0>",
    "comments": "<!-- --!> <![CDATA[x]]> ]]> <?php x ?> -->",
    "double quote": '"><svg/onload="window.hacked=1">',
    "single quote": "' onmouseover='window.hacked=1' x='`",
    "open tag": "<img src=x onerror=window.hacked=1 ",
    "entities": "&lt;b&gt; &amp;amp; &#60;b&#x3e; &quot &notit; &",
    "address": "javascript:window.hacked=1 https://evil.example/x.js",
    "formula": "$x^2$ and $$y$$ \\(z\\) \\[w\\] $5 or $6",
    "python": "'\"\"\"\\ {x} {{y}} {0} %s \\n \\u0041 \\N{DASH} '''",
    "newlines": "one\ntwo\r\nthree\rfour\ttabbed",
    "controls": "a\x00b\x07c\x1b[31md\x08\x7fe\x85f\x9bg",
    "half characters": "a\ud800b\udfffc\udc80",
    "no characters": "a\ufffeb\uffffc\U0001ffffd\ufdd0",
    "direction": "abc\u202egnp.exe\u202c \u2066in\u2069 \u200fout",
    "separators": "a\u2028b\u2029c\u200bd\ufeffe",
    "letters": "Zu\u0308\u0489\u0315 \U0001f3f4\u200d\u2620 \u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \U0001f3f4",
    "templates": "{{7*7}} ${7*7} <%= 7*7 %> #{7*7} {% x %}",
    "markdown": "# head | **b** [l](javascript:1) ![p](http://evil.example/p.png) `c` ~~s~~ <https://evil.example> ***",
    "fence": "```\n~~~\n    code\n\n---\n\n# head",
    "yaml": "---\nlicense: mit\n---\n!!python/object/apply:os.system [x] &a *a {b: [c, null, yes, 1e3]} # @",
    "long": "<b>" * 33_333,
    "blanks": "  led and trailed  ",
}
ALL = " ".join(text for key, text in HOSTILE.items() if key != "long")  # where each alone would take too long


@pytest.fixture(params=HOSTILE)
def hostile(request: pytest.FixtureRequest) -> str:
    return HOSTILE[request.param]


def harmless(text: str) -> str:
    """A string of the same words and lines, in letters that mean nothing."""
    return re.sub(r"\S", "x", text)


# -- reading a page ----------------------------------------------------------------------------------------------------

WORDS = {"title", "aria-label", "data-column", "href"}  # attributes that say something of the data


SIGN = "▸"  # stands in a text where it leaves the base's


class Page(HTMLParser):
    """What stands in it: `shape`, its elements with their attributes, and `text`; `said`: what attributes say."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.shape: list[Any] = []
        self.text, self.said = "", []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append((tag, [(key, None if key in WORDS else value) for key, value in attrs]))
        self.said += [value or "" for key, value in attrs if key in WORDS]

    def handle_endtag(self, tag: str) -> None:
        self.shape.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.shape.append("a comment")

    def handle_decl(self, decl: str) -> None:
        self.shape.append(f"!{decl}")

    def handle_pi(self, data: str) -> None:
        self.shape.append("an instruction")

    def unknown_decl(self, data: str) -> None:
        self.shape.append("a declaration")

    def handle_data(self, data: str) -> None:
        self.text += data


def check(sink: Callable[[str], str], text: str, expected: str | None = None) -> Page:
    """Fail if `text` is anything but text in what `sink` makes of it, or is not there whole."""
    source = sink(text)
    source.encode()  # or no message could bring it to the page
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", source)
    page = Page(source)
    assert page.shape == Page(sink(harmless(text))).shape
    found = readable(text) if expected is None else expected
    assert found in page.text.replace(SIGN, "") or found in page.said
    return page


# -- a comparison that says it everywhere ------------------------------------------------------------------------------


def generation(column: str, text: str, note: str, *, base: bool = False) -> Generation:
    return Generation(
        column=column,
        asked=() if base else ((note, 1.0),),
        prompt_index=0,
        prompt=note,
        text=text,
        token_ids=(1, 2),
        tokens=(text, note),
        logprobs=(-1.0, -2.0),
        leads=(1.0, 1.0),
        finish_reason=note,
        seconds=1.0,
        active_adapters=() if base else (note,),
        multipliers=() if base else (1.0,),
        logit_shift=1.0,
        weights_digest=note,
        note=note,
        base_logprobs=(-1.5, -0.5),
        first_difference=None if base else 0,
    )


def comparison_of(text: str) -> Comparison:
    pair = [generation("base", "Plain base", text, base=True), generation(f"c{text}", text, text)]
    about = {"name": text, "dtype": text, "quantization": text, "device": text}
    settings = {"max_new_tokens": text, "temperature": text, "top_p": text, "top_k": text, "seed": text}
    return Comparison([text], [text], [(1,)], settings, about, pair, created=text)


def concatenation_of(text: str) -> Comparison:
    other = comparison_of(text)
    other.settings = {"seed": text}
    return Comparison.concat([comparison_of(text), other], labels=[f"a{text}", f"b{text}"])


def spoken(text: str) -> Generation:
    return generation(text, text, text)


BASE_SAID = generation("base", "Plain base", "note", base=True)

PAGES: dict[str, Callable[[str], str]] = {
    "comparison": lambda text: comparison_html(comparison_of(text)),
    "comparison in a cell": lambda text: comparison_of(text)._repr_html_(),
    "concatenation": lambda text: comparison_html(concatenation_of(text)),
    "exported page": lambda text: comparison_page(comparison_of(text)),
    "card, no marks": lambda text: text_html(spoken(text), BASE_SAID, "none"),
    "card, words": lambda text: text_html(spoken(text), BASE_SAID, "words"),
    "card, likelihood": lambda text: text_html(spoken(text), BASE_SAID, "likelihood"),
    "foot of a card": lambda text: result_html(spoken(text)),
    "foot of a blind card": lambda text: result_html(spoken(text), blind=True),
    "status line": lambda text: status_html(f"{text} · 39 k · fp32"),
    "notice": lambda text: notice_html(Notice("error", text, text, about=text)),
    "error": lambda text: notice_html(Notice.from_error(ValueError(text))),
    "row": lambda text: facts_html(Row("a", text, 1, 1, 0.1, text, obstacles={"blend": text}), False),
    "verdict": lambda text: verdict_html([verdict_row(text, 0.1), verdict_row(text, float("nan"))]),
    "abilities": lambda text: abilities_html(abilities_of(re.sub("[\ud800-\udfff]", "\ufffd", text))),
    "training": lambda text: head_html(Track(text, total=3)),
    "ranks": lambda text: ranks_table(ranks_of(text)),
    "summary": lambda text: summary_html(text, summary_of(text)),
    "preflight": lambda text: preflight_of(text)._repr_html_(),
    "run": lambda text: run_of(text)._repr_html_(),
    "closed lab": lambda text: closed_html(text),
}


def run_of(text: str) -> TrainingRun:
    history = history_frame([{"step": 1, "loss": 1.0, "learning_rate": 0.1}])
    return TrainingRun(text, text, history, ranks_frame([], []), 1, 2, 3.0, error=text, data=text)


def closed_html(text: str) -> str:
    lab = AdapterLab(tiny_llama())
    lab.name = text
    lab.close()
    return lab._repr_html_()


def verdict_row(text: str, error: float) -> dict[str, Any]:
    agree = dict.fromkeys(("weights_agree", "active_agree", "tokens_agree", "agrees"), True)
    return {"column": text, "note": text, "logprob_error": error, **agree}


def abilities_of(text: str) -> pd.DataFrame:
    rows = [
        {"adapter": text, "capability": "batch", "possible": True, "reason": ""},
        {"adapter": text, "capability": text, "possible": False, "reason": text},
    ]
    return pd.DataFrame(rows, dtype=object)


def ranks_of(text: str) -> pd.DataFrame:
    module = pd.Series([text, text], dtype=object)  # pandas' own type for texts takes no halves of characters
    return pd.DataFrame({"layer": [0, 1], "module": module, "rank": [2, 1], "init_r": [3, 3]})


def summary_of(text: str) -> pd.DataFrame:
    row = {"adapter": text, "method": text, "r": 2, "parameters": 3, "megabytes": 0.1, "share": 0.1, "multiplier": 1.0}
    frame = pd.DataFrame([{**row, "active": True, "trainable": False, "status": text}], dtype=object)
    return frame.astype({"megabytes": float, "share": float})


def preflight_of(text: str) -> Preflight:
    flight = Preflight(text, "LORA", 1, 2, 3, problems=[text], notes=[text])
    flight.tell(text, [("tensors", text, text, text)], problem=True)
    return flight


@pytest.mark.parametrize("sink", PAGES)
def test_html(sink: str) -> None:
    for key, text in HOSTILE.items():
        if key != "long" or sink in ("exported page", "card, words", "notice", "preflight"):
            check(PAGES[sink], text)


def test_tokens_are_shown_as_python_writes_them(hostile: str) -> None:
    check(lambda text: tokens_html(spoken(text)), hostile, repr(hostile)[1:-1])


def test_an_exported_page_loads_nothing_and_runs_nothing(hostile: str) -> None:
    page = Page(comparison_page(comparison_of(hostile)))
    tags = {item[0] for item in page.shape if isinstance(item, tuple)}
    keys = {key for item in page.shape if isinstance(item, tuple) for key, _ in item[1]}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    assert not keys & {"src", "href", "srcset", "action", "background"}
    assert not any(key.startswith("on") for key in keys)
    policy = [dict(item[1]) for item in page.shape if item[0] == "meta"]
    assert {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'",
    } in policy
    assert "url(" not in comparison_page(comparison_of("x"))
    assert "@import" not in comparison_page(comparison_of("x"))


@pytest.mark.parametrize("sink", ["comparison", "summary", "preflight", "concatenation", "run", "closed lab"])
def test_no_formula_is_made_of_dollars_in_a_cell(sink: str) -> None:
    """JupyterLab typesets what is between two of them, in all output but that of this class."""
    first = Page(PAGES[sink](HOSTILE["formula"])).shape[0]
    assert first == ("div", [("class", "tex2jax_ignore mathjax_ignore")])


def test_a_lab_as_a_cells_result(full_lab: AdapterLab) -> None:
    def shown(text: str) -> str:
        full_lab.name = text
        return full_lab._repr_html_()

    for text in HOSTILE.values():
        check(shown, text)


# -- what a page can hold ----------------------------------------------------------------------------------------------


def test_readable_changes_only_what_a_page_cannot_hold() -> None:
    for code in [
        *range(0x3000),
        *range(0xD7F0, 0xE010),
        *range(0xFDC0, 0xFE00),
        *range(0xFFF0, 0x10010),
        0x1FFFE,
        0x10FFFF,
    ]:
        letter, shown = chr(code), readable(f"a{chr(code)}b")[1:-1]
        if code in (0x0A, 0x09):
            assert shown == letter
        elif code == 0x0D:
            assert shown == "\n"
        elif code < 0x20 or code == 0x7F:  # Unicode's own pictures of them
            assert shown == chr(0x2400 + code if code < 0x20 else 0x2421)
        else:
            unseen = any(code in one for one in (range(0x80, 0xA0), range(0x202A, 0x202F), range(0x2066, 0x206A)))
            no_letter = 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE
            assert shown == ("\ufffd" if unseen or no_letter else letter)
    assert readable("a\r\nb\rc\n\rd") == "a\nb\nc\n\nd"


def test_readable_text_stays_as_it_is(hostile: str) -> None:
    assert readable(readable(hostile)) == readable(hostile)
    assert html.unescape(escape(hostile)) == readable(hostile)
    assert not set(escape(hostile)) & set("<>\"'")


def test_a_word_said_a_thousand_times_is_marked_at_once() -> None:
    """difflib takes minutes for it, and a small model that has lost its way says just that."""
    began = time.perf_counter()
    assert mark_words("x " * 5000 + "end", "y x " * 2500) == f"<ins>{'x ' * 5000}end</ins>"
    marked = mark_words("so " + "x " * 5000 + "end", "so " + "x " * 5000 + "other", removed=True)
    assert marked == "so " + "x " * 5000 + "<del>other </del><ins>end</ins>"
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(("words", "pairs"), [(300, 90_000), (320, 102_400)])
def test_both_ways_of_marking_say_the_whole_text(words: int, pairs: int) -> None:
    text, base = "x " * words, "x " * (words // 2) + "y " + "x " * (words // 2)
    assert words * words == pairs
    marked = mark_words(text, base, removed=True)
    assert Page(re.sub("<del>.*?</del>", "", marked)).text == text
    assert Page(re.sub("<ins>.*?</ins>", "", marked)).text.split() == base.split()


# -- the panel ---------------------------------------------------------------------------------------------------------


def all_widgets(widget: Any) -> list[Any]:
    return [widget, *(inner for child in getattr(widget, "children", ()) for inner in all_widgets(child))]


class Drive:
    """A panel on a lab in which every string is `text`, clicked through. `page`: all HTML that it has shown."""

    def __init__(self, text: str) -> None:
        self.lab = FakeLab({text: ("LORA", 8, 1000), "ada": ("ADALORA", 4, 500)}, name=text)
        self.lab.adapters[text].status = text
        self.lab.obstacles = {text: {"batch": text, "save": text, "train": text}}
        self.lab.answers = {text: f"{text} and more", "base": text}
        self.lab.history.append(comparison_of(text))
        self.page, self.codes = "", []
        self.panel = build_panel(self.lab)  # type: ignore[arg-type]
        self.click(text)
        self.panel.close()

    def click(self, text: str) -> None:
        panel, do = self.panel, self.panel.do
        panel.results.code_fold.open = panel.results.files_fold.open = True
        self.look()
        panel.state.prompt = panel.state.system = text
        for marks in ("words", "likelihood", "none"):
            self.after(do.mark, marks)
            self.after(do.generate)
        self.after(do.use, text)
        self.lab.flight = preflight_of(text)
        self.after(do.check, lambda: (text, None))
        self.after(do.load, lambda: (text, text))
        self.after(do.save, lambda: (text, text))
        self.after(do.add, lambda: ("lora", f"{text}-new", {"target_modules": [text]}))
        self.after(do.blend, lambda: {text: 0.5, "ada": 0.5})
        self.after(do.verify)
        self.after(do.set_trainable, text)
        panel.state.found = ((text, text),)
        panel.state.lesson = text
        panel.save_form.open_for(text)
        self.lab.fail_with = AdapterLabError(text)
        self.after(do.generate)
        self.lab.fail_with = ValueError(text)
        self.after(do.delete, text)

    def after(self, call: Callable[..., object], *arguments: Any) -> None:
        call(*arguments)
        self.lab.wait()
        self.look()

    def look(self) -> None:
        for widget in all_widgets(self.panel):
            state = json.dumps(widget.get_state(), ensure_ascii=False, default=str)
            state.encode()  # as Jupyter sends it
            value = getattr(widget, "value", None)
            if type(widget).__name__ == "HTML" and "<style>" not in value:
                self.page += value + "\n"
        self.codes.append(self.panel.state.code)


def test_the_panel() -> None:
    typed = readable(ALL)  # what a page holds is what can be typed there
    drive = Drive(typed)
    page = Page(drive.page)
    other = Page(Drive(harmless(typed)).page)
    assert page.shape == other.shape
    assert typed in page.text


@pytest.mark.parametrize("stranger", [ALL, HOSTILE["long"]], ids=["all", "long"])
def test_a_strangers_comparison_in_the_panel(stranger: str) -> None:
    """Of a saved lab, say: nothing in it has been checked to be more than text."""

    def shown(text: str) -> str:
        lab = FakeLab({"pirate": ("LORA", 8, 1000)})
        lab.history.append(comparison_of(text))
        panel = build_panel(lab)  # type: ignore[arg-type]
        panel.results.files_fold.open = True
        pages = []
        for widget in all_widgets(panel):
            json.dumps(widget.get_state(), ensure_ascii=False, default=str).encode()
            if type(widget).__name__ == "HTML" and "<style>" not in widget.value:
                pages.append(widget.value)
        panel.close()
        return "\n".join(pages)

    check(shown, stranger)


def test_sampling_in_words_takes_what_a_file_holds(hostile: str) -> None:
    assert hostile in sampling_words(
        {"max_new_tokens": hostile, "temperature": hostile, "top_p": None, "seed": hostile}
    )
    assert sampling_words({"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9, "top_k": 5, "seed": 3}) == (
        "8 new tokens, temperature 0.8, top-p 0.9, top-k 5, seed 3"
    )


# -- Python that is shown ----------------------------------------------------------------------------------------------


def literals(code: str) -> list[Any]:
    """The arguments of the last call in the code, as values."""
    call = ast.parse(code).body[-1].value  # type: ignore[attr-defined]
    return [*map(ast.literal_eval, call.args), *(ast.literal_eval(keyword.value) for keyword in call.keywords)]


def test_code_says_what_was_asked(hostile: str) -> None:
    page = Page(f"<pre>{escape(call_code('lab.load_adapter', hostile, adapter_name=hostile))}</pre>")
    assert literals(page.text) == [hostile, hostile]
    column = Column.of({hostile: 0.5, "b": 1.0})
    code = compare_code([{"role": "system", "content": hostile}], [column], {"max_new_tokens": 3})
    assert literals(code) == [[{"role": "system", "content": hostile}], [{hostile: 0.5, "b": 1.0}], 3]
    assert ast.literal_eval(repr(column_literal(Column.of(hostile)))) == hostile
    calls = [node for node in ast.walk(ast.parse(trainer_code(hostile))) if isinstance(node, ast.Call)]
    assert sum(hostile in [a.value for a in call.args if isinstance(a, ast.Constant)] for call in calls) == 3


def test_code_of_pasted_examples_says_the_examples(hostile: str) -> None:
    for pasted in (json.dumps([[hostile, hostile]]), hostile.replace("=>", "")):
        try:
            examples = pasted_examples(pasted)
        except AdapterLabError:
            continue  # it looks like JSON and is none
        if "too long" in examples.code:
            continue
        (assigned,) = ast.parse(examples.code).body
        assert ast.literal_eval(assigned.value) == examples.value  # type: ignore[attr-defined]


def test_a_number_that_is_none_is_no_example() -> None:
    with pytest.raises(AdapterLabError, match="hold NaN, which is no JSON"):
        pasted_examples('[{"prompt": "a", "completion": NaN}]')


def test_the_apps_cell_says_what_was_typed(hostile: str) -> None:
    tree = ast.parse(app_cell(hostile, [hostile], hostile))
    said = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert said.count(hostile) == 3


def test_file_names_that_are_no_text_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fine <b>.txt").write_text("x")
    try:
        (tmp_path / "caf\udce9.txt").write_text("x")  # Latin-1, as an older disk has it
        (tmp_path / "two\nlines\x1b.txt").write_text("x")
    except OSError:  # a file system that takes no such name
        pass
    assert data_files() == ["fine <b>.txt"]


# -- exports -----------------------------------------------------------------------------------------------------------


def test_json_comes_back_as_it_went(hostile: str, tmp_path: Path) -> None:
    comparison = comparison_of(hostile)
    written = comparison.to_json(tmp_path / "c.json")
    written.read_text(encoding="utf-8")
    assert json.loads(written.read_bytes())["prompts"] == [hostile]
    back = Comparison.from_json(written)
    assert back == comparison
    assert back.to_json(tmp_path / "d.json").read_bytes() == written.read_bytes()


def test_the_page_is_written(hostile: str, tmp_path: Path) -> None:
    page = Page(comparison_of(hostile).to_html(tmp_path / "c.html").read_text(encoding="utf-8"))
    assert readable(hostile) in page.text


def test_downloads_hold_it_all(hostile: str) -> None:
    comparison = comparison_of(hostile)
    source = files_html(Shown(comparison))
    assert Page(source).shape == Page(files_html(Shown(comparison_of(harmless(hostile))))).shape
    found = {}
    for kind, content in re.findall(r'href="data:([a-z/]+);charset=utf-8;base64,([^"]*)"', source):
        found[kind] = base64.b64decode(content).decode()
    assert set(found) == {"text/csv", "application/json", "text/html"}
    assert json.loads(found["application/json"])["prompts"] == [hostile]
    assert readable(hostile) in Page(found["text/html"]).text
    if "\x00" not in hostile and "\r" not in hostile:  # of which pandas' reader makes something else
        table = pd.read_csv(io.StringIO(found["text/csv"]), keep_default_na=False)
        assert table["prompt"][0] == re.sub("[\ud800-\udfff]", "\ufffd", hostile)


def test_texts_that_no_frame_can_hold_are_told_in_frames(tmp_path: Path) -> None:
    frame = comparison_of("a\ud800").to_frame()
    assert list(frame["prompt"]) == ["a\ufffd", "a\ufffd"]
    assert comparison_of("a\ud800").tokens()["token"][1] == "a\ufffd"


# -- model cards -------------------------------------------------------------------------------------------------------


def card_of(lab: AdapterLab, text: str) -> ModelCard:
    """The card of an adapter of which everything that somebody else can have written is `text`."""
    adapters = lab._adapters
    record, config = adapters.records["pirate"], adapters.mounts.adapters["pirate"].config
    history = history_frame([{"step": 1, "loss": 2.0, "eval_loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.0}])
    run = TrainingRun(
        "pirate", "LoRA", history, ranks_frame([], []), steps=2, total_steps=3, seconds=1.0, error=text,
        settings={"lr_scheduler_type": text}, data=text, eval_data=text,
    )  # fmt: skip
    record.runs[:] = [run, run]
    record.source, record.loaded = f"equals {text}", None
    config.target_modules, config.revision, config.rank_pattern = [text], text, {text: 3}
    config.base_model_name_or_path = None
    adapters.base_path = f"/{text.replace('/', '')}"
    adapters.model.model_tags = [text]
    about = {**lab._about(), "dtype": text, "quantization": text}
    return make_card(adapters, "pirate", about, text)


MARKDOWN = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "math"])


def test_a_model_card_says_strangers_words_and_does_nothing_by_them(full_lab: AdapterLab) -> None:
    for text in HOSTILE.values():
        card, other = card_of(full_lab, text), card_of(full_lab, harmless(text))
        str(card).encode()
        again = ModelCard(str(card))
        assert again.data.to_dict() == card.data.to_dict(), "the front matter reads back as it was meant"
        assert text in again.data.tags
        page, plain = Page(MARKDOWN(again.text)), Page(MARKDOWN(ModelCard(str(other)).text))
        assert page.shape == plain.shape
        words = " ".join(readable(text).split())
        assert " ".join(page.text.split()).count(words) >= 10
        for block in re.findall(r"```python\n(.*?)\n```", again.text, re.DOTALL):
            said = [node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
            assert text in said


# -- SVG ---------------------------------------------------------------------------------------------------------------

SVG_TAGS = {"svg", "g", "defs", "path", "pattern", "use", "text", "tspan", "clippath", "rect", "image"}


def frame_of(*rows: dict[str, Any]) -> pd.DataFrame:
    """A frame whose texts may be anything: pandas' own type for them takes no halves of characters."""
    values = {key: [row[key] for row in rows] for key in rows[0]}
    return pd.DataFrame({k: pd.Series(v, dtype=object if isinstance(v[0], str) else None) for k, v in values.items()})


def norms_of(text: str) -> pd.DataFrame:
    row = {"layer": 0, "module": text, "norm": 1.0, "relative_norm": 0.1, "effective_rank": 1.0, "rank": 2}
    return frame_of(row, {**row, "layer": 1, "relative_norm": float("nan")})


def overlap_of(text: str) -> pd.DataFrame:
    chance = {"output_chance": 0.1, "input_chance": 0.1}
    return frame_of({"layer": 0, "module": text, "output_overlap": 0.5, "input_overlap": 0.5, **chance})


def sizes_of(text: str) -> pd.DataFrame:
    row = {"owner": "base", "kind": "weights", "dtype": text, "parameters": 1000, "bytes": 4000, "bytes_on_disk": 4000}
    return frame_of(row, {**row, "owner": text, "parameters": 10}, {**row, "owner": text, "kind": "modules_to_save"})


def memory_of(text: str) -> pd.DataFrame:
    row = {"owner": "base", "kind": "weights", "device": text, "bytes": 4000, "source": "measured"}
    return frame_of(row, {**row, "owner": text, "kind": text, "bytes": 400}, {**row, "owner": "process"})


def estimate_of(text: str) -> pd.DataFrame:
    row = {"case": text, "owner": "base", "kind": "weights", "parameters": 10, "bytes": 40, "source": "computed"}
    return frame_of(row, {**row, "owner": text, "kind": text})


def words_of(text: str) -> pd.DataFrame:
    row = {"column": text, "position": 0, "token": text, "kl": 0.1}
    return frame_of(row, {**row, "position": 1, "token": "x"})


def training_of(text: str) -> Any:
    return plot_training(pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}), title=text)


PICTURES: dict[str, Callable[[str], Any]] = {
    "parameters": lambda text: plot_parameters(sizes_of(text)),
    "memory": lambda text: plot_memory(memory_of(text)),
    "estimate": lambda text: plot_memory(estimate_of(text)),
    "norms": lambda text: plot_delta_norms(norms_of(text)),
    "overlap": lambda text: plot_overlap(overlap_of(text)),
    "ranks": lambda text: plot_ranks(ranks_of(text), note=text),
    "words": lambda text: plot_divergence(words_of(text)),
    "training": training_of,
}


SHORT = "<b a=\"'&]]>$x^2$\x00\u202e"  # of all kinds, in so few letters that no picture cuts it


@pytest.mark.parametrize("picture", PICTURES)
def test_svg(picture: str) -> None:
    text = SHORT
    drawn = [Page(draw_svg(lambda one=one: PICTURES[picture](one), one)) for one in (text, harmless(text))]  # type: ignore[misc]
    page, other = (
        {(item[0], *(name for name, _ in item[1])) for item in one.shape if isinstance(item, tuple)} for one in drawn
    )
    assert page <= other | {("tspan", "x", "y"), ("tspan", "style")}
    assert {item[0] for item in page} <= SVG_TAGS
    assert not any(isinstance(item, str) and not item.startswith("/") for item in drawn[0].shape)
    seen, wanted = ("".join(one.split()) for one in (drawn[0].text, visible(text)))
    assert wanted in seen
    assert drawn[0].said[:1] == [re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)]


@pytest.mark.parametrize("picture", PICTURES)
def test_a_name_of_a_hundred_thousand_letters_is_cut_in_a_picture(picture: str) -> None:
    page = Page(draw_svg(lambda: PICTURES[picture]("<b>" * 33_333), "long"))
    assert len(page.text) < 100_000
