"""TIES, DARE and Breadcrumbs against dense float64 references, PEFT and what can be computed by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from dense_reference import NAME, Large, linear, merge, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_helpers import gaussian
from peft.utils.merge_utils import ties as peft_ties

from bam_lora.dense_methods import DENSE_METHODS, DenseOptions, check_options, elect_and_merge, prepare, trim
from bam_lora.errors import UserError


@pytest.fixture(scope="module")
def large() -> Large:
    factors = [(gaussian(2048, 16, seed=k), gaussian(16, 1024, seed=10 + k, scale=0.01)) for k in range(3)]
    exact = [(B_or.double() @ A_ri.double()).numpy() for B_or, A_ri in factors]
    deltas = [B_or @ A_ri for B_or, A_ri in factors]
    return Large(deltas, exact, [np.sort(np.abs(delta), axis=None)[::-1] for delta in exact])


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, -0.2, 0.4]], ids=["uniform", "explicit"])
@pytest.mark.parametrize("method", sorted(DENSE_METHODS))
def test_methods_agree_with_a_float64_reference(method: str, weights: list[float], large: Large) -> None:
    options = DenseOptions(density=0.3, gamma=0.02, seed=7)
    got = merge(method, large.deltas[: len(weights)], weights, height=500, density=0.3, gamma=0.02, seed=7)
    assert got.dtype == torch.float32
    wanted, unsure = reference(method, large, weights, options)
    assert unsure.mean() < 1e-4
    error = np.abs(got.double().numpy() - wanted)[~unsure]
    scale = np.abs(wanted)[~unsure]
    assert error.max() <= 1e-5 * math.sqrt(np.square(scale).mean())
    assert np.linalg.norm(error) <= 1e-6 * np.linalg.norm(scale)


@pytest.mark.parametrize("method", sorted(DENSE_METHODS))
def test_the_result_does_not_depend_on_the_blocks(method: str, large: Large) -> None:
    deltas, weights = [delta[:151, :129] for delta in large.deltas], [0.2, 0.5, 0.4]
    whole = merge(method, deltas, weights, density=0.4)
    for height in (1, 7, 64, 150):
        assert torch.equal(merge(method, deltas, weights, density=0.4, height=height), whole)


@pytest.mark.parametrize("count", [2, 3])
def test_uniform_ties_are_those_of_peft(count: int, large: Large) -> None:
    """PEFT elects without weights and divides by the count of branches: with equal weights it is the paper."""
    deltas = [delta[:256] for delta in large.deltas[:count]]
    wanted = peft_ties(deltas, torch.ones(count), density=0.25, majority_sign_method="total")
    torch.testing.assert_close(merge("ties", deltas, [1 / count] * count, density=0.25), wanted, rtol=1e-5, atol=0)


def test_ties_by_frequency_of_peft_agree_where_branches_do(large: Large) -> None:
    deltas = [delta[:256] for delta in large.deltas]
    wanted = peft_ties(deltas, torch.ones(3), density=0.25, majority_sign_method="frequency")
    got = merge("ties", deltas, [1 / 3] * 3, density=0.25)
    trimmed = torch.stack([merge("ties", [delta], [1.0], density=0.25) for delta in deltas]).sign()
    agreed = trimmed.sum(0).abs() == trimmed.abs().sum(0)
    assert 0.5 < float(agreed.float().mean()) < 1
    torch.testing.assert_close(got[agreed], wanted[agreed], rtol=1e-5, atol=0)
    assert not torch.allclose(got, wanted, rtol=1e-3)  # one large against two small: the paper follows the large one


# ---- what can be computed by hand


def test_ties_by_hand() -> None:
    first = torch.tensor([[4.0, -3.0, 2.0, 0.5, 0.0, 1.0]])
    second = torch.tensor([[2.0, 5.0, -2.0, 0.1, 0.0, -8.0]])
    got = merge("ties", [first, second], [0.5, 0.5], density=4 / 6)
    # the first keeps 4, -3, 2, 1; the second 2, 5, -2, -8. Third element: a tie of signs.
    torch.testing.assert_close(got, torch.tensor([[3.0, 5.0, 0.0, 0.0, 0.0, -8.0]]))
    twice = merge("ties", [first, second], [1.0, 1.0], density=4 / 6)
    torch.testing.assert_close(twice, 2 * got)
    # 3 to 1 the sign of the second element changes, and the first's mean is (3·4 + 2)/4
    weighted = merge("ties", [first, second], [0.75, 0.25], density=4 / 6)
    torch.testing.assert_close(weighted, torch.tensor([[3.5, -3.0, 2.0, 0.0, 0.0, -8.0]]))


def test_breadcrumbs_by_hand() -> None:
    delta = torch.tensor([[1.0, -9.0, 3.0, 0.0, -4.0, 2.0, 8.0, 5.0, 6.0, 7.0]])
    got = merge("breadcrumbs", [delta], [2.0], density=0.5, gamma=0.2)
    assert got.tolist() == [[0, 0, 6, 0, -8, 0, 0, 10, 12, 14]]
    nothing_dropped = merge("breadcrumbs", [delta], [1.0], density=0.2, gamma=0.0)
    assert nothing_dropped.tolist() == [[0, -9, 0, 0, 0, 0, 8, 0, 0, 0]]


def test_a_zero_delta_leaves_the_others(large: Large) -> None:
    """A branch without the weight: no NaN, and TIES takes the others' mean whole."""
    delta = large.deltas[0][:64, :64]
    zero = torch.zeros_like(delta)
    for method in DENSE_METHODS:
        alone = merge(method, [delta], [1.0], density=0.5)
        both = merge(method, [delta, zero], [0.5, 0.5], density=0.5)
        assert torch.equal(both, alone if method.endswith("ties") else alone / 2)
        assert torch.count_nonzero(merge(method, [zero, zero], [0.5, 0.5], density=0.5)) == 0


def test_zeros_are_not_kept_and_equal_magnitudes_all_are() -> None:
    delta = torch.tensor([[0.0, 0.0, 0.0, 1.0, -1.0, 1.0]])
    assert torch.equal(merge("ties", [delta], [1.0], density=0.2), delta)  # one of six, and three have its magnitude
    assert torch.equal(merge("breadcrumbs", [delta], [1.0], density=0.2, gamma=0.4), delta)
    assert torch.equal(merge("ties", [delta], [1.0], density=0.9), delta)  # the threshold is zero
    # the zeros of one branch do not count against the other's sign
    assert torch.equal(
        merge("ties", [delta, torch.full((1, 6), 0.5)], [0.5, 0.5], density=0.9)[0, :3], torch.full((3,), 0.5)
    )


@pytest.mark.parametrize("method", sorted(DENSE_METHODS))
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1)])
def test_tiny_tensors(method: str, size: tuple[int, int]) -> None:
    deltas = [gaussian(*size, seed=1), gaussian(*size, seed=2)]
    for density, gamma in ((1e-9, 0.0), (0.1, 0.1), (0.34, 0.6), (1.0, 0.0)):
        got = merge(method, deltas, [0.5, 0.5], density=density, gamma=gamma)
        assert got.shape == size
        assert bool(got.isfinite().all())
        if method in ("ties", "breadcrumbs"):  # never rounded down to nothing
            assert torch.count_nonzero(got) >= 1


def test_very_small_and_very_large_numbers() -> None:
    """A sign election must not multiply two deltas: 1e-30 squared is zero in fp32."""
    small = torch.tensor([[1e-30, 1e-30, -3e-30, 2e-38]])
    got = elect_and_merge([small, small * torch.tensor([1.0, -0.5, 1.0, 1.0])], [0.5, 0.5])
    torch.testing.assert_close(got, torch.tensor([[1e-30, 1e-30, -3e-30, 2e-38]]), rtol=1e-6, atol=0)
    large = torch.tensor([[1e38, -1e38]])
    torch.testing.assert_close(elect_and_merge([large, large], [0.5, 0.5]), large)


def test_equal_weights_tie_exactly() -> None:
    """Thirds are not exact in binary, yet what cancels under equal weights cancels."""
    deltas = [torch.tensor([[value, -value]]) for value in (1.0, 6.0, -7.0)]
    assert torch.count_nonzero(sum(delta * (1 / 3) for delta in deltas)) == 2  # type: ignore[arg-type]
    assert elect_and_merge(deltas, [1 / 3] * 3).tolist() == [[0.0, 0.0]]


# ---- properties

NUMBERS = st.integers(-64, 64).map(lambda value: value / 8)


@st.composite
def small_deltas(draw: st.DrawFn) -> list[torch.Tensor]:
    rows, columns, count = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = rows * columns
    return [
        torch.tensor(draw(st.lists(NUMBERS, min_size=size, max_size=size)), dtype=torch.float32).view(rows, columns)
        for _ in range(count)
    ]


DENSITIES = st.floats(0.01, 1)
WEIGHTS = st.floats(0.125, 2).flatmap(lambda value: st.sampled_from([value, -value]))


@settings(max_examples=40, deadline=None)
@given(small_deltas(), st.data())
def test_everything_kept_is_the_linear_merge(deltas: list[torch.Tensor], data: st.DataObject) -> None:
    weights = data.draw(st.lists(WEIGHTS, min_size=len(deltas), max_size=len(deltas)))
    for method in ("dare_linear", "breadcrumbs"):
        got = merge(method, deltas, weights, density=1.0, gamma=0.0, height=2)
        torch.testing.assert_close(got.double(), linear(deltas, weights), rtol=1e-5, atol=1e-5)
    for method in ("ties", "dare_ties"):
        got = merge(method, deltas[:1], weights[:1], density=1.0)
        torch.testing.assert_close(got.double(), linear(deltas[:1], weights[:1]), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(small_deltas(), DENSITIES, st.randoms(use_true_random=False))
def test_ties_do_not_depend_on_the_order_of_branches(
    deltas: list[torch.Tensor], density: float, random: object
) -> None:
    """Eighths add up exactly, so under equal weights there is not even a last bit to differ."""
    order = list(range(len(deltas)))
    random.shuffle(order)  # type: ignore[attr-defined]
    weights = [1 / len(deltas)] * len(deltas)
    got = merge("ties", [deltas[k] for k in order], weights, density=density)
    assert torch.equal(got, merge("ties", deltas, weights, density=density))


@settings(max_examples=40, deadline=None)
@given(small_deltas(), DENSITIES, st.data())
def test_ties_keep_within_the_branches(deltas: list[torch.Tensor], density: float, data: st.DataObject) -> None:
    """Negating all negates the result; weights of sum one give a mean: it lies between the branches' deltas."""
    weights = data.draw(st.lists(st.floats(0.125, 2), min_size=len(deltas), max_size=len(deltas)))
    weights = [weight / sum(weights) for weight in weights]
    got = merge("ties", deltas, weights, density=density)
    assert torch.equal(merge("ties", [-delta for delta in deltas], weights, density=density), -got)
    flipped = merge("ties", [-deltas[0], *deltas[1:]], [-weights[0], *weights[1:]], density=density)
    torch.testing.assert_close(flipped, got, rtol=1e-6, atol=0)
    stacked = torch.stack(deltas)
    assert bool((got <= stacked.amax(0).clamp(min=0) * (1 + 1e-6)).all())
    assert bool((got >= stacked.amin(0).clamp(max=0) * (1 + 1e-6)).all())


def test_trim_takes_the_limits_in() -> None:
    delta = torch.tensor([[-3.0, 2.0, -1.0, 0.0]])
    assert trim(delta, 2.0).tolist() == [[-3, 2, 0, 0]]
    assert trim(delta, 1.0, 2.0).tolist() == [[0, 2, -1, 0]]
    assert delta.tolist() == [[-3, 2, -1, 0]]


# ---- mistakes


def test_nothing_is_read_where_nothing_has_to_be_known() -> None:
    def blocks(branch: int) -> Iterator[torch.Tensor]:
        raise AssertionError("read")

    for method in DENSE_METHODS:
        prepare(method, NAME, blocks, 2, [0.5, 0.5], DenseOptions(density=1.0, gamma=0.0))
    prepare("dare_ties", NAME, blocks, 2, [0.5, 0.5], DenseOptions())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", sorted(DENSE_METHODS))
def test_a_delta_that_is_not_finite_is_named(method: str, bad: float) -> None:
    deltas = [torch.ones(4, 4), torch.ones(4, 4)]
    deltas[1][2, 3] = bad
    words = re.escape(f"the delta of {NAME!r} in branch 2: expected finite numbers, found NaN or Inf")
    if method in ("ties", "breadcrumbs"):  # they read it to find their thresholds
        with pytest.raises(UserError, match=words):
            prepare(method, NAME, lambda k: [deltas[k]], 2, [0.5, 0.5], DenseOptions())
    combine = prepare(method, NAME, lambda k: [torch.ones(4, 4)], 2, [0.5, 0.5], DenseOptions())
    with pytest.raises(UserError, match=words):
        combine(deltas, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.0}, "merge option 'density': expected a number above 0 and at most 1, found 0.0"),
        ({"density": 1.5}, "found 1.5"),
        ({"density": math.nan}, "found nan"),
        ({"gamma": -0.1}, "merge option 'gamma': expected a number from 0 to below 1, found -0.1"),
        ({"gamma": 1.0}, "found 1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        DenseOptions(**options)  # type: ignore[arg-type]


def test_options_that_do_not_fit_the_method() -> None:
    with pytest.raises(UserError, match=re.escape("density + gamma of at most 1, found 0.9 + 0.2")):
        check_options("breadcrumbs", DenseOptions(density=0.9, gamma=0.2))
    check_options("ties", DenseOptions(density=0.9, gamma=0.2))
    check_options("breadcrumbs", DenseOptions(density=0.7, gamma=0.3))
    with pytest.raises(
        UserError, match="merge method 'tie': expected one of breadcrumbs, dare_linear, dare_ties, ties"
    ):
        check_options("tie", DenseOptions())
