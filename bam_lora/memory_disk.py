"""Disk over a whole run: what is there at once at its fullest moment, and what stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bam_lora.dense_methods import DENSE_METHODS
from bam_lora.memory import readable_bytes
from bam_lora.memory_adapter import adapter_numbers
from bam_lora.memory_parts import Component, state_bytes, total
from bam_lora.memory_shape import BaseShape
from bam_lora.plan import iteration_count
from bam_lora.recipe import Recipe

_RECORDS = 1_000_000
"""Report, metrics, scores, plan: about a megabyte."""
_CHECKPOINT_EXTRAS = 50_000  # random states, the Trainer's own state


@dataclass(frozen=True)
class Disk:
    """Disk below the run's folder at its fullest moment and at the end; `download_bytes` go to the Hub's cache."""

    peak: tuple[Component, ...]
    end: tuple[Component, ...]
    download_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most at once, below the run's folder."""
        return total(self.peak)

    @property
    def end_bytes(self) -> int:
        """What stays there."""
        return total(self.end)

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        parts = {name: [vars(one) for one in part] for name, part in (("peak", self.peak), ("end", self.end))}
        sizes = {"peak_bytes": self.peak_bytes, "end_bytes": self.end_bytes, "download_bytes": self.download_bytes}
        return {**sizes, **parts}


def disk_estimate(
    recipe: Recipe, shape: BaseShape, *, model_bytes: int, companion_bytes: int, tokens: int | None,
    download_bytes: int = 0,
) -> Disk:  # fmt: skip
    """Disk that a run takes.

    Args:
        recipe: The recipe.
        shape: Its base.
        model_bytes: The base's weight files.
        companion_bytes: Its tokenizer and other files that go along with it.
        tokens: Training tokens of the whole run; None: unknown, and data is left out.
        download_bytes: What the Hub's cache still lacks of the base.
    """
    iterations = iteration_count(recipe)
    model, adapter = model_bytes + companion_bytes, adapter_bytes(recipe, shape)
    adapters = Component("adapters", recipe.slices * adapter, f"{recipe.slices} branches, fp32")
    whole = _whole_weights(recipe, shape, iterations)
    records = Component("records", _RECORDS, "report, metrics, scores")
    grown = [Component("grown base", model, "the base with its new tokens")] if recipe.vocabulary.tokens else []
    always = [adapters, *whole, *_trajectory(recipe, adapter, tokens), records]
    data = data_bytes(tokens)
    # While one iteration is folded the model before it is still there; a base is not folded.
    most = iterations if recipe.keep.bases == "all" else min(2, iterations)
    last = iterations if recipe.keep.bases == "all" else 1
    folding = [*data, *always, *grown, _models(most, model)]
    training = [
        *data,
        *always,
        *grown,
        _models(max(0, most - 1), model),
        checkpoints(recipe, adapter, companion_bytes, tokens),
    ]
    preparing = [Component("data", 2 * total(data), "tokens, and the rows packed of them"), records]
    peak = max((folding, training, preparing), key=total)
    end = [*data, *always, *(grown if recipe.keep.bases == "all" else []), _models(last, model)]
    return Disk(_present(peak), _present(end), download_bytes)


def _models(count: int, model: int) -> Component:
    reason = "the result is the last of them" if count == 1 else f"{count}, of {readable_bytes(model)} each"
    return Component("folded models", count * model, reason)


def _present(parts: list[Component]) -> tuple[Component, ...]:
    return tuple(one for one in parts if one.bytes)


def adapter_bytes(recipe: Recipe, shape: BaseShape) -> int:
    """One branch's adapter: four bytes a number; LoftQ's start is taken off at twice the rank."""
    return 4 * adapter_numbers(recipe, shape) * (2 if recipe.lora.init == "loftq" else 1)


def data_bytes(tokens: int | None) -> list[Component]:
    """Packed rows: four bytes a token, and a length a document."""
    return [] if tokens is None else [Component("data", round(4.1 * tokens), f"{tokens:,} tokens")]


def checkpoints(recipe: Recipe, adapter: int, companion_bytes: int, tokens: int | None) -> Component:
    """Inside a branch: adapter, optimizer state, tokenizer; one more than are kept while the newest is written."""
    training = recipe.training
    saves = training.save_total_limit + 1
    if tokens is not None:
        saves = min(saves, (steps_of_branch(recipe, tokens) - 1) // training.save_steps)
    state = round(adapter / 4 * state_bytes(training.optim))
    each = adapter + state + companion_bytes + _CHECKPOINT_EXTRAS
    return Component("checkpoints", max(0, saves) * each, f"{max(0, saves)} inside a branch, optimizer included")


def steps_of_branch(recipe: Recipe, tokens: int) -> int:
    """Optimizer steps of one branch, all of them alike."""
    training = recipe.training
    if training.max_steps > 0:
        return max(1, training.max_steps // recipe.slices)
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * recipe.data.sequence_length
    return max(1, math.ceil(training.num_train_epochs * math.ceil(tokens / recipe.slices / per_step)))


def _trajectory(recipe: Recipe, adapter: int, tokens: int | None) -> list[Component]:
    if not recipe.keep.checkpoints or tokens is None:
        return []
    saves = steps_of_branch(recipe, tokens) // recipe.training.save_steps * recipe.slices
    return [Component("kept checkpoints", saves * adapter, f"{saves} adapters (keep.checkpoints)")]


def _whole_weights(recipe: Recipe, shape: BaseShape, iterations: int) -> list[Component]:
    """What is not low rank is kept as whole fp32 weights, of two iterations while the newer is written."""
    dense = recipe.bam.merge.method in DENSE_METHODS
    numbers = shape.quantised + shape.experts if dense or recipe.lora.dora else 0
    if recipe.vocabulary.tokens or recipe.lora.modules_to_save or recipe.lora.trainable_token_indices:
        numbers += shape.embeddings
    if not numbers:
        return []
    kept = iterations if recipe.keep.bases == "all" else min(2, iterations)
    cause = recipe.bam.merge.method if dense else recipe.beside_factors
    return [Component("whole weights", kept * 4 * numbers, f"fp32, of {kept} iterations: {cause}")]
