"""Puts the report of a run beside its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bam_lora.report.collect import collect
from bam_lora.report.html import render_html
from bam_lora.store import write_record, write_text


def write_report(run: Path) -> dict[str, Any]:
    """Writes `report.html` and `report.json` of a run, finished or not.

    Args:
        run: The run directory.

    Returns:
        The report, as in `report.json`.

    Raises:
        UserError: If `run` is not a run directory, or one of its records is damaged.
    """
    report = collect(run)
    write_text(Path(run) / "report.html", render_html([report], None))
    write_record(Path(run) / "report.json", "report", report)
    return report
