"""`lab.parameters()`, `lab.memory()`, `lab.delta_norms(name)`, …: the part of the façade that looks and changes nothing.

Frames come from rooms of their own, and each `plot_…` draws the frame of the same name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from adapterlab.guards import exclusive

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

    from adapterlab.adapters import Adapters
    from adapterlab.columns import ColumnLike
    from adapterlab.comparison import Comparison
    from adapterlab.finished import FinishedColumns
    from adapterlab.memory import Operation
    from adapterlab.prompts import PromptLike


class Looking:
    """What a lab shows of its model and its adapters. `AdapterLab` is the one class that is made of it."""

    _adapters: Adapters
    _tokenizer: PreTrainedTokenizerBase | None
    _finished: FinishedColumns
    _last_operation: Operation | None

    def _check_open(self) -> None:
        raise NotImplementedError

    def summary(self) -> pd.DataFrame:
        """One row per adapter: adapter, method, r, parameters, megabytes (10⁶ bytes), share (of the base's
        parameters), multiplier, active, trainable, status. Reads no weights and waits for nobody."""
        from adapterlab.inspection import summary_frame

        self._check_open()
        return summary_frame(self._adapters)

    def parameters(self) -> pd.DataFrame:
        """How large base and adapters are: one row per owner, kind and dtype, the base first.

        Columns: owner ("base" or an adapter), kind ("weights" or "modules_to_save"), dtype, parameters (those that the
        method trains; of the base all, two for a packed 4-bit byte), trainable (those that require gradients now),
        effective (without AdaLoRA's pruned triplets), bytes (in memory, quantization statistics included), bytes_on_disk
        (the owner's whole file in its first row and 0 in the others: the file it was loaded from, or for an adapter that
        is on no disk the one that `save_adapter` would write; missing for a base without files), share_of_base (of the
        base's parameters). Reads no weights and waits for nobody.
        """
        from adapterlab.inspection import parameters_frame

        self._check_open()
        return parameters_frame(self._adapters)

    def plot_parameters(self, ax: Axes | None = None) -> Figure:
        """`parameters()` as bars: base against each adapter. Draws into `ax` if given; the figure shows itself."""
        from adapterlab.plots import plot_parameters

        return _figure(plot_parameters(self.parameters(), ax=ax))

    def memory(self) -> pd.DataFrame:
        """What is in memory now, and the peak of the last operation: owner, kind, device, bytes, source.

        owner: "base", an adapter, "lab" (what it keeps to be quick), "process" (Python and libraries), or "last operation".
        kind: weights, quantization, gradients, optimizer, KV cache, activations, …. source: "measured" (storages of
        tensors, the operating system, CUDA's allocator) or "computed" (a formula or a difference). Storage that several
        tensors share counts once. Rows of "last operation" lie on top of what was there when it began, and are gone by now.
        Reads no weights, allocates nothing of size and changes nothing.
        """
        from adapterlab.memory import memory_frame

        self._check_open()
        return memory_frame(self._adapters, self._finished, self._last_operation)

    def plot_memory(self, ax: Axes | None = None) -> Figure:
        """`memory()` as stacked bars, one per device. Draws into `ax` if given; the figure shows itself."""
        from adapterlab.plots import plot_memory

        return _figure(plot_memory(self.memory(), ax=ax))

    @classmethod
    def estimate(
        cls,
        model: str | os.PathLike[str] | Any,
        adapters: Iterable[PeftConfig | str] | Mapping[str, PeftConfig | str] = (),
        quantization: Literal["8bit", "4bit"] | None = None,
        training: bool = False,
        **circumstances: Any,
    ) -> pd.DataFrame:
        """What a model with these adapters would take, from its config alone; no weights are fetched, read or made."""
        from adapterlab.estimate import estimate_frame

        return estimate_frame(model, adapters, quantization, training, **circumstances)

    def ranks(self, adapter_name: str) -> pd.DataFrame:
        """Where an AdaLoRA adapter's ranks are: one row per adapted layer: layer, module, rank (kept), init_r.

        Raises `AdapterLabError` for a method that allocates no ranks. Reads λ alone, and waits for nobody.
        """
        from adapterlab.inspection import ranks_frame_of

        self._check_open()
        name = self._adapters.known(adapter_name)
        return ranks_frame_of(self._adapters.mounts.adapters[name], name)

    def plot_ranks(self, adapter_name: str, ax: Axes | None = None) -> Figure:
        """`ranks(name)` as a heatmap of layers and modules. Draws into `ax` if given; the figure shows itself."""
        from adapterlab.plots import plot_ranks

        return _figure(plot_ranks(self.ranks(adapter_name), ax=ax))

    @exclusive
    def delta_norms(self, adapter_name: str) -> pd.DataFrame:
        """How much an adapter changes each weight: one row per adapted layer, computed from its factors.

        Columns: layer (missing where the path has no number), module, path, norm (‖ΔW‖, Frobenius), relative_norm
        (‖ΔW‖ / ‖W‖), effective_rank (exp of the entropy of σ² / Σσ², as if ΔW's energy were spread evenly over so many
        directions; 0 where ΔW = 0), rank (what the factors allow), singular_values (of ΔW, largest first, a tuple), and
        for IA3 scale_min, scale_mean, scale_max of its scales. ΔW is never formed.
        """
        from adapterlab.norms import delta_norms_frame

        return delta_norms_frame(self._adapters, self._adapters.known(adapter_name))

    def plot_delta_norms(self, adapter_name: str, ax: Axes | None = None) -> Figure:
        """`delta_norms(name)` as a heatmap of ‖ΔW‖ / ‖W‖ by layer and module. Draws into `ax` if given; the figure shows itself."""
        from adapterlab.plots import plot_delta_norms

        return _figure(plot_delta_norms(self.delta_norms(adapter_name), ax=ax))

    @exclusive
    def subspace_overlap(self, adapter_name: str, other: str) -> pd.DataFrame:
        """How far two adapters work in the same directions: one row per layer that both adapt: layer, module, path,
        output_overlap, input_overlap (between 0 and 1), output_chance, input_chance (what random directions would give)."""
        from adapterlab.norms import overlap_frame

        return overlap_frame(self._adapters, self._adapters.known(adapter_name), self._adapters.known(other))

    @exclusive
    def divergence(
        self,
        text: str | Comparison,
        columns: Sequence[ColumnLike] | None = None,
        *,
        prompt: PromptLike | None = None,
        chat: bool | Literal["auto"] = "auto",
    ) -> pd.DataFrame:
        """What each token of a text is worth to base and to each column, all columns in one batch.

        text: read as it is, or, with a `prompt`, as the answer to that (rendered as in `compare`). Encoder-decoder models
            need the prompt. Or a `Comparison` of this lab: then each column reads its own answers.
        columns: by default every adapter.

        One row per column and token: column, prompt_index, position, token, token_id, logprob and base_logprob (of the
        token, in nats), kl (KL(column‖base) over the whole vocabulary, in nats, before that token), rank and base_rank (of
        the token, 1 for the most likely one). The first token of a text without anything before it has no row. Changes
        nothing; hooks and dropout as in `compare`.
        """
        from adapterlab.divergence import divergence_frame

        return divergence_frame(self._adapters, self._tokenizer, text, columns, prompt, chat)

    def plot_divergence(
        self, text: str | Comparison, columns: Sequence[ColumnLike] | None = None, **keywords: Any
    ) -> Figure:
        """`divergence(text, columns, …)` as the text itself, each token shaded by how far the column is from base there."""
        from adapterlab.plots import plot_divergence

        return plot_divergence(self.divergence(text, columns, **keywords))

    @exclusive
    def evaluate(
        self,
        texts_or_dataset: Any,
        columns: Sequence[ColumnLike] | None = None,
        *,
        max_length: int | None = None,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> pd.DataFrame:
        """How well base and columns foresee a set of texts: one row per column.

        texts_or_dataset: whatever `train` takes; where the data has answers, the answers alone are counted.
        columns: by default base and every adapter. max_length: cut rows that have more tokens.

        Columns: column, texts, tokens, nll (mean negative log-likelihood per token, in nats), perplexity (its exp),
        perplexity_low and perplexity_high (the `confidence` interval by a bootstrap over texts, with `seed`), and
        delta_nll, delta_low, delta_high: nll minus base's on the same texts, with its paired interval (0 for base; missing
        where base is not among the columns). Changes nothing.
        """
        from adapterlab.divergence import evaluate_frame

        return evaluate_frame(self._adapters, self._tokenizer, texts_or_dataset, columns, max_length, confidence, seed)

    def capabilities(self) -> pd.DataFrame:
        """What can be done with each adapter here and now: one row per adapter and capability: adapter, capability,
        possible, reason (why not, "" where it is possible). Reads no weights and waits for nobody."""
        from adapterlab.capabilities import capabilities_frame

        self._check_open()
        return capabilities_frame(self._adapters)


def _figure(axes: Any) -> Figure:
    return axes.get_figure(root=True)  # type: ignore[no-any-return]
