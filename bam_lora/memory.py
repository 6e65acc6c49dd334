"""Memory on the device that trains: what its phases hold at their peaks, component by component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bam_lora.evaluate import CHUNK_TOKENS, LOGITS_BYTES
from bam_lora.memory_activations import Work, layer_bytes
from bam_lora.memory_adapter import adapter_numbers
from bam_lora.memory_merging import merging
from bam_lora.memory_parts import Component, activations, is_gpu, total, training_state, weights, work_of, workspace
from bam_lora.memory_shape import BaseShape
from bam_lora.recipe import Recipe

CONTEXT_BYTES = 600_000_000
"""What CUDA itself takes of a card: its context, kernels, cuBLAS. Not measured; NVIDIA's drivers differ."""
_PHASES = ("training", "scoring", "merging")


@dataclass(frozen=True)
class Estimate:
    """Memory on the training device.

    Attributes:
        training: Components that are there at once at the peak of a training step.
        scoring: The same while models are scored.
        merging: The same while merge weights are learned or searched; empty where they are not.
    """

    training: tuple[Component, ...]
    scoring: tuple[Component, ...]
    merging: tuple[Component, ...] = ()

    @property
    def phases(self) -> dict[str, tuple[Component, ...]]:
        """All of them by name, without one that the run has not."""
        return {name: parts for name in _PHASES if (parts := getattr(self, name))}

    @property
    def peak_bytes(self) -> int:
        """The largest of their peaks."""
        return max(map(total, self.phases.values()))

    @property
    def largest(self) -> Component:
        """The component that takes most at the peak."""
        return max(max(self.phases.values(), key=total), key=lambda one: one.bytes)

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        listed = {name: [vars(one) for one in parts] for name, parts in self.phases.items()}
        return {"peak_bytes": self.peak_bytes, **listed}


def estimate(
    recipe: Recipe, shape: BaseShape, *, attention: str | None, device: str = "cuda", kernels: str | None = None
) -> Estimate:
    """What a run takes of the device it trains on.

    Args:
        recipe: The recipe.
        shape: Its base.
        attention: What attention is computed by, as `choose_attention` says; None: sdpa.
        device: "cuda", or "cpu", whose kernels work otherwise.
        kernels: The branches' fused kernels, as `choose_kernels` says.
    """
    work = work_of(recipe, shape, attention=attention, device=device, kernels=kernels)
    context = (
        [Component("GPU context", CONTEXT_BYTES, "CUDA, its kernels and cuBLAS; assumed")] if is_gpu(device) else []
    )
    base = weights(shape, recipe.quantization.bits, recipe.quantization.double, work.dtype_bytes)
    scored_bits = 4 if recipe.evaluation.precision == "4bit" else 16
    scored = weights(shape, scored_bits, recipe.quantization.double, work.dtype_bytes)
    trained = adapter_numbers(recipe, shape)
    training = [*context, *base, *training_state(recipe, shape), *activations(work, shape, trained)]
    merged = merging(recipe, shape, device)
    found = (*context, *scored, *scoring(recipe, shape, work)), (*context, *merged) if merged else ()
    return Estimate(tuple(training), *found)


def scoring(recipe: Recipe, shape: BaseShape, work: Work) -> list[Component]:
    """Windows without gradients: a layer's working set, and the logits, which are bounded (`evaluate.score`).

    A branch's adapter is in fp32 beside the base. Windows are of 4,096 bytes or as the recipe says, two bytes or more
    to a token, and no longer than the context.
    """
    window = min(shape.context or 2048, (recipe.evaluation.window_bytes or 4096) // 2)
    most = max(1, min(recipe.evaluation.batch_size, LOGITS_BYTES // (window * shape.vocabulary * 4)))
    tokens = most * window
    one = replace(work, tokens=tokens, checkpointing=False, dropout=False, fused=False)
    chunk = min(CHUNK_TOKENS, window) * shape.vocabulary * 12  # fp32 logits, their log-softmax, a copy
    return [
        Component("adapter", 4 * adapter_numbers(recipe, shape), "of the branch that is scored, fp32"),
        Component("layer at work", layer_bytes(one, shape) // 2 + workspace(one, shape) // 2, f"{tokens:,} tokens"),
        Component("logits", tokens * shape.vocabulary * work.dtype_bytes + chunk,
                  f"{tokens:,} tokens x {shape.vocabulary:,}"),
    ]  # fmt: skip


def readable_bytes(size: int) -> str:
    """Bytes on a disk or from the Hub: 2.05 GB, 11.8 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def from_json(value: Mapping[str, Any]) -> Estimate:
    """The estimate that `Estimate.to_json` wrote."""
    return Estimate(**{name: tuple(Component(**one) for one in value.get(name, ())) for name in _PHASES})
