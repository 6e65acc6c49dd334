"""TIES, DARE and Breadcrumbs as the papers say, on the whole matrix in float64, by sorting; and both phases of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from bam_lora.dense_methods import DenseOptions, kept, prepare

NAME = "model.layers.0.mlp.up_proj.weight"


def merge(
    method: str,
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    name: str = NAME,
    height: int | None = None,
    **options: float,
) -> torch.Tensor:
    """Both phases over whole fp32 deltas cut into blocks of `height` rows."""
    rows = len(deltas[0])
    cuts = range(0, rows, height or rows)

    def blocks(branch: int) -> Iterator[torch.Tensor]:
        return (deltas[branch][first : first + cuts.step] for first in cuts)

    combine = prepare(method, name, blocks, len(deltas), weights, DenseOptions(**options))  # type: ignore[arg-type]
    return torch.cat([combine([delta[first : first + cuts.step] for delta in deltas], first) for first in cuts])


def linear(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return sum(weight * delta.double() for delta, weight in zip(deltas, weights, strict=True))  # type: ignore[return-value]


class Large(NamedTuple):
    """Three products of rank 16 as the fold computes them (fp32) and in float64; |x| of each in descending order."""

    deltas: list[torch.Tensor]
    exact: list[np.ndarray]
    descending: list[np.ndarray]


class Reference(NamedTuple):
    """The merged delta, and where it may hang on the last bit: near a threshold or a tie."""

    merged: np.ndarray
    unsure: np.ndarray


def near(values: np.ndarray, limit: float) -> np.ndarray:
    return np.abs(np.abs(values) - limit) <= 1e-6 * limit


def top(delta: np.ndarray, descending: np.ndarray, density: float, drop: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(the delta with only its elements of rank drop + 1 ... drop + density · n left, those near a limit)."""
    keep = max(1, round(density * delta.size))
    highest, lowest = descending[drop], descending[drop + keep - 1]
    magnitude = np.abs(delta)
    left = np.where((magnitude >= lowest) & (magnitude <= highest), delta, 0.0)
    return left, near(delta, lowest) | (near(delta, highest) if drop else False)


def elect(parts: list[np.ndarray], weights: Sequence[float]) -> Reference:
    contributions = np.stack([weight * part for part, weight in zip(parts, weights, strict=True)])
    total = contributions.sum(0)
    agree = (np.sign(contributions) == np.sign(total)) & (contributions != 0)
    sizes = np.abs(np.array(weights))[:, None, None]
    share = (agree * sizes).sum(0)
    with np.errstate(invalid="ignore"):
        mean = np.where(share > 0, (contributions * agree).sum(0) / share, 0.0)
    unsure = (np.abs(total) <= 1e-6 * np.abs(contributions).sum(0)) & (contributions != 0).any(0)
    return Reference(sizes.sum() * mean, unsure)


def in_full(deltas: Sequence[torch.Tensor]) -> Large:
    """Float64 deltas as the reference takes them."""
    exact = [delta.double().numpy() for delta in deltas]
    return Large([delta.float() for delta in deltas], exact, [np.sort(np.abs(delta).ravel())[::-1] for delta in exact])


def reference(
    method: str, large: Large, weights: Sequence[float], options: DenseOptions, name: str = NAME
) -> Reference:
    deltas, sorts = large.exact[: len(weights)], large.descending[: len(weights)]
    unsure = np.zeros(deltas[0].shape, dtype=bool)
    if method in ("ties", "breadcrumbs"):
        drop = round(options.gamma * deltas[0].size) if method == "breadcrumbs" else 0
        pairs = [top(delta, order, options.density, drop) for delta, order in zip(deltas, sorts, strict=True)]
        parts = [part for part, _ in pairs]
        unsure = np.logical_or.reduce([close for _, close in pairs])
    else:
        shape = deltas[0].shape
        masks = [kept(options.seed, name, k, 0, shape, options.density).numpy() for k in range(len(deltas))]
        parts = [delta * mask / options.density for delta, mask in zip(deltas, masks, strict=True)]
    if method.endswith("ties"):
        merged, tied = elect(parts, weights)
        return Reference(merged, unsure | tied)
    return Reference(sum(weight * part for weight, part in zip(weights, parts, strict=True)), unsure)  # type: ignore[arg-type]
