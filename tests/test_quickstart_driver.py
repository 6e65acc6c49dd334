"""The demonstration, shortened: it leaves what it says, and says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bam_lora.errors import UserError
from bam_lora.quickstart import driver
from bam_lora.recipe import load_recipe


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        driver, "_DOCUMENTS", {"target.train": 12, "replay.train": 4, "target.test": 2, "source.test": 2}
    )
    monkeypatch.setattr(driver, "_RECIPE", driver._RECIPE.replace("160k", "4k").replace("r: 32", "r: 4"))


def test_quickstart_leaves_both_runs_and_a_comparison(tmp_path: Path) -> None:
    output = tmp_path / "quick: start #1"  # a name that YAML would not take unquoted
    text = driver.quickstart(output)
    for name in ("single/model/model.safetensors", "bam/model/model.safetensors", "bam/ledger.json", "report.html"):
        assert (output / name).is_file(), name
    comparison = json.loads((output / "compare.json").read_text())
    assert [run["strategy"] for run in comparison["runs"]] == ["single", "bam"]
    assert comparison["pairs"][0]["comparable"] is True
    assert json.loads((output / "report.json").read_text())["strategy"] == "bam"
    learned = comparison["runs"][1]["summary"]["learned"]
    assert learned > 0.02
    assert f"{learned:.4f}" in text
    assert "before: Am Abend" in text
    assert "bam-lora run recipes/german/pretrain.yaml" in text
    assert load_recipe(output / "recipe.yaml").slices == 4
    with pytest.raises(UserError, match="expected a new folder, or this quickstart's own"):
        driver.quickstart(output, "bulgarian")


def test_unknown_language(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected german or bulgarian, found klingon"):
        driver.quickstart(tmp_path / "x", "klingon")
    assert not (tmp_path / "x").exists()


def test_recipe_is_yaml_for_both_languages() -> None:
    for language, prompt in driver._PROMPTS.items():
        text = driver._RECIPE.format(folder="f", run='"r"', base='"b"', language=language, prompt=prompt)
        assert yaml.safe_load(text)["evaluation"]["samples"][0] == prompt
