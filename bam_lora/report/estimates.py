"""The report's table of what a run was estimated to take, before it began, beside what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.tables import Cell, Table

_MEASURED = {"peak_rss_bytes": "Memory", "peak_gpu_bytes": "GPU memory", "disk_bytes": "Disk, at the end"}
_NOTE = (
    "Estimated as `bam-lora check` does, when the run began. Torch counts a GPU's memory without the driver's context, "
    "which the estimate holds (0.6 GB)."
)


def estimates_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each thing that was estimated and measured, two columns a run; no rows where there is none."""
    estimates = [(report["environment"] or {}).get("estimate") or {} for report in reports]
    rows = []
    for key, label in _MEASURED.items():
        pairs = [(estimate.get(key), report["cost"][key]) for estimate, report in zip(estimates, reports, strict=True)]
        if any(None not in pair for pair in pairs):
            rows.append([Cell(label), *(Cell(fmt.size(size), size, number=True) for pair in pairs for size in pair)])
    head = [f"{report['name']}, {kind}" for report in reports for kind in ("estimated", "measured")]
    return Table("Estimated and measured", ["", *head], rows, _NOTE)
