"""Merge methods that work element by element on dense deltas: TIES, DARE, Breadcrumbs. Their result is not low rank.

A weight's matrix comes in blocks of whole rows, cut alike for every branch, and a branch's delta in fp32 is computed
afresh for each block; no whole delta is ever held. So a method has two phases. `prepare` finds, once a weight, what
must be known of all of it: thresholds. The `Combine` that it returns makes one merged block of K blocks.
Both phases must be given the same blocks: the last bit of a product may depend on the block's height, and a threshold
is the magnitude of one element. Given equal deltas, no method here depends on where the blocks are cut.
Shapes: k branch, o output (rows), i input (columns); a block has some of the rows.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bam_lora.errors import UserError
from bam_lora.magnitudes import magnitudes_at, require_finite

# The delta of branch k (from 0) in blocks, from the first row on; called again for each pass.
Blocks = Callable[[int], Iterable[torch.Tensor]]
# K blocks of the same rows (rows, columns) in fp32 and the first of these rows -> the merged block, a new tensor.
Combine = Callable[[Sequence[torch.Tensor], int], torch.Tensor]

_DRAWS_PER_COUNT = 8  # 32-bit numbers that Philox 4x64 gives for one value of its counter


@dataclass(frozen=True)
class DenseOptions:
    """What the methods can be told; each says which of these it uses.

    Attributes:
        density: Share of a delta's elements that is kept, in (0, 1]; at least one element is.
        gamma: Share of a delta's elements, the largest ones, that `breadcrumbs` drops, in [0, 1).
        seed: What the random choice of `dare_linear` and `dare_ties` follows from.
    """

    density: float = 0.5
    gamma: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise _option_error("density", "a number above 0 and at most 1", self.density)
        if not 0 <= self.gamma < 1:
            raise _option_error("gamma", "a number from 0 to below 1", self.gamma)


def check_options(method: str, options: DenseOptions) -> None:
    """UserError if there is no such method here or the options do not fit it."""
    if method not in DENSE_METHODS:
        known = ", ".join(sorted(DENSE_METHODS))
        raise UserError.of(f"merge method {method!r}", expected=f"one of {known}", found=method, remedy="Choose one")
    # Shares given as decimals may add up to a little more than one.
    if method == "breadcrumbs" and options.density + options.gamma > 1 + 1e-9:
        raise UserError.of(
            "merge method 'breadcrumbs'",
            expected="density + gamma of at most 1",
            found=f"{options.density} + {options.gamma}",
            remedy="Lower one of them: what is kept and what is dropped as too large are shares of the same elements",
        )


def prepare(
    method: str, name: str, blocks: Blocks, branches: int, weights: Sequence[float], options: DenseOptions
) -> Combine:
    """Phase 1: reads a weight's deltas as often as the method needs and returns phase 2.

    Args:
        method: A name in `DENSE_METHODS`.
        name: The weight's name.
        blocks: `blocks(k)` gives branch k's delta, (rows, columns) in fp32 each; zeros where it has none.
        branches: K.
        weights: (K,) finite numbers, not all zero.
        options: See `DenseOptions`.

    Returns:
        What merges a block. It has no state: any order and any thread will do.

    Raises:
        UserError: If method and options do not fit, or a delta holds NaN or Inf (also raised by what is returned).
    """
    check_options(method, options)
    assert len(weights) == branches > 0, (branches, weights)
    assert any(weights), weights
    assert all(map(math.isfinite, weights)), weights
    merge = DENSE_METHODS[method](name, blocks, weights, options)

    def combine(deltas: Sequence[torch.Tensor], first_row: int) -> torch.Tensor:
        assert len(deltas) == branches, (len(deltas), branches)
        for branch, delta in enumerate(deltas):
            assert delta.dtype == torch.float32, delta.dtype
            require_finite(_delta_of(name, branch), delta)
        return merge(deltas, first_row)

    return combine


def ties(name: str, blocks: Blocks, weights: Sequence[float], options: DenseOptions) -> Combine:
    """Trim, elect sign, disjoint merge (TIES-Merging, arXiv 2306.01708, algorithm 1). Uses `density`.

    t_k keeps the round(density · n) largest of the n elements of ΔW_k by magnitude, at least one; the rest become zero.
    Then `elect_and_merge`. The paper keeps 0.2. With one branch and density 1 it is the linear merge.

    Arguments and what is returned are those of `prepare`.
    """
    limits_k = [[0.0]] * len(weights)
    if options.density < 1:
        limits_k = _limits(name, blocks, len(weights), lambda count: [_share(options.density, count)])

    def merge(deltas: Sequence[torch.Tensor], first_row: int) -> torch.Tensor:
        return elect_and_merge([trim(delta, *limits) for delta, limits in zip(deltas, limits_k, strict=True)], weights)

    return merge


def dare_linear(name: str, blocks: Blocks, weights: Sequence[float], options: DenseOptions) -> Combine:
    """Drop and rescale, then the weighted sum (DARE, arXiv 2311.03099). Uses `density` and `seed`.

    ΔW = Σ_k w_k · m_k ∘ ΔW_k / density, each element of m_k being 1 with probability density, else 0 (`kept`). Its
    expected value is the linear merge, which it is itself at density 1. The paper drops 0.9 of the elements and more.

    Arguments and what is returned are those of `prepare`.
    """

    def merge(deltas: Sequence[torch.Tensor], first_row: int) -> torch.Tensor:
        return weighted_sum(_drop(deltas, name, first_row, options), [weight / options.density for weight in weights])

    return merge


def dare_ties(name: str, blocks: Blocks, weights: Sequence[float], options: DenseOptions) -> Combine:
    """Drop and rescale as `dare_linear`, then `elect_and_merge` as `ties`. Uses `density` and `seed`.

    DARE before TIES-Merging (arXiv 2311.03099), the random choice in place of the trimming. An element that only one
    branch keeps is taken from it whole, so unlike `dare_linear` its expected value is not the linear merge.

    Arguments and what is returned are those of `prepare`.
    """

    def merge(deltas: Sequence[torch.Tensor], first_row: int) -> torch.Tensor:
        # One factor for all branches: it neither moves the election nor the shares, so it can come last.
        return elect_and_merge(_drop(deltas, name, first_row, options), weights).div_(options.density)

    return merge


def breadcrumbs(name: str, blocks: Blocks, weights: Sequence[float], options: DenseOptions) -> Combine:
    """Drop the largest and the smallest, then the weighted sum (Model Breadcrumbs, arXiv 2312.06795).

    ΔW = Σ_k w_k · m_k ∘ ΔW_k. Of the n elements of ΔW_k in order of magnitude, m_k drops the round(gamma · n) largest
    and keeps the next round(density · n), at least one; where rounding leaves too few for both, fewer of the largest
    are dropped. Uses `density` and `gamma`. At density 1 and gamma 0 it is the linear merge.

    Arguments and what is returned are those of `prepare`.
    """

    def ranks(count: int) -> list[int]:
        keep = _share(options.density, count)
        drop = min(round(options.gamma * count), count - keep)
        return [drop + keep, drop + 1]

    limits_k = [[0.0, math.inf]] * len(weights)
    if options.density < 1:
        limits_k = _limits(name, blocks, len(weights), ranks)

    def merge(deltas: Sequence[torch.Tensor], first_row: int) -> torch.Tensor:
        return weighted_sum([trim(delta, *limits) for delta, limits in zip(deltas, limits_k, strict=True)], weights)

    return merge


DENSE_METHODS: dict[str, Callable[[str, Blocks, Sequence[float], DenseOptions], Combine]] = {
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "breadcrumbs": breadcrumbs,
}


def trim(delta: torch.Tensor, lowest: float, highest: float = math.inf) -> torch.Tensor:
    """The delta where lowest ≤ |x| ≤ highest, zero elsewhere; elements exactly on a limit stay.

    So where several share the magnitude of a limit, more are kept than the density asks for.

    Args:
        delta: (rows, columns) in fp32.
        lowest: Magnitude; 0 keeps everything (zeros are no more kept than dropped: they take no part in an election).
        highest: Magnitude.

    Returns:
        A new tensor, or the delta itself where the limits leave all of it.
    """
    if lowest <= 0 and highest == math.inf:
        return delta
    magnitude = delta.abs()
    keep = magnitude >= lowest
    if highest < math.inf:
        keep &= magnitude <= highest
    return torch.mul(delta, keep, out=magnitude)


def kept(seed: int, name: str, branch: int, first_row: int, shape: tuple[int, int], density: float) -> torch.Tensor:
    """DARE's choice for a block: each element true with probability `density`, independently.

    It is a function of seed, name, branch and the element's place in the weight alone: not of the blocks, the threads
    or the order. The stream is Philox 4x64 (Salmon et al., 2011) with these as its key and the place as its counter,
    which NumPy guarantees to stay as it is.

    Args:
        seed: Any integer.
        name: The weight's name.
        branch: From 0.
        first_row: The block's first row.
        shape: The block's (rows, columns).
        density: In (0, 1], used to within 2⁻³³.

    Returns:
        (rows, columns) of bool.
    """
    key = hashlib.blake2b(f"{seed} {branch} {name}".encode(), digest_size=16).digest()
    rows, columns = shape
    counter, skip = divmod(first_row * columns, _DRAWS_PER_COUNT)
    generator = np.random.Philox(key=int.from_bytes(key, "little"), counter=counter)
    draws = generator.random_raw((skip + rows * columns + 1) // 2).astype("<u8", copy=False).view("<u4")
    highest = max(1, round(density * 2**32)) - 1
    return torch.from_numpy(draws[skip : skip + rows * columns] <= np.uint32(highest)).view(rows, columns)


def weighted_sum(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ_k w_k · ΔW_k of K blocks (rows, columns); a new tensor."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total += delta * weight  # not add_(alpha=): that may fuse, and a block's last few elements differ from the rest
    return total


def elect_and_merge(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Elects a sign for each element, then averages the branches that have it (TIES, arXiv 2306.01708, steps 2 and 3).

    With γ = sign(Σ_k w_k t_k) and A the branches whose w_k t_k has the sign γ, element by element:
    ΔW = (Σ_k |w_k|) · Σ_{k∈A} w_k t_k / Σ_{k∈A} |w_k|.
    With weights 1/K it is the paper's disjoint mean; as a factor of all weights is a factor of the result, `scale`
    counts as in the linear merge. Zeros have no sign: they are not in A. Where the sum is exactly zero no sign wins and
    the result is zero, as it is where all are zero. A negative weight acts as a negated delta.

    Args:
        deltas: K trimmed blocks t_k, (rows, columns) in fp32.
        weights: (K,) numbers, not all zero.

    Returns:
        (rows, columns), a new tensor.
    """
    # Relative to the largest, equal weights are exactly one: what cancels then does so exactly.
    largest = max(abs(weight) for weight in weights)
    shares = [weight / largest for weight in weights]
    sign = weighted_sum(deltas, shares).sign_()
    total, agreeing = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, share in zip(deltas, shares, strict=True):
        part = torch.mul(delta, sign).mul_(share).clamp_(min=0)  # |w_k t_k| where the branch agrees, else zero
        total += part
        agreeing += part.sign_().mul_(abs(share))
    agreeing.masked_fill_(agreeing == 0, 1)
    return total.div_(agreeing).mul_(sign).mul_(math.fsum(map(abs, weights)))


def _drop(deltas: Sequence[torch.Tensor], name: str, first_row: int, options: DenseOptions) -> list[torch.Tensor]:
    """The blocks with what DARE drops at zero, not yet rescaled."""
    if options.density == 1:
        return list(deltas)
    size = (deltas[0].shape[0], deltas[0].shape[1])
    masks = (kept(options.seed, name, branch, first_row, size, options.density) for branch in range(len(deltas)))
    return [delta * mask.to(delta.device) for delta, mask in zip(deltas, masks, strict=True)]


def _limits(name: str, blocks: Blocks, branches: int, ranks: Callable[[int], Sequence[int]]) -> list[list[float]]:
    """The magnitudes at these ranks in each branch's delta."""
    return [magnitudes_at(_delta_of(name, k), functools.partial(blocks, k), ranks) for k in range(branches)]


def _delta_of(name: str, branch: int) -> str:
    return f"the delta of {name!r} in branch {branch + 1}"


def _share(density: float, count: int) -> int:
    """How many of `count` elements are kept: never none, however small the tensor."""
    return max(1, round(density * count))


def _option_error(option: str, expected: str, found: float) -> UserError:
    return UserError.of(f"merge option {option!r}", expected=expected, found=str(found), remedy="Change it")
