"""Number formats that a GPU does not have in hardware."""

from __future__ import annotations

from bam_lora.base import device


def emulation_note(compute_dtype: str) -> str | None:
    """What to say where activations are in bfloat16 and the card before Ampere: it works, but is emulated.

    torch and transformers take such a card for one that has it, so nothing else would tell.

    Args:
        compute_dtype: Of activations.
    """
    import torch

    if compute_dtype != "bfloat16" or device() != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    name = torch.cuda.get_device_name()
    return f"{name} only emulates bfloat16, slowly: quantization.compute_dtype: float16 in a new run is faster"
