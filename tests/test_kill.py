"""SIGKILL at random moments: whenever it strikes, the run that goes on ends with the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


def assert_kills_change_nothing(
    recipe: Path, output: Path, expected: dict[str, str], kills: int, longest_seconds: float, seed: int
) -> None:
    """Kills the run `kills` times, each after a random while; wherever it ends, its bytes must be `expected`.

    A run that reaches its end before all blows have fallen is compared and begun anew.
    """
    moments = random.Random(seed)
    struck = 0
    while struck < kills:
        process = start(recipe, output)
        try:
            assert process.wait(timeout=moments.uniform(0.5, longest_seconds)) == 0
            assert hashes(output) == expected
            shutil.rmtree(output)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            struck += 1
            print(f"kill {struck}: {stage(output)}", flush=True)
    assert start(recipe, output).wait() == 0
    assert hashes(output) == expected


def stage(output: Path) -> str:
    """What was there when the blow fell: the newest file, relative to the run."""
    files = [path for path in output.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime).relative_to(output).as_posix() if files else "nothing"


def hashes(output: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted((output / "model").glob("*.safetensors"))}


# Learning the merge weights is given so much to do that about half of the blows fall on it.
LEARNED = {
    "bam": {"merge": {"weights": "learned", "learned": {"steps": 60, "share": 10.0}}},
    "selection": {
        "target": [{"path": "select.de.jsonl", "set": "german"}],
        "source": [{"path": "select.en.jsonl", "set": "english"}],
    },
}


@pytest.mark.parametrize("merge", [{}, LEARNED], ids=["uniform", "learned"])
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_runs_end_with_the_same_bytes(tiny_base: Path, tmp_path: Path, seed: int, merge: dict[str, Any]) -> None:
    for name, texts in (("german", GERMAN[8:]), ("test", ENGLISH[:4])):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    for name, texts in (("select.de", GERMAN[:8]), ("select.en", ENGLISH[4:12])):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    recipe = {
        "base": str(tiny_base),
        "output": "unused",
        "data": {"target": [{"path": "german.jsonl"}], "sequence_length": 64},
        "bam": {"slices": 4, "branches": 2, **merge.get("bam", {})},
        "lora": {"r": 8},
        "training": {
            "learning_rate": 5e-3,
            "checkpointing": False,
            "num_train_epochs": 6.0,
            "gradient_accumulation_steps": 1,
            "save_steps": 10,
        },
        "evaluation": {"source": [{"path": "test.jsonl"}]},
        **{name: value for name, value in merge.items() if name != "bam"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    seconds = run_untouched(tmp_path / "recipe.yaml", tmp_path / "untouched")
    expected = hashes(tmp_path / "untouched")
    assert_kills_change_nothing(tmp_path / "recipe.yaml", tmp_path / "killed", expected, 10, seconds, seed)


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
    assert_kills_change_nothing(recipe, tmp_path / "killed", hashes(tmp_path / "untouched"), 20, seconds / 5, 0)
