"""The whole loop on a tiny base: what it leaves, what it refuses, how it goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl

from bam_lora.errors import Interrupted, UserError
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.store import hash_file, read_record, write_record


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "german.jsonl", GERMAN[:24])
    write_jsonl(folder / "english.jsonl", ENGLISH[:24])
    write_jsonl(folder / "german.test.jsonl", GERMAN[-3:])
    write_jsonl(folder / "english.test.jsonl", ENGLISH[-3:])
    return folder


def recipe(base: Path, files: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "base": str(base),
        "output": "unused",
        "data": {
            "target": [{"path": str(files / "german.jsonl")}],
            "replay": [{"path": str(files / "english.jsonl")}],
            "replay_share": 0.2,
            "sequence_length": 64,
        },
        "bam": {"slices": 3, "branches": 2},
        "lora": {"r": 4},
        "training": {
            "learning_rate": 5e-3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "checkpointing": False,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "evaluation": {
            "target": [{"path": str(files / "german.test.jsonl"), "set": "german"}],
            "source": [{"path": str(files / "english.test.jsonl"), "set": "english"}],
            "samples": ["Am Morgen"],
        },
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def finished(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end, never touched."""
    root = tmp_path_factory.mktemp("runs") / "finished"
    run(recipe(tiny_base, files), root)
    return root


def test_a_run_keeps_what_it_was_estimated_to_take(finished: Path) -> None:
    estimate = read_record(finished / "environment.json")["estimate"]  # type: ignore[index]
    assert estimate["peak_gpu_bytes"] is None
    whole = {file.stat().st_ino: file.stat().st_size for file in finished.rglob("*") if file.is_file()}
    assert 0.3 < estimate["disk_bytes"] / sum(whole.values()) < 3  # a tiny model beside a megabyte of records
    assert estimate["peak_rss_bytes"] > 600_000_000


def model_hash(root: Path) -> str:
    return hash_file(root / "model" / "model.safetensors")


def test_run_directory_is_as_the_format_says(finished: Path) -> None:
    for name in (
        "recipe.yaml", "plan.json", "environment.json", "ledger.json", "report.json", "report.html",
        "data/01/rows.arrow",
        "iterations/00/eval.json", "iterations/01/branch-1/adapter/adapter_model.safetensors",
        "iterations/01/branch-2/metrics.jsonl", "iterations/01/branch-2/done.json", "iterations/01/merge.json",
        "iterations/01/eval.json", "iterations/02/branch-1/eval.json", "iterations/02/merge.json",
        "model/model.safetensors", "model/tokenizer.json", "model/config.json", "model/README.md",
    ):  # fmt: skip
        assert (finished / name).is_file(), name
    assert not (finished / "iterations" / "01" / "base").exists()
    assert not list(finished.rglob(".tmp-*"))
    merged = read_record(finished / "iterations" / "02" / "merge.json")
    assert merged is not None
    assert merged["weights"] == [1.0]  # a short last group is merged as it is


def test_report_adds_up(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    plan = json.loads((finished / "plan.json").read_text())
    assert report["format"] == 1
    assert report["summary"]["learned"] == pytest.approx(
        report["summary"]["target_before"] - report["summary"]["target_after"]
    )
    assert report["summary"]["forgotten"] == pytest.approx(
        report["summary"]["source_after"] - report["summary"]["source_before"]
    )
    # base, three branches and two merged models, on two sets, all at one precision
    assert len(report["scores"]) == 12
    assert {score["precision"] for score in report["scores"]} == {"4bit"}
    assert report["cost"]["train_tokens"] == plan["data"]["train_tokens"]
    assert report["cost"]["peak_rss_bytes"] > 10**8
    branch = read_record(finished / "iterations" / "01" / "branch-1" / "done.json")
    assert branch is not None
    assert branch["facts"]["linear_modules"] == {"4bit": 14, "8bit": 0, "unquantised": 1}  # the last is the head
    assert 0 < report["summary"]["delta_relative"] < 10


def test_stages_are_timed_and_add_up(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    cost = report["cost"]
    stages, wall = cost["seconds_by_stage"], cost["wall_seconds"]
    assert all(stages[name] > 0 for name in ("data", "load", "train", "evaluate", "merge", "fold"))
    assert sum(stages.values()) == pytest.approx(wall, abs=0.05)
    branches = [branch for item in report["iterations"] for branch in item["branches"]]
    assert stages["train"] >= sum(branch["seconds"] for branch in branches) - 0.05
    again = sum(branch["setup_seconds"] for branch in branches) - max(branch["setup_seconds"] for branch in branches)
    known = again + stages["merge"] + stages["fold"] + stages["other"]
    assert known - 0.05 < cost["loop_overhead"]["seconds"] < known + stages["load"]
    session = read_record(finished / "sessions.json")
    assert session is not None
    assert report["environment"]["attention"] == "packed"
    assert 0 < session["sessions"][0]["first_load_seconds"] < stages["load"]


def test_result_loads_in_plain_transformers_and_is_the_folded_one(finished: Path, tiny_base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    model = AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.bfloat16)
    ids = tokenizer("Am Morgen", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
    assert not hasattr(model.config, "quantization_config")
    # The same by PEFT, in float64: base + ½·Δ1 + ½·Δ2, then + Δ of the second iteration.
    expected = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    original = {name: value.clone() for name, value in expected.state_dict().items()}
    total = {name: torch.zeros_like(value) for name, value in original.items()}
    for path, weight in (("01/branch-1", 0.5), ("01/branch-2", 0.5), ("02/branch-1", 1.0)):
        plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
        adapted = PeftModel.from_pretrained(
            plain, finished / "iterations" / path / "adapter", autocast_adapter_dtype=False
        ).double()
        for name, value in adapted.merge_and_unload().state_dict().items():
            total[name] += weight * (value - original[name])
    for name, value in model.state_dict().items():
        exact = original[name] + total[name]
        assert torch.allclose(value.double(), exact, rtol=2**-8, atol=1e-9), name
        assert (value == exact.float().bfloat16()).float().mean() > 0.999, name


def test_a_finished_run_is_left_alone(finished: Path, tiny_base: Path, files: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    run(recipe(tiny_base, files), finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    "lost",
    [
        "model", "report.json", "iterations/02/merge.json", "iterations/02/branch-1", "iterations/01/eval.json",
        "plan.json", "iterations/02/branch-1/adapter/adapter_model.safetensors", "data/01/rows.arrow", "data/01",
    ],
)  # fmt: skip
def test_whatever_is_lost_is_made_again_the_same(
    lost: str, finished: Path, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    if lost.endswith((".safetensors", ".arrow")):
        data = bytearray((copy / lost).read_bytes())
        data[-1] ^= 1
        (copy / lost).write_bytes(bytes(data))
    elif (copy / lost).is_dir():
        shutil.rmtree(copy / lost)
    else:
        (copy / lost).unlink()
    if "adapter" in lost or "data" in lost:
        shutil.rmtree(copy / "model")
        shutil.rmtree(copy / "iterations" / "02" / "branch-1")
    run(recipe(tiny_base, files), copy)
    assert model_hash(copy) == model_hash(finished)


def test_interrupted_at_every_stage_and_resumed_gives_the_same_bytes(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bam_lora.stages as stages

    calls = {"count": 0, "limit": 0}

    def dying(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls["count"] += 1
            if calls["count"] > calls["limit"]:
                raise Interrupted("SIGTERM")
            return function(*args, **kwargs)

        return wrapped

    for name in ("train_branch", "score_sets", "fold_into", "write_record", "new_folder"):
        monkeypatch.setattr(stages, name, dying(getattr(stages, name)))
    attempts = 0
    while True:
        calls["count"], calls["limit"] = 0, 3
        attempts += 1
        try:
            run(recipe(tiny_base, files), tmp_path / "run")
            break
        except Interrupted:
            assert attempts < 30
    assert attempts > 4
    assert model_hash(tmp_path / "run") == model_hash(finished)


def test_changed_recipe_is_refused_naming_the_keys(finished: Path, tiny_base: Path, files: Path) -> None:
    changed = recipe(tiny_base, files, lora={"r": 8}, seed=3)
    with pytest.raises(UserError, match=r"other values for .*lora\.r.*seed"):
        run(changed, finished)
    with pytest.raises(UserError, match=r"--extend of .*changes of data\.target.*other values for .*lora\.r"):
        run(changed, finished, extend=True)


def test_a_run_of_another_version_is_not_taken_for_an_extension(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    plan = read_record(tmp_path / "run" / "plan.json")
    assert plan is not None
    write_record(tmp_path / "run" / "plan.json", "plan", {**plan, "recipe": "of keys that an older version had"})
    with pytest.raises(UserError, match="earlier version of bam_lora"):
        run(recipe(tiny_base, files), tmp_path / "run")


def test_extension_trains_on_new_data_only(finished: Path, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    more = write_jsonl(tmp_path / "more.jsonl", GERMAN[24:36])
    target = [{"path": str(files / "german.jsonl")}, {"path": str(more)}]
    longer = recipe(tiny_base, files, data={"target": target}, bam={"slices": 5, "branches": 2})
    with pytest.raises(UserError, match="--extend adds data or slices"):
        run(longer, copy)
    before = (copy / "recipe.yaml").read_bytes()
    same_slices = recipe(tiny_base, files, data={"target": target})
    with pytest.raises(UserError, match=r"expected bam\.slices above 3, those already trained, found 3"):
        run(same_slices, copy, extend=True)
    assert (copy / "recipe.yaml").read_bytes() == before  # a refused extension leaves no trace
    run(recipe(tiny_base, files, keep={"bases": "none"}), copy)  # what stays on disk may change at any time
    report = run(longer, copy, extend=True)
    plan = read_record(copy / "plan.json")
    assert plan is not None
    assert [len(iteration["branches"]) for iteration in plan["iterations"]] == [2, 1, 2]
    new = plan["parts"][1]["sources"]
    used = {Path(source["path"]).name: source["used_documents"] for source in new if source["role"] == "target"}
    assert used == {"german.jsonl": 0, "more.jsonl": 12}
    assert report["iterations"][2]["iteration"] == 3
    assert model_hash(copy) != model_hash(finished)
    done = model_hash(copy)
    run(longer, copy, extend=True)  # the same command again finds that all is done
    assert model_hash(copy) == done
    (copy / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: expected the plan of this run, which was extended"):
        run(longer, copy)
    assert model_hash(copy) == done


def test_a_finished_run_can_be_the_base_of_another(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    from bam_lora.ledger import Ledger

    chained = recipe(finished, files, bam={"slices": 2, "branches": 2}, evaluation={"samples": []})
    report = run(chained, tmp_path / "second")
    parent = json.loads((finished / "report.json").read_text())
    assert report["summary"]["target_before"] == pytest.approx(parent["summary"]["target_after"])
    ledger = Ledger.load(tmp_path / "second")
    assert len(ledger.inherited) == 2
    assert ledger.base["name"] == str(tiny_base)


def test_a_chained_run_notices_that_its_parent_has_changed(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(finished, parent)
    chained = recipe(parent, files, bam={"slices": 1, "branches": 1}, evaluation={"samples": []})
    run(chained, tmp_path / "child")
    write_jsonl(tmp_path / "more.jsonl", GERMAN[24:30])
    longer = recipe(
        tiny_base, files, bam={"slices": 4},
        data={"target": [{"path": str(files / "german.jsonl")}, {"path": str(tmp_path / "more.jsonl")}]},
    )  # fmt: skip
    run(longer, parent, extend=True)
    shutil.rmtree(tmp_path / "child" / "model")
    with pytest.raises(UserError, match="expected the finished run this one started from, found a model that has"):
        run(chained, tmp_path / "child")


def test_a_first_start_that_failed_can_be_put_right(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    wrong = recipe(tiny_base, files, data={"target": [{"path": str(files / "german.jsonl"), "text": "body"}]})
    with pytest.raises(UserError, match="expected a column 'body'"):
        run(wrong, tmp_path / "run")
    run(recipe(tiny_base, files, bam={"slices": 1, "branches": 1}), tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_weights_that_cannot_merge_a_short_group_are_refused_before_training(
    tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    chosen = recipe(tiny_base, files, bam={"slices": 3, "branches": 2, "merge": {"weights": [0.0, 1.0]}})
    with pytest.raises(UserError, match="merge weights"):
        run(chosen, tmp_path / "run")
    hasty = recipe(tiny_base, files, training={"warmup_steps": 500})
    with pytest.raises(UserError, match=r"training\.warmup_steps of iteration 1, branch 1: expected fewer than its"):
        run(hasty, tmp_path / "run")
    assert not (tmp_path / "run" / "iterations").exists()
    assert not (tmp_path / "run" / "plan.json").exists()  # so that the recipe can be put right


def test_data_that_is_lost_and_has_changed_is_refused_until_it_is_restored(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    copy, mine = tmp_path / "copy", write_jsonl(tmp_path / "german.jsonl", GERMAN[:24])
    chosen = recipe(tiny_base, files, data={"target": [{"path": str(mine)}]}, bam={"slices": 2})
    run(chosen, copy)
    before = model_hash(copy)
    for name in ("data/01", "model", "iterations/01/branch-2"):
        shutil.rmtree(copy / name)
    text = mine.read_text()
    mine.write_text(text.replace("Fluss", "Wald!"))
    with pytest.raises(UserError, match="expected the data this run was planned with, found other text"):
        run(chosen, copy)
    mine.write_text(text)
    run(chosen, copy)
    assert model_hash(copy) == before


@pytest.mark.parametrize("name", ["result.json", "environment.json", "sessions.json", "samples.json"])
def test_a_damaged_record_of_a_finished_run_is_made_again(
    name: str, finished: Path, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text("{")
    run(recipe(tiny_base, files), tmp_path / "copy")
    assert read_record(tmp_path / "copy" / name) is not None
    assert model_hash(tmp_path / "copy") == model_hash(finished)


def test_a_base_with_a_missing_tensor_is_refused(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tensors = load_file(base / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"tensor 'model\.norm\.weight': expected the weights that the config asks for"):
        run(recipe(base, files), tmp_path / "run")


@pytest.mark.parametrize("target", ["nonexistent", "embed_tokens", "lm_head"])
def test_target_modules_that_cannot_work_are_refused_at_once(
    target: str, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    chosen = recipe(tiny_base, files, lora={"r": 4, "target_modules": ["q_proj", target]})
    with pytest.raises(UserError, match=rf"lora\.target_modules: expected .*q_proj.*found '{target}'"):
        run(chosen, tmp_path / "run")
    assert not (tmp_path / "run" / "iterations").exists()


@pytest.mark.parametrize(("bits", "precision"), [(16, "16bit"), (8, "4bit")])
def test_other_precisions(bits: int, precision: str, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    chosen = recipe(
        tiny_base,
        files,
        quantization={"bits": bits},
        bam={"slices": 2},
        evaluation={"precision": precision, "samples": []},
    )
    report = run(chosen, tmp_path / "run")
    assert {score["precision"] for score in report["scores"]} == {precision}
    assert report["summary"]["learned"] > 0


def test_single_and_sequential_at_equal_tokens(finished: Path, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    tokens = {}
    for strategy in ("single", "sequential"):
        report = run(recipe(tiny_base, files, strategy=strategy), tmp_path / strategy)
        tokens[strategy] = report["cost"]["train_tokens"]
        assert [len(one["coefficients"]) for one in report["iterations"]] == ([1] if strategy == "single" else [1] * 3)
    bam = json.loads((finished / "report.json").read_text())["cost"]["train_tokens"]
    assert max(abs(count - bam) for count in tokens.values()) <= 3


def test_two_processes_are_kept_apart(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with (
        FileLock(str(tmp_path / "run" / ".lock")),
        pytest.raises(UserError, match="expected a run that no other process works on, found one that is running"),
    ):
        run(recipe(tiny_base, files), tmp_path / "run")


def test_a_foreign_folder_is_refused_untouched(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="expected a new or empty folder, or a run of bam-lora, found other files"):
        run(recipe(tiny_base, files), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root can write anywhere")
def test_an_unwritable_output_is_one_line(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="expected a folder that can be written"):
        run(recipe(tiny_base, files), tmp_path / "run")


def test_a_changed_base_is_refused(finished: Path, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    run(recipe(base, files, bam={"slices": 1, "branches": 1}), tmp_path / "run")
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (base / "model.safetensors").write_bytes(bytes(data))
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(UserError, match=r"expected the files this run started from, found others: model\.safetensors"):
        run(recipe(base, files, bam={"slices": 1, "branches": 1}), tmp_path / "run")


def test_a_truncated_base_is_one_line(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run(recipe(base, files), tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.json").exists()


def test_no_space_is_said_before_anything_is_trained(
    tiny_base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"disk space for .*: expected .* GB free, found 0\.00 GB"):
        run(recipe(tiny_base, files), tmp_path / "run")
    assert not (tmp_path / "run" / "iterations").exists()
