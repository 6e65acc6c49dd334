"""The grid of benchmarks/forgetting: every run that it lists has a recipe, and no key of it goes unread."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from bam_lora.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "benchmarks" / "forgetting"
GRID: dict[str, Any] = yaml.safe_load((FOLDER / "grid.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)  # it imports what lies beside it
    spec = importlib.util.spec_from_file_location("forgetting_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_cell_has_a_recipe(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_LORA_BENCH_DATA", str(tmp_path))
    cells = script.cells_of(GRID, None)
    assert len(cells) >= 2
    for cell in [*script.bases_of(GRID, cells), *cells]:
        made = load_recipe(FOLDER / "recipe.yaml", cell.overrides(tmp_path))
        assert made.seed == cell.seed
        assert made.strategy == cell.settings.get("strategy", "bam")


def test_no_key_goes_unread() -> None:
    assert {key for arm in GRID["arms"].values() for key in arm} <= {"set", "shrink", "seeds", "regimes", "against"}
    assert {key for regime in GRID["regimes"].values() for key in regime} <= {"set", "seeds", "base"}


def test_rivals_are_arms_with_a_curve() -> None:
    named = [rival for arm in GRID["arms"].values() for rival in arm.get("against", ())]
    assert named
    assert all(GRID["arms"][rival].get("shrink") for rival in named)
