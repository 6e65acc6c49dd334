"""Benchmarks in a run: base and result, in the report, once each, going on where it was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from task_kinds import write_task
from typer.testing import CliRunner

import bam_lora.task_scores as task_scores
from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.cli import app
from bam_lora.errors import Interrupted, UserError
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report import compare, render_html, render_text, write_report
from bam_lora.store import read_record, write_record

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(folder / "german.jsonl", GERMAN[:24])
    write_jsonl(folder / "english.jsonl", ENGLISH[:24])
    write_jsonl(folder / "german.test.jsonl", GERMAN[-3:])
    write_task(folder, "german")
    write_task(folder, "english")
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No test sees the scores of another, or the user's."""
    monkeypatch.setenv("BAM_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tasks"


TASKS = [{"task": "what_german.yaml", "role": "target"}, {"task": "what_english.yaml", "role": "source", "limit": 12}]


def recipe(base: Path, files: Path, tasks: list[Any], **evaluation: Any) -> Recipe:
    values: dict[str, Any] = {
        "base": str(base),
        "output": "unused",
        "data": {"target": [{"path": "german.jsonl"}], "sequence_length": 64},
        "bam": {"slices": 2, "branches": 1},
        "lora": {"r": 4},
        "training": {
            "learning_rate": 2e-2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "checkpointing": False,
        },
        "evaluation": {
            "target": [{"path": "german.test.jsonl", "set": "german"}], "tasks": tasks, "branches": False, **evaluation,
        },
    }  # fmt: skip
    return recipe_from_dict(values, folder=files)


@pytest.fixture(scope="module")
def finished(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has done both tasks at its ends; never touched."""
    root = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAM_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        run(recipe(tiny_base, files, TASKS), root)
    return root


def report_of(root: Path) -> dict[str, Any]:
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    assert isinstance(report, dict)
    return report


def test_base_and_result_are_in_the_report(finished: Path) -> None:
    entries = report_of(finished)["tasks"]
    names = [(one["task"], one["role"], one["metric"], one["documents"]) for one in entries]
    assert names == [
        ("what_german", "target", "acc", 15), ("what_german", "target", "acc_norm", 15),
        ("what_english", "source", "acc", 12), ("what_english", "source", "acc_norm", 12),
    ]  # fmt: skip
    for one in entries:
        assert (one["precision"], one["num_fewshot"], one["iteration"], one["higher_is_better"]) == ("4bit", 0, 2, True)
        assert one["difference"] == pytest.approx(one["result"] - one["base"])
        assert one["paired_stderr"] is True
        assert [each["iteration"] for each in one["iterations"]] == [0, 2]
    assert any(one["difference"] != 0 for one in entries), "the run has changed nothing: the test shows too little"


def test_page_terminal_and_card_show_the_numbers_of_the_report(finished: Path) -> None:
    report = report_of(finished)
    page = (finished / "report.html").read_text(encoding="utf-8")
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    text = render_text([report], None)
    for one in report["tasks"]:
        shown = f"{one['result']:.4f} ± {one['result_stderr']:.4f}"
        for place in (page, text, card):
            assert one["task"] in place.replace("\\_", "_")
        assert f'<data value="{one["result"]}">' in page
        assert shown in text
        assert shown in card
    front = card.split("---")[1]
    assert "model-index:" in front
    assert "type: acc_norm" in front


def test_error_of_the_difference_is_taken_by_document(finished: Path) -> None:
    for entry in report_of(finished)["tasks"]:
        values = []
        for number in (0, 2):
            record = read_record(finished / f"iterations/{number:02}/tasks.json")
            assert record is not None
            scores = [one for task in record["tasks"] for one in task["results"]]
            values += [
                s["per_document"] for s in scores if (s["task"], s["metric"]) == (entry["task"], entry["metric"])
            ]
        changes = np.array(values[1]) - np.array(values[0])
        assert entry["difference"] == pytest.approx(changes.mean())
        assert entry["difference_stderr"] == pytest.approx(changes.std(ddof=1) / np.sqrt(len(changes)))


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("scored again")


@pytest.fixture
def untold(finished: Path, tmp_path: Path) -> Path:
    """The same run before it did any task."""
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / "iterations").glob("*/tasks.json"):
        path.unlink()
    return tmp_path / "run"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that are done from now on, in their order; "stop" in the list stops at the next one."""
    done: list[str] = []
    real = task_scores.score_task

    def counted(model: Any, tokenizer: Any, found: Any, **kwargs: Any) -> Any:
        if done and done[-1] == "stop":
            done.append("stopped")
            raise Interrupted("SIGTERM")
        done.append(found.name)
        return real(model, tokenizer, found, **kwargs)

    monkeypatch.setattr(task_scores, "score_task", counted)
    return done


def test_runs_take_the_base_s_scores_from_the_cache(
    untold: Path, tiny_base: Path, files: Path, cache: Path, calls: list[str]
) -> None:
    wanted = recipe(tiny_base, files, TASKS[:1])
    loaded, tokenizer = load_model(tiny_base, Loading(4)), load_tokenizer(tiny_base)
    base = task_scores.BaseFiles(str(tiny_base), tiny_base, None)
    specs = task_scores.task_specs(wanted)

    def score(how: Loading) -> Any:
        return task_scores.score_model_tasks(str(tiny_base), base, loaded, tokenizer, how, specs)

    first = score(Loading(4))
    assert score(Loading(4)) == first
    assert calls == ["what_german"]
    assert len(list(cache.glob("*.json"))) == 1
    score(Loading(16))  # held otherwise it is another score
    assert calls == ["what_german"] * 2
    run(wanted, untold)  # the base's come from the cache, the result's are new
    assert calls == ["what_german"] * 3
    shutil.rmtree(cache)
    run(wanted, untold)  # a finished run is left alone, and keeps its own
    assert len(calls) == 3
    (untold / "iterations" / "02" / "tasks.json").write_text("{", encoding="utf-8")
    run(wanted, untold)  # what is damaged is made again, no more than that
    assert len(calls) == 4


def test_tasks_can_be_added_to_a_finished_run_and_only_they_are_done(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import bam_lora.stages as stages

    again = tmp_path / "run"
    shutil.copytree(finished, again)
    (again / "shrink.json").write_bytes(b"kept as it is")
    for name in ("train_branch", "score_sets", "fold_into"):
        monkeypatch.setattr(stages, name, never)
    write_task(tmp_path, "english", name="more", count=4)
    with pytest.raises(UserError, match="shrink"):  # the report reads it; the point is that it was not deleted
        run(recipe(tiny_base, files, [*TASKS, str(tmp_path / "more.yaml")]), again)
    (again / "shrink.json").unlink()
    assert calls == ["more", "more"]
    names = [one["task"] for one in write_report(again)["tasks"]]
    assert names == ["what_german"] * 2 + ["what_english"] * 2 + ["more"] * 2
    write_task(tmp_path, "english", name="more", count=5)  # put right since
    run(recipe(tiny_base, files, [*TASKS, {"task": str(tmp_path / "more.yaml"), "role": "source"}]), again)
    assert calls == ["more"] * 4
    assert [one["documents"] for one in report_of(again)["tasks"]] == [15, 15, 12, 12, 5, 5]
    run(
        recipe(tiny_base, files, [*TASKS, str(tmp_path / "more.yaml")]), again
    )  # to say something else of it is no work
    assert calls == ["more"] * 4
    assert report_of(again)["tasks"][-1]["role"] is None


def test_every_merged_model_does_them_where_the_recipe_says_so(
    untold: Path, tiny_base: Path, files: Path, calls: list[str]
) -> None:
    run(recipe(tiny_base, files, TASKS[1:], task_when="iterations"), untold)
    assert calls == ["what_english"] * 3
    entries = report_of(untold)["tasks"]
    assert [[each["iteration"] for each in one["iterations"]] for one in entries] == [[0, 1, 2]] * 2


def test_a_stopped_run_goes_on_with_the_next_task(
    untold: Path, finished: Path, tiny_base: Path, files: Path, cache: Path, calls: list[str]
) -> None:
    wanted = recipe(tiny_base, files, TASKS)
    real = task_scores.task_line

    def stop_after(scores: Any) -> str:
        calls.append("stop")
        return real(scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_scores, "task_line", stop_after)
        with pytest.raises(Interrupted):
            run(wanted, untold)
    shutil.rmtree(cache)  # so that it can only go on with what the run itself has
    run(wanted, untold)
    assert calls == ["what_german", "stop", "stopped", "what_english", "what_german", "what_english"]
    keys = ("task", "metric", "base", "result", "difference_stderr")
    resumed, straight = ([{k: e[k] for k in keys} for e in report_of(r)["tasks"]] for r in (untold, finished))
    assert resumed == straight


def test_what_is_trained_does_not_depend_on_tasks(finished: Path, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    run(recipe(tiny_base, files, []), tmp_path / "run")
    assert report_of(tmp_path / "run")["tasks"] == []
    with_tasks, without = ((root / "model" / "model.safetensors").read_bytes() for root in (finished, tmp_path / "run"))
    assert with_tasks == without


def test_compare_sets_tasks_side_by_side(finished: Path, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    comparison = compare([finished, other])
    (pair,) = comparison["pairs"]
    assert [(one["task"], one["metric"], one["difference"], one["stderr"]) for one in pair["tasks"]] == [
        (one["task"], one["metric"], 0.0, 0.0) for one in report_of(finished)["tasks"]
    ]
    text, page = render_text(comparison["runs"], comparison), render_html(comparison["runs"], comparison)
    for place in (text, page):
        assert "Differences on tasks" in place
        assert "what_english" in place
    place = other / "iterations" / "02" / "tasks.json"
    record = read_record(place)
    assert record is not None
    for one in record["tasks"]:
        one["precision"] = "16bit"
    write_record(place, "tasks", {key: value for key, value in record.items() if key != "key"})
    (pair,) = compare([finished, other])["pairs"]
    assert {(one["difference"], one["reason"]) for one in pair["tasks"]} == {(None, "other precision")}


def test_eval_scores_a_model_on_tasks_alone(tiny_base: Path, files: Path, cache: Path) -> None:
    named = ",".join(str(files / f"what_{language}.yaml") for language in ("german", "english"))
    asked = ["eval", str(tiny_base), "--tasks", named, "--limit", "5", "--precision", "16bit"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "what_german" in result.stdout
    assert "acc_norm" in result.stdout
    assert len(list(cache.glob("*.json"))) == 2
    value = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert value["scores"] == []
    assert [task["name"] for task in value["tasks"]] == ["what_german", "what_english"]
    assert value["tasks"][0]["results"][0]["documents"] == 5
