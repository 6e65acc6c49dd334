"""collect: what a run directory says, whole, unfinished or damaged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import BASE_SCORES, FINAL, GOLDEN, SETS, record, write_run

from bam_lora import store
from bam_lora.errors import UserError
from bam_lora.report import collect, model_card, render_html, write_report
from bam_lora.report.cost_table import cost_table
from bam_lora.report.estimates import estimates_table
from bam_lora.report.format import MISSING
from bam_lora.report.tables import branch_scores_table, scores_table


def test_report_of_a_whole_run_is_the_golden_one(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam"))
    assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_keys_of_the_contract(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam"))
    wanted = "format strategy base languages recipe_sha256 seeds scores summary iterations cost environment"
    assert set(wanted.split()) <= report.keys()
    scores = "iteration branch set role bits_per_byte stderr precision"
    assert set(scores.split()) <= report["scores"][0].keys()
    iterations = "iteration tokens cosine delta_norms coefficients seconds"
    assert set(iterations.split()) <= report["iterations"][0].keys()
    assert list(report["cost"]["seconds_by_stage"]) == ["data", "load", "train", "evaluate", "merge", "fold", "other"]


def test_summary_pools_the_sets_of_a_role_by_bytes(tmp_path: Path) -> None:
    summary = collect(write_run(tmp_path / "bam"))["summary"]
    sizes = {name: size for name, role, _, size in SETS if role == "target"}
    before, after = (sum(s[n] * b for n, b in sizes.items()) / 600_000 for s in (BASE_SCORES, FINAL["bam"]))
    assert summary["target_before"] == pytest.approx(before)
    assert summary["learned"] == pytest.approx(before - after)
    assert summary["forgotten"] == pytest.approx(FINAL["bam"]["docs.en"] - BASE_SCORES["docs.en"])
    assert summary["target_after_stderr"] == pytest.approx(0.008 * math.hypot(480, 120) / 600)


def test_stages_and_other_add_up_to_the_wall_time(tmp_path: Path) -> None:
    cost = collect(write_run(tmp_path / "bam"))["cost"]
    assert sum(cost["seconds_by_stage"].values()) == pytest.approx(cost["wall_seconds"])
    assert cost["seconds_by_stage"]["other"] == pytest.approx(580.5 - 508.0)
    assert cost["train_tokens"] == 500_000


def test_the_loops_overhead_is_what_plain_training_would_not_do(tmp_path: Path) -> None:
    """It would read the data, load once (4.5 s), set up once (5.25 s) and take the steps."""
    cost = collect(write_run(tmp_path / "bam"))["cost"]
    again = 7.5 - 4.5 + 3 * 0.5  # loading, setting up
    assert cost["loop_overhead"]["seconds"] == pytest.approx(again + 2.0 + 3.25 + 72.5)
    assert cost["loop_overhead"]["share"] == pytest.approx(cost["loop_overhead"]["seconds"] / (580.5 - 66.5))
    rows = {row[0].text: row[1] for row in cost_table([collect(tmp_path / "bam")]).rows}
    assert rows["Load"].value == 7.5
    assert rows["Loop overhead"].text == "1 min 22 s (16 %)"


def test_a_run_whose_sessions_had_no_clock_goes_by_its_artefacts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record(run / "sessions.json", {"sessions": [{"seconds": 580.5, "peak_rss_bytes": 9}]})
    report = collect(run)
    stages = report["cost"]["seconds_by_stage"]
    assert (stages["data"], stages["load"], stages["train"]) == (11.75, None, 4 * 104.25)
    assert sum(value or 0.0 for value in stages.values()) == pytest.approx(580.5)
    assert report["cost"]["loop_overhead"] is None
    assert cost_table([report]).rows[-1][1].text == MISSING


def test_an_unfinished_run_says_what_is_there(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "run", iterations=4, done=2))
    assert report["status"] == {
        "finished": False,
        "iterations_done": 2,
        "iterations_planned": 4,
        "measured_iteration": 2,
    }
    assert report["summary"]["learned"] > 0
    assert report["summary"]["delta_norm"] is None
    assert report["iterations"][3]["coefficients"] is None
    assert report["iterations"][3]["measured"]["target"] is None
    assert report["cost"]["train_tokens"] == 250_000


def test_a_run_that_has_only_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("strategy: bam\nbase: example/base\n", encoding="utf-8")
    report = collect(tmp_path / "run")
    assert report["iterations"] == []
    assert report["environment"] is None
    assert report["cost"]["wall_seconds"] is None
    assert report["status"]["finished"] is False


def test_a_run_without_evaluation_can_be_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for path in run.rglob("eval.json"):
        path.unlink()
    report = collect(run)
    assert report["status"]["finished"] is True
    assert report["summary"]["learned"] is None
    assert report["evaluation"] is None


@pytest.mark.parametrize("name", ["plan.json", "iterations/02/merge.json", "iterations/01/branch-2/done.json"])
def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    text = (run / name).read_text(encoding="utf-8")
    (run / name).write_text(text.replace('"format": 1', '"format": 2').replace("0.412", "0.9"), encoding="utf-8")
    with pytest.raises(UserError, match=r"expected a whole record, found content that does not match") as error:
        collect(run)
    assert name in str(error.value)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a run directory, found no recipe\.yaml in it"):
        collect(tmp_path)
    with pytest.raises(UserError, match="expected a run directory, found no such folder"):
        collect(tmp_path / "none")
    (tmp_path / "recipe.yaml").write_text("- 1", encoding="utf-8")
    with pytest.raises(UserError, match="expected a resolved recipe, found list"):
        collect(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(UserError, match="expected YAML"):
        collect(tmp_path)


def test_a_half_written_last_line_counts_only_while_the_branch_trains(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    metrics = run / "iterations/02/branch-1/metrics.jsonl"
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 41, "lo')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 41: expected JSON with a step"):
        collect(run)
    (metrics.parent / "done.json").unlink()
    losses = collect(run)["losses"]
    assert [len(item["points"]) for item in losses] == [40, 40, 40, 40]


def test_long_metrics_are_thinned_but_keep_their_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", strategy="single", iterations=1, branches=1)
    lines = [json.dumps({"step": step, "loss": 3.0 - step / 5000}) for step in range(1, 5001)]
    lines[10] = '{"step": 11, "loss": NaN}'
    (run / "iterations/01/branch-1/metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    points = collect(run)["losses"][0]["points"]
    assert len(points) == 200
    assert [points[0][0], points[-1][0]] == [1, 5000]


def test_sessions_that_were_killed_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    sessions = [{"seconds": None, "peak_rss_bytes": 5}, {"seconds": 12.5, "peak_rss_bytes": 9, "peak_gpu_bytes": 3}]
    record(run / "sessions.json", {"sessions": sessions})
    cost = collect(run)["cost"]
    assert (cost["sessions"], cost["sessions_cut_short"], cost["wall_seconds"]) == (2, 1, 12.5)
    assert (cost["peak_rss_bytes"], cost["peak_gpu_bytes"]) == (9, 3)
    assert cost["seconds_by_stage"]["other"] == 0.0


def test_hard_links_take_disk_once_and_the_report_itself_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = collect(run)["cost"]["disk_bytes"]
    os.link(run / "plan.json", run / "plan-again.json")
    write_report(run)
    assert collect(run)["cost"]["disk_bytes"] == before


def test_errors_of_differences_are_taken_by_document_where_they_are_known(tmp_path: Path) -> None:
    alone = collect(write_run(tmp_path / "a"))["summary"]
    paired = collect(write_run(tmp_path / "b", paired=True))["summary"]
    assert (alone["paired_stderr"], paired["paired_stderr"]) == (False, True)
    assert alone["learned"] == paired["learned"]
    # Documents lie a whole bit apart, yet the models' differences agree to about a thousandth.
    assert 0 < paired["learned_stderr"] < 0.001 < alone["learned_stderr"]


def test_other_models_of_the_run_are_pooled_like_its_own(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "run", others=True))
    assert collect(write_run(tmp_path / "without"))["shrink"] is None
    kinds = [(point["kind"], point["label"], point["scale"]) for point in report["shrink"]]
    assert kinds[1:4] == [("shrink", "0.8", 0.8), ("shrink", "1.0", 1.0), ("checkpoint", "step 20", None)]
    smaller, whole = report["shrink"][1:3]
    summary = report["summary"]
    assert whole["learned"] == pytest.approx(summary["learned"])
    assert whole["target_stderr"] == pytest.approx(summary["target_after_stderr"])
    assert smaller["delta_norm"] == pytest.approx(0.8 * 13.25)
    assert smaller["learned"] == pytest.approx(0.8**0.5 * summary["learned"])
    assert smaller["forgotten"] == pytest.approx(0.8**2 * summary["forgotten"])


def test_shrink_points_of_another_format_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record(run / "shrink.json", {"format": 2, "points": []})
    with pytest.raises(UserError, match=r"shrink\.json: expected format 1, found 2"):
        collect(run)


def test_cosines_by_layer_are_the_plain_mean_of_their_weights(tmp_path: Path) -> None:
    first = collect(write_run(tmp_path / "bam"))["iterations"][0]
    assert [(entry["layer"], entry["tensors"]) for entry in first["cosine_by_layer"]] == [(0, 2), (1, 2), (2, 2)]
    assert [entry["cosine"] for entry in first["cosine_by_layer"]] == pytest.approx([0.317, 0.337, 0.357])
    alone = collect(write_run(tmp_path / "single", strategy="single", iterations=1, branches=1))
    assert alone["iterations"][0]["cosine_by_layer"] is None


def test_learned_merge_weights_are_passed_on_as_they_are(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", learned=4)
    merge = store.read_record(run / "iterations/02/merge.json")
    assert merge is not None
    assert collect(run)["iterations"][1]["learned"] == merge["learned"]
    assert collect(write_run(tmp_path / "plain"))["iterations"][1]["learned"] is None


def test_write_report_writes_a_record_and_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report = write_report(run)
    body = store.read_record(run / "report.json")
    assert body is not None
    body.pop("key")
    assert body == json.loads(json.dumps(report))
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_room_loads_no_torch() -> None:
    code = "import sys, bam_lora.report; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_estimates_stand_beside_what_was_measured(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam"))
    assert estimates_table([{**report, "environment": None}]).rows == []
    estimate = {"peak_rss_bytes": 2**30, "peak_gpu_bytes": None, "disk_bytes": 5 * 2**20}
    known = {**report, "environment": {"estimate": estimate}}
    table = estimates_table([known])
    taken = report["cost"]
    assert [[cell.value for cell in row[1:]] for row in table.rows] == [
        [2**30, taken["peak_rss_bytes"]], [5 * 2**20, taken["disk_bytes"]],
    ]  # fmt: skip
    assert table.rows[0][1].text == "1 GiB"


def test_the_scores_of_many_branches_stand_apart_from_those_of_the_merged_models(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "run"))
    assert not branch_scores_table([report]).rows
    last = [score for score in report["scores"] if score["iteration"] == 2]
    report["scores"] += [{**score, "iteration": t} for t in range(3, 31) for score in last]
    merged, branches = scores_table([report]), branch_scores_table([report])
    names = [[row[0].text for row in table.rows] for table in (merged, branches)]
    assert names[0] == ["base", *(f"iteration {t}, merged" for t in range(1, 31))]
    assert names[1] == [f"iteration {t}, branch {k}" for t in range(1, 31) for k in (1, 2)]
    assert "report.json" in merged.note
    page = render_html([report], None)
    assert page.index("iteration 30, merged") < page.index("<summary>Scores of the branches") < page.index("30, branch")
    assert "branch" not in model_card(report, report["recipe"]).partition("## Use")[0].partition("Scores by")[2]
