"""The guide's own path, by its own names, through the real Hub client against stand-ins with the real file formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import StandinHub, hub_environment, write_opt_350m, write_opt_350m_lora
from tiny_adapters import logits_of

from adapterlab import AdapterLab, AdapterLabError

OPT, LORA = "facebook/opt-350m", "ybelkada/opt-350m-lora"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandinHub]:
    """A Hub on loopback that serves both stand-ins."""
    root = tmp_path_factory.mktemp("repos")
    repos = {OPT: write_opt_350m(root / "opt"), LORA: write_opt_350m_lora(root / "lora")}
    with StandinHub(repos) as hub, hub_environment(root / "cache", url=hub.url):
        yield hub


@pytest.fixture
def expected(hub: StandinHub, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Plain transformers and plain PEFT, by the same names."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, OPTForCausalLM

    base = AutoModelForCausalLM.from_pretrained(OPT, dtype="auto").eval()
    assert isinstance(base, OPTForCausalLM)
    with torch.no_grad():
        bare = base(ids).logits
        return {OPT: bare, LORA: PeftModel.from_pretrained(base, LORA).eval()(ids).logits}


def test_a_base_model_by_its_id(hub: StandinHub, expected: dict[str, torch.Tensor], ids: torch.Tensor) -> None:
    lab = AdapterLab("facebook/opt-350m")
    assert lab.name == OPT
    assert lab.selection.label == "base"
    assert torch.equal(logits_of(lab, ids), expected[OPT])
    assert lab.load_adapter("ybelkada/opt-350m-lora") == "opt-350m-lora"
    assert torch.allclose(logits_of(lab, ids), expected[LORA], atol=1e-2)
    comparison = lab.compare("Hello, my name is", columns=[None, "opt-350m-lora", {"opt-350m-lora": 0.5}])
    assert comparison.rendered == ["Hello, my name is"]
    assert comparison["opt-350m-lora"].logit_shift > 0
    assert lab.verify()["agrees"].all()


def test_an_adapter_by_its_id_brings_its_base(
    hub: StandinHub, expected: dict[str, torch.Tensor], ids: torch.Tensor
) -> None:
    lab = AdapterLab("ybelkada/opt-350m-lora")
    assert lab.name == OPT
    assert lab.active_adapters == {"opt-350m-lora": 1.0}
    info = lab.adapters["opt-350m-lora"]
    assert (info.method, info.r, info.target_modules, info.status) == ("LORA", 16, ("q_proj", "v_proj"), "loaded")
    assert torch.allclose(logits_of(lab, ids), expected[LORA], atol=1e-2)
    lab.set_adapter(None)
    assert torch.equal(logits_of(lab, ids), expected[OPT])


def test_objects_loaded_by_the_base_class_or_the_auto_class(
    hub: StandinHub, expected: dict[str, torch.Tensor], ids: torch.Tensor
) -> None:
    """`from_pretrained` of an adapter id, natively: the lab takes the model and its adapter as they are."""
    from transformers import AutoModelForCausalLM, OPTForCausalLM

    for cls in (OPTForCausalLM, AutoModelForCausalLM):
        model: Any = cls.from_pretrained(LORA, dtype="auto")
        lab = AdapterLab(model)
        assert lab.tokenizer is not None
        assert list(lab.adapters) == ["default"]
        assert torch.equal(logits_of(lab, ids), expected[OPT])
        lab.set_adapter("default")
        # transformers rounds a natively loaded adapter to the base's fp16, PeftModel keeps it in fp32
        assert torch.allclose(logits_of(lab, ids), expected[LORA], atol=4e-2)


def test_the_published_sizes(tmp_path: Path) -> None:
    """6 MB against 700 MB, at the full geometry: exact numbers from real tensors and a real file."""
    from peft import LoraConfig

    base = write_opt_350m(tmp_path / "opt-350m", full=True)
    lab = AdapterLab(base)
    lab.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]), "lora")
    frame = lab.parameters().set_index("owner")
    assert frame.loc["base", ["parameters", "bytes"]].tolist() == [331_196_416, 662_392_832]
    assert frame.loc["lora", ["parameters", "bytes"]].tolist() == [1_572_864, 6_291_456]
    assert lab.status().startswith("opt-350m · 331 M · fp16 · 662 MB · cpu")
    folder = lab.save_adapter("lora", tmp_path / "lora")
    files = [(folder / "adapter_model.safetensors").stat().st_size, (base / "pytorch_model.bin").stat().st_size]
    assert frame.loc[["lora", "base"], "bytes_on_disk"].tolist() == files
    assert files == [pytest.approx(6_291_456, rel=0.01), pytest.approx(662_392_832, rel=0.001)]


def test_unknown_and_unreachable(hub: StandinHub, tmp_path: Path) -> None:
    with pytest.raises(AdapterLabError, match="nobody/nothing"):
        AdapterLab("nobody/nothing")
    lab = AdapterLab(OPT)
    with pytest.raises(AdapterLabError, match="nobody/nothing"):
        lab.load_adapter("nobody/nothing")
    assert list(lab.adapters) == []
    with hub_environment(tmp_path / "cold", offline=True), pytest.raises(AdapterLabError, match="cache"):
        AdapterLab(OPT)
