"""Does the allocation find the truth? A ΔW of known rank is planted in three of fourteen modules, and an adapter learns to
imitate the model that has it. Equal total rank: LoRA has one in every module, AdaLoRA one on average."""

from __future__ import annotations

from typing import Any

import torch
from standins import tiny_llama, tiny_tokenizer

from adapterlab import AdapterLab

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLANTED = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
SINGULAR = torch.tensor([2.0, 1.8, 1.6, 1.4])
STEPS = 200


def teacher() -> tuple[Any, dict[str, torch.Tensor]]:
    """The model to imitate, and what was added to its modules."""
    model, numbers = tiny_llama().eval(), torch.Generator().manual_seed(0)
    planted = {}
    for path in PLANTED:
        weight = model.get_submodule(path).weight
        left, right = (torch.linalg.qr(torch.randn(size, 4, generator=numbers))[0] for size in weight.shape)
        planted[path] = left @ torch.diag(SINGULAR) @ right.T
        with torch.no_grad():
            weight.add_(planted[path])
    return model, planted


def imitate(method: str, learning_rate: float, **config: Any) -> tuple[AdapterLab, float]:
    """A lab whose adapter "a" has learned the teacher's logits, and its relative error: ‖ΔW − ΔŴ‖ / ‖ΔW‖ over all modules."""
    model, planted = teacher()

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        with torch.no_grad():
            wanted = model(labels).logits
        return torch.nn.functional.mse_loss(outputs.logits, wanted)

    ids = torch.randint(7, 300, (512, 24), generator=torch.Generator().manual_seed(5)).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * 24, "labels": row} for row in ids]
    lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer())
    lab.train(
        "a", rows, method=method, target_modules=MODULES, compute_loss_func=loss, max_steps=STEPS,
        learning_rate=learning_rate, per_device_train_batch_size=16, disable_tqdm=True, **config,
    )  # fmt: skip
    layers = lab._adapters.mounts.adapters["a"].layers
    assert len(layers) == 14
    deltas = {path: layer.get_delta_weight("a").detach() for path, layer in layers.items()}  # type: ignore[operator]
    wrong = sum(float((delta - planted.get(path, 0.0)).pow(2).sum()) for path, delta in deltas.items())
    return lab, (wrong / sum(float(delta.pow(2).sum()) for delta in planted.values())) ** 0.5


def test_adalora_puts_its_ranks_where_they_were_planted() -> None:
    lab, lora = imitate("lora", 1e-2, r=1, lora_alpha=2)
    lab.close()
    lab, adalora = imitate("adalora", 2e-2, init_r=4, target_r=1, lora_alpha=16, orth_reg_weight=0.1)
    ranks = lab.adapters["a"].runs[0].ranks
    last = ranks[ranks.step == ranks.step.max()]
    found = last.set_index(["layer", "module"])["rank"]
    lab.close()
    assert last["rank"].sum() == 14, "the same total rank as LoRA's"
    assert [int(found[0, "up_proj"]), int(found[1, "o_proj"]), int(found[1, "down_proj"])] == [4, 4, 4]
    # what no LoRA of rank 1 can go below (Eckart and Young)
    bound = float(SINGULAR[1:].pow(2).sum() / SINGULAR.pow(2).sum()) ** 0.5
    assert adalora < 0.5 * bound < bound < lora + 0.02
    assert adalora < 0.3
