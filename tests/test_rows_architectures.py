"""Columns of a batch against the same columns alone, on the ways in which models are built.

The oracle is a fresh model under plain PEFT (for blends: with the merged weights written out), asked without a KV cache:
one forward over the prompt and the lab's own tokens gives the scores from which each of them should have been chosen,
greedily or through transformers' own warpers and the shared noise. By induction the tokens are those of the column alone;
where the choice differs, the gap between the two scores must be rounding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from adapterlab import AdapterLab, Column
from adapterlab.comparison import Comparison, Generation
from adapterlab.sampling import compute_noise

pytestmark = [
    # plain PEFT, which writes the adapters here, takes the vector of a lora_bias for an incomplete shard
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor"),
    # and reads the rank pattern of an AdaLoRA as if it were a LoRA's
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]

TIE = 1e-4  # of the scores: what rounding may reach in fp32 on these models
PROMPTS = ["Hi", "What is the moon made of, and who says so?"]
ENDS = (standins.EOS, *range(11, standins.VOCABULARY, 12))  # so many that rows leave the batch all along
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": list(ENDS)}
SAMPLED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "top_p": 0.9, "seed": 5}


# ----- the oracle -----


Plain = Mapping[str, Any]  # adapter → the model under plain PEFT that has it, and nothing else


def plain_model(make: Callable[[], Any], plain: Plain, column: Column) -> Any:
    """A model that is this column: bare, with PEFT's own adapter in it, or with a blend merged into its weights."""
    if column.is_base:
        return make()
    if column.single is not None:
        return plain[column.single]
    model = make()
    with torch.no_grad():
        merge_by_hand(model, [(plain[name], m) for name, m in column.parts])
    return model


def merge_by_hand(model: Any, parts: list[tuple[Any, float]]) -> None:
    """W becomes s_out ⊙ (W + Σ mΔW) ⊙ s_in with PEFT's own ΔW and s, first all sums and then all products."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for plain, m in parts:
        for path, layer in plain.get_base_model().named_modules():
            if isinstance(layer, BaseTunerLayer):
                found.setdefault(path, []).append((layer, m))
    for path, layers in found.items():
        module = model.get_submodule(path)
        transposed = type(module).__name__ == "Conv1D"
        W = module.weight.T if transposed else module.weight
        bias = 0.0 if module.bias is None else module.bias
        delta, late, s_in, s_out = (torch.zeros(()), torch.zeros(()), torch.ones(()), torch.ones(()))
        for layer, m in layers:
            if hasattr(layer, "ia3_l"):
                scale = 1 + m * (layer.ia3_l["default"].flatten() - 1)
                s_in, s_out = (s_in * scale, s_out) if layer.is_feedforward else (s_in, s_out * scale)
                continue
            own = m * layer.get_delta_weight("default")
            delta = delta + (own.T if transposed else own)
            if getattr(layer.lora_B["default"], "bias", None) is not None:
                late = late + m * layer.scaling["default"] * layer.lora_B["default"].bias
        rows = s_out.expand(W.shape[0])[:, None]
        W = rows * (W * s_in + delta)
        module.weight.copy_(W.T if transposed else W)
        if module.bias is None and late.dim():
            module.register_parameter("bias", torch.nn.Parameter(torch.zeros(W.shape[0])))
        if module.bias is not None:
            module.bias.copy_(s_out * bias + late)


def plain_logits(model: Any, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    """Raw logits (tokens, vocabulary) from which each token had to be chosen; one forward, no cache, no padding."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id, *tokens[:-1]]
            return model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits[0]
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]


def plain_scores(logits: torch.Tensor, prompt: tuple[int, ...], settings: Mapping[str, Any]) -> torch.Tensor:
    """What the most likely token is taken from: the logits, or what transformers makes of them and the shared noise."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if not settings.get("temperature"):
        return logits
    scores = TemperatureLogitsWarper(settings["temperature"])(None, logits)
    if settings.get("top_k"):
        scores = TopKLogitsWarper(settings["top_k"])(None, scores)
    if settings.get("top_p", 1.0) < 1:
        scores = TopPLogitsWarper(settings["top_p"])(None, scores)
    noise = [compute_noise(settings.get("seed", 0), prompt, step, scores.shape[-1]) for step in range(len(scores))]
    return scores + torch.stack(noise)


@dataclass
class Findings:
    """What came of holding generations against the oracle."""

    tokens: int = 0
    ties: list[float] = field(default_factory=list)
    error: float = 0.0  # largest |Δlogprob|

    def hold(
        self,
        generation: Generation,
        logits: torch.Tensor,
        prompt: tuple[int, ...],
        settings: Mapping[str, Any],
        tolerance: float = TIE,
    ) -> None:
        """Assert that `generation` is what greedy or sampled choice makes of `logits`, and that it ends as it should."""
        tokens, where = torch.tensor(generation.token_ids), (generation.column, generation.prompt_index)
        scores = plain_scores(logits, prompt, settings)
        best = scores.argmax(-1)
        for step in (best != tokens).nonzero().flatten().tolist():
            gap = float(scores[step, best[step]] - scores[step, tokens[step]])
            assert gap < tolerance, f"{where}: token {step} is {tokens[step]}, alone it is {best[step]} by {gap:.3g}"
            self.ties.append(gap)
        ends = settings.get("eos_token_id", [standins.EOS])
        ended = [int(token) in ends for token in tokens]
        assert not any(ended[:-1]), f"{where}: it went on after the end"
        assert ended[-1] or len(tokens) == settings["max_new_tokens"], f"{where}: it ended early"
        assert generation.finish_reason == ("eos" if ended[-1] else "length"), where
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        error = float((expected - torch.tensor(generation.logprobs)).abs().max())
        assert error < tolerance, f"{where}: logprobs differ by {error:.3g}"
        self.error = max(self.error, error)
        self.tokens += len(tokens)


def hold_all(comparison: Comparison, oracle: Callable[[Column], Any], settings: Mapping[str, Any]) -> Findings:
    """Every generation against its column alone; the shift against base too."""
    findings = Findings()
    base = oracle(Column())
    for generation in comparison.generations:
        prompt = comparison.prompt_ids[generation.prompt_index]
        logits = plain_logits(oracle(Column(generation.asked)), prompt, generation.token_ids)
        findings.hold(generation, logits, prompt, settings)
        shift = (logits[0] - plain_logits(base, prompt, generation.token_ids[:1])[0]).abs().max()
        assert abs(generation.logit_shift - float(shift)) < TIE
    return findings


# ----- the models and the adapters -----


@dataclass(frozen=True)
class Architecture:
    """Where the adapters go: LoRA-like ones on `targets`, IA3 on `scaled`, at the last of which it scales the input."""

    targets: list[str]
    scaled: list[str]
    seq2seq: bool = False
    transposed: bool = False

    @classmethod
    def of(cls, targets: str, scaled: str, **kind: bool) -> Architecture:
        return cls(targets.split(), scaled.split(), **kind)


ARCHITECTURES = {
    "tiny_opt": Architecture.of("q_proj v_proj fc1 fc2", "k_proj v_proj fc2"),
    "tiny_llama": Architecture.of("q_proj v_proj o_proj up_proj down_proj", "k_proj down_proj"),
    "tiny_gpt2": Architecture.of("c_attn c_fc mlp.c_proj", "c_attn mlp.c_proj", transposed=True),
    "tiny_gpt_neox": Architecture.of("query_key_value dense dense_4h_to_h", "query_key_value dense_4h_to_h"),
    "tiny_falcon": Architecture.of("query_key_value dense_4h_to_h", "query_key_value dense_4h_to_h"),
    "tiny_falcon_grouped": Architecture.of("query_key_value dense dense_h_to_4h", "query_key_value dense_4h_to_h"),
    "tiny_falcon_alibi": Architecture.of("query_key_value dense_h_to_4h", "query_key_value dense_4h_to_h"),
    "tiny_phi": Architecture.of("q_proj v_proj dense fc1 fc2", "k_proj fc2"),
    "tiny_phi3": Architecture.of("qkv_proj gate_up_proj down_proj", "qkv_proj down_proj"),
    "tiny_qwen2": Architecture.of("q_proj k_proj v_proj gate_proj lm_head", "v_proj down_proj"),
    "tiny_gemma2": Architecture.of("q_proj o_proj up_proj", "v_proj down_proj"),
    "tiny_mistral": Architecture.of("q_proj k_proj v_proj down_proj", "k_proj down_proj"),
    "tiny_mixtral": Architecture.of("q_proj k_proj o_proj", "v_proj o_proj"),
    "tiny_qwen2_moe": Architecture.of("q_proj up_proj down_proj shared_expert_gate", "v_proj down_proj"),
    "tiny_t5": Architecture.of("q k wi wo", "v wo", seq2seq=True),
    "tiny_bart": Architecture.of("q_proj v_proj out_proj fc1", "k_proj fc2", seq2seq=True),
    "tiny_mamba": Architecture.of("in_proj x_proj", "in_proj x_proj"),
    "tiny_lfm2": Architecture.of("in_proj q_proj w1", "v_proj w2"),
    "tiny_falcon_h1": Architecture.of("in_proj q_proj down_proj", "v_proj down_proj"),
}


def maker(builder: str) -> Callable[[], Any]:
    """What makes the model, with a head of its own: tied to random embeddings, it would repeat its last token."""
    return functools.partial(getattr(standins, builder), tie_word_embeddings=False)


def adapter_configs(where: Architecture) -> dict[str, Any]:
    """One adapter of each kind that the equation knows."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    targets, fan = where.targets, {"fan_in_fan_out": where.transposed}
    return {
        "lora": LoraConfig(r=4, lora_alpha=6, target_modules=targets, **fan),
        "rs": LoraConfig(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=targets,
            rank_pattern={targets[-1]: 6},
            alpha_pattern={targets[0]: 2},
            **fan,
        ),
        "ada": AdaLoraConfig(init_r=4, target_r=2, lora_alpha=9, total_step=10, target_modules=targets[:2], **fan),
        "cut": AdaLoraConfig(init_r=5, target_r=2, lora_alpha=9, total_step=10, target_modules=targets, **fan),
        "ia3": IA3Config(target_modules=where.scaled, feedforward_modules=where.scaled[-1:], **fan),
        "dora": LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=targets[:2], **fan),
        "biased": LoraConfig(r=2, lora_alpha=3, lora_bias=True, target_modules=targets[1:], **fan),
    }


def write_plain(folder: Path, model: Any, config: Any, seed: int, *, mask: bool = False, cut: bool = False) -> Any:
    """Put an adapter of random weights into `model` by plain PEFT, save it, and give the PeftModel.

    With `mask`, some of an AdaLoRA's triplets are masked as allocation leaves them (λ = 0); with `cut` the file is
    without them, so that ranks differ from layer to layer. The divisor stays the initial rank in either.
    """
    plain = get_peft_model(model, copy.deepcopy(config))
    standins.random_adapter_state(plain, seed)
    pattern = {}
    if mask:
        for place, (name, E) in enumerate((n, p) for n, p in plain.named_parameters() if ".lora_E." in n):
            keep = [(place + triplet) % 3 > 0 for triplet in range(len(E))]
            E.data[~torch.tensor(keep)] = 0
            pattern[name.removeprefix("base_model.model.")] = keep
    if cut:
        plain.peft_config["default"].rank_pattern = pattern
    plain.save_pretrained(str(folder), save_embedding_layers=False)
    return plain.eval()


COLUMNS: list[Any] = [
    None,
    *("lora", "rs", "ada", "cut", "ia3", "dora", "biased"),
    {"lora": 0.5, "cut": -0.7, "ia3": 1.5},
    {"rs": 0.6, "biased": 0.8},
]


@pytest.mark.parametrize("builder", ARCHITECTURES)
def test_every_column_equals_itself_alone(
    builder: str, tmp_path: Path, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterlab.linear._LARGE", 1)  # the products for few rows, on these small layers too
    where, make = ARCHITECTURES[builder], maker(builder)
    lab = AdapterLab(make(), tokenizer=standins.tiny_tokenizer(seq2seq=where.seq2seq))
    plain: dict[str, Any] = {}
    for seed, (name, config) in enumerate(adapter_configs(where).items(), start=1):
        mask, cut = name in ("ada", "cut"), name == "cut"
        plain[name] = write_plain(tmp_path / name, make(), config, seed, mask=mask, cut=cut)
        lab.load_adapter(tmp_path / name, name)
    models: dict[Column, Any] = {}

    def oracle(column: Column) -> Any:
        if column not in models:
            models[column] = plain_model(make, plain, column)
        return models[column]

    error, lengths = 0.0, set()
    for settings in (GREEDY, SAMPLED):
        comparison = lab.compare(PROMPTS, COLUMNS, **settings)
        findings = hold_all(comparison, oracle, settings)
        error = max(error, findings.error)
        lengths |= {generation.new_tokens for generation in comparison.generations}
        for generation in comparison.generations:
            assert generation.logit_shift > 0.01 or not generation.asked, "they do act"
            assert generation.batched, generation.note
    assert len(lengths) > (1 if where.seq2seq else 2), "rows leave one by one"
    record_property("largest |Δlogprob| against plain PEFT", error)
    print(f"\n{builder}: largest |Δlogprob| {error:.2g} over {findings.tokens} sampled tokens, ties {findings.ties}")
    with torch.no_grad():
        bare = plain_logits(make(), comparison.prompt_ids[1], (7, 8, 9))
        lab.set_adapter(None)
        assert torch.equal(plain_logits(lab.model, comparison.prompt_ids[1], (7, 8, 9)), bare), "nothing stays behind"
