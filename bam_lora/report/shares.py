"""What a whole is made of, as bars: the time by stage, the training tokens by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.bars import Part, bars, part_swatch
from bam_lora.report.cost import STAGES
from bam_lora.report.figure import Figure, Report, Runs
from bam_lora.report.glyphs import short

# With more sources than colours the bars show roles only.
_MOST_SOURCES = 8
_COLON = ": "


def cost_figure(runs: Runs) -> Figure | None:
    """One bar a run, as long as its wall time, in stages; None where no time was measured."""
    rows = []
    for report in runs.reports:
        seconds = report["cost"]["seconds_by_stage"]
        wall = sum(value or 0.0 for value in seconds.values())
        parts = [_stage(slot, stage, seconds[stage], wall) for slot, stage in enumerate(STAGES) if seconds[stage]]
        rows.append((report["name"], parts))
    if not any(parts for _, parts in rows):
        return None
    shown = [slot for slot in range(len(STAGES)) if any(part.slot == slot for _, parts in rows for part in parts)]
    legend = [(part_swatch(slot), STAGES[slot]) for slot in shown]
    title = "Share of the time"
    spoken = _spoken(rows)
    unit, sign = _unit(max(sum(part.value for part in parts) for _, parts in rows))
    drawn = bars(
        rows,
        lambda value: f"{value:g} {sign}",
        unit=unit,
        ident="plot-cost",
        title=title,
        description=spoken,
        named=not runs.alone,
    )
    return Figure(title, {"cost": drawn}, legend, "The length of a bar is the wall time of all sessions.")


def _unit(seconds: float) -> tuple[float, str]:
    """The largest unit of which there are two or more, in seconds."""
    return next((unit for unit in ((3600.0, "h"), (60.0, "min")) if seconds >= 2 * unit[0]), (1.0, "s"))


def _stage(slot: int, stage: str, seconds: float, wall: float) -> Part:
    share = f"{100 * seconds / wall:.0f} %"
    return Part(slot, seconds, share, f"{stage}: {fmt.duration(seconds)}, {share}")


def data_figure(runs: Runs) -> Figure | None:
    """One bar a run, as long as its training tokens, in sources; None where no source says how much of it is used."""
    rows = [(report["name"], _sources(report)) for report in runs.reports]
    names: dict[int, str] = {}
    for _, parts in rows:
        for part in parts:
            name = part.text.rpartition(_COLON)[0]
            if names.setdefault(part.slot, name) != name:
                return None  # runs of other sources: the table says which
    if not names or len(names) > _MOST_SOURCES:
        return None
    title = "Share of the training tokens"
    drawn = bars(rows, fmt.short_count, ident="plot-data", title=title, description=_spoken(rows), named=not runs.alone)
    legend = [(part_swatch(slot), names[slot]) for slot in sorted(names)]
    return Figure(title, {"data": drawn}, legend, "The length of a bar is what was used of the sources, in tokens.")


def _sources(report: Report) -> list[Part]:
    data: Mapping[str, Any] = report["data"] or {}
    used = [(source, source.get("used_tokens")) for source in data.get("sources", [])]
    total = sum(tokens or 0 for _, tokens in used)
    parts = []
    for slot, (source, tokens) in enumerate(used):
        if tokens:
            share = f"{100 * tokens / total:.0f} %"
            name = f"{short(_named(source), 32)} ({source.get('role')})"
            parts.append(Part(slot, tokens, share, f"{name}{_COLON}{fmt.count(tokens)} tokens, {share}"))
    return parts


def _named(source: Mapping[str, Any]) -> str:
    """A data set's id with its configuration, or a file's name without its folder."""
    path = str(source.get("path"))
    name = PurePath(path).name if path.startswith(("/", "~", ".")) else path
    return f"{name}, {source['name']}" if source.get("name") else name


def _spoken(rows: Sequence[tuple[str, Sequence[Part]]]) -> str:
    return " ".join(f"{name}: {'; '.join(part.text for part in parts)}." for name, parts in rows)
