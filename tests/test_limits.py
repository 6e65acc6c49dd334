"""Limits: a budget ends a run after a merge, and a higher one goes on as if it had not."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from test_loop import recipe
from typer.testing import CliRunner

from bam_lora import budget, loop
from bam_lora.check_limits import limit_lines
from bam_lora.check_report import check_everything
from bam_lora.cli import app
from bam_lora.errors import UserError
from bam_lora.limits import read_ended
from bam_lora.loop import run
from bam_lora.recipe import Recipe, dump_recipe, load_recipe, recipe_from_dict
from bam_lora.report import render_text
from bam_lora.rundir import recipe_key
from bam_lora.session import Session
from bam_lora.shrink import shrink
from bam_lora.status import describe_run
from bam_lora.store import hash_file, read_record, write_record

HOUR = 3600.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "german.jsonl", GERMAN[:18])
    write_jsonl(folder / "english.jsonl", ENGLISH[:18])
    write_jsonl(folder / "german.test.jsonl", GERMAN[-2:])
    write_jsonl(folder / "english.test.jsonl", ENGLISH[-2:])
    return folder


@pytest.fixture(scope="module")
def wanted(tiny_base: Path, files: Path) -> Callable[..., Recipe]:
    """A recipe of three iterations of one branch, with limits."""

    def make(**limits: Any) -> Recipe:
        outer = {"learning_rate": 0.8, "momentum": 0.5}  # so that an iteration rests on all before it
        bam = {"slices": 3, "branches": 1, "outer": outer}
        return recipe(tiny_base, files, bam=bam, evaluation={"branches": False}, limits=limits)

    return make


@pytest.fixture(scope="module")
def whole(wanted: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without limits."""
    root = tmp_path_factory.mktemp("runs") / "whole"
    run(wanted(), root)
    return root


def tokens_of(root: Path) -> list[int]:
    plan = read_record(root / "plan.json")
    assert plan is not None
    return [sum(branch["tokens"] for branch in one["branches"]) for one in plan["iterations"]]


def hashes(root: Path) -> dict[str, str]:
    """The result, the history and every adapter."""
    kept = [*sorted(root.glob("iterations/*/branch-*/adapter/*")), *sorted((root / "model").glob("*.safetensors"))]
    return {str(path.relative_to(root)): hash_file(path) for path in [*kept, root / "ledger.json"]}


@pytest.fixture(scope="module")
def ended(whole: Path, wanted: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that may train the tokens of two iterations and a little more."""
    root = tmp_path_factory.mktemp("runs") / "ended"
    run(wanted(tokens=sum(tokens_of(whole)[:2]) + 5), root)
    return root


def test_the_plan_is_the_whole_runs_and_the_run_ends_after_a_merge(ended: Path, whole: Path) -> None:
    assert tokens_of(ended) == tokens_of(whole)
    assert not (ended / "iterations" / "03").exists()
    (ledger,), (short,) = ([read_record(root / "ledger.json")] for root in (whole, ended))
    assert ledger is not None
    assert short is not None
    assert short["iterations"] == ledger["iterations"][:2]
    record = read_ended(ended)
    assert record is not None
    assert (record.by, record.iteration, record.planned) == ("tokens", 2, 3)
    assert record.used_tokens + record.needed_tokens == sum(tokens_of(whole))
    model = read_record(ended / "model" / "done.json")
    assert model is not None
    assert model["key"] == short["key"]
    assert (ended / "model" / "README.md").is_file()


def test_report_and_status_say_so(ended: Path, whole: Path) -> None:
    report = json.loads((ended / "report.json").read_text())
    assert report["status"] == {
        "finished": True, "iterations_done": 2, "iterations_planned": 3, "measured_iteration": 2,
    }  # fmt: skip
    assert report["limits"]["by"] == "tokens"
    assert len(report["iterations"]) == 2
    assert report["summary"]["target_after"] is not None
    assert report["cost"]["train_tokens"] == sum(tokens_of(whole)[:2])
    text = render_text([report], None)
    assert "limits.tokens ended the run after iteration 2 of 3. The target" in " ".join(text.split())
    assert "2 of 3, ended by its limits" in text
    assert json.loads((whole / "report.json").read_text())["limits"] is None
    described = describe_run(ended)
    assert "bam, finished" in described
    assert "ended the run after iteration 2 of 3" in described
    assert f"--set limits.tokens={sum(tokens_of(whole))}" in described
    assert "limits" not in describe_run(whole)


def test_the_same_command_and_too_small_a_raise_do_nothing(
    ended: Path, wanted: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(ended)
    sessions = (ended / "sessions.json").read_bytes()
    limit = read_ended(ended)
    assert limit is not None
    run(wanted(tokens=int(limit.limit)), ended)
    assert "finished within its limits; limits.tokens" in " ".join(capsys.readouterr().err.split())
    run(wanted(tokens=int(limit.limit) + 1), ended)
    assert hashes(ended) == before
    assert (ended / "sessions.json").read_bytes() == sessions
    raised = read_ended(ended)
    assert raised is not None
    assert raised.limit == limit.limit + 1
    assert load_recipe(ended / "recipe.yaml").limits.tokens == limit.limit + 1


def test_a_raised_limit_goes_on_as_if_there_had_been_none(
    ended: Path, whole: Path, wanted: Callable[..., Recipe], tmp_path: Path
) -> None:
    root, file = tmp_path / "run", tmp_path / "recipe.yaml"
    shutil.copytree(ended, root)
    file.write_text(dump_recipe(wanted(tokens=sum(tokens_of(whole)[:2]))))
    result = CliRunner().invoke(app, ["run", str(file), "--output", str(root), "--set", "limits.tokens=null"])
    assert result.exit_code == 0, result.output
    assert hashes(root) == hashes(whole)
    assert not (root / "limits.json").exists()
    report = json.loads((root / "report.json").read_text())
    assert report["limits"] is None
    assert report["status"]["iterations_done"] == 3
    assert [score["bits_per_byte"] for score in report["scores"]] == [
        score["bits_per_byte"] for score in json.loads((whole / "report.json").read_text())["scores"]
    ]


def test_killed_while_it_ends(ended: Path, wanted: Callable[..., Recipe], tmp_path: Path) -> None:
    """Whatever of the end is there already: it is put on record and finished again."""
    before, limit = hashes(ended), read_ended(ended)
    assert limit is not None
    for number, lost in enumerate((["report.json", "model"], ["report.json", "model", "result.json"], ["limits.json"])):
        root = tmp_path / str(number)
        shutil.copytree(ended, root)
        for name in lost:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        report = run(wanted(tokens=int(limit.limit)), root)
        assert hashes(root) == before
        assert report["limits"]["iteration"] == 2


def test_what_reads_a_finished_run_takes_one_that_was_ended(ended: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(ended, root)
    shrink(root, [0.5])
    assert read_record(root / "shrink.json") is not None


def test_an_extension_wants_all_slices_trained(ended: Path, wanted: Callable[..., Recipe], tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(ended, root)
    values = {**wanted().resolved(), "bam": {**wanted().resolved()["bam"], "slices": 4}}
    with pytest.raises(
        UserError, match=r"trained all of its slices, found 2 of 3 iterations, its limit\. .* limits that are higher"
    ):
        run(recipe_from_dict(values), root, extend=True)


def test_hours_count_all_sittings_and_end_the_run_after_a_merge(
    wanted: Callable[..., Recipe], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which an iteration takes an hour: within two and a half hours there is room for two."""
    root = tmp_path / "run"

    def now() -> float:
        return HOUR * len(list(root.glob("iterations/*/merge.json")))

    monkeypatch.setattr(loop, "Session", functools.partial(Session, now=now))
    report = run(wanted(hours=2.5), root)
    record = read_ended(root)
    assert record is not None
    assert (record.by, record.iteration, record.limit) == ("hours", 2, 2.5)
    assert record.used_seconds == 2 * HOUR
    assert record.needed_seconds == pytest.approx(HOUR, rel=0.05)  # slices differ by a few tokens
    assert report["limits"]["by"] == "hours"
    assert "2 h 00 min are used, another iteration takes about 1 h 0" in describe_run(root)
    assert f"--set {record.enough}" in describe_run(root)
    held = hashes(root)
    run(wanted(hours=2.9), root)
    assert hashes(root) == held
    # The next sitting's clock begins at two hours, of which nothing is counted again; the day between is not counted.
    run(wanted(hours=3.1), root)
    assert hashes(root) == hashes(whole)


def test_a_first_iteration_that_takes_too_long_stops_at_once_and_can_go_on(
    wanted: Callable[..., Recipe], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes ten seconds; the first branch has three."""
    root = tmp_path / "run"

    def now() -> float:
        logged = sorted(root.glob("iterations/01/branch-1/metrics.jsonl"))
        return 10.0 * sum(len(path.read_text().splitlines()) for path in logged)

    monkeypatch.setattr(loop, "Session", functools.partial(Session, now=now))
    monkeypatch.setattr(budget, "_MEASURE_SECONDS", 10.0)
    with pytest.raises(UserError, match=r"limits\.hours: expected at least 0\.00\d+, for the first iteration alone"):
        run(wanted(hours=14 / HOUR), root)
    assert not (root / "iterations" / "01" / "merge.json").exists()
    assert "trained    0 of 3 branches" in describe_run(root)
    run(wanted(hours=1), root)
    assert hashes(root) == hashes(whole)


def test_tokens_that_are_less_than_an_iteration_are_refused_before_training(
    wanted: Callable[..., Recipe], files: Path, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"limits\.tokens: expected at least .* first iteration.*found 100\. .*slices"):
        run(wanted(tokens=100), tmp_path / "bam")
    assert not (tmp_path / "bam" / "plan.json").exists()  # so that the recipe may be put right


def test_limits_do_not_make_another_run(wanted: Callable[..., Recipe]) -> None:
    assert recipe_key(wanted(hours=1, tokens="50M")) == recipe_key(wanted())
    assert wanted(tokens="50M").limits.tokens == 50_000_000
    for wrong in ({"hours": 0}, {"tokens": 0}, {"days": 1}):
        with pytest.raises(UserError, match="limits"):
            wanted(**wrong)


def test_a_trainer_has_the_same_limits(tiny_base: Path, tmp_path: Path) -> None:
    from trainer_runs import bam_trainer, rows

    def trainer(**limits: Any) -> Any:
        bam = {"slices": 2, "branches": 1, "score_branches": False, **limits}
        return bam_trainer(tmp_path / "run", tiny_base, train_dataset=rows(GERMAN[:12]), bam=bam)

    with pytest.raises(UserError, match=r"BamConfig\(max_hours\): expected"):
        trainer(max_hours=-1)
    with pytest.raises(UserError, match=r"BamConfig\(max_tokens\): expected at least .*found 10") as caught:
        trainer(max_tokens=10).train()
    enough = int(re.search(r"at least ([\d,]+)", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
    short = trainer(max_tokens=enough)
    output = short.train()
    assert len(tokens_of(tmp_path / "run")) == 2
    assert read_ended(tmp_path / "run") is not None
    assert (short.state.global_step, short.state.max_steps) == (output.global_step, output.global_step)
    assert short.evaluate()["eval_target_bits_per_byte"] == pytest.approx(output.metrics["eval_target_bits_per_byte"])
    trainer(max_tokens=enough).save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").is_file()
    assert trainer().train().global_step > output.global_step
    assert read_ended(tmp_path / "run") is None


def test_status_of_a_run_under_way_tells_what_is_used(ended: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(ended, root, ignore=shutil.ignore_patterns("limits.json", "model"))
    record = {"seconds": 1.5 * HOUR}
    write_record(root / "sessions.json", "sessions", {"sessions": [record, record]})
    text = (root / "recipe.yaml").read_text().replace("hours: null", "hours: 10")
    (root / "recipe.yaml").write_text(text)
    assert re.search(r"limits     3 h 00 min of 10 hours used; [\d,]+ of [\d,]+ tokens used", describe_run(root))


def test_check_says_how_many_iterations_are_expected(wanted: Callable[..., Recipe]) -> None:
    assert limit_lines(wanted(), 3000, 3000) == []
    (line,) = limit_lines(wanted(tokens=2500), 3000)
    assert line == "limits      limits.tokens 2,500: room for about 2 of 3 iterations"
    assert "about 3 of 3" in limit_lines(wanted(hours=1), None, 3600)[0]
    assert "the last iteration of 3 that is within it" in limit_lines(wanted(hours=1), 3000)[0]
    line, note = limit_lines(wanted(hours=0.2), None, 3600)
    assert "room for about 0 of 3 iterations" in line
    assert "raise limits.hours, or make it smaller (a higher bam.slices" in note
    whole = recipe_from_dict({**wanted(tokens=4000).resolved(), "training": {"max_steps": 30}})
    text = check_everything(whole, gpu_memory=None, fit=False, measure=False).lines()
    assert "limits      limits.tokens 4,000: room for about 0 of 3 iterations" in text
