"""The parts of what the training device holds: each is a function with its formula and its reason.

docs/memory.md has the formulas and what they were held against. T are the tokens of a batch, c the bytes of a number
that is computed with (bfloat16: 2).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from bam_lora.attention import FLASH
from bam_lora.memory_activations import Work, recomputed_bytes, stored_bytes
from bam_lora.memory_adapter import adapter_numbers
from bam_lora.memory_shape import BaseShape
from bam_lora.recipe import Recipe

_GAPS = 0.25
"""Of the layer at work or the loss; from the allocator in numbers (benchmarks/allocations), 23 cases."""
_BLOCK = 64  # weights to one 4-bit scale
_NESTED_BLOCK = 256  # scales to one scale of their own, with double quantisation
_TOKEN_TILE, _VOCABULARY_TILE = 4096, 32768  # of TRL's output head
# Optimizer state by name, in bytes for a trained number; others are taken for AdamW in fp32.
_STATES = {"sgd": 0.0, "adafactor": 0.05, "lion_32bit": 4.0, "paged_lion_32bit": 4.0, "rmsprop": 4.0, "adagrad": 4.0,
           "ademamix": 12.0, "paged_ademamix_32bit": 12.0, "ademamix_8bit": 3.1, "paged_ademamix_8bit": 3.1,
           "adamw_torch_4bit": 1.1, "rmsprop_bnb": 4.0, "rmsprop_bnb_32bit": 4.0}  # fmt: skip


@dataclass(frozen=True)
class Component:
    """One part of what memory holds: its bytes and, in words, where they come from."""

    name: str
    bytes: int
    reason: str


def total(components: Iterable[Component]) -> int:
    """Bytes of all of them."""
    return sum(one.bytes for one in components)


def work_of(
    recipe: Recipe, shape: BaseShape, *, attention: str | None, device: str, kernels: str | None = None
) -> Work:
    """What one forward and backward pass works on."""
    training = recipe.training
    return Work(
        tokens=training.per_device_train_batch_size * recipe.data.sequence_length,
        checkpointing=training.checkpointing,
        attention=FLASH if shape.hybrid else attention or "sdpa",  # a hybrid's documents go apart: no mask of T²
        dtype_bytes=4 if recipe.quantization.compute_dtype == "float32" else 2,
        rank=recipe.lora.r,
        dropout=recipe.lora.dropout > 0,
        device=device,
        fused=kernels is not None,
    )


def weights(shape: BaseShape, bits: int, double: bool, dtype_bytes: int) -> list[Component]:
    """The frozen base: what bitsandbytes quantises, and what stays as it is."""
    left = shape.embeddings + shape.others
    if bits == 16:
        return [Component("weights", shape.parameters * dtype_bytes, f"not quantised: {dtype_bytes} bytes a number")]
    quantised = four_bit_bytes(shape.quantised, double) if bits == 4 else eight_bit_bytes(shape)
    parts = [
        Component(f"{bits}-bit weights", quantised, _quantised_reason(bits, double)),
        Component("unquantised weights", left * dtype_bytes, "embeddings, output head, norms"),
    ]
    if shape.fused:
        reason = "bitsandbytes does not quantise these"
        parts.append(Component("experts", shape.experts * dtype_bytes, reason))
    return parts


def _quantised_reason(bits: int, double: bool) -> str:
    if bits == 8:
        return "1 byte a number, an fp32 scale a row"
    return f"half a byte a number, {'8-bit' if double else 'fp32'} scales of {_BLOCK}"


def four_bit_bytes(numbers: int, double: bool) -> int:
    """n/2 codes; a scale for every 64: fp32, or with double quantisation 1 byte and an fp32 for every 256 of these."""
    scales = -(-numbers // _BLOCK)
    return numbers // 2 + (scales + 4 * -(-scales // _NESTED_BLOCK) if double else 4 * scales)


def eight_bit_bytes(shape: BaseShape) -> int:
    """One byte a number, and an fp32 scale a row."""
    return shape.quantised + 4 * sum(one.rows for one in shape.linears)


def training_state(recipe: Recipe, shape: BaseShape) -> list[Component]:
    """What is kept for the numbers that are trained: themselves and their gradients in fp32, the optimizer's state."""
    numbers = adapter_numbers(recipe, shape)
    optim = recipe.training.optim
    state = round(numbers * state_bytes(optim))
    paged = "paged" in optim
    return [
        Component("adapter", 4 * numbers, f"{numbers:,} trained numbers, fp32"),
        Component("gradients", 4 * numbers, "fp32, as the adapter"),
        Component("optimizer", state, f"{optim}: {state_bytes(optim):.3g} bytes a number" + _paged_reason(paged)),
    ]


def _paged_reason(paged: bool) -> str:
    return ", pageable" if paged else ""


def state_bytes(optim: str) -> float:
    """Bytes of optimizer state for a trained number: two fp32 moments for AdamW; 8-bit ones with a scale each 256."""
    if optim in _STATES:
        return _STATES[optim]
    moments = 1 if "lion" in optim or "rmsprop" in optim else 2
    return moments * (1 + 4 / 256) if "8bit" in optim or "8_bit" in optim else 8.0


def activations(work: Work, shape: BaseShape, numbers: int) -> list[Component]:
    """What is kept for the backward pass, and the larger of two peaks that do not meet: the loss, and one layer.

    Autocast's copies of the adapter are kept from the forward pass on. With checkpointing they are dropped after it,
    and the backward pass copies one layer's at a time.

    Args:
        work: The pass.
        shape: The base.
        numbers: How many are trained.
    """
    copies = 0 if work.dtype_bytes == 4 else numbers * work.dtype_bytes
    loss = logits(work, shape)
    layer = recomputed_bytes(work, shape) + workspace(work, shape)
    layer += copies // shape.layers if work.checkpointing else 0
    how = ": every layer's input" if work.checkpointing else ", all that backward needs"
    parts = [Component("activations", stored_bytes(work, shape), f"{work.tokens:,} tokens{how}")]
    meets_loss = loss.bytes + (copies if work.checkpointing else 0) >= layer
    if meets_loss or not work.checkpointing:
        parts.append(Component("adapter copies", copies, "autocast's, in the computing type"))
    what = "computed again, gradients" if work.checkpointing else "gradients"
    largest = loss if meets_loss else Component("layer at work", layer, f"{what}, a weight dequantised")
    return [*parts, largest, *gaps(work, largest)]


def gaps(work: Work, largest: Component) -> list[Component]:
    """What torch's allocator holds of a GPU between the blocks that come and go."""
    if not is_gpu(work.device):
        return []
    reason = f"torch's allocator's, {_GAPS:.0%} of the {largest.name}"
    return [Component("gaps", round(_GAPS * largest.bytes), reason)]


def workspace(work: Work, shape: BaseShape) -> int:
    """The largest weight dequantised, c bytes a number (its scales in fp32, too), and the gradients in one layer.

    A layer's backward pass holds the gradients of its widest part: three of the MLP's width, two of the stream's.
    """
    weight = shape.largest_linear * work.dtype_bytes + 4 * shape.largest_linear // _BLOCK
    if shape.expert_unit:  # PEFT adds the delta to the experts of a layer, whole
        weight += 2 * work.dtype_bytes * shape.experts // shape.layers
    gradients = work.tokens * work.dtype_bytes * (3 * shape.intermediate + 2 * shape.hidden)
    return weight + gradients


def logits(work: Work, shape: BaseShape) -> Component:
    """The output head's part of a training step.

    TRL 1.16 computes the loss in tiles of 4,096 tokens by 32,768 tokens of the vocabulary, c bytes each, and keeps the
    gradient of the hidden states in fp32. Without Triton a tile is worked on in fp32: seven copies and a mask at the
    peak of the backward pass. Older versions hold all logits: c bytes, fp32 twice, their gradient.
    """
    tokens, hidden = work.tokens, work.tokens * shape.hidden * (4 + 2 * work.dtype_bytes)
    if not _tiled_loss():
        size = tokens * shape.vocabulary * (12 + work.dtype_bytes)
        return Component(
            "logits", size + hidden, f"{tokens:,} tokens x {shape.vocabulary:,}: {work.dtype_bytes} + 12 bytes"
        )
    rows = min(tokens, _TOKEN_TILE)
    if is_gpu(work.device) and _has_triton():
        return Component("logits", rows * _VOCABULARY_TILE * work.dtype_bytes + hidden,
                         f"a tile of {rows:,} x {_VOCABULARY_TILE:,} at a time")  # fmt: skip
    columns = min(shape.vocabulary, _VOCABULARY_TILE)
    tile = rows * columns * (7 * 4 + 1 + work.dtype_bytes)
    return Component("logits", tile + hidden, f"a tile of {rows:,} x {columns:,} at a time, in fp32")


def _tiled_loss() -> bool:
    return importlib.util.find_spec("trl") is not None and importlib.util.find_spec("trl.kernels") is not None


def _has_triton() -> bool:
    """Whether torch brings Triton for a GPU: everywhere but on Windows, where it may be there all the same."""
    return sys.platform != "win32" or importlib.util.find_spec("triton") is not None


def is_gpu(device: str) -> bool:
    """Whether a device has a memory and an allocator of its own."""
    return device.startswith(("cuda", "xpu"))
