"""DARE's random choice: a function of seed, name, branch and place alone; fair and independent."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dense_reference import NAME, linear, merge
from numerics_helpers import gaussian

from bam_lora.dense_methods import DenseOptions, kept, prepare


def test_a_seed_gives_the_same_bytes_in_any_order_on_any_thread() -> None:
    deltas, weights, height = [gaussian(512, 96, seed=k) for k in range(3)], [0.3, 0.3, 0.4], 64
    for method in ("dare_linear", "dare_ties"):
        once = merge(method, deltas, weights, height=height, seed=3)
        combine = prepare(method, NAME, lambda branch: [], 3, weights, DenseOptions(seed=3))
        firsts = list(range(0, 512, height))[::-1]
        with ThreadPoolExecutor(4) as pool:
            parts = list(
                pool.map(
                    lambda first, combine=combine: combine([d[first : first + height] for d in deltas], first), firsts
                )
            )
        assert torch.equal(torch.cat(parts[::-1]), once)
        assert not torch.equal(merge(method, deltas, weights, height=height, seed=4), once)


FIRST_ROWS = [[0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 1]]


def test_the_choice_is_the_same_on_every_machine() -> None:
    """Fixed values: a replay of the ledger on another machine or version must make the same choice."""
    assert kept(0, NAME, 0, 0, (2, 8), 0.5).int().tolist() == FIRST_ROWS
    assert kept(0, NAME, 0, 1, (1, 8), 0.5).int().tolist() == FIRST_ROWS[1:]


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
def test_the_share_kept_and_its_independence(density: float) -> None:
    """Within three standard deviations; masks of another seed, name, branch or row agree as chance has it."""
    shape, count = (256, 333), 256 * 333
    places = [(0, NAME, 0, 0), (1, NAME, 0, 0), (0, "other", 0, 0), (0, NAME, 1, 0), (0, NAME, 0, 256)]
    masks = [kept(*place, shape, density).double() for place in places]
    deviation = math.sqrt(density * (1 - density) / count)
    for mask in masks:
        assert abs(float(mask.mean()) - density) <= 3 * deviation
    both = density * density
    for one, other in itertools.combinations(masks, 2):
        assert abs(float((one * other).mean()) - both) <= 4 * math.sqrt(both * (1 - both) / count)


def test_everything_is_kept_at_density_one() -> None:
    assert bool(kept(0, NAME, 0, 3, (50, 7), 1.0).all())


def test_dare_linear_expects_the_linear_merge() -> None:
    """Over 600 seeds every element's mean lies within five standard errors, and their squares are as chance has it."""
    deltas, weights, density, seeds = [gaussian(4, 16, seed=1), gaussian(4, 16, seed=2)], [0.7, 0.3], 0.25, 600
    mean = (
        torch.stack([merge("dare_linear", deltas, weights, density=density, seed=s) for s in range(seeds)])
        .double()
        .mean(0)
    )
    variance = sum((w * d.double()) ** 2 * (1 / density - 1) for w, d in zip(weights, deltas, strict=True)) / seeds
    normalised = (mean - linear(deltas, weights)) / variance.sqrt()
    assert float(normalised.abs().max()) < 5
    assert 0.5 < float(normalised.square().mean()) < 1.6


def test_dare_ties_take_an_element_that_one_branch_keeps_whole() -> None:
    one, other = torch.full((64, 64), 3.0), torch.full((64, 64), -2.0)
    got = merge("dare_ties", [one, other], [0.5, 0.5], density=0.5)
    mine, theirs = (kept(0, NAME, k, 0, (64, 64), 0.5) for k in range(2))
    wanted = torch.where(mine, 6.0, torch.where(theirs, -4.0, 0.0))
    assert torch.equal(got, wanted)
