"""Changes of a weight that are no low-rank product, computed block by block: DoRA, whole weights, rows, dense methods.

Shapes: o output, i input, r rank, k branch. Everything is in the orientation in which the checkpoint stores the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from bam_lora.adapters import Factors

# (original rows in fp32, the first row's number) -> the rows as they become.
Resolver = Callable[[torch.Tensor, int], torch.Tensor]
# The stored weight's blocks in order, as (first row, rows in fp32); each call begins again.
Blocks = Callable[[], Iterable[tuple[int, torch.Tensor]]]
# A dense method: K functions that give a branch's delta of a block, by (original, first row) -> the merged delta's.
DeltaOf = Callable[[int, torch.Tensor, int], torch.Tensor]
Combine = Callable[[Sequence[torch.Tensor], int], torch.Tensor]
Prepare = Callable[[str, DeltaOf, Blocks], Combine]

_NOTHING_KEPT = 1e-12


@dataclass(frozen=True)
class BranchWeight:
    """What one branch holds for one weight.

    Attributes:
        factors: A low-rank delta, or None.
        magnitude: DoRA's norms, one for each slice along `axis`, or None.
        axis: 0: a magnitude for each row; 1: for each column.
        value: The weight itself (o, i), which takes the place of the base's, or None.
        indices: Rows that were trained as such, with their values (n, i) in `rows`.
        rows: See `indices`.
        scales: What the training multiplied each slice along `axis` by in the end, magnitude / norm, or None.
        seen: The types that the base's weight was rounded to, one after the other, before training saw it; empty:
            values, rows and magnitudes are taken as they are.
    """

    factors: Factors | None = None
    magnitude: torch.Tensor | None = None
    axis: int = 0
    value: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    seen: tuple[torch.dtype, ...] = ()

    def transposed(self) -> BranchWeight:
        """The same for a weight that is stored the other way round; values and rows are as stored already."""
        factors = None if self.factors is None else turned(self.factors)
        return replace(self, factors=factors, axis=1 - self.axis)

    def cut(self, first: int, stop: int) -> BranchWeight:
        """The same for rows [first, stop) of the weight alone."""
        factors = self.factors
        return replace(
            self,
            factors=None if factors is None else replace(factors, B_or=factors.B_or[first:stop]),
            magnitude=self.magnitude[first:stop] if self.magnitude is not None and self.axis == 0 else self.magnitude,
            value=None if self.value is None else self.value[first:stop],
            scales=self.scales[first:stop] if self.scales is not None and self.axis == 0 else self.scales,
        )

    def product(self, first: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The low-rank delta of some rows."""
        if self.factors is None:
            return None
        B_or, A_ri = self.factors.B_or[first : first + rows].to(dtype), self.factors.A_ri.to(dtype)
        return torch.mm(B_or * self.factors.scaling, A_ri)


def turned(factors: Factors) -> Factors:
    """The factors of the transposed delta."""
    return replace(factors, A_ri=factors.B_or.T.contiguous(), B_or=factors.A_ri.T.contiguous())


class _Branch:
    """One branch's weight block by block; DoRA's column norms, which take the whole weight, are found once."""

    def __init__(self, weight: BranchWeight, blocks: Blocks) -> None:
        self.weight = weight
        self._norms_i: torch.Tensor | None = None
        if weight.magnitude is not None and weight.axis == 1:
            squares = sum(self._directed(rows, first).double().square().sum(dim=0) for first, rows in blocks())
            assert isinstance(squares, torch.Tensor), "a weight has rows"
            self._norms_i = squares.sqrt()

    @property
    def replaces(self) -> bool:
        """Whether it gives the weight itself and not only what is added to it."""
        return not self.weight.seen and (self.weight.value is not None or self.weight.rows is not None)

    def _directed(self, original: torch.Tensor, first: int) -> torch.Tensor:
        """The weight plus the low-rank delta, before any magnitude."""
        begin = (
            original
            if self.weight.value is None
            else self.weight.value[first : first + len(original)].to(original.dtype)
        )
        product = self.weight.product(first, len(original), original.dtype)
        return begin if product is None else begin + product

    def result(self, original: torch.Tensor, first: int) -> torch.Tensor:
        """The rows as this branch alone would have them."""
        directed = self._scaled(self._directed(original, first), first)
        if self.weight.rows is None or self.weight.indices is None:
            return directed
        directed = directed.clone()
        inside = (self.weight.indices >= first) & (self.weight.indices < first + len(original))
        directed[self.weight.indices[inside] - first] = self.weight.rows[inside].to(original.dtype)
        return directed

    def delta(self, original: torch.Tensor, first: int) -> torch.Tensor:
        """What this branch adds to the rows."""
        if self.weight.seen:
            return self._learned(original, first)
        if self.replaces or self.weight.magnitude is not None:
            return self.result(original, first) - original
        product = self.weight.product(first, len(original), original.dtype)
        return torch.zeros_like(original) if product is None else product

    def _learned(self, original: torch.Tensor, first: int) -> torch.Tensor:
        """What training made of the rows minus what it began with: the rows as its types rounded them.

        Taking the trained value for the weight instead would drop what that rounding cut off, which holds most of
        what small earlier changes have added.
        """
        weight, stop = self.weight, first + len(original)
        product = weight.product(first, len(original), original.dtype)
        change = torch.zeros_like(original) if product is None else product
        if weight.value is not None:
            change += weight.value[first:stop].to(original.dtype) - self._seen(original)
        if weight.magnitude is not None:
            # The norm is that of the weight training saw, quantised perhaps: with the base's own, a scale would not be
            # 1 where nothing was learned, and every iteration would shrink the weight by what quantising shrinks it.
            assert weight.scales is not None, "a branch of a run records them"
            scales = weight.scales[first:stop, None] if weight.axis == 0 else weight.scales
            scales = scales.double()
            change = ((scales - 1) * original.double() + scales * change.double()).to(original.dtype)
        if weight.rows is not None and weight.indices is not None:
            inside = (weight.indices >= first) & (weight.indices < stop)
            own = weight.indices[inside] - first
            change[own] = weight.rows[inside].to(original.dtype) - self._seen(original[own])
        return change

    def _seen(self, original: torch.Tensor) -> torch.Tensor:
        for dtype in self.weight.seen:
            original = original.to(dtype)
        return original.float()

    def _scaled(self, directed: torch.Tensor, first: int) -> torch.Tensor:
        """DoRA: m · (W + ΔW) / ‖W + ΔW‖, the norm over the inputs of each output (arXiv 2402.09353)."""
        magnitude = self.weight.magnitude
        if magnitude is None:
            return directed
        if self._norms_i is not None:
            return directed * (magnitude.double() / self._norms_i).to(directed.dtype)
        norms_o = directed.double().norm(dim=1)
        return directed * (magnitude[first : first + len(directed)].double() / norms_o).to(directed.dtype)[:, None]


@dataclass(frozen=True)
class DenseChange:
    """A weight's merged change from K branches, None where one leaves the weight alone."""

    branches: tuple[BranchWeight | None, ...]
    weights: tuple[float, ...]
    prepare: Prepare | None = None  # a dense method; None: the weighted sum of the deltas

    def each(self, change: Callable[[BranchWeight], BranchWeight]) -> DenseChange:
        """The same with every branch changed."""
        return replace(self, branches=tuple(None if one is None else change(one) for one in self.branches))

    @property
    def last_row(self) -> int | None:
        """The highest row trained as such, where that is all that the branches do; else None."""
        present = [one for one in self.branches if one is not None]
        rows = [one.indices for one in present if one.indices is not None and one.factors is None and one.value is None]
        return max(int(one.max()) for one in rows) if rows and len(rows) == len(present) else None

    def same_as(self, other: DenseChange) -> bool:
        """Whether it makes another weight of the same values the same."""
        pairs = zip(self.branches, other.branches, strict=True)
        return self.weights == other.weights and all(_same(one, two) for one, two in pairs)

    def bind(self, blocks: Blocks, identity: str) -> Resolver:
        """What computes blocks of the weight; reads the weight before, where that is needed.

        Args:
            blocks: The stored matrix as it is before this change.
            identity: What random choices for this matrix follow from.
        """
        branches = [None if one is None else _Branch(one, blocks) for one in self.branches]
        if self.prepare is None:
            return lambda original, first: self._sum(branches, original, first)

        def delta_of(branch: int, original: torch.Tensor, first: int) -> torch.Tensor:
            known = branches[branch]
            return torch.zeros_like(original) if known is None else known.delta(original, first)

        combine = self.prepare(identity, delta_of, blocks)
        count = len(branches)
        return lambda original, first: (
            original + combine([delta_of(branch, original, first) for branch in range(count)], first)
        )

    def _sum(self, branches: Sequence[_Branch | None], original: torch.Tensor, first: int) -> torch.Tensor:
        """W + Σ w_k (W_k - W), so that a single whole weight with weight 1 comes out bit for bit."""
        total = torch.zeros_like(original)
        kept = 1.0
        for branch, weight in zip(branches, self.weights, strict=True):
            if branch is None:
                continue
            if branch.replaces:
                kept -= weight
                total += weight * branch.result(original, first)
            else:
                total += weight * branch.delta(original, first)
        if abs(kept) > _NOTHING_KEPT:
            total += kept * original
        return self._untouched(original, total, first)

    def _untouched(self, original: torch.Tensor, total: torch.Tensor, first: int) -> torch.Tensor:
        """Rows that no branch has trained keep every bit, where rows are all that was trained."""
        if self.last_row is None:
            return total
        result = original.clone()
        for one in self.branches:
            if one is not None and one.indices is not None:
                inside = one.indices[(one.indices >= first) & (one.indices < first + len(original))] - first
                result[inside] = total[inside]
        return result


def _same(one: BranchWeight | None, two: BranchWeight | None) -> bool:
    if one is None or two is None:
        return one is two
    pairs = [(one.magnitude, two.magnitude), (one.value, two.value), (one.indices, two.indices), (one.rows, two.rows)]
    if one.factors is not None and two.factors is not None:
        pairs += [(one.factors.A_ri, two.factors.A_ri), (one.factors.B_or, two.factors.B_or)]
        if one.factors.scaling != two.factors.scaling:
            return False
    elif one.factors is not two.factors:
        return False
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
