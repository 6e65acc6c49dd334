"""Curves of measured models in the plane of target and source score, and the lower envelope of several.

All scores are bits per byte, pooled over the sets of a role. Between two neighbouring points of one curve scores are
interpolated linearly in the target score; nothing is extrapolated, and points of different curves are never joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Point:
    """One measured model: pooled scores in bits per byte, and the score entries they come from."""

    target: float
    source: float
    scores: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Curve:
    """Models of one run whose neighbours may be interpolated, in order; a single point is a curve too."""

    run: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Match:
    """What a run has to set against a target score: a place between two of its points, or one point (twice).

    `share` is the place between them, 0 at `left` and 1 at `right`.
    """

    run: str
    left: Point
    right: Point
    share: float

    @property
    def source(self) -> float:
        """The source score there, in bits per byte."""
        return (1 - self.share) * self.left.source + self.share * self.right.source

    @property
    def slope(self) -> float:
        """By how much the source score changes when the target score does; 0 for a single point."""
        width = self.right.target - self.left.target
        return (self.right.source - self.left.source) / width if width else 0.0


def matches_at(curve: Curve, target: float) -> Iterator[Match]:
    """Every place where a curve has exactly this target score; a curve that turns back may have several."""
    for point in curve.points:
        if point.target == target:
            yield Match(curve.run, point, point, 0.0)
    for left, right in pairwise(curve.points):
        if min(left.target, right.target) < target < max(left.target, right.target):
            yield Match(curve.run, left, right, (target - left.target) / (right.target - left.target))


def dominating(curve: Curve, target: float, source: float) -> Iterator[Match]:
    """The curve's points that are at least as good in both scores: what they forget bounds the envelope from above."""
    for point in curve.points:
        if point.target <= target and point.source <= source:
            yield Match(curve.run, point, point, 0.0)


def lower_envelope(curves: Iterable[Curve], target: float, source: float) -> Match | None:
    """The best that any of the curves has to set against a model.

    Args:
        curves: Of the rivals.
        target: The model's target score, in bits per byte.
        source: Its source score.

    Returns:
        The match with the lowest source score (the first of equal ones), or None where no curve comes to that target
        score and no point is at least as good in both.
    """
    found = [match for curve in curves for match in (*matches_at(curve, target), *dominating(curve, target, source))]
    return min(found, key=lambda match: match.source, default=None)
