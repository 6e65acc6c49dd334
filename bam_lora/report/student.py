"""Student's t distribution, as far as an interval for a mean needs it.

scipy has it, but nothing this package requires brings scipy along.
"""

from __future__ import annotations

import math

# Lentz's method keeps its quotients away from zero with this.
_TINY = 1e-300
_PRECISION = 1e-15
# The continued fraction needs about the square root of the degrees of freedom: enough for 10^10 of them.
_MOST_TERMS = 100_000


def t_quantile(probability: float, degrees: int) -> float:
    """The value that a t-distributed variable stays below with the given probability.

    Args:
        probability: Above 0 and below 1; 0.975 for a two-sided 95 % interval.
        degrees: Degrees of freedom, 1 or more.

    Returns:
        The quantile, by bisection to the last bits of a float.
    """
    assert 0 < probability < 1, "a quantile needs a probability between 0 and 1"
    assert degrees >= 1, "a t distribution needs a degree of freedom"
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    tail = 1 - probability
    low, high = 0.0, 1.0
    while _upper_tail(high, degrees) > tail:
        low, high = high, 2 * high
    while high - low > 4 * math.ulp(high):
        middle = (low + high) / 2
        if _upper_tail(middle, degrees) > tail:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _upper_tail(t: float, degrees: int) -> float:
    """P(T > t) for t >= 0: half of I_x(ν/2, 1/2) at x = ν/(ν + t²) (Abramowitz & Stegun 26.5.27)."""
    square = t * t
    return _incomplete_beta(degrees / (degrees + square), square / (degrees + square), degrees / 2, 0.5) / 2


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b); `rest` is 1 - x, given apart so that no digits are lost."""
    if x == 0 or rest == 0:
        return float(rest == 0)
    # The fraction converges fast on one side of the mean; the other side follows from I_x(a, b) = 1 - I_{1-x}(b, a).
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(rest, x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    return math.exp(logarithm) / (a * _fraction(x, a, b))


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction 1 + d1/(1 + d2/(1 + ...)) of Abramowitz & Stegun 26.5.8, by Lentz's method."""
    value, upper, lower = 1.0, 1.0, 0.0
    for term in range(1, _MOST_TERMS):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1 / (1 + d * lower or _TINY)
        upper = 1 + d / upper or _TINY
        value *= upper * lower
        if abs(upper * lower - 1) < _PRECISION:
            return value
    raise AssertionError(f"the continued fraction did not converge at x={x}, a={a}, b={b}")
