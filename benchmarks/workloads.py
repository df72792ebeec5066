"""What the contenders run on: two models, two sets of adapters, one prompt of about 40 tokens."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUESTION = "Why is the sky blue? Answer in one sentence."
MODELS = {"demo": "SmolLM2-135M-Instruct", "opt-350m": "opt-350m geometry"}
ADAPTERS = {
    "lora": "LoRA r=16 on all linear layers",
    "mixed": "LoRA, IA3 and AdaLoRA",
    "lora-qv": "LoRA r=16 on q_proj, v_proj",
}


@dataclass(frozen=True)
class Plan:
    """One part of the benchmark. columns: numbers of adapters, ascending. timed_in_turn: how many adapters of each method
    a round times one after another; fewer than there are make the sequence an estimate."""

    model: str
    adapters: str
    dtype: str
    columns: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 5
    new_tokens: int = 64
    timed_in_turn: int = 8

    @property
    def most(self) -> int:
        return max(self.columns)


def load_model(name: str, dtype: str) -> tuple[Any, Any]:
    """The bare base and its tokenizer. The OPT has the published geometry and random weights."""
    import torch

    if name == "demo":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from adapterlab.demo import fetch_demo_model

        folder = fetch_demo_model()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        return model.eval(), AutoTokenizer.from_pretrained(folder)
    model = random_opt().to(getattr(torch, dtype)).eval()
    return model, word_tokenizer(model.config.vocab_size)


def random_opt() -> Any:
    """The published geometry of opt-350m, 331,196,416 parameters, with random weights in fp32.

    As they are drawn, such a model repeats one token whatever stands before it. With larger embeddings and smaller
    updates of the residual stream, what it says depends on the text, and so on the adapters.
    """
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=1024,
        word_embed_proj_dim=512,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        vocab_size=50272,
        max_position_embeddings=2048,
        do_layer_norm_before=False,
    )
    torch.manual_seed(0)
    model = OPTForCausalLM(config)
    factors = {"embed_tokens.weight": 10, "embed_positions.weight": 4, "out_proj.weight": 0.5, "fc2.weight": 0.5}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            for ending, factor in factors.items():
                if key.endswith(ending):
                    parameter.mul_(factor)
    return model


def word_tokenizer(size: int) -> Any:
    """A tokenizer of words "w0" to the last, one a token, for a model that has learnt none."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(4, size))]  # OPT's ids for the special ones
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def prompt_for(tokenizer: Any) -> str:
    """About 40 tokens: a question where a chat template stands around it, else as many words."""
    return QUESTION if tokenizer.chat_template else " ".join(f"w{100 + 7 * i}" for i in range(40))


def adapter_configs(adapters: str, count: int) -> dict[str, Any]:
    """Name → PEFT config of `count` adapters. Mixed methods alternate, so that a few of them are mixed too."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    def lora(targets: list[str]) -> Any:
        return LoraConfig(r=16, lora_alpha=16, target_modules=targets, init_lora_weights=False)

    def ia3() -> Any:
        return IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])

    def adalora() -> Any:
        return AdaLoraConfig(init_r=12, target_r=8, total_step=100, target_modules=LINEAR)

    makers: dict[str, list[Callable[[], Any]]] = {
        "lora": [lambda: lora(LINEAR)] * 8,
        "lora-qv": [lambda: lora(["q_proj", "v_proj"])] * 8,
        "mixed": [lambda: lora(LINEAR), ia3, adalora, lambda: lora(LINEAR), ia3, adalora, lambda: lora(LINEAR), ia3],
    }
    chosen = [makers[adapters][i % 8]() for i in range(count)]
    return {f"{config.peft_type.value.lower()}-{i + 1}": config for i, config in enumerate(chosen)}


def method_of(name: str) -> str:
    """The method of an adapter that `adapter_configs` named."""
    return name.rsplit("-", 1)[0]


def write_adapters(model: Any, configs: dict[str, Any], folder: Path, *, acting: bool = True) -> dict[str, Path]:
    """Make each adapter by plain PEFT and save it: name → folder. `model` stays as it was.

    acting: with weights that act, also where the method starts with none that do; else as PEFT starts it.
    """
    import torch
    from peft import get_peft_model

    folders = {}
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        with quiet_peft():
            peft_model = get_peft_model(share(model), config)
        with torch.no_grad():
            for key, parameter in peft_model.named_parameters() if acting else ():
                if "ia3_l" in key:
                    parameter.uniform_(0.7, 1.3)
                elif "lora_E" in key:
                    parameter.normal_(0, 8)  # beside P and Q of 0.02, an update as large as the LoRAs'
        peft_model.save_pretrained(str(folder / name), save_embedding_layers=False)
        folders[name] = folder / name
    return folders


def share(model: Any) -> Any:
    """A second structure over the same tensors: all contenders read the very same bytes of base weights."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT asks transformers for a property that is being renamed, and says so at every model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
