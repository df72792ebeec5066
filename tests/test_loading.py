"""What people have → a base model: ids, folders, objects in hand, quantized weights, and everything that is refused."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import pickle
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from standins import (
    OPT_350M,
    OPT_350M_FULL,
    OPT_350M_LORA,
    StandinHub,
    hub_environment,
    opt_config,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_t5,
    tiny_tokenizer,
    write_adapter,
    write_model,
    write_opt_350m,
    write_opt_350m_lora,
)

from adapterlab.errors import AdapterLabError
from adapterlab.keywords import FROM_PRETRAINED, REPLACEMENTS
from adapterlab.loading import load_base
from adapterlab.quiet import KNOWN_NOISE, quiet, silence_known_noise


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    root = tmp_path_factory.mktemp("repos")
    return {OPT_350M: write_opt_350m(root / "opt"), OPT_350M_LORA: write_opt_350m_lora(root / "lora")}


@pytest.fixture
def online(repos, tmp_path):
    with StandinHub(repos) as hub, hub_environment(tmp_path / "cache", url=hub.url):
        yield hub


@pytest.fixture
def opt_folder(repos):
    return repos[OPT_350M]


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """A folder with a Llama whose layers are wide enough for 4-bit blocks, in bfloat16."""
    model = tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    return write_model(tmp_path_factory.mktemp("models") / "wide", model, tiny_tokenizer(chat=True))


@pytest.fixture
def no_hub(tmp_path):
    with hub_environment(tmp_path / "cold", offline=True):
        yield


def refusal(*args, **kwargs) -> str:
    with pytest.raises(AdapterLabError) as caught:
        load_base(*args, **kwargs)
    return str(caught.value)


def logits(model, text="What is the moon?"):
    with torch.no_grad():
        return model(**tiny_tokenizer()(text, return_tensors="pt", return_token_type_ids=False)).logits


def reference_opt(folder):
    """The stand-in's model, put together without `from_pretrained`."""
    from transformers import OPTForCausalLM

    model = OPTForCausalLM(opt_config()).half()
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    model.model.load_state_dict(weights)
    model.tie_weights()
    return model.eval()


# ----- ids -----


def test_facebook_opt_350m(online, repos, capfd):
    base = load_base("facebook/opt-350m")
    assert type(base.model).__name__ == "OPTForCausalLM"
    assert (base.base_id, base.base_path) == ("facebook/opt-350m", "facebook/opt-350m")
    assert base.adapter is None
    assert base.owned
    assert base.quantization is None
    assert base.model.dtype == torch.float16
    assert not base.model.training
    torch.testing.assert_close(logits(base.model), logits(reference_opt(repos[OPT_350M])), rtol=0, atol=0)
    assert base.tokenizer("hi").input_ids[0] == base.tokenizer.eos_token_id  # OPT begins with </s>
    assert base.tokenizer.pad_token == "<pad>"
    out, err = capfd.readouterr()
    assert "Loading weights" in err
    assert out == ""


def test_ybelkada_opt_350m_lora(online, repos):
    base = load_base("ybelkada/opt-350m-lora")
    assert (base.base_id, base.base_path) == ("facebook/opt-350m", "facebook/opt-350m")
    assert base.adapter.source == "ybelkada/opt-350m-lora"
    assert base.adapter.default_name == "opt-350m-lora"
    assert not getattr(base.model, "_hf_peft_config_loaded", False)  # the base is bare: attaching is the lab's
    torch.testing.assert_close(logits(base.model), logits(reference_opt(repos[OPT_350M])), rtol=0, atol=0)
    assert base.tokenizer is not None


def test_the_published_geometry_has_the_published_size():
    from transformers import OPTForCausalLM

    with torch.device("meta"):
        model = OPTForCausalLM(opt_config(**OPT_350M_FULL))
    width, narrow, wide, layers, words = 1024, 512, 4096, 24, 50272
    norm, attention = 2 * width, 4 * (width * width + width)
    block = attention + 2 * norm + (width * wide + wide) + (wide * width + width)
    expected = words * narrow + (2048 + 2) * width + 2 * narrow * width + layers * block
    assert model.num_parameters() == expected == 331_196_416


def test_no_conversion_is_asked_for_in_the_background(online, monkeypatch):
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    load_base(OPT_350M)
    assert [thread.name for thread in threading.enumerate() if "conversion" in thread.name] == []
    assert [request for request in online.requests if "/commits/" in request or "/discussions" in request] == []
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


@pytest.mark.parametrize("offline", [True, False])
def test_a_warm_cache_needs_no_hub(repos, tmp_path, offline, caplog):
    with StandinHub(repos) as hub, hub_environment(tmp_path / "cache", url=hub.url):
        online = load_base(OPT_350M_LORA)
    with hub_environment(tmp_path / "cache", offline=offline):
        again = load_base(OPT_350M_LORA)
    assert again.adapter == online.adapter
    torch.testing.assert_close(logits(again.model), logits(online.model), rtol=0, atol=0)
    assert caplog.records == []  # not one retry


def test_a_cold_cache_is_said_in_one_sentence(no_hub):
    message = refusal(OPT_350M)
    assert message.startswith(f"{OPT_350M} is not in the local cache")
    assert "HF_HUB_OFFLINE" in message


def test_a_half_filled_cache_is_said_too(repos, tmp_path):
    only_config = tmp_path / "partial"
    only_config.mkdir()
    (only_config / "config.json").write_bytes((repos[OPT_350M] / "config.json").read_bytes())
    with StandinHub({OPT_350M: only_config}) as hub, hub_environment(tmp_path / "cache", url=hub.url):
        assert "pytorch_model.bin" in refusal(OPT_350M)
    with hub_environment(tmp_path / "cache", offline=True):
        assert "not in the local cache, or not wholly" in refusal(OPT_350M)


def test_a_model_too_large_is_told_what_helps(no_hub, opt_folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    assert "does not fit into memory: try quantization=" in refusal(opt_folder)


# ----- folders -----


@pytest.mark.parametrize(
    ("make", "class_name"),
    [
        (tiny_opt, "OPTForCausalLM"),
        (tiny_llama, "LlamaForCausalLM"),
        (tiny_gpt2, "GPT2LMHeadModel"),
        (tiny_t5, "T5ForConditionalGeneration"),
        (tiny_bart, "BartForConditionalGeneration"),
    ],
)
def test_a_folder_is_loaded_by_its_architecture(tmp_path, no_hub, make, class_name):
    model = make()
    folder = write_model(tmp_path / "my-model", model, tiny_tokenizer(seq2seq=model.config.is_encoder_decoder))
    base = load_base(folder)
    assert type(base.model).__name__ == class_name
    assert (base.base_id, base.base_path) == ("my-model", str(folder.resolve()))
    expected, found = model.state_dict(), base.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    text = "What is the moon?"
    assert base.tokenizer(text).input_ids == tiny_tokenizer(seq2seq=model.config.is_encoder_decoder)(text).input_ids


def test_a_relative_folder_and_dtype_and_device(tmp_path, no_hub, monkeypatch):
    write_model(tmp_path / "my-model", tiny_llama(), tiny_tokenizer())
    monkeypatch.chdir(tmp_path)
    base = load_base("my-model", dtype="bfloat16", device_map="cpu", attn_implementation="eager")
    assert base.model.dtype == torch.bfloat16
    assert base.model.device.type == "cpu"
    assert base.model.config._attn_implementation == "eager"


def test_an_adapter_folder_brings_its_base(tmp_path, no_hub):
    from peft import LoraConfig

    model = tiny_llama()
    base_folder = write_model(tmp_path / "base", model, tiny_tokenizer(chat=True))
    folder = write_adapter(tmp_path / "pirate", model, LoraConfig(target_modules=["q_proj"]), base="../base")
    base = load_base(folder)
    assert base.adapter.folder == folder.resolve()
    assert base.adapter.default_name == "pirate"
    assert (base.base_id, base.base_path) == ("base", str(base_folder.resolve()))
    assert base.tokenizer.chat_template
    assert torch.equal(logits(base.model), logits(model))


@pytest.mark.parametrize("also_above", [False, True])
def test_an_adapter_saved_into_its_model_s_folder(tmp_path, no_hub, also_above):
    from peft import LoraConfig

    model = tiny_llama()
    folder = write_model(tmp_path / "out" / "both", model, tiny_tokenizer())
    for one in [folder, folder.parent] if also_above else [folder]:
        write_adapter(one, model, LoraConfig(target_modules=["q_proj"]), base="nobody/nothing")
    base = load_base(folder)
    assert base.adapter.folder == folder.resolve()
    assert base.base_id == "both"
    assert base.model.name_or_path == base.model.config.name_or_path == base.base_path == str(folder.resolve())
    assert not getattr(base.model, "_hf_peft_config_loaded", False)
    assert not [name for name, _ in base.model.named_parameters() if "lora" in name]
    assert torch.equal(logits(base.model), logits(model))


def test_an_adapter_with_a_stray_config_is_still_an_adapter(tmp_path, no_hub):
    from peft import LoraConfig

    model = tiny_llama()
    write_model(tmp_path / "base", model, tiny_tokenizer())
    folder = write_adapter(tmp_path / "pirate", model, LoraConfig(target_modules=["q_proj"]), base="base")
    model.config.save_pretrained(folder)  # as some trainers do
    assert load_base(folder).base_id == "base"


def test_a_folder_that_is_neither_is_refused_listing_what_it_holds(tmp_path, no_hub):
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "pirate").mkdir()
    (tmp_path / "pirate" / "adapter_config.json").write_text("{}", encoding="utf-8")
    message = refusal(tmp_path)
    assert "neither a model (config.json) nor an adapter" in message
    assert "notes.txt" in message
    assert "subfolder='pirate'" in message
    (tmp_path / "empty").mkdir()
    assert "It is empty" in refusal(tmp_path / "empty")


def test_a_model_without_weights_or_with_a_broken_config_is_refused(tmp_path, no_hub):
    tiny_llama().config.save_pretrained(tmp_path / "bare")
    assert "model.safetensors" in refusal(tmp_path / "bare")
    for name, text in (("json", "{nope"), ("type", '{"model_type": "florp"}'), ("no type", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text, encoding="utf-8")
        assert f"{tmp_path / name} could not be loaded" in refusal(tmp_path / name)


def test_a_folder_without_a_tokenizer_has_none(tmp_path, no_hub, capsys):
    folder = write_model(tmp_path / "silent", tiny_opt())
    assert load_base(folder).tokenizer is None  # AutoTokenizer would make up an empty one for OPT
    assert "silent comes without a tokenizer" in capsys.readouterr().out
    own = tiny_tokenizer()
    assert load_base(folder, tokenizer=own).tokenizer is own
    own.save_pretrained(tmp_path / "words")
    assert len(load_base(folder, tokenizer=tmp_path / "words").tokenizer) == len(own)
    assert "holds no tokenizer" in refusal(folder, tokenizer=folder)
    assert "tokenizer= is a int" in refusal(folder, tokenizer=3)


# ----- what generates no text -----


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("bert", "BertModel"),
        ("bert", "BertForMaskedLM"),
        ("bert", None),
        ("vit", "ViTForImageClassification"),
        ("llama", "LlamaForSequenceClassification"),
        ("mistral", "MistralModel"),
        ("t5", "T5EncoderModel"),
        ("whisper", "WhisperForConditionalGeneration"),
    ],
)
def test_other_architectures_are_refused_before_any_weights(tmp_path, no_hub, model_type, architecture):
    config = {"model_type": model_type} | ({"architectures": [architecture]} if architecture else {})
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = refusal(tmp_path)
    assert (architecture or model_type) in message
    assert "causal language models" in message


@pytest.mark.parametrize(
    ("architecture", "make"), [("OPTModel", tiny_opt), ("BartModel", tiny_bart), (None, tiny_opt), (None, tiny_t5)]
)
def test_a_config_that_names_no_head_is_loaded_when_the_head_is_the_embedding(tmp_path, no_hub, architecture, make):
    model = make()
    folder = write_model(tmp_path / "model", model, tiny_tokenizer())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [architecture] if architecture else None
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert type(load_base(folder).model) is type(model)


# ----- nothing runs that was not asked for -----


def test_custom_code_is_refused_without_a_question_at_the_keyboard(tmp_path, no_hub, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "florp",
                "architectures": ["FlorpForCausalLM"],
                "auto_map": {"AutoConfig": "florp.FlorpConfig", "AutoModelForCausalLM": "florp.FlorpForCausalLM"},
            }
        ),
        encoding="utf-8",
    )
    (tmp_path / "florp.py").write_text("raise SystemExit('ran')", encoding="utf-8")

    def asked(*_):
        raise AssertionError("asked at the keyboard")

    monkeypatch.setattr("builtins.input", asked)
    assert "custom code" in refusal(tmp_path)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path, no_hub):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = write_opt_350m(tmp_path / "opt")
    torch.save({"decoder.embed_tokens.weight": Trap()}, folder / "pytorch_model.bin", pickle_module=pickle)
    assert "could not be loaded" in refusal(folder)
    assert not (tmp_path / "sprung").exists()


# ----- keywords -----


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"quantisation": "8bit"}, "quantisation= (did you mean quantization=?)"),
        ({"trust_remote_cod": True}, "did you mean trust_remote_code=?"),
        ({"florp": 1}, "Unknown keyword florp="),
        ({"load_in_8bit": True}, "quantization='8bit', or quantization_config="),
        ({"load_in_4bit": True}, "quantization='4bit', or quantization_config="),
        ({"torch_dtype": "float16"}, "write dtype="),
        ({"bnb_4bit_quant_type": "nf4"}, "quantization_config=BitsAndBytesConfig"),
        ({"weights_only": False}, "leave it out"),
        ({"florp": 1, "load_in_8bit": True}, "Unknown keyword florp="),
        ({"quantization": "3bit"}, "use '8bit' or '4bit'"),
        ({"quantization": "8bit", "quantization_config": {}}, "not both"),
        ({"dtype": "flot16"}, "dtype='flot16' is unknown"),
        ({"dtype": "nn"}, "dtype='nn' is unknown"),
    ],
)
def test_keywords_are_checked_before_anything_is_downloaded(online, keywords, said):
    assert said in refusal(OPT_350M, **keywords)
    assert online.requests == []


def test_a_nonsense_device_is_refused(no_hub, opt_folder):
    assert "florp" in refusal(opt_folder, device_map="florp")


def test_the_keywords_are_those_that_transformers_reads():
    from transformers import PreTrainedModel, modeling_utils
    from transformers.models.auto import auto_factory

    source = inspect.getsource(modeling_utils) + inspect.getsource(auto_factory)
    signature = inspect.signature(PreTrainedModel.from_pretrained).parameters
    unread = {name for name in FROM_PRETRAINED if f'"{name}"' not in source and name not in signature}
    assert unread == set()
    assert not FROM_PRETRAINED & set(REPLACEMENTS)


# ----- objects in hand -----


def test_a_model_in_hand_stays_the_caller_s(no_hub):
    model, own = tiny_opt().train(), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = load_base(model, tokenizer=own)
    assert base.model is model
    assert base.tokenizer is own
    assert not base.owned
    assert base.adapter is None
    assert model.training  # as it was
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert (base.base_id, base.base_path) == ("OPTForCausalLM", "")


def test_without_a_tokenizer_to_be_had_there_is_none(no_hub, capfd):
    assert load_base(tiny_opt()).tokenizer is None
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("offline", [True, False])
def test_a_model_from_the_hub_brings_its_tokenizer_quietly(repos, tmp_path, offline, capfd, caplog):
    from transformers import OPTForCausalLM

    with StandinHub(repos) as hub, hub_environment(tmp_path / "cache", url=hub.url):
        model = OPTForCausalLM.from_pretrained(OPT_350M)
        if offline:
            load_base(OPT_350M)  # so that the tokenizer's files are in the cache
    capfd.readouterr()
    with (
        StandinHub(repos) as hub,
        hub_environment(tmp_path / "cache", url=None if offline else hub.url, offline=offline),
    ):
        base = load_base(model)
    assert base.tokenizer.pad_token == "<pad>"
    assert (base.base_id, base.base_path) == (OPT_350M, OPT_350M)
    assert "".join(capfd.readouterr()) == ""
    assert caplog.records == []


def test_a_model_from_a_folder_brings_its_tokenizer(tmp_path, no_hub):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    folder = write_model(tmp_path / "llama", tiny_llama(), tiny_tokenizer(chat=True))
    for model_class in (LlamaForCausalLM, AutoModelForCausalLM):
        base = load_base(model_class.from_pretrained(folder))
        assert base.tokenizer.chat_template
        assert (base.base_id, base.base_path) == ("llama", str(folder.resolve()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 in transformers 5.23
def test_a_peft_model_is_taken_by_its_base(no_hub):
    from peft import IA3Config, LoraConfig, PeftMixedModel, get_peft_model

    for wrap in (get_peft_model, PeftMixedModel):
        model = tiny_llama()
        wrapped = wrap(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        with_adapter = logits(wrapped)
        base = load_base(wrapped)
        assert base.model is model
        assert not base.owned
        assert torch.equal(logits(base.model), with_adapter)  # the tuner layers are left in it
    native = tiny_llama()
    native.add_adapter(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "other")
    assert load_base(native).model is native
    assert native.active_adapters() == ["other"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_prompt_learning_is_refused_by_its_method(no_hub):
    from peft import PromptTuningConfig, get_peft_model

    wrapped = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    message = refusal(wrapped)
    assert "PROMPT_TUNING" in message
    assert "model.generate" in message


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (None, "NoneType"),
        (3, "int"),
        (torch.nn.Linear(1, 1), "Linear object is no model"),
        (torch.nn.DataParallel(tiny_opt()), "Give its .module"),
        (SimpleNamespace(model=tiny_opt()), "Give its .model"),
        (type(tiny_opt()), "The class OPTForCausalLM"),
        (tiny_tokenizer(), "is no model"),
        (tiny_bert(), "BertModel generates no text"),
        (tiny_opt().model, "OPTModel generates no text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_model_is_refused(no_hub, thing, said):
    assert said in refusal(thing)


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"dtype": "float16"}, ["dtype="]),
        ({"quantization": "8bit", "device_map": "cpu"}, ["quantization=", "device_map="]),
        ({"revision": "main"}, ["revision="]),
        ({"trust_remote_code": True}, ["trust_remote_code="]),
    ],
)
def test_what_belongs_to_loading_is_refused_for_a_model_in_hand(no_hub, keywords, named):
    message = refusal(tiny_opt(), **keywords)
    assert all(name in message for name in named)
    assert "loaded already" in message


# ----- quantized -----


def layers_of(model, class_name):
    return [module for module in model.modules() if type(module).__name__ == class_name]


def test_8bit_rows_do_not_leak_into_each_other(no_hub, wide_llama, caplog):
    base = load_base(wide_llama, quantization="8bit")
    layers = layers_of(base.model, "Linear8bitLt")
    assert base.quantization == "8bit"
    assert len(layers) == 14
    assert {layer.state.threshold for layer in layers} == {0.0}
    ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = base.model(ids).logits.float()
        alone = torch.cat([base.model(row[None]).logits.float() for row in ids])
    torch.testing.assert_close(together, alone, rtol=0, atol=0.02 * float(alone.abs().max()))
    assert [record for record in caplog.records if "MatMul8bitLt" in record.getMessage()] == []


def test_4bit_is_nf4(no_hub, wide_llama):
    base = load_base(wide_llama, quantization="4bit")
    layers = layers_of(base.model, "Linear4bit")
    assert base.quantization == "4bit"
    assert len(layers) == 14
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    if not torch.cuda.is_available():
        assert {layer.compute_dtype for layer in layers} == {torch.float32}


def test_a_quantization_config_is_passed_through(no_hub, wide_llama):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    base = load_base(wide_llama, quantization_config=config)
    layers = layers_of(base.model, "Linear4bit")
    assert {(layer.weight.quant_type, layer.weight.quant_state.nested) for layer in layers} == {("fp4", True)}


def test_what_is_quantized_already_is_not_quantized_again(no_hub, wide_llama, tmp_path):
    load_base(wide_llama, quantization="4bit").model.save_pretrained(tmp_path / "nf4")
    assert load_base(tmp_path / "nf4").quantization == "4bit"
    assert "is quantized already" in refusal(tmp_path / "nf4", quantization="8bit")


@pytest.mark.parametrize(
    ("settings", "name"), [({"quant_method": "gptq"}, "gptq"), ({"quant_method": "gguf"}, None), (None, None)]
)
def test_other_quantizers_are_named(no_hub, settings, name):
    model = tiny_opt()
    if settings is not None:
        model.config.quantization_config = settings
    assert load_base(model).quantization == name


@pytest.fixture
def packing_cpu(monkeypatch):
    """Let bitsandbytes believe that this CPU has AVX512-BF16, where it repacks 4-bit weights at the first forward."""
    import bitsandbytes.nn.modules as modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)


def adapter_gradients(model):
    """Gradients of a fixed random LoRA on every projection, by plain PEFT, for one fixed batch."""
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model.add_adapter(LoraConfig(target_modules=targets, r=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(0)
    parameters = {name: p for name, p in sorted(model.named_parameters()) if "lora_" in name}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randint(3, 300, (2, 10), generator=generator)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def test_4bit_gradients_are_the_same_after_generating(no_hub, wide_llama, packing_cpu):
    import bitsandbytes

    fresh, used = (load_base(wide_llama, quantization="4bit").model for _ in range(2))
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers_of(used, "Linear4bit"))

    def dequantized(model):
        return [
            bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            for layer in layers_of(model, "Linear4bit")
        ]

    before = dequantized(used)
    logits(used)
    assert all(torch.equal(a, b) for a, b in zip(before, dequantized(used), strict=True))
    expected, found = adapter_gradients(fresh), adapter_gradients(used)
    assert len(found) == 28
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_4bit_layers_in_hand_are_kept_unpacked_or_refused(no_hub, wide_llama, packing_cpu):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(wide_llama, quantization_config=config)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers_of(model, "Linear4bit"))  # the danger is there
    base = load_base(model)
    assert base.quantization == "4bit"
    assert not base.owned
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers_of(model, "Linear4bit"))

    packed = AutoModelForCausalLM.from_pretrained(wide_llama, quantization_config=config)
    with contextlib.suppress(Exception):  # without the instructions the packed kernel is missing: packing is before
        logits(packed)
    message = refusal(packed)
    assert "repacked by bitsandbytes" in message
    assert "q_proj" in message


# ----- quiet -----


def test_known_noise_is_filtered_and_nothing_else(caplog):
    silence_known_noise()
    silence_known_noise()
    for name, beginnings in KNOWN_NOISE.items():
        logger = logging.getLogger(name)
        assert len(logger.filters) == 1
        for beginning in beginnings:
            logger.warning(beginning + " %s and so on", "x")
        logger.warning("something real")
    assert [record.getMessage() for record in caplog.records] == ["something real"] * len(KNOWN_NOISE)


def test_known_warnings_are_filtered_and_nothing_else():
    said = (
        "You are calling .generate() with the `input_ids` being on a device type different than your model's device. "
        "`input_ids` is on cpu, whereas the model is on {}. You may experience unexpected behaviors."
    )
    for _ in range(2):  # filters that are set later come first, until the next call
        warnings.simplefilter("error")
        silence_known_noise()
        before = list(warnings.filters)
        silence_known_noise()
        assert list(warnings.filters) == before
        warnings.warn(said.format("meta"), UserWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="model is on cuda"):
            warnings.warn(said.format("cuda"), UserWarning, stacklevel=1)


def test_the_filtered_lines_are_those_that_bitsandbytes_says():
    import bitsandbytes.autograd._functions as functions
    import bitsandbytes.backends.cpu.ops as ops

    for module in (functions, ops):
        assert module.logger.name in KNOWN_NOISE
        for beginning in KNOWN_NOISE[module.logger.name]:
            assert f'"{beginning}' in Path(module.__file__).read_text(encoding="utf-8")


def test_quiet_restores_levels_and_warnings(caplog):
    names = ("transformers", "peft")
    levels = [logging.getLogger(name).level for name in names]
    filters = list(warnings.filters)
    noisy = logging.getLogger("peft.somewhere")
    with quiet():
        warnings.warn("unheard", stacklevel=1)
        noisy.warning("unheard")
        noisy.error("heard")
    noisy.warning("heard again")
    with contextlib.suppress(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert [logging.getLogger(name).level for name in names] == levels
    assert warnings.filters == filters
    assert [record.getMessage() for record in caplog.records] == ["heard", "heard again"]
