"""What quantization takes and gives: memory, texts and probabilities of the demo model in fp32, bf16, 8-bit and 4-bit.

    python benchmarks/quantised.py [--kinds fp32 bf16 …] [--prompts 20] [--tokens 32] [--output benchmarks/results]

Writes quantised.md; about four minutes on two cores. Labs are opened one after another. All is the bare base's. Texts and
prompts are below; what is compared with fp32 is said in the page.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from record import describe_machine

from adapterlab import AdapterLab, Comparison

HERE = Path(__file__).resolve().parent
REFERENCE = "fp32"
TEXTS = (
    "The harbour lay quiet that morning. Two fishing boats had come in before dawn, and their crews sat on the wall and "
    "mended nets while the gulls waited. Nobody talked much. The wind had turned to the north in the night, and everyone "
    "knew what that meant for the week to come.",
    "To bake a plain loaf, mix five hundred grams of flour with ten grams of salt, a little yeast and three hundred and "
    "fifty grams of water. Fold the dough four times in the first two hours, then let it rest in the cold overnight. Bake "
    "it in a very hot pot with the lid on for half an hour, and without the lid until it is dark.",
    "A sum of floating point numbers depends on the order in which they are added. Each addition rounds its result to the "
    "nearest number that can be written with the bits there are, and so two programs that add the same numbers in another "
    "order can differ in the last digits. That is no error of either program.",
    "Dear Mrs Keller, thank you for your letter of the third of May. We are sorry that the lamp arrived with a broken "
    "shade. A new one was sent to you today, and you need not return the old one. If anything else is missing, please "
    "call us between nine and five. With kind regards, the customer service.",
)
PROMPTS = (
    "Why is the sky blue?", "What is the moon?", "How do I make tea?", "Name three colours.", "Who wrote Hamlet?",
    "What is a prime number?", "Tell me a joke.", "What does a baker do?", "Where do penguins live?", "What is rain?",
    "How many legs has a spider?", "Write a line about the sea.", "What is the capital of France?", "Why do cats purr?",
    "Explain gravity to a child.", "What is bread made of?", "Give me a name for a boat.", "What is a volcano?",
    "How can I sleep better?", "What is seven times eight?",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Of one lab. logprobs: of every token of `TEXTS` but the first of each. answers: its greedy ones to the prompts.

    choices: the token that it thinks likeliest at each place of fp32's answers, after fp32's words.
    """

    logprobs: tuple[float, ...]
    answers: Comparison
    choices: tuple[int, ...]

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return -sum(self.logprobs) / len(self.logprobs)

    def change(self, other: Found) -> float:
        """Mean |Δlogprob| per token of the texts, in nats."""
        return sum(abs(a - b) for a, b in zip(self.logprobs, other.logprobs)) / len(self.logprobs)

    def agreement(self, other: Found) -> float:
        """Share of the places at which both choose the same token after the same words."""
        return sum(a == b for a, b in zip(self.choices, other.choices)) / len(self.choices)


def kinds() -> dict[str, dict[str, Any]]:
    """The keywords of each lab, by the name it has in the page."""
    import torch
    from transformers import BitsAndBytesConfig

    fp32 = {"dtype": "float32"}
    double = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {
        REFERENCE: fp32,
        "bf16": {"dtype": "bfloat16"},
        "8-bit, threshold 0": {**fp32, "quantization": "8bit"},
        "8-bit, threshold 6": {**fp32, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        "4-bit nf4": {**fp32, "quantization": "4bit"},
        "4-bit nf4, double": {**fp32, "quantization_config": double},
    }


def logits_of(model: Any, ids: Sequence[int]) -> Any:
    """(positions, vocabulary) in fp32, of one text in one forward: no row shares it, so none can leak into it."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0].float()


def measure(lab: AdapterLab, prompts: Sequence[str], tokens: int, reference: Comparison | None) -> Found:
    """Everything of one lab; `reference`: fp32's answers, None for fp32 itself."""
    import torch

    answers = lab.compare(list(prompts), [None], max_new_tokens=tokens)
    logprobs: list[float] = []
    choices: list[int] = []
    with lab.using(None) as model:
        for text in TEXTS:
            ids = lab.tokenizer(text)["input_ids"]  # type: ignore[misc]  # the demo model has one
            found = logits_of(model, ids)[:-1].log_softmax(-1)
            logprobs += found.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        for said in (reference or answers).generations:
            before = answers.prompt_ids[said.prompt_index]
            choices += logits_of(model, [*before, *said.token_ids[:-1]])[len(before) - 1 :].argmax(-1).tolist()
    return Found(tuple(logprobs), answers, tuple(choices))


def page(found: dict[str, Found], tokens: int) -> str:
    """The table as Markdown, with the machine and the versions."""
    machine = {**describe_machine(), "bitsandbytes": metadata.version("bitsandbytes")}
    first = found[REFERENCE]
    frame = Comparison.concat([one.answers for one in found.values()], labels=list(found)).to_frame()
    count = len(first.answers.prompts)
    lines = [
        "# What quantization takes and gives",
        "",
        f"SmolLM2-135M-Instruct, the bare base, {len(first.logprobs)} tokens of {len(TEXTS)} texts, and {count} short prompts "
        f"answered greedily with at most {tokens} tokens. *base*: its bytes in memory, statistics included. *peak*: the most "
        "that answering took on top. *nll*: nats per token of the texts. *|Δlogprob|*: mean over these tokens, against fp32. "
        f"*same choice*: how often the likeliest token is fp32's, over the {len(first.choices)} tokens of fp32's answers, "
        "after fp32's words. "
        "*answers alike*: whole answers with fp32's tokens, left to themselves; the others part at the *median token*.",
        "",
        "| | base, MB | peak, MB on top | nll | perplexity | \\|Δlogprob\\| | same choice | answers alike | median token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, one in found.items():
        mine = frame[frame.lab == kind]
        places = mine.lab_first_difference.dropna()
        peak = mine.peak_megabytes.iloc[0]
        cells = [
            f"{mine.base_megabytes.iloc[0]:.1f}",
            "" if math.isnan(peak) else f"{peak:.0f}",
            f"{one.nll:.4f}",
            f"{math.exp(one.nll):.2f}",
            *(
                ["", "", "", ""]
                if kind == REFERENCE
                else [
                    f"{one.change(first):.4f}",
                    f"{one.agreement(first):.1%}",
                    f"{count - len(places)} of {count}",
                    f"{places.median() + 1:.0f}" if len(places) else "",
                ]
            ),
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += ["", "; ".join(f"{key}: {value}" for key, value in machine.items()) + ".", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found: dict[str, Found] = {}
    for kind in dict.fromkeys([REFERENCE, *asked.kinds]):
        lab = AdapterLab.demo(**kinds()[kind])
        reference = found[REFERENCE].answers if found else None
        found[kind] = measure(lab, PROMPTS[: asked.prompts], asked.tokens, reference)
        lab.close()
        print(f"{kind}: nll {found[kind].nll:.4f}", flush=True)
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "quantised.md").write_text(page(found, asked.tokens), encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what quantization does to the demo model.")
    parser.add_argument("--kinds", nargs="+", choices=list(kinds()), default=list(kinds()), metavar="KIND")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many of the {len(PROMPTS)}")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer, at most")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    asked = parser.parse_args(arguments)
    if not 1 <= asked.prompts <= len(PROMPTS) or asked.tokens < 1:
        parser.error(f"give 1 to {len(PROMPTS)} --prompts and at least one of --tokens")
    return asked


if __name__ == "__main__":
    main()
