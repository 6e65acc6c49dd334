"""Runs whose slices are of one language each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl

from bam_lora.check import check_recipe
from bam_lora.errors import UserError
from bam_lora.loop import run
from bam_lora.packing import load_rows
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report.html import render_html
from bam_lora.status import describe_run
from bam_lora.store import hash_file, read_record


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "german.jsonl", GERMAN[:12])
    write_jsonl(folder / "english.jsonl", ENGLISH[:12])
    write_jsonl(folder / "replay.jsonl", ENGLISH[12:30])
    write_jsonl(folder / "more.jsonl", GERMAN[12:16])
    write_jsonl(folder / "german.test.jsonl", GERMAN[-2:])
    mixed = [(text, "de") for text in GERMAN[:8]] + [(text, "en") for text in ENGLISH[:8]]
    (folder / "mixed.jsonl").write_text(
        "".join(json.dumps({"text": text, "language": name}) + "\n" for text, name in mixed)
    )
    return folder


def recipe(base: Path, files: Path, names: tuple[str, ...] = ("german", "english"), **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "base": str(base),
        "output": "unused",
        "data": {
            "target": [{"path": str(files / f"{name}.jsonl")} for name in names],
            "replay": [{"path": str(files / "replay.jsonl")}],
            "replay_share": 0.1,
            "sequence_length": 64,
            "slicing": "by_dataset",
        },
        "bam": {"slices": 4, "branches": 2},
        "lora": {"r": 2},
        "training": {"gradient_accumulation_steps": 1, "checkpointing": False, "warmup_steps": 0},
        "quantization": {"bits": 16},
        "evaluation": {"target": [{"path": str(files / "german.test.jsonl")}], "precision": "16bit"},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def finished(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "finished"
    run(recipe(tiny_base, files), root)
    return root


def test_each_iteration_merges_one_branch_of_each_language(finished: Path) -> None:
    plan = read_record(finished / "plan.json")
    assert plan is not None
    groups = [[branch["group"] for branch in iteration["branches"]] for iteration in plan["iterations"]]
    assert groups == [["german", "english"], ["german", "english"]]
    branches = [branch for iteration in plan["iterations"] for branch in iteration["branches"]]
    used = {(Path(s["path"]).stem, s["role"]): s["used_tokens"] for s in plan["data"]["sources"]}
    for name in ("german", "english"):
        assert sum(b["target_tokens"] for b in branches if b["group"] == name) == used[name, "target"]
    assert sum(b["replay_tokens"] for b in branches) == used["replay", "replay"] == plan["data"]["replay_tokens"]
    for branch in branches:
        total = branch["target_tokens"] + branch["replay_tokens"]
        assert abs(branch["replay_tokens"] - 0.1 * total) <= max(1, 0.01 * total)
        rows = load_rows(finished / "data" / "01", tuple(branch["rows"]))["input_ids"]
        assert sum(map(len, rows)) == total


def test_the_report_names_the_languages(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert [branch["group"] for branch in report["iterations"][0]["branches"]] == ["german", "english"]
    page = render_html([report], None)
    assert "iteration 1, branch 2 (english)" in page
    assert "german, english" in page


def test_status_names_the_language_under_way(finished: Path, tmp_path: Path) -> None:
    from bam_lora.store import seal

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "iterations" / "02" / "branch-2")
    checkpoint = copy / "iterations" / "02" / "branch-2" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    seal(checkpoint, "key", {})
    assert "under way  iteration 2, branch 2 (english): step 1 of" in describe_run(copy)


def test_a_plan_without_groups_still_loads(finished: Path, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    from bam_lora.plan import Plan

    plan = read_record(finished / "plan.json")
    assert plan is not None
    for iteration in plan["iterations"]:
        for branch in iteration["branches"]:
            del branch["group"]
    assert {branch.group for branch in Plan.from_json(plan).all_branches()} == {None}


def test_an_extension_gives_turns_to_those_with_text_left(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    longer = recipe(tiny_base, files, ("german", "english", "more"), bam={"slices": 5})
    run(longer, copy, extend=True)
    plan = read_record(copy / "plan.json")
    assert plan is not None
    assert [branch["group"] for branch in plan["iterations"][2]["branches"]] == ["more"]
    shutil.rmtree(copy / "data" / "02")  # made again, the same
    shutil.rmtree(copy / "iterations" / "03" / "branch-1")
    before = hash_file(copy / "model" / "model.safetensors")
    shutil.rmtree(copy / "model")
    run(longer, copy)
    assert hash_file(copy / "model" / "model.safetensors") == before


def test_by_column_trains_the_same_way(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    data = {"slicing": "by_column", "slicing_column": "language", "replay": [], "replay_share": 0.0}
    chosen = recipe(tiny_base, files, ("mixed",), data={**data, "target": [{"path": str(files / "mixed.jsonl")}]},
                    bam={"slices": 2})  # fmt: skip
    assert "language de at its start" in check_recipe(chosen) or "language de, en" in check_recipe(chosen)
    report = run(chosen, tmp_path / "run")
    assert [branch["group"] for branch in report["iterations"][0]["branches"]] == ["de", "en"]
    assert report["data"]["sources"][0]["groups"] == ["de", "en"]


def test_a_single_run_has_no_groups(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    report = run(recipe(tiny_base, files, strategy="single"), tmp_path / "run")
    assert [[b["group"] for b in one["branches"]] for one in report["iterations"]] == [[None]]


def test_slices_that_do_not_go_round_are_refused_before_any_text_is_read(
    tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    chosen = recipe(tiny_base, files, bam={"slices": 3})
    words = r"bam\.slices: expected a multiple of 2, .*\(german, english\), found 3"
    with pytest.raises(UserError, match=words):
        check_recipe(chosen)
    with pytest.raises(UserError, match=words):
        run(chosen, tmp_path / "run")
    assert not (tmp_path / "run" / "data" / "01-tokens").exists()
