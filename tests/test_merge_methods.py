"""Merge methods against dense float64 references."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_helpers import delta, gaussian

from bam_lora.adapters import Factors
from bam_lora.errors import UserError
from bam_lora.merge import (
    METHODS,
    Coefficients,
    gram,
    linear,
    resolve_weights,
    stack,
)

SIZES = st.integers(1, 9)


@st.composite
def branches(draw: st.DrawFn) -> tuple[list[Factors | None], list[float]]:
    """A few deltas of one small weight, of any ranks, one of them perhaps missing."""
    rows, columns, count = draw(SIZES), draw(SIZES), draw(st.integers(1, 4))
    factors: list[Factors | None] = []
    for number in range(count):
        rank, seed = draw(st.integers(1, 5)), draw(st.integers(0, 999))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        A_ri = gaussian(rank, columns, seed=seed, dtype=dtype)
        B_or = gaussian(rows, rank, seed=seed + 1, dtype=dtype)
        scaling = draw(st.floats(0.1, 4))
        factors.append(None if number and draw(st.booleans()) else Factors(A_ri, B_or, scaling))
    return factors, draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))


def dense(factors: list[Factors | None], weights: list[float]) -> torch.Tensor:
    """Σ wₖ·ΔWₖ in float64."""
    parts = [
        weight * delta(factor.A_ri, factor.B_or, factor.scaling)
        for factor, weight in zip(factors, weights, strict=True)
        if factor is not None
    ]
    return torch.stack(parts).sum(0)


def product(stacked: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    assert stacked is not None
    assert stacked[0].dtype == stacked[1].dtype == torch.float32
    return stacked[0].double() @ stacked[1].double()


@settings(max_examples=200, deadline=None)
@given(branches())
def test_linear_is_the_weighted_sum(case: tuple[list[Factors | None], list[float]]) -> None:
    factors, weights = case
    got = product(stack(factors, linear(factors, weights)))
    pairs = zip(factors, weights, strict=True)
    # Against the size of the parts: the sum itself may cancel.
    size = sum(abs(w) * float(delta(f.A_ri, f.B_or, f.scaling).norm()) for f, w in pairs if f is not None)
    assert float((got - dense(factors, weights)).norm()) <= 1e-6 * size + 1e-30


@settings(max_examples=50, deadline=None)
@given(branches(), st.randoms(use_true_random=False))
def test_the_order_of_branches_does_not_matter(case: Any, random: Any) -> None:
    factors, weights = case
    order = random.sample(range(len(factors)), len(factors))
    one = product(stack(factors, linear(factors, weights)))
    other_factors, other_weights = [factors[i] for i in order], [weights[i] for i in order]
    other = product(stack(other_factors, linear(other_factors, other_weights)))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(SIZES, SIZES, st.integers(1, 5), st.integers(0, 999))
def test_weight_one_on_one_adapter_returns_it(rows: int, columns: int, rank: int, seed: int) -> None:
    factors = Factors(gaussian(rank, columns, seed=seed), gaussian(rows, rank, seed=seed + 1), 2.0)
    stacked = stack([factors, factors], linear([factors, factors], [1.0, 0.0]))
    assert stacked is not None
    assert torch.equal(stacked[0][:, :rank], factors.B_or * 2)
    assert torch.equal(stacked[1][:rank], factors.A_ri)
    assert not stacked[0][:, rank:].any()


def test_realistic_sizes_are_exact() -> None:
    factors = [
        Factors(gaussian(64, 2048, seed=k, scale=0.02), gaussian(5632, 64, seed=9 + k, scale=1e-3), 2.0) for k in (1, 2)
    ]
    weights = [0.3, 0.7]
    want = dense(list(factors), weights)
    got = product(stack(factors, linear(factors, weights)))
    assert float((got - want).norm() / want.norm()) < 1e-7
    assert abs(gram(*factors)) < 0.01 * gram(factors[0], factors[0])
    stacked = stack(factors, linear(factors, weights))
    assert stacked is not None
    merged = Factors(A_ri=stacked[1], B_or=stacked[0], scaling=1.0)
    assert math.isclose(math.sqrt(gram(merged, merged)), float(want.norm()), rel_tol=1e-7)


@settings(max_examples=50, deadline=None)
@given(branches())
def test_diagonal_block_and_matrix_coefficients(case: tuple[list[Factors | None], list[float]]) -> None:
    factors, _ = case
    present = [factor for factor in factors if factor is not None]
    B = torch.cat([f.scaling * f.B_or.double() for f in present], dim=1)
    A = torch.cat([f.A_ri.double() for f in present])
    M = gaussian(len(A), len(A), seed=5).double()
    blocks = [gaussian(len(f.A_ri), len(f.A_ri), seed=6 + place).double() for place, f in enumerate(present)]
    for coefficients, want in (
        (Coefficients("blocks", torch.cat([b.flatten() for b in blocks])), B @ torch.block_diag(*blocks) @ A),
        (Coefficients("matrix", M), B @ M @ A),
        (Coefficients("diagonal", M[0]), B @ torch.diag(M[0]) @ A),
    ):
        assert Coefficients.from_json(json.loads(json.dumps(coefficients.to_json()))) == coefficients
        error = float((product(stack(factors, coefficients)) - want).norm())
        size = M.abs() + torch.block_diag(*blocks).abs()
        assert error <= 1e-6 * float((B.abs() @ size @ A.abs()).norm())


def test_no_branch_changes_it() -> None:
    assert stack([None, None], Coefficients.scalar([0.5, 0.5])) is None


def test_coefficients_are_finite() -> None:
    with pytest.raises(UserError, match=r"scalar merge coefficients: expected finite numbers"):
        Coefficients.scalar([1.0, float("nan")])
    huge = Factors(torch.ones(1, 1), torch.full((1, 1), 3e38), 1.0)
    with pytest.raises(UserError, match=r"numbers within fp32, found an overflow"):
        stack([huge], Coefficients.scalar([10.0]))


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (("uniform", 4), [0.25] * 4),
        (("tokens", 2, [300, 100]), [0.75, 0.25]),
        (("tokens", 2, [300, 100], 2.0), [1.5, 0.5]),
        (([0.7, 0.6], 2), [0.7, 0.6]),  # as given, not normalised
        (([1.0, -0.5], 2, None, 0.5), [0.5, -0.25]),
        (([0.5, 0.3, 0.2], 2), [0.625, 0.375]),  # a short last group keeps the sum
        (([2.0, 1.0], 1), [3.0]),
        (([1], 1), [1.0]),
    ],
)
def test_weights(arguments: tuple[Any, ...], want: list[float]) -> None:
    assert resolve_weights(*arguments) == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("uniform", 0), "expected at least one branch, found 0"),
        (("best", 2), "uniform.*found 'best'"),
        (("tokens", 2), "expected the tokens of 2 branches"),
        (("tokens", 2, [0, 0]), "not all zero"),
        (("tokens", 2, [1, float("nan")]), "tokens of 2 branches"),
        (([1.0], 2), "expected 2 numbers, found 1"),
        (([0.0, 0.0], 2), "sum is not zero"),
        (([1.0, -1.0], 2), "sum is not zero"),
        (([1.0, -1.0, 5.0], 2), "first 2 do not sum to zero"),
        (([1.0, float("inf")], 2), "expected finite numbers"),
        (("uniform", 2, None, 0.0), "sum is not zero"),
        (("uniform", 2, None, float("nan")), "expected finite numbers"),
    ],
)
def test_weights_that_give_nothing(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError, match=f"merge weights: .*{words}.*Change the weights"):
        resolve_weights(*arguments)


def dense_slerp(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """Along the arc, by rotating the first direction in the plane of both: another way than the formula's."""
    start, end = first / first.norm(), second / second.norm()
    across = end - (end * start).sum() * start
    across /= across.norm()
    angle = torch.atan2((end * across).sum(), (end * start).sum())
    norm = (1 - share) * first.norm() + share * second.norm()
    return norm * (torch.cos(share * angle) * start + torch.sin(share * angle) * across)


def two(seed: int, rows: int = 40, columns: int = 24) -> tuple[list[Factors | None], list[torch.Tensor]]:
    factors = [
        Factors(gaussian(5, columns, seed=seed + k), gaussian(rows, 5, seed=seed + 7 + k), 1.5 + k) for k in (0, 1)
    ]
    return list(factors), [delta(f.A_ri, f.B_or, f.scaling) for f in factors]


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [1.0, 0.0], [1.0, 0.5]])
def test_slerp_is_the_arc(weights: list[float]) -> None:
    factors, (first, second) = two(3)
    want = sum(weights) * dense_slerp(first, second, weights[1] / sum(weights))
    torch.testing.assert_close(product(stack(factors, METHODS["slerp"](factors, weights))), want, rtol=1e-6, atol=1e-6)


def test_slerp_takes_two() -> None:
    factors = [Factors(gaussian(2, 3, seed=k), gaussian(3, 2, seed=k), 1.0) for k in range(3)]
    with pytest.raises(UserError, match="'slerp': expected two branches, found 3"):
        METHODS["slerp"](factors, [1 / 3] * 3)
    assert METHODS["slerp"](factors[:1], [0.5]) == Coefficients.scalar([0.5])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(0, 999))
def test_karcher_is_where_the_pulls_are_in_balance(count: int, seed: int) -> None:
    """On the dense unit sphere: at the mean, the sum of the weighted directions to the deltas along it is zero."""
    factors = [Factors(gaussian(4, 20, seed=seed + k), gaussian(30, 4, seed=seed + 50 + k), 2.0) for k in range(count)]
    weights = [(k + 1) / sum(range(1, count + 1)) for k in range(count)]
    deltas = [delta(f.A_ri, f.B_or, f.scaling).flatten() for f in factors]
    merged = product(stack(list(factors), METHODS["karcher"](factors, weights))).flatten()
    norm = sum(w * float(d.norm()) for w, d in zip(weights, deltas, strict=True))
    assert float(merged.norm()) == pytest.approx(norm, rel=1e-6)
    mean = merged / merged.norm()
    pull = torch.zeros_like(mean)
    for weight, one in zip(weights, deltas, strict=True):
        unit = one / one.norm()
        along = (unit @ mean).clamp(-1, 1)
        pull += weight * along.acos() * (unit - along * mean) / (unit - along * mean).norm()
    assert float(pull.norm()) < 1e-5


@pytest.mark.parametrize("degrees", [0.1, 30, 120, 170])
def test_karcher_of_two_is_their_slerp_and_is_not_longer_than_they_are(degrees: float) -> None:
    A, B, across = gaussian(6, 30, seed=1), gaussian(25, 6, seed=2), gaussian(25, 6, seed=3)
    first, other = delta(A, B, 1.0), delta(A, across, 1.0)
    other -= (other * first).sum() / first.norm() ** 2 * first
    turned = (
        math.cos(math.radians(degrees)) * first / first.norm() + math.sin(math.radians(degrees)) * other / other.norm()
    )
    left, values, right = torch.linalg.svd(2.5 * turned)
    factors = [Factors(A, B, 1.0), Factors(right[:12].float(), (left[:, :12] * values[:12]).float(), 1.0)]
    merged = product(stack(list(factors), METHODS["slerp"](factors, [0.25, 0.75])))
    assert float(merged.norm()) == pytest.approx(0.25 * float(first.norm()) + 0.75 * 2.5, rel=1e-4)
    other_way = product(stack(list(factors), METHODS["karcher"](factors, [0.25, 0.75])))
    torch.testing.assert_close(other_way, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("common", [0.0, 1.0, -0.6])
def test_model_stock_is_its_formula(common: float) -> None:
    A, B = gaussian(6, 30, seed=1), gaussian(25, 6, seed=2)
    parts = [gaussian(25, 6, seed=3 + k) for k in range(3)]
    factors = [Factors(A, common * B + (part if common >= 0 else part - sum(parts) / 2), 0.5) for part in parts]
    deltas = [delta(f.A_ri, f.B_or, f.scaling).flatten() for f in factors]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosine = sum(float(torch.cosine_similarity(deltas[i], deltas[j], dim=0)) for i, j in pairs) / 3
    share = 3 * cosine / (1 + 2 * cosine) if cosine > 0 else 0.0
    got = product(stack(list(factors), METHODS["model_stock"](factors, [1 / 3] * 3))).flatten()
    want = share * torch.stack(deltas).mean(0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["slerp", "karcher", "model_stock"])
def test_where_a_method_is_not_defined_it_is_linear(name: str) -> None:
    one = Factors(gaussian(3, 8, seed=1), gaussian(9, 3, seed=2), 1.0)
    opposite = Factors(one.A_ri, -one.B_or, 1.0)
    zero = Factors(one.A_ri, torch.zeros(9, 3), 1.0)
    cases: list[list[Factors | None]] = [[one, None], [None, None], [one, zero]]
    for factors in [*cases, *([] if name == "model_stock" else [[one, opposite]])]:
        assert METHODS[name](factors, [0.5, 0.5]) == Coefficients.scalar([0.5, 0.5])
    assert METHODS[name]([one, one], [0.5, 0.5]).values.sum() == pytest.approx(1.0)
    if name == "model_stock":
        assert METHODS[name]([one, opposite], [0.5, 0.5]) == Coefficients.scalar([0.0, 0.0])


@settings(max_examples=60, deadline=None)
@given(branches(), st.sampled_from(["slerp", "karcher", "model_stock"]), st.randoms(use_true_random=False))
def test_methods_do_not_mind_the_order_and_stay_finite(case: Any, name: str, random: Any) -> None:
    factors, weights = case[0][:2], [0.1 + abs(weight) for weight in case[1][:2]]
    order = random.sample(range(len(factors)), len(factors))
    one = METHODS[name](factors, weights).values
    other = METHODS[name]([factors[i] for i in order], [weights[i] for i in order]).values
    torch.testing.assert_close(other, one[order], rtol=1e-6, atol=1e-9)
