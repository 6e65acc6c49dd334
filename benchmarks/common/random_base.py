"""Bases of sizes that nobody has to download: random Llamas in bf16 with a given base's tokenizer.

Time and memory do not depend on the values of weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

GIVEN = "8m"  # the name of the base that BAM_LORA_BENCH_DATA holds
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def given_or_random_base(
    name: str, shapes: Mapping[str, Mapping[str, int]], data: Path, work: Path, *, tied: bool
) -> Path:
    """The folder of a base: the given 8 M one, or a random one, made on the first call.

    Args:
        name: "8m", or one of `shapes`.
        shapes: What each random base changes of the given one's config; heads are `hidden_size` over their number wide.
        data: The folder with `models/en-docs-8m`.
        work: Where a random base is kept.
        tied: Whether a random base has one matrix for its embeddings and its output head.
    """
    given = data / "models" / "en-docs-8m"
    if name == GIVEN:
        return given
    folder = work / f"base-{name}"
    if not (folder / "config.json").exists():
        _make_base(shapes[name], given, folder, tied)
    return folder


def _make_base(shape: Mapping[str, int], given: Path, folder: Path, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(str(given))
    for key, value in {**shape, "head_dim": shape["hidden_size"] // shape["num_attention_heads"]}.items():
        setattr(config, key, value)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # never whole in fp32: the largest would not fit
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for name in _TOKENIZER:
        shutil.copyfile(given / name, temporary / name)
    temporary.rename(folder)
