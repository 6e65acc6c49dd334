"""Operations of training, and what of a GPU's peak they use: model FLOP utilisation.

For each token, N being the weights of linear layers, output head included, a the numbers of the adapter:

- 2 N forward and 2 N backward: the base is frozen, so that only its inputs have gradients, not its weights;
- 6 a for the adapter: 2 forward, 4 backward;
- attention: 4 d h s forward and twice that backward, over all layers: queries by keys and weights by values, h heads
  of width d, s the mean number of tokens that a token sees in its own document.

What checkpointing computes a second time, dequantising, norms and the optimizer are not counted: they are no use in
themselves, so time spent on them lowers the utilisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

PEAKS = {
    "H200": 989e12,
    "H100 80GB HBM3": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 FLOP/s with fp32 accumulation that NVIDIA's data sheets state, by words of the GPU's name."""
_SLOWER = "NVL|D|Laptop|Ti"  # other GPUs, whose names begin as these do


def flops_per_token(outline: Any, adapter_numbers: int, seen_tokens: float) -> dict[str, float]:
    """Operations for one token, forward and backward.

    Args:
        outline: A `memory_shape.BaseShape`.
        adapter_numbers: Trained numbers.
        seen_tokens: s of the module's text.

    Returns:
        {"linear", "adapter", "attention", "total"}.
    """
    head = outline.vocabulary * outline.hidden
    linear = 4.0 * (outline.quantised + head)
    adapter = 6.0 * adapter_numbers
    attention = 12.0 * outline.head_dim * outline.heads * outline.layers * seen_tokens
    return {"linear": linear, "adapter": adapter, "attention": attention, "total": linear + adapter + attention}


def seen_tokens(lengths: Iterable[int]) -> float:
    """The mean number of tokens that a token sees, itself included, in documents of these lengths, causally."""
    pairs = tokens = 0
    for length in lengths:
        pairs += length * (length + 1) // 2
        tokens += length
    return pairs / tokens


def peak_of(name: str) -> float | None:
    """The stated peak of a GPU by its name, in FLOP/s; None: not known here."""
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b(?! ({_SLOWER})\b)", name)), None)
