"""Products of a smaller rank that come closest to given deltas, and how close that is.

Shapes: o output, i input, R the rank of a given product, r the rank that is kept, q a little more than r.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from bam_lora.adapters import Factors
from bam_lora.coefficients import gram
from bam_lora.errors import UserError
from bam_lora.fold_blocks import row_ranges
from bam_lora.safetensors_stream import all_finite

if TYPE_CHECKING:
    from bam_lora.adapter_files import Products
    from bam_lora.merge import MergedAdapters

# Of a dense matrix without a side longer than this all singular vectors are computed: seconds at most.
_WHOLE_DECOMPOSITION = 1024
_POWER_ITERATIONS = 6


def require_rank(rank: int | None) -> None:
    """UserError if a rank that the user asks for is none."""
    if rank is not None and rank < 1:
        raise UserError.of("--rank", expected="a rank of at least 1", found=str(rank), remedy="Try 64, or leave it out")


class Compressed:
    """Products, each with no more directions than asked for or than it can have.

    The errors are those of the products that were asked for so far.
    """

    def __init__(self, source: Products, rank: int | None, remedy: str = "Use smaller weights") -> None:
        self._source, self._rank, self._remedy = source, rank, remedy
        self._squares: dict[str, tuple[float, float]] = {}  # what was left out, and all, squared norms

    def names(self) -> list[str]:
        """See `Products`."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, int]:
        """See `Products`."""
        return self._source.shape(name)

    def rank(self, name: str) -> int:
        """See `Products`."""
        return min(self._source.rank(name), *self.shape(name), *([] if self._rank is None else [self._rank]))

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `Products`; UserError if a product is beyond fp32."""
        stacked = self._source.stacked(name)
        assert stacked is not None, name
        rank = self.rank(name)
        if not (all_finite(stacked[0]) and all_finite(stacked[1])):
            raise UserError.of(
                f"the delta of {name!r}", expected="numbers within fp32", found="an overflow", remedy=self._remedy
            )
        if rank == stacked[0].shape[1]:
            whole = Factors(A_ri=stacked[1], B_or=stacked[0], scaling=1.0)
            self._squares[name] = (0.0, gram(whole, whole) if self._rank else 0.0)
            return stacked
        B_or, A_ri, left_out, square = truncated(*stacked, rank)
        self._squares[name] = (left_out if self._rank else 0.0, square)
        return B_or, A_ri

    def errors(self) -> dict[str, float]:
        """{weight: relative Frobenius error}."""
        return {name: math.sqrt(left / whole) if left else 0.0 for name, (left, whole) in self._squares.items()}

    def error(self) -> float:
        """The relative Frobenius error over all of them."""
        left, whole = (math.fsum(pair[place] for pair in self._squares.values()) for place in (0, 1))
        return math.sqrt(left / whole) if left else 0.0


class CompressedDense(Compressed):
    """Merged deltas of a method that works element by element, each as the product of rank r that comes closest."""

    def __init__(self, merged: MergedAdapters, names: list[str], rank: int) -> None:
        super().__init__(merged, rank)
        self._merged, self._names, self._most = merged, names, rank

    def names(self) -> list[str]:
        """See `Products`."""
        return self._names

    def rank(self, name: str) -> int:
        """See `Products`."""
        return min(self._most, *self.shape(name))

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `Products`."""
        B_or, A_ri, left_out, square = truncated_dense(self._merged.delta(name), self.rank(name))
        self._squares[name] = (left_out, square)
        return B_or, A_ri

    def norms(self) -> dict[str, float]:
        """{weight: Frobenius norm of its merged delta, nothing left out}."""
        return {name: math.sqrt(square) for name, (_, square) in self._squares.items()}


def truncated(B_oR: torch.Tensor, A_Ri: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The best product of a smaller rank (Eckart and Young, 1936), from the factors alone, in float64.

    Args:
        B_oR: Left factor.
        A_Ri: Right factor.
        rank: r, at most min(o, i, R).

    Returns:
        (B_or, A_ri) in fp32, the singular values shared out evenly, the squared Frobenius norm of what is left out, and
        that of the whole.
    """
    left_oq, upper_qR = torch.linalg.qr(B_oR.double())
    right_ip, lower_pR = torch.linalg.qr(A_Ri.double().T)
    U, values, V = torch.linalg.svd(upper_qR @ lower_pR.T, full_matrices=False)
    roots = values[:rank].sqrt()
    B_or = (left_oq @ U[:, :rank]) * roots
    A_ri = roots[:, None] * (V[:rank] @ right_ip.T)
    squares = values.square()
    return B_or.float(), A_ri.float(), float(squares[rank:].sum()), float(squares.sum())


def truncated_dense(delta_oi: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """A product of a given rank close to a dense delta.

    It is the closest one (Eckart and Young, 1936) where the shorter side is at most 1024; else it is found by subspace
    iteration from a fixed random start (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4), and so the
    closest but for a little.

    Args:
        delta_oi: The delta in fp32.
        rank: r, at most min(o, i).

    Returns:
        (B_or, A_ri) in fp32, the squared Frobenius norm of the delta without this very product, and that of the delta.
    """
    size = min(delta_oi.shape)
    directions = min(size, rank + max(16, rank // 2))
    if size <= _WHOLE_DECOMPOSITION or 2 * directions > size:
        U, values, V = torch.linalg.svd(delta_oi.double(), full_matrices=False)
    else:
        basis_oq = _leading_columns(delta_oi, directions)
        U, values, V = torch.linalg.svd((basis_oq.T @ delta_oi).double(), full_matrices=False)
        U = basis_oq.double() @ U
    roots = values[:rank].sqrt()
    B_or, A_ri = (U[:, :rank] * roots).float(), (roots[:, None] * V[:rank]).float()
    left_out = whole = 0.0
    for first, count in row_ranges(*delta_oi.shape):
        block = delta_oi[first : first + count].double()
        left_out += float((block - B_or[first : first + count].double() @ A_ri.double()).square().sum())
        whole += float(block.square().sum())
    return B_or, A_ri, left_out, whole


def _leading_columns(delta_oi: torch.Tensor, directions: int) -> torch.Tensor:
    """An orthonormal basis (o, q) of nearly all that the leading left singular vectors span."""
    start_iq = torch.randn(delta_oi.shape[1], directions, generator=torch.Generator().manual_seed(0))
    basis_oq: torch.Tensor = torch.linalg.qr(delta_oi @ start_iq).Q
    for _ in range(_POWER_ITERATIONS):
        basis_iq = torch.linalg.qr(delta_oi.T @ basis_oq).Q
        basis_oq = torch.linalg.qr(delta_oi @ basis_iq).Q
    return basis_oq
