"""What the report makes of the scores of several models on one task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bam_lora.report.tasks import read_tasks
from bam_lora.store import write_record

WANTED = {"task": "exam", "num_fewshot": 0, "limit": None}
RECIPE = {"evaluation": {"tasks": [WANTED]}}


def write_scores(run: Path, values: dict[int, float], **others: dict[int, Any]) -> None:
    """The record of each model; `others` are values of single models that differ from the rest."""
    for number, value in values.items():
        score = {
            "task": "exam", "metric": "acc", "value": value, "stderr": 0.1, "higher_is_better": True, "documents": 4,
            "num_fewshot": 0, "version": "1", "per_document": None,
        }  # fmt: skip
        facts = {"role": None, "limit": None, "precision": "4bit", "truncated": 0, "harness": "0.4", "content": "a"}
        own = {key: of[number] for key, of in others.items() if number in of}
        entry = {**facts, **own, "wanted": WANTED, "results": [score]}
        write_record(run / "iterations" / f"{number:02}" / "tasks.json", "tasks", {"format": 1, "tasks": [entry]})


@pytest.mark.parametrize("what", ["content", "harness", "precision"])
def test_scores_by_another_task_file_or_harness_are_not_set_beside_the_newest(tmp_path: Path, what: str) -> None:
    planned = [{"iteration": 1}, {"iteration": 2}]
    write_scores(tmp_path, {0: 0.25, 1: 0.5, 2: 0.75})
    (entry,) = read_tasks(tmp_path, planned, RECIPE)
    assert [one["iteration"] for one in entry["iterations"]] == [0, 1, 2]
    assert entry["difference"] == 0.5
    write_scores(tmp_path, {0: 0.25, 1: 0.5, 2: 0.75}, **{what: {1: "before"}})
    (entry,) = read_tasks(tmp_path, planned, RECIPE)
    assert [one["iteration"] for one in entry["iterations"]] == [0, 2]
    assert entry["difference"] == 0.5
    write_scores(tmp_path, {0: 0.25, 1: 0.5, 2: 0.75}, **{what: {0: "before", 1: "before"}})
    (entry,) = read_tasks(tmp_path, planned, RECIPE)
    assert (entry["base"], entry["result"], entry["difference"]) == (None, 0.75, None)
