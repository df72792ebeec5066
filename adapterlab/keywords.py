"""Which keywords a lab takes when it loads a model: a typo is refused before anything is downloaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from adapterlab.errors import AdapterLabError

# Keywords of the lab's own, for the "did you mean".
OWN = (
    "tokenizer",
    "quantization",
    "quantization_config",
    "dtype",
    "device_map",
    "revision",
    "token",
    "local_files_only",
)
# What transformers' `from_pretrained` takes beside those, as far as a lab can work with it.
FROM_PRETRAINED = frozenset(
    {
        "allow_all_kernels",
        "attn_implementation",
        "cache_dir",
        "code_revision",
        "config",
        "disable_mmap",
        "experts_implementation",
        "force_download",
        "fusion_config",
        "generation_config",
        "gguf_file",
        "ignore_mismatched_sizes",
        "kernel_config",
        "key_mapping",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "proxies",
        "subfolder",
        "tqdm_class",
        "trust_remote_code",
        "use_kernels",
        "use_safetensors",
        "variant",
    }
)
_BITSANDBYTES = "put it into quantization_config=BitsAndBytesConfig(…)"
_ADAPTER = "open the base model, then lab.load_adapter(…, adapter_name=…)"
_ALWAYS = "leave it out"
# Names that transformers has dropped, or that a lab can't honour, and what to write instead.
REPLACEMENTS = {
    "load_in_8bit": "write quantization='8bit', or quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "load_in_4bit": "write quantization='4bit', or quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
    "torch_dtype": "write dtype=…",
    "use_auth_token": "write token=…",
    "use_flash_attention_2": "write attn_implementation='flash_attention_2'",
    "device": "write device_map=…",
    "low_cpu_mem_usage": f"transformers loads so anyway: {_ALWAYS}",
    "weights_only": f"pickles are never unpickled otherwise: {_ALWAYS}",
    "output_loading_info": f"what is missing or left over is reported anyway: {_ALWAYS}",
    "state_dict": "build the model with it and hand that over: AdapterLab(model, tokenizer=…)",
    "from_tf": "transformers 5 reads PyTorch weights only",
    "from_flax": "transformers 5 reads PyTorch weights only",
    "resume_download": f"downloads are resumed anyway: {_ALWAYS}",
    "adapter_name": _ADAPTER,
    "adapter_kwargs": _ADAPTER,
    "tp_plan": "a lab does not run tensor-parallel; device_map='auto' spreads a model over the GPUs",
    "tp_size": "a lab does not run tensor-parallel; device_map='auto' spreads a model over the GPUs",
    "device_mesh": "a lab does not run tensor-parallel; device_map='auto' spreads a model over the GPUs",
    "distributed_config": "a lab does not run distributed; device_map='auto' spreads a model over the GPUs",
}


def check_keywords(given: Mapping[str, Any]) -> None:
    """`AdapterLabError` for keywords that loading does not take, with replacement or nearest name."""
    wrong = [_verdict(name) for name in given if name not in FROM_PRETRAINED]
    if wrong:
        raise AdapterLabError("; ".join(wrong) + ".")


def _verdict(name: str) -> str:
    if name in REPLACEMENTS:
        return f"{name}= is not taken: {REPLACEMENTS[name]}"
    if name.startswith(("bnb_4bit_", "llm_int8_")):
        return f"{name}= is not taken: {_BITSANDBYTES}"
    return f"Unknown keyword {name}={_suggestion(name, [*OWN, *sorted(FROM_PRETRAINED)])}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}=?)" if near else ": AdapterLab takes transformers' from_pretrained keywords"
