"""Quantiles of the t distribution against printed tables and closed forms."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_lora.report.student import t_quantile

# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: critical values of Student's t distribution.
PRINTED = [
    (0.90, 1, 3.078), (0.95, 1, 6.314), (0.975, 1, 12.706), (0.99, 1, 31.821), (0.995, 1, 63.657),
    (0.90, 2, 1.886), (0.975, 2, 4.303), (0.995, 2, 9.925),
    (0.975, 3, 3.182), (0.975, 4, 2.776), (0.995, 4, 4.604), (0.975, 5, 2.571), (0.975, 9, 2.262),
    (0.95, 10, 1.812), (0.975, 10, 2.228), (0.995, 10, 3.169), (0.975, 20, 2.086), (0.975, 30, 2.042),
    (0.90, 60, 1.296), (0.975, 60, 2.000), (0.995, 60, 2.660), (0.975, 100, 1.984),
]  # fmt: skip


@pytest.mark.parametrize(("probability", "degrees", "printed"), PRINTED)
def test_printed_values(probability: float, degrees: int, printed: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(printed, abs=5.1e-4)


@given(st.floats(0.001, 0.999))
def test_closed_forms_of_one_and_two_degrees(probability: float) -> None:
    assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-9, abs=1e-12)
    closed = (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    assert t_quantile(probability, 2) == pytest.approx(closed, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("degrees", [10_000, 1_000_000, 100_000_000])
def test_many_degrees_come_to_the_normal_distribution(degrees: int) -> None:
    normal = statistics.NormalDist().inv_cdf(0.975)
    # Cornish-Fisher: the next term is of the order of 1/ν².
    expected = normal + (normal**3 + normal) / (4 * degrees)
    assert t_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-7)


@given(st.floats(0.01, 0.99), st.integers(1, 500))
def test_symmetry_and_order(probability: float, degrees: int) -> None:
    value = t_quantile(probability, degrees)
    assert t_quantile(1 - probability, degrees) == pytest.approx(-value, rel=1e-9, abs=1e-12)
    assert abs(t_quantile(probability, degrees + 1)) <= abs(value) * (1 + 1e-12)
