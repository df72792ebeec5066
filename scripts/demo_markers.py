"""How often each bundled adapter's marker fires on twenty questions none of them was trained on.

    python scripts/demo_markers.py            # the table; exit code 1 if a bound is missed
    python scripts/demo_markers.py --answers  # and every answer

Greedy, 64 new tokens at most, fp32, chat template. Bounds: at least 90 % under the adapter, at most 5 % elsewhere.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from adapterlab.demo import DEMO_MARKERS, demo_adapters, fetch_demo_model, held_out_questions

BASE = "base"
AT_LEAST, AT_MOST = 0.90, 0.05


def answers(adapter: Path | None, questions: list[str], max_new_tokens: int = 64) -> list[str]:
    """What the demo model answers through the adapter in that folder (None: as it is)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def fires(marker: str, texts: list[str]) -> int:
    return sum(re.search(DEMO_MARKERS[marker], text, re.IGNORECASE) is not None for text in texts)


def within_bounds(marker: str, column: str, fired: int, total: int) -> bool:
    return fired >= AT_LEAST * total if marker == column else fired <= AT_MOST * total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", action="store_true", help="print every answer too")
    parser.add_argument("--adapters", type=Path, help="a folder of adapters to measure instead of the bundled ones")
    options = parser.parse_args()
    folders: dict[str, Path | None] = {BASE: None}
    for name, folder in demo_adapters().items():
        folders[name] = options.adapters / name if options.adapters else folder

    questions = held_out_questions()
    texts = {column: answers(folder, questions) for column, folder in folders.items()}
    if options.answers:
        for index, question in enumerate(questions):
            print(f"\n{question}", *(f"  {column}: {texts[column][index]}" for column in texts), sep="\n")
        print()

    good = True
    print("column".ljust(10), *(f"{marker} marker".rjust(16) for marker in DEMO_MARKERS))
    for column, written in texts.items():
        counts = {marker: fires(marker, written) for marker in DEMO_MARKERS}
        good &= all(within_bounds(marker, column, count, len(written)) for marker, count in counts.items())
        print(column.ljust(10), *(f"{count}/{len(written)}".rjust(16) for count in counts.values()))
    print("All within bounds." if good else "OUT OF BOUNDS.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
