"""What the panel says before anything is made: the layers that can be adapted, and the size of an adapter on them."""

from __future__ import annotations

from typing import Any

import pytest
import standins
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from torch import nn

from adapterlab import AdapterLab
from adapterlab.inspection import count_new_parameters, linear_shapes

CONFIGS: dict[str, Any] = {
    "lora": lambda targets, r: LoraConfig(r=r, target_modules=targets),
    "adalora": lambda targets, r: AdaLoraConfig(init_r=r, target_modules=targets, total_step=10),
    "ia3": lambda targets, r: IA3Config(target_modules=targets, feedforward_modules=[]),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT's remark on Conv1D
@pytest.mark.parametrize("make", [standins.tiny_llama, standins.tiny_gpt2])
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3"])
def test_the_count_is_what_peft_makes_trainable(make: Any, method: str) -> None:
    shapes = linear_shapes(make())
    targets = [name for name in shapes if name != "lm_head"][:3]
    model: Any = get_peft_model(make(), CONFIGS[method](targets, 5))
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_new_parameters(method, 5, [shape for name in targets for shape in shapes[name]]) == expected


def test_every_linear_layer_is_there_once_whatever_is_mounted() -> None:
    lab = AdapterLab(standins.tiny_llama(), tokenizer=standins.tiny_tokenizer())
    modules = dict(lab.model.named_modules())
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    before = linear_shapes(lab.model)
    assert sum(map(len, before.values())) == len(linear)
    for path in linear:
        assert (modules[path].in_features, modules[path].out_features) in before[path.rpartition(".")[2]]
    for method in ("lora", "ia3", "adalora"):
        lab.add_adapter(method, f"my-{method}", target_modules=["q_proj", "down_proj"])
        assert linear_shapes(lab.model) == before
