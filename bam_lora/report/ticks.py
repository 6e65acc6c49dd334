"""Where an axis begins and ends, and what stands on it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high], at most `most` of them.

    Args:
        low: The smaller end.
        high: The larger end, above `low`.
        most: At least 2.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0, 50.0):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [index * step for index in range(first, last + 1)]
    raise AssertionError(f"no ticks for {low} .. {high}")


def tick_texts(values: Sequence[float]) -> list[str]:
    """All ticks with the same number of decimals, as many as their step needs."""
    if not values:
        return []
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    digits = next((d for d in range(9) if abs(round(step, d) - step) < 1e-6 * step), 9)
    return [f"{value + 0.0:.{digits}f}".replace("-", "−") for value in (round(v, digits) or 0.0 for v in values)]


def padded(values: list[float]) -> tuple[float, float]:
    """The range of the values with some air; a single value gets a tenth of its size on either side."""
    low, high = min(values), max(values)
    air = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    return low - air, high + air
