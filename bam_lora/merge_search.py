"""Searched merge weights: one number a branch, by scoring a few candidates on a little text with the deltas added.

Coarser than learned weights (learned_weights.py) and without a gradient: every candidate is a forward pass over the
same windows, on the quantised base that the branches were trained on. The objective is theirs, target + μ · source bits
per byte, and so is the rule for what is held out: it decides between the best candidate and the plain average.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bam_lora.adapters import Factors
from bam_lora.directions import TrainableDelta
from bam_lora.errors import UserError
from bam_lora.learned_weights import CHECKING, Scoring, added_deltas, first_windows, fitting_tokens, score_roles
from bam_lora.selection import ROLES, SelectionWindows
from bam_lora.views import assert_not_repacked, branch_view

_FIRST_FACTOR = 2.0  # on one branch's share, in the search over coordinates
_LAST_FACTOR = 1.15  # smaller steps are within the noise of so little text


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Scoring):
    """What is tried: `scales` multiply the sum of the weights; at most so many `evaluations`, of the start one.

    `shares` says whether the branches' shares are tried too. `tokens` is about what all of it may cost, a forward pass
    alone counted as a third.
    """

    scales: Sequence[float]
    evaluations: int
    tokens: int
    shares: bool = True

    def most(self, branches: int) -> int:
        """How many candidates there can be."""
        alone = branches == 1 or not self.shares
        return min(self.evaluations, len({1.0, *self.scales})) if alone else self.evaluations


@dataclass(frozen=True)
class SearchedWeights:
    """What was found.

    `trials` are the candidates in the order they were scored, the plain average first: [{"weights", "target", "source",
    "objective"}] in bits per byte; `held_out` has the same of the plain average and of the best candidate, if that is
    another, on held-out text, which decides.
    """

    weights: list[float]
    trials: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    settings: SearchSettings

    def record(self) -> dict[str, Any]:
        """What `merge.json` keeps of it."""
        return {
            "source_weight": self.settings.source_weight,
            "weights": self.weights,
            "trials": self.trials,
            "held_out": self.held_out,
        }


def search_weights(
    model: Any,
    branches: Mapping[str, Sequence[Factors | None]],
    start: Sequence[float],
    selection: SelectionWindows,
    settings: SearchSettings,
    *,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> SearchedWeights:
    """Scores candidates and keeps the best one if it is better on the held-out windows too.

    Args:
        model: The frozen base that the branches were trained on; it is left as it was.
        branches: Factors of each branch by weight name; a name is that of a linear module, plus ".weight".
        start: (K,) the plain average's weights; their sum is what `scales` multiply.
        selection: Windows of both roles.
        settings: See there.
        on_step: Called with the evaluation that begins and the most there may be.

    Raises:
        UserError: If the score of a candidate is not finite.
    """
    most = settings.most(len(start))
    train, held_out, settings = _within_budget(settings, selection, most)
    settings = replace(settings, batch_tokens=fitting_tokens(model, settings.batch_tokens))
    view = branch_view(model)
    dtype = getattr(torch, settings.dtype)
    deltas = {name: TrainableDelta(factors, start, 1, dtype, model.device) for name, factors in branches.items()}
    trials: dict[tuple[float, ...], dict[str, Any]] = {}

    def score(weights: Sequence[float], text: Mapping[str, Any] = train) -> dict[str, Any]:
        for delta in deltas.values():
            delta.assign(weights)
        found = score_roles(view, text, settings)
        if not math.isfinite(found["objective"]):
            raise UserError.of(
                f"searching the merge weights, candidate {_shown(weights)}",
                expected="a finite score",
                found="NaN or infinity",
                remedy="Try smaller bam.merge.search.scales",
            )
        return {"weights": list(weights), **found}

    with added_deltas(view, deltas):
        for candidate in _candidates(start, settings, lambda weights: trials[tuple(weights)]["objective"]):
            if tuple(candidate) in trials:
                continue
            if len(trials) == most:
                break
            on_step(len(trials) + 1, most)
            trials[tuple(candidate)] = score(candidate)
        listed = list(trials.values())
        best = min(listed, key=lambda trial: trial["objective"])
        compared = [listed[0]] if best is listed[0] else [listed[0], best]
        checks = [score(trial["weights"], held_out) for trial in compared]
    assert_not_repacked(view)
    chosen = min(checks, key=lambda check: check["objective"])
    return SearchedWeights(chosen["weights"], listed, checks, settings)


def _shown(weights: Sequence[float]) -> str:
    return "/".join(f"{weight:g}" for weight in weights)


def _within_budget(
    settings: SearchSettings, selection: SelectionWindows, most: int
) -> tuple[dict[str, Any], dict[str, Any], SearchSettings]:
    """The windows to score `most` candidates on and those held out, so that all costs about `settings.tokens`."""
    tokens = settings.tokens * 3 / len(ROLES)
    train = {role: first_windows(windows, tokens * (1 - CHECKING) / most) for role, windows in selection.train.items()}
    held_out = {role: first_windows(windows, tokens * CHECKING / 2) for role, windows in selection.held_out.items()}
    longest = max(window.length for part in (*train.values(), *held_out.values()) for window in part)
    return train, held_out, SearchSettings(**{**vars(settings), "longest": longest})


def _candidates(
    start: Sequence[float], settings: SearchSettings, objective: Callable[[Sequence[float]], float]
) -> Iterator[list[float]]:
    """The start, then what to score next; each is scored (or was before) when the next one is asked for.

    Without shares the scales alone. Two branches: a grid of shares and scales, from the start outwards. Else the
    scales; then, from the best of them, steps along one branch's share after the other as long as they help, and
    smaller ones.
    """
    yield list(start)
    total = math.fsum(start)
    nearest = sorted(settings.scales, key=lambda scale: abs(math.log(scale)) if scale else math.inf)
    if len(start) == 2 and settings.shares:
        per_scale = settings.evaluations // len(settings.scales)
        count = max(3, (per_scale - 1) // 2 * 2 + 1)  # odd: equal shares are among them
        shares = sorted((place / (count - 1) for place in range(count)), key=lambda share: abs(share - 0.5))
        for share in shares:
            yield from (_weights([share, 1 - share], total * scale) for scale in nearest)
        return
    tried = [list(start), *(_weights(start, total * scale) for scale in nearest if scale != 1)]
    yield from tried
    if settings.shares:
        yield from _share_steps(min(tried, key=objective), objective)


def _share_steps(start: Sequence[float], objective: Callable[[Sequence[float]], float]) -> Iterator[list[float]]:
    best, factor, total = list(start), _FIRST_FACTOR, math.fsum(start)
    while len(start) > 1 and total and factor >= _LAST_FACTOR:
        before = best
        for branch, step in itertools.product(range(len(start)), (factor, 1 / factor)):
            shares = [weight * step if place == branch else weight for place, weight in enumerate(best)]
            candidate = _weights(shares, total)
            yield candidate
            if objective(candidate) < objective(best):
                best = candidate
        if best is before:
            factor = math.sqrt(factor)


def _weights(shares: Sequence[float], total: float) -> list[float]:
    """Weights in proportion to shares, rounded, so that a candidate reached on two ways is the same."""
    return [round(total * share / math.fsum(shares), 6) for share in shares]
