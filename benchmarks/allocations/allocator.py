"""Torch's caching allocator in numbers: what it takes of a card for the blocks that a program asks for.

As with PYTORCH_ALLOC_CONF=expandable_segments:True, which a run sets: one growing segment for small blocks and one for
large ones, the smallest gap that fits, blocks split and joined again. Source: CUDACachingAllocator.cpp of torch 2.13.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

_ROUND = 512
_SMALL_LARGEST = 1 << 20  # blocks up to here are in the small segment
_PAGES = {"small": 2 << 20, "large": 20 << 20}


@dataclass(frozen=True)
class Block:
    """A place in a segment, in bytes."""

    segment: str
    start: int
    size: int


@dataclass
class _Segment:
    page: int
    end: int = 0  # so far it is mapped
    gaps: dict[int, int] = field(default_factory=dict)  # {start: size}
    ends: dict[int, int] = field(default_factory=dict)  # {end: start}
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (size, start), sorted

    def take(self, size: int) -> int:
        """Where a block of this size goes: the smallest gap but the last one, else the end."""
        at = bisect_left(self.sizes, (size, 0))
        while at < len(self.sizes) and sum(self.sizes[at]) == self.end:  # the gap at the end counts as endless
            at += 1
        if at == len(self.sizes):
            return self._take_last(size)
        found, start = self.sizes[at]
        self._remove(start)
        if found > size:
            self._insert(start + size, found - size)
        return start

    def _take_last(self, size: int) -> int:
        start = self.ends.get(self.end, self.end)
        if start < self.end:
            self._remove(start)
        needed = start + size
        if needed > self.end:
            self.end += -(-(needed - self.end) // self.page) * self.page
        if self.end > needed:
            self._insert(needed, self.end - needed)
        return start

    def give(self, start: int, size: int) -> None:
        """A block becomes a gap, joined with its neighbours."""
        if start in self.ends:
            before = self.ends[start]
            size += start - before
            self._remove(before)
            start = before
        if start + size in self.gaps:
            after = start + size
            size += self.gaps[after]
            self._remove(after)
        self._insert(start, size)

    def _insert(self, start: int, size: int) -> None:
        self.gaps[start], self.ends[start + size] = size, start
        insort(self.sizes, (size, start))

    def _remove(self, start: int) -> None:
        size = self.gaps.pop(start)
        del self.ends[start + size]
        del self.sizes[bisect_left(self.sizes, (size, start))]


class CachingAllocator:
    """Blocks in two segments.

    Attributes:
        reserved_peak: Most bytes that were taken of the card since `begin`.
    """

    def __init__(self) -> None:
        self._segments = {name: _Segment(page) for name, page in _PAGES.items()}
        self.reserved_peak = 0

    @property
    def reserved(self) -> int:
        """Bytes taken of the card now."""
        return sum(one.end for one in self._segments.values())

    def begin(self) -> None:
        """Counts the peak anew."""
        self.reserved_peak = self.reserved

    def allocate(self, size: int) -> Block:
        """A block of at least so many bytes."""
        rounded = max(1, -(-size // _ROUND)) * _ROUND
        name = "small" if rounded <= _SMALL_LARGEST else "large"
        block = Block(name, self._segments[name].take(rounded), rounded)
        self.reserved_peak = max(self.reserved_peak, self.reserved)
        return block

    def free(self, block: Block) -> None:
        """Its place may be used again; the card's memory is kept."""
        self._segments[block.segment].give(block.start, block.size)
