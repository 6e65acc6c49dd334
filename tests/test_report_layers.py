"""Cosines and learned coefficients by layer: every number in its place, whatever the weights are called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_pictures import drawn, marks, svgs
from report_runs import learned_weights, record, write_run

from bam_lora.report import collect, compare, render_html
from bam_lora.report.layers import cosine_by_layer, place, row_names
from bam_lora.store import read_record

EVIL = "<script>alert('x')</script>{{ 7 * 7 }}"


def test_cosines_stand_over_their_layers_one_line_an_iteration(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", branches=3, layers=5))
    svg = drawn(report)["plot-cosine-0"]
    found = marks(svg)
    assert len(found) == 10
    for item in report["iterations"]:
        for entry in item["cosine_by_layer"]:
            place_ = found[f"iteration {item['iteration']}, layer {entry['layer']}"]
            assert place_ == (pytest.approx(entry["layer"], abs=0.01), pytest.approx(entry["cosine"], abs=1e-3))
    assert "Iteration 2: 0.217 in layer 0" in (svg.findtext("desc") or "")


def test_what_an_iteration_adds_to_a_layer_is_the_norm_over_its_weights(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", layers=5))
    found = marks(drawn(report)["plot-step-0"])
    assert len(found) == 10
    for item in report["iterations"]:
        for entry in item["norm_by_layer"]:
            assert entry["merged_norm"] == pytest.approx((2.5**2 + 2.5**2) ** 0.5)
            place_ = found[f"iteration {item['iteration']}, layer {entry['layer']}"]
            assert place_ == (pytest.approx(entry["layer"], abs=0.01), pytest.approx(entry["merged_norm"], abs=5e-3))


def test_iterations_are_coloured_in_their_order(tmp_path: Path) -> None:
    svg = drawn(collect(write_run(tmp_path / "bam", iterations=20, branches=2)))["plot-cosine-0"]
    lines = [
        str(path.get("class")).split()[1] for path in svg.iter("path") if str(path.get("class")).startswith("line")
    ]
    assert len(lines) == 20
    assert lines == sorted(lines)
    assert set(lines) == {f"r{shade}" for shade in range(8)}


def test_a_model_of_one_layer_has_its_cosines(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", layers=1, learned=2))
    pictures = drawn(report)
    texts = [text.text for text in pictures["plot-cosine-0"].iter("text")]
    assert "0" in texts
    assert len(list(pictures["plot-cosine-0"].iter("g"))) == 2
    assert len(list(pictures["learned-0-2-1"].iter("rect"))) == 2


def change_merge(run: Path, iteration: int, **changes: Any) -> None:
    path = run / f"iterations/{iteration:02d}/merge.json"
    body = read_record(path)
    assert body is not None
    record(path, {**body, **changes})


def test_weights_outside_the_layers_stand_under_their_own_names(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bam", iterations=1)
    names = ["transformer.h.1.attn.c_attn.weight", "lm_head.weight", "transformer.h.0.attn.c_attn.weight"]
    tensors = {name: {"norms": [1, 1], "cosine": 0.1 * (i + 1), "merged_norm": 1} for i, name in enumerate(names)}
    change_merge(run, 1, tensors=tensors, learned=learned_weights(names, 2, 1, 1))
    report = collect(run)
    layers = report["iterations"][0]["cosine_by_layer"]
    assert [(entry["layer"], round(entry["cosine"], 6)) for entry in layers] == [(0, 0.3), (1, 0.1), ("lm_head", 0.2)]
    pictures = drawn(report)
    assert "lm_head" in [text.text for text in pictures["plot-cosine-0"].iter("text")]
    assert marks(pictures["plot-cosine-0"])["iteration 1, lm_head"] == pytest.approx((2, 0.2), abs=5e-3)
    texts = [text.text for text in pictures["learned-0-1-2"].iter("text") if text.get("class") == "tick"]
    assert texts == ["c_attn", "lm_head", "0", "1", "lm_head"]


def test_places_of_weights() -> None:
    wanted = {
        "model.layers.3.self_attn.q_proj.weight": ("model.layers", 3, "q_proj"),
        "model.layers.12.mlp.experts.7.up_proj.weight": ("model.layers", 12, "up_proj"),
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": ("encoder.block", 0, "wi"),
        "h.0.attn.weight": ("h", 0, "attn"),
        "model.embed_tokens.weight": ("model.embed_tokens", None, "embed_tokens"),
    }
    assert {name: (p.stack, p.layer, p.kind) for name in wanted if (p := place(name))} == wanted


def test_several_stacks_of_layers_are_told_apart() -> None:
    names = ["decoder.layers.0.q.weight", "encoder.layers.10.q.weight", "encoder.layers.9.q.weight", "head.weight"]
    rows = row_names(place(name) for name in names)
    assert list(rows.values()) == ["decoder.layers.0", "encoder.layers.9", "encoder.layers.10", "head"]
    cosines = {name: {"cosine": None if name == "head.weight" else 0.5} for name in names}
    assert [entry["layer"] for entry in cosine_by_layer(cosines) or []] == list(rows.values())[:3]
    assert cosine_by_layer({"head.weight": {"cosine": None}}) is None


@pytest.mark.parametrize("branches", [2, 3])
def test_learned_coefficients_are_drawn_against_the_uniform_weight(tmp_path: Path, branches: int) -> None:
    report = collect(write_run(tmp_path / "bam", branches=branches, learned=4))
    page = render_html([report], None)
    pictures = svgs(page)
    maps = [f"learned-0-{iteration}-{branch + 1}" for iteration in (1, 2) for branch in range(branches)]
    assert {name for name in pictures if name.startswith("learned")} == set(maps)
    every = [item["learned"]["coefficients"] for item in report["iterations"]]
    means = [branches * sum(c) / 4 for weights in every for one in weights.values() for c in one]
    reach = max(0.1, *(abs(mean - 1) for mean in means))
    for name in maps:
        iteration, branch = int(name.split("-")[2]), int(name.split("-")[3])
        cells = list(pictures[name].iter("g"))
        assert len(cells) == 6
        for cell in cells:
            weight = cell.findtext("title", "").partition(",")[0] + ".weight"
            groups = every[iteration - 1][weight][branch - 1]
            relative = branches * sum(groups) / 4
            (box,) = cell.iter("rect")
            assert box.get("class") == ("cell more" if relative > 1 else "cell less")
            assert float(box.get("fill-opacity", 0)) == pytest.approx(0.5 * abs(relative - 1) / reach, abs=1e-3)
            assert cell.findtext("text") == f"{sum(groups) / 4:.2f}"
            assert f"groups: {', '.join(f'{value:.4f}' for value in groups)}" in cell.findtext("title", "")
    details = re.findall(r"<summary>(Iteration \d)</summary>.*?</details>", page, flags=re.DOTALL)
    assert details == ["Iteration 1"]
    assert page.index('id="learned-0-2-1-title"') < page.index("<summary>Iteration 1<")


def test_the_scores_while_learning_are_listed_with_the_chosen_step(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", learned=1))
    page = render_html([report], None)
    assert page.count("24 (chosen)") == 2
    for entry in report["iterations"][1]["learned"]["selection"]:
        for key in ("target", "source", "objective"):
            assert f'<data value="{entry[key]}">{entry[key]:.4f}</data>' in page


def test_beside_other_runs_only_the_newest_learned_merge_is_drawn(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / "a", learned=2), write_run(tmp_path / "b", learned=2)])
    found = svgs(render_html(comparison["runs"], comparison))
    wanted = {"learned-0-2-1", "learned-0-2-2", "learned-1-2-1", "learned-1-2-2"}
    assert {name for name in found if name.startswith("learned")} == wanted


def test_experts_of_a_layer_share_a_cell_and_many_groups_are_given_by_their_range(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bam", iterations=1)
    names = [f"m.layers.0.experts.{i}.up_proj.weight" for i in range(2)] + ["m.layers.0.q_proj.weight"]
    coefficients = {names[0]: [[0.2], [0.8]], names[1]: [[0.4], [0.6]], names[2]: [[i / 50 for i in range(20)]] * 2}
    change_merge(run, 1, learned={"selection": [], "coefficients": coefficients})
    cells = {c.findtext("text"): c.findtext("title", "") for c in drawn(collect(run))["learned-0-1-1"].iter("g")}
    assert cells.keys() == {"0.30", "0.19"}
    assert "0.3000, 0.600 × uniform (mean over this and 1 more weights)" in cells["0.30"]
    assert "20 groups from 0.0000 to 0.3800" in cells["0.19"]


def test_a_deep_model_is_drawn_in_low_rows_without_numbers(tmp_path: Path) -> None:
    svg = drawn(collect(write_run(tmp_path / "bam", iterations=1, layers=60, learned=1)))["learned-0-1-1"]
    assert len(list(svg.iter("rect"))) == 120
    assert [text for text in svg.iter("text") if text.get("class") == "value"] == []
    assert float(str(svg.get("viewBox")).split()[3]) < 600


def test_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bam", iterations=1, others=True)
    weight = f"model.layers.0.{EVIL}.weight"
    tensors = {weight: {"norms": [1, 1], "cosine": 0.3, "merged_norm": 1}, EVIL: {"cosine": 0.1}}
    change_merge(run, 1, tensors=tensors, learned=learned_weights([weight, EVIL], 2, 2, 1))
    report = collect(run)
    report["shrink"][0]["label"] = report["shrink"][3]["label"] = EVIL
    page = render_html([report], None)
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in page
    assert page.count("&lt;script&gt;") > 5
    assert len(svgs(page)) > 6
