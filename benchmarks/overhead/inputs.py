"""What both scripts of the overhead benchmark are given: a base (8 M, or random) and documents of so many tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SHAPES = {
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1},
}
"""Llamas that are made here, with random weights and the 8 M base's tokenizer."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def base_folder(name: str, data: Path, work: Path) -> Path:
    """The folder of a base: the given 8 M one, or a random one, made on the first call.

    Args:
        name: "8m", or one of `SHAPES`.
        data: The folder with `models/en-docs-8m`.
        work: Where a random base is kept.
    """
    given = data / "models" / "en-docs-8m"
    if name == "8m":
        return given
    folder = work / f"base-{name}"
    if not (folder / "config.json").exists():
        _make_base(SHAPES[name], given, folder)
    return folder


def _make_base(shape: dict[str, int], given: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(str(given))
    for key, value in {**shape, "num_key_value_heads": shape["num_attention_heads"], "head_dim": 64}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(temporary)
    for name in _TOKENIZER:
        shutil.copyfile(given / name, temporary / name)
    temporary.rename(folder)


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
