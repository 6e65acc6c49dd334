"""Task files and names: what is read, what is refused, and with which words."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from task_kinds import TASK, write_task

import bam_lora.tasks as tasks
from bam_lora.errors import UserError
from bam_lora.recipe import recipe_from_dict
from bam_lora.task_files import read_task_file
from bam_lora.tasks import TaskSpec, describe_task, find_tasks, harness_version, require_known

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
EVALUATION_PAGE = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md"


def changed(tmp_path: Path, before: str, after: str) -> Path:
    assert before in TASK
    return write_task(tmp_path, "german", count=4, text=TASK.replace(before, after))


def test_python_of_a_task_file_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("raise SystemExit('this was run')", encoding="utf-8")
    path = changed(tmp_path, "doc_to_target: label", "doc_to_target: !function utils.answer")
    with pytest.raises(UserError, match=r"expected a task without Python.*found !function utils\.answer in line 9\."):
        find_tasks([TaskSpec(str(path))])
    outer = tmp_path / "outer.yaml"
    outer.write_text("include: what_german.yaml\ntask: outer\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"what_german\.yaml: expected a task without Python"):
        read_task_file(outer)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("test_split: test\ncustom_dataset: x", "without code of its own, found custom_dataset"),
        ("test_split: test\nclass: os.system", "without code of its own, found class"),
        ("test_split: test\nunsafe_code: true", "without code of its own, found unsafe_code"),
        (
            "test_split: test\ndataset_path: pandas",
            "expected data that run no code when they are opened, found pickled",
        ),
        ("test_split: test\nother: !!python/name:os.system", "expected YAML of plain values"),
        ("test_split: [test", "expected YAML of plain values"),
    ],
)
def test_other_ways_to_run_code_are_refused(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_task_file(changed(tmp_path, "test_split: test", line))


def test_code_from_elsewhere_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, "dataset_kwargs:\n", "dataset_kwargs:\n  trust_remote_code: true\n")
    with pytest.raises(UserError, match=r"found trust_remote_code: true\. Code from elsewhere is not run"):
        read_task_file(path)
    path = changed(tmp_path, "metric: acc,", "metric: acc, hf_evaluate: true,")
    with pytest.raises(UserError, match="expected a metric that the harness has itself"):
        read_task_file(path)
    path = changed(tmp_path, "metric: acc,", "metric: acc_nrom,")
    with pytest.raises(UserError, match=r"metric 'acc_nrom': expected a metric of lm-eval's own.*acc_norm"):
        describe_task(find_tasks([TaskSpec(str(path))])[0])


def test_templates_cannot_reach_into_python(tmp_path: Path) -> None:
    inner = "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}"
    path = changed(tmp_path, "{{{{question}}}}", inner)
    with pytest.raises(UserError, match=r"task 'what_german': expected one that can be done, found SecurityError"):
        describe_task(find_tasks([TaskSpec(str(path))])[0])
    import lm_eval.utils

    assert type(lm_eval.utils.env).__name__ == "Environment"  # as it was: only task files are held apart


def test_files_are_relative_to_the_task_file_and_count_by_content(tmp_path: Path) -> None:
    first = read_task_file(write_task(tmp_path / "a", "german", count=4))
    same = read_task_file(write_task(tmp_path / "b", "german", count=4))
    other = read_task_file(write_task(tmp_path / "c", "german", count=5))
    assert first.config["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "a" / "what_german.jsonl")}
    assert first.content == same.content != other.content
    keys = {
        find_tasks([TaskSpec(str(tmp_path / folder / "what_german.yaml"), limit=limit)])[0].key("model", {}, None)
        for folder, limit in (("a", None), ("b", None), ("a", 3), ("c", None))
    }
    assert len(keys) == 3
    (found,) = find_tasks([TaskSpec(str(tmp_path / "a" / "what_german.yaml"))])
    asked = [("model", {}, None), ("other", {}, None), ("model", {"bits": 4}, None), ("model", {}, "template")]
    assert len({found.key(*one) for one in asked}) == 4


def test_the_content_of_a_data_set_s_folder_counts(tmp_path: Path) -> None:
    def task(folder: str, count: int) -> Any:
        path = write_task(tmp_path / folder, "german", count=count, text=TASK.replace("json\n", "data\n", 1))
        path.write_text(re.sub(r"dataset_kwargs:\n.*\n", "", path.read_text(encoding="utf-8")), encoding="utf-8")
        (tmp_path / folder / "data").mkdir(exist_ok=True)
        (tmp_path / folder / "what_german.jsonl").replace(tmp_path / folder / "data" / "test.jsonl")
        (found,) = find_tasks([TaskSpec(str(path))])
        assert describe_task(found) == f"what_german: {count} documents, 0-shot, multiple_choice"
        return found

    first, same = task("a", 4), task("b", 4)
    changed = task("a", 5)
    assert first.content == same.content != changed.content


def test_included_values_lie_under_the_file_s_own(tmp_path: Path) -> None:
    write_task(tmp_path / "shared", "german", count=4)
    path = tmp_path / "own.yaml"
    path.write_text("include: shared/what_german.yaml\ntask: own\nnum_fewshot: 1\n", encoding="utf-8")
    (found,) = find_tasks([TaskSpec(str(path))])
    assert describe_task(found) == "own: 4 documents, 1-shot, multiple_choice"
    path.write_text("include: own.yaml\n", encoding="utf-8")
    with pytest.raises(UserError, match="includes that end somewhere, found a circle"):
        read_task_file(path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: expected a task in YAML, found .*No such file"):
        read_task_file(tmp_path / "nothing.yaml")
    path = changed(tmp_path, "test: {name}.jsonl", "test: gone.jsonl")
    with pytest.raises(UserError, match=r"expected data files that are there, found '.*gone\.jsonl'"):
        read_task_file(path)
    path = changed(tmp_path, "dataset_kwargs:\n  data_files: {{test: {name}.jsonl}}\n", "")
    with pytest.raises(UserError, match="expected files for dataset_path: json, found none"):
        read_task_file(path)
    path = changed(tmp_path, "task: {name}", "task: [a, b]")
    with pytest.raises(UserError, match=r"expected one task.*found several\. Write a file for each"):
        read_task_file(path)
    path = changed(tmp_path, "task: {name}", 'task: "a\\e[2J"')
    with pytest.raises(UserError, match=r"expected one task, its name under `task`, found 'a\\x1b"):
        read_task_file(path)
    path = changed(tmp_path, "{{{{question}}}}", "{{{{answers}}}}")
    with pytest.raises(UserError, match=r"'answers' is undefined\. Check the task file and its data"):
        describe_task(find_tasks([TaskSpec(str(path))])[0])
    path = write_task(tmp_path, "german", count=4)
    with pytest.raises(UserError, match="expected each task once with the same num_fewshot and limit, found two"):
        find_tasks([TaskSpec(str(path)), TaskSpec(str(path))])


@pytest.fixture
def small_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks instead of the harness's fourteen thousand, whose files take seconds to read."""
    from lm_eval.tasks import TaskManager

    write_task(tmp_path, "german", count=4, name="belebele_deu_Latn")
    zero = TASK.replace("test_split: test", "test_split: test\nnum_fewshot: 0")
    write_task(tmp_path, "english", count=4, name="fixed", text=zero)
    for path in tmp_path.glob("*.yaml"):
        path.write_text(path.read_text().replace("{test: ", f"{{test: {tmp_path}/"), encoding="utf-8")
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(tasks, "_all_tasks", lambda: manager)


@pytest.mark.usefixtures("small_index")
def test_unknown_names_get_near_ones() -> None:
    (found,) = find_tasks([TaskSpec("belebele_deu_Latin")])
    with pytest.raises(UserError, match=r"no such task in lm-eval [\d.]+\. Nearest: belebele_deu_Latn\."):
        require_known(found)
    with pytest.raises(UserError, match=r"`lm-eval ls tasks` lists them"):
        require_known(find_tasks([TaskSpec("xyz")])[0])


@pytest.mark.usefixtures("small_index")
def test_names_of_the_harness_are_done_as_it_has_them() -> None:
    assert describe_task(find_tasks([TaskSpec("belebele_deu_Latn", 2, 3)])[0]) == (
        "belebele_deu_Latn: 3 of 4 documents, 2-shot, multiple_choice"
    )
    with pytest.raises(UserError, match=r"num_fewshot of task 'fixed': expected 0, which this task sets.*found 5"):
        describe_task(find_tasks([TaskSpec("fixed", 5)])[0])


def test_data_that_are_not_in_the_cache_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    text = TASK.replace("dataset_path: json", "dataset_path: nobody/nothing-of-that-name")
    write_task(tmp_path, "german", name="far", text=re.sub(r"dataset_kwargs:\n.*\n", "", text))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(tasks, "_all_tasks", lambda: manager)
    with pytest.raises(UserError, match=r"task 'far': .*not in the cache: run `bam-lora check` once online"):
        describe_task(find_tasks([TaskSpec("far")])[0])


def test_without_the_harness_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    with pytest.raises(UserError, match=r"pip install 'bam-lora\[eval\]'") as caught:
        find_tasks([TaskSpec("arc_de")])
    assert "\n" not in str(caught.value)


def test_recipe_takes_names_files_and_mappings(tmp_path: Path) -> None:
    values: dict[str, Any] = {"base": str(tmp_path), "output": "run", "data": {"target": [{"path": "a.jsonl"}]}}
    values["evaluation"] = {"tasks": ["arc_de", "own.yaml", {"task": "../b.yml", "num_fewshot": 5, "role": "source"}]}
    found = recipe_from_dict(values, folder=tmp_path / "recipes").evaluation.tasks
    assert [task.task for task in found] == ["arc_de", str(tmp_path / "recipes" / "own.yaml"), str(tmp_path / "b.yml")]
    assert (found[2].num_fewshot, found[2].role, found[0].role) == (5, "source", None)
    values["evaluation"] = {"tasks": [{"task": "arc_de", "shots": 5}]}
    with pytest.raises(UserError, match=r"evaluation\.tasks\.0\.shots: unknown key; did you mean num_fewshot|limit"):
        recipe_from_dict(values)


def test_what_is_used_of_the_harness_is_still_there() -> None:
    """Tells by name what a new version has moved."""
    import lm_eval
    import lm_eval.api.metrics
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.utils
    from lm_eval.api.registry import metric_registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    assert harness_version().startswith("0.4.")
    wanted = {"model", "tasks", "num_fewshot", "limit", "log_samples", "apply_chat_template", "task_manager"}
    assert wanted <= set(inspect.signature(lm_eval.simple_evaluate).parameters)
    wanted = {"pretrained", "backend", "tokenizer", "batch_size", "mixed_precision_dtype"}
    assert wanted <= set(inspect.signature(HFLM.__init__).parameters)
    for name in ("_loglikelihood_tokens", "loglikelihood_rolling", "generate_until", "_model_call", "_model_generate"):
        assert callable(getattr(HFLM, name)), name
    assert "include_defaults" in inspect.signature(TaskManager.__init__).parameters
    assert callable(TaskManager.load)
    assert isinstance(TaskManager.all_tasks, property)
    assert callable(lm_eval.utils.env.from_string)
    assert callable(lm_eval.api.task.tqdm)
    assert callable(lm_eval.evaluator.get_git_commit_hash)
    assert callable(lm_eval.evaluator.add_env_info)
    assert {"acc", "acc_norm", "exact_match"} <= set(metric_registry)


def test_the_task_in_the_documents_works_as_it_stands(tmp_path: Path) -> None:
    text = EVALUATION_PAGE.read_text(encoding="utf-8")
    part = text[text.index("<!-- own task -->") : text.index("<!-- /own task -->")]
    blocks = re.findall(r"```(yaml|json)\n(.*?)```", part, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["yaml", "json"]
    for kind, block in blocks:
        (tmp_path / f"own.{kind.replace('json', 'jsonl')}").write_text(block, encoding="utf-8")
    found = find_tasks([TaskSpec(str(tmp_path / "own.yaml"), num_fewshot=1)])[0]
    assert describe_task(found) == "german_proverbs: 2 documents, 1-shot, multiple_choice"


@pytest.mark.slow
def test_names_in_the_documents_are_the_harness_s() -> None:
    from bam_lora.tasks import _all_tasks

    text = EVALUATION_PAGE.read_text(encoding="utf-8")
    table = text[text.index("<!-- tasks -->") : text.index("<!-- /tasks -->")]
    names = {name for name in re.findall(r"`([\w.-]+)`", table) if not name.endswith((".yaml", ".md"))}
    assert len(names) > 50
    assert names <= set(_all_tasks().all_tasks), names - set(_all_tasks().all_tasks)
    with pytest.raises(UserError, match=r"Nearest: belebele_bul_Cyrl,"):
        require_known(find_tasks([TaskSpec("belebele_bul_Latn")])[0])
