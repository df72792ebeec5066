"""AdaLoRA's allocation (arXiv 2303.10512), all layers at once: which triplets (P column, λ, Q row) stay, step by step.

    I = |w · ∇w|      Ī = β₁Ī + (1 − β₁)I      Ū = β₂Ū + (1 − β₂)|I − Ī|      s = Ī · Ū
    score of a triplet = s(λ) + mean s(its column of P) + mean s(its row of Q)

The best b(t) of all layers keep their λ, the others get λ = 0 but keep P and Q, so that they can come back. In PEFT's layers
lora_A is Q (r, in), lora_E is λ (r, 1), lora_B is P (out, r). PEFT's own allocator does the same layer by layer, and takes
parameters for an adapter's whose names merely contain its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.errors import AdapterLabError

if TYPE_CHECKING:
    from torch import Tensor, nn

_PARTS = ("lora_A", "lora_E", "lora_B")


@dataclass(frozen=True)
class Schedule:
    """How many triplets may stay at which step; steps count from 0.

    Until `tinit` all `initial` ones, then falling as the cube of the time left to `target` at `total_step - tfinal`, and
    no change after that. Between the two, every `deltaT`-th step prunes.
    """

    total_step: int
    tinit: int
    tfinal: int
    deltaT: int
    initial: int
    target: int

    @property
    def last(self) -> int:
        """The step that prunes for good."""
        return self.total_step - self.tfinal

    def budget(self, step: int) -> int:
        """b(step), PEFT's `budget_schedule` and the authors' code. The paper's Eq. 14 starts above `initial`."""
        if step <= self.tinit:
            return self.initial
        if step >= self.last:
            return self.target
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((self.initial - self.target) * left**3 + self.target)

    def prunes(self, step: int) -> bool:
        return step == self.last or (self.tinit < step < self.last and step % self.deltaT == 0)


def allocation_obstacle(config: Any) -> str | None:
    """Why no run of any length can allocate these ranks, or None if one can."""
    if config.target_r < config.init_r:
        return None
    return (
        f"target_r={config.target_r} is not below init_r={config.init_r}. AdaLoRA starts with init_r in every layer and "
        "prunes to target_r on average: choose a smaller target_r or a larger init_r."
    )


def choose_schedule(config: Any, total_step: int, name: str) -> tuple[int, int, int]:
    """(tinit, tfinal, deltaT) for a run of `total_step` steps.

    What the config says, if it says anything; else a tenth of the steps to warm up and two fifths to settle, with at most
    a hundred prunings between them. tfinal is at least 1: with 0 the last pruning would never come. Raises
    `AdapterLabError` where the ranks or the steps leave nothing to allocate.
    """
    why = allocation_obstacle(config)
    if why is not None:
        raise AdapterLabError(f"{name!r} can't allocate ranks: {why}")
    if total_step < 3:
        raise AdapterLabError(f"AdaLoRA needs 3 steps at least to allocate ranks, not {total_step}: raise max_steps.")
    given = (config.tinit, config.tfinal, config.deltaT)
    if given in ((0, 0, 1), _usual_schedule(config.total_step or 0)):  # PEFT's defaults, or what an earlier run chose
        return _usual_schedule(total_step)
    tinit, tfinal = config.tinit, max(1, config.tfinal)
    if tinit >= total_step - tfinal:
        raise AdapterLabError(
            f"{name!r} can't allocate ranks: tinit={tinit} and tfinal={tfinal} leave none of the {total_step} steps. Lower "
            "them, raise max_steps, or leave both out, and the lab chooses."
        )
    return tinit, tfinal, config.deltaT


def _usual_schedule(total_step: int) -> tuple[int, int, int]:
    tinit, tfinal = total_step // 10, max(1, round(0.4 * total_step))
    return tinit, tfinal, max(1, (total_step - tinit - tfinal) // 100)


class Allocator:
    """The triplets of one adapter, their averages and which of them stay.

    layers: PEFT's AdaLoRA layers by path; name: the adapter's. Changes lora_E (λ) and nothing else.
    """

    def __init__(self, layers: Mapping[str, nn.Module], name: str, beta1: float, beta2: float) -> None:
        self.paths = list(layers)
        self.beta1, self.beta2 = beta1, beta2
        self.parameters: dict[str, list[nn.Parameter]] = {
            part: [getattr(layer, part)[name] for layer in layers.values()] for part in _PARTS
        }
        self.kept = self._standing()
        self.initial = sum(int(kept.sum()) for kept in self.kept)
        self._groups = [
            _Group(part, here, [parameters[place] for place in here])
            for part, parameters in self.parameters.items()
            for here in _alike(parameters)
        ]

    def _standing(self) -> list[Tensor]:
        """What an earlier run has left; all, where none has pruned anything (a fresh λ is 0 everywhere)."""
        found = [(E.detach() != 0).view(-1) for E in self.parameters["lora_E"]]
        touched = any(bool(kept.any()) for kept in found)
        return found if touched else [kept | True for kept in found]

    @property
    def ranks(self) -> list[int]:
        """Triplets that stay, layer by layer."""
        return [int(kept.sum()) for kept in self.kept]

    def pattern(self) -> dict[str, list[bool]]:
        """Which triplets stay, by the layer's path: PEFT's `rank_pattern` without its suffixes."""
        return {path: kept.tolist() for path, kept in zip(self.paths, self.kept)}

    def observe(self) -> bool:
        """Take the gradients of this step into the averages; False, and nothing is changed, if one is not finite."""
        import torch

        with torch.no_grad():
            seen = [group.importance() for group in self._groups]
            if not all(bool(importance.sum().isfinite()) for importance in seen):
                return False
            for group, importance in zip(self._groups, seen):
                group.average(importance, self.beta1, self.beta2)
        return True

    def scores(self) -> list[Tensor]:
        """The score of each triplet, layer by layer: shape (r,)."""
        import torch

        with torch.no_grad():
            total = [torch.zeros_like(E.detach()).view(-1) for E in self.parameters["lora_E"]]
            for group in self._groups:
                for place, score in zip(group.places, group.scores()):
                    total[place] += score
        return total

    def prune(self, budget: int) -> tuple[list[Tensor], float]:
        """Keep the best `budget` triplets of all layers; gives the scores and the one that the kept are above."""
        import torch

        scores = self.scores()
        everything = torch.cat(scores)
        surplus = everything.numel() - budget
        # PEFT's rule: what is not above the k-th smallest goes, so ties go together and the budget is never exceeded
        threshold = float(torch.kthvalue(everything, surplus).values) if surplus > 0 else float("-inf")
        self.kept = [score > threshold for score in scores]
        self.hold()
        return scores, threshold

    def hold(self) -> None:
        """Set the λ of all that do not stay to 0."""
        import torch

        with torch.no_grad():
            for E, kept in zip(self.parameters["lora_E"], self.kept):
                E.masked_fill_(~kept.view(-1, 1), 0.0)

    def compute_orthogonality(self) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """For each P and Q: the parameter, ‖PᵀP − I‖_F (‖QQᵀ − I‖_F), and its gradient, in the parameter's shape."""
        import torch

        with torch.no_grad():
            for group in self._groups:
                if group.part == "lora_E":
                    continue
                stacked = torch.stack([parameter.detach() for parameter in group.parameters])
                wide = stacked.mT if group.part == "lora_B" else stacked  # (n, r, width)
                off = wide @ wide.mT
                off.diagonal(dim1=1, dim2=2).sub_(1.0)
                norms = off.flatten(1).norm(dim=1)
                slope = (2.0 / norms.clamp_min(torch.finfo(norms.dtype).tiny))[:, None, None] * off
                gradients = stacked @ slope if group.part == "lora_B" else slope @ stacked
                yield from zip(group.parameters, norms, gradients)

    def state(self) -> dict[str, Tensor]:
        """The averages and what stays, as tensors to save."""
        state: dict[str, Any] = {f"kept.{path}": kept for path, kept in zip(self.paths, self.kept)}
        for group in self._groups:
            for average in ("importance", "uncertainty"):
                values = getattr(group, f"mean_{average}")
                if values is not None:
                    for place, value in zip(group.places, values):
                        state[f"{average}.{self.paths[place]}.{group.part}"] = value.clone()
        return state

    def averages(self) -> list[Tensor]:
        """The averages as they are; nothing before the first step."""
        found = [mean for group in self._groups for mean in (group.mean_importance, group.mean_uncertainty)]
        return [mean for mean in found if mean is not None]

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave."""
        import torch

        if {key for key in state if key.startswith("kept.")} != {f"kept.{path}" for path in self.paths}:
            raise AdapterLabError("The checkpoint's AdaLoRA state is of other layers: resume from this adapter's own.")
        self.kept = [state[f"kept.{path}"].to(E.device) for path, E in zip(self.paths, self.parameters["lora_E"])]
        for group in self._groups:
            for average in ("importance", "uncertainty"):
                keys = [f"{average}.{self.paths[place]}.{group.part}" for place in group.places]
                if all(key in state for key in keys):
                    device = group.parameters[0].device
                    setattr(group, f"mean_{average}", torch.stack([state[key].to(device) for key in keys]))


class _Group:
    """Parameters of one kind and shape, and their averages, stacked: (n, *shape)."""

    def __init__(self, part: str, places: list[int], parameters: list[nn.Parameter]) -> None:
        self.part, self.places, self.parameters = part, places, parameters
        self.mean_importance: Tensor | None = None
        self.mean_uncertainty: Tensor | None = None

    def importance(self) -> Tensor:
        """I = |w · ∇w|. A parameter without a gradient has not been used: 0."""
        import torch

        weights = torch.stack([parameter.detach() for parameter in self.parameters])
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return weights.mul_(torch.stack(slopes)).abs_()

    def average(self, importance: Tensor, beta1: float, beta2: float) -> None:
        import torch

        if self.mean_importance is None or self.mean_uncertainty is None:
            self.mean_importance = torch.zeros_like(importance)
            self.mean_uncertainty = torch.zeros_like(importance)
        self.mean_importance.mul_(beta1).add_(importance, alpha=1 - beta1)
        importance.sub_(self.mean_importance).abs_()
        self.mean_uncertainty.mul_(beta2).add_(importance, alpha=1 - beta2)

    def scores(self) -> Tensor:
        """What these parameters add to the score of each triplet: shape (n, r)."""
        if self.mean_importance is None or self.mean_uncertainty is None:
            raise RuntimeError("scores before any gradient was observed")
        each = self.mean_importance * self.mean_uncertainty
        return each.mean(dim=1 if self.part == "lora_B" else 2)


def _alike(parameters: list[nn.Parameter]) -> list[list[int]]:
    """Places of parameters that can be stacked: of one shape, dtype and device."""
    found: dict[Any, list[int]] = {}
    for place, parameter in enumerate(parameters):
        found.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(place)
    return list(found.values())
