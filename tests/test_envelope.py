"""The comparison at equal target scores: what may be said of runs, in which words, and why not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from envelope_runs import CURVE, bam, entry_of, read, scores, single
from report_runs import BASE_SCORES, record

from bam_lora.report import collect, compare, render_html, render_text
from bam_lora.report.noise import blended, difference_error
from bam_lora.report.student import t_quantile


def sentence(folders: list[Path]) -> str:
    comparison = compare(folders)
    return " ".join(render_text(comparison["runs"], comparison).split())


def test_a_run_beyond_the_shrink_curve_of_its_rival(tmp_path: Path) -> None:
    folders = [single(tmp_path / "single"), bam(tmp_path / "bam")]
    entry = entry_of(folders)
    # Two thirds of the way from 1.8 to 1.5: 1.18 + 2/3 · 0.06.
    assert entry["envelope_source"] == pytest.approx(1.22)
    assert (entry["target"], entry["source"]) == (pytest.approx(1.6), pytest.approx(1.15))
    assert entry["difference"] == pytest.approx(-0.07)
    assert entry["less_forgetting"] == pytest.approx(0.07 / (1.22 - BASE_SCORES["docs.en"]))
    assert (entry["verdict"], entry["reason"], entry["envelope_runs"]) == ("beyond", None, ["single"])
    assert (entry["runs"], entry["seeds"]) == (["bam"], [7])
    text = sentence(folders)
    assert (
        "bam is beyond the envelope: at a target score of 1.6000 it forgets 0.0700 bits per byte (84.5 %) less" in text
    )
    assert "over 150 documents of one seed: another seed may say otherwise)." in text


def test_the_interval_over_documents_carries_the_error_of_matching_the_target(tmp_path: Path) -> None:
    folders = [single(tmp_path / "single"), bam(tmp_path / "bam")]
    entry = entry_of(folders)
    points = {item["label"]: item["scores"] for item in read(folders[0] / "shrink.json")["points"]}
    mine = read(folders[1] / "iterations/02/eval.json")["scores"]
    rival = blended(points["0.5"], points["0.8"], 2 / 3)
    errors = {role: difference_error(mine, rival, role) for role in ("source", "target")}
    assert all(paired for _, paired in errors.values())
    source_error, target_error = (errors[role][0] or 0.0 for role in ("source", "target"))
    assert target_error > 0
    # The curve between 0.5 and 0.8 falls by 0.06 bits per byte over 0.3; 150 source documents, 200 target ones.
    half = t_quantile(0.975, 149) * math.hypot(source_error, 0.2 * target_error)
    assert entry["interval"] == [pytest.approx(-0.07 - half, abs=1e-12), pytest.approx(-0.07 + half, abs=1e-12)]
    assert (entry["interval_over"], entry["n"]) == ("documents", 150)


@pytest.mark.parametrize(
    ("source", "verdict", "words"),
    [
        (1.3, "inside", "bam is inside the envelope: at a target score of 1.6000 it forgets 0.0800 bits per byte"),
        (1.22, "on", "bam is on the envelope: at a target score of 1.6000 its forgetting cannot be told from that of"),
    ],
)
def test_inside_and_on(tmp_path: Path, source: float, verdict: str, words: str) -> None:
    # 1.3 at 1.6 is also dominated by the rival's final model (1.4, 1.30) and by its λ = 0.8 (1.5, 1.24).
    folders = [single(tmp_path / "single"), bam(tmp_path / "bam", source=source)]
    entry = entry_of(folders)
    assert entry["verdict"] == verdict
    assert entry["difference"] == pytest.approx(source - 1.22, abs=1e-9)
    assert words in sentence(folders)


def test_no_percentage_of_next_to_no_forgetting(tmp_path: Path) -> None:
    flat = {0.5: scores(1.8, 1.15), 0.8: scores(1.5, 1.16)}
    folders = [single(tmp_path / "single", shrink=flat), bam(tmp_path / "bam", source=1.14)]
    entry = entry_of(folders)
    assert entry["less_forgetting"] is None
    assert entry["difference"] < 0
    assert "%) less" not in sentence(folders)


def test_one_seed_without_scores_by_document_gives_no_verdict(tmp_path: Path) -> None:
    folders = [single(tmp_path / "single", paired=False), bam(tmp_path / "bam")]
    entry = entry_of(folders)
    assert entry["difference"] == pytest.approx(-0.07)
    assert (entry["verdict"], entry["interval"], entry["interval_over"], entry["n"]) == ("not compared", None, None, 0)
    assert entry["reason"].startswith("one seed, and no scores document by document")


def test_five_seeds_give_students_interval_of_their_differences(tmp_path: Path) -> None:
    shifts = [0.0, 0.01, -0.01, 0.02, -0.02]
    folders = []
    for seed, shift in enumerate(shifts):
        folders.append(single(tmp_path / f"seed-{seed}/single", seed=seed))
        folders.append(bam(tmp_path / f"seed-{seed}/bam", source=1.15 + shift, seed=seed))
    entry = entry_of(folders)
    # Standard deviation of the shifts: √(0.001/4); t(0.975, 4) = 2.776.
    half = 2.776445 * math.sqrt(0.001 / 4 / 5)
    assert entry["interval"] == [pytest.approx(-0.07 - half, abs=1e-7), pytest.approx(-0.07 + half, abs=1e-7)]
    assert (entry["interval_over"], entry["n"], entry["seeds"]) == ("seeds", 5, [0, 1, 2, 3, 4])
    assert entry["runs"] == [f"seed-{seed}/bam" for seed in range(5)]
    assert entry["envelope_runs"] == [f"seed-{seed}/single" for seed in range(5)]
    assert entry["less_forgetting"] == pytest.approx(0.07 / (1.22 - BASE_SCORES["docs.en"]))
    assert entry["verdict"] == "beyond"
    assert "over 5 seeds)." in sentence(folders)


def test_rounding_is_no_difference(tmp_path: Path) -> None:
    # The same difference in every seed, up to the last bits of a float: an interval without any width.
    folders = [single(tmp_path / f"{seed}/single", seed=seed) for seed in (0, 1, 2)]
    folders += [bam(tmp_path / f"{seed}/bam", source=1.22 + 1e-12, seed=seed) for seed in (0, 1, 2)]
    entry = entry_of(folders)
    assert entry["difference"] == pytest.approx(1e-12, abs=5e-13)
    assert (entry["verdict"], entry["n"]) == ("on", 3)


def test_each_seed_meets_the_rivals_of_its_own_seed(tmp_path: Path) -> None:
    lower = {scale: {**one, "docs.en": one["docs.en"] - 0.1} for scale, one in CURVE.items()}
    folders = [
        single(tmp_path / "0/single", seed=0),
        single(tmp_path / "1/single", seed=1, shrink=lower),
        bam(tmp_path / "0/bam", seed=0),
        bam(tmp_path / "1/bam", seed=1),
    ]
    entry = entry_of(folders)
    assert entry["envelope_source"] == pytest.approx((1.22 + 1.12) / 2)
    assert entry["difference"] == pytest.approx((-0.07 + 0.03) / 2)
    assert entry["verdict"] == "on"


def test_a_seed_without_a_rival_is_left_out_and_named(tmp_path: Path) -> None:
    folders = [single(tmp_path / f"{seed}/single", seed=seed) for seed in (0, 1)]
    folders += [bam(tmp_path / f"{seed}/bam", source=1.15 + seed / 100, seed=seed) for seed in (0, 1, 2)]
    entry = entry_of(folders)
    assert (entry["n"], entry["seeds"]) == (2, [0, 1, 2])
    assert entry["source"] == pytest.approx(1.155)
    assert entry["reason"] == "2/bam is left out: there is no run of another recipe with its seed, 2"


def test_seeds_in_which_a_rival_is_missing_do_not_flatter_the_mean(tmp_path: Path) -> None:
    """A strong rival stands with seed 0 only; against it the run is inside, against the weak one beyond."""
    strong = {scale: {**one, "docs.en": one["docs.en"] - 0.2} for scale, one in CURVE.items()}
    folders = [single(tmp_path / f"{seed}/weak", seed=seed) for seed in range(4)]
    folders.append(single(tmp_path / "0/strong", seed=0, rank=16, shrink=strong, final=scores(1.4, 1.1)))
    folders += [bam(tmp_path / f"{seed}/bam", source=1.15 + seed / 100, seed=seed) for seed in range(4)]
    entry = entry_of(folders)
    assert (entry["envelope_runs"], entry["verdict"]) == (["0/strong"], "inside")
    assert entry["interval_over"] == "documents"
    assert "2/bam is left out: with its seed there is no 0/strong" in entry["reason"]


def test_a_seed_whose_rivals_do_not_come_so_far_stops_the_comparison(tmp_path: Path) -> None:
    folders = [single(tmp_path / f"{seed}/single", seed=seed) for seed in (0, 1)]
    folders += [bam(tmp_path / "0/bam", seed=0), bam(tmp_path / "1/bam", target=1.3, source=1.25, seed=1)]
    entry = entry_of(folders)
    assert (entry["verdict"], entry["difference"], entry["n"]) == ("not compared", None, 0)
    assert entry["reason"] == "1/bam: 1/single learned less (its best target score is 1.4000, not 1.3000)"


def test_two_runs_of_one_recipe_and_seed_count_once(tmp_path: Path) -> None:
    folders = [single(tmp_path / "single"), bam(tmp_path / "bam-a"), bam(tmp_path / "bam-b", source=1.0)]
    entry = entry_of(folders)
    assert (entry["runs"], entry["seeds"]) == (["bam-a", "bam-b"], [7])
    assert entry["difference"] == pytest.approx(-0.07)
    assert entry["reason"] == "bam-b is left out: another run has its recipe and seed"


def test_a_rival_without_a_curve_matches_only_by_being_better_in_both(tmp_path: Path) -> None:
    worse = [single(tmp_path / "single", shrink=None), bam(tmp_path / "bam", source=1.35)]
    entry = entry_of(worse)
    assert (entry["envelope_source"], entry["verdict"]) == (pytest.approx(1.30), "inside")
    assert entry["reason"] == "only final models count, for want of shrink curves, of single"
    better = [worse[0], bam(tmp_path / "other/bam", source=1.15)]
    entry = entry_of(better)
    assert (entry["verdict"], entry["envelope_source"]) == ("not compared", None)
    assert entry["reason"] == (
        "single learned more and forgot more, with nothing measured in between: `bam-lora shrink` makes single's curve"
    )
    assert "bam: not compared: single learned more and forgot more" in sentence(better)


@pytest.mark.parametrize(
    ("target", "reason"), [(1.5, "only final models count, for want of shrink curves, of sequential"), (1.7, None)]
)
def test_a_rival_without_a_curve_is_named_where_its_curve_would_count(
    tmp_path: Path, target: float, reason: str | None
) -> None:
    coarse = single(tmp_path / "sequential", strategy="sequential", shrink=None, final=scores(target, 1.5))
    entry = entry_of([single(tmp_path / "single"), coarse, bam(tmp_path / "bam")])
    assert (entry["verdict"], entry["envelope_runs"], entry["reason"]) == ("beyond", ["single"], reason)


def test_a_run_worse_than_the_base_in_both_is_inside(tmp_path: Path) -> None:
    folders = [single(tmp_path / "single", shrink=None), bam(tmp_path / "bam", target=2.9, source=1.5)]
    entry = entry_of(folders)
    assert (entry["verdict"], entry["less_forgetting"]) == ("inside", None)
    assert entry["envelope_source"] == pytest.approx(BASE_SCORES["docs.en"])
    kept = [folders[0], bam(tmp_path / "kept/bam", target=2.9, source=1.1)]
    assert entry_of(kept)["reason"] == "its target score is worse than the base's"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "example/other"}, "other base: example/en-docs-8m and example/other"),
        ({"total_tokens": 400_000}, "other training tokens: 500,000 and 400,000"),
        ({"precision": "16bit"}, "other precision in evaluation: 4bit and 16bit"),
        ({"done": 0}, "single is unfinished; "),
    ],
)
def test_rivals_that_cannot_be_compared_say_why(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    entry = entry_of([bam(tmp_path / "bam"), single(tmp_path / "single", **changes)])
    assert (entry["verdict"], entry["envelope_runs"], entry["n"]) == ("not compared", [], 0)
    assert entry["reason"].startswith("no other run can be compared with it: single (")
    assert words in entry["reason"]


def test_a_rival_measured_on_other_text_is_no_rival(tmp_path: Path) -> None:
    folders = [bam(tmp_path / "bam"), single(tmp_path / "single", shrink=None)]
    path = folders[1] / "iterations/01/eval.json"
    body = read(path)
    body["scores"][0]["bytes"] += 1
    record(path, body)
    assert "single (other evaluation sets, or other text under the same names)" in entry_of(folders)["reason"]


def test_one_of_two_rivals_is_left_out_with_its_reason(tmp_path: Path) -> None:
    folders = [single(tmp_path / "single"), single(tmp_path / "long", total_tokens=900_000), bam(tmp_path / "bam")]
    entry = entry_of(folders)
    assert entry["verdict"] == "beyond"
    assert entry["reason"] == "long is left out: other training tokens: 500,000 and 900,000"
    assert "But: long is left out" in sentence(folders)


def test_seeds_of_one_recipe_alone_have_no_rival(tmp_path: Path) -> None:
    folders = [bam(tmp_path / f"bam-{seed}", seed=seed) for seed in (0, 1)]
    entry = entry_of(folders)
    assert entry["verdict"] == "not compared"
    alone = "there is no run of another recipe among them"
    assert entry["reason"] == f"bam-0: {alone}; bam-1: {alone}"


def test_other_recipes_are_other_groups(tmp_path: Path) -> None:
    folders = [bam(tmp_path / "r32", rank=32), bam(tmp_path / "r64"), single(tmp_path / "single")]
    assert [one["group"] for one in compare(folders)["envelope"]] == ["r32", "r64", "single"]


def test_every_group_has_every_key_and_the_page_shows_it(tmp_path: Path) -> None:
    comparison = compare([single(tmp_path / "single"), bam(tmp_path / "bam")])
    wanted = "group runs seeds target source envelope_source envelope_runs difference interval interval_over n"
    for one in json.loads(json.dumps(comparison, allow_nan=False))["envelope"]:
        assert list(one) == [*wanted.split(), "less_forgetting", "verdict", "reason"]
    # bam's curve was not measured, and it forgot less: nothing stands against the single run's final model.
    assert comparison["envelope"][0]["reason"] == "bam learned less (its best target score is 1.6000, not 1.4000)"
    page = render_html(comparison["runs"], comparison)
    assert "Forgetting at the same target score" in page
    assert "bam is beyond the envelope" in page
    text = render_text(comparison["runs"], comparison)
    assert "−0.0700" in text
    assert "Not compared: nothing here says" not in text


def test_a_run_on_its_own_says_how_to_compare_it(tmp_path: Path) -> None:
    report = collect(bam(tmp_path / "bam"))
    text = " ".join(render_text([report], None).split())
    page = render_html([report], None).replace("<code>", "`").replace("</code>", "`")
    for shown in (text, page):
        assert "Not compared: " in shown
        assert "`bam-lora compare RUN OTHER` after `bam-lora shrink OTHER`" in shown
        assert "`bam-lora run RECIPE --baseline 0.05`" in shown
