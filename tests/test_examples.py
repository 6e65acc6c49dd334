"""The examples do what their heads say."""

from __future__ import annotations

import ast
import difflib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_docs import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = {path.stem: path for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "tiny"}


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, float]]:
    """What `tiny.show` printed."""
    found = {}
    for line in capsys.readouterr().out.splitlines():
        when, colon, rest = line.partition(": eval_")
        if colon:
            found[when] = {name: float(value) for name, value in (pair.split() for pair in f"eval_{rest}".split(", "))}
    return found


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs the scripts on fewer stories, in a folder of their own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tiny = __import__("tiny")
    read = tiny.read

    def fewer(language: str, documents: int, seed: int) -> Dataset:
        rows: Dataset = read(language, min(documents, 24), seed)
        return rows

    monkeypatch.setattr(tiny, "read", fewer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])


def test_each_says_what_it_shows_and_how_long_it_takes() -> None:
    assert {"sft_plain", "sft_bam", "chat", "dpo", "callbacks"} <= SCRIPTS.keys()
    for name, path in SCRIPTS.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text
        assert f"python examples/{name}.py" in text
        assert "on two cores" in text


def test_branch_and_merge_is_the_plain_script_with_another_class() -> None:
    plain, bam = (SCRIPTS[name].read_text(encoding="utf-8").splitlines() for name in ("sft_plain", "sft_bam"))
    changed = [line for line in difflib.ndiff(plain, bam) if line[:1] in "+-" and line[2:].strip()]
    assert changed == [
        "- from trl import SFTConfig, SFTTrainer",
        "+ from trl import SFTConfig",
        "+ from bam_lora import BamConfig, BamTrainer",
        "- trainer = SFTTrainer(",
        "+ trainer = BamTrainer(",
        "+     bam=BamConfig(slices=4, branches=2),",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft_plain", "sft_bam", "chat"])
def test_it_learns(name: str, shortened: None, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPTS[name]))
    scores = shown(capsys)
    assert scores["before"].keys() <= scores["after"].keys()
    loss = next(iter(scores["before"]))
    assert scores["after"][loss] < scores["before"][loss] - 0.05


@pytest.mark.slow
def test_callbacks_write_a_table(shortened: None, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPTS["callbacks"]))
    lines = Path("runs/callbacks.csv").read_text().splitlines()
    assert lines[0] == "iteration,tokens,eval_target_bits_per_byte,eval_source_bits_per_byte"
    assert [line.partition(",")[0] for line in lines[1:]] == ["1", "2"]
    assert "iteration 2: merged by linear, weights [0.5, 0.5]" in capsys.readouterr().out


@pytest.mark.slow
def test_preferences_are_learned(shortened: None) -> None:
    names: dict[str, Any] = runpy.run_path(str(SCRIPTS["dpo"]))
    assert names["judged"]["eval_rewards/margins"] > 0
    plan = json.loads(Path("runs/dpo/plan.json").read_text())
    assert plan["data"]["sources"][0]["unit"] == "examples"
