"""Learned merge weights: the coefficients by layer and module, and how the scores went while they were learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from bam_lora.report import format as fmt
from bam_lora.report.figure import MANY_RUNS, Report
from bam_lora.report.heatmap import HeatCell, heat_swatch, heatmap
from bam_lora.report.layers import place, row_names
from bam_lora.report.tables import Cell, Table

# A tooltip with more numbers than this could not be read.
_MOST_GROUPS = 16
# Full colour at least this far from the uniform weight: less is next to nothing and should not look like much.
_LEAST_RANGE = 0.1

Weights = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class LearnedMerge:
    """One iteration's coefficients: a picture a branch and a table of the steps."""

    title: str
    plots: Mapping[str, Markup]
    table: Table
    is_open: bool


@dataclass(frozen=True)
class LearnedSection:
    """A run's learned merges, the newest first."""

    title: str
    legend: list[tuple[Markup, str]]
    merges: list[LearnedMerge]
    caption: str
    run: str = ""


def learned_sections(reports: Sequence[Report]) -> list[LearnedSection]:
    """One section for every run that learned its merge weights.

    Args:
        reports: Of runs. Beside others a run shows its newest merge only: a page must stay of a size.
    """
    sections = []
    for number, report in enumerate(reports):
        found = [(item["iteration"], item["learned"]) for item in report["iterations"] if item["learned"]]
        found = [(iteration, one) for iteration, one in found if one["coefficients"]][::-1]
        if found:
            shown = found if len(reports) == 1 else found[:1]
            name = report["name"] if len(reports) > 1 else ""
            sections.append(_section(name, number, shown, unfold=len(reports) <= MANY_RUNS))
    return sections


def _section(run: str, number: int, found: Sequence[tuple[int, Mapping[str, Any]]], *, unfold: bool) -> LearnedSection:
    # One scale for all iterations, so that a colour means the same in every picture.
    relative = [value for _, one in found for value in _relative(one["coefficients"])]
    reach = max(_LEAST_RANGE, *(abs(value - 1) for value in relative))
    merges = [
        LearnedMerge(
            f"Iteration {iteration}",
            _maps(one["coefficients"], reach, f"learned-{number}-{iteration}", iteration),
            selection_table(iteration, one),
            unfold and order == 0,
        )
        for order, (iteration, one) in enumerate(found)
    ]
    steps = ((-1.0, ""), (-0.5, ""), (0.0, " (uniform)"), (0.5, ""), (1.0, ""))
    legend = [(heat_swatch(strength), f"{fmt.signless(1 + strength * reach, 2)} ×{word}") for strength, word in steps]
    caption = (
        "Mean coefficient over a weight's groups of singular directions, each group counted once; the colour is that "
        "over the uniform weight 1/K of K branches. A pointer on a cell shows every group's."
    )
    title = f"Learned merge weights of {run}" if run else "Learned merge weights"
    return LearnedSection(title, legend, merges, caption, run)


def _relative(weights: Weights) -> Iterable[float]:
    return (fmean(groups) * len(branches) for branches in weights.values() for groups in branches)


def _maps(weights: Weights, reach: float, ident: str, iteration: int) -> dict[str, Markup]:
    places = {weight: place(weight) for weight in weights}
    rows = row_names(places.values())
    row_of = {key: number for number, key in enumerate(rows)}
    columns = list(dict.fromkeys(places[weight].kind for weight in sorted(weights, key=lambda w: _order(w, places))))
    pictures = {}
    for branch in range(max(len(branches) for branches in weights.values())):
        members: dict[tuple[int, int], list[str]] = {}
        for weight, branches in weights.items():
            if branch < len(branches):
                where = places[weight]
                members.setdefault((row_of[where.stack, where.layer], columns.index(where.kind)), []).append(weight)
        cells = {key: _cell(names, weights, branch, reach) for key, names in members.items()}
        title = f"Iteration {iteration}, branch {branch + 1}"
        spoken = f"{title}: mean coefficients. " + " ".join(f"{cell.tooltip}." for cell in _extremes(cells))
        pictures[f"learned-{iteration}-{branch + 1}"] = heatmap(
            list(rows.values()), columns, cells, ident=f"{ident}-{branch + 1}", title=title, description=spoken
        )
    return pictures


# The order of a block's forward pass; other modules follow in the order of their names.
_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _order(weight: str, places: Mapping[str, Any]) -> tuple[bool, int, str]:
    where = places[weight]
    known = _KINDS.index(where.kind) if where.kind in _KINDS else len(_KINDS)
    return where.layerless, known, where.kind


def _cell(names: Sequence[str], weights: Weights, branch: int, reach: float) -> HeatCell:
    """A weight's cell; experts of one layer share theirs."""
    mean = fmean(fmean(weights[name][branch]) for name in names)
    relative = fmean(fmean(weights[name][branch]) * len(weights[name]) for name in names)
    first = names[0].removesuffix(".weight")
    tooltip = f"{first}, branch {branch + 1}: {fmt.signless(mean)}, {fmt.signless(relative, 3)} × uniform"
    groups = weights[names[0]][branch]
    if len(names) > 1:
        tooltip += f" (mean over this and {len(names) - 1} more weights)"
    elif len(groups) > _MOST_GROUPS:
        tooltip += f"; {len(groups)} groups from {fmt.signless(min(groups))} to {fmt.signless(max(groups))}"
    elif len(groups) > 1:
        tooltip += f"; groups: {', '.join(fmt.signless(value) for value in groups)}"
    return HeatCell((relative - 1) / reach, fmt.signless(mean, 2), tooltip)


def _extremes(cells: Mapping[tuple[int, int], HeatCell]) -> list[HeatCell]:
    """What to say of a picture: its lowest and its highest cell."""
    ranked = sorted(cells.values(), key=lambda cell: cell.strength)
    return [ranked[0], ranked[-1]] if len(ranked) > 1 else ranked


def selection_table(iteration: int, learned: Mapping[str, Any]) -> Table:
    """One row a step at which the held-out text was scored.

    Args:
        iteration: Whose merge it is.
        learned: `learned` of merge.json.
    """
    rows = []
    for entry in learned.get("selection") or []:
        mark = " (chosen)" if entry["step"] == learned.get("best_step") else ""
        values = [Cell(fmt.signless(entry[k]), entry[k], number=True) for k in ("target", "source", "objective")]
        rows.append([Cell(f"{entry['step']}{mark}"), *values])
    weight = learned.get("source_weight")
    note = "Bits per byte on text held out from the learning of the merge weights."
    if weight is not None:
        note += f" Weight of the source in the objective: {weight:g}."
    return Table(f"Scores while learning, iteration {iteration}", ["Step", "Target", "Source", "Objective"], rows, note)
