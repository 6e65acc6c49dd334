"""What both scripts of the overhead benchmark are given: a base (8 M, or random) and documents of so many tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES = {
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12,
             "num_key_value_heads": 12},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1,
             "num_key_value_heads": 1},
}  # fmt: skip
"""Llamas that are made here, with random weights and the 8 M base's tokenizer."""


def parameters(folder: Path) -> int:
    """Numbers in a base's weight files."""
    from bam_lora.checkpoint import open_checkpoint

    total = 0
    for record in open_checkpoint(folder).tensors().values():
        count = 1
        for size in record.shape:
            count *= size
        total += count
    return total


def documents_for(text: Path, base: Path, tokens: int) -> tuple[int, int]:
    """How many documents, from the first on, hold at least so many tokens (EOS counted), and how many they hold."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    total = count = 0
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            if total >= tokens:
                break
            total += len(tokenizer(json.loads(line)["text"], verbose=False)["input_ids"]) + 1
            count += 1
    return count, total
