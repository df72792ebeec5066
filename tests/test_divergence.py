"""`divergence` and `evaluate` against plain transformers with plain PEFT, column by column."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standins
import torch
from torch.distributions import Categorical, kl_divergence

from adapterlab import AdapterLab, AdapterLabError, Comparison, scoring

TEXT = "What is the moon made of, and who says so? I do."
TEXTS = ["The moon.", "A cup of tea, please.", "Who says so, and why should anybody believe it?", "I do."]
BUILDERS: dict[str, tuple[list[str], list[str]]] = {
    "tiny_opt": (["q_proj", "fc2"], ["k_proj", "fc2"]),
    "tiny_llama": (["q_proj", "down_proj"], ["v_proj", "down_proj"]),
    "tiny_gpt2": (["c_attn", "mlp.c_proj"], ["c_attn", "mlp.c_proj"]),
    "tiny_mamba": (["in_proj", "x_proj"], ["in_proj"]),
    "tiny_t5": (["q", "wo"], ["v", "wo"]),
}


def configs(builder: str) -> dict[str, Any]:
    from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig

    targets, scaled = BUILDERS[builder]
    fan = {"fan_in_fan_out": builder == "tiny_gpt2"}
    made = {
        "lora": LoraConfig(r=4, lora_alpha=6, target_modules=targets, **fan),
        "ada": AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=targets, **fan),
        "ia3": IA3Config(target_modules=scaled, feedforward_modules=scaled[-1:], **fan),
    }
    if builder == "tiny_llama":
        made["dora"] = LoraConfig(r=3, use_dora=True, target_modules=targets)
        made["loha"] = LoHaConfig(r=2, target_modules=targets)  # no row of a batch: it runs in turn
    return made


@functools.cache
def base_model(builder: str) -> Any:
    return getattr(standins, builder)(tie_word_embeddings=False)


@pytest.fixture(scope="module", params=BUILDERS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    """A model's builder and folders of adapters for it, written by plain PEFT."""
    root = tmp_path_factory.mktemp(request.param)
    made = configs(request.param).items()
    return request.param, {
        name: standins.write_adapter(root / name, base_model(request.param), config, seed=seed)
        for seed, (name, config) in enumerate(made)
    }


def open_lab(builder: str, folders: Mapping[str, Path]) -> AdapterLab:
    tokenizer = standins.tiny_tokenizer(seq2seq=builder == "tiny_t5")
    lab = AdapterLab(copy.deepcopy(base_model(builder)), tokenizer=tokenizer)
    for name, folder in folders.items():
        lab.load_adapter(folder, name)
    return lab


def plain(builder: str, folder: Path | None) -> Any:
    from peft import PeftModel

    model = copy.deepcopy(base_model(builder))
    return model.eval() if folder is None else PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def plain_logprobs(model: Any, ids: list[int], source: list[int] | None = None) -> torch.Tensor:
    """log p of every token of the vocabulary before each of `ids[1:]`, or of `ids` where an encoder reads `source`."""
    if source is not None:
        start = model.config.decoder_start_token_id
        decoder = torch.tensor([[start, *ids[:-1]]])
        return model(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits[0].log_softmax(-1)
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)


def inputs(lab: AdapterLab, builder: str, text: str = TEXT) -> tuple[dict[str, Any], list[int], list[int] | None]:
    """Keywords for `divergence`, the ids of the text, and the encoder's."""
    if builder == "tiny_t5":
        tokenizer: Any = lab.tokenizer
        return (
            {"prompt": "What is that?"},
            tokenizer(text_target=text)["input_ids"],
            tokenizer("What is that?")["input_ids"],
        )
    return {}, lab.tokenizer(text)["input_ids"], None  # type: ignore[misc]


@pytest.mark.parametrize("piece", [2048, 30], ids=["whole", "pieces"])
def test_every_number_is_plain_pefts(
    kind: tuple[str, dict[str, Path]], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, folders = kind
    monkeypatch.setattr(scoring, "_PIECE_TOKENS", piece)
    lab = open_lab(builder, folders)
    lab.set_adapter("lora")
    keywords, ids, source = inputs(lab, builder)
    frame = lab.divergence(TEXT, **keywords)
    assert lab.active_adapters == {"lora": 1.0}, "the state is as before"
    assert list(dict.fromkeys(frame["column"])) == list(folders)
    targets = torch.tensor(ids if source else ids[1:])
    base = plain_logprobs(plain(builder, None), ids, source)
    for name, folder in folders.items():
        mine, rows = plain_logprobs(plain(builder, folder), ids, source), frame[frame["column"] == name]
        assert rows["token_id"].tolist() == targets.tolist()
        for column, logprobs in (("logprob", mine), ("base_logprob", base)):
            expected = logprobs.gather(1, targets[:, None])[:, 0]
            assert rows[column].tolist() == pytest.approx(expected.tolist(), abs=2e-4), (name, column)
        expected = kl_divergence(Categorical(logits=mine), Categorical(logits=base))
        assert rows["kl"].tolist() == pytest.approx(expected.tolist(), abs=2e-4)
        assert rows["kl"].mean() > 0.01, "the adapter acts, or this test shows nothing"
        for column, logprobs in (("rank", mine), ("base_rank", base)):
            order = logprobs.argsort(-1, descending=True)
            expected = (order == targets[:, None]).nonzero()[:, 1] + 1
            assert rows[column].tolist() == expected.tolist(), (name, column)


def test_evaluate_is_plain_cross_entropy(kind: tuple[str, dict[str, Path]]) -> None:
    builder, folders = kind
    lab = open_lab(builder, folders)
    seq2seq = builder == "tiny_t5"
    data: Any = [("Say it.", text) for text in TEXTS] if seq2seq else TEXTS
    frame = lab.evaluate(data).set_index("column")
    assert list(frame.index) == ["base", *folders]
    tokenizer: Any = lab.tokenizer
    for name, folder in {"base": None, **folders}.items():
        model, total, count = plain(builder, folder), 0.0, 0
        for text in TEXTS:  # as training has them: whole, with the token that ends them
            ids = tokenizer(text_target=text)["input_ids"] if seq2seq else [*tokenizer(text)["input_ids"], standins.EOS]
            source = tokenizer("Say it.")["input_ids"] if seq2seq else None
            targets = torch.tensor(ids if seq2seq else ids[1:])
            logprobs = plain_logprobs(model, ids, source).gather(1, targets[:, None])
            total, count = total - float(logprobs.sum()), count + len(targets)
        assert frame.loc[name, "tokens"] == count
        assert frame.loc[name, "texts"] == len(TEXTS)
        assert frame.loc[name, "nll"] == pytest.approx(total / count, abs=2e-4)
        assert frame.loc[name, "perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
        assert frame.loc[name, "perplexity_low"] <= frame.loc[name, "perplexity"] <= frame.loc[name, "perplexity_high"]
        assert frame.loc[name, "delta_nll"] == pytest.approx(frame.loc[name, "nll"] - frame.loc["base", "nll"])
    assert frame.loc["base", ["delta_nll", "delta_low", "delta_high"]].tolist() == [0, 0, 0]


def test_columns_share_one_forward_and_those_that_cannot_run_in_turn(
    adapter_folders: dict[str, Path], full_lab: AdapterLab
) -> None:
    calls = []
    full_lab.model.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    full_lab.divergence(TEXT)
    length = len(full_lab.tokenizer(TEXT)["input_ids"])  # type: ignore[misc]
    assert calls == [(1 + len(adapter_folders), length)]
    full_lab.add_adapter("loha", "apart", r=2, target_modules=["q_proj"])
    calls.clear()
    full_lab.divergence(TEXT)
    assert calls == [(1 + len(adapter_folders), length), (1, length)]


def test_a_blend_and_a_multiplier_are_columns_too(full_lab: AdapterLab) -> None:
    frame = full_lab.divergence(TEXT, [{"pirate": 0.0}, {"pirate": 0.5, "wide": -1}, "wide"][1:])
    assert list(dict.fromkeys(frame["column"])) == ["pirate × 0.5 + wide × -1", "wide"]
    ids = full_lab.tokenizer(TEXT)["input_ids"]  # type: ignore[misc]
    with full_lab.using({"pirate": 0.5, "wide": -1}) as model:
        expected = plain_logprobs(model, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    rows = frame[frame["column"] == "pirate × 0.5 + wide × -1"]
    assert rows["logprob"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_an_adapter_that_does_nothing_is_no_divergence(lab: AdapterLab) -> None:
    lab.add_adapter("lora", "fresh", target_modules=["q_proj"])
    frame = lab.divergence(TEXT)
    assert frame["kl"].max() == pytest.approx(0, abs=1e-6)
    assert (frame["rank"] == frame["base_rank"]).all()


def test_a_prompt_and_its_answer(full_lab: AdapterLab) -> None:
    """With a chat template: the answer's tokens alone have rows, behind the rendered prompt."""
    tokenizer: Any = full_lab.tokenizer
    frame = full_lab.divergence("It is rock.", ["pirate"], prompt="What is the moon?")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the moon?"}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    answer = tokenizer("It is rock.", add_special_tokens=False)["input_ids"]
    assert frame["token_id"].tolist() == answer
    assert frame["position"].tolist() == list(range(len(answer)))
    assert "".join(frame["token"]) == "It is rock."
    with full_lab.using("pirate") as model:
        expected = plain_logprobs(model, before + answer)[len(before) - 1 :].gather(1, torch.tensor(answer)[:, None])
    assert frame["logprob"].tolist() == pytest.approx(expected[:, 0].tolist(), abs=1e-4)


def test_a_comparison_is_read_by_each_column_itself(full_lab: AdapterLab) -> None:
    comparison = full_lab.compare(["Hi", "Who are you?"], max_new_tokens=8)
    frame = full_lab.divergence(comparison)
    tokens = comparison.tokens()
    for (column, index), rows in frame.groupby(["column", "prompt_index"]):
        expected = tokens[(tokens["column"] == column) & (tokens["prompt_index"] == index)]
        assert rows["token"].tolist() == expected["token"].tolist()
        assert rows["logprob"].tolist() == pytest.approx(expected["logprob"].tolist(), abs=1e-4)
        assert rows["base_logprob"].tolist() == pytest.approx(expected["base_logprob"].tolist(), abs=1e-4)
        marked = rows.loc[rows["first_difference"], "position"].tolist()
        place = comparison[column, index].first_difference
        assert marked == ([] if place is None else [place])
    assert set(frame["column"]) == set(full_lab.adapters)
    with full_lab.using("pirate") as model, torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(0.1)
    with pytest.raises(AdapterLabError, match="'pirate' spoke in this comparison with other weights"):
        full_lab.divergence(comparison)


def test_the_interval_is_that_of_the_mean(full_lab: AdapterLab) -> None:
    """Of many texts of one length, the bootstrap's interval is the normal one of the mean, about."""
    random = np.random.default_rng(0)
    ids = [{"input_ids": random.integers(7, 300, 9).tolist()} for _ in range(150)]
    frame = full_lab.evaluate(ids, [None, "pirate"]).set_index("column")
    each = {"base": [], "pirate": []}  # type: ignore[var-annotated]
    for name, values in each.items():
        with full_lab.using(None if name == "base" else name) as model:
            for row in ids:
                logprobs = plain_logprobs(model, row["input_ids"])
                values.append(-float(logprobs.gather(1, torch.tensor(row["input_ids"][1:])[:, None]).mean()))
    gaps = {"perplexity": each["pirate"], "delta": [a - b for a, b in zip(each["pirate"], each["base"])]}
    for name, values in gaps.items():
        half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
        low, high = frame.loc["pirate", f"{name}_low"], frame.loc["pirate", f"{name}_high"]
        if name == "perplexity":
            low, high = math.log(low), math.log(high)
        assert low == pytest.approx(np.mean(values) - half, abs=0.15 * half)
        assert high == pytest.approx(np.mean(values) + half, abs=0.15 * half)
    assert full_lab.evaluate(ids, [None, "pirate"]).set_index("column").equals(frame), (
        "the same seed, the same interval"
    )
    narrow = full_lab.evaluate(ids, [None, "pirate"], confidence=0.5).set_index("column")
    assert narrow.loc["pirate", "delta_high"] < frame.loc["pirate", "delta_high"]


def test_one_text_has_no_interval_and_no_base_no_difference(full_lab: AdapterLab) -> None:
    one = full_lab.evaluate(["Only one text."]).set_index("column")
    assert one[["perplexity_low", "perplexity_high", "delta_low"]].isna().all(axis=None)
    assert one.loc["pirate", "delta_nll"] != 0
    assert full_lab.evaluate(TEXTS, ["pirate"])["delta_nll"].isna().all()


def test_answers_alone_are_counted(full_lab: AdapterLab) -> None:
    pairs = [("What is the moon?", "A rock."), ("Who are you?", "Nobody.")]
    frame = full_lab.evaluate(pairs, [None])
    tokenizer: Any = full_lab.tokenizer
    answers = sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for _, answer in pairs)
    assert frame["tokens"].tolist() == [answers]


def test_the_order_and_the_company_of_texts_change_nothing(full_lab: AdapterLab) -> None:
    together = full_lab.evaluate(TEXTS, [None, "wide"])
    backwards = full_lab.evaluate(TEXTS[::-1], [None, "wide"])
    assert together["nll"].tolist() == pytest.approx(backwards["nll"].tolist(), abs=1e-5)


def test_a_comparison_of_other_labs_is_refused(full_lab: AdapterLab) -> None:
    comparison = full_lab.compare("Hi", max_new_tokens=2)
    both = Comparison.concat([comparison, comparison], ["one", "two"])
    with pytest.raises(AdapterLabError, match="several labs side by side"):
        full_lab.divergence(both)
    comparison.model["name"] = "another/model"
    with pytest.raises(AdapterLabError, match="was made on 'another/model'"):
        full_lab.divergence(comparison)


Call = Callable[[AdapterLab], object]
MISTAKES: dict[str, tuple[Call, str]] = {
    "no text": (lambda lab: lab.divergence(""), "The text is empty"),
    "a number": (lambda lab: lab.divergence(3), "neither a text nor a Comparison"),  # type: ignore[arg-type]
    "only base": (lambda lab: lab.divergence(TEXT, [None]), "names no adapter"),
    "unknown": (lambda lab: lab.divergence(TEXT, ["nobody"]), "'nobody'"),
    "too long": (lambda lab: lab.divergence("word " * 3000), "the model's context is"),
    "two prompts": (lambda lab: lab.divergence(TEXT, prompt=["a", "b"]), "2 prompts for one text"),
    "no data": (lambda lab: lab.evaluate([]), "has no rows"),
    "no share": (lambda lab: lab.evaluate(TEXTS, confidence=95), "confidence=95 is no share"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_and_change_nothing(full_lab: AdapterLab, mistake: str) -> None:
    call, words = MISTAKES[mistake]
    full_lab.set_adapter("poet")
    with pytest.raises(AdapterLabError, match=words):
        call(full_lab)
    assert full_lab.active_adapters == {"poet": 1.0}
    assert "poet" in full_lab.model.peft_config  # type: ignore[attr-defined]


@pytest.mark.parametrize("builder", ["tiny_llama", "tiny_t5"])
def test_tokens_that_the_base_lacks_are_said(builder: str) -> None:
    tokenizer = standins.tiny_tokenizer(seq2seq=builder == "tiny_t5")
    rows = base_model(builder).get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<{number}>" for number in range(rows - len(tokenizer) + 1)])
    last = tokenizer.convert_ids_to_tokens(rows)  # the one for which there is no row
    lab = AdapterLab(copy.deepcopy(base_model(builder)), tokenizer=tokenizer)
    lab.add_adapter("lora", "new")
    said = rf"token {rows}, where the base has {rows} rows of embeddings.*resize_token_embeddings"
    calls: tuple[Callable[[], object], ...] = (
        lambda: lab.divergence(f"A {last} sails.", prompt="What?"),
        lambda: lab.divergence("A ship.", prompt=f"{last}?"),
        lambda: lab.evaluate([("What?", f"A {last}"), (f"{last}?", "A ship.")]),
        lambda: lab.compare(f"A {last} sails."),
    )
    for call in calls:
        with pytest.raises(AdapterLabError, match=said):
            call()
    assert lab.history == []


def test_without_a_token_before_it_a_text_begins_untold() -> None:
    """A tokenizer that puts nothing in front, as GPT-2's: the first token has no row, and alone it is refused."""
    from tokenizers import processors

    tokenizer = standins.tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    lab = AdapterLab(copy.deepcopy(base_model("tiny_gpt2")), tokenizer=tokenizer)
    lab.add_adapter("lora", "fresh", target_modules=["c_attn"], fan_in_fan_out=True)
    ids = tokenizer(TEXT)["input_ids"]
    frame = lab.divergence(TEXT)
    assert frame["position"].tolist() == list(range(1, len(ids)))
    assert frame["token_id"].tolist() == ids[1:]
    with pytest.raises(AdapterLabError, match="nothing foretells it"):
        lab.divergence("a")


def test_a_lab_without_adapters_says_so(lab: AdapterLab) -> None:
    with pytest.raises(AdapterLabError, match="no column to hold against base"):
        lab.divergence(TEXT)
