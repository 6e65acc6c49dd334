"""The plots of docs/results.md: one a regime, learned against forgotten, means over the seeds."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from bam_lora.report.standalone import standalone
from bam_lora.report.svg import Axes, Point, Series, plot


def write_plot(path: Path, regime: str, arms: dict[str, Any]) -> None:
    """Writes an SVG of the arms with several seeds, or of all where none has.

    Each λ-curve is a line, each final model a mark.

    Args:
        path: The file.
        regime: Its name.
        arms: {name: {"runs": [...], ...}} as in the results file.
    """
    several = any(len(arm["runs"]) > 1 for arm in arms.values())
    shown = {name: arm["runs"] for name, arm in arms.items() if len(arm["runs"]) > 1 or not several}
    series = [drawn for slot, (name, runs) in enumerate(shown.items()) for drawn in series_of(name, slot, runs)]
    axes = Axes("learned (target bits per byte)", "forgotten (source bits per byte)", corner="better ↘")
    title = f"Regime {regime}"
    told = [point.text for one in series for point in one.points if point.text]
    svg = plot(series, axes, ident=f"forgetting-{regime}", title=title, description=". ".join(told))
    path.parent.mkdir(exist_ok=True)
    path.write_text(standalone(svg, title), encoding="utf-8")


def series_of(name: str, slot: int, runs: list[dict[str, Any]]) -> list[Series]:
    """An arm's λ-curve, its averages of checkpoints left out, and its final model."""
    before = [fmean(run[f"{role}_before"] for run in runs) for role in ("target", "source")]
    scales = sorted({point["scale"] for run in runs for point in run["curve"] if point["scale"] is not None})
    places = []
    for scale in scales:
        found = [point for run in runs for point in run["curve"] if point["scale"] == scale]
        if len(found) == len(runs):
            target, source = (fmean(point[role] for point in found) for role in ("target", "source"))
            places.append((before[0] - target, source - before[1]))
    last = fmean(run["learned"] for run in runs), fmean(run["forgotten"] for run in runs)
    text = f"{name}: learned {last[0]:.3f}, forgotten {last[1]:.3f}"
    mark = Series(name, slot, [Point(*last, text, label=name)])
    curve = [Series(name, slot, [Point(*place, "") for place in [*places, last]], marks=False, look="thin")]
    return [*(curve if scales else []), mark]
