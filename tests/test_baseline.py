"""The probe of a baseline: both runs at a share of the tokens, and what the report says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from typer.testing import CliRunner

from bam_lora.baseline import probe_baseline, probe_recipe
from bam_lora.cli import app
from bam_lora.errors import UserError
from bam_lora.planning import text_source
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report import collect
from bam_lora.store import read_record


def values(base: Path, folder: Path) -> dict[str, Any]:
    return {
        "base": str(base),
        "output": str(folder / "run"),
        "data": {
            "target": [{"path": str(write_jsonl(folder / "german.jsonl", GERMAN * 2))}],
            "replay": [{"path": str(write_jsonl(folder / "english.jsonl", ENGLISH * 2))}],
            "replay_share": 0.2,
            "sequence_length": 64,
        },
        "bam": {"slices": 6, "branches": 2},
        "lora": {"r": 4},
        "training": {"learning_rate": 5e-3, "gradient_accumulation_steps": 1, "checkpointing": False},
        "evaluation": {
            "target": [{"path": str(write_jsonl(folder / "german.test.jsonl", GERMAN[-3:])), "set": "german"}],
            "source": [{"path": str(write_jsonl(folder / "english.test.jsonl", ENGLISH[-3:])), "set": "english"}],
            "samples": ["Am Morgen"],
        },
    }


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Recipe:
    return recipe_from_dict(values(tiny_base, tmp_path))


def test_probe_recipe_takes_its_share_of_what_was_used(recipe: Recipe) -> None:
    source = {**vars(text_source(recipe.data.target[0])), "role": "target"}
    # Of an extended run the plan holds a source once for each part that used it.
    used = [{**source, "used_tokens": 6_000}, {**source, "used_tokens": 4_000}]
    used.append({**vars(text_source(recipe.data.replay[0])), "role": "replay", "used_tokens": 2_500})
    probe = probe_recipe(recipe, used, 0.05, "single")
    assert (probe.strategy, probe.data.target[0].tokens, probe.data.replay_share) == ("single", 500, 0.2)
    assert (probe.bam.slices, probe.evaluation.samples) == (4, [])
    assert probe.training == recipe.training


@pytest.mark.parametrize(
    ("changes", "share", "words"),
    [
        ({}, 0.0, "expected a share above 0 and at most 1, found 0"),
        ({"strategy": "single"}, 0.05, "found strategy: single"),
        ({"evaluation": {}}, 0.05, "expected evaluation.target and evaluation.source, found not both"),
    ],
)
def test_what_cannot_be_probed(tiny_base: Path, tmp_path: Path, changes: Any, share: float, words: str) -> None:
    recipe = recipe_from_dict({**values(tiny_base, tmp_path), **changes})
    with pytest.raises(UserError, match=words):
        probe_baseline(tmp_path / "run", recipe, share)


def test_run_with_a_probe(recipe: Recipe, tmp_path: Path) -> None:
    from bam_lora.recipe import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = ["run", str(tmp_path / "recipe.yaml"), "--baseline", "0.5"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    probe = read_record(tmp_path / "run" / "baseline.json")
    assert probe is not None
    whole = collect(tmp_path / "run")["cost"]["train_tokens"]
    assert probe["tokens"] == pytest.approx(0.5 * whole, rel=0.1)
    for name in ("single", "bam"):
        (folder,) = (tmp_path / "run" / "baseline").glob(f"0.5-*/{name}")
        trained = collect(folder)["cost"]["train_tokens"]
        assert trained == pytest.approx(probe["tokens"], rel=0.01)
    assert probe["envelope"]["verdict"] in ("beyond", "on", "inside", "not compared")
    said = " ".join(first.stdout.split())
    assert f"A probe on 50 % of the tokens ({probe['tokens']:,})" in said.replace("\N{NO-BREAK SPACE}", " ")
    assert CliRunner().invoke(app, command).exit_code == 0  # finds all of it done
    assert read_record(tmp_path / "run" / "baseline.json") == probe
