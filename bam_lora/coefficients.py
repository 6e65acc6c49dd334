"""What a merge decides for one weight, and the low-rank algebra it is decided in and applied by.

Shapes: o output, i input, r rank of one branch, R = Σ r over the branches that change the weight, k branch.
A merged delta stays within the span of the branches' factors, ΔW_oi = [s₁B₁ … s_K B_K] · M · [A₁; …; A_K], where s_k is
a branch's scaling and M_RR comes from the coefficients; so it stays a low-rank product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bam_lora.adapters import Factors
from bam_lora.errors import UserError
from bam_lora.safetensors_stream import all_finite

Kind = Literal["scalar", "diagonal", "blocks", "matrix"]


@dataclass(frozen=True)
class Coefficients:
    """What a merge method decided for one weight, in float64, resolved once and stored.

    `kind` says how M is given: "scalar": (K,) one number a branch; "diagonal": (R,) one number a rank direction;
    "blocks": the branches' own (r, r) matrices along M's diagonal, row by row, one after the other: (Σ r²,);
    "matrix": (R, R). A branch that does not change the weight has a scalar, but no direction and no block.
    """

    kind: Kind
    values: torch.Tensor

    @classmethod
    def scalar(cls, values: Sequence[float]) -> Coefficients:
        """One number per branch."""
        return cls("scalar", torch.tensor(list(values), dtype=torch.float64))

    def __post_init__(self) -> None:
        assert self.values.dtype == torch.float64, self.values.dtype
        assert self.values.ndim == (2 if self.kind == "matrix" else 1), self.values.shape
        if not bool(torch.isfinite(self.values).all()):
            raise UserError.of(
                f"{self.kind} merge coefficients",
                expected="finite numbers",
                found="NaN or Inf",
                remedy="Check the weights and the adapters",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coefficients) and self.kind == other.kind and torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.values.flatten().tolist())))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; float64 values come back bit for bit."""
        return {"kind": self.kind, "values": self.values.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Coefficients:
        """The inverse of `to_json`."""
        return cls(value["kind"], torch.tensor(value["values"], dtype=torch.float64))


def stack(factors: Sequence[Factors | None], coefficients: Coefficients) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One low-rank product for the merged delta of a weight: ΔW_oi = B_oR · A_Ri.

    Scalings and coefficients are multiplied in float64 into B, which is rounded to fp32 once; A is exact.

    Args:
        factors: One entry per branch, None where it does not change the weight.
        coefficients: What the method chose for this weight.

    Returns:
        (B_oR, A_Ri) in fp32, or None if no branch changes the weight.

    Raises:
        UserError: If fp32 cannot hold the result.
    """
    present = [(branch, factor) for branch, factor in enumerate(factors) if factor is not None]
    if not present:
        return None
    A_Ri = torch.cat([factor.A_ri.float() for _, factor in present])
    if coefficients.kind == "scalar":
        assert len(coefficients.values) == len(factors), (len(coefficients.values), len(factors))
        values = coefficients.values.tolist()
        B_oR = torch.cat([_scaled(f.B_or, f.scaling * values[branch]).float() for branch, f in present], dim=1)
    else:
        B_oR = _mixed([f.B_or.double() * f.scaling for _, f in present], coefficients).float()
    if not all_finite(B_oR) or not all_finite(A_Ri):
        raise UserError.of(
            "a merged delta", expected="numbers within fp32", found="an overflow", remedy="Use smaller weights"
        )
    return B_oR, A_Ri


def identity_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """What tells one adapter from another: the hashes of its files as they are, since every weight asks for it."""
    return " ".join(sorted(stated["sha256"] for stated in files.values()))


def branch_parts(
    files: Sequence[Mapping[str, Any]], factors: Sequence[Factors | None], coefficients: Coefficients
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The merged delta of a weight branch by branch, for `gathered`.

    Args:
        files: Sizes and hashes of each branch's adapter files, which tell whose right factor it is.
        factors: One entry per branch, None where it does not change the weight.
        coefficients: What the method chose for this weight.

    Yields:
        (identity of the files, B_or, A_ri) in fp32, of the branches that change the weight.
    """
    stacked = stack(factors, coefficients)
    if stacked is None:
        return
    present = [(identity_of(one), len(factor.A_ri)) for one, factor in zip(files, factors, strict=True) if factor]
    ranks = [rank for _, rank in present]
    for (identity, _), B_or, A_ri in zip(present, stacked[0].split(ranks, dim=1), stacked[1].split(ranks), strict=True):
        yield identity, B_or, A_ri


def gathered(parts: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One product from several, those with the same right factor as one: Σ B·A = (Σ B)·A.

    Args:
        parts: (identity of the right factor, B_or, A_ri), in fp32.

    Returns:
        (B_oR, A_Ri) in fp32, in the order in which right factors first come up; None if there are no parts.
    """
    left: dict[str, torch.Tensor] = {}
    right: dict[str, torch.Tensor] = {}
    for identity, B_or, A_ri in parts:
        known = left.get(identity)
        left[identity] = B_or if known is None else (known.double() + B_or.double()).float()
        right.setdefault(identity, A_ri)
    return (torch.cat(list(left.values()), dim=1), torch.cat(list(right.values()))) if left else None


def _mixed(B_or_of: Sequence[torch.Tensor], coefficients: Coefficients) -> torch.Tensor:
    """[B₁ … B_K] · M_RR of the branches that change the weight, in float64."""
    ranks, values = [B_or.shape[1] for B_or in B_or_of], coefficients.values
    if coefficients.kind == "blocks":
        sizes = [rank * rank for rank in ranks]
        assert len(values) == sum(sizes), (len(values), ranks)
        blocks = [block.view(rank, rank) for block, rank in zip(values.split(sizes), ranks, strict=True)]
        return torch.cat([B_or @ M_rr for B_or, M_rr in zip(B_or_of, blocks, strict=True)], dim=1)
    assert values.shape[0] == sum(ranks), (values.shape, ranks)
    B_oR = torch.cat(list(B_or_of), dim=1)
    return B_oR * values if coefficients.kind == "diagonal" else B_oR @ values


def _scaled(B_or: torch.Tensor, scale: float) -> torch.Tensor:
    """In float64, but for a scale of exactly one, which needs no arithmetic (as in a merged adapter)."""
    return B_or if scale == 1 else B_or.double() * scale


def gram(first: Factors, second: Factors) -> float:
    """The inner product ⟨Δ₁, Δ₂⟩ = s₁s₂ · Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ) in float64, without a dense delta.

    Args:
        first: A_ri and B_or of one delta.
        second: The same of another for the same weight; its rank may differ.
    """
    left = first.B_or.double().T @ second.B_or.double()
    right = first.A_ri.double() @ second.A_ri.double().T
    return first.scaling * second.scaling * float(torch.dot(left.flatten(), right.flatten()))


def gram_matrix(factors: Sequence[Factors | None]) -> torch.Tensor:
    """G_kk of inner products between the branches' deltas in float64; zero where a branch has none."""
    products = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    for row, first in enumerate(factors):
        for column, second in enumerate(factors[: row + 1]):
            if first is not None and second is not None:
                products[row, column] = products[column, row] = gram(first, second)
    return products
