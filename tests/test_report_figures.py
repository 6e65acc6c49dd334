"""The planes of learning, forgetting and change: models stand where their scores say, nothing stands for nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_pictures import drawn, marks, near, scale, svgs
from report_runs import write_run

from bam_lora.report import collect, compare, render_html
from bam_lora.report.figure import Runs
from bam_lora.report.places import Place
from bam_lora.report.plane import envelope_at


def test_every_model_stands_in_the_plane_where_its_scores_say(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", iterations=4, others=True))
    found = marks(drawn(report)["plot-plane"])
    assert found.pop("base") == near(0, 0)
    for item in report["iterations"]:
        measured = item["measured"]
        assert found.pop(f"bam, iteration {item['iteration']}") == near(measured["learned"], measured["forgotten"])
    names = ["whole change scaled by λ 0.4", "whole change scaled by λ 0.8", None]
    names += ["checkpoint step 20", "average of checkpoints (EMA) 0.9"]
    for name, point in zip(names, report["shrink"], strict=True):
        if name:
            assert found.pop(f"bam, {name}") == near(point["learned"], point["forgotten"])
    # λ = 1 is the last iteration's model and has no mark of its own.
    assert found == {}


def test_the_line_along_lambda_begins_at_the_base_and_ends_at_the_last_iteration(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", others=True))
    svg = drawn(report)["plot-plane"]
    x, y = scale(svg)
    (thin,) = [path for path in svg.iter("path") if str(path.get("class")).startswith("line thin")]
    ends = [tuple(map(float, pair.split())) for pair in str(thin.get("d"))[1:].split("L")]
    points = [(x(a), y(b)) for a, b in ends]
    shrink = [(point["learned"], point["forgotten"]) for point in report["shrink"][:2]]
    summary = report["summary"]
    for point, wanted in zip(points, [(0, 0), *shrink, (summary["learned"], summary["forgotten"])], strict=True):
        assert point == near(*wanted)
    labels = [text.text for text in svg.iter("text") if "label" in str(text.get("class"))]
    assert {"base", "1", "2", "λ 0.4", "λ 0.8"} <= set(labels)


def test_the_size_of_the_change_is_the_sum_since_the_base_over_the_weights(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", others=True))
    pictures = drawn(report)
    measured = report["iterations"][1]["measured"]
    relative = 9.75 * 2**0.5 / 424.5
    for role in ("learned", "forgotten"):
        found = marks(pictures[f"plot-change-{role}"])
        x, y = found["bam, iteration 2"]
        assert x == pytest.approx(relative, abs=1e-4)
        assert y == pytest.approx(measured[role], abs=2e-3)
        x, y = found["bam, whole change scaled by λ 0.4"]
        assert x == pytest.approx(0.4 * 13.25 / 424.5, abs=1e-4)
        assert y == pytest.approx(report["shrink"][0][role], abs=2e-3)


def lines_of(svg: Any, kind: str) -> list[list[tuple[float, float]]]:
    """The places, in data units, that the lines of a class run through."""
    x, y = scale(svg)
    paths = [str(path.get("d")) for path in svg.iter("path") if str(path.get("class")).startswith(kind)]
    return [[(x(float(a)), y(float(b))) for a, b in (pair.split() for pair in path[1:].split("L"))] for path in paths]


def test_losses_stand_over_the_tokens_branch_after_branch(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", done=1))
    svg = drawn(report)["plot-loss-0"]
    found = lines_of(svg, "line thin")
    assert len(found) == len(report["losses"]) == 2
    for start, item, line in zip((0, 125_000), report["losses"], found, strict=True):
        assert item["tokens"][-1] == 125_000
        for tokens, (_, loss), (x, y) in zip(item["tokens"], item["points"], line, strict=True):
            assert x == pytest.approx(start + tokens, abs=600)
            assert y == pytest.approx(loss, abs=0.01)
    (merge,) = [path for path in svg.iter("path") if path.get("class") == "rule"]
    assert scale(svg)[0](float(str(merge.get("d"))[1:].split()[0])) == pytest.approx(250_000, abs=600)


def test_losses_of_runs_that_logged_no_tokens_stand_over_the_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bam")
    path = run / "iterations/01/branch-1/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in one.items() if k != "tokens"}) + "\n" for one in lines))
    report = collect(run)
    assert [item["tokens"] is None for item in report["losses"]] == [True, False, False, False]
    svg = drawn(report)["plot-loss-0"]
    assert "optimizer steps, all branches" in [text.text for text in svg.iter("text")]
    assert [round(line[0][0]) for line in lines_of(svg, "line thin")] == [1, 41, 81, 121]


def test_bars_are_as_long_as_their_parts(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam"))
    pictures = drawn(report)
    sources = report["data"]["sources"]
    for name, wanted in (
        ("plot-cost", [v for v in report["cost"]["seconds_by_stage"].values() if v]),
        ("plot-data", [source["used_tokens"] for source in sources]),
    ):
        groups = list(pictures[name].iter("g"))
        assert [float(group.get("data-value", "")) for group in groups] == wanted
        widths = [float(box.get("width", "")) for group in groups for box in group.iter("rect")]
        assert [w / sum(widths) for w in widths] == pytest.approx([v / sum(wanted) for v in wanted], abs=1e-3)


def test_a_run_without_other_models_has_the_plain_plane(tmp_path: Path) -> None:
    page = render_html([collect(write_run(tmp_path / "bam"))], None)
    assert len(marks(svgs(page)["plot-plane"])) == 3
    assert "line thin" not in page.split("plot-plane")[1].split("</svg>")[0]
    for absent in ("scaled by λ", ">checkpoint", "envelope", "Models beside", "Learned merge weights", "<h4>"):
        assert absent not in page.split("<body>")[1]


def test_what_was_not_recorded_has_no_figure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "single", strategy="single", iterations=1, branches=1)
    (run / "iterations/01/fold.json").unlink()
    found = drawn(collect(run)).keys()
    always = {"plot-loss-0", "plot-step-0", "plot-cost", "plot-data"}
    assert found == {"plot-target", "plot-source", "plot-plane", *always}
    for path in run.rglob("eval.json"):
        path.unlink()
    assert drawn(collect(run)).keys() == always


def at(learned: float, forgotten: float) -> Place:
    return Place("shrink", "", learned, forgotten, None, "")


def test_the_envelope_interpolates_within_lines_and_steps_between_them() -> None:
    lines = [[at(0, 0), at(1, 0.2)], [at(0.5, 0.3)], [at(1.5, 0.6)], [at(0.8, 0.1)]]
    assert envelope_at(lines, 0.25) == pytest.approx(0.05)
    assert envelope_at(lines, 0.7) == pytest.approx(0.1)
    assert envelope_at(lines, 0.9) == pytest.approx(0.18)
    assert envelope_at(lines, 1.2) == pytest.approx(0.6)
    assert envelope_at(lines, 1.6) is None


def judged(comparison: dict[str, Any], groups: dict[str, list[str]], source: float) -> dict[str, Any]:
    """The comparison with the last group judged against an envelope that has this source score."""
    entries = []
    for group, names in groups.items():
        own = [report["summary"] for report in comparison["runs"] if report["name"] in names]
        entry = dict.fromkeys(("envelope_source", "interval", "interval_over", "difference", "less_forgetting"))
        entry |= {"group": group, "runs": names, "seeds": [7], "n": 1, "envelope_runs": []}
        entry |= {"verdict": "not compared", "reason": "nothing to compare with"}
        entries.append({**entry, "target": own[0]["target_after"], "source": own[0]["source_after"]})
    judgement = {"verdict": "beyond", "reason": None, "interval_over": "seeds", "less_forgetting": None}
    entries[-1] |= {**judgement, "envelope_source": source, "interval": [-0.05, -0.01], "difference": -0.03}
    return {**comparison, "envelope": entries}


def test_the_rivals_envelope_and_the_distance_from_it_are_drawn_where_they_were_judged(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "single", strategy="single", iterations=1, branches=1, others=True)]
    comparison = compare([*folders, write_run(tmp_path / "bam")])
    plain = {**comparison, "envelope": []}
    assert "lower envelope" not in render_html(plain["runs"], plain)
    comparison = judged(comparison, {"single": ["single"], "bam": ["bam"]}, 1.2)
    page = render_html(comparison["runs"], comparison)
    assert page.count("lower envelope of the rivals") == 1
    svg = svgs(page)["plot-plane"]
    x, y = scale(svg)
    (band,) = [path for path in svg.iter("path") if path.get("class") == "line band"]
    points = [tuple(map(float, pair.split())) for pair in str(band.get("d"))[1:].split("L")]
    places = [(x(a), y(b)) for a, b in points]
    single, bam = (report["summary"] for report in comparison["runs"])
    assert places[0] == near(0, 0)
    assert places[-1] == near(single["learned"], single["forgotten"])
    inner = comparison["runs"][0]["shrink"][1]
    assert min(b for a, b in places if a > inner["learned"] - 2e-3) == pytest.approx(inner["forgotten"], abs=1e-3)
    gaps = [m for m in svg.iter("path") if m.get("class") == "line gap"]
    (top, bottom) = [tuple(map(float, pair.split())) for pair in str(gaps[0].get("d"))[1:].split("L")]
    assert (x(top[0]), y(top[1])) == near(bam["learned"], bam["forgotten"])
    assert (x(bottom[0]), y(bottom[1])) == near(bam["learned"], 1.2 - bam["source_before"])
    assert "difference −0.0300 (95 % interval −0.0500 to −0.0100)" in (svg.findtext("desc") or "")


def test_rivals_of_another_seed_or_base_do_not_bound_the_envelope(tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", strategy="single", iterations=1, branches=1, base="example/other")
    comparison = judged(compare([other, write_run(tmp_path / "bam")]), {"other": ["other"], "bam": ["bam"]}, 1.2)
    assert "line band" not in render_html(comparison["runs"], comparison)


def test_seeds_of_one_recipe_share_colour_and_name(tmp_path: Path) -> None:
    names = ["bam-0", "bam-1", "single-0"]
    comparison = compare([write_run(tmp_path / name) for name in names])
    comparison = judged(comparison, {"bam": names[:2], "single-0": names[2:]}, 1.2)
    runs = Runs.of(comparison["runs"], comparison)
    assert (runs.slots, runs.names) == ([0, 0, 1], ["bam", "single-0"])
    assert [name for _, name in runs.legend()] == ["bam", "single-0"]
    assert Runs.of(comparison["runs"], {"pairs": []}).slots == [0, 1, 2]


def test_what_is_of_one_run_is_folded_where_there_are_many(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(i), learned=1) for i in range(4)]
    few, many = (compare(chosen) for chosen in (folders[:3], folders))
    pages = [render_html(comparison["runs"], comparison) for comparison in (few, many)]
    folded = ["".join(re.findall("<details>.*?</details>", page, flags=re.DOTALL)) for page in pages]
    assert [text.count('id="plot-cosine-') for text in pages] == [6, 8]
    assert [text.count('id="plot-cosine-') for text in folded] == [0, 8]
    assert [text.count('id="learned-') for text in folded] == [0, 16]
