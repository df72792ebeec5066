from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import standins
import torch

from adapterlab import AdapterLab, AdapterLabError, Comparison, TokenEvent
from adapterlab.generation import token_texts
from adapterlab.render import mark_words

SCRIPT = "<script>alert(1)</script>&<b>"


@pytest.fixture
def comparison(full_lab: AdapterLab) -> Comparison:
    return full_lab.compare(["What is the moon?", "Who are you?"], [None, "pirate", {"poet": 0.5}], max_new_tokens=6)


def test_frame_and_lookup(comparison: Comparison) -> None:
    frame = comparison.to_frame()
    wanted = [
        "prompt", "column", "text", "new_tokens", "seconds", "tokens_per_second", "finish_reason",
        "active_adapters", "logit_shift", "batched",
    ]  # fmt: skip
    assert list(frame.columns)[: len(wanted)] == wanted
    assert list(frame["column"]) == ["base", "pirate", "poet × 0.5"] * 2
    assert list(frame["prompt"]) == ["What is the moon?"] * 3 + ["Who are you?"] * 3
    assert comparison.columns == ["base", "pirate", "poet × 0.5"]
    assert comparison["pirate", 1].prompt == "Who are you?"
    assert comparison[{"poet": 0.5}, 0].column == "poet × 0.5"
    assert comparison[None, 0].column == "base"
    with pytest.raises(AdapterLabError, match="say which"):
        comparison["pirate"]
    with pytest.raises(AdapterLabError, match="there are 'base', 'pirate'"):
        comparison["wide"]


def test_logprobs_and_shift_against_plain_transformers(full_lab: AdapterLab, comparison: Comparison) -> None:
    tokens = comparison.tokens()
    for (index, column), rows in tokens.groupby(["prompt_index", "column"]):
        generation = comparison[column, index]
        prompt = comparison.prompt_ids[index]
        ids = torch.tensor([[*prompt, *generation.token_ids]])
        answers = torch.tensor(generation.token_ids)[:, None]
        logits = {}
        for which in (None, dict(generation.asked)):
            with full_lab.using(which) as model, torch.no_grad():
                logits[bool(which)] = model(ids).logits[0, len(prompt) - 1 : -1]
        mine = torch.log_softmax(logits.get(True, logits[False]), -1).gather(1, answers).flatten()
        base = torch.log_softmax(logits[False], -1).gather(1, answers).flatten()
        assert rows["logprob"].tolist() == pytest.approx(mine.tolist(), abs=1e-4)
        assert rows["base_logprob"].tolist() == pytest.approx(base.tolist(), abs=1e-4)
        shift = (logits.get(True, logits[False])[0] - logits[False][0]).abs().max().item()
        assert generation.logit_shift == pytest.approx(shift, abs=1e-4)


def test_base_logprobs_after_the_lab_is_closed_are_nan(comparison: Comparison, full_lab: AdapterLab) -> None:
    full_lab.close()
    assert comparison.tokens()["base_logprob"].isna().all()
    assert comparison.tokens()["logprob"].notna().all()


def test_json_gives_the_same_comparison_back(comparison: Comparison, tmp_path: Path) -> None:
    path = comparison.to_json(tmp_path / "deep" / "c.json")
    again = Comparison.from_json(path)
    assert again == comparison
    assert again.tokens()["base_logprob"].notna().all(), "base logprobs are in the file"
    assert again._repr_html_() == comparison._repr_html_()
    assert [p.name for p in path.parent.iterdir()] == ["c.json"], "nothing is left beside it"


@pytest.mark.parametrize("write", ["to_json", "to_html"])
def test_a_file_at_home(comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert getattr(comparison, write)("~/x") == tmp_path / "home" / "x"
    assert (tmp_path / "home" / "x").is_file()
    assert list(Path().iterdir()) == []
    if write == "to_json":
        assert Comparison.from_json("~/x") == comparison


def test_what_names_no_file_is_said(comparison: Comparison) -> None:
    for call in (comparison.to_json, comparison.to_html, Comparison.from_json):
        for path in (5, None, "~nobody-here/x"):
            with pytest.raises(AdapterLabError, match="names no file"):
                call(path)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: "[1, 2]", "no comparison"),
        (lambda c: "{", "can't be read"),
        (lambda c: json.dumps({**c, "version": 99}), "format version 99"),
        (lambda c: json.dumps({**c, "generations": [{}]}), "damaged"),
        (lambda c: json.dumps({**c, "generations": 3}), "damaged"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "prompts"}), "damaged"),
        (lambda c: json.dumps({**c, "prompts": [], "prompt_ids": []}), "names a prompt that is not there"),
        (lambda c: json.dumps({**c, "generations": [{**c["generations"][0], "text": 3}]}), "text is no text"),
        (lambda c: json.dumps({**c, "generations": [{**c["generations"][0], "tokens": []}]}), "differ in length"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(comparison: Comparison, tmp_path: Path, edit: Any, said: str) -> None:
    content = json.loads(comparison.to_json(tmp_path / "c.json").read_text())
    (tmp_path / "bad.json").write_text(edit(content))
    with pytest.raises(AdapterLabError, match=said):
        Comparison.from_json(tmp_path / "bad.json")


def test_an_unwritable_path_is_said(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterLabError, match="can't be written"):
        comparison.to_json(tmp_path / "file" / "c.json")


def test_concat_puts_labs_side_by_side(full_lab: AdapterLab) -> None:
    comparison = full_lab.compare("Hello", [None, "pirate"], max_new_tokens=3)
    both = Comparison.concat([comparison, comparison], labels=["fp32", "8bit"])
    assert both.columns == ["fp32 · base", "fp32 · pirate", "8bit · base", "8bit · pirate"]
    assert both["8bit · pirate"].text == comparison["pirate"].text
    with pytest.raises(AdapterLabError, match="different labels"):
        Comparison.concat([comparison, comparison])
    with pytest.raises(AdapterLabError, match="same prompts"):
        Comparison.concat([comparison, full_lab.compare("Other", [None], max_new_tokens=1)], labels=["a", "b"])
    with pytest.raises(AdapterLabError, match="at least one"):
        Comparison.concat([])


def test_html_escapes_whatever_came_from_outside(lab: AdapterLab, tmp_path: Path) -> None:
    comparison = lab.compare(SCRIPT, max_new_tokens=2)
    comparison.generations = [
        type(g)(**{**g.__dict__, "text": SCRIPT, "column": SCRIPT, "finish_reason": SCRIPT, "weights_digest": SCRIPT})
        for g in comparison.generations
    ]
    comparison.model["name"] = SCRIPT
    for html in (comparison._repr_html_(), comparison.to_html(tmp_path / "c.html").read_text()):
        assert "<script" not in html
        assert "&lt;script&gt;" in html


def test_words_that_base_did_not_say_are_marked() -> None:
    assert mark_words("the moon, matey!", "the moon.") == "the <ins>moon, matey!</ins>"
    assert mark_words("same words", "same words") == "same words"
    assert mark_words("a < b", "a > b") == "a <ins>&lt;</ins> b"
    assert mark_words("  led\nby space", "led by space") == "  led\nby space"


def test_tokens_come_as_they_grow(full_lab: AdapterLab) -> None:
    events: list[TokenEvent] = []
    comparison = full_lab.compare("Wörter: 雪 und ☃", [None, "pirate"], max_new_tokens=20, on_token=events.append)
    for generation in comparison.generations:
        mine = [event for event in events if event.column == generation.column]
        assert [event.token_id for event in mine] == list(generation.token_ids)
        assert [event.position for event in mine] == list(range(generation.new_tokens))
        assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == generation.finish_reason
        assert "".join(event.text for event in mine) == generation.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"seed": "x"}, "seed='x'"),
        ({"num_beams": 4}, "num_beams: beam search"),
        ({"num_return_sequences": 2}, "one column is one text"),
        ({"do_sample": True}, "set temperature"),
        ({"max_length": 9}, "set max_new_tokens"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"repetition_penality": 1.0}, "did you mean 'repetition_penalty'"),
        ({"top_k": -1, "top_p": 7}, "top_p=7 .*top_k=-1"),
        ({"chat": "yes"}, "chat='yes'"),
    ],
    ids=str,
)
def test_nonsense_settings_are_named(full_lab: AdapterLab, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterLabError, match=said):
        full_lab.compare("Hello", **settings)
    assert full_lab.history == []


def test_an_answer_longer_than_the_decoders_context() -> None:
    lab = AdapterLab(standins.tiny_bart(), tokenizer=standins.tiny_tokenizer(seq2seq=True))
    with pytest.raises(AdapterLabError, match="decoder's context is 128: set max_new_tokens to 128 or less"):
        lab.compare("Hello", max_new_tokens=129)
    assert lab.history == []
    longest = lab.compare("Hello", max_new_tokens=128, eos_token_id=standins.VOCABULARY - 1)
    assert longest["base"].new_tokens == 128


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "prompt is empty"),
        ("  \n", "prompt is empty"),
        ([], "no prompt"),
        (None, "no prompt"),
        (["fine", ""], "prompt is empty"),
        ([{"role": "user"}], "needs 'role' and 'content'"),
        ([{"role": "user", "content": " "}], "user turn is empty"),
        ("word " * 200, "context is 128: shorten it"),
        ("word " * 12, "set max_new_tokens to"),
    ],
    ids=repr,
)
def test_prompts_that_can_not_be_used(full_lab: AdapterLab, prompt: Any, said: str) -> None:
    with pytest.raises(AdapterLabError, match=said):
        full_lab.compare(prompt, max_new_tokens=100)


def test_chat_templates(full_lab: AdapterLab) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    chat = full_lab.compare(messages, [None], max_new_tokens=1)
    assert chat.rendered == ["<s><|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n<|assistant|>\n"]
    assert chat.prompt_ids[0].count(standins.BOS) == 1, "the template's own <s> is not doubled"
    user = full_lab.compare("Hello", [None], max_new_tokens=1)
    assert user.rendered == ["<s><|user|>\nHello</s>\n<|assistant|>\n"]
    plain = full_lab.compare("Hello", [None], max_new_tokens=1, chat=False)
    assert plain.rendered == ["Hello"]
    assert plain.prompt_ids[0][0] == standins.BOS
    two = full_lab.compare([messages, "Hello"], [None], max_new_tokens=1)
    assert two.rendered == [*chat.rendered, *user.rendered]


def test_a_base_model_completes_plainly() -> None:
    lab = AdapterLab(standins.tiny_opt(), tokenizer=standins.tiny_tokenizer())
    assert lab.compare("Once", max_new_tokens=1).rendered == ["Once"]
    with pytest.raises(AdapterLabError, match="no chat template"):
        lab.compare([{"role": "user", "content": "Hello"}])
    with pytest.raises(AdapterLabError, match="no chat template"):
        lab.compare("Hello", chat=True)


def test_sequence_to_sequence_models_compare_and_verify(tmp_path: Path) -> None:
    from peft import LoraConfig

    lab = AdapterLab(standins.tiny_t5(), tokenizer=standins.tiny_tokenizer(seq2seq=True))
    lab.add_adapter(LoraConfig(target_modules=["q", "v"], init_lora_weights=False), "a")
    comparison = lab.compare("Translate this", max_new_tokens=8)
    with lab.using("a") as model:
        plain = model.generate(torch.tensor([comparison.prompt_ids[0]]), max_new_tokens=8, do_sample=False)
    assert tuple(plain[0, 1:].tolist()) == comparison["a"].token_ids
    assert lab.verify()["agrees"].all()
    assert comparison.tokens()["base_logprob"].notna().all()


def test_columns_of_a_comparison_are_checked(full_lab: AdapterLab) -> None:
    for columns, said in [
        (["nobody"], "No adapter named 'nobody'"),
        ("pirate", r"columns=\['pirate'\]"),
        ({"pirate": 1}, "columns is a list"),
        ([None, "base"], "'base' stands twice"),
        ([], "there is no column"),
    ]:
        with pytest.raises(AdapterLabError, match=said):
            full_lab.compare("Hello", columns)  # type: ignore[arg-type]


def test_generate_without_a_column_is_what_acts_now(full_lab: AdapterLab) -> None:
    full_lab.set_adapter({"pirate": 0.5})
    assert full_lab.generate("Hello", max_new_tokens=2).asked == (("pirate", 0.5),)
    full_lab.disable_adapters()
    assert full_lab.generate("Hello", max_new_tokens=2).column == "base"
    assert full_lab.generate("Hello", "poet", max_new_tokens=2).active_adapters == ("poet",)
    assert full_lab.last is None, "only comparisons are in the history"


class TestTokenTexts:
    """A tokenizer of Llama's kind: it drops the space that begins a text, and spreads characters over bytes."""

    PIECES = (b"\xe2\x96\x81I", b"\xe2\x96\x81am", b"\xe2\x96\x81", b"\xe2\x9a", b"\x93", b"here")

    def decode(self, ids: Sequence[int]) -> str:
        return (
            b"".join(self.PIECES[i] for i in ids)
            .replace(b"\xe2\x96\x81", b" ")
            .decode(errors="replace")
            .removeprefix(" ")
        )

    def test_joined_they_are_the_text(self) -> None:
        ids = range(len(self.PIECES))
        texts = token_texts(self.decode, list(ids))
        assert texts == ("I", " am", " ", "", "⚓", "here")
        assert "".join(texts) == self.decode(ids) == "I am ⚓here"

    def test_what_never_becomes_whole_is_shown_at_the_end(self) -> None:
        assert "".join(token_texts(self.decode, [0, 3])) == self.decode([0, 3])
