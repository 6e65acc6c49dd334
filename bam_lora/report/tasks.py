"""Benchmarks: what base and result score, how far that may be chance, and two runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.records import iteration_folder, read_record
from bam_lora.report.tables import Cell, Table

Report = Mapping[str, Any]
_FILE = "tasks.json"
_DIGITS = 4


def read_tasks(run: Path, planned: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores of a run's models on the tasks that its recipe names, one entry for each task and metric.

    Returns:
        [{"task", "role", "metric", "higher_is_better", "base", "base_stderr", "result", "result_stderr",
        "difference", "difference_stderr", "paired_stderr", "documents", "num_fewshot", "limit", "precision",
        "truncated", "version", "harness", "content", "iteration", "iterations": [{"iteration", "value", "stderr"}]}].
        `result` is the newest merged model that did the task, `difference` is result minus base; scores by another
        version of the harness or of the task than the newest's are left out.
    """
    numbers = [0, *(item["iteration"] for item in planned)]
    flat = {number: _flat(read_record(iteration_folder(run, number) / _FILE)) for number in numbers}
    wanted = [_wanted(task) for task in (recipe.get("evaluation") or {}).get("tasks") or []]
    keys = list(dict.fromkeys(key for found in flat.values() for key in found))
    keys = [key for one in wanted for key in keys if key[0] == one]
    return [_entry({number: found[key] for number, found in flat.items() if key in found}) for key in keys]


def _wanted(task: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(task.get(key) for key in ("task", "num_fewshot", "limit"))


def _flat(record: Mapping[str, Any] | None) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Every score of one model by what was asked for, task and metric."""
    found = {}
    for asked in record["tasks"] if record else []:
        shared = {key: asked[key] for key in ("role", "limit", "precision", "truncated", "harness", "content")}
        for one in asked["results"]:
            found[_wanted(asked["wanted"]), one["task"], one["metric"]] = {**shared, **one}
    return found


def _entry(every: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    newest = max(every)
    # A task file may have been changed, or the harness renewed, since an earlier model was scored.
    by_iteration = {number: one for number, one in every.items() if _reason(one, every[newest]) is None}
    base = by_iteration.get(0)
    result = by_iteration[newest] if newest else None
    about = by_iteration[newest]
    difference, stderr, paired = difference_of(result, base)
    keys = ("documents", "num_fewshot", "limit", "precision", "truncated", "version", "harness", "content")
    return {
        **{key: about[key] for key in ("task", "role", "metric", "higher_is_better")},
        "base": base and base["value"],
        "base_stderr": base and base["stderr"],
        "result": result and result["value"],
        "result_stderr": result and result["stderr"],
        "difference": difference,
        "difference_stderr": stderr,
        "paired_stderr": paired,
        **{key: about[key] for key in keys},
        "iteration": newest or None,
        "iterations": [
            {"iteration": number, "value": one["value"], "stderr": one["stderr"]}
            for number, one in sorted(by_iteration.items())
        ],
    }


def difference_of(
    first: Mapping[str, Any] | None, second: Mapping[str, Any] | None
) -> tuple[float | None, float | None, bool]:
    """First minus second, its standard error, and whether that was taken document by document.

    Both models answer the same questions, so the error is that of the mean of the differences; where the scores of the
    documents are not kept, the two count as independent, which makes it larger than it is.
    """
    if first is None or second is None:
        return None, None, False
    difference = first["value"] - second["value"]
    pairs = [one.get("per_document") for one in (first, second)]
    if pairs[0] and pairs[1] and len(pairs[0]) == len(pairs[1]) > 1:
        changes = [a - b for a, b in zip(*pairs, strict=True)]
        mean = math.fsum(changes) / len(changes)
        variance = math.fsum((change - mean) ** 2 for change in changes) / (len(changes) - 1)
        return difference, math.sqrt(variance / len(changes)), True
    if first["stderr"] is None or second["stderr"] is None:
        return difference, None, False
    return difference, math.hypot(first["stderr"], second["stderr"]), False


def task_differences(a: Path, b: Path, a_report: Report, b_report: Report) -> list[dict[str, Any]]:
    """What the results of two runs score on the tasks that both did, a minus b.

    Returns:
        [{"task", "metric", "num_fewshot", "limit", "a", "b", "difference", "stderr", "paired_stderr", "reason"}];
        where the two cannot be compared the difference is null and `reason` says why.
    """
    entries = []
    mine, other = (_newest(folder, report) for folder, report in ((a, a_report), (b, b_report)))
    for key, one in mine.items():
        if key not in other:
            continue
        reason = _reason(one, other[key])
        difference, stderr, paired = (None, None, False) if reason else difference_of(one, other[key])
        entries.append(
            {
                **{name: one[name] for name in ("task", "metric", "num_fewshot", "limit")},
                "a": one["value"],
                "b": other[key]["value"],
                "difference": difference,
                "stderr": stderr,
                "paired_stderr": paired,
                "reason": reason,
            }
        )
    return entries


def _newest(run: Path, report: Report) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The scores of a run's newest model on the tasks in its report, by task, metric, examples and limit."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number in sorted({one["iteration"] for one in report["tasks"] if one["iteration"]}):
        for one in _flat(read_record(iteration_folder(run, number) / _FILE)).values():
            found[one["task"], one["metric"], one["num_fewshot"], one["limit"]] = one
    return found


def _reason(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    words = {"precision": "precision", "content": "task file or data", "harness": "version of the harness"}
    for key, word in words.items():
        if a[key] != b[key]:
            return f"other {word}"
    return None


def tasks_table(reports: Sequence[Report]) -> Table:
    """One row a task and metric, for each run."""
    rows = []
    listed = [(report, one) for report in reports for one in report.get("tasks") or []]
    for report, one in listed:
        name = [Cell(report["name"])] if len(reports) > 1 else []
        role = f" ({one['role']})" if one["role"] else ""
        error = "" if one["difference_stderr"] is None else f" ± {one['difference_stderr']:.{_DIGITS}f}"
        change = fmt.signed(one["difference"], _DIGITS) + (error if one["difference"] is not None else "")
        rows.append(
            [
                *name,
                Cell(f"{one['task']}{role}"),
                Cell(one["metric"]),
                *(_score(one[key], one[f"{key}_stderr"]) for key in ("base", "result")),
                Cell(change, one["difference"], number=True),
                *_how(one),
            ]
        )
    columns = [*(["Run"] if len(reports) > 1 else []), "Task", "Metric", "Base", "Result", "Difference"]
    return Table("Tasks", [*columns, "Documents", "Examples"], rows, _note([one for _, one in listed]))


def task_tables(reports: Sequence[Report], comparison: Mapping[str, Any] | None) -> list[Table]:
    """All tables of benchmarks; without rows where there are none."""
    return [tasks_table(reports), *([] if comparison is None else [task_pairs_table(comparison)])]


def _score(value: float | None, stderr: float | None) -> Cell:
    return Cell(fmt.with_error(value, stderr, _DIGITS), value, number=True)


def _how(one: Mapping[str, Any]) -> list[Cell]:
    shots = one["num_fewshot"]
    return [
        Cell(fmt.count(one["documents"]), one["documents"], number=True),
        Cell(fmt.count(shots), shots, number=True),
    ]


def _note(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    precision = " and ".join(dict.fromkeys(one["precision"] for one in entries))
    harness = " and ".join(dict.fromkeys(one["harness"] for one in entries))
    note = f"± one standard error. Measured by lm-evaluation-harness {harness} with {precision} weights."
    if any(one["higher_is_better"] is False for one in entries):
        worse = dict.fromkeys(one["metric"] for one in entries if one["higher_is_better"] is False)
        note += f" More is better, but for {', '.join(worse)}."
    else:
        note += " More is better."
    if any(one["paired_stderr"] for one in entries):
        note += " Errors of differences are taken document by document."
    if cut := sum(max(one["truncated"], 0) for one in {one["task"]: one for one in entries}.values()):
        note += f" {cut:,} prompts were longer than the model’s context and lost their beginning."
    return note


def single_table(tasks: Sequence[Mapping[str, Any]]) -> Table:
    """The scores of one model, as `task_scores.score_model_tasks` gives them: one row a task and metric."""
    rows = [
        [Cell(one["task"]), Cell(one["metric"]), _score(one["value"], one["stderr"]), *_how(one)]
        for task in tasks
        for one in task["results"]
    ]
    cut = sum(task["truncated"] for task in tasks)
    note = f"{cut:,} prompts were longer than the model’s context and lost their beginning." if cut else ""
    return Table("Tasks", ["Task", "Metric", "Score", "Documents", "Examples"], rows, note)


def task_pairs_table(comparison: Mapping[str, Any]) -> Table:
    """One row for every two runs and task that both did: a minus b."""
    rows = []
    for pair in comparison["pairs"]:
        for one in pair.get("tasks") or []:
            error = "" if one["stderr"] is None else f" ± {one['stderr']:.{_DIGITS}f}"
            text = one["reason"] or fmt.signed(one["difference"], _DIGITS) + error
            rows.append(
                [
                    Cell(f"{pair['a']} against {pair['b']}"),
                    Cell(one["task"]),
                    Cell(one["metric"]),
                    Cell(fmt.signless(one["a"], _DIGITS), one["a"], number=True),
                    Cell(fmt.signless(one["b"], _DIGITS), one["b"], number=True),
                    Cell(text, one["difference"], number=True),
                ]
            )
    note = "The first run’s result minus the second’s ± one standard error; less than two of them apart is a tie."
    columns = ["", "Task", "Metric", "First", "Second", "Difference"]
    return Table("Differences on tasks", columns, rows, note)


def model_index(report: Report, name: str) -> list[dict[str, Any]]:
    """The scores as the Hub reads them from a model card's front matter (`model-index`); empty without any."""
    entries = [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"type": one["task"], "name": f"{one['task']} ({_shots(one)})"},
            "metrics": [
                {
                    "type": one["metric"].partition(",")[0],
                    "value": one["result"],
                    "name": f"{one['metric']}, {one['precision']} weights",
                }
            ],
        }
        for one in report.get("tasks") or []
        if one["result"] is not None
    ]
    return [{"name": name, "results": entries}] if entries else []


def _shots(one: Mapping[str, Any]) -> str:
    few = "few-shot" if one["num_fewshot"] is None else f"{one['num_fewshot']}-shot"
    return few + (f", first {one['limit']:,} documents" if one["limit"] else "")
