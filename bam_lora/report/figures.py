"""The report's plots: what is drawn in each, with the words for those who cannot see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.agreement import cosine_figure
from bam_lora.report.figure import Figure, Report, Runs
from bam_lora.report.noise import NOISE_FACTOR
from bam_lora.report.plane import change_figure, plane_figure
from bam_lora.report.svg import Axes, Point, Series, plot, swatch

_BARS = "Bars: ± 2 standard errors of each score; differences on the same text are more certain than they look here."
# A page with more branches than this draws every branch's loss in the colour of its run's first.
_MOST_BRANCHES = 8


def figures(reports: Sequence[Report], comparison: Mapping[str, Any] | None = None) -> list[Figure]:
    """Every plot of all runs together that there is something to show in.

    Args:
        reports: Reports of runs; each has its colour and shape in all of these plots.
        comparison: What `compare` returned for them, or None.
    """
    runs = Runs.of(reports, comparison)
    found = [_by_tokens(runs), plane_figure(runs), change_figure(runs)]
    return [figure for figure in found if figure is not None]


def run_figures(reports: Sequence[Report]) -> list[Figure]:
    """The plots that are of one run each, run after run: cosines between its branches, its losses."""
    runs = Runs.of(reports, None)
    found = [make(report, i, runs) for i, report in enumerate(reports) for make in (cosine_figure, _losses)]
    return [figure for figure in found if figure is not None]


def _by_tokens(runs: Runs) -> Figure | None:
    """Target and source bits per byte over the training: two panels, since their scales differ."""
    panels = []
    for role in ("target", "source"):
        numbered = zip(runs.slots, runs.reports, strict=True)
        series = [line for slot, report in numbered for line in _role_series(report, slot, role, runs.alone)]
        lines = [line for line in series if line.line]
        if any(line.points for line in lines):
            axes = Axes("training tokens, all branches", f"{role}: bits per byte (fewer is better)", fmt.short_count)
            title = f"{role.capitalize()} bits per byte over the training"
            text = " ".join(_course(line) for line in lines if line.points)
            panels.append(plot(series, axes, ident=f"plot-{role}", title=title, description=text))
    if not panels:
        return None
    branches = " Hollow marks: single branches before their merge." if runs.alone else ""
    caption = f"A filled mark is the base or the model merged after an iteration.{branches} {_BARS}"
    return Figure("Learning and forgetting", panels, runs.legend(), caption)


def _role_series(report: Report, slot: int, role: str, alone: bool) -> list[Series]:
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
        if alone and len(item["branches"]) > 1:
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


def _losses(report: Report, number: int, runs: Runs) -> Figure | None:
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
    name = f"Training loss of {report['name']}" if not runs.alone else "Training loss"
    drawn = plot(series, axes, ident=f"plot-loss-{number}", title=name, description=text)
    caption = "Mean over the steps since the last logged one; target and replay text together."
    return Figure(name, [drawn], legend if len(legend) > 1 else [], caption)
