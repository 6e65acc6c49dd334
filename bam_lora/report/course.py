"""Target and source scores over the training, with the words for those who cannot see them."""

from __future__ import annotations

from bam_lora.report import format as fmt
from bam_lora.report.figure import Figure, Report, Runs
from bam_lora.report.noise import NOISE_FACTOR
from bam_lora.report.svg import Axes, Point, Series, plot

_BARS = "Bars: ± 2 standard errors of each score; differences on the same text are more certain than they look here."


def course_figure(runs: Runs) -> Figure | None:
    """Target and source bits per byte over the training: two panels, since their scales differ."""
    panels = {}
    hollow = False
    for role in ("target", "source"):
        numbered = zip(runs.slots, runs.reports, strict=True)
        series = [line for slot, report in numbered for line in _role_series(report, slot, role, runs.alone)]
        lines = [line for line in series if line.line]
        hollow = hollow or any(point.hollow for line in series for point in line.points)
        if any(line.points for line in lines):
            axes = Axes("training tokens, all branches", f"{role}: bits per byte (fewer is better)", fmt.short_count)
            title = f"{role.capitalize()} bits per byte over the training"
            text = " ".join(_course(line) for line in lines if line.points)
            panels[role] = plot(series, axes, ident=f"plot-{role}", title=title, description=text)
    if not panels:
        return None
    branches = " Hollow marks: single branches before their merge." if hollow else ""
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
