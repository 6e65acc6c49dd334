"""The training loss of every branch over the tokens of the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.figure import Figure, Report, Runs
from bam_lora.report.svg import Axes, Point, Series, plot, swatch

# A run with more branches at a time than this draws all of them in one colour.
_MOST_BRANCHES = 8


def loss_figure(report: Report, number: int, runs: Runs) -> Figure | None:
    """Training loss over the tokens, branches and iterations one after the other; None where none was logged.

    Args:
        report: Of one run.
        number: Which one on the page.
        runs: All of them.
    """
    if not report["losses"]:
        return None
    one_colour = max(item["branch"] for item in report["losses"]) > _MOST_BRANCHES
    counted = all(item.get("tokens") for item in report["losses"])
    series, legend = [], []
    for item, places in _laid_out(report, counted):
        slot = 0 if one_colour else item["branch"] - 1
        name = f"iteration {item['iteration']}, branch {item['branch']}"
        points = [Point(x, loss, name) for x, (_, loss) in zip(places, item["points"], strict=True)]
        series.append(Series(name, slot, points, marks=len(points) == 1))
        entry = (swatch(slot), "branches" if one_colour else f"branch {item['branch']}")
        if entry not in legend:
            legend.append(entry)
    text = " ".join(
        f"{line.name}: from {line.points[0].y:.3f} to {line.points[-1].y:.3f} in {len(line.points)} logged steps."
        for line in series
    )
    unit = "training tokens, all branches" if counted else "optimizer steps, all branches"
    merges = _merges(report) if counted else ()
    axes = Axes(unit, "training loss (nats per token)", fmt.short_count, rules=merges)
    name = "Training loss" if runs.alone else f"Training loss of {report['name']}"
    drawn = plot(series, axes, ident=f"plot-loss-{number}", title=name, description=text)
    caption = "Mean over the steps since the last logged one; target and replay text together. "
    caption += "The branches of an iteration start from the same weights and are drawn one after the other."
    if merges:
        caption += " Dotted lines: merges."
    return Figure(name, {"loss": drawn}, legend if len(legend) > 1 else [], caption, report["name"])


def _laid_out(report: Report, counted: bool) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """Every branch with losses, and where on the axis each of them stands."""
    logged = {(item["iteration"], item["branch"]): item for item in report["losses"]}
    start = 0.0
    for iteration in report["iterations"]:
        first = start
        for branch in iteration["branches"]:
            item = logged.get((iteration["iteration"], branch["branch"]))
            if item is not None:
                yield item, [start + x for x in (item["tokens"] if counted else [step for step, _ in item["points"]])]
            start += _length(branch, item, counted)
        if counted:  # the same sum as in the other plots over tokens
            start = first + iteration["tokens"]


def _length(branch: Report, item: dict[str, Any] | None, counted: bool) -> float:
    if counted:
        return float(branch["tokens"] or (branch["target_tokens"] or 0) + (branch["replay_tokens"] or 0))
    return float(item["points"][-1][0] if item else branch["steps"] or 0)


def _merges(report: Report) -> tuple[float, ...]:
    """Where one iteration ends and the next begins."""
    ends, tokens = [], 0
    for item in report["iterations"][:-1]:
        tokens += item["tokens"]
        ends.append(float(tokens))
    return tuple(ends)
