"""Where every measured model of the runs lies: learned against forgotten, and both against the change |ΔW|."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.curve import Curve, lower_envelope
from bam_lora.report.curve import Point as Measure
from bam_lora.report.figure import Figure, Runs
from bam_lora.report.places import Axis, Place, curves, kinds_legend, places, run_series
from bam_lora.report.svg import Axes, Point, Series, plot, swatch

LEARNED, FORGOTTEN = "learned (target bits per byte)", "forgotten (source bits per byte)"
# Between the measured points the envelope follows straight lines and their crossings: this many steps show them.
_STEPS = 200


def plane_figure(runs: Runs) -> Figure | None:
    """Learned to the right, forgotten upwards: the lower right is where one wants to be."""
    series = run_series(runs, lambda one: one.learned, lambda one: one.forgotten)
    if not series:
        return None
    bands, gaps = _envelopes(runs)
    axes = Axes(LEARNED, FORGOTTEN, zero=True, corner="better ↘")
    title = "Learned against forgotten"
    drawn = plot([*bands, *series, *gaps], axes, ident="plot-plane", title=title, description=_spoken(runs, gaps))
    caption = (
        "A mark is the model after an iteration; numbers are iterations. Right: more learned. Up: more forgotten. "
    )
    caption += "The lower right is where one wants to be."
    legend = [*runs.legend(), *kinds_legend(runs)]
    if bands:
        legend.append((swatch(None, "band"), "lower envelope of the rivals"))
        caption += " The lower envelope is the least that any rival of the same seed forgets for as much learned."
    if gaps:
        legend.append((swatch(None, "gap"), "distance from the envelope"))
    return Figure(title, {"plane": drawn}, legend, caption)


def change_figure(runs: Runs) -> Figure | None:
    """Learned and forgotten over the size of the change: two panels."""
    panels = {}
    axis: Axis
    for name, label, axis in (
        ("learned", LEARNED, lambda one: one.learned),
        ("forgotten", FORGOTTEN, lambda one: one.forgotten),
    ):
        series = run_series(runs, lambda one: one.relative, axis)
        if series:
            axes = Axes("|ΔW| relative to |W|", label, fmt.percent, zero=True)
            title = f"{name.capitalize()} over the size of the change"
            drawn = plot(series, axes, ident=f"plot-change-{name}", title=title, description=_spoken(runs, []))
            panels[f"change-{name}"] = drawn
    if not panels:
        return None
    caption = (
        "|ΔW|: Frobenius norm of what was added to the weights since the original base; |W|: of these weights there. "
        "A mark is the model after an iteration."
    )
    return Figure("Size of the change", panels, [*runs.legend(), *kinds_legend(runs)], caption)


def _spoken(runs: Runs, gaps: Sequence[Series]) -> str:
    texts = [one.text for report in runs.reports for one in places(report)[1:]]
    return " ".join(f"{text}." for text in [*texts, *(point.text for gap in gaps for point in gap.points[1:])])


def envelope_at(lines: Iterable[Sequence[Place]], learned: float) -> float | None:
    """The least forgotten by models that learned at least so much, in bits per byte.

    Args:
        lines: Models whose neighbours may be interpolated; nothing is extrapolated or joined across lines.
        learned: In bits per byte.

    Returns:
        None where no line comes that far.
    """
    joined = [Curve("", tuple(Measure(-one.learned, one.forgotten) for one in line)) for line in lines]
    match = lower_envelope(joined, -learned, math.inf)
    return None if match is None else match.source


def _envelopes(runs: Runs) -> tuple[list[Series], list[Series]]:
    """For each Branch-and-Merge recipe (any recipe where there is none): its rivals' envelope, its distance from it."""
    entries = [e for e in runs.comparison.get("envelope") or [] if e["envelope_source"] is not None]
    merged = [e for e in entries if any(r["strategy"] == "bam" for r in runs.reports if r["name"] in e["runs"])]
    bands: list[Series] = []
    for entry in merged or entries:
        for report in runs.reports:
            if report["name"] in entry["runs"]:
                line = _band(_rivals(runs, entry, report))
                if line and line not in [band.points for band in bands]:
                    bands.append(Series(entry["group"], 0, line, marks=False, look="band"))
    return bands, [_gap(runs, entry) for entry in merged or entries]


def _rivals(runs: Runs, entry: dict[str, Any], report: Any) -> list[list[Place]]:
    """The lines of the runs of other recipes with the same seed that can be compared with this one."""
    comparable = {frozenset((p["a"], p["b"])) for p in runs.comparison["pairs"] if p["comparable"]}
    return [
        line
        for rival in runs.reports
        if rival["name"] not in entry["runs"]
        and rival["seeds"]["run"] == report["seeds"]["run"]
        and frozenset((rival["name"], report["name"])) in comparable
        for line in curves(places(rival))
    ]


def _band(lines: Sequence[Sequence[Place]]) -> list[Point]:
    marks = sorted({one.learned for line in lines for one in line})
    if not marks:
        return []
    low, width = marks[0], marks[-1] - marks[0]
    # Where a line ends the envelope may jump, so it is looked at just behind every model as well.
    behind = [mark + 1e-9 * width for mark in marks[:-1]]
    grid = sorted({*marks, *behind, *(low + width * step / _STEPS for step in range(1, _STEPS))})
    found = [(learned, envelope_at(lines, learned)) for learned in grid]
    return [Point(learned, forgotten, "") for learned, forgotten in found if forgotten is not None]


def _gap(runs: Runs, entry: dict[str, Any]) -> Series:
    """From the recipe's place, a mean over its seeds, to the envelope at the same target score."""
    summaries = [r["summary"] for r in runs.reports if r["name"] in entry["runs"]]
    target, source = (fmean(s[k] for s in summaries if s[k] is not None) for k in ("target_before", "source_before"))
    learned = target - entry["target"]
    own, envelope = entry["source"] - source, entry["envelope_source"] - source
    text = f"{entry['group']} against the envelope of its rivals at the same target score: "
    text += f"{fmt.signless(own)} against {fmt.signless(envelope)} bits per byte forgotten"
    if entry["interval"] is not None:
        low, high = entry["interval"]
        text += (
            f", difference {fmt.signed(entry['difference'])} (95 % interval {fmt.signed(low)} to {fmt.signed(high)})"
        )
    return Series(entry["group"], 0, [Point(learned, own, text), Point(learned, envelope, text)], look="gap")
