"""What the harness says of one benchmark -> plain numbers with their errors, document by document where that can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TaskScores = dict[str, Any]


def read_results(
    results: Mapping[str, Any], *, name: str, limit: int | None, harness: str, truncated: int, seconds: float
) -> TaskScores:
    """Takes from the harness's results what is kept.

    Args:
        results: What `simple_evaluate` returned.
        name: What was asked for: a task, a group or a tag.
        limit: Documents of each task at the most.
        harness: Its version.
        truncated: Prompts that were cut to the model's context.
        seconds: Time it took.

    Returns:
        {"name", "limit", "harness", "truncated", "seconds", "results": [{"task", "metric", "value", "stderr",
        "higher_is_better", "documents", "num_fewshot", "version", "per_document"}]}. Of a group whose tasks add up to
        one score that score, else one entry for each task; a metric behind a filter is called "metric, filter".
        `per_document` is null where the score is not the plain mean over documents.
    """
    found = results["results"]
    own = [key for key in found.get(name, {}) if _is_metric(key)]
    names = [name] if own else [one for one in found if one not in results["group_subtasks"]]
    return {
        "name": name,
        "limit": limit,
        "harness": harness,
        "truncated": truncated,
        "seconds": seconds,
        "results": [entry for one in names for entry in _entries(results, one)],
    }


def _is_metric(key: str) -> bool:
    return "," in key and not key.partition(",")[0].endswith("_stderr")


def _entries(results: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    values = results["results"][task]
    entries = []
    for key in values:
        if not _is_metric(key) or not _is_finite(values[key]):
            continue
        metric, _, by = key.partition(",")
        stderr = values.get(f"{metric}_stderr,{by}")
        better = results["higher_is_better"].get(task, {}).get(metric)
        entries.append(
            {
                "task": task,
                "metric": metric if by == "none" else f"{metric}, {by}",
                "value": float(values[key]),
                "stderr": float(stderr) if _is_finite(stderr) else None,
                "higher_is_better": better if better is None else bool(better),
                "documents": int(values["sample_len"]),
                "num_fewshot": _shots(results, task),
                "version": str(results["versions"].get(task)),
                "per_document": _per_document(results["samples"].get(task, []), metric, by, float(values[key])),
            }
        )
    return entries


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shots(results: Mapping[str, Any], task: str) -> int | None:
    """Examples before a question; null for a group whose tasks differ."""
    shots = results["n-shot"]
    below = [shots[one] for one in results["group_subtasks"].get(task, []) if one in shots]
    own = shots.get(task)
    if own is None:
        return int(below[0]) if below and len(set(below)) == 1 else None
    return int(own)


def _per_document(samples: Sequence[Mapping[str, Any]], metric: str, by: str, value: float) -> list[float] | None:
    chosen = sorted(
        (one for one in samples if one["filter"] == by and metric in one), key=lambda one: int(one["doc_id"])
    )
    numbers = [one[metric] for one in chosen]
    if not numbers or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        return None
    mean = math.fsum(numbers) / len(numbers)
    return [float(number) for number in numbers] if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12) else None
