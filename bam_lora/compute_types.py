"""Number formats that a GPU does not have in hardware."""

from __future__ import annotations

from bam_lora.base import device
from bam_lora.cards import instead_of_bfloat16


def has_bfloat16() -> bool:
    """Whether what trains here computes in bfloat16 itself; torch and transformers say so of cards that emulate it."""
    import torch

    return device() != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def emulation_note(compute_dtype: str, base: str, card: str | None = None) -> str | None:
    """What to say where activations are in bfloat16 and the card before Ampere.

    torch emulates it there (by fp32), and transformers does not warn, so nothing else would tell. Triton refuses to
    compile for it, so where TRL's loss is a kernel of Triton's a step may fail: still no reason to refuse all of it.

    Args:
        compute_dtype: Of activations.
        base: The base's name or kind.
        card: The name of a card without bfloat16 that is planned for; None: see what is here.
    """
    if compute_dtype != "bfloat16" or (card is None and has_bfloat16()):
        return None
    if card is None:
        import torch

        card = torch.cuda.get_device_name()
    return (
        f"{card} has no bfloat16: torch emulates it, slowly, and Triton's kernels may refuse it; better take "
        f"quantization.compute_dtype: {instead_of_bfloat16(base)}, which is another run"
    )
