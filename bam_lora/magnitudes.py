"""Exact order statistics of |x| over a matrix that comes in blocks and is never held whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from bam_lora.errors import UserError

_LOW_BITS = 16
_LOW_BINS = 1 << _LOW_BITS
_HIGH_BINS = 1 << (31 - _LOW_BITS)  # the sign bit is off
_INFINITE = 0x7F800000 >> _LOW_BITS  # upper bits of Inf; those of NaN are not below


def magnitudes_at(
    what: str, blocks: Callable[[], Iterable[torch.Tensor]], ranks: Callable[[int], Sequence[int]]
) -> list[float]:
    """The magnitudes at given ranks, exact, in two passes of about 1 MB of counts each, whatever the matrix's size.

    A radix selection: the bits of |x| in fp32, read as an integer, are in the order of the magnitudes. The first pass
    counts their upper 15 bits, the second the lower 16 of those elements whose upper bits are the ones sought.

    Args:
        what: What the matrix is, for errors.
        blocks: Gives the matrix's blocks, fp32 of any shape, at least one element in all; called once a pass.
        ranks: From the count of elements to the ranks wanted; 1 is the largest magnitude.

    Returns:
        One magnitude per rank, each that of an element.

    Raises:
        UserError: If the matrix holds NaN or Inf.
    """
    counts = torch.zeros(_HIGH_BINS, dtype=torch.int64)
    for block in blocks():
        counts += torch.bincount(_magnitude_bits(block) >> _LOW_BITS, minlength=_HIGH_BINS).cpu()
    if bool(counts[_INFINITE:].any()):
        raise _not_finite(what)
    found = [_bin_of(counts, rank) for rank in ranks(int(counts.sum()))]
    lower = {high: torch.zeros(_LOW_BINS, dtype=torch.int64) for high, _ in found}
    for block in blocks():
        bits = _magnitude_bits(block)
        for high, low_counts in lower.items():
            low = bits[bits >> _LOW_BITS == high] - (high << _LOW_BITS)
            low_counts += torch.bincount(low, minlength=_LOW_BINS).cpu()
    values = [(high << _LOW_BITS) | _bin_of(lower[high], rank)[0] for high, rank in found]
    return [float(value) for value in torch.tensor(values, dtype=torch.int32).view(torch.float32)]


def require_finite(what: str, block: torch.Tensor) -> None:
    """UserError if the block holds NaN or Inf."""
    if block.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(block)).tolist())):
        raise _not_finite(what)


def _magnitude_bits(block: torch.Tensor) -> torch.Tensor:
    assert block.dtype == torch.float32, block.dtype
    return block.reshape(-1).view(torch.int32) & 0x7FFFFFFF


def _bin_of(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the element of that rank, counted from the last bin down, and its rank within the bin."""
    reached = counts.flip(0).cumsum(0)
    assert 1 <= rank <= int(reached[-1]), (rank, int(reached[-1]))
    index = int(torch.searchsorted(reached, rank))
    return len(counts) - 1 - index, rank - (int(reached[index - 1]) if index else 0)


def _not_finite(what: str) -> UserError:
    return UserError.of(
        what,
        expected="finite numbers",
        found="NaN or Inf",
        remedy="Its adapter is damaged; train the branch again or use another adapter",
    )
