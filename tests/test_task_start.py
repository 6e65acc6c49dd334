"""What is said of a recipe's tasks before anything that takes long."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import GERMAN, write_jsonl
from task_kinds import write_task
from test_task_scores import TASKS, recipe

from bam_lora.errors import UserError
from bam_lora.loop import run

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(folder / "german.jsonl", GERMAN[:24])
    write_jsonl(folder / "german.test.jsonl", GERMAN[-3:])
    write_task(folder, "german")
    write_task(folder, "english")
    return folder


def test_a_task_that_is_not_there_stops_a_run_before_it_prepares_anything(
    tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: expected a task in YAML"):
        run(recipe(tiny_base, files, [*TASKS, "nowhere.yaml"]), tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.json").exists()
    assert not (tmp_path / "run" / "data").exists()


def test_check_says_what_the_tasks_are(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    from bam_lora.check import check_recipe

    path = write_jsonl(tmp_path / "own.jsonl", GERMAN[:24])
    wanted = recipe(tiny_base, files, [*TASKS, {"task": "what_german.yaml", "num_fewshot": 2}]).model_copy(
        update={"output": str(tmp_path / path.stem)}
    )
    lines = [line for line in check_recipe(wanted).splitlines() if line.startswith("task ")]
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "what_german: 15 documents, 0-shot, multiple_choice",
        "what_english: 12 of 15 documents, 0-shot, multiple_choice",
        "what_german: 15 documents, 2-shot, multiple_choice",
    ]
