"""How far the branches' deltas agree: norms and cosines, from the factors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from bam_lora.adapters import Factors
from bam_lora.coefficients import Coefficients, gram, gram_matrix, stack


class FactorSource(Protocol):
    """What statistics need of an adapter."""

    def factors(self, name: str) -> Factors | None:
        """The factors of one weight's delta, or None where it is zero."""
        ...


def merge_statistics(
    adapters: Sequence[FactorSource],
    coefficients_by_tensor: Mapping[str, Coefficients],
    branches: int | None = None,
    dense_norms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Norms and cosines of the branches' deltas and the norm of what the merge made of them.

    Args:
        adapters: The K branches, and after them earlier ones that the merge corrects.
        coefficients_by_tensor: What the merge method chose, by weight name.
        branches: K, None if all are branches; only their norms and cosines are given.
        dense_norms: The norm of the merged change of weights that have no coefficients, as it is no low-rank product.

    Returns:
        {"delta_norms": (K,), "merged_norm", "cosine", "tensors": {name: {"norms", "cosine", "merged_norm"}}}, all
        Frobenius norms over the whole flattened delta; a cosine is the mean over the pairs of branches, None where no
        pair has two deltas that are not zero.
    """
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    merged_square = 0.0
    tensors = {}
    known = dense_norms or {}
    for name in sorted({*coefficients_by_tensor, *known}):
        factors = [adapter.factors(name) for adapter in adapters]
        products = gram_matrix(factors)
        chosen = coefficients_by_tensor.get(name)
        square = known[name] ** 2 if chosen is None else _merged_square(factors, chosen, products)
        own = products[:branches, :branches]
        tensors[name] = {"norms": _norms(own), "cosine": _mean_cosine(own), "merged_norm": math.sqrt(square)}
        total += products
        merged_square += square
    total = total[:branches, :branches]
    return {
        "delta_norms": _norms(total),
        "merged_norm": math.sqrt(merged_square),
        "cosine": _mean_cosine(total),
        "tensors": tensors,
    }


def _merged_square(factors: Sequence[Factors | None], coefficients: Coefficients, products: torch.Tensor) -> float:
    if coefficients.kind == "scalar":
        square = float(coefficients.values @ products @ coefficients.values)
    else:
        stacked = stack(factors, coefficients)
        if stacked is None:
            return 0.0
        merged = Factors(A_ri=stacked[1], B_or=stacked[0], scaling=1.0)
        square = gram(merged, merged)
    # Deltas that cancel leave a rounding error of either sign.
    return max(square, 0.0)


def _norms(products: torch.Tensor) -> list[float]:
    return [math.sqrt(max(value, 0.0)) for value in products.diagonal().tolist()]


def _mean_cosine(products: torch.Tensor) -> float | None:
    norms = _norms(products)
    cosines = [
        float(products[row, column]) / (norms[row] * norms[column])
        for row in range(len(norms))
        for column in range(row)
        if norms[row] * norms[column] > 0
    ]
    return math.fsum(cosines) / len(cosines) if cosines else None
