"""Deltas by their singular directions, with a trainable coefficient for each group of them.

Shapes: o output, i input, r rank of one branch, R the stacked rank of all branches, k branch, g group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bam_lora.adapters import Factors
from bam_lora.coefficients import Coefficients


@dataclass(frozen=True)
class Basis:
    """Where one branch's singular directions lie among the rows of its A: all that M is made from, r × r."""

    span_rr: torch.Tensor  # A_ri = span_rr · (orthonormal rows)
    directions_rr: torch.Tensor  # right singular directions in those orthonormal rows

    def matrix(self, coefficients_r: torch.Tensor) -> torch.Tensor:
        """M_rr such that scaling · B · M · A is the delta with each direction times its coefficient."""
        chosen = self.directions_rr.T @ (coefficients_r.double()[:, None] * self.directions_rr)
        return self.span_rr @ chosen @ torch.linalg.pinv(self.span_rr)


@dataclass(frozen=True)
class Directions:
    """One branch's delta by its singular directions, largest first: ΔW_oi = left_or · diag(values_r) · right_ri."""

    left_or: torch.Tensor
    values: torch.Tensor
    right_ri: torch.Tensor
    basis: Basis

    @classmethod
    def of(cls, factors: Factors) -> Directions:
        """From the factors alone, in float64: QR of Aᵀ, then the SVD of a matrix as thin as the rank."""
        orthonormal_ir, upper_rr = torch.linalg.qr(factors.A_ri.double().T)
        thin_or = factors.scaling * factors.B_or.double() @ upper_rr.T
        left, values, basis = torch.linalg.svd(thin_or, full_matrices=False)
        return cls(left, values, basis @ orthonormal_ir.T, Basis(upper_rr.T, basis))


def group_of_directions(rank: int, groups: int) -> torch.Tensor:
    """The group of each direction [rank], sizes doubling: a few large directions stand alone, many small share one.

    >>> group_of_directions(8, 3).tolist()
    [0, 1, 1, 2, 2, 2, 2, 2]
    """
    groups = min(groups, rank)
    return torch.tensor([min(groups - 1, int(math.log2(1 + direction))) for direction in range(rank)])


class TrainableDelta:
    """The deltas of all branches for one weight, as one product with trainable coefficients."""

    def __init__(
        self, factors: Sequence[Factors | None], start: Sequence[float], groups: int, dtype: torch.dtype, where: Any
    ) -> None:
        """Every coefficient of branch k starts at `start[k]`; `factors` has None for a branch without a delta."""
        present = [(k, Directions.of(factor)) for k, factor in enumerate(factors) if factor is not None]
        self.count = len(factors)
        self.index = [k for k, _ in present]
        self.bases = [found.basis for _, found in present]
        self.groups = [group_of_directions(len(found.values), groups).to(where) for _, found in present]
        self.right_Ri = torch.cat([found.right_ri for _, found in present]).to(where, dtype)
        self.left_oR = torch.cat([found.left_or * found.values for _, found in present], dim=1).to(where, dtype)
        self.coefficients = [
            torch.full((int(group.max()) + 1,), float(start[k]), device=where, requires_grad=True)
            for k, group in zip(self.index, self.groups, strict=True)
        ]

    def assign(self, weights: Sequence[float]) -> None:
        """Sets every coefficient of branch k to `weights[k]`."""
        with torch.no_grad():
            for k, coefficient in zip(self.index, self.coefficients, strict=True):
                coefficient.fill_(weights[k])

    def per_direction(self) -> torch.Tensor:
        """The coefficients, one for each stacked direction [R]."""
        return torch.cat([c[g] for c, g in zip(self.coefficients, self.groups, strict=True)])

    def __call__(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """As a forward hook: the output plus the deltas' share of it."""
        x = inputs[0].to(self.right_Ri.dtype)
        inner = (x @ self.right_Ri.T) * self.per_direction().to(x.dtype)
        return output + (inner @ self.left_oR.T).to(output.dtype)

    def values(self) -> list[list[float] | None]:
        """[branches][groups] as plain numbers."""
        found: list[list[float] | None] = [None] * self.count
        for k, coefficient in zip(self.index, self.coefficients, strict=True):
            found[k] = coefficient.detach().cpu().double().tolist()  # Metal has no float64
        return found

    def resolved(self) -> Coefficients:
        """What the ledger stores: the block of M of each branch, or one number per branch where there is one group."""
        if all(len(coefficient) == 1 for coefficient in self.coefficients):
            return Coefficients.scalar([0.0 if value is None else value[0] for value in self.values()])
        blocks = [
            basis.matrix(coefficient.detach().cpu()[group.cpu()])
            for basis, coefficient, group in zip(self.bases, self.coefficients, self.groups, strict=True)
        ]
        return Coefficients("blocks", torch.cat([block.flatten() for block in blocks]))
