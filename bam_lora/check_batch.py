"""Advice on the batch size, for `bam-lora check`: a batch of packed sequences can cost more than they do one by one.

With `sdpa` or `eager` attention a batch is one row with a dense mask, so each token attends to the whole batch:
4·hidden·layers·(batch - 1)·length operations a token more, beside the 2·parameters of the weights. Half as many more
cost a quarter to a third more time, twice as many twice the time (docs/log.md). On the other hand, very small batches
keep a processor badly busy.
"""

from __future__ import annotations

import json
from pathlib import Path

from bam_lora.attention import BY_DOCUMENT, choose_attention
from bam_lora.base import device
from bam_lora.recipe import Recipe

_MOST_EXTRA_ATTENTION = 0.4


def batch_lines(recipe: Recipe, folder: Path, parameters: int, *, by_document: bool | None = None) -> list[str]:
    """Says so where smaller batches, with more accumulation, would take the same steps in less time.

    Args:
        recipe: What will be trained.
        folder: The base.
        parameters: Its numbers.
        by_document: Whether documents of a packed row are gone through apart; None: as on this machine.
    """
    quantization, training = recipe.quantization, recipe.training
    if by_document is None:
        chosen = choose_attention(quantization.attention, folder, quantization.compute_dtype, device())
        by_document = chosen in BY_DOCUMENT
    if by_document:
        return []
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    if not {"hidden_size", "num_hidden_layers"} <= config.keys():
        return []
    length, batch = recipe.data.sequence_length, training.per_device_train_batch_size
    widths = config["hidden_size"] * config["num_hidden_layers"]
    better = smaller_batch(batch, length, widths, parameters)
    if better == batch:
        return []
    accumulation = training.gradient_accumulation_steps * batch // better
    return [
        f"note        by this kind of attention {batch} packed sequences of {length:,} tokens are one row of "
        f"{batch * length:,}: per_device_train_batch_size: {better} with gradient_accumulation_steps: {accumulation} "
        "takes the same steps in less time and memory"
    ]


def smaller_batch(batch: int, length: int, widths: int, parameters: int) -> int:
    """The largest divisor of a batch size whose attention costs little more than that of sequences one by one.

    Args:
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        widths: The hidden size, summed over the layers.
        parameters: The model's numbers.
    """

    def extra(size: int) -> float:
        return 4 * widths * (size - 1) * length / (2 * parameters)

    return max(size for size in range(1, batch + 1) if batch % size == 0 and extra(size) <= _MOST_EXTRA_ATTENTION)
