"""No speed with a wrong token: every text is held against plain PEFT with its adapter alone."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from contenders import BASE, Stage, Texts
from record import Check

if TYPE_CHECKING:
    from torch import Tensor

LAB = ("lab_base", "lab_one", "lab", "rerun", "one_more")
NOISE_TOKENS = 16
LEAST_TOLERANCE = 1e-3


class WrongToken(Exception):
    """A column of the lab says what plain PEFT, with that adapter alone, would not."""


class Checker:
    """Collects what the contenders say, and judges it."""

    def __init__(self, stage: Stage, columns: int) -> None:
        self.stage = stage
        self.noise = max(measure_noise(stage, label, columns) for label in (BASE, stage.names[0]))
        self.tolerance = max(LEAST_TOLERANCE, 2 * self.noise)  # one token may be up by the noise, the other one down
        self.said: dict[str, set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
        self.gaps: dict[tuple[str, tuple[int, ...]], list[float]] = {}

    def add(self, contender: str, texts: Texts) -> None:
        self.said[contender] |= {(label, tuple(ids)) for label, ids in texts.items()}

    def judge(self) -> tuple[Check, ...]:
        """A `Check` for every contender so far; raises `WrongToken` for the lab's first that rounding can't explain."""
        for label in sorted({label for texts in self.said.values() for label, _ in texts}):
            new = {text for texts in self.said.values() for text in texts if text[0] == label and text not in self.gaps}
            if new:
                with self.stage.alone(label) as model:
                    for text in new:
                        self.gaps[text] = greedy_gaps(model, self.stage.ids, text[1])
        plain = self.said["in_turn"]
        return tuple(self._check(contender, texts, plain) for contender, texts in self.said.items())

    def _check(self, contender: str, texts: set[Any], plain: set[Any]) -> Check:
        gaps = [gap for text in texts for gap in self.gaps[text]]
        for label, ids in sorted(texts) if contender in LAB else ():
            for place, gap in enumerate(self.gaps[label, ids]):
                if gap > self.tolerance:
                    raise WrongToken(
                        f"{contender}, column {label}: token {place} is {gap:.4g} logits below plain PEFT's choice, and "
                        f"rounding explains {self.tolerance:.2g} here."
                    )
        equal = sum(text in plain or not any(self.gaps[text]) for text in texts)
        return Check(contender, len(texts), equal, sum(gap > 0 for gap in gaps), max(gaps, default=0.0))


def greedy_gaps(model: Any, prompt: tuple[int, ...], ids: tuple[int, ...]) -> list[float]:
    """For each token of `ids`, by how many logits another leads it after the same text: zeros if all are greedy."""
    logits = next_logits(model, [*prompt, *ids[:-1]])[len(prompt) - 1 :]
    ends = model.generation_config.eos_token_id
    if ends is not None:  # the length is fixed: nobody may end
        logits[:, ends] = -float("inf")
    chosen = logits.gather(1, logits.new_tensor([ids]).long().T)[:, 0]
    return (logits.max(-1).values - chosen).tolist()


def next_logits(model: Any, ids: list[int]) -> Tensor:
    """(positions, vocabulary) in fp32: one forward over the whole text."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def measure_noise(stage: Stage, label: str, rows: int) -> float:
    """Largest |Δlogit| that rounding alone makes in plain PEFT: decoded step by step, alone and in a batch of `rows` equal
    rows, against one forward over the text, as far as all say the same."""
    import torch

    with stage.alone(label) as model:
        settings = {"output_logits": True, "return_dict_in_generate": True}
        alone = _decode(stage, model, 1, settings)
        batch = _decode(stage, model, rows, settings)
        ids = alone.sequences[0].tolist()
        whole = next_logits(model, ids[:-1])[len(stage.ids) - 1 :]
    same = (alone.sequences[0] == batch.sequences[0]).tolist()[len(stage.ids) :]
    until = same.index(False) + 1 if False in same else len(same)
    one, many = (torch.stack([step[0].float() for step in out.logits[:until]]) for out in (alone, batch))
    return max(float((steps - whole[:until]).abs().max()) for steps in (one, many))


def _decode(stage: Stage, model: Any, rows: int, settings: dict[str, Any]) -> Any:
    import torch

    ids = torch.tensor([stage.ids] * rows)
    count = min(NOISE_TOKENS, stage.new_tokens)
    lengths = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **lengths, **settings)
