"""SIGKILL at random moments: whenever it strikes, the run that goes on ends with the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ENGLISH, GERMAN, write_jsonl

from bam_lora.store import hash_file

pytestmark = pytest.mark.slow


def start(recipe: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bam_lora", "run", str(recipe), "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_untouched(recipe: Path, output: Path) -> float:
    started = time.monotonic()
    assert start(recipe, output).wait() == 0
    return time.monotonic() - started


def run_killed(recipe: Path, output: Path, kills: int, longest_seconds: float, seed: int) -> int:
    """Kills the run up to `kills` times, each after a random while, then lets it finish; returns how often it did."""
    moments = random.Random(seed)
    struck = 0
    for number in range(kills):
        process = start(recipe, output)
        try:
            assert process.wait(timeout=moments.uniform(0.5, longest_seconds)) == 0
            break  # it was faster than the blow
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            struck += 1
            print(f"kill {number + 1}: {stage(output)}", flush=True)
    assert start(recipe, output).wait() == 0
    return struck


def stage(output: Path) -> str:
    """What was there when the blow fell: the newest file, relative to the run."""
    files = [path for path in output.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime).relative_to(output).as_posix() if files else "nothing"


def hashes(output: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted((output / "model").glob("*.safetensors"))}


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_runs_end_with_the_same_bytes(tiny_base: Path, tmp_path: Path, seed: int) -> None:
    write_jsonl(tmp_path / "german.jsonl", GERMAN)
    write_jsonl(tmp_path / "test.jsonl", ENGLISH[:4])
    recipe = {
        "base": str(tiny_base),
        "output": "unused",
        "data": {"target": [{"path": "german.jsonl"}], "sequence_length": 64},
        "bam": {"slices": 4, "branches": 2},
        "lora": {"r": 8},
        "training": {
            "learning_rate": 5e-3,
            "checkpointing": False,
            "num_train_epochs": 6.0,
            "gradient_accumulation_steps": 1,
            "save_steps": 10,
        },
        "evaluation": {"source": [{"path": "test.jsonl"}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    seconds = run_untouched(tmp_path / "recipe.yaml", tmp_path / "untouched")
    struck = run_killed(tmp_path / "recipe.yaml", tmp_path / "killed", 10, seconds, seed)
    assert struck >= 2
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "untouched")


def test_killed_run_on_real_text(bench_data: Path, tmp_path: Path) -> None:
    """The benchmark's run, scored on fewer documents so that a kill does not always strike while scoring."""
    benchmark = Path(__file__).parents[1] / "benchmarks" / "real_text" / "recipe.yaml"
    sets = {
        role: [{"path": str(bench_data / "data" / f"{name}.valid.jsonl"), "documents": 12}]
        for role, name in (("target", "de_docs"), ("source", "en_docs"))
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {"extends": str(benchmark), "training": {"save_steps": 10}, "evaluation": {**sets, "samples": []}}
        )
    )
    seconds = run_untouched(recipe, tmp_path / "untouched")
    struck = run_killed(recipe, tmp_path / "killed", 20, seconds / 5, 0)
    assert struck >= 10
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "untouched")
