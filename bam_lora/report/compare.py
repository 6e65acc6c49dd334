"""Runs side by side: who learned more, who forgot less, and whether that can be said at all.

Convention of every pair: a difference is a minus b, a ratio is a over b.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.report.collect import ROLES, collect
from bam_lora.report.comparable import reasons_against
from bam_lora.report.envelope import envelope
from bam_lora.report.measured import read_measured
from bam_lora.report.noise import NOISE_FACTOR, difference_error
from bam_lora.report.records import iteration_folder, read_record
from bam_lora.report.tasks import task_differences


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """Sets runs side by side.

    Args:
        runs: Two or more run directories; the order is kept, a baseline usually comes first.

    Returns:
        {"runs": [their reports], "pairs": [...], "envelope": [...]}: one pair for every two runs, in bits per byte,
        a minus b. Of "learned_more" and "forgot_less" each is "a", "b", "tie" (less than two standard errors apart),
        "unknown" (no standard error) or null (not comparable, or not measured). One envelope entry for every recipe:
        its runs against the lower envelope of all the others at the same target score.

    Raises:
        UserError: If there are fewer than two runs, one is given twice, or one cannot be read.
    """
    folders = [Path(run).resolve() for run in runs]
    if len(folders) < 2:
        raise UserError.of(
            "compare", expected="two or more runs", found=str(len(folders)), remedy="Name the runs to set side by side"
        )
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError.of("compare", expected="different runs", found=f"{twice} twice", remedy="Name each run once")
    reports = [collect(folder) for folder in folders]
    for report, name in zip(reports, _names(folders), strict=True):
        report["name"] = name
    results = [_result(folder, report) for folder, report in zip(folders, reports, strict=True)]
    pairs = itertools.combinations(range(len(reports)), 2)
    measured = [read_measured(*one) for one in zip(folders, reports, results, strict=True)]
    return {
        "runs": reports,
        "pairs": [
            {
                **_pair(reports[i], reports[j], results[i], results[j]),
                "tasks": task_differences(folders[i], folders[j], reports[i], reports[j]),
            }
            for i, j in pairs
        ],
        "envelope": envelope(measured),
    }


def _names(folders: list[Path]) -> list[str]:
    """The shortest endings of the paths that tell the runs apart: "bam", or "seed-1/bam" where needed."""
    longest = max(len(folder.parts) for folder in folders)
    for length in range(1, longest):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _result(folder: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The score entries of a run's newest merged model, with what they hold document by document."""
    iteration = report["status"]["measured_iteration"]
    evaluation = read_record(iteration_folder(folder, iteration) / "eval.json") if iteration else None
    return [] if evaluation is None else list(evaluation["scores"])


def _pair(
    a: dict[str, Any], b: dict[str, Any], a_scores: list[dict[str, Any]], b_scores: list[dict[str, Any]]
) -> dict[str, Any]:
    reasons = reasons_against(a, b)
    first, second = a["summary"], b["summary"]
    # The base's own scores cancel: the error of the difference in learning is that of the two results.
    errors = {role: difference_error(a_scores, b_scores, role) for role in ROLES}
    pair = {
        "a": a["name"],
        "b": b["name"],
        "learned_difference": _minus(first["learned"], second["learned"]),
        "learned_difference_stderr": errors["target"][0],
        "forgotten_difference": _minus(first["forgotten"], second["forgotten"]),
        "forgotten_difference_stderr": errors["source"][0],
        "paired_stderr": errors["target"][1],
        "target_after_difference": _minus(first["target_after"], second["target_after"]),
        "source_after_difference": _minus(first["source_after"], second["source_after"]),
        "delta_norm_ratio": _over(first["delta_norm"], second["delta_norm"]),
        "wall_seconds_ratio": _over(a["cost"]["wall_seconds"], b["cost"]["wall_seconds"]),
        "comparable": not reasons,
        "reasons": reasons,
    }
    learning, forgetting = pair["learned_difference"], pair["forgotten_difference"]
    return {
        **pair,
        "learned_more": None if reasons else _winner(learning, errors["target"][0]),
        "forgot_less": None if reasons else _winner(None if forgetting is None else -forgetting, errors["source"][0]),
    }


def _winner(difference: float | None, stderr: float | None) -> str | None:
    """Whose number is larger, as far as noise lets one say."""
    if difference is None:
        return None
    if difference == 0:
        return "tie"
    if stderr is None:
        return "unknown"
    if abs(difference) < NOISE_FACTOR * stderr:
        return "tie"
    return "a" if difference > 0 else "b"


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
