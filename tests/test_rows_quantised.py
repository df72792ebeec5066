"""8-bit, 4-bit and half precision: what batching columns changes, beside what batching the bare base changes.

There a longer batch rounds differently, so tokens can't be asked to be equal. What can be asked: with the same tokens
before it, a column in the batch gives each token the logprob it has alone, but for the noise that the plain model shows
when its own rows share a batch; and where two differ in a token, the choice was that close.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from peft import PeftModel
from test_rows_architectures import ARCHITECTURES, adapter_configs, maker, write_plain
from test_rows_architectures import pytestmark as pytestmark  # plain PEFT's remarks, with the reasons
from transformers import AutoModelForCausalLM

from adapterlab import AdapterLab, Column
from adapterlab.mounts import skeleton

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes' kernels want multiples of 64
PROMPTS = ["Hello there, captain", "What is the moon made of, and who says so?"]
NAMES = ["lora", "rs", "ada", "ia3", "dora"]
TOKENS = 6
STIRRINGS = 4
NOT_IN_PLAIN_PEFT = {
    # fp32 comes out of these two over 8-bit layers, which a bfloat16 model's attention refuses
    ("ada", "8bit on bf16"),
    ("ia3", "8bit on bf16"),
    # reads the weights in a way that loses their scales, so that the second forward fails
    ("dora", "8bit"),
    ("dora", "8bit on bf16"),
}


@dataclass(frozen=True)
class Text:
    """A prompt and what a column made of it, as ids."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def quantisations() -> dict[str, dict[str, Any]]:
    from transformers import BitsAndBytesConfig

    def nf4(double: bool) -> Any:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )

    eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return {
        "bf16": {"dtype": torch.bfloat16},
        "8bit": {"dtype": torch.float32, "quantization_config": eight},
        "8bit on bf16": {"dtype": torch.bfloat16, "quantization_config": eight},
        "4bit": {"dtype": torch.float32, "quantization_config": nf4(False)},
        "4bit, double": {"dtype": torch.float32, "quantization_config": nf4(True)},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and the adapters as folders."""
    folder = tmp_path_factory.mktemp("quantised")
    standins.write_model(folder / "base", maker("tiny_llama")(**SIZES), standins.tiny_tokenizer())
    configs = adapter_configs(ARCHITECTURES["tiny_llama"])
    for seed, name in enumerate(NAMES, start=1):
        write_plain(folder / name, maker("tiny_llama")(**SIZES), configs[name], seed, mask=name == "ada")
    return folder


def load_plain(root: Path, kind: str) -> Any:
    """The base as plain transformers loads it, apart from the lab; 4-bit weights kept unpacked, as in the lab."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "base", **quantisations()[kind]).eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model


def stepwise_logprobs(model: Any, texts: list[Text]) -> list[torch.Tensor]:
    """Logprobs of each text's tokens, read as decoding does: the prompts in one forward, left-padded, and then token by
    token, with transformers' own cache. All texts have `TOKENS` tokens."""
    width = max(len(text.prompt) for text in texts)
    gaps = [width - len(text.prompt) for text in texts]
    ids = torch.tensor([[standins.PAD] * gap + [*text.prompt, *text.tokens] for gap, text in zip(gaps, texts)])
    mask = torch.tensor([[0] * gap + [1] * (width - gap + TOKENS) for gap in gaps])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    logits, cache, begin = [], None, 0
    with torch.no_grad():
        for end in range(width, width + TOKENS):
            here = slice(begin, end)
            out = model(
                input_ids=ids[:, here],
                attention_mask=mask[:, :end],
                position_ids=places[:, here],
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(out.logits[:, -1])
            cache, begin = out.past_key_values, end
    return list(torch.stack(logits, 1).float().log_softmax(-1))


def of_tokens(logprobs: torch.Tensor, text: Text) -> torch.Tensor:
    return logprobs.gather(1, torch.tensor(text.tokens)[:, None])[:, 0]


def largest_error(logprobs: list[torch.Tensor], others: list[torch.Tensor], texts: list[Text]) -> float:
    """Largest |Δlogprob| of the texts' own tokens."""
    pairs = zip(logprobs, others, texts)
    return max(float((of_tokens(a, text) - of_tokens(b, text)).abs().max()) for a, b, text in pairs)


@contextlib.contextmanager
def stirred(model: Any, seed: int) -> Iterator[None]:
    """In the block, the embeddings are off by as much as sums in another order are: some 2⁻²² of each number."""
    generator = torch.Generator().manual_seed(seed)

    def stir(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + 2**-22 * torch.randn(out.shape, generator=generator))

    handle = model.get_input_embeddings().register_forward_hook(stir)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("kind", ["bf16", "8bit", "8bit on bf16", "4bit", "4bit, double"])
def test_a_column_in_a_batch_is_itself_alone_but_for_the_noise_of_batching(
    kind: str, root: Path, record_property: Callable[[str, object], None]
) -> None:
    names = [name for name in NAMES if (name, kind) not in NOT_IN_PLAIN_PEFT]
    lab = AdapterLab(root / "base", **quantisations()[kind])
    for name in names:
        lab.load_adapter(root / name, name)
    plain = {Column(): load_plain(root, kind)}
    for name in names:
        plain[Column.of(name)] = PeftModel.from_pretrained(load_plain(root, kind), root / name).eval()
    columns: list[Any] = [None, *names, {"lora": 0.5}, {"rs": 0.5, "lora": -1.5}]
    comparison = lab.compare(PROMPTS, columns, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    texts = [Text(comparison.prompt_ids[g.prompt_index], g.token_ids) for g in comparison.generations]
    asked = [Column(generation.asked) for generation in comparison.generations]
    alone = []
    for column, text in zip(asked, texts):
        with lab.using(column) as mounted:
            alone += stepwise_logprobs(plain.get(column, mounted), [text])
    deviations, ties = [], []
    for generation, text, logprobs in zip(comparison.generations, texts, alone):
        assert generation.batched
        mine = of_tokens(logprobs, text)
        deviations += (mine - torch.tensor(generation.logprobs)).abs().tolist()
        allowed = logprobs.index_fill(1, torch.tensor(standins.EOS), -torch.inf)  # min_new_tokens forbids the end
        ties += [gap for gap in (allowed.max(-1).values - mine).tolist() if gap > 0]
    worst = max(deviations)
    bare = plain[Column()]
    base = largest_error(stepwise_logprobs(bare, texts), [stepwise_logprobs(bare, [t])[0] for t in texts], texts)
    noise = base
    for column, model in plain.items():
        own = [i for i, one in enumerate(asked) if one == column]
        together = stepwise_logprobs(model, texts)
        noise = max(noise, largest_error([together[i] for i in own], [alone[i] for i in own], [texts[i] for i in own]))
    if kind == "8bit":
        # bitsandbytes rounds what goes into a layer to 8 bits. A number halfway between two of these steps goes to
        # either by its last bit, and a logprob then jumps a thousand times further than rounding moves it elsewhere.
        # Whether a batch meets such a number is luck, so it is sought: the plain models' own inputs are stirred.
        for seed, model in enumerate(plain.values()):
            still = stepwise_logprobs(model, texts)
            for turn in range(STIRRINGS):
                with stirred(model, STIRRINGS * seed + turn):
                    noise = max(noise, largest_error(stepwise_logprobs(model, texts), still, texts))
        assert statistics.median(deviations) <= 2e-5, "most tokens meet no such number"
    record_property("largest |Δlogprob|, batched against alone", worst)
    record_property("largest |Δlogprob| of batching the bare base", base)
    record_property("largest |Δlogprob| of batching under plain PEFT", noise)
    print(
        f"\n{kind}: columns {worst:.2g}; batching the bare base {base:.2g}, plain PEFT {noise:.2g}; other tokens {ties}"
    )
    bound = 4 * noise + 2e-5  # an adapter's own arithmetic rounds too, and what it adds goes through what follows
    assert worst <= bound
    assert all(gap <= 2 * bound for gap in ties), "a token differs only where the choice was that close"


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_forward_is_no_change_of_the_base(quantization: str, root: Path) -> None:
    """bitsandbytes casts a bias to the dtype it multiplies in, in place, at the first forward."""
    lab = AdapterLab(root / "base", quantization=quantization, dtype=torch.bfloat16)
    lab.load_adapter(root / "lora", "lora")
    first = lab.compare("Hello", [None, "lora"], max_new_tokens=2)
    second = lab.compare("Hello there", [None, "lora"], max_new_tokens=2)
    for comparison in (first, second):
        assert lab.verify(comparison)["agrees"].all()
    assert first["base"].weights_digest == second["base"].weights_digest


def test_a_second_structure_shares_8bit_weights(root: Path) -> None:
    """bitsandbytes keeps them in a second tensor over the same memory; every load and every verify makes a structure."""
    lab = AdapterLab(root / "base", quantization="8bit", dtype=torch.float32)
    lab.compare("Hello", max_new_tokens=2)
    with lab.using(None) as model, skeleton(model) as twin:
        for (path, mine), (_, theirs) in zip(model.named_modules(), twin.named_modules()):
            if type(mine).__name__ == "Linear8bitLt":
                assert mine.state.CB.data_ptr() == theirs.state.CB.data_ptr(), path


def test_dora_over_8bit_layers_leaves_them_whole(root: Path) -> None:
    """PEFT reads the base's weights for DoRA by a function that puts weights without scales into 8-bit layers."""
    lab = AdapterLab(root / "base", quantization="8bit", dtype=torch.float32)
    first = lab.compare("Hello", [None], max_new_tokens=4)["base"]
    weights = {name: id(parameter) for name, parameter in lab.model.named_parameters()}
    lab.load_adapter(root / "dora", "dora")
    lab.set_adapter(None)
    assert {name: id(parameter) for name, parameter in lab.model.named_parameters()} == weights
    again = lab.compare("Hello", [None, "dora"], max_new_tokens=4, seed=1)  # another seed: nothing is remembered
    assert again["base"].token_ids == first.token_ids
    assert lab.verify(again)["agrees"].all()
    ids = torch.tensor([again.prompt_ids[0]])
    with torch.no_grad(), lab.using("dora") as model:
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert lab.compare("Hello there", [None, "dora"], max_new_tokens=4)["dora"].logit_shift > 0.01


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("kind", ["8bit on bf16", "4bit on bf16"])
@pytest.mark.parametrize("name", ["lora", "ia3", "ada"])
def test_fp32_adapters_act_natively_over_a_quantised_half_precision_base(kind: str, name: str, root: Path) -> None:
    """Plain PEFT's IA3 and AdaLoRA hand fp32 to a bf16 layer there, which refuses it; over an fp32 base they run."""
    settings = quantisations()["8bit on bf16"]
    if kind == "4bit on bf16":
        settings = {**quantisations()["4bit"], "dtype": torch.bfloat16}
    lab = AdapterLab(root / "base", **settings)
    lab.load_adapter(root / name, name)
    ids = torch.tensor([[5, 17, 40, 8, 23]])
    with torch.no_grad():
        mine = lab.model(ids).logits.float()
        lab.set_adapter(None)
        base = lab.model(ids).logits.float()
    wide = AutoModelForCausalLM.from_pretrained(root / "base", **{**settings, "dtype": torch.float32})
    plain = PeftModel.from_pretrained(wide, root / name).eval()
    with torch.no_grad():
        theirs = plain(ids).logits
    assert (mine - theirs).abs().max() < 0.25 * (mine - base).abs().max()
    answers = lab.compare("Hello", [name], max_new_tokens=2)
    assert lab.verify(answers)["active_agree"].all()
