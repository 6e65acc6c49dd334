"""What a model writes after a prompt, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def continue_text(model: Any, tokenizer: Any, prompt: str, tokens: int, dtype: str) -> str:
    """What the model writes after a prompt, greedily: up to `tokens` tokens, and at least a third of them."""
    inputs = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        inputs = [tokenizer.bos_token_id, *inputs]
    # A base may end a text that it cannot read at once; that shows nothing.
    return write_after(model, tokenizer, inputs, tokens, dtype, min_new_tokens=tokens // 3)


def write_after(model: Any, tokenizer: Any, ids: Sequence[int], tokens: int, dtype: str, **options: Any) -> str:
    """What the model writes after some tokens, greedily; `options` are those of transformers' `generate`."""
    import torch

    inputs = torch.tensor([ids], device=model.device)
    autocast = torch.autocast(model.device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
    with torch.inference_mode(), autocast:
        out = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    return str(tokenizer.decode(out[0, inputs.shape[1] :], skip_special_tokens=True))
