"""Benchmarks by lm-evaluation-harness: on base and result of a run, once each, with the numbers of a plain loop."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from task_kinds import documents, write_task
from typer.testing import CliRunner

import bam_lora.task_scores as task_scores
from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.cli import app
from bam_lora.errors import Interrupted, UserError
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report import compare, render_html, render_text, write_report
from bam_lora.store import read_record
from bam_lora.tasks import TaskSpec, find_tasks, score_task

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


@pytest.mark.parametrize("language", ["german", "english"])
def test_accuracy_is_that_of_a_plain_loop(language: str, tiny_base: Path, files: Path) -> None:
    """acc: the likeliest ending; acc_norm: the likeliest for its length in characters. One text at a time, float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for one in documents(language, 15):
        totals = []
        for choice in one["choices"]:  # type: ignore[attr-defined]
            before = tokenizer(one["question"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{one['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = torch.log_softmax(plain(ids).logits[0].double(), dim=-1)
            totals.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(len(before), ids.shape[1])))
        lengths = [len(choice) for choice in one["choices"]]  # type: ignore[attr-defined]
        right["acc"].append(float(np.argmax(totals) == one["label"]))
        right["acc_norm"].append(float(np.argmax(np.array(totals) / lengths) == one["label"]))
    found = find_tasks([TaskSpec(str(files / f"what_{language}.yaml"))])[0]
    model = load_model(tiny_base, Loading(16, compute_dtype="float32"))
    scores = score_task(model, tokenizer, found, batch_size=4, dtype="float32")
    assert {one["metric"]: one["per_document"] for one in scores["results"]} == right
    for one in scores["results"]:
        count = len(right[one["metric"]])
        assert one["value"] == pytest.approx(np.mean(right[one["metric"]]))
        assert one["stderr"] == pytest.approx(np.std(right[one["metric"]], ddof=1) / np.sqrt(count))
        assert (one["documents"], one["num_fewshot"]) == (15, 0)
    assert scores["truncated"] == 0


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("scored again")


def test_another_run_takes_the_base_s_scores_from_the_cache(
    tiny_base: Path, files: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tiny_base, files, TASKS[:1])
    loaded = load_model(tiny_base, Loading(4))
    base = task_scores.BaseFiles(str(tiny_base), tiny_base, None)
    tokenizer = load_tokenizer(tiny_base)
    specs = task_scores.task_specs(wanted)

    def score(precision: Loading) -> Any:
        return task_scores.score_model_tasks(str(tiny_base), base, loaded, tokenizer, precision, specs)

    first = score(Loading(4))
    assert len(list(cache.glob("*.json"))) == 1
    calls: list[str] = []
    real = task_scores.score_task

    def counted(model: Any, tokenizer: Any, found: Any, **kwargs: Any) -> Any:
        calls.append(found.name)
        return real(model, tokenizer, found, **kwargs)

    monkeypatch.setattr(task_scores, "score_task", counted)
    assert score(Loading(4)) == first
    assert not calls
    score(Loading(16))  # another precision is another score
    assert calls == ["what_german"]
    run(wanted, tmp_path / "run")  # the base's come from the cache, the result's are new
    assert calls == ["what_german"] * 2
    shutil.rmtree(cache)
    run(wanted, tmp_path / "run")  # a finished run is left alone, and keeps its own
    assert len(calls) == 2


def test_tasks_can_be_added_to_a_finished_run_and_only_they_are_done(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bam_lora.stages as stages

    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "shrink.json").write_bytes(b"kept as it is")
    monkeypatch.setattr(stages, "train_branch", never)
    monkeypatch.setattr(stages, "score_sets", never)
    calls: list[str] = []
    real = task_scores.score_task

    def counted(model: Any, tokenizer: Any, found: Any, **kwargs: Any) -> Any:
        calls.append(found.name)
        return real(model, tokenizer, found, **kwargs)

    monkeypatch.setattr(task_scores, "score_task", counted)
    write_task(tmp_path, "english", name="more", count=4)
    with pytest.raises(UserError, match="shrink"):  # the report reads it; the point is that it was not deleted
        run(recipe(tiny_base, files, [*TASKS, str(tmp_path / "more.yaml")]), copy)
    (copy / "shrink.json").unlink()
    assert calls == ["more", "more"]
    report = write_report(copy)
    assert [one["task"] for one in report["tasks"]] == ["what_german"] * 2 + ["what_english"] * 2 + ["more"] * 2
    run(recipe(tiny_base, files, TASKS[1:], task_when="iterations"), copy)
    assert calls == ["more", "more", "what_english"]  # the iteration between
    entries = report_of(copy)["tasks"]
    assert [[each["iteration"] for each in one["iterations"]] for one in entries] == [[0, 1, 2]] * 2


def test_a_stopped_run_goes_on_with_the_next_task(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = task_scores.score_task

    def stopping(model: Any, tokenizer: Any, found: Any, **kwargs: Any) -> Any:
        if len(calls) == 1:
            calls.append("stopped")
            raise Interrupted("SIGTERM")
        calls.append(found.name)
        return real(model, tokenizer, found, **kwargs)

    monkeypatch.setattr(task_scores, "score_task", stopping)
    with pytest.raises(Interrupted):
        run(recipe(tiny_base, files, TASKS), tmp_path / "run")
    shutil.rmtree(cache)  # so that it can only go on with what the run itself has
    run(recipe(tiny_base, files, TASKS), tmp_path / "run")
    assert calls == ["what_german", "stopped", "what_english", "what_german", "what_english"]
    keys = ("task", "metric", "base", "result", "difference_stderr")
    resumed, straight = ([{k: e[k] for k in keys} for e in report_of(r)["tasks"]] for r in (tmp_path / "run", finished))
    assert resumed == straight


def test_what_is_trained_does_not_depend_on_tasks(finished: Path, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    run(recipe(tiny_base, files, []), tmp_path / "run")
    assert report_of(tmp_path / "run")["tasks"] == []
    with_tasks, without = ((root / "model" / "model.safetensors").read_bytes() for root in (finished, tmp_path / "run"))
    assert with_tasks == without


def test_scoring_leaves_tokenizer_and_generators_as_they_were(tiny_base: Path, files: Path) -> None:
    import torch

    tokenizer = load_tokenizer(tiny_base)
    tokenizer.pad_token = None
    model = load_model(tiny_base, Loading(16))
    found = find_tasks([TaskSpec(str(files / "what_german.yaml"), limit=2)])[0]
    torch.manual_seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    seen: list[tuple[int, int]] = []
    score_task(
        model, tokenizer, found, batch_size=4, dtype="bfloat16", on_progress=lambda done, of: seen.append((done, of))
    )
    assert tokenizer.pad_token is None
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert after == states
    assert seen[0] == (4, 6)
    assert seen[-1] == (6, 6)


def test_prompts_longer_than_the_context_are_counted(tiny_base: Path, files: Path) -> None:
    model, tokenizer = load_model(tiny_base, Loading(16)), load_tokenizer(tiny_base)
    found = find_tasks([TaskSpec(str(files / "what_german.yaml"), limit=3, num_fewshot=4)])[0]
    scores = score_task(model, tokenizer, found, batch_size=4, dtype="float32")
    assert scores["truncated"] == 9
    assert scores["results"][0]["num_fewshot"] == 4
    assert "9 prompts were cut" in task_scores.task_line(scores)


def test_conversations_go_through_the_chat_template(tiny_base: Path, files: Path) -> None:
    model, tokenizer = load_model(tiny_base, Loading(16)), load_tokenizer(tiny_base)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    asked: list[str] = []
    real = tokenizer.apply_chat_template

    def asking(messages: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(messages[-1]["content"])
        return real(messages, *args, **kwargs)

    import copy

    found = find_tasks([TaskSpec(str(files / "what_german.yaml"), limit=2)])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "apply_chat_template", lambda self, *a, **k: asking(*a, **k))
        score_task(model, copy.copy(tokenizer), found, batch_size=4, dtype="float32", chat=True)
        score_task(model, copy.copy(tokenizer), found, batch_size=4, dtype="float32")
    assert {text.strip() for text in asked} == {str(one["question"]) for one in documents("german", 2)}


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
