"""One batch, one adapter per row: each column's tokens are those of the same column alone in plain PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import PeftModel
from test_mounts import architectures, method_configs

from adapterlab import AdapterLab
from adapterlab.rows import Rows, RowsError

IN_TURN = {"loha", "lokr", "oft", "hra", "ln_tuning", "embed", "head", "tokens", "moe"}


def same_up_to_ties(mine: Any, plain: list[int]) -> bool:
    """Equal tokens, or a first difference where the winner led by no more than rounding."""
    for i, (a, b) in enumerate(zip(mine.token_ids, plain)):
        if a != b:
            return mine.leads[i] < 1e-4
    return len(mine.token_ids) == len(plain)


@pytest.mark.parametrize(("builder", "kind", "targets", "feedforward"), architectures())
def test_columns_of_a_batch_equal_plain_peft_alone(
    builder: str, kind: str, targets: list[str], feedforward: list[str], tmp_path: Path
) -> None:
    make = getattr(standins, builder)
    lab = AdapterLab(make(), tokenizer=standins.tiny_tokenizer(seq2seq=kind == "seq2seq"))
    configs = method_configs(builder, targets, feedforward)
    for seed, (name, config) in enumerate(configs.items()):
        lab.load_adapter(standins.write_adapter(tmp_path / name, make(), config, seed=seed), name)
    comparison = lab.compare(["Hello there", "What is the moon made of?"], max_new_tokens=10)
    start = 1 if kind == "seq2seq" else None
    for name in [None, *configs]:
        plain: Any = make() if name is None else PeftModel.from_pretrained(make(), tmp_path / name).eval()
        for index, ids in enumerate(comparison.prompt_ids):
            generation = comparison[name, index]
            out = plain.generate(input_ids=torch.tensor([ids]), max_new_tokens=10, do_sample=False)
            tokens = out[0, start or len(ids) :].tolist()
            assert same_up_to_ties(generation, tokens), (name, index)
            assert generation.batched is (name not in IN_TURN), (name, generation.note)
            assert generation.batched or generation.note.startswith("run in turn: ")
    assert lab.verify()["agrees"].all()
    lab.set_adapter(None)
    inputs = {"input_ids": torch.tensor([comparison.prompt_ids[0]])}
    inputs |= {"decoder_input_ids": torch.tensor([[0, 5]])} if kind == "seq2seq" else {}
    with torch.no_grad():
        assert torch.equal(lab.model(**inputs).logits, make()(**inputs).logits), "nothing stays in the base"


def test_blends_and_multipliers_are_rows_too(full_lab: AdapterLab) -> None:
    columns: list[Any] = [None, {"pirate": 0.5}, "pirate", {"pirate": 1.5}, {"wide": 0.4, "poet": 0.6}, ["ada", "wide"]]
    comparison = full_lab.compare("Tell me", columns, max_new_tokens=12)
    assert all(g.batched for g in comparison.generations)
    for column, generation in zip(columns, comparison.generations):
        with full_lab.using(column) as model:
            out = model.generate(torch.tensor([comparison.prompt_ids[0]]), max_new_tokens=12, do_sample=False)
        assert same_up_to_ties(generation, out[0, len(comparison.prompt_ids[0]) :].tolist())
    assert full_lab.verify()["agrees"].all()


def test_a_sweep_of_one_adapter_stacks_nothing(full_lab: AdapterLab) -> None:
    from adapterlab import Column

    columns = [Column(), *(Column.of({"pirate": m}) for m in (0.5, 1.0, 1.5))]
    rows = Rows(full_lab._adapters.mounts, columns, 1, {1})
    layer = full_lab._adapters.mounts.adapters["pirate"].layers["model.layers.0.self_attn.q_proj"]
    own = {p.data_ptr() for _, p in layer.named_parameters()}
    (span,) = rows.layers["model.layers.0.self_attn.q_proj"].spans
    assert len(span.A) == 3
    assert {span.A.data_ptr(), span.B.data_ptr()} <= own


def test_finished_columns_and_prompts_leave_the_batch(full_lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = type(full_lab.model).forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        sizes.append(out.logits.shape[0])
        return out

    whole = full_lab.compare(["Hi", "Tell me more"], [None, "pirate", "wide", "poet"], max_new_tokens=30)
    ends = [int(g.token_ids[min(3, g.new_tokens - 1)]) for g in whole.generations[:3]]
    monkeypatch.setattr(type(full_lab.model), "forward", counting)
    shorter = full_lab.compare(
        ["Hi", "Tell me more"], [None, "pirate", "wide", "poet"], max_new_tokens=30, eos_token_id=[2, *ends]
    )
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    for long, short in zip(whole.generations, shorter.generations):
        assert long.token_ids[: short.new_tokens] == short.token_ids


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_the_cut_into_batches_changes_no_text(rows: int, full_lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    import adapterlab.generation as generation

    prompts = ["Hi", "Tell me more about it", "What is the moon?", "Yes"]
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.9, "seed": 4}
    together = full_lab.compare(prompts, ["pirate", None, "poet"], **settings)
    assert {g.batch_size for g in together.generations} == {12}
    longest = max(map(len, together.prompt_ids))
    room = 2 * rows * generation.cache_bytes(full_lab.model, longest + 8)
    monkeypatch.setattr(generation, "free_memory", lambda model: room)
    full_lab.clear_cache()
    cut = full_lab.compare(prompts, ["pirate", None, "poet"], **settings)
    assert max(g.batch_size for g in cut.generations) <= rows
    assert [g.token_ids for g in cut.generations] == [g.token_ids for g in together.generations]


def test_exchanged_rows_are_noticed_by_digest_and_verify(
    lab: AdapterLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mix-up that batching makes possible: the stack's rows swapped, names and tensors of the adapters intact."""
    from peft import LoraConfig

    for seed, name in enumerate(["left", "right"], start=1):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        lab.load_adapter(standins.write_adapter(tmp_path / name, standins.tiny_llama(), config, seed=seed), name)
    honest = lab.compare("Hello", max_new_tokens=6)
    find = Rows._find

    def mixed_up(self: Rows, mounts: Any) -> Any:
        layers = find(self, mounts)
        for layer in layers.values():
            (span,) = layer.spans
            span.A, span.B = span.A.flip(0), span.B.flip(0)
        return layers

    monkeypatch.setattr(Rows, "_find", mixed_up)
    lab.clear_cache()
    swapped = lab.compare("Hello", max_new_tokens=6)
    assert swapped["left"].text == honest["right"].text, "the swap really changed who speaks"
    assert swapped["left"].weights_digest not in {g.weights_digest for g in honest.generations}
    verdict = lab.verify(swapped).set_index("column")
    assert verdict["agrees"].to_dict() == {"base": True, "left": False, "right": False}
    assert not verdict.loc["left", "tokens_agree"]


def test_rows_that_can_not_be_told_apart_run_in_turn(full_lab: AdapterLab, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = full_lab.compare("Hello", [None, "pirate"], max_new_tokens=4)

    def lost(self: Rows, x: torch.Tensor) -> torch.Tensor:
        raise RowsError("an input of another shape")

    monkeypatch.setattr(Rows, "split", lost)
    full_lab.clear_cache()
    alone = full_lab.compare("Hello", [None, "pirate"], max_new_tokens=4)
    assert [g.token_ids for g in alone.generations] == [g.token_ids for g in expected.generations]
    assert alone["pirate"].note == "run in turn: an input of another shape"
    assert not alone["pirate"].batched


@pytest.mark.parametrize("kind", ["fsmt", "rwkv"])
def test_models_whose_rows_could_be_taken_for_positions_run_in_turn(kind: str, tmp_path: Path) -> None:
    """As many columns as the prompt has tokens: then the shapes alone do not tell."""
    import transformers
    from peft import LoraConfig

    def make() -> Any:
        if kind == "rwkv":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64}
            config: Any = transformers.RwkvConfig(**standins._token_ids(), **sizes, context_length=128)
            return standins._randomised(transformers.RwkvForCausalLM, config, 0)
        sides = ("encoder", "decoder")
        sizes = {"d_model": 32, "src_vocab_size": 320, "tgt_vocab_size": 320, "max_position_embeddings": 128}
        for side in sides:
            sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
        tokens = {**standins._token_ids(), "decoder_start_token_id": standins.EOS, "forced_eos_token_id": None}
        tokens.pop("vocab_size")
        config = transformers.FSMTConfig(langs=["en", "de"], **sizes, **tokens)
        return standins._randomised(transformers.FSMTForConditionalGeneration, config, 0)

    targets = ["key", "value"] if kind == "rwkv" else r".*encoder\.layers.*(q_proj|fc1)"
    tokenizer = standins.tiny_tokenizer(seq2seq=kind == "fsmt")
    lab = AdapterLab(make(), tokenizer=tokenizer)
    for seed in range(1, len(tokenizer("The moon")["input_ids"])):
        config = LoraConfig(r=4, target_modules=targets)
        lab.load_adapter(standins.write_adapter(tmp_path / f"a{seed}", make(), config, seed=seed), f"a{seed}")
    comparison = lab.compare("The moon", max_new_tokens=5, chat=False)
    ids = torch.tensor([comparison.prompt_ids[0]])
    assert ids.shape[1] == len(comparison.generations) > 2
    for generation in comparison.generations:
        plain = make()
        if generation.column != "base":
            plain = PeftModel.from_pretrained(plain, tmp_path / generation.column).eval()
        out = plain.generate(input_ids=ids, max_new_tokens=5, do_sample=False, num_beams=1)  # FSMT's are 5
        assert same_up_to_ties(generation, out[0, 1 if kind == "fsmt" else ids.shape[1] :].tolist())
        assert generation.note.startswith("run in turn: ")
    if kind == "fsmt":  # in transformers 5.15 its steps are not what one forward over them gives
        told = {"output_logits": True, "return_dict_in_generate": True}
        said = make().generate(input_ids=ids, max_new_tokens=5, do_sample=False, num_beams=1, **told)
        with torch.no_grad():
            again = make()(input_ids=ids, decoder_input_ids=said.sequences[:, :-1], use_cache=False).logits
        steps_agree = torch.allclose(torch.stack(said.logits, dim=1), again, atol=1e-3)
        assert lab.verify(comparison)["agrees"].tolist() == 4 * [steps_agree]


def test_8bit_rows_share_a_batch_only_at_threshold_0(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    folder = standins.write_model(tmp_path / "m", standins.tiny_llama(**sizes), standins.tiny_tokenizer())
    leaky = AdapterLab(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32)
    leaky.add_adapter("lora", "a", init_lora_weights=False)
    assert "llm_int8_threshold=6" in leaky.compare("Hello", max_new_tokens=2)["a"].note
    sound = AdapterLab(folder, quantization="8bit", dtype=torch.float32)
    sound.add_adapter("lora", "a", init_lora_weights=False)
    assert sound.compare("Hello", max_new_tokens=2)["a"].batched


@pytest.mark.parametrize("extra", [{"encoder_repetition_penalty": 1.5}, {"encoder_no_repeat_ngram_size": 2}])
def test_processors_that_keep_all_prompts_keep_all_rows(full_lab: AdapterLab, extra: dict[str, Any]) -> None:
    columns = [None, "pirate", "wide"]
    early = full_lab.compare("Hello there", columns, max_new_tokens=8)["pirate"].token_ids[2]
    settings = {"max_new_tokens": 8, "eos_token_id": early, **extra}
    together = full_lab.compare("Hello there", columns, **settings)
    full_lab.clear_cache()
    alone = [full_lab.compare("Hello there", [column], **settings).generations[0] for column in columns]
    assert [g.token_ids for g in together.generations] == [g.token_ids for g in alone]


@pytest.mark.parametrize("kind", ["linear attention", "recurrence", "a forced first token"])
def test_prompts_of_other_lengths_never_change_a_text_that_reads_padding(kind: str) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "linear attention":
        kinds = ["linear_attention", "full_attention"]
        config: Any = transformers.MiniMaxConfig(
            **standins._token_ids(),
            **sizes,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            layer_types=kinds,
            block_size=4,
        )
        model: Any = standins._randomised(transformers.MiniMaxForCausalLM, config, 0)
    elif kind == "recurrence":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64}
        config = transformers.RwkvConfig(**standins._token_ids(), **sizes, context_length=128)
        model = standins._randomised(transformers.RwkvForCausalLM, config, 0)
    else:
        model = standins.tiny_llama()
        model.generation_config.forced_bos_token_id = 77
    lab = AdapterLab(model, tokenizer=standins.tiny_tokenizer())
    prompts = ["a b c d e f g h i j k", "hello there", "x"]
    together = lab.compare(prompts, [None], max_new_tokens=6)
    lab.clear_cache()
    alone = [lab.compare(prompt, [None], max_new_tokens=6).generations[0] for prompt in prompts]
    assert [g.token_ids for g in together.generations] == [g.token_ids for g in alone]
