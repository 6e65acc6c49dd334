"""The report's table of times: one row a stage, and what the loop costs beside plain training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.cost import STAGES
from bam_lora.report.tables import Cell, Table

_NOTE = (
    "Loop overhead: what plain training over the same tokens would not do (loading and setting up again, merging, "
    "folding, other), and its share of the wall time without evaluation."
)


def cost_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """One row a stage, one column a run; the stages add up to the wall time."""
    costs = [report["cost"] for report in reports]
    rows = [
        [Cell(stage.capitalize()), *(_seconds(cost["seconds_by_stage"][stage]) for cost in costs)] for stage in STAGES
    ]
    rows.append([Cell("Wall time"), *(_seconds(cost["wall_seconds"]) for cost in costs)])
    rows.append([Cell("Loop overhead"), *(_overhead(cost["loop_overhead"]) for cost in costs)])
    cut = [f"{r['name']}: {r['cost']['sessions_cut_short']}" for r in reports if r["cost"]["sessions_cut_short"]]
    note = f" Sessions that were cut short, whose time is not in the wall time: {', '.join(cut)}." if cut else ""
    return Table("Time by stage", ["", *(report["name"] for report in reports)], rows, _NOTE + note)


def _seconds(value: float | None) -> Cell:
    return Cell(fmt.duration(value), value, number=True)


def _overhead(value: Mapping[str, float | None] | None) -> Cell:
    if value is None:
        return Cell(fmt.MISSING)
    return Cell(f"{fmt.duration(value['seconds'])} ({fmt.percent(value['share'])})", value["seconds"], number=True)
