"""The comparison that counts: does a run forget less than its rivals do *at the same target score*?

Every run gives curves of measured models. At the target score of a run's final model, the lower envelope of its rivals'
curves says how little one has to forget to learn so much by cheaper means. docs/measuring.md has the whole of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bam_lora.report.comparable import reasons_against
from bam_lora.report.curve import Match, Point, lower_envelope
from bam_lora.report.groups import group_names, grouped
from bam_lora.report.measured import Measured
from bam_lora.report.noise import blended, degrees_of_freedom, difference_error
from bam_lora.report.student import t_quantile

CONFIDENCE = 0.95
# Below this much forgetting on the envelope (bits per byte) a percentage of it would be one of noise.
LEAST_FORGETTING = 0.05
# Bits per byte: what sums of floats may be off by is no difference.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Outcome:
    """One run against the rivals of its seed: what it was matched with, or why with nothing."""

    run: Measured
    match: Match | None = None
    why: str = ""
    # Rivals were there, and none comes to the run's target score. That depends on how the run came out, so to leave
    # such a seed out of a mean would be to choose seeds by their result.
    unreached: bool = False
    notes: list[str] = field(default_factory=list)
    # Rivals that learned more and have nothing measured between base and final model.
    coarse: list[str] = field(default_factory=list)
    # The recipes it was set against.
    rivals: frozenset[str] = frozenset()

    @property
    def final(self) -> Point:
        """The final model of a run that was matched."""
        assert self.run.final is not None
        return self.run.final

    @property
    def difference(self) -> float:
        """The run's source score minus the envelope's, in bits per byte: below 0 the run forgets less."""
        assert self.match is not None
        return self.final.source - self.match.source


def envelope(runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """Sets every group of runs (one recipe, several seeds) against the lower envelope of all the others.

    Args:
        runs: All runs of a comparison.

    Returns:
        One entry a group, as `envelope` in compare.json; scores in bits per byte.
    """
    groups = grouped([run.report["recipe"] for run in runs])
    names = group_names([[runs[number].name for number in members] for members in groups])
    group_of = {runs[n].name: name for name, members in zip(names, groups, strict=True) for n in members}
    result = []
    for name, members in zip(names, groups, strict=True):
        rivals = [run for number, run in enumerate(runs) if number not in members]
        result.append(_entry(name, [runs[number] for number in members], rivals, group_of))
    return result


def _entry(
    name: str, members: Sequence[Measured], rivals: Sequence[Measured], group_of: Mapping[str, str]
) -> dict[str, Any]:
    one_a_seed = {run.seed: run for run in reversed(members)}
    chosen = [run for run in members if one_a_seed[run.seed] is run]
    outcomes, fewer = _against_the_same([_matched(run, rivals, group_of) for run in chosen])
    finals = [run.final for run in chosen if run.final is not None]
    entry: dict[str, Any] = {
        "group": name,
        "runs": [run.name for run in members],
        "seeds": [run.seed for run in chosen],
        "target": statistics.fmean(point.target for point in finals) if finals else None,
        "source": statistics.fmean(point.source for point in finals) if finals else None,
        **_NOTHING,
    }
    matched = [one for one in outcomes if one.match is not None]
    if not matched or any(one.unreached for one in outcomes):
        whys = [(one.run.name, one.why) for one in outcomes if one.unreached or not matched]
        reasons = [why if len(members) == 1 else f"{run}: {why}" for run, why in whys]
        return {**entry, "reason": "; ".join(reasons)}
    notes = [note for one in outcomes for note in one.notes]
    notes += [f"{one.run.name} is left out: {one.why}" for one in outcomes if one.match is None]
    notes += fewer
    # Their curves might lie lower: who reads "beyond" must know that they were not there.
    if coarse := dict.fromkeys(name for one in outcomes for name in one.coarse):
        notes.append(f"only final models count, for want of shrink curves, of {', '.join(coarse)}")
    twice = [run.name for run in members if one_a_seed[run.seed] is not run]
    notes += [f"{name} is left out: another run has its recipe and seed" for name in twice]
    return {**entry, **_judged(matched, notes)}


_NOTHING: dict[str, Any] = {
    "envelope_source": None,
    "envelope_runs": [],
    "difference": None,
    "interval": None,
    "interval_over": None,
    "n": 0,
    "less_forgetting": None,
    "verdict": "not compared",
    "reason": None,
}


def _judged(matched: Sequence[Outcome], notes: Sequence[str]) -> dict[str, Any]:
    """What there is to say once every outcome has its match."""
    matches = [one.match for one in matched if one.match is not None]
    envelope_source = statistics.fmean(match.source for match in matches)
    difference = statistics.fmean(one.difference for one in matched)
    forgotten = envelope_source - statistics.fmean(one.run.base.source for one in matched if one.run.base)
    interval, over, count = _over_seeds(matched) if len(matched) > 1 else _over_documents(matched[0])
    doubt = "one seed, and no scores document by document: the difference cannot be told from noise"
    reasons = [doubt, *notes] if interval is None else notes
    return {
        "target": statistics.fmean(one.final.target for one in matched),
        "source": statistics.fmean(one.final.source for one in matched),
        "envelope_source": envelope_source,
        "envelope_runs": [match.run for match in matches],
        "difference": difference,
        "interval": interval,
        "interval_over": over,
        "n": count,
        "less_forgetting": -difference / forgotten if forgotten > LEAST_FORGETTING else None,
        "verdict": _verdict(interval),
        "reason": "; ".join(dict.fromkeys(reasons)) or None,
    }


def _verdict(interval: list[float] | None) -> str:
    if interval is None:
        return "not compared"
    low, high = interval
    return "beyond" if high < -_ROUNDING else "inside" if low > _ROUNDING else "on"


def _over_seeds(matched: Sequence[Outcome]) -> tuple[list[float], str, int]:
    """Student's interval for the mean of the differences, one a seed."""
    differences = [one.difference for one in matched]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return _interval(statistics.fmean(differences), error, len(differences) - 1), "seeds", len(differences)


def _over_documents(one: Outcome) -> tuple[list[float] | None, str | None, int]:
    """Interval for one seed's difference over the documents of the evaluation; none without their scores.

    The target scores are matched on documents too. By the delta method their error comes in with the slope of the
    curve: source and target are different texts, so the two are independent.
    """
    assert one.match is not None
    rival = blended(one.match.left.scores, one.match.right.scores, one.match.share)
    roles = ["source"] + (["target"] if one.match.slope else [])
    errors = [difference_error(one.final.scores, rival, role) for role in roles]
    values = [error for error, paired in errors if error is not None and paired]
    if len(values) < len(roles):
        return None, None, 0
    error = math.hypot(values[0], *(value * one.match.slope for value in values[1:]))
    degrees = min(degrees_of_freedom(rival, role) for role in roles)
    documents = sum(score["documents"] for score in rival if score["role"] == "source")
    return _interval(one.difference, error, degrees), "documents", documents


def _interval(mean: float, error: float, degrees: int) -> list[float]:
    half = t_quantile((1 + CONFIDENCE) / 2, degrees) * error
    return [mean - half, mean + half]


def _against_the_same(outcomes: Sequence[Outcome]) -> tuple[list[Outcome], list[str]]:
    """The seeds in which all rivals stand, and a note on each of the others.

    A seed in which the strongest rival is missing has a higher envelope, which would flatter the mean.
    """
    every = frozenset[str]().union(*(one.rivals for one in outcomes))
    kept = [one for one in outcomes if one.rivals == every or not one.rivals]
    if not any(one.rivals for one in kept):  # in no seed do all of them stand: the seed with the most of them
        most = max(outcomes, key=lambda one: len(one.rivals))
        kept = [one for one in outcomes if one.rivals == most.rivals or not one.rivals]
    standing = frozenset[str]().union(*(one.rivals for one in kept))
    notes = [
        f"{one.run.name} is left out: with its seed there is no {' and no '.join(sorted(standing - one.rivals))}"
        if standing - one.rivals
        else f"{one.run.name} is left out: its rivals are others"
        for one in outcomes
        if one not in kept
    ]
    return kept, notes


def _matched(run: Measured, rivals: Sequence[Measured], group_of: Mapping[str, str]) -> Outcome:
    if not rivals:
        return Outcome(run, why="there is no run of another recipe among them")
    same_seed = [rival for rival in rivals if rival.seed == run.seed]
    if not same_seed:
        return Outcome(run, why=f"there is no run of another recipe with its seed, {run.seed}")
    reasons = {rival.name: reasons_against(run.report, rival.report) for rival in same_seed}
    usable = [rival for rival in same_seed if not reasons[rival.name]]
    if not usable:
        texts = [f"{name} ({'; '.join(found)})" for name, found in reasons.items()]
        return Outcome(run, why=f"no other run can be compared with it: {', '.join(texts)}")
    assert run.final is not None, "a run without scores has reasons against it"
    curves = [curve for rival in usable for curve in rival.curves]
    standing = frozenset(group_of[rival.name] for rival in usable)
    match = lower_envelope(curves, run.final.target, run.final.source)
    if match is None:
        return Outcome(run, why=_unreached(run.final.target, usable), unreached=True, rivals=standing)
    notes = [f"{name} is left out: {'; '.join(found)}" for name, found in reasons.items() if found]
    coarse = [one.name for one in usable if one.coarse and one.final and one.final.target < run.final.target]
    return Outcome(run, match, notes=notes, coarse=coarse, rivals=standing)


def _unreached(target: float, rivals: Sequence[Measured]) -> str:
    """Why no rival has a model at this target score, rival by rival, and what would help."""
    texts = []
    for rival in rivals:
        assert rival.base is not None, "a run without scores has reasons against it"
        best = min(point.target for curve in rival.curves for point in curve.points)
        if target > rival.base.target:
            return "its target score is worse than the base's"
        if best > target:
            texts.append(f"{rival.name} learned less (its best target score is {best:.4f}, not {target:.4f})")
        else:
            command = f"`bam-lora shrink` makes {rival.name}'s curve"
            texts.append(f"{rival.name} learned more and forgot more, with nothing measured in between: {command}")
    return "; ".join(texts)
