"""Memory while merge weights are learned or searched (`bam.merge.weights`): the branches' base with their deltas on it.

Beside the base stand the factors of every delta that takes part, in the type that is computed with; what is trained is
a few numbers a weight. Windows of the selection sets go through as rows of a batch with a mask, not packed, and the
logits of a batch are there whole, unlike a branch's (`memory_parts.logits`): they decide how large a batch is
(`learned_weights.fitting_tokens`). L: tokens of the longest window, T: of a batch, R: rank of all deltas together.
"""

from __future__ import annotations

from dataclasses import replace

from bam_lora.learned_weights import CHUNK_BYTES, fitting
from bam_lora.memory_activations import Work, attention_bytes, layer_bytes, norm_bytes
from bam_lora.memory_adapter import adapter_numbers
from bam_lora.memory_parts import Component, gaps, weights, work_of, workspace
from bam_lora.memory_shape import BaseShape
from bam_lora.merge_learning import room_for_deltas
from bam_lora.recipe import Recipe
from bam_lora.recipe_rules import SELECTED

_LONGEST = 2048  # tokens: windows have 4,096 bytes at the most, of which two or more make a token


def merging(recipe: Recipe, shape: BaseShape, device: str) -> tuple[Component, ...]:
    """The components of this phase at its peak; none where weights are neither learned nor searched.

    Args:
        recipe: The recipe.
        shape: Its base.
        device: "cuda" or "cpu".
    """
    merge, quantization = recipe.bam.merge, recipe.quantization
    if merge.weights not in SELECTED:
        return ()
    learned, count = merge.weights == "learned", delta_count(recipe)
    # Rows with padding go through sdpa, whatever packed rows go through.
    work = work_of(recipe, shape, attention="sdpa", device=device)
    window = min(recipe.data.sequence_length, shape.context or _LONGEST, _LONGEST)
    tokens = fitting(shape.vocabulary, work.tokens)
    tokens = max(window, min(tokens, merge.learned.windows * window) if learned else tokens)
    work = replace(work, tokens=tokens, rank=work.rank * count, dropout=False)
    base = weights(shape, quantization.bits, quantization.double, work.dtype_bytes)
    held = count * adapter_numbers(recipe, shape) * work.dtype_bytes
    deltas = Component("deltas", held, f"the factors of {count} branches, {work.dtype_bytes} bytes a number")
    return (*base, deltas, *(_learning(work, shape, window) if learned else _searching(work, shape)))


def delta_count(recipe: Recipe) -> int:
    """How many branches' deltas are on the base at once, at most: an iteration's, and with `scope: run` earlier ones.

    These are in the base already; what is learned for them is a correction.
    """
    branches, merge = min(recipe.branches, recipe.slices), recipe.bam.merge
    if merge.weights != "learned" or merge.learned.scope != "run":
        return branches
    return min(recipe.slices, branches + room_for_deltas(recipe.quantization.compute_dtype, branches))


def _learning(work: Work, shape: BaseShape, window: int) -> tuple[Component, ...]:
    """What is kept for the gradients of the coefficients, and the larger of loss and layer, which do not meet."""
    token = learning_layer_bytes(work, shape, window)
    stream = shape.layers * work.tokens * (work.dtype_bytes * shape.hidden if work.checkpointing else token)
    kept = stream + work.tokens * (window + 4 * shape.hidden)  # the mask, the last norm
    how = ": every layer's input" if work.checkpointing else ", all that backward needs"
    logits = _logits(work, shape, backward=True)
    layer = (work.tokens * token if work.checkpointing else 0) + workspace(work, shape)
    parts = Component("activations", kept, f"{work.tokens:,} tokens{how}")
    at_work = Component("layer at work", layer, "gradients, a weight dequantised")
    largest = max(logits, at_work, key=lambda one: one.bytes)
    return parts, largest, *gaps(work, largest)


def learning_layer_bytes(work: Work, shape: BaseShape, window: int) -> int:
    """What a layer keeps of a token: as of a branch (`memory_activations`), without the inputs of adapted layers.

    Factors are frozen here, so of each delta only what the first gives is kept, c·R, for the coefficients; norms keep
    no output, and of the MLP gate, its activation and up stay. The mask is a row of a window a token, c·L.
    """
    computed = work.dtype_bytes
    norms = norm_bytes(work, shape) - 2 * computed * shape.hidden
    mlp = computed * (3 * shape.intermediate + shape.experts_per_token * shape.hidden)
    layers = len(shape.linears) / shape.layers + len(shape.fused) / shape.layers * max(1, shape.experts_per_token)
    return round(norms + attention_bytes(work, shape) + mlp + layers * work.rank * computed + computed * window)


def _searching(work: Work, shape: BaseShape) -> tuple[Component, ...]:
    """Without gradients: a layer's working set, and the logits."""
    one = replace(work, checkpointing=False)
    layer = layer_bytes(one, shape) // 2 + workspace(one, shape) // 2
    logits = _logits(work, shape, backward=False)
    return Component("layer at work", layer, f"{work.tokens:,} tokens"), logits, *gaps(work, logits)


def _logits(work: Work, shape: BaseShape, *, backward: bool) -> Component:
    """The logits, whole.

    They and a copy without the last token of each row in c bytes; a chunk of them and its log-softmax in fp32. Of more
    than a chunk backward has the gradients, too: of a chunk in fp32, of all in c bytes.
    """
    entries = work.tokens * shape.vocabulary
    chunk = min(CHUNK_BYTES, 4 * entries)
    size = 2 * work.dtype_bytes * entries + 2 * chunk
    if backward and 4 * entries > CHUNK_BYTES:
        size = max(size + chunk, 3 * work.dtype_bytes * entries)
    return Component("logits", size, f"{work.tokens:,} tokens x {shape.vocabulary:,}, whole")
