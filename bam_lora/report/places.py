"""The measured models of a run as places in the planes of learning, forgetting and change of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from bam_lora.report import format as fmt
from bam_lora.report.figure import Report, Runs
from bam_lora.report.glyphs import short
from bam_lora.report.svg import Point, Series, swatch

BASE, ITERATION = "base", "iteration"
SHRINK, CHECKPOINT, EMA, LEARNED = "shrink", "checkpoint", "ema", "learned"
_LOOKS = {SHRINK: "thin", CHECKPOINT: "thin", EMA: "plus", LEARNED: "thin"}
_MEANINGS = {
    SHRINK: "whole change scaled by λ",
    CHECKPOINT: "checkpoint",
    EMA: "average of checkpoints (EMA)",
    LEARNED: "last merge learned, source weight μ",
}
# The base is λ = 0, the newest merged model λ = 1: measured twice they are still one place.
_OWN_SCALES = (0.0, 1.0)


@dataclass(frozen=True)
class Place:
    """One model: bits per byte learned and forgotten since the base, |ΔW| over |W| if known, and what to call it."""

    kind: str
    label: str
    learned: float
    forgotten: float
    relative: float | None
    text: str
    scale: float | None = None

    @property
    def mark(self) -> str:
        """What stands beside its mark."""
        return {SHRINK: f"λ {self.label}", LEARNED: f"μ {self.label}", CHECKPOINT: "", EMA: ""}.get(
            self.kind, self.label
        )


Axis = Callable[[Place], float | None]


def places(report: Report) -> list[Place]:
    """The base, the merged models in order, then what `shrink.json` holds; only models scored on both languages."""
    found = []
    weight_norm = None
    for item in report["iterations"]:
        weight_norm = item["weight_norm"] or weight_norm
        relative = _over(item["delta_norm"], weight_norm)
        name = f"{report['name']}, iteration {item['iteration']}"
        found.append(_place(ITERATION, str(item["iteration"]), name, item["measured"], relative))
    for point in report["shrink"] or []:
        kind, label, scale = point["kind"], point["label"], point["scale"]
        if kind in _MEANINGS and not (kind == SHRINK and scale in _OWN_SCALES):
            relative = _over(point["delta_norm"], weight_norm)
            found.append(_place(kind, label, f"{report['name']}, {_MEANINGS[kind]} {label}", point, relative, scale))
    known = [one for one in found if one is not None]
    base = Place(BASE, "base", 0.0, 0.0, 0.0, "base: nothing learned, nothing forgotten", 0.0)
    return [base, *known] if known else []


def _over(norm: float | None, weight_norm: float | None) -> float | None:
    return None if norm is None or not weight_norm else norm / weight_norm


def _place(
    kind: str, label: str, name: str, measured: Report, relative: float | None, scale: float | None = None
) -> Place | None:
    learned, forgotten = measured["learned"], measured["forgotten"]
    if learned is None or forgotten is None:
        return None
    text = f"{name}: learned {fmt.signless(learned)}, forgotten {fmt.signless(forgotten)} bits per byte"
    if relative is not None:
        text += f", |ΔW| {fmt.percent(relative)} of |W|"
    return Place(kind, label, learned, forgotten, relative, text, scale)


def curves(found: list[Place]) -> list[list[Place]]:
    """The models of a run whose neighbours may be joined: along λ, along the training, along averages.

    Every model is on one of them, if need be alone; the merged models of an early iteration are on none.
    """
    final = [one for one in found if one.kind == ITERATION][-1:]
    base = [one for one in found if one.kind == BASE]
    by_kind = {kind: [one for one in found if one.kind == kind] for kind in (SHRINK, CHECKPOINT, EMA, LEARNED)}
    shrink = sorted(by_kind[SHRINK], key=lambda one: one.scale or 0.0)
    ends = [[*base, *shrink, *final]] if shrink else [base, final]
    steps = sorted(by_kind[CHECKPOINT], key=_step)
    checkpoints = [[*base, *steps]] if steps else []
    return [line for line in (*ends, *checkpoints, by_kind[EMA], by_kind[LEARNED]) if line]


def _step(one: Place) -> int:
    number = re.search(r"\d+", one.label)
    return int(number[0]) if number else 0


def run_series(runs: Runs, x: Axis, y: Axis) -> list[Series]:
    """All runs in one plane, the thin lines beneath: λ, checkpoints and averages, then the merged models."""
    beneath, above = [], []
    for number, (report, slot) in enumerate(zip(runs.reports, runs.slots, strict=True)):
        found = places(report)
        for kind, look in _LOOKS.items():
            chosen = [one for one in found if one.kind == kind]
            if kind in (SHRINK, LEARNED) and chosen:
                line = next(line for line in curves(found) if chosen[0] in line)
                # The ends are marked as base and last iteration: here they only carry the line.
                joined = _points(line, x, y, "")
                if len(joined) > 1:
                    beneath.append(Series(report["name"], slot, joined, marks=False, look=look))
            points = _points(chosen, x, y, None, hollow=kind == CHECKPOINT)
            if points:
                beneath.append(Series(report["name"], slot, points, line=False, look=look))
        merged = [one for one in found if one.kind in (BASE, ITERATION)]
        points = _points(merged, x, y, None)
        if not runs.alone and points:
            points = _named(points, report["name"] if runs.slots.count(slot) == 1 else "", first=number == 0)
        if len(points) > 1:
            above.append(Series(report["name"], slot, points))
    return [*beneath, *above]


def _points(chosen: list[Place], x: Axis, y: Axis, label: str | None, *, hollow: bool = False) -> list[Point]:
    found = [(x(one), y(one), one) for one in chosen]
    return [
        Point(across, up, one.text, label=one.mark if label is None else label, hollow=hollow)
        for across, up, one in found
        if across is not None and up is not None
    ]


def _named(points: list[Point], name: str, *, first: bool) -> list[Point]:
    """Among several runs the last mark carries the run's name, and the base is named once."""
    result = list(points)
    if not first:
        result[0] = Point(points[0].x, points[0].y, points[0].text)
    last = points[-1]
    result[-1] = Point(last.x, last.y, last.text, label=short(name) or last.label)
    return result


def kinds_legend(runs: Runs) -> list[tuple[Markup, str]]:
    """What the small marks are, as far as there are any."""
    kinds = {one.kind for report in runs.reports for one in places(report)}
    slot = 0 if runs.alone else None
    entries = []
    for kind, look in _LOOKS.items():
        if kind in kinds:
            entries.append(
                (swatch(slot, look, line=kind in (SHRINK, LEARNED), hollow=kind == CHECKPOINT), _MEANINGS[kind])
            )
    return entries
