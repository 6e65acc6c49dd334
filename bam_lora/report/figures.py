"""The report's figures, by the part of the page that they stand in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bam_lora.report.agreement import layers_figure
from bam_lora.report.course import course_figure
from bam_lora.report.figure import Figure, Report, Runs
from bam_lora.report.losses import loss_figure
from bam_lora.report.plane import change_figure, plane_figure
from bam_lora.report.shares import cost_figure, data_figure


def figures(reports: Sequence[Report], comparison: Mapping[str, Any] | None = None) -> dict[str, list[Figure]]:
    """Every figure that there is something to show in.

    Args:
        reports: Reports of runs; each has its colour and shape in all plots of several runs.
        comparison: What `compare` returned for them, or None.

    Returns:
        {part of the page: figures}: "plane", "course", "change", "data" and "cost" are of all runs together, "losses"
        and "layers" of one run each.
    """
    runs = Runs.of(reports, comparison)
    together = {
        "plane": plane_figure(runs),
        "course": course_figure(runs),
        "change": change_figure(runs),
        "data": data_figure(runs),
        "cost": cost_figure(runs),
    }
    single = {"losses": loss_figure, "layers": layers_figure}
    found = {part: [figure] for part, figure in together.items()}
    found |= {part: [make(one, i, runs) for i, one in enumerate(reports)] for part, make in single.items()}
    return {part: [figure for figure in some if figure is not None] for part, some in found.items()}
