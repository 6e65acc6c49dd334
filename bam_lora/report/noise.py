"""How far a difference between two models may be chance: its standard error over documents.

Two models read the same documents, and a hard document is hard for both. Where the evaluations hold the bits of every
document ("per_document": {"bits": [..], "bytes": [..]}), the error is that of the differences document by document;
else the two scores count as independent, which makes the error larger than it is, several times for close models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# A difference below this many standard errors is called noise, or a tie.
NOISE_FACTOR = 2.0


def pooled(scores: Iterable[Mapping[str, Any]], role: str) -> tuple[float | None, float | None]:
    """Bits per byte of all sets of one role together, as if they were one text.

    Args:
        scores: Score entries of one model.
        role: "target" or "source".

    Returns:
        (bits per byte, its standard error); None where nothing was measured, or a set has no standard error.
    """
    chosen = [score for score in scores if score["role"] == role]
    total = sum(score["bytes"] for score in chosen)
    if total == 0:
        return None, None
    value = sum(score["bits_per_byte"] * score["bytes"] for score in chosen) / total
    errors = [score.get("stderr") for score in chosen]
    if any(error is None for error in errors):
        return value, None
    # Sets are different documents, so their errors are independent.
    return value, math.hypot(*(error * score["bytes"] for error, score in zip(errors, chosen, strict=True))) / total


def difference_error(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], role: str
) -> tuple[float | None, bool]:
    """The standard error of the difference of two models' pooled scores.

    Args:
        first: Score entries of one model.
        second: Those of the other.
        role: "target" or "source".

    Returns:
        (standard error in bits per byte or None, whether it was taken document by document).
    """
    paired = _paired(first, second, role)
    if paired is not None:
        return paired, True
    errors = [pooled(scores, role)[1] for scores in (first, second)]
    if errors[0] is None or errors[1] is None:
        return None, False
    return math.hypot(errors[0], errors[1]), False


def _paired(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], role: str) -> float | None:
    """Ratio estimator (Cochran, Sampling Techniques, 3rd ed., 6.4) of the differences, sets as strata.

    sqrt(Σ over sets n/(n-1) · Σ(dᵢ - D·bytesᵢ)²) / Σ bytes, dᵢ the difference in bits, D the set's in bits per byte.
    """
    ours, theirs = ({s["set"]: s for s in scores if s["role"] == role} for scores in (first, second))
    if not ours or ours.keys() != theirs.keys():
        return None
    variance, total = 0.0, 0
    for name, score in ours.items():
        a, b = score.get("per_document"), theirs[name].get("per_document")
        if a is None or b is None or a["bytes"] != b["bytes"] or len(a["bytes"]) < 2:
            return None
        count, size = len(a["bytes"]), sum(a["bytes"])
        differences = [x - y for x, y in zip(a["bits"], b["bits"], strict=True)]
        rate = sum(differences) / size
        squares = sum((d - rate * n) ** 2 for d, n in zip(differences, a["bytes"], strict=True))
        variance, total = variance + count / (count - 1) * squares, total + size
    return math.sqrt(variance) / total


def degrees_of_freedom(scores: Iterable[Mapping[str, Any]], role: str) -> int:
    """What a standard error over documents has: documents less sets."""
    return sum(score["documents"] - 1 for score in scores if score["role"] == role)


def blended(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], share: float
) -> list[dict[str, Any]]:
    """Score entries of the place between two models, every document's bits taken linearly between theirs.

    Args:
        first: Score entries of one model.
        second: Those of the other, on the same sets.
        share: 0 is the first model, 1 the second.

    Returns:
        Entries without a standard error of their own; without documents where one of the two has none.
    """
    others = {(score["set"], score["role"]): score for score in second}
    result = []
    for score in first:
        other = others[score["set"], score["role"]]
        a, b = score.get("per_document"), other.get("per_document")
        documents = None
        if a is not None and b is not None and a["bytes"] == b["bytes"]:
            bits = [(1 - share) * x + share * y for x, y in zip(a["bits"], b["bits"], strict=True)]
            documents = {"bits": bits, "bytes": a["bytes"]}
        value = (1 - share) * score["bits_per_byte"] + share * other["bits_per_byte"]
        result.append({**score, "bits_per_byte": value, "stderr": None, "per_document": documents})
    return result
