"""The branches' weights in an average: from what a recipe says to one number a branch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bam_lora.errors import UserError


def _weight_error(expected: str, found: str) -> UserError:
    return UserError.of("merge weights", expected=expected, found=found, remedy="Change the weights")


def resolve_weights(
    weights: str | Sequence[float], branches: int, tokens: Sequence[float] | None = None, scale: float = 1.0
) -> list[float]:
    """Turns a recipe's weights into one number per branch.

    Args:
        weights: "uniform" (1/K each; also what "learned" and "search" start from), "tokens" (proportional to the
            tokens trained on, sum 1), or numbers that are used as they are; of a longer list (a short last group) the
            first K, rescaled to keep the list's sum.
        branches: K.
        tokens: Tokens per branch, for "tokens".
        scale: Multiplies all of them.

    Returns:
        (K,) finite numbers whose sum is not zero.

    Raises:
        UserError: If the weights do not fit or give nothing.
    """
    if branches < 1:
        raise _weight_error("at least one branch", f"{branches}")
    if weights in ("uniform", "learned", "search"):
        values = [1.0 / branches] * branches
    elif weights == "tokens":
        values = _token_weights(branches, tokens)
    elif isinstance(weights, str):
        raise _weight_error('"uniform", "tokens" or a list of numbers', repr(weights))
    else:
        values = _listed_weights(_numbers(weights), branches)
    values = [value * float(scale) for value in values]
    if not all(math.isfinite(value) for value in values):
        raise _weight_error("finite numbers", f"{values}")
    if math.fsum(values) == 0:
        raise _weight_error("numbers whose sum is not zero", f"{values}")
    return values


def _token_weights(branches: int, tokens: Sequence[float] | None) -> list[float]:
    counts = list(tokens or [])
    if len(counts) != branches or not all(math.isfinite(c) and c >= 0 for c in counts) or sum(counts) == 0:
        raise _weight_error(f"the tokens of {branches} branches, not all zero", f"{counts}")
    return [count / sum(counts) for count in counts]


def _numbers(weights: Sequence[float]) -> list[float]:
    try:
        return [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise _weight_error("numbers", repr(weights)[:80]) from None


def _listed_weights(values: list[float], branches: int) -> list[float]:
    if len(values) < branches:
        raise _weight_error(f"{branches} numbers", f"{len(values)}")
    if not all(math.isfinite(value) for value in values):
        raise _weight_error("finite numbers", f"{values}")
    if len(values) == branches:
        return values
    first = values[:branches]
    if math.fsum(first) == 0:
        raise _weight_error(f"numbers of which the first {branches} do not sum to zero", f"{values}")
    return [value * (math.fsum(values) / math.fsum(first)) for value in first]
