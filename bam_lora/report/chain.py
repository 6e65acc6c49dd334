"""The runs that a chained run continues: what it keeps of their reports, and the course from the original base on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.records import read_record
from bam_lora.report.tables import Cell, Table

Report = Mapping[str, Any]

_KEPT = (
    "name", "strategy", "mode", "base", "revision", "languages", "recipe_sha256", "seeds", "evaluation", "scores",
    "summary", "iterations", "cost",
)  # fmt: skip
_BULKY = (
    "learned",
    "searched",
    "cosine_by_layer",
    "norm_by_layer",
)  # of an iteration: the parent's own report has them


def chain_of(parent: Path) -> list[dict[str, Any]]:
    """What a run that continues a finished one keeps of its report, and of those of the runs before it.

    Args:
        parent: Directory of the finished run.

    Returns:
        The runs, the oldest first: the keys of `report.json` that tell what each did.

    Raises:
        UserError: If the parent's report is damaged.
    """
    report = read_record(parent / "report.json")
    assert report is not None, "a finished run has a report"
    entry = {key: report.get(key) for key in _KEPT}
    entry["iterations"] = [
        {key: value for key, value in item.items() if key not in _BULKY} for item in report["iterations"]
    ]
    return [*report.get("inherited", []), entry]


def chain_scores_table(reports: Sequence[Report]) -> Table:
    """One row an evaluation set, one column a model: the original base, and what each run of the chain made of it."""
    if len(reports) != 1 or not reports[0].get("inherited"):
        return Table("From the original base on", [], [])
    chain = [*reports[0]["inherited"], reports[0]]
    models: list[dict[Any, Mapping[str, Any]]] = [{} for _ in range(len(chain) + 1)]
    for place, run in enumerate(chain):
        for key, iteration, score in _merged_scores(run):
            models[place + 1 if iteration else place][key] = score  # a run's last one stays
    sets = sorted(dict.fromkeys(key for model in models for key in model), key=lambda key: key[0] != "target")
    rows = [[Cell(f"{key[1]} ({key[0]})"), *(_score(model.get(key)) for model in models)] for key in sets]
    columns = ["", "Original base", *(f"After {run['name']}" for run in chain)]
    note = (
        "Bits per byte ± one standard error. A set that a run did not score has no number; the same name in two rows "
        "stands for other text, precision or windows."
    )
    return Table("From the original base on", columns, rows, note)


def _merged_scores(run: Report) -> Iterator[tuple[tuple[Any, ...], int, Mapping[str, Any]]]:
    """(what was scored and how, iteration, score) of a run's base and merged models, in order."""
    settings = tuple((run["evaluation"] or {}).get(key) for key in ("precision", "window_bytes", "overlap_bytes"))
    for score in run["scores"]:
        if score["branch"] is None:
            yield (score["role"], score["set"], score["bytes"], *settings), score["iteration"], score


def _score(score: Mapping[str, Any] | None) -> Cell:
    if score is None:
        return Cell(fmt.MISSING, number=True)
    return Cell(fmt.with_error(score["bits_per_byte"], score["stderr"]), score["bits_per_byte"], number=True)


def chain_iterations_table(reports: Sequence[Report]) -> Table:
    """One row an iteration of every run of the chain, the oldest first."""
    title = "Iterations of all runs"
    if len(reports) != 1 or not reports[0].get("inherited"):
        return Table(title, [], [])
    chain = [*reports[0]["inherited"], reports[0]]
    rows = [_iteration(run, item) for run in chain for item in run["iterations"]]
    columns = ["Run", "Iteration", "Tokens", "Merge weights", "Cosine", "|Δ| merged", "|ΔW|", "Target", "Source"]
    tokens = sum(run["cost"]["train_tokens"] or 0 for run in chain)
    note = (
        f"{fmt.count(tokens)} training tokens in {len(chain)} runs. |ΔW|: from the original base. "
        "Target and source: bits per byte on the sets of each run."
    )
    return Table(title, columns, rows, note)


def _iteration(run: Report, item: Mapping[str, Any]) -> list[Cell]:
    weights = fmt.MISSING if not item["coefficients"] else ", ".join(f"{w:.4g}" for w in item["coefficients"])
    measured = item["measured"]
    return [
        Cell(str(run["name"])),
        Cell(str(item["iteration"]), item["iteration"], number=True),
        Cell(fmt.count(item["tokens"]), item["tokens"], number=True),
        Cell(weights.replace("-", fmt.MINUS), number=True),
        Cell(fmt.signless(item["cosine"], 3), item["cosine"], number=True),
        *(
            Cell(fmt.MISSING if item[key] is None else f"{item[key]:,.4g}", item[key], number=True)
            for key in ("merged_norm", "delta_norm")
        ),
        *(
            Cell(fmt.with_error(measured[role], measured[f"{role}_stderr"]), measured[role], number=True)
            for role in ("target", "source")
        ),
    ]
