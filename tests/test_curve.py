"""Curves of measured models with known answers, and properties of the lower envelope of any."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_lora.report.curve import Curve, Point, lower_envelope
from bam_lora.report.noise import blended

BASE = Point(4.0, 1.0)
# Target 3, 2, 1.5 and source 1.1, 1.4, 2.0: bent, as a shrink curve is.
SHRUNK = Curve("single", (BASE, Point(3.0, 1.1), Point(2.0, 1.4), Point(1.5, 2.0)))


def source_at(curves: list[Curve], target: float, source: float = 9.0) -> float | None:
    match = lower_envelope(curves, target, source)
    return None if match is None else match.source


def only(points: list[tuple[float, float]], run: str = "run") -> Curve:
    return Curve(run, tuple(Point(*point) for point in points))


@pytest.mark.parametrize(
    ("target", "expected"), [(3.5, 1.05), (3.0, 1.1), (2.75, 1.175), (2.0, 1.4), (1.75, 1.7), (1.5, 2.0), (4.0, 1.0)]
)
def test_scores_between_two_neighbours_are_linear_in_the_target_score(target: float, expected: float) -> None:
    # A source score below every point: nothing dominates, so the curve alone answers.
    assert source_at([SHRUNK], target, source=0.5) == pytest.approx(expected, rel=1e-12)


def test_nothing_is_extrapolated() -> None:
    assert source_at([SHRUNK], 1.49) is None
    assert source_at([SHRUNK], 4.01, source=0.9) is None
    assert source_at([only([(2.0, 1.4)])], 1.99) is None


def test_points_of_different_curves_are_never_joined() -> None:
    apart = [only([(3.0, 1.1)], "a"), only([(2.0, 1.4)], "b")]
    assert source_at(apart, 2.5, source=1.3) is None


def test_a_point_that_is_better_in_both_counts_as_it_is() -> None:
    single = [only([(2.0, 1.4)])]
    assert source_at(single, 2.5, source=1.5) == 1.4
    assert source_at(single, 2.5, source=1.4) == 1.4
    assert source_at(single, 2.5, source=1.39) is None
    # At just the same target score it is a match, better or worse.
    assert source_at(single, 2.0, source=1.2) == 1.4


def test_domination_beats_the_chord_of_a_curve_that_lies_above_it() -> None:
    assert source_at([SHRUNK, only([(1.9, 1.12)], "other")], 2.0, source=1.3) == 1.12


def test_the_lowest_of_several_rivals_is_named() -> None:
    lower = only([(4.0, 1.0), (1.0, 1.6)], "lower")
    match = lower_envelope([SHRUNK, lower], 1.75, 9.0)
    assert match is not None
    assert (match.run, match.source) == ("lower", pytest.approx(1.45))
    match = lower_envelope([SHRUNK, lower], 3.5, 0.5)
    assert match is not None
    assert (match.run, match.source) == ("single", pytest.approx(1.05))


def test_a_curve_that_turns_back_gives_its_lowest_crossing() -> None:
    # Learns, unlearns and learns again; the target score 2.5 comes three times, at 1.15, 1.35 and 1.6.
    bent = only([(4.0, 1.0), (2.0, 1.2), (3.0, 1.5), (2.0, 1.7)])
    assert source_at([bent], 2.5, source=0.5) == pytest.approx(1.15)
    upright = only([(2.0, 1.4), (2.0, 1.3), (2.0, 1.5)])
    assert source_at([upright], 2.0, source=0.5) == 1.3


def test_the_slope_is_that_of_the_line_between_the_neighbours() -> None:
    match = lower_envelope([SHRUNK], 1.75, 0.5)
    assert match is not None
    assert match.slope == pytest.approx(-1.2)
    alone = lower_envelope([only([(2.0, 1.4)])], 2.0, 0.5)
    assert alone is not None
    assert alone.slope == 0.0


SCORE = st.floats(0.5, 5.0)
CURVES = st.lists(st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=6).map(only), max_size=5)


@given(CURVES, st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=6).map(only), SCORE, SCORE)
def test_another_rival_never_raises_the_envelope(
    curves: list[Curve], more: Curve, target: float, source: float
) -> None:
    before, after = source_at(curves, target, source), source_at([*curves, more], target, source)
    assert before is None or (after is not None and after <= before)
    assert source_at([more, *curves], target, source) == after


@given(CURVES, SCORE, SCORE)
def test_the_envelope_stays_within_what_was_measured(curves: list[Curve], target: float, source: float) -> None:
    match = lower_envelope(curves, target, source)
    if match is None:
        return
    low, high = sorted([match.left.source, match.right.source])
    assert low - 1e-12 <= match.source <= high + 1e-12
    assert 0 <= match.share <= 1
    measured = (1 - match.share) * match.left.target + match.share * match.right.target
    assert measured == pytest.approx(target, rel=1e-9) or (match.left is match.right and measured <= target)


def test_blended_scores_are_linear_document_by_document() -> None:
    def entry(bits: list[float]) -> list[dict[str, Any]]:
        documents = {"bits": bits, "bytes": [10, 30]}
        return [{"set": "a", "role": "source", "bits_per_byte": sum(bits) / 40, "stderr": 0.1, "documents": 2,
                 "bytes": 40, "per_document": documents}]  # fmt: skip

    (mixed,) = blended(entry([10.0, 60.0]), entry([20.0, 100.0]), 0.25)
    assert mixed["per_document"] == {"bits": [12.5, 70.0], "bytes": [10, 30]}
    assert mixed["bits_per_byte"] == pytest.approx(82.5 / 40)
    assert mixed["stderr"] is None
    without = entry([10.0, 60.0])
    del without[0]["per_document"]
    assert blended(entry([20.0, 100.0]), without, 0.25)[0]["per_document"] is None
