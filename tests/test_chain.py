"""Runs that continue one another end in one model, one ledger and one report that tells of all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl

from bam_lora.ledger import Ledger
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report import collect, render_html, render_text, write_report
from bam_lora.report.chain import chain_iterations_table, chain_scores_table
from bam_lora.report.format import count
from bam_lora.store import read_record


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, texts in (("german", GERMAN), ("english", ENGLISH)):
        write_jsonl(folder / f"{name}.1.jsonl", texts[:10])
        write_jsonl(folder / f"{name}.2.jsonl", texts[10:20])
        write_jsonl(folder / f"{name}.test.jsonl", texts[-3:])
    write_jsonl(folder / "tales.test.jsonl", GERMAN[-6:-3])
    return folder


def recipe(base: Path, files: Path, part: int, sets: tuple[str, ...], **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "base": str(base),
        "output": "unused",
        "data": {
            "target": [{"path": str(files / f"{name}.{part}.jsonl")} for name in ("german", "english")],
            "sequence_length": 64,
            "slicing": "by_dataset",
        },
        "bam": {"slices": 2, "branches": 2},
        "lora": {"r": 2},
        "training": {
            "gradient_accumulation_steps": 1,
            "checkpointing": False,
            "warmup_steps": 0,
            "learning_rate": 5e-3,
        },
        "quantization": {"bits": 16},
        "evaluation": {
            "target": [{"path": str(files / f"{name}.test.jsonl"), "set": name} for name in sets],
            "source": [{"path": str(files / "english.test.jsonl"), "set": "english"}],
            "precision": "16bit",
            "branches": False,
            "window_bytes": 200,
        },
    }
    return recipe_from_dict({**values, **changes})


@pytest.fixture(scope="module")
def chain(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations, a second on its result with another evaluation set, and a third on that."""
    root = tmp_path_factory.mktemp("runs")
    run(recipe(tiny_base, files, 1, ("german",), bam={"slices": 4, "branches": 2}), root / "first")
    run(recipe(root / "first", files, 2, ("german", "tales")), root / "second")
    run(recipe(root / "second", files, 1, ("tales",), strategy="single"), root / "third")
    return root


def test_one_report_tells_of_all_runs(chain: Path) -> None:
    first, second, third = (
        json.loads((chain / name / "report.json").read_text()) for name in ("first", "second", "third")
    )
    assert first["inherited"] == []
    assert [one["name"] for one in second["inherited"]] == ["first"]
    assert [one["name"] for one in third["inherited"]] == ["first", "second"]
    kept = third["inherited"][0]
    for key in ("scores", "summary", "cost", "seeds", "evaluation", "strategy", "mode"):
        assert kept[key] == first[key]
    assert [item["tokens"] for item in kept["iterations"]] == [item["tokens"] for item in first["iterations"]]
    assert [b["group"] for b in kept["iterations"][0]["branches"]] == ["german.1", "english.1"]
    assert third["summary"]["source_before"] == pytest.approx(second["summary"]["source_after"])


def test_one_ledger_and_the_change_from_the_original_base(chain: Path, tiny_base: Path) -> None:
    import torch
    from safetensors.torch import load_file

    ledger = Ledger.load(chain / "third")
    assert ledger.base["name"] == str(tiny_base)
    assert (len(ledger.inherited), len(ledger.iterations)) == (3, 1)
    report = json.loads((chain / "third" / "report.json").read_text())
    new, old = (load_file(folder / "model.safetensors") for folder in (chain / "third" / "model", tiny_base))
    norm = torch.sqrt(sum(((new[name].double() - old[name].double()) ** 2).sum() for name in old))
    assert report["summary"]["delta_norm"] == pytest.approx(float(norm), rel=0.02)  # the folded weights are rounded


def test_scores_from_the_original_base_on(chain: Path) -> None:
    reports = [json.loads((chain / name / "report.json").read_text()) for name in ("first", "second", "third")]
    table = chain_scores_table(reports[2:])
    assert table.columns == ["", "Original base", "After first", "After second", "After third"]
    values = {row[0].text: [cell.value for cell in row[1:]] for row in table.rows}

    def score(place: int, name: str, iteration: int) -> float:
        found = [s for s in reports[place]["scores"] if (s["set"], s["iteration"]) == (name, iteration)]
        return float(found[0]["bits_per_byte"])

    assert values["german (target)"] == [score(0, "german", 0), score(0, "german", 2), score(1, "german", 1), None]
    assert values["tales (target)"] == [None, score(1, "tales", 0), score(1, "tales", 1), score(2, "tales", 1)]
    assert values["english (source)"][0] == score(0, "english", 0)
    assert values["english (source)"][3] == score(2, "english", 1)
    assert len(values) == len(table.rows) == 3


def test_every_iteration_has_a_row_on_the_page_and_in_the_terminal(chain: Path) -> None:
    report = json.loads((chain / "third" / "report.json").read_text())
    table = chain_iterations_table([report])
    assert [(row[0].text, row[1].value) for row in table.rows] == [
        ("first", 1), ("first", 2), ("second", 1), ("third", 1),
    ]  # fmt: skip
    norms = [row[6].value for row in table.rows]
    assert norms[-1] == report["summary"]["delta_norm"]
    tokens = sum(row[2].value or 0 for row in table.rows)
    assert table.note.startswith(f"{count(tokens)} training tokens in 3 runs.")
    page, text = render_html([report], None), render_text([report], None)
    for words in ("From the original base on", "Iterations of all runs", "After second"):
        assert words in page
        assert words in text
    alone = json.loads((chain / "first" / "report.json").read_text())
    assert "From the original base on" not in render_html([alone], None) + render_text([alone], None)
    assert "From the original base on" not in render_html([alone, report], None)


def test_the_card_names_the_original_base_and_every_run(chain: Path, tiny_base: Path) -> None:
    card = (chain / "third" / "model" / "README.md").read_text()
    assert f"# {tiny_base.name}, adapted with bam_lora" in card
    for number, name in enumerate(("first", "second", "third"), start=1):
        assert f"{number}. {name}: " in card
    assert str(chain) not in card


def test_the_report_needs_the_earlier_runs_no_more(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "third", tmp_path / "third")
    before = collect(chain / "third")
    after = write_report(tmp_path / "third")
    assert after["inherited"] == before["inherited"]


def test_a_lost_record_is_made_again_and_one_of_a_failed_start_is_not_kept(
    chain: Path, files: Path, tiny_base: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "second"
    shutil.copytree(chain / "second", copy)
    (copy / "chain.json").unlink()
    shutil.rmtree(copy / "model")
    run(recipe(chain / "first", files, 2, ("german", "tales")), copy)
    assert read_record(copy / "chain.json") == read_record(chain / "second" / "chain.json")

    from bam_lora.errors import UserError

    failing = recipe(chain / "first", files, 1, ("german",), bam={"slices": 3, "branches": 2})
    with pytest.raises(UserError, match=r"bam\.slices: expected a multiple of 2"):
        run(failing, tmp_path / "new")
    assert (tmp_path / "new" / "chain.json").exists()
    assert run(recipe(tiny_base, files, 1, ("german",)), tmp_path / "new")["inherited"] == []
