"""The table of capabilities, and each of them done for real: it works where the table says so, and where it does not, the
refusal says the table's reason. Oracles: plain PEFT on a fresh model, on dequantised weights where the base is quantised."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import standins
import torch

from adapterlab import AdapterLab, AdapterLabError

pytestmark = [
    # plain PEFT, which writes the adapters here, remarks on tied weights, missing biases and what it calls shards
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias"),
]

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes' kernels want multiples of 64
IDS = torch.randint(7, 300, (1, 12), generator=torch.Generator().manual_seed(0))
TRAINED_TOKENS = [int(IDS[0, 0]), 17]
BITS = ("8bit", "4bit")


@dataclass(frozen=True)
class Base:
    """A base, and the names of its modules: two linear ones, the second in the MLP, embeddings and head."""

    make: Callable[[], Any]
    linear: tuple[str, str]
    embeddings: str
    head: str = "lm_head"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def seq2seq(self) -> bool:
        return self.make is tiny_t5


def tiny_t5() -> Any:
    return standins.tiny_t5(d_model=64, d_ff=128)


BASES = {
    "llama": Base(lambda: standins.tiny_llama(**WIDE), ("q_proj", "down_proj"), "embed_tokens"),
    "tied": Base(
        lambda: standins.tiny_llama(tie_word_embeddings=True, attention_bias=False, mlp_bias=False, **WIDE),
        ("q_proj", "down_proj"),
        "embed_tokens",
    ),
    "gpt2": Base(lambda: standins.tiny_gpt2(n_embd=64), ("c_attn", "c_fc"), "wte"),
    "opt": Base(
        lambda: standins.tiny_opt(hidden_size=64, ffn_dim=128, word_embed_proj_dim=64),
        ("q_proj", "fc2"),
        "embed_tokens",
    ),
    "t5": Base(tiny_t5, ("q", "wi"), "embed_tokens"),
}


def methods(base: Base) -> dict[str, tuple[str, dict[str, Any]]]:
    """Case → PEFT's type and the fields of its config."""
    linear = {"target_modules": list(base.linear)}
    transposed = {"fan_in_fan_out": True} if base is BASES["gpt2"] else {}
    return {
        "lora": ("lora", {**linear, **transposed}),
        "bias": ("lora", {**linear, **transposed, "lora_bias": True}),
        "dora": ("lora", {**linear, **transposed, "use_dora": True}),
        "ia3": ("ia3", {**linear, **transposed, "feedforward_modules": [base.linear[1]]}),
        "adalora": ("adalora", {**linear, **transposed, "init_r": 4, "target_r": 2}),
        "adalora that can't shrink": ("adalora", {**linear, **transposed, "init_r": 4, "target_r": 4}),
        "embedding": ("lora", {"target_modules": [base.embeddings]}),
        "dora embedding": ("lora", {"target_modules": [base.embeddings], "use_dora": True}),
        "head": ("lora", {"target_modules": [base.head]}),
        "whole embedding": ("lora", {**linear, **transposed, "modules_to_save": [base.embeddings]}),
        "whole head": ("lora", {**linear, **transposed, "modules_to_save": [base.head]}),
        "whole linear": (
            "lora",
            {"target_modules": [base.linear[0]], **transposed, "modules_to_save": [base.linear[1]]},
        ),
        "tokens": ("trainable_tokens", {"target_modules": [base.embeddings], "token_indices": TRAINED_TOKENS}),
        "lora and tokens": (
            "lora",
            {**linear, **transposed, "trainable_token_indices": {base.embeddings: TRAINED_TOKENS}},
        ),
        "fourierft": ("fourierft", {**linear, **transposed, "n_frequency": 64}),
        **(
            {}
            if transposed  # PEFT has them for linear layers only
            else {
                "loha": ("loha", linear),
                "loha head": ("loha", {"target_modules": [base.head]}),
                "lokr": ("lokr", linear),
                "oft": ("oft", {**linear, "oft_block_size": 16, "r": 0}),
                "lily": ("lily", linear),
                "beft": ("beft", linear),
            }
        ),
    }


# Methods that are tried on one base only, to see what they do over packed weights
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "boft": ("boft", {"boft_block_size": 4}),
    "c3a": ("c3a", {"block_size": 16}),
    "deft": ("deft", {}),
    "delora": ("delora", {}),
    "glora": ("glora", {}),
    "gralora": ("gralora", {}),
    "hira": ("hira", {}),
    "hra": ("hra", {}),
    "miss": ("miss", {}),
    "peanut": ("peanut", {}),
    "psoft": ("psoft", {}),
    "road": ("road", {"group_size": 16}),
    "shira": ("shira", {"r": 4}),
    "waveft": ("waveft", {"n_frequency": 64}),
    "ln tuning": ("ln_tuning", {"target_modules": ["input_layernorm"]}),
}
ENDS = ["embedding", "dora embedding", "head", "whole embedding", "whole head", "tokens", "lora and tokens"]
CASES_OF = {  # all methods on one base, and elsewhere those for which the base matters
    "llama": [*methods(BASES["llama"]), *OTHERS],
    "tied": ["bias", "beft", "loha head", *ENDS],
    "gpt2": ["lora", "bias", "dora", "ia3", "adalora", "whole linear"],
    "opt": ["lora", "dora embedding"],
    "t5": ["lora", "bias", "loha", *ENDS],
}
CASES = [(base, case) for base, cases in CASES_OF.items() for case in cases]
PACKED_TOO = ("llama", "gpt2")  # where the same adapter is tried on the base in 8-bit and 4-bit, too


def config_of(base: str, case: str) -> Any:
    from adapterlab.methods import make_config

    if case in OTHERS:
        method, fields = OTHERS[case]
        return make_config(method, **{"target_modules": list(BASES[base].linear), **fields})
    method, fields = methods(BASES[base])[case]
    return make_config(method, **fields)


def logits(model: Any) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :5]
    with torch.no_grad():
        return model.eval()(**inputs).logits


def plain(model: Any, folder: Path) -> torch.Tensor:
    """Logits of a model with the adapter in a folder, by plain PEFT."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(model, folder))


def close(a: torch.Tensor, b: torch.Tensor, shift: torch.Tensor, share: float = 1e-4) -> bool:
    """Whether two results differ by less than a share of what the adapter does."""
    return bool((a - b).abs().max() <= share * shift.abs().max() + 1e-6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capabilities")


@pytest.fixture(scope="module")
def tokenizers() -> dict[bool, Any]:
    return {seq2seq: standins.tiny_tokenizer(seq2seq=seq2seq) for seq2seq in (False, True)}


def settings(kind: str) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if kind == "8bit, threshold 6":
        return {"dtype": torch.float32, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {"dtype": torch.float32, "quantization": None if kind == "plain" else kind}


@pytest.fixture(scope="module")
def labs(root: Path, tokenizers: dict[bool, Any]) -> Iterator[Callable[[str, str], AdapterLab]]:
    """The lab of a base and a quantization, opened once."""
    opened: dict[tuple[str, str], AdapterLab] = {}

    def get(base: str, kind: str) -> AdapterLab:
        if (base, kind) not in opened:
            folder = root / base
            if not folder.exists():
                standins.write_model(folder, BASES[base].make(), tokenizers[BASES[base].seq2seq])
            opened[base, kind] = AdapterLab(folder, **settings(kind))
        return opened[base, kind]

    yield get
    for lab in opened.values():
        lab.close()


@pytest.fixture(scope="module")
def adapters(root: Path, labs: Any) -> Callable[[str, str], Path]:
    """The folder of an adapter, made by plain PEFT, random and acting."""

    def get(base: str, case: str) -> Path:
        folder = root / f"{base} {case}"
        if not folder.exists():
            standins.write_adapter(folder, BASES[base].make(), config_of(base, case), seed=3)
        return folder

    return get


@pytest.fixture
def empty(labs: Callable[[str, str], AdapterLab]) -> Iterator[Callable[[str, str], AdapterLab]]:
    """The same labs, without adapters and with a base that is what it was, also afterwards."""
    used: list[tuple[AdapterLab, torch.Tensor]] = []

    def get(base: str, kind: str) -> AdapterLab:
        lab = labs(base, kind)
        used.append((lab, logits(lab.model)))
        return lab

    yield get
    for lab, before in used:
        for name in list(lab.adapters):
            lab.delete_adapter(name)
        assert torch.equal(logits(lab.model), before), "the base is the base"


def table(lab: AdapterLab, name: str = "x") -> dict[str, str]:
    """Capability → reason, "" where it is possible; the frame is held to its contract on the way."""
    frame = lab.capabilities()
    assert list(frame.columns) == ["adapter", "capability", "possible", "reason"]
    assert frame["possible"].dtype == bool
    assert ((frame["reason"] == "") == frame["possible"]).all()
    mine = frame[frame["adapter"] == name]
    assert mine["capability"].is_unique
    return dict(zip(mine["capability"], mine["reason"]))


def refusal(reason: str, call: Callable[[], Any]) -> Any:
    """What the call gives if there is no reason against it; otherwise hold what it raises to that reason."""
    if not reason:
        return call()
    with pytest.raises(AdapterLabError) as raised:
        call()
    assert reason in str(raised.value)
    return None


def lessons(lab: AdapterLab) -> Any:
    seq2seq = lab.model.config.is_encoder_decoder
    return [("Hello there", "my friend")] * 4 if seq2seq else ["Hello there, my friend"] * 4


def hold_batch(lab: AdapterLab, said: dict[str, str]) -> None:
    lab.clear_cache()  # a base that is known already would leave the column alone
    generation = lab.compare("Hello", [None, "x"], max_new_tokens=2, min_new_tokens=2)["x"]
    assert generation.batched is (said["batch"] == "")
    assert generation.note == (f"run in turn: {said['batch']}" if said["batch"] else "")


def hold_blend(lab: AdapterLab, said: dict[str, str], mine: torch.Tensor, base: torch.Tensor) -> None:
    def half() -> torch.Tensor:
        with lab.using({"x": 0.5}) as model:
            return logits(model)

    result = refusal(said["blend"], half)
    if result is not None:
        assert not torch.equal(result, mine)
        assert not torch.equal(result, base)
        lab.compare("Hello", [{"x": 0.5}], max_new_tokens=1)


def hold_concatenate(lab: AdapterLab, said: dict[str, str], mine: torch.Tensor, base: torch.Tensor) -> None:
    def concatenated() -> torch.Tensor:
        lab.add_weighted_adapter(["x"], [1.0], "sum")
        result = logits(lab.model)
        lab.delete_adapter("sum")
        return result

    result = refusal(said["concatenate"], concatenated)
    assert result is None or close(result, mine, mine - base, 1e-4 if lab._quantization is None else 0.15)


def hold_train(lab: AdapterLab, said: dict[str, str]) -> None:
    before = {key: tensor.clone() for key, tensor in lab._adapters.state("x")[1].items()}
    run = refusal(
        said["train"], lambda: lab.train("x", lessons(lab), max_steps=4, learning_rate=1e-2, disable_tqdm=True)
    )
    after = lab._adapters.state("x")[1]
    changed = any(not torch.equal(after[key], tensor) for key, tensor in before.items())
    assert changed is (said["train"] == "")
    assert run is None or run.steps == 4
    refusal(said["train"], lambda: lab.trainer("x", lessons(lab), max_steps=3))


@pytest.mark.parametrize(("base", "case"), CASES, ids=lambda part: str(part).replace(" ", "-"))
def test_the_table_is_what_happens(
    base: str, case: str, empty: Any, adapters: Any, tmp_path: Path, tokenizers: dict[bool, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    lab, folder = empty(base, "plain"), adapters(base, case)
    bare = logits(lab.model)
    lab.load_adapter(folder, "x")
    mine, said = logits(lab.model), table(lab)
    assert close(mine, plain(BASES[base].make(), folder), mine - bare)
    hold_batch(lab, said)
    hold_blend(lab, said, mine, bare)
    hold_concatenate(lab, said, mine, bare)
    merged = refusal(said["merge"], lambda: lab.merge_and_unload("x"))
    assert merged is None or close(logits(merged), mine, mine - bare)
    if refusal(said["merge_to_disk"], lambda: lab.merge_and_unload("x", tmp_path / "merged")) is not None:
        auto = AutoModelForSeq2SeqLM if BASES[base].seq2seq else AutoModelForCausalLM
        assert close(logits(auto.from_pretrained(tmp_path / "merged")), mine, mine - bare), "what was saved, too"
    assert said["save"] == ""
    assert close(plain(BASES[base].make(), lab.save_adapter("x", tmp_path / "saved")), mine, mine - bare)
    refusal(said["ranks"], lambda: lab.ranks("x"))
    refusal(said["delta_norms"], lambda: lab.delta_norms("x"))
    if base == "llama" or case == "lora":  # nothing of the other bases matters to it
        hold_train(lab, said)
    for kind in BITS if base in PACKED_TOO or case == "lora" else ():
        packed = empty(base, kind)
        refusal(said[kind], lambda packed=packed: packed.load_adapter(folder, "x"))
        if said[kind]:
            flight = packed.check_adapter(folder)
            assert any(said[kind] in problem for problem in flight.problems)
            refusal(said[kind], lambda packed=packed: packed.add_adapter(config_of(base, case), "fresh"))
            assert list(packed.adapters) == []
            continue
        wide, shift = logits(dequantised(packed, base)), logits(packed.model)
        over = plain(dequantised(packed, base), folder) - wide
        with packed.using(None) as model:
            here = logits(model)
        rounding = float((here - wide).abs().max())  # 8-bit layers round what goes into them, too
        assert rounding < (1e-5 if kind == "4bit" else 0.05) * float(wide.abs().max())
        error = float((shift - here - over).abs().max())
        assert error <= 2 * rounding + (1e-4 if kind == "4bit" else 0.1) * float(over.abs().max())


def dequantised(lab: AdapterLab, base: str) -> Any:
    """The model that the packed weights stand for, in float32."""
    import bitsandbytes as bnb

    made = BASES[base].make()
    with lab.using(None) as model, torch.no_grad():
        for path, module in model.named_modules():
            target = made.get_submodule(path)
            if type(module).__name__ == "Linear8bitLt":
                codes, scales = module.weight.CB, module.weight.SCB
                codes, scales = (
                    (module.state.CB, module.state.SCB) if codes is None or scales is None else (codes, scales)
                )
                weight = codes.float() * scales[:, None] / 127
            elif type(module).__name__ == "Linear4bit":
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            else:
                continue
            target.weight.copy_(weight.T if type(target).__name__ == "Conv1D" else weight)
    return made


PACKED_CASES = ["lora", "bias", "dora", "ia3", "adalora", "whole-head", "loha", "oft", "gralora"]


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *((kind, case) for kind in BITS for case in PACKED_CASES),
        *(("8bit, threshold 6", case) for case in ("lora", "dora", "embedding")),
    ],
)
def test_the_table_is_what_happens_over_packed_weights(
    kind: str, case: str, empty: Any, adapters: Any, tmp_path: Path
) -> None:
    lab, folder = empty("llama", kind), adapters("llama", case.replace("-", " "))
    bare = logits(lab.model)
    flight = lab.check_adapter(folder)
    if not flight.ok:
        with pytest.raises(AdapterLabError) as raised:
            lab.load_adapter(folder, "x")
        assert flight.problems[0] in str(raised.value)
        assert case in ("loha", "oft"), "4-bit LoHa, and PEFT 0.20's OFT"
        return
    lab.load_adapter(folder, "x")
    mine, said = logits(lab.model), table(lab)
    assert said[kind.partition(",")[0]] == "", "it works on this base, which is quantised"
    assert "leak into each other" in said["batch"] if "threshold" in kind else True
    hold_batch(lab, said)
    hold_blend(lab, said, mine, bare)
    hold_concatenate(lab, said, mine, bare)
    assert said["merge"]
    refusal(said["merge_to_disk"], lambda: lab.merge_and_unload("x", tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    lab.save_adapter("x", tmp_path / "saved")
    lab.load_adapter(tmp_path / "saved", "again")
    assert torch.equal(logits(lab.model), mine)
    lab.delete_adapter("again")
    refusal(said["ranks"], lambda: lab.ranks("x"))
    refusal(said["delta_norms"], lambda: lab.delta_norms("x"))
    hold_train(lab, said)
    lab.set_adapter("x")
    logits(lab.model)  # and deleted while it acts: what it left in the base's layers must not stay


def test_experts(tmp_path: Path) -> None:
    """LoRA on a bare parameter, which holds the experts of a layer."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    folder = standins.write_adapter(tmp_path / "x", standins.tiny_mixtral(), config, seed=1)
    lab = AdapterLab(standins.tiny_mixtral(), tokenizer=standins.tiny_tokenizer())
    bare = logits(lab.model)
    lab.load_adapter(folder, "x")
    mine, said = logits(lab.model), table(lab)
    assert "bare parameter" in said["batch"]
    hold_batch(lab, said)
    hold_blend(lab, said, mine, bare)
    hold_concatenate(lab, said, mine, bare)
    merged = refusal(said["merge"], lambda: lab.merge_and_unload("x"))
    assert close(logits(merged), mine, mine - bare)
    hold_train(lab, said)


@pytest.mark.parametrize("where", ["in part", "as a whole"])
def test_an_offloaded_base(where: str, tmp_path: Path) -> None:
    standins.write_model(tmp_path / "base", standins.tiny_llama(), standins.tiny_tokenizer())
    parts = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places = {**parts, "model.layers.1": "disk"} if where == "in part" else {"": "disk"}
    lab = AdapterLab(tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "off"))
    lab.add_adapter("lora", "x", target_modules=["q_proj"], init_lora_weights=False)
    said = table(lab)
    assert (said["train"] == "") is (where == "in part")
    assert (said["batch"] == "") is (where == "as a whole")
    assert "without offload" in said["merge"]
    hold_batch(lab, said)
    hold_train(lab, said)
    refusal(said["merge"], lambda: lab.merge_and_unload("x"))
    refusal(said["delta_norms"], lambda: lab.delta_norms("x"))
    lab.close()


def test_a_new_adapter_that_can_t_be_trained_is_not_left_behind(empty: Any) -> None:
    lab = empty("llama", "4bit")
    with pytest.raises(AdapterLabError, match="C3A writes into what the base's layers give back"):
        lab.train("x", lessons(lab), method="c3a", block_size=16, target_modules=["q_proj"], max_steps=2)
    assert list(lab.adapters) == []


def test_the_table_reads_no_weights_and_waits_for_nobody(full_lab: AdapterLab) -> None:
    import threading

    from torch.utils._python_dispatch import TorchDispatchMode

    frames: list[Any] = []
    computed: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            computed.append(str(func))
            return func(*args, **(kwargs or {}))

    def look() -> None:
        with Watch():
            frames.append(full_lab.capabilities())

    with full_lab.using("pirate"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive(), "the lab is held by this thread"
    assert set(frames[0]["adapter"]) == set(full_lab.adapters)
    assert computed == []


def test_without_adapters_the_table_is_empty(lab: AdapterLab) -> None:
    frame = lab.capabilities()
    assert len(frame) == 0
    assert list(frame.columns) == ["adapter", "capability", "possible", "reason"]


def test_one_layer_of_another_kind_counts(lab: AdapterLab) -> None:
    """The table looks at one layer of each kind: the odd one among many must not be lost."""
    lab.add_adapter(
        "lora", "x", target_modules=["q_proj", "v_proj"], modules_to_save=["model.layers.1.self_attn.o_proj"]
    )
    said = table(lab)
    assert "modules_to_save" in said["blend"]
    assert "modules_to_save" in said["8bit"]
    assert json.loads(json.dumps(said)) == copy.deepcopy(said), "plain texts"
