"""Every mistake ends in one clear sentence, and changes nothing: no raw TypeError, no half-done work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterlab import AdapterLab, AdapterLabError, Column, Comparison

MISTAKES: dict[str, Callable[[AdapterLab, Path], Any]] = {
    "load None": lambda lab, tmp: lab.load_adapter(None),  # type: ignore[arg-type]
    "load a number": lambda lab, tmp: lab.load_adapter(5),  # type: ignore[arg-type]
    "load bytes": lambda lab, tmp: lab.load_adapter(b"x"),  # type: ignore[arg-type]
    "load a list": lambda lab, tmp: lab.load_adapter(["a"]),  # type: ignore[arg-type]
    "load from nobody's home": lambda lab, tmp: lab.load_adapter("~nobody-here/x"),
    "load an empty folder": lambda lab, tmp: lab.load_adapter(tmp),
    "a subfolder that is no text": lambda lab, tmp: lab.load_adapter(tmp, subfolder=5),  # type: ignore[arg-type]
    "save nowhere": lambda lab, tmp: lab.save_adapter("a", None),  # type: ignore[arg-type]
    "save to a number": lambda lab, tmp: lab.save_adapter("a", 5),  # type: ignore[arg-type]
    "save to a null byte": lambda lab, tmp: lab.save_adapter("a", "x\0y"),
    "save to an endless name": lambda lab, tmp: lab.save_adapter("a", tmp / ("x" * 300)),
    "merge under a file": lambda lab, tmp: lab.merge_and_unload("a", tmp / "file" / "x"),
    "merge nobody": lambda lab, tmp: lab.merge_and_unload("nobody"),
    "a prompt of half a character": lambda lab, tmp: lab.compare("a\ud800"),
    "a prompt of bytes": lambda lab, tmp: lab.compare(b"x"),  # type: ignore[arg-type]
    "a huge multiplier": lambda lab, tmp: lab.set_adapter({"a": 10**400}),
    "a huge temperature": lambda lab, tmp: lab.compare("x", temperature=10**400),
    "a temperature below what fp32 can tell apart": lambda lab, tmp: lab.compare("x", temperature=1e-40),
    "an array as a column": lambda lab, tmp: lab.set_adapter(np.array(["a", "b"])),  # type: ignore[arg-type]
    "a forged column": lambda lab, tmp: lab.set_adapter(Column((("a", float("nan")),))),
    "a column of letters": lambda lab, tmp: lab.set_adapter(Column("a")),  # type: ignore[arg-type]
    "columns that are no list": lambda lab, tmp: lab.compare("x", columns=5),  # type: ignore[arg-type]
    "on_token that can't be called": lambda lab, tmp: lab.compare("x", on_token=5),  # type: ignore[arg-type]
    "verify a number": lambda lab, tmp: lab.verify(5),  # type: ignore[arg-type]
    "concat a number": lambda lab, tmp: Comparison.concat(5),  # type: ignore[arg-type]
    "weights of nothing": lambda lab, tmp: lab.add_weighted_adapter(None, None, "n"),  # type: ignore[arg-type]
    "ids beyond the vocabulary": lambda lab, tmp: lab.compare("x", bad_words_ids=[[999_999]]),
    "an end that is no id": lambda lab, tmp: lab.compare("x", eos_token_id="x"),
    "min_p in words": lambda lab, tmp: lab.compare("x", min_p="x", temperature=1.0),
    "modules of another model": lambda lab, tmp: lab.add_adapter("lora", "z", target_modules=["c_attn"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_and_changes_nothing(lab: AdapterLab, tmp_path: Path, mistake: str) -> None:
    lab.add_adapter("lora", "a", init_lora_weights=False)
    (tmp_path / "file").write_text("")
    before = (list(lab.adapters), lab.selection, lab.enabled, lab.trainable, sorted(p.name for p in tmp_path.iterdir()))
    with pytest.raises(AdapterLabError) as raised:
        MISTAKES[mistake](lab, tmp_path)
    message = str(raised.value)
    assert 15 < len(message) < 1000
    assert not message.startswith("'NoneType'")
    after = (list(lab.adapters), lab.selection, lab.enabled, lab.trainable, sorted(p.name for p in tmp_path.iterdir()))
    assert after == before


def test_a_missed_module_is_answered_with_those_there_are(lab: AdapterLab) -> None:
    with pytest.raises(AdapterLabError, match=r"This model has down_proj, .*k_proj, .*v_proj"):
        lab.add_adapter("lora", "z", target_modules=["c_attn"])


def test_numpys_numbers_are_numbers(lab: AdapterLab) -> None:
    lab.add_adapter("lora", "a", init_lora_weights=False)
    comparison = lab.compare("x", [{"a": np.float32(0.5)}], seed=np.int64(3), max_new_tokens=np.int64(1))  # type: ignore[arg-type, dict-item]
    assert comparison.settings["seed"] == 3
    assert comparison.columns == ["a × 0.5"]
