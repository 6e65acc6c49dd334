"""Which weights a search tries, and in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from bam_lora.merge_search import SearchSettings, _candidates

SCALES = (0.7, 0.85, 1.0, 1.2)
SETTINGS = SearchSettings(source_weight=1.0, scales=SCALES, evaluations=24, tokens=1, batch_tokens=1, dtype="float32")


def searched(
    start: Sequence[float], objective: Callable[[Sequence[float]], float], evaluations: int = 24, **changes: Any
) -> dict[tuple[float, ...], float]:
    """The candidates and their values, as many as may be scored."""
    values: dict[tuple[float, ...], float] = {}
    settings = replace(SETTINGS, evaluations=evaluations, **changes)
    for candidate in _candidates(start, settings, lambda weights: values[tuple(weights)]):
        if tuple(candidate) not in values:
            if len(values) == evaluations:
                break
            values[tuple(candidate)] = objective(candidate)
    return values


def bowl(best: Sequence[float]) -> Callable[[Sequence[float]], float]:
    return lambda weights: math.dist(weights, best)


def test_two_branches_are_tried_on_a_grid_from_the_start_outwards() -> None:
    tried = list(searched([0.5, 0.5], bowl([0, 0])))
    shares = (0, 0.25, 0.5, 0.75, 1)
    assert set(tried) == {(round(s * a, 6), round(s * (1 - a), 6)) for s in SCALES for a in shares}
    assert tried[0] == (0.5, 0.5)
    assert [weights[0] == weights[1] for weights in tried] == [True] * 4 + [False] * 16
    assert len(searched([0.5, 0.5], bowl([0, 0]), evaluations=9)) == 9
    assert max(math.fsum(weights) for weights in searched([1.0, 1.0], bowl([0, 0]))) == pytest.approx(2.4)


@pytest.mark.parametrize("best", [[0.1, 0.3, 0.4], [0.3, 0.2, 0.1, 0.1], [0.05, 0.6, 0.05, 0.2, 0.3]])
def test_more_branches_are_tried_one_after_the_other(best: list[float]) -> None:
    start = [1 / len(best)] * len(best)
    tried = searched(start, bowl(best), evaluations=60)
    found = min(tried, key=lambda weights: tried[weights])
    assert next(iter(tried)) == tuple(start)
    assert tried[found] < 0.4 * tried[tuple(start)]
    assert tried == searched(start, bowl(best), evaluations=60)
    assert searched(start, bowl(best)).items() <= tried.items()


def test_one_branch_is_only_scaled() -> None:
    assert set(searched([1.0], bowl([0.0]))) == {(scale,) for scale in SCALES}


TRIAL: dict[str, Any] = {"scales": (1.0, 0.75, 0.5, 0.25, 0.0), "shares": False}


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_without_shares_the_scales_alone_are_tried_down_to_nothing(branches: int) -> None:
    start = [1 / branches] * branches
    tried = list(searched(start, bowl([0.0] * branches), **TRIAL))
    assert tried == [pytest.approx([scale / branches] * branches, abs=1e-6) for scale in TRIAL["scales"]]
    assert replace(SETTINGS, **TRIAL).most(branches) == 5


def test_the_steps_from_nothing_are_none() -> None:
    tried = searched([1 / 3] * 3, bowl([0.0] * 3), scales=(1.0, 0.0))
    assert set(tried) == {(1 / 3,) * 3, (0.0,) * 3}
