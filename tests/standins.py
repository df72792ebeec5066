"""Small models, tokenizers and repositories that stand in for the real ones, made from fixed seeds.

Nothing here is downloaded and nothing was trained: weights are random numbers. The repositories carry the
names and the file formats of the real ones, so that the tests go through the code that loads the real ones;
each says in its README and in its config that it is a stand-in (`STANDIN_NOTE`).

The tiny models share `VOCABULARY` ids with `tiny_tokenizer()`: 0 `<s>`, 1 `<pad>`, 2 `</s>` (end of
sequence), 3 `<unk>`, then the three roles of the chat template. All biases and norms are random too, so that
they matter.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from torch import nn

VOCABULARY = 320
HIDDEN = 32
LAYERS = 2
BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
STANDIN_NOTE = "a stand-in made for tests: random weights, not the published model"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

_CORPUS = [
    "The moon is a celestial body that orbits our planet, and the tides follow it.",
    "What is the moon? Tell me about the weather, the sea and the ship in the harbour.",
    "An adapter changes what a model says, while the weights of the base model stay as they are.",
    "Arr, the captain says that the wind is fair and the sails are full, matey!",
    "One adapter learns the answer to a question; another adapter learns to write in verse.",
]


# ----- tokenizers -----


@functools.cache
def _trained_bpe() -> str:
    """Train the byte-level BPE that all stand-ins share; returns its JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer.to_str()


def tiny_tokenizer(chat: bool = False, *, seq2seq: bool = False) -> Any:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens; any text survives encoding and decoding.

    Plain encoding puts `<s>` in front (`seq2seq=True`: `</s>` at the end, as T5 does). With `chat=True` there
    is a chat template, which writes `<s>` itself: tokenizing what it renders with special tokens doubles it.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_trained_bpe())
    single, pair = ("$A </s>", "$A </s> $B </s>") if seq2seq else ("<s> $A", "<s> $A $B")
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# ----- tiny models -----


def _randomised(model_class: Any, config: Any, seed: int) -> Any:
    """Build `model_class(config)` and fill every parameter from a generator of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some biases start from random numbers, and only noise is added to those
        model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
            else:  # norm weights start at 1, biases at 0
                parameter.copy_(parameter.detach() + 0.2 * noise)
    return model.eval()


def _token_ids(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        **changes,
    }


def opt_config(**changes: Any) -> Any:
    """OPT with the peculiarities of opt-350m: a narrow embedding (project_in/out), norms after the blocks."""
    from transformers import OPTConfig

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        ffn_dim=2 * HIDDEN,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=HIDDEN // 2,
        do_layer_norm_before=False,
        bos_token_id=EOS,  # OPT begins texts with </s>
    )
    return OPTConfig(**{**settings, **changes})


def tiny_opt(seed: int = 0, **changes: Any) -> Any:
    """An OPTForCausalLM; `changes` go to its config."""
    from transformers import OPTForCausalLM

    return _randomised(OPTForCausalLM, opt_config(**changes), seed)


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A LlamaForCausalLM with grouped keys and values, and biases on the attention and MLP projections."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=2 * HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=True,
        mlp_bias=True,
    )
    return _randomised(LlamaForCausalLM, LlamaConfig(**{**settings, **changes}), seed)


def tiny_gpt2(seed: int = 0, **changes: Any) -> Any:
    """A GPT2LMHeadModel (its projections are Conv1D: weights lie transposed)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = _token_ids(n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=128)
    return _randomised(GPT2LMHeadModel, GPT2Config(**{**settings, **changes}), seed)


def tiny_t5(seed: int = 0, **changes: Any) -> Any:
    """A T5ForConditionalGeneration; generation starts from `<pad>`."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = _token_ids(
        d_model=HIDDEN,
        d_kv=8,
        d_ff=2 * HIDDEN,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=4,
        decoder_start_token_id=PAD,
    )
    return _randomised(T5ForConditionalGeneration, T5Config(**{**settings, **changes}), seed)


def tiny_bart(seed: int = 0, **changes: Any) -> Any:
    """A BartForConditionalGeneration."""
    from transformers import BartConfig, BartForConditionalGeneration

    settings = _token_ids(
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * HIDDEN,
        decoder_ffn_dim=2 * HIDDEN,
        max_position_embeddings=128,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
    )
    return _randomised(BartForConditionalGeneration, BartConfig(**{**settings, **changes}), seed)


def tiny_mixtral(seed: int = 0, **changes: Any) -> Any:
    """A MixtralForCausalLM: its experts are one 3-D parameter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
    )
    return _randomised(MixtralForCausalLM, MixtralConfig(**{**settings, **changes}), seed)


def tiny_gpt_neox(seed: int = 0, **changes: Any) -> Any:
    """A GPTNeoXForCausalLM: query, key and value are one fused projection, and a quarter of each head is rotated."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=128,
    )
    return _randomised(GPTNeoXForCausalLM, GPTNeoXConfig(**{**settings, **changes}), seed)


def tiny_falcon(seed: int = 0, **changes: Any) -> Any:
    """A FalconForCausalLM: fused projections with one key and value for all heads (multi-query), biases, and an
    attention that runs beside the MLP."""
    from transformers import FalconConfig, FalconForCausalLM

    settings = _token_ids(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, bias=True)
    return _randomised(FalconForCausalLM, FalconConfig(**{**settings, **changes}), seed)


def tiny_falcon_grouped(seed: int = 0, **changes: Any) -> Any:
    """A Falcon of the newer architecture: two groups of heads in the fused projection, no biases."""
    return tiny_falcon(seed, **{"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, **changes})


def tiny_falcon_alibi(seed: int = 0, **changes: Any) -> Any:
    """A Falcon as falcon-rw has it: distances as a bias on the scores, computed from the attention mask."""
    settings = {"alibi": True, "multi_query": False, "parallel_attn": False}
    return tiny_falcon(seed, **{**settings, **changes})


def tiny_phi(seed: int = 0, **changes: Any) -> Any:
    """A PhiForCausalLM: biases everywhere, one norm before attention and MLP side by side."""
    from transformers import PhiConfig, PhiForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=128,
    )
    return _randomised(PhiForCausalLM, PhiConfig(**{**settings, **changes}), seed)


def tiny_phi3(seed: int = 0, **changes: Any) -> Any:
    """A Phi3ForCausalLM: `qkv_proj` and `gate_up_proj` are fused."""
    from transformers import Phi3Config, Phi3ForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
    )
    return _randomised(Phi3ForCausalLM, Phi3Config(**{**settings, **changes}), seed)


def tiny_qwen2(seed: int = 0, **changes: Any) -> Any:
    """A Qwen2ForCausalLM: biases on query, key and value only, four heads on two keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=128,
    )
    return _randomised(Qwen2ForCausalLM, Qwen2Config(**{**settings, **changes}), seed)


def tiny_gemma2(seed: int = 0, **changes: Any) -> Any:
    """A Gemma2ForCausalLM: one layer sees a window of 6 tokens and the other all, and logits are capped softly."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=128,
        sliding_window=6,
        query_pre_attn_scalar=8,
    )
    return _randomised(Gemma2ForCausalLM, Gemma2Config(**{**settings, **changes}), seed)


def tiny_mistral(seed: int = 0, **changes: Any) -> Any:
    """A MistralForCausalLM whose attention sees the last 5 tokens only."""
    from transformers import MistralConfig, MistralForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=128,
        sliding_window=5,
    )
    return _randomised(MistralForCausalLM, MistralConfig(**{**settings, **changes}), seed)


def tiny_qwen2_moe(seed: int = 0, **changes: Any) -> Any:
    """A Qwen2MoeForCausalLM: beside the experts that the gate picks, one expert that every token goes through."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * HIDDEN,
        moe_intermediate_size=HIDDEN // 2,
        shared_expert_intermediate_size=HIDDEN,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    return _randomised(Qwen2MoeForCausalLM, Qwen2MoeConfig(**{**settings, **changes}), seed)


def tiny_mamba(seed: int = 0, **changes: Any) -> Any:
    """A MambaForCausalLM: no attention; what was read is a state of fixed size."""
    from transformers import MambaConfig, MambaForCausalLM

    settings = _token_ids(hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=4)
    return _randomised(MambaForCausalLM, MambaConfig(**{**settings, **changes}), seed)


def tiny_lfm2(seed: int = 0, **changes: Any) -> Any:
    """An Lfm2ForCausalLM: a layer of short convolutions, then one of attention."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * HIDDEN,
        block_auto_adjust_ff_dim=False,
        max_position_embeddings=128,
        layer_types=["conv", "full_attention"],
    )
    return _randomised(Lfm2ForCausalLM, Lfm2Config(**{**settings, **changes}), seed)


def tiny_falcon_h1(seed: int = 0, **changes: Any) -> Any:
    """A FalconH1ForCausalLM: attention and a state-space model side by side in every layer."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    settings = _token_ids(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=128,
        mamba_d_ssm=HIDDEN,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
    )
    return _randomised(FalconH1ForCausalLM, FalconH1Config(**{**settings, **changes}), seed)


def tiny_bert(seed: int = 0, **changes: Any) -> Any:
    """A BertModel: an encoder, which the lab refuses."""
    from transformers import BertConfig, BertModel

    settings = {
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": 128,
    }
    return _randomised(BertModel, BertConfig(**{**settings, **changes}), seed)


# ----- repositories -----


def write_readme(folder: Path, title: str, metadata: str = "") -> None:
    """The model card of a stand-in: it says what it is."""
    front_matter = f"---\nlicense: other\n{metadata}tags:\n- stand-in\n---\n"
    (folder / "README.md").write_text(f"{front_matter}# {title}\n\nThis is {STANDIN_NOTE}.\n", encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_model(folder: Path, model: Any, tokenizer: Any = None) -> Path:
    """Save a model (safetensors) and its tokenizer as a local folder; returns the folder."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_readme(folder, type(model).__name__)
    return folder


def random_adapter_state(peft_model: Any, seed: int = 0) -> None:
    """Fill the trainable (adapter) parameters of a PEFT model with random numbers, so that it acts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(peft_model.named_parameters()):
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise if "ia3" in name else noise)


def write_adapter(folder: Path, model: Any, config: Any, *, base: str | None = None, seed: int = 0) -> Path:
    """Make an adapter by plain PEFT on a copy of `model`, random and acting, and save it to `folder`.

    `base` is what its config names as base model (default: nothing). Returns the folder.
    """
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a property that is to be renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        peft_model = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    random_adapter_state(peft_model, seed)
    peft_model.peft_config["default"].base_model_name_or_path = base
    # Left to decide about embeddings by itself, PEFT would ask the Hub for the base's config.
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


OPT_350M = "facebook/opt-350m"
OPT_350M_LORA = "ybelkada/opt-350m-lora"
OPT_350M_FULL = {
    "vocab_size": 50272,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "ffn_dim": 4096,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 512,
}


def _opt_settings(full: bool) -> dict[str, Any]:
    config = opt_config(**(OPT_350M_FULL if full else {}))
    return {name: getattr(config, name) for name in OPT_350M_FULL}


def write_opt_350m(folder: Path, *, full: bool = False, seed: int = 0) -> Path:
    """Lay out `facebook/opt-350m` as the Hub has it: fp16 weights in one pickle, a GPT-2 style tokenizer.

    `full=True` has the published geometry (331,196,416 parameters, 662 MB); the vocabulary files stay small.
    """
    from transformers import OPTForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "_name_or_path": "opt-350m",
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": EOS,
        "do_layer_norm_before": False,
        "dropout": 0.1,
        "eos_token_id": EOS,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "model_type": "opt",
        "pad_token_id": PAD,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "transformers_version": "4.20.0.dev0",
        "use_cache": True,
        **_opt_settings(full),
        "standin": STANDIN_NOTE,
    }
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": EOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "transformers_version": "4.27.0.dev0",
        },
    )
    if full:
        weights = _full_size_weights(seed)
    else:
        weights = _randomised(OPTForCausalLM, opt_config(), seed).model.half().state_dict()
    torch.save(weights, folder / "pytorch_model.bin")  # saved from the model without head: keys begin with "decoder."
    _write_slow_tokenizer(folder)
    write_readme(folder, OPT_350M, "language: en\n")
    return folder


def _full_size_weights(seed: int) -> dict[str, torch.Tensor]:
    """fp16 weights of the published geometry, each tensor filled from one block of a million numbers."""
    from transformers import OPTForCausalLM

    with torch.device("meta"):
        shapes = OPTForCausalLM(opt_config(**OPT_350M_FULL)).model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = json.loads(_trained_bpe())["model"]["vocab"]
    block = (0.02 * torch.randn(1_000_003, generator=generator)).half()  # a prime length: rows do not repeat
    weights = {}
    for name, tensor in shapes.items():
        copies = -(-tensor.numel() // block.numel())
        values = block.repeat(copies)[: tensor.numel()].reshape(tensor.shape).clone()
        if name.endswith("embed_tokens.weight"):  # tied: it says only what its tokenizer spells in plain letters
            said = [number for token, number in vocabulary.items() if re.fullmatch("Ġ?[A-Za-z]{2,}", token)]
            values = torch.zeros_like(values).index_copy(0, torch.tensor(said), values[said])
        weights[name] = values + 1 if "layer_norm.weight" in name else values
    return weights


def _write_slow_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt and the two JSON files that opt-350m has (there is no tokenizer.json)."""
    bpe = json.loads(_trained_bpe())["model"]
    _write_json(folder / "vocab.json", bpe["vocab"])
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")

    def token(content: str) -> dict[str, Any]:
        return {
            "content": content,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }

    _write_json(
        folder / "tokenizer_config.json",
        {
            "errors": "replace",
            "unk_token": {**token("</s>"), "__type": "AddedToken"},
            "bos_token": {**token("</s>"), "__type": "AddedToken"},
            "eos_token": {**token("</s>"), "__type": "AddedToken"},
            "pad_token": {**token("<pad>"), "__type": "AddedToken"},
            "add_prefix_space": False,
            "add_bos_token": True,
            "special_tokens_map_file": None,
            "name_or_path": "patrickvonplaten/opt-30b",
            "tokenizer_class": "GPT2Tokenizer",
        },
    )
    _write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": token("</s>"),
            "eos_token": token("</s>"),
            "unk_token": token("</s>"),
            "pad_token": token("<pad>"),
        },
    )


def write_opt_350m_lora(folder: Path, *, full: bool = False, seed: int = 1, base: str = OPT_350M) -> Path:
    """Lay out `ybelkada/opt-350m-lora`: a config of the first PEFT releases, fp32 weights in a pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, rank = _opt_settings(full), 16
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    _write_json(folder / "adapter_config.json", config)
    generator = torch.Generator().manual_seed(seed)
    width = settings["hidden_size"]
    weights = {}
    for layer in range(settings["num_hidden_layers"]):
        for projection in ("q_proj", "v_proj"):
            stem = f"base_model.model.model.decoder.layers.{layer}.self_attn.{projection}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
            weights[f"{stem}.lora_B.weight"] = 0.2 * torch.randn(width, rank, generator=generator) / rank**0.5
    torch.save(weights, folder / "adapter_model.bin")
    write_readme(folder, OPT_350M_LORA, f"library_name: peft\nbase_model: {base}\n")
    return folder


# ----- the Hub -----


def commit_of(repo_id: str) -> str:
    """A commit hash for a stand-in repository, made from its name."""
    return hashlib.sha1(repo_id.encode()).hexdigest()


def _etag(path: Path) -> str:
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def lay_in_cache(cache_dir: Path, repos: dict[str, Path]) -> Path:
    """Put repositories into `cache_dir` as huggingface_hub does (refs, blobs, snapshots); returns it."""
    for repo_id, folder in repos.items():
        root = cache_dir / f"models--{repo_id.replace('/', '--')}"
        commit = commit_of(repo_id)
        snapshot = root / "snapshots" / commit
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "blobs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(commit, encoding="utf-8")
        for name, source in _files(folder):
            blob = root / "blobs" / _etag(source)
            if not blob.exists():
                shutil.copyfile(source, blob)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(os.path.relpath(blob, link.parent))
    return cache_dir


class StandinHub:
    """The few endpoints of the Hub that downloads use, served on loopback; a context manager.

        with StandinHub({"facebook/opt-350m": folder, "org/gated": folder}, gated={"org/gated"}) as hub:
            ...  # with HF_ENDPOINT=hub.url; see `hub_environment`

    `requests` lists every "METHOD path" that was asked for, oldest first.
    """

    def __init__(self, repos: dict[str, Path], gated: Collection[str] = ()):
        self.repos = dict(repos)
        self.gated = set(gated)
        self.requests: list[str] = []
        hub = self

        class Handler(_HubHandler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> StandinHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandinHub

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if resolved := re.fullmatch(r"/(?:api/resolve-cache/models/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*resolved.groups(), body=body)
        elif info := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            self._info(*info.groups(), body=body)
        elif tree := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self._tree(*tree.groups(), body=body)
        else:
            self._send(404, {"error": "Not Found"}, body=body)

    def _folder(self, repo_id: str, revision: str | None, body: bool) -> Path | None:
        """The repository's folder, or None after an error was sent."""
        if repo_id not in self.hub.repos:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._send(404, {"error": "Repository not found"}, headers, body=body)
        elif revision not in (None, "main", commit_of(repo_id)):
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            self._send(404, {"error": f"Invalid rev id: {revision}"}, headers, body=body)
        else:
            return self.hub.repos[repo_id]
        return None

    def _file(self, repo_id: str, revision: str, name: str, *, body: bool) -> None:
        folder = self._folder(repo_id, revision, body)
        if folder is None:
            return
        if repo_id in self.hub.gated:  # its file list is public, its files are not
            message = f"Access to model {repo_id} is restricted."
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
            self._send(403, {"error": message}, headers, body=body)
            return
        commit = {"X-Repo-Commit": commit_of(repo_id)}
        path = dict(_files(folder)).get(name)
        if path is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **commit}
            self._send(404, {"error": "Entry not found"}, headers, body=body)
            return
        size = path.stat().st_size
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes", **commit}
        if first:
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        self._send(206 if first else 200, size - first, headers, body=False)
        if body:
            with path.open("rb") as file:
                file.seek(first)
                shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _info(self, repo_id: str, revision: str | None, *, body: bool) -> None:
        folder = self._folder(repo_id, revision, body)
        if folder is not None:
            siblings = [{"rfilename": name} for name, _ in _files(folder)]
            info = {
                "_id": "0",
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit_of(repo_id),
                "tags": [],
                "siblings": siblings,
            }
            self._send(200, {**info, "private": False, "gated": False, "disabled": False}, body=body)

    def _tree(self, repo_id: str, revision: str, under: str | None, *, body: bool) -> None:
        folder = self._folder(repo_id, revision, body)
        if folder is not None:
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)[:40]}
                for name, path in _files(folder)
                if name.startswith(under or "")
            ]
            self._send(200, entries, body=body)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None, *, body: bool) -> None:
        """Answer with `content` as JSON; an int is the length of a body that the caller sends."""
        data = b"" if isinstance(content, int) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(content if isinstance(content, int) else len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def hub_for_kernels(folder: Path) -> Iterator[StandinHub]:
    """A Hub on loopback with both stand-ins of opt-350m at their published sizes, for processes that are started inside.

    Everything is kept in `folder`: what the Hub serves (0.7 GB) and the cache that is filled from it.
    """
    repos = {
        OPT_350M: write_opt_350m(folder / "opt-350m", full=True),
        OPT_350M_LORA: write_opt_350m_lora(folder / "opt-350m-lora", full=True),
    }
    with StandinHub(repos) as hub, ExitStack() as undo:
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        }
        for name, value in variables.items():
            before = os.environ.get(name)
            undo.callback(os.environ.pop, name, None)
            if before is not None:
                undo.callback(os.environ.__setitem__, name, before)
            os.environ[name] = value
        yield hub


@contextmanager
def hub_environment(cache_dir: Path, *, url: str | None = None, offline: bool = False) -> Iterator[None]:
    """Point this process's huggingface_hub and transformers at a cache folder and at a Hub, or at none.

    Both libraries read the environment once, at import; so this sets the names they made of it, and puts them
    back. With neither `url` nor `offline`, the Hub is a loopback port on which nothing listens: unreachable.
    """
    import huggingface_hub
    import transformers
    from huggingface_hub import constants

    endpoint = url or "http://127.0.0.1:9"
    changes: list[tuple[Any, str, Any]] = [
        (constants, "ENDPOINT", endpoint),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"}),
        (constants, "HF_HUB_CACHE", str(cache_dir)),
        (constants, "HF_HUB_OFFLINE", offline),
        (constants, "HF_HUB_DISABLE_XET", True),
        (constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True),
        (huggingface_hub.hf_api.api, "endpoint", endpoint),
        (transformers.utils.hub, "_hf_api", None),  # a client made earlier remembers the Hub of that time
    ]
    with ExitStack() as undo:
        for owner, name, value in changes:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
