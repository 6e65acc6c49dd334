"""Searched merge weights: every candidate with its scores, and what the held-out text said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.figure import MANY_RUNS, Report
from bam_lora.report.learned import LearnedMerge, LearnedSection
from bam_lora.report.tables import Cell, Table

_CAPTION = (
    "Weights of the average that were tried, one number a branch, and bits per byte with them on the selection text. "
    "The best one was scored beside the plain average on text held out from the search, which decided."
)


def searched_sections(reports: Sequence[Report]) -> list[LearnedSection]:
    """One section for every run that searched its merge weights.

    Args:
        reports: Of runs. Beside others a run shows its newest merge only: a page must stay of a size.
    """
    sections = []
    for report in reports:
        found = [(item["iteration"], item["searched"]) for item in report["iterations"] if item.get("searched")][::-1]
        if not found:
            continue
        shown = found if len(reports) == 1 else found[:1]
        merges = [
            LearnedMerge(_title(number, one), {}, trials_table(number, one), len(reports) <= MANY_RUNS and place == 0)
            for place, (number, one) in enumerate(shown)
        ]
        name = "Searched merge weights" + (f" of {report['name']}" if len(reports) > 1 else "")
        sections.append(LearnedSection(name, [], merges, _CAPTION))
    return sections


def _title(iteration: int, searched: Mapping[str, Any]) -> str:
    return f"Iteration {iteration}" + ("" if any(searched["weights"]) else ": rejected, the base stayed as it was")


def trials_table(iteration: int, searched: Mapping[str, Any]) -> Table:
    """One row a candidate, then those that were scored on held-out text.

    Args:
        iteration: Whose merge it is.
        searched: `searched` of merge.json.
    """
    rows = [
        [_name(one, " (held out)" if held_out else "", searched), *_scores(one)]
        for held_out, trials in ((False, searched["trials"]), (True, searched["held_out"]))
        for one in trials
    ]
    note = f"Bits per byte. Weight of the source in the objective: {searched['source_weight']:g}."
    return Table(f"Candidates, iteration {iteration}", ["Weights", "Target", "Source", "Objective"], rows, note)


def _name(trial: Mapping[str, Any], place: str, searched: Mapping[str, Any]) -> Cell:
    chosen = " (chosen)" if place and trial["weights"] == searched["weights"] else ""
    return Cell(" / ".join(fmt.signless(weight, 3) for weight in trial["weights"]) + place + chosen)


def _scores(trial: Mapping[str, Any]) -> list[Cell]:
    return [Cell(fmt.signless(trial[key]), trial[key], number=True) for key in ("target", "source", "objective")]
