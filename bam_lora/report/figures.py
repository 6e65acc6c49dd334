"""The report's plots: what is drawn in each, with the words for those who cannot see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from bam_lora.report import format as fmt
from bam_lora.report.noise import NOISE_FACTOR
from bam_lora.report.svg import Axes, Point, Series, plot, swatch

Report = Mapping[str, Any]
_BARS = "Bars: ± 2 standard errors of each score; differences on the same text are more certain than they look here."
# A page with more branches than this draws every branch's loss in the colour of its run's first.
_MOST_BRANCHES = 8


@dataclass(frozen=True)
class Figure:
    """One or more plots that share a heading, a legend and a caption."""

    title: str
    plots: list[Markup]
    legend: list[tuple[Markup, str]]
    caption: str


def figures(reports: Sequence[Report]) -> list[Figure]:
    """Every plot there is something to show in.

    Args:
        reports: Reports of runs; each has its colour and shape in all plots but the losses.
    """
    found = [_by_tokens(reports), _plane(reports), *(_losses(report, i, reports) for i, report in enumerate(reports))]
    return [figure for figure in found if figure is not None]


def _legend(reports: Sequence[Report]) -> list[tuple[Markup, str]]:
    return [(swatch(slot), report["name"]) for slot, report in enumerate(reports)] if len(reports) > 1 else []


def _by_tokens(reports: Sequence[Report]) -> Figure | None:
    """Target and source bits per byte over the training: two panels, since their scales differ."""
    panels = []
    for role in ("target", "source"):
        series = [line for slot, report in enumerate(reports) for line in _role_series(report, slot, role, reports)]
        lines = [line for line in series if line.line]
        if any(line.points for line in lines):
            axes = Axes("training tokens, all branches", f"{role}: bits per byte (fewer is better)", fmt.short_count)
            title = f"{role.capitalize()} bits per byte over the training"
            text = " ".join(_course(line) for line in lines if line.points)
            panels.append(plot(series, axes, ident=f"plot-{role}", title=title, description=text))
    if not panels:
        return None
    branches = " Hollow marks: single branches before their merge." if len(reports) == 1 else ""
    caption = f"A filled mark is the base or the model merged after an iteration.{branches} {_BARS}"
    return Figure("Learning and forgetting", panels, _legend(reports), caption)


def _role_series(report: Report, slot: int, role: str, reports: Sequence[Report]) -> list[Series]:
    """The line of the merged models; for a run on its own also its branches."""
    summary = report["summary"]
    merged: list[Point] = []
    branches: list[Point] = []
    tokens = 0
    if summary[f"{role}_before"] is not None:
        merged.append(_score_point(0, "base", summary[f"{role}_before"], summary[f"{role}_before_stderr"]))
    for item in report["iterations"]:
        tokens += item["tokens"]
        models = [(f"iteration {item['iteration']}, merged", item["measured"], merged)]
        if len(reports) == 1 and len(item["branches"]) > 1:
            names = [f"iteration {item['iteration']}, branch {branch['branch']}" for branch in item["branches"]]
            models += [(n, b["measured"], branches) for n, b in zip(names, item["branches"], strict=True)]
        for name, measured, points in models:
            if measured[role] is not None:
                points.append(
                    _score_point(tokens, name, measured[role], measured[f"{role}_stderr"], points is branches)
                )
    return [Series(report["name"], slot, branches, line=False), Series(report["name"], slot, merged)]


def _score_point(tokens: int, name: str, value: float, stderr: float | None, hollow: bool = False) -> Point:
    text = f"{name}, {fmt.count(tokens)} tokens: {fmt.with_error(value, stderr)} bits per byte"
    error = None if stderr is None or hollow else NOISE_FACTOR * stderr
    return Point(tokens, value, text, error=error, hollow=hollow)


def _course(line: Series) -> str:
    values = ", ".join(f"{fmt.signless(point.y)} at {fmt.count(point.x)} tokens" for point in line.points)
    return f"{line.name}: {values}."


def _plane(reports: Sequence[Report]) -> Figure | None:
    """Forgotten to the right, learned upwards: the upper left is where one wants to be."""
    series = []
    for slot, report in enumerate(reports):
        points = [Point(0.0, 0.0, "base: nothing learned, nothing forgotten", label="" if slot else "base")]
        known = [
            (item["iteration"], item["measured"])
            for item in report["iterations"]
            if item["measured"]["learned"] is not None and item["measured"]["forgotten"] is not None
        ]
        for number, measured in known:
            learned, forgotten = measured["learned"], measured["forgotten"]
            text = f"{report['name']}, iteration {number}: learned {fmt.signless(learned)}"
            text += f", forgotten {fmt.signless(forgotten)} bits per byte"
            last = number == known[-1][0]
            label = _short(report["name"]) if last and len(reports) > 1 else str(number)
            points.append(Point(forgotten, learned, text, label=label))
        if known:
            series.append(Series(report["name"], slot, points))
    if not series:
        return None
    axes = Axes("forgotten (source bits per byte)", "learned (target bits per byte)", zero=True, corner="↖ better")
    text = " ".join(f"{point.text}." for line in series for point in line.points[1:])
    drawn = plot(series, axes, ident="plot-plane", title="Learned against forgotten", description=text)
    caption = "A mark is the model after an iteration; numbers are iterations. Up: more learned. Right: more forgotten."
    return Figure("Learned against forgotten", [drawn], _legend(reports), caption)


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _losses(report: Report, number: int, reports: Sequence[Report]) -> Figure | None:
    """Training loss over the steps, iterations one after the other, branches of one side by side."""
    if not report["losses"]:
        return None
    series, legend, offset = [], [], 0.0
    one_colour = max(item["branch"] for item in report["losses"]) > _MOST_BRANCHES
    for iteration in dict.fromkeys(item["iteration"] for item in report["losses"]):
        branches = [item for item in report["losses"] if item["iteration"] == iteration]
        for item in branches:
            slot = 0 if one_colour else item["branch"] - 1
            name = f"iteration {iteration}, branch {item['branch']}"
            points = [Point(offset + step, loss, name) for step, loss in item["points"]]
            series.append(Series(name, slot, points, marks=len(points) == 1))
            entry = (swatch(slot), "branches" if one_colour else f"branch {item['branch']}")
            if entry not in legend:
                legend.append(entry)
        offset += max(item["points"][-1][0] for item in branches)
    text = " ".join(
        f"{line.name}: from {line.points[0].y:.3f} to {line.points[-1].y:.3f} in {len(line.points)} logged steps."
        for line in series
    )
    axes = Axes("optimizer step, iterations one after the other", "training loss (nats per token)", whole_x=True)
    name = f"Training loss of {report['name']}" if len(reports) > 1 else "Training loss"
    drawn = plot(series, axes, ident=f"plot-loss-{number}", title=name, description=text)
    caption = "Mean over the steps since the last logged one; target and replay text together."
    return Figure(name, [drawn], legend if len(legend) > 1 else [], caption)
