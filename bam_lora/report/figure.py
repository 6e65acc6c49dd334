"""What all figures of the page share: a figure, and which run has which colour in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from bam_lora.report.svg import swatch

Report = Mapping[str, Any]
# With more runs than this on a page, what is shown of each run by itself is folded.
MANY_RUNS = 3


@dataclass(frozen=True)
class Figure:
    """One or more plots, by name, that share a heading, a legend and a caption; `run` where it is of one run only."""

    title: str
    plots: Mapping[str, Markup]
    legend: list[tuple[Markup, str]]
    caption: str
    run: str = ""


@dataclass(frozen=True)
class Runs:
    """The runs of a page; those of one recipe at several seeds share a slot, which is a colour, a shape and a name."""

    reports: Sequence[Report]
    slots: list[int]
    names: list[str]
    comparison: Mapping[str, Any]

    @classmethod
    def of(cls, reports: Sequence[Report], comparison: Mapping[str, Any] | None) -> Runs:
        """Takes the groups from the comparison where it has any."""
        groups = [(entry["group"], set(entry["runs"])) for entry in (comparison or {}).get("envelope") or []]
        found = [next((g for g, (_, runs) in enumerate(groups) if r["name"] in runs), None) for r in reports]
        slots = [slot for slot in found if slot is not None]
        if len(slots) < len(reports):
            return cls(reports, list(range(len(reports))), [r["name"] for r in reports], comparison or {})
        return cls(reports, slots, [name for name, _ in groups], comparison or {})

    @property
    def alone(self) -> bool:
        """Whether the page is about one run."""
        return len(self.reports) == 1

    def legend(self) -> list[tuple[Markup, str]]:
        """Names beside their colours; empty for one run."""
        return [] if self.alone else [(swatch(slot), name) for slot, name in enumerate(self.names)]
