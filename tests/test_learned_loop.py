"""A run whose merges learn their weights, and the curve of its delta scaled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, GERMAN, write_jsonl
from safetensors.torch import load_file
from typer.testing import CliRunner

import bam_lora.merge_learning
from bam_lora.cli import app
from bam_lora.errors import Interrupted, UserError
from bam_lora.folding import fold
from bam_lora.ledger import Ledger
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report import collect
from bam_lora.shrink import shrink
from bam_lora.store import hash_file, read_record


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, texts in (("german", GERMAN), ("english", ENGLISH)):
        write_jsonl(folder / f"{name}.jsonl", texts[:24])
        write_jsonl(folder / f"{name}.select.jsonl", texts[24:40])
        write_jsonl(folder / f"{name}.test.jsonl", texts[-3:])
    return folder


def recipe(base: Path, files: Path, **learned: Any) -> Recipe:
    def one(kind: str) -> dict[str, Any]:
        return {
            "target": [{"path": str(files / f"german.{kind}.jsonl"), "set": "german"}],
            "source": [{"path": str(files / f"english.{kind}.jsonl"), "set": "english"}],
        }

    return recipe_from_dict(
        {
            "base": str(base),
            "output": "unused",
            "data": {"target": [{"path": str(files / "german.jsonl")}], "sequence_length": 128},
            "bam": {"slices": 4, "branches": 2, "merge": {"weights": "learned", "learned": {"steps": 8, **learned}}},
            "lora": {"r": 4},
            "training": {
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "checkpointing": False,
            },
            "evaluation": {**one("test"), "branches": False},
            "selection": one("select"),
        }
    )


@pytest.fixture(scope="module")
def finished(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "finished"
    run(recipe(tiny_base, files), root)
    return root


def test_no_memory_to_learn_anew_is_one_line_with_a_way_out(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("bam_lora.merge_learning.learn_weights", no_room)
    result = CliRunner().invoke(app, ["shrink", str(finished), "--source-weight", "0.7"])
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: learning the last merge's weights for a source weight of 0.7: expected enough memory"
    )
    assert 'with CUDA_VISIBLE_DEVICES="" before the command a CPU does it' in line


def test_what_was_learned_is_kept_and_reported(finished: Path) -> None:
    assert not (finished / "iterations" / "01" / "branch-1" / "eval.json").exists()
    report = collect(finished)
    for number, branches in ((1, 2), (2, 4)):  # the second merge also corrects the two branches of the first
        merged = read_record(finished / "iterations" / f"{number:02}" / "merge.json")
        assert merged is not None
        learned = merged["learned"]
        history = [entry["objective"] for entry in learned["selection"]]
        assert min(history) == history[[e["step"] for e in learned["selection"]].index(learned["best_step"])]
        assert {len(groups) for groups in learned["coefficients"].values()} == {branches}
        assert len(merged["delta_norms"]) == 2
        assert report["iterations"][number - 1]["learned"] == learned
    names = [one["path"] for one in Ledger.load(finished).iterations[1]["adapters"]]
    assert names == [f"iterations/{i}/branch-{b}/adapter" for i in ("02", "01") for b in (1, 2)]


def test_the_result_is_the_ledgers(finished: Path, tiny_base: Path) -> None:
    """Every weight against the sum of all iterations in float64, rounded as the base is stored."""
    base, made = (load_file(folder / "model.safetensors") for folder in (tiny_base, finished / "model"))
    ledger = Ledger.load(finished)
    for name in ledger.names():
        stacked = ledger.stacked(name)
        assert stacked is not None
        expected = base[name].double() + stacked[0].double() @ stacked[1].double()
        torch.testing.assert_close(made[name].double(), expected, rtol=2**-8, atol=1e-6)


def test_a_run_stopped_while_it_learns_ends_with_the_same_bytes(
    finished: Path, tiny_base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bam_lora.merge_learning.learn_weights
    calls: list[int] = []

    def stopping(*args: Any, on_step: Any, **kwargs: Any) -> Any:
        def step(number: int, steps: int) -> None:
            calls.append(number)
            if len(calls) in (3, 15):  # once in each merge
                raise Interrupted("SIGTERM")
            on_step(number, steps)

        return real(*args, on_step=step, **kwargs)

    monkeypatch.setattr(bam_lora.merge_learning, "learn_weights", stopping)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(recipe(tiny_base, files), tmp_path / "run")
    run(recipe(tiny_base, files), tmp_path / "run")
    assert hash_file(tmp_path / "run/model/model.safetensors") == hash_file(finished / "model/model.safetensors")


def test_scope_iteration_leaves_the_past_alone(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    run(recipe(tiny_base, files, scope="iteration"), tmp_path / "run")
    assert [len(one["adapters"]) for one in Ledger.load(tmp_path / "run").iterations] == [2, 2]


def test_shrink_scores_the_curve(finished: Path) -> None:
    result = CliRunner().invoke(app, ["shrink", str(finished), "--scale", "0.5", "--scale", "0", "--scale", "1"])
    assert result.exit_code == 0, result.output
    record = json.loads((finished / "shrink.json").read_text())
    assert [point["scale"] for point in record["points"]] == [0, 0.5, 1]
    for place, folder in ((0, "00"), (2, "02")):  # its ends are the base and the result
        ours = read_record(finished / "iterations" / folder / "eval.json")
        assert ours is not None
        values = [score["bits_per_byte"] for score in record["points"][place]["scores"]]
        assert values == [score["bits_per_byte"] for score in ours["scores"]]
    norms = [point["delta_norm"] for point in record["points"]]
    assert norms == pytest.approx([0, norms[2] / 2, norms[2]], rel=1e-5)
    assert not list(finished.glob(".tmp-*"))


def test_points_that_are_there_are_not_scored_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shrink(finished, [0.5])
    monkeypatch.setattr("bam_lora.points.score_sets", lambda *a, **k: pytest.fail("scored again"))
    assert shrink(finished, [0.5]) == first


def scores(point: Any) -> list[float]:
    return [score["bits_per_byte"] for score in point["scores"]]


@pytest.mark.slow
def test_a_sweep_of_the_source_weight_learns_the_last_merge_anew(finished: Path) -> None:
    """At the run's own μ it gives the run's own result."""
    before = hash_file(finished / "ledger.json")
    given = [value for weight in (0, 1, 20) for value in ("--source-weight", str(weight))]
    result = CliRunner().invoke(app, ["shrink", str(finished), *given])
    assert result.exit_code == 0, result.output
    points = {p["label"]: p for p in json.loads((finished / "shrink.json").read_text())["points"] if not p["scale"]}
    ours = read_record(finished / "iterations" / "02" / "eval.json")
    assert ours is not None
    assert scores(points["1"]) == scores(ours)
    assert len({tuple(scores(point)) for point in points.values()}) == 3
    assert "μ 20" in result.output
    assert hash_file(finished / "ledger.json") == before
    assert [one["kind"] for one in collect(finished)["shrink"] if one["label"] == "20"] == ["learned"]


def test_the_chosen_model_stays(finished: Path, tmp_path: Path) -> None:
    shrink(finished, source_weights=[1], output=tmp_path / "chosen")
    chosen = hash_file(tmp_path / "chosen/model.safetensors")
    assert chosen == hash_file(finished / "model/model.safetensors")
    shrink(finished, [0], output=tmp_path / "chosen")  # an earlier result may be replaced
    assert hash_file(tmp_path / "chosen/model.safetensors") != chosen
    assert (tmp_path / "chosen/tokenizer.json").exists()
    with pytest.raises(UserError, match=r"--output: expected one --scale or one --source-weight, found 2"):
        shrink(finished, [0.5, 0.6], output=tmp_path / "other")
    for inside in (finished, finished / "iterations/02/base", finished / "new"):
        with pytest.raises(UserError, match=r"expected a new|expected a folder outside of the run"):
            shrink(finished, [0.5], output=inside)


def test_a_kept_model_is_the_one_that_was_asked_for(single: Path, tmp_path: Path) -> None:
    shrink(single, [0.5], checkpoints=True, output=tmp_path / "half")
    shrink(single, [0.5], output=tmp_path / "again")
    half, again = (hash_file(tmp_path / name / "model.safetensors") for name in ("half", "again"))
    assert half == again


def test_a_base_that_has_changed_is_not_folded_onto(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    values = recipe(base, files).resolved() | {"strategy": "single"}
    values["bam"]["merge"]["weights"] = "uniform"
    run(recipe_from_dict(values), tmp_path / "run")
    fold(base, [tmp_path / "run/iterations/01/branch-1/adapter"], tmp_path / "other", any_base=True)
    shutil.copy(tmp_path / "other/model.safetensors", base / "model.safetensors")
    with pytest.raises(UserError, match=r"expected the files this run started from, found others: model\.safetensors"):
        shrink(tmp_path / "run", [0.5])


def test_shrink_wants_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a run directory, found no recipe\.yaml in it"):
        shrink(tmp_path)


def test_selection_is_asked_for_and_kept_apart(tiny_base: Path, files: Path) -> None:
    values = recipe(tiny_base, files).resolved()
    with pytest.raises(UserError, match=r"selection.target: expected text to learn the merge weights on, found none"):
        recipe_from_dict({**values, "selection": {"source": values["selection"]["source"]}})
    with pytest.raises(
        UserError, match=r"selection.target.0.path: expected text of its own, found that of evaluation.t"
    ):
        recipe_from_dict(
            {
                **values,
                "selection": values["evaluation"]
                and {"target": values["evaluation"]["target"], "source": values["selection"]["source"]},
            }
        )


@pytest.fixture(scope="module")
def single(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = recipe(tiny_base, files).resolved()
    values |= {"strategy": "single", "keep": {"checkpoints": True}, "training": {**values["training"], "save_steps": 3}}
    values["bam"]["merge"]["weights"] = "uniform"
    root = tmp_path_factory.mktemp("runs") / "single"
    run(recipe_from_dict(values), root)
    return root


def test_checkpoints_and_their_average_are_scored(single: Path) -> None:
    report = collect(single)
    steps = report["iterations"][0]["branches"][0]["steps"]
    kept = sorted(path.name for path in (single / "iterations/01/branch-1/trajectory").iterdir())
    assert kept == [f"step-{step:06}" for step in range(3, steps, 3)]
    assert len(kept) > 1
    points = shrink(single, [0.5], checkpoints=True)["points"]
    kinds = [(point["kind"], point["label"]) for point in points]
    averages = [("ema", label) for label in ("0.5", "0.7", "0.9")]
    assert kinds == [*(("checkpoint", f"step {step}") for step in range(3, steps, 3)), *averages, ("shrink", "0.5")]
    norms = [point["delta_norm"] for point in points if point["kind"] == "checkpoint"]
    assert norms == sorted(norms)  # a delta grows from zero
    assert collect(single)["shrink"][0]["label"] == "step 3"


def test_checkpoints_of_several_branches_are_no_curve(finished: Path) -> None:
    with pytest.raises(UserError, match="expected a run of one branch that kept them, found 6 branches"):
        shrink(finished, [], checkpoints=True)


def test_selection_text_that_cannot_do_is_refused_before_training(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    values = recipe(tiny_base, files).resolved()
    one = {**values["selection"]["source"][0], "documents": 1}
    short = {**values, "selection": {**values["selection"], "source": [one]}}
    with pytest.raises(UserError, match=r"selection\.source: expected at least two documents"):
        run(recipe_from_dict(short), tmp_path / "short")
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes((files / "german.test.jsonl").read_bytes())
    leak = {**values, "selection": {**values["selection"], "target": [{"path": str(copied), "set": "copy"}]}}
    with pytest.raises(UserError, match="'copy': expected text that is in no evaluation set, found 3 of its 3 doc"):
        run(recipe_from_dict(leak), tmp_path / "leak")
    for name in ("short", "leak"):
        assert not (tmp_path / name / "iterations" / "01").exists()


def test_a_damaged_matrix_is_not_folded(finished: Path, tmp_path: Path, tiny_base: Path, files: Path) -> None:
    root = shutil.copytree(finished, tmp_path / "run")
    matrices = root / "coefficients" / "01.safetensors"
    data = bytearray(matrices.read_bytes())
    data[-1] ^= 0x01
    matrices.write_bytes(bytes(data))
    shutil.rmtree(root / "model")
    (root / "iterations" / "02" / "fold.json").unlink()
    with pytest.raises(UserError, match=r"coefficients/01\.safetensors"):
        run(recipe(tiny_base, files), root)
    assert not (root / "model").exists()


@pytest.mark.parametrize("option", ["--scale", "--source-weight"])
@pytest.mark.parametrize("value", ["nan", "-1", "inf"])
def test_factors_that_are_none(finished: Path, option: str, value: str) -> None:
    result = CliRunner().invoke(app, ["shrink", str(finished), f"{option}={value}"])
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert f"{option}: expected a number of at least 0" in result.stderr
