"""Merge methods as pure functions: the factors of K branches and K weights in, coefficients out, for one weight.

Every method here gives one number a branch, found from the branches' inner products ⟨Δ_j, Δ_k⟩, which take the factors
only; so the result is as exact as the linear merge. Where a method is not defined (a delta is zero, they all but
cancel) it is the linear merge: a run that has trained its branches must not end there.
Shapes: k branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from bam_lora.adapters import Factors
from bam_lora.coefficients import Coefficients, gram_matrix
from bam_lora.dense_methods import DENSE_METHODS
from bam_lora.errors import UserError

Method = Callable[[Sequence[Factors | None], Sequence[float]], Coefficients]

# Below this angle (radians) sin is the angle to the last bits, and spherical means are linear ones.
_SMALLEST_ANGLE = 1e-6
# Unit vectors whose linear mean is shorter have no mean direction worth the name: coefficients would grow past 1/this.
_CANCELLED = 0.015
_MOST_STEPS = 200
_CONVERGED = 1e-12


def linear(factors: Sequence[Factors | None], weights: Sequence[float]) -> Coefficients:
    """ΔW = Σ_k w_k · ΔW_k: the weighted sum of the deltas (Branch-and-Merge, arXiv 2407.08699, eq. 2).

    Args:
        factors: One entry per branch, None where it does not change the weight (its delta is zero there).
        weights: (K,) one number per branch.

    Returns:
        Scalar coefficients.
    """
    assert len(factors) == len(weights), (len(factors), len(weights))
    return Coefficients.scalar(weights)


def slerp(factors: Sequence[Factors | None], weights: Sequence[float]) -> Coefficients:
    """Two deltas interpolated along the arc between their directions (Shoemake, 1985), their norms apart from that.

    ΔW = s · n · (sin((1−t)Ω)/sin Ω · ΔW₁/|ΔW₁| + sin(tΩ)/sin Ω · ΔW₂/|ΔW₂|), Ω the angle between them, t = w₂/(w₁+w₂),
    s = w₁+w₂, n = (1−t)|ΔW₁| + t|ΔW₂|. Unlike the linear merge it does not shrink deltas that disagree.

    Args:
        factors: One or two branches, None where one does not change the weight.
        weights: One number per branch.

    Returns:
        Scalar coefficients; of one branch its weight.

    Raises:
        UserError: If there are more than two branches.
    """
    if len(factors) > 2:
        raise UserError.of(
            "merge method 'slerp'", expected="two branches", found=str(len(factors)), remedy="Use karcher, or K = 2"
        )
    if len(factors) < 2 or any(factor is None for factor in factors):
        return linear(factors, weights)
    products = gram_matrix(factors)
    norms = products.diagonal().clamp(min=0).sqrt().tolist()
    cosine = float(products[0, 1]) / (norms[0] * norms[1]) if all(norms) else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if not _SMALLEST_ANGLE < angle < math.pi - 2 * _CANCELLED:
        return linear(factors, weights)
    scale = math.fsum(weights)
    share = weights[1] / scale
    norm = (1 - share) * norms[0] + share * norms[1]
    along = (math.sin((1 - share) * angle), math.sin(share * angle))
    return Coefficients.scalar([scale * norm * a / (math.sin(angle) * n) for a, n in zip(along, norms, strict=True)])


def karcher(factors: Sequence[Factors | None], weights: Sequence[float]) -> Coefficients:
    """The deltas' mean direction on the sphere (Karcher, 1977), with the weighted mean of their norms.

    The direction m minimises Σ_k w_k · angle(m, ΔW_k)²; it is found by steps along the sphere, in coordinates of the
    deltas' directions, from their linear mean. For two deltas it is their slerp.

    Args:
        factors: One entry per branch, None where it does not change the weight.
        weights: (K,) numbers; those of the branches that change the weight are not negative.

    Returns:
        Scalar coefficients.
    """
    present = [k for k, factor in enumerate(factors) if factor is not None]
    products = gram_matrix([factors[k] for k in present])
    norms = products.diagonal().clamp(min=0).sqrt()
    shares = torch.tensor([weights[k] for k in present], dtype=torch.float64)
    scale = float(shares.sum())
    if len(present) < 2 or not bool((norms > 0).all()) or not bool((shares >= 0).all()) or scale <= 0:
        return linear(factors, weights)
    shares /= scale
    mean = _mean_direction(products / norms[:, None] / norms[None], shares)
    if mean is None:
        return linear(factors, weights)
    values = [0.0] * len(factors)
    for k, value in zip(present, (scale * (shares @ norms) * mean / norms).tolist(), strict=True):
        values[k] = value
    return Coefficients.scalar(values)


def model_stock(factors: Sequence[Factors | None], weights: Sequence[float]) -> Coefficients:
    """The average drawn towards the base as far as the branches disagree (Model Stock, arXiv 2403.19522).

    ΔW = t · Σ_k w_k ΔW_k with t = K·cos θ / (1 + (K−1)·cos θ), per weight, cos θ the mean cosine over the pairs of K
    branches that change it; t = 0 where they oppose each other.

    Args:
        factors: One entry per branch, None where it does not change the weight.
        weights: (K,) one number per branch.

    Returns:
        Scalar coefficients.
    """
    products = gram_matrix([factor for factor in factors if factor is not None])
    norms = products.diagonal().clamp(min=0).sqrt()
    count = int((norms > 0).sum())
    if count < 2 or count < len(norms):
        return linear(factors, weights)
    cosines = products / norms[:, None] / norms[None]
    cosine = max(0.0, float(cosines.triu(1).sum()) / (count * (count - 1) / 2))
    return Coefficients.scalar([weight * count * cosine / (1 + (count - 1) * cosine) for weight in weights])


METHODS: dict[str, Method] = {"linear": linear, "slerp": slerp, "karcher": karcher, "model_stock": model_stock}


def find_method(name: str) -> Method:
    """The merge method of that name; UserError if there is none."""
    if name not in METHODS:
        known = ", ".join(sorted((*METHODS, *DENSE_METHODS)))
        raise UserError.of(f"merge method {name!r}", expected=f"one of {known}", found=name, remedy="Choose one")
    return METHODS[name]


def _mean_direction(cosines_kk: torch.Tensor, shares_k: torch.Tensor) -> torch.Tensor | None:
    """The Karcher mean of unit vectors as a combination of them [K]; None where steps do not settle."""
    mean_k = shares_k.clone()
    for _ in range(_MOST_STEPS):
        square = float(mean_k @ cosines_kk @ mean_k)
        if square < _CANCELLED**2:
            return None
        mean_k = mean_k / math.sqrt(square)
        along_k = (cosines_kk @ mean_k).clamp(-1, 1)
        angles_k = along_k.acos()
        # θ/sin θ is 1 at θ = 0, and grows without bound towards the opposite point.
        pull_k = shares_k * torch.where(angles_k < _SMALLEST_ANGLE, 1.0, angles_k / angles_k.sin())
        step_k = pull_k - mean_k * (pull_k @ along_k)
        if not bool(step_k.isfinite().all()):
            return None
        length = math.sqrt(max(0.0, float(step_k @ cosines_kk @ step_k)))
        if length < _CONVERGED:
            return mean_k
        mean_k = math.cos(length) * mean_k + math.sin(length) / length * step_k
    return None
