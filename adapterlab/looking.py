"""`lab.parameters()`, `lab.memory()`, `lab.delta_norms(name)`, …: the part of the façade that looks and changes nothing.

Frames come from rooms of their own, and each `plot_…` draws the frame of the same name.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from adapterlab.errors import AdapterLabError
from adapterlab.guards import exclusive

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from adapterlab.adapters import Adapters
    from adapterlab.columns import ColumnLike
    from adapterlab.comparison import Comparison
    from adapterlab.finished import FinishedColumns
    from adapterlab.peaks import Operation, Watch
    from adapterlab.prompts import PromptLike
    from adapterlab.records import AdapterInfo


class Looking:
    """What a lab shows of its model and its adapters. `AdapterLab` is the one class that is made of it."""

    name: str
    _adapters: Adapters
    _tokenizer: PreTrainedTokenizerBase | None
    _finished: FinishedColumns
    _last_operation: Operation | None
    _stop: threading.Event
    _training: str | None

    def _seen(self) -> Adapters:
        raise NotImplementedError

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        raise NotImplementedError

    def _watch(self, operation: str) -> AbstractContextManager[Watch]:
        """In the block the memory is watched; if it ends well, `_last_operation` tells how much it took at most."""
        from adapterlab.peaks import watch

        return watch(operation, {str(tensor.device) for tensor in self._adapters.base.values()}, self._note)

    def _note(self, operation: Operation) -> None:
        self._last_operation = operation

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[threading.Event]:
        """What `lab.stop()` sets in the block, and did not before it; inside a training, Stop is for that too."""
        if self._training is None:
            self._stop.clear()
        yield self._stop

    def _check_made_here(self, comparison: Comparison) -> None:
        if comparison.model.get("labs"):
            raise AdapterLabError("These are several labs side by side: give each lab its own comparison.")
        if comparison.model.get("name") != self.name:
            raise AdapterLabError(
                f"This comparison was made on {comparison.model.get('name')!r}, this lab holds {self.name!r}."
            )

    def summary(self) -> pd.DataFrame:
        """One row per adapter: adapter, method, r, parameters, megabytes (10⁶ bytes), share (of the base's
        parameters), multiplier, active, trainable, status. Reads no weights and waits for nobody.

        >>> lab.summary()[["adapter", "method", "r", "status"]]
          adapter   method     r  status
        0  pirate     LORA     8  loaded
        1   robot      IA3  <NA>  loaded
        2    bard  ADALORA     4  loaded
        """
        from adapterlab.inspection import summary_frame

        return summary_frame(self._seen())

    def parameters(self) -> pd.DataFrame:
        """How large base and adapters are: one row per owner, kind and dtype, the base first.

        Columns: owner ("base" or an adapter), kind ("weights" or "modules_to_save"), dtype, parameters (those that the
        method trains; of the base all, two for a packed 4-bit byte), trainable (those that require gradients now),
        effective (without AdaLoRA's pruned triplets), bytes (in memory, quantization statistics included), bytes_on_disk
        (the owner's whole file in its first row and 0 in the others: the file it was loaded from, or for an adapter that
        is on no disk the one that `save_adapter` would write; missing for a base without files), share_of_base (of the
        base's parameters). Reads no weights and waits for nobody.

        >>> frame = lab.parameters().set_index("owner")
        >>> int(frame.loc["pirate", "parameters"]) == lab.adapters["pirate"].parameters
        True
        """
        from adapterlab.inspection import parameters_frame

        return parameters_frame(self._seen())

    def plot_parameters(self, ax: Axes | None = None) -> Figure:
        """`parameters()` as bars: base against each adapter. Draws into `ax` if given; the figure shows itself.

        >>> figure = lab.plot_parameters()
        >>> figure.savefig(folder / "parameters.png")
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['base', 'pirate', 'robot', 'bard']
        """
        from adapterlab.plots import plot_parameters

        return _figure(plot_parameters(self.parameters(), ax=ax))

    def memory(self) -> pd.DataFrame:
        """What is in memory now, and the peak of the last operation: owner, kind, device, bytes, source.

        owner and kind:
            "base": weights, buffers, quantization (bitsandbytes' statistics), gradients.
            an adapter: weights, modules_to_save, gradients, and, as long as a trainer of `lab.trainer` is alive, optimizer
                and importance averages (AdaLoRA's).
            "lab", what it keeps to be quick: stack padding, DoRA norms, kept batches, finished columns.
            "process": Python and libraries, which is all else that the process has, tensors of your own and what malloc
                keeps included; on a GPU other tensors, and what CUDA's allocator has reserved beyond.
            "last operation": "peak of compare: KV cache", … gradients, optimizer, importance averages, and "activations
                and temporaries", which is the rest. They add up to the peak, on top of what was there when the last
                compare, generate, divergence, evaluate or training began that has ended well. Where the peak can't be
                measured (macOS, Windows, within another operation) the rest is missing.
        device: as torch names it; "disk" for what accelerate has put there, which takes no memory. bytes: of whole storages,
            each counted once whoever shares it. Only rows with bytes, and the base's weights.
        source: "measured" (storages of tensors, the operating system, CUDA's allocator) or "computed" (a formula or a
            difference).

        Reads no weights, allocates nothing of size, changes nothing and waits for nobody. An adapter's own elements are its
        bytes, though they may lie in a storage that it shares with others.

        >>> frame = lab.memory()
        >>> int(frame.query("owner == 'pirate'")["bytes"].sum()) == lab.adapters["pirate"].bytes
        True
        """
        from adapterlab.memory import memory_frame

        return memory_frame(self._seen(), self._finished, self._last_operation)

    def plot_memory(self, ax: Axes | None = None) -> Figure:
        """`memory()` as stacked bars, one per device. Draws into `ax` if given; the figure shows itself.

        >>> figure = lab.plot_memory()
        >>> figure.savefig(folder / "memory.png")
        >>> figure.axes[0].get_title("left")
        'everything'
        """
        from adapterlab.plots import plot_memory

        return _figure(plot_memory(self.memory(), ax=ax))

    @classmethod
    def estimate(
        cls,
        model: str | os.PathLike[str] | PretrainedConfig | PreTrainedModel | Any,
        adapters: Iterable[PeftConfig | str | os.PathLike[str]]
        | Mapping[str, PeftConfig | str | os.PathLike[str]] = (),
        quantization: Literal["8bit", "4bit"] | None = None,
        training: bool = False,
        *,
        quantization_config: Any = None,
        dtype: Any = "auto",
        context: int | None = None,
        columns: int | None = None,
        prompts: int = 1,
        batch_size: int = 8,
        length: int | None = None,
        gradient_checkpointing: bool = False,
        mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> pd.DataFrame:
        """What a model with these adapters would take, from its config alone; no weights are fetched, read or made.

        model: a Hub id, a folder, a config, or a model in hand, whose config is taken. An adapter's id or folder: its
            base, with that adapter. adapters: PEFT configs, methods' names ("lora", with PEFT's own targets), adapters'
            ids or folders; or a mapping of names to such.
        quantization, quantization_config, dtype, attn_implementation, trust_remote_code, revision, subfolder, token,
            local_files_only, cache_dir: as for `AdapterLab` and `from_pretrained`. "auto" for a config without a dtype is
            float32.
        context: tokens of prompt and answer together (default 1024). columns: rows of a comparison for each of
            `prompts` (default base and every adapter). batch_size, length: rows of a training batch, and tokens of each
            (default 512). Defaults are cut to the model's context. gradient_checkpointing, mixed_precision: as in
            transformers' TrainingArguments; "auto" is what `train` would choose on this machine.

        Columns: case ("inference"; with `training` also "full fine-tuning", of the plain weights as they are loaded, and
        "training <adapter>", of that adapter alone), owner ("base", an adapter, or "run"), kind, parameters (missing
        where nothing is counted), bytes, source ("computed"). The rows of a case add up to what tensors take at its peak.
        kind: weights; quantization (what dequantises them); buffers; gradients, as far as they are there at the peak;
        optimizer (AdamW's two averages); allocation (AdaLoRA's); KV cache; activations; logits.

        Quantised weights take, for n values: int8 n + 4 per row; nf4 and fp4 n/2 + 4n/64 + a table of 64 bytes, doubly
        quantised n/2 + n/64 + 4n/16384 + tables of 1092 bytes. Which layers stay plain is transformers' own rule. Activations
        and gradients are counted by running the model on tensors without values, rows without padding, in kernels as on
        a CPU: the forward of a context, or a whole training step. To that comes what Python, libraries and the device's
        allocator take. Where a model can't run so, a warning says it and activations are missing.

        Raises `AdapterLabError` for what can't be had, can't be put together, or is no number that makes sense.

        >>> frame = AdapterLab.estimate(lab.model.config, adapters=["lora"], quantization="4bit", training=True)
        >>> frame["case"].unique().tolist()
        ['inference', 'full fine-tuning', 'training lora']
        """
        from adapterlab.estimate import estimate_frame
        from adapterlab.estimate_inputs import Circumstances

        return estimate_frame(
            model,
            adapters,
            training,
            Circumstances(context, columns, prompts, batch_size, length, gradient_checkpointing, mixed_precision),
            quantization=quantization,
            quantization_config=quantization_config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            revision=revision,
            subfolder=subfolder,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )

    def ranks(self, adapter_name: str) -> pd.DataFrame:
        """Where an AdaLoRA adapter's ranks are: one row per adapted layer: layer, module, rank (kept), init_r.

        Raises `AdapterLabError` for a method that allocates no ranks. Reads λ alone, and waits for nobody.

        >>> frame = lab.ranks("bard")
        >>> sorted(frame["module"].unique())
        ['down_proj', 'q_proj', 'up_proj', 'v_proj']
        >>> int(frame["init_r"].max())
        4
        """
        from adapterlab.inspection import ranks_frame_of

        adapters = self._seen()
        name = adapters.known(adapter_name)
        return ranks_frame_of(adapters.mounts.adapters[name], name)

    def plot_ranks(self, adapter_name: str, ax: Axes | None = None) -> Figure:
        """`ranks(name)` as a heatmap of layers and modules, and below it the budget over the steps of its last run here.

        Says so where allocation never ran. Draws the heatmap alone into `ax` if given; the figure shows itself.

        >>> figure = lab.plot_ranks("bard")
        >>> figure.savefig(folder / "ranks.png")
        >>> figure.axes[0].get_ylabel()
        'layer'
        """
        from adapterlab.plots import plot_ranks

        ranks = self.ranks(adapter_name)
        runs = self.adapters[adapter_name].runs
        with_budget = [run.history for run in runs if "total_rank" in run.history]
        untouched = bool((ranks["rank"] == ranks["init_r"]).all()) and not any(len(run.ranks) for run in runs)
        note = f"Allocation never ran: every rank is init_r = {ranks['init_r'].max()}." if untouched else ""
        return _figure(plot_ranks(ranks, history=with_budget[-1] if with_budget else None, note=note, ax=ax))

    @exclusive
    def delta_norms(self, adapter_name: str) -> pd.DataFrame:
        """How much an adapter changes each weight: one row per adapted layer, computed from its factors.

        Columns: layer (missing where the path has no number), module, path, norm (‖ΔW‖, Frobenius), relative_norm
        (‖ΔW‖ / ‖W‖; W of 8-bit and 4-bit layers is dequantised), effective_rank (exp of the entropy of σ² / Σσ², as if ΔW's
        energy were spread evenly over so many directions; 0 where ΔW = 0), rank (what the factors allow; pruned triplets
        of AdaLoRA don't count), singular_values (of ΔW, largest first, a tuple of that many), for IA3 scale_min,
        scale_mean, scale_max of its scales, and note ("" or what to know of the row). Biases are no part of ΔW.

        LoRA, rsLoRA, AdaLoRA, LoHa, LoKr: from the factors in float64; ΔW is never formed. DoRA: the norm is that of all of
        ΔW; singular values, rank and effective rank are those of its low-rank part, scaling · BA. On a half-precision base
        a fresh DoRA has a norm, since PEFT rounds its magnitudes. IA3: ΔW = W ∘ (s − 1) has no factors, so no singular
        values. modules_to_save and trained tokens: saved minus original, norms alone. LoRA on experts' parameters: norms
        over all experts. Other methods (OFT, …), and LoHa where r² is no smaller than the layer: ΔW is formed, one layer
        at a time in float64, by PEFT's merge, and dropped; its singular values are told where they are at most 1024.

        Missing: relative_norm of offloaded layers, and norm too for IA3 there. ‖W‖ is read at the first call, and again
        when the weight has moved or changed; an edit of single values through `.data` may go unseen. Changes nothing.
        Raises `AdapterLabError` for weights that are not finite, and for methods that PEFT can't merge.

        >>> largest = lab.delta_norms("pirate").nlargest(3, "relative_norm")
        >>> set(largest["module"]) <= {"q_proj", "v_proj"}
        True
        """
        from adapterlab.norms import delta_norms_frame

        return delta_norms_frame(self._adapters, self._adapters.known(adapter_name))

    def plot_delta_norms(self, adapter_name: str, ax: Axes | None = None) -> Figure:
        """`delta_norms(name)` as a heatmap by layer and module. Draws into `ax` if given; the figure shows itself.

        >>> figure = lab.plot_delta_norms("pirate")
        >>> figure.savefig(folder / "norms.png")
        >>> figure.axes[0].get_ylabel()
        'layer'
        """
        from adapterlab.plots import plot_delta_norms

        return _figure(plot_delta_norms(self.delta_norms(adapter_name), ax=ax))

    @exclusive
    def subspace_overlap(self, adapter_name: str, other: str) -> pd.DataFrame:
        """How far two adapters work in the same directions: one row per layer that both adapt by factors.

        Columns: layer, module, path, output_overlap and input_overlap (‖UᵀV‖² / min(rank, other_rank) for orthonormal bases
        U and V of the two ΔW's column spaces, or row spaces: from 0 for none to 1 where one space lies in the other; LoRA's
        paper, arXiv 2106.09685, calls it φ), output_chance and input_chance (what random spaces of these ranks give on
        average: the larger rank / the dimension), rank and other_rank (directions whose singular value is above 1e-5 of the
        largest; in a layer where one adapter has none, overlaps are missing).

        LoRA, rsLoRA, AdaLoRA, DoRA (its low-rank part) and LoHa (where r² is smaller than the layer) have such factors.
        Changes nothing. Raises `AdapterLabError` for another method, for adapters that share no layer, and for an untrained
        one.

        >>> frame = lab.subspace_overlap("pirate", "bard")
        >>> sorted(frame["module"].unique())
        ['q_proj', 'v_proj']
        """
        from adapterlab.norms import overlap_frame

        return overlap_frame(self._adapters, self._adapters.known(adapter_name), self._adapters.known(other))

    def plot_subspace_overlap(self, adapter_name: str, other: str, ax: Axes | None = None) -> Figure:
        """`subspace_overlap(adapter_name, other)` as heatmaps. Draws into `ax` if given; the figure shows itself.

        >>> figure = lab.plot_subspace_overlap("pirate", "bard")
        >>> figure.savefig(folder / "overlap.png")
        >>> figure.axes[0].get_ylabel()
        'layer'
        """
        from adapterlab.plots import plot_overlap

        return _figure(plot_overlap(self.subspace_overlap(adapter_name, other), ax=ax))

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
        nothing; hooks and dropout as in `compare`. `lab.stop()` ends it with an `AdapterLabError`: half a text is no result.

        >>> frame = lab.divergence("Arr, the moon be bright!", ["pirate"], prompt="What is the moon?")
        >>> farthest = frame.nlargest(3, "kl")[["token", "kl", "rank", "base_rank"]]
        >>> len(farthest)
        3
        """
        from adapterlab.comparison import Comparison
        from adapterlab.divergence import divergence_frame

        if isinstance(text, Comparison):
            self._check_made_here(text)

        with self._stoppable() as stop, self._watch("divergence"):
            return divergence_frame(self._adapters, self._tokenizer, text, columns, prompt, chat, stop)

    def plot_divergence(
        self, text: str | Comparison, columns: Sequence[ColumnLike] | None = None, **keywords: Any
    ) -> Figure:
        """`divergence(text, columns, …)` as the text itself, each token shaded by how far the column is from base there.

        >>> figure = lab.plot_divergence("Arr, the moon be bright!", ["pirate"])
        >>> figure.savefig(folder / "divergence.png")
        >>> len(figure.axes)
        2
        """
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
        where base is not among the columns). Changes nothing. `lab.stop()` ends it with an `AdapterLabError`: a perplexity
        of some of the texts would look like that of all.

        >>> frame = lab.evaluate(texts, [None, "pirate"])
        >>> frame["column"].tolist()
        ['base', 'pirate']
        >>> float(frame.loc[0, "delta_nll"])
        0.0
        """
        from adapterlab.divergence import evaluate_frame

        with self._stoppable() as stop, self._watch("evaluate"):
            return evaluate_frame(
                self._adapters, self._tokenizer, texts_or_dataset, columns, max_length, confidence, seed, stop
            )

    def capabilities(self) -> pd.DataFrame:
        """What can be done with each adapter here and now: one row per adapter and capability: adapter, capability,
        possible, reason (why not, and what to do; "" where it is possible).

        Capabilities: batch (its column shares a batch with others; if not, it runs in turn, and says so), blend (blends,
        and multipliers other than 0 and 1), concatenate (`add_weighted_adapter`), merge and merge_to_disk
        (`merge_and_unload` without and with a folder), train, save, ranks, delta_norms, 8bit and 4bit (it works on this
        base opened so). The reason is what the call itself would say. Reads no weights and waits for nobody.

        >>> frame = lab.capabilities()
        >>> frame.query("adapter == 'robot' and not possible")["capability"].tolist()
        ['concatenate', 'ranks']
        """
        from adapterlab.capabilities import capabilities_frame

        return capabilities_frame(self._seen())

    def _drawing(self, method: str, *arguments: Any) -> Callable[[], Figure]:
        """What draws the picture of a `plot_…` method, its numbers read by now: whoever draws for a page holds matplotlib's
        settings for all threads, and must not wait for the lab meanwhile."""
        from adapterlab import plots

        waits: dict[str, tuple[Callable[..., pd.DataFrame], Callable[..., Any]]] = {
            "plot_delta_norms": (self.delta_norms, plots.plot_delta_norms),
            "plot_subspace_overlap": (self.subspace_overlap, plots.plot_overlap),
        }
        if method not in waits:
            return functools.partial(getattr(self, method), *arguments)
        read, draw = waits[method]
        frame = read(*arguments)
        return lambda: _figure(draw(frame))


def _figure(axes: Any) -> Figure:
    return axes.get_figure(root=True)
