"""compare and the verdict: what may be said about two runs, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import FINAL, record, write_run

from bam_lora.errors import UserError
from bam_lora.report import collect, compare, render_text
from bam_lora.report.verdict import verdict
from bam_lora.store import read_record


def runs(tmp_path: Path, **changes: Any) -> list[Path]:
    """`single` as it is, and `bam` with changes."""
    return [
        write_run(tmp_path / "single", strategy="single", iterations=1, branches=1),
        write_run(tmp_path / "bam", **changes),
    ]


def final(target: float, source: float) -> dict[str, float]:
    """The single run's scores, shifted."""
    base = FINAL["single"]
    return {name: value + (source if name == "docs.en" else target) for name, value in base.items()}


def say(tmp_path: Path, **changes: Any) -> str:
    comparison = compare(runs(tmp_path, **changes))
    return verdict(comparison["runs"], comparison)


def test_differences_are_a_minus_b_and_ratios_a_over_b(tmp_path: Path) -> None:
    comparison = compare(runs(tmp_path))
    single, bam = (report["summary"] for report in comparison["runs"])
    (pair,) = comparison["pairs"]
    assert (pair["a"], pair["b"], pair["comparable"], pair["reasons"]) == ("single", "bam", True, [])
    assert pair["learned_difference"] == single["learned"] - bam["learned"]
    assert pair["forgotten_difference"] == single["forgotten"] - bam["forgotten"]
    assert pair["target_after_difference"] == single["target_after"] - bam["target_after"]
    assert pair["source_after_difference"] == single["source_after"] - bam["source_after"]
    assert pair["delta_norm_ratio"] == 17.5 / 13.25
    assert pair["wall_seconds_ratio"] == 1.0


def test_more_learned_and_more_forgotten_means_that_neither_dominates(tmp_path: Path) -> None:
    text = say(tmp_path)
    assert text == (
        "single learned more (1.0401 against 1.0034 bits per byte); bam forgot less (0.0322 against 0.1086 bits per "
        "byte). Learning and forgetting trade off here: neither run dominates."
    )


def test_better_on_both_counts(tmp_path: Path) -> None:
    text = say(tmp_path, final=final(-0.05, -0.05))
    assert text == (
        "bam learned more (1.0901 against 1.0401 bits per byte) and forgot less (0.0586 against 0.1086 bits per byte): "
        "better on both counts."
    )


def test_differences_below_two_standard_errors_are_a_tie(tmp_path: Path) -> None:
    text = say(tmp_path, final=final(-0.01, -0.01))
    assert text == (
        "single and bam learned the same within noise (1.0401 and 1.0501 bits per byte); "
        "single and bam forgot the same within noise (0.1086 and 0.0986 bits per byte)."
    )


def test_a_tie_in_one_of_the_two(tmp_path: Path) -> None:
    text = say(tmp_path, final=final(0.0, -0.05))
    assert "learned the same within noise" in text
    assert "bam forgot less (0.0586 against 0.1086 bits per byte)" in text
    assert "dominates" not in text


def test_no_standard_error_no_winner(tmp_path: Path) -> None:
    changed = runs(tmp_path, stderr=None)
    (pair,) = compare(changed)["pairs"]
    assert (pair["learned_more"], pair["forgot_less"]) == ("unknown", "unknown")
    comparison = compare(changed)
    assert "cannot be told from noise" in verdict(comparison["runs"], comparison)


def test_pairing_by_document_resolves_what_independent_errors_cannot(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "single", strategy="single", iterations=1, branches=1, paired=True),
        write_run(tmp_path / "bam", final=final(-0.01, -0.01), paired=True),
    ]
    (pair,) = compare(folders)["pairs"]
    assert pair["paired_stderr"] is True
    assert (pair["learned_more"], pair["forgot_less"]) == ("b", "b")


def test_a_target_that_got_worse_is_said(tmp_path: Path) -> None:
    text = say(tmp_path, final={"docs.de": 2.5, "stories.de": 2.7, "docs.en": 1.1372})
    assert text.endswith("Against the base, bam did not improve on the target at all.")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "example/other"}, "other base: example/en-docs-8m and example/other"),
        ({"total_tokens": 480_000}, "other training tokens: 500,000 and 480,000"),
        ({"precision": "16bit"}, "other precision in evaluation: 4bit and 16bit"),
        ({"iterations": 4, "done": 3}, "bam is unfinished"),
        ({"done": 0}, "bam has not measured both languages"),
    ],
)
def test_runs_that_cannot_be_compared_say_why(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    comparison = compare(runs(tmp_path, **changes))
    (pair,) = comparison["pairs"]
    assert pair["comparable"] is False
    assert words in pair["reasons"]
    assert (pair["learned_more"], pair["forgot_less"]) == (None, None)
    text = verdict(comparison["runs"], comparison)
    assert text.startswith("single and bam cannot be compared: ")
    assert words in text


def test_token_counts_within_one_percent_are_equal(tmp_path: Path) -> None:
    assert compare(runs(tmp_path, total_tokens=496_000))["pairs"][0]["comparable"] is True


def test_an_evaluation_file_that_was_edited_in_between(tmp_path: Path) -> None:
    folders = runs(tmp_path)
    path = folders[1] / "iterations/02/eval.json"
    body = read_record(path)
    assert body is not None
    body["scores"][0]["bytes"] += 1
    record(path, body)
    assert "other evaluation sets, or other text under the same names" in compare(folders)["pairs"][0]["reasons"]


def test_several_runs_are_ranked_with_their_ties(tmp_path: Path) -> None:
    more = write_run(tmp_path / "sequential", iterations=4, branches=1, final=final(0.005, -0.005))
    comparison = compare([*runs(tmp_path), more])
    assert len(comparison["pairs"]) == 3
    assert verdict(comparison["runs"], comparison) == (
        "Of 3 runs, single and sequential learned most (a tie within noise); bam forgot least. "
        "Learning and forgetting trade off here: no run dominates."
    )
    table = render_text(comparison["runs"], comparison)
    assert "bam against sequential" in table


def test_several_runs_of_which_some_cannot_be_compared(tmp_path: Path) -> None:
    comparison = compare([*runs(tmp_path), write_run(tmp_path / "other", base="example/other")])
    text = verdict(comparison["runs"], comparison)
    assert text.startswith("Not all of these runs can be compared: single and other (other base")


def test_runs_of_the_same_name_get_as_much_path_as_tells_them_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / seed / "bam") for seed in ("seed-1", "seed-2")]
    assert [report["name"] for report in compare(folders)["runs"]] == ["seed-1/bam", "seed-2/bam"]


def test_too_few_runs_and_the_same_run_twice(tmp_path: Path) -> None:
    folders = runs(tmp_path)
    with pytest.raises(UserError, match="expected two or more runs, found 1"):
        compare(folders[:1])
    with pytest.raises(UserError, match=r"expected different runs, found .*single twice"):
        compare([folders[0], folders[0]])


def test_one_run_alone_is_not_compared(tmp_path: Path) -> None:
    text = verdict([collect(write_run(tmp_path / "bam"))], None)
    assert text.startswith("The target improved by 1.0034, from 2.4614 to 1.4579 bits per byte; the source worsened by")
    assert "compared" not in text


def test_one_run_within_noise_and_unfinished(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", iterations=4, done=1, stderr=0.05))
    text = verdict([report], None)
    assert text.startswith("Unfinished: 1 of 4 iterations merged. ")
    assert "the source changed by +0.0140, from 1.1372 to 1.1512 bits per byte, which is within noise" in text
    empty = collect(write_run(tmp_path / "empty", done=0))
    assert "The target was not measured before and after" in verdict([empty], None)
