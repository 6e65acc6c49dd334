"""How fp32 results become 16-bit weights: to the nearest value, or up or down at random without bias."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from bam_lora.errors import UserError

# (fp32 result, where to write it, what tells this block from all others)
Rounding = Callable[[torch.Tensor, torch.Tensor, str], None]

# Bits of an fp32 mantissa that the type cannot hold, and the smallest normal number below which its steps stay equal.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
_FLOAT16_NORMAL, _FLOAT16_STEP = 2.0**-14, 2.0**-24
_RANDOM_BITS = 16


def find_rounding(name: str, seed: int) -> Rounding:
    """The rounding called `name`: "nearest" (half to even) or "stochastic", whose draws follow from the seed.

    Raises:
        UserError: If there is none of this name.
    """
    if name == "nearest":
        return lambda result, into, block: _put(result, into)
    if name == "stochastic":
        return lambda result, into, block: stochastic(result, into, f"{seed}:{block}")
    raise UserError.of("rounding", expected="nearest or stochastic", found=repr(name), remedy="Choose one")


def _put(result: torch.Tensor, into: torch.Tensor) -> None:
    """Rounds to nearest even where the result is; from a GPU torch would else send fp32 and round on the CPU."""
    into.copy_(result if result.device == into.device else result.to(into.dtype))


def stochastic(result: torch.Tensor, into: torch.Tensor, stream: str) -> None:
    """Rounds to one of the two neighbours, to each with the probability that makes the expected value exact.

    A uniform random number below one step is added to the magnitude, then what the type cannot hold is cut off, so
    values that the type holds stay. Where rounding up would overflow, the largest finite number is taken.

    Args:
        result: Values in fp32.
        into: Memory of the same shape. In bf16 or fp16 it gets the rounded values, in wider types the values.
        stream: What the draws follow from.
    """
    dropped = _DROPPED_BITS.get(into.dtype)
    if dropped is None:
        _put(result, into)
        return
    draws = _draws(stream, result.numel()).view(result.shape).to(result.device)
    bits = result.contiguous().view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF) + (draws >> (_RANDOM_BITS - dropped))
    rounded = (magnitude & -(1 << dropped)).view(torch.float32)
    if into.dtype == torch.float16:
        small = result.abs() < _FLOAT16_NORMAL
        steps = result[small].abs().double() / _FLOAT16_STEP + draws[small].double() / (1 << _RANDOM_BITS)
        rounded[small] = (steps.floor() * _FLOAT16_STEP).float()
    largest = torch.finfo(into.dtype).max
    rounded = torch.where(result.abs() <= largest, rounded.clamp(max=largest), result.abs())
    _put(torch.copysign(rounded, result), into)  # which is exact: what the type cannot hold is cut off


def _draws(stream: str, count: int) -> torch.Tensor:
    """Independent 16-bit numbers, int32, that follow from the text alone on any machine."""
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-count // 4)).astype("<u8")
    return torch.from_numpy(words.view("<u2")[:count].astype(np.int32))
