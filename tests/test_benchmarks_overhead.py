"""The overhead benchmark's own arithmetic: stages add up to the process, and only some grow with the tokens."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from report_runs import write_run

from bam_lora.report import collect
from bam_lora.store import write_json

FOLDER = Path(__file__).parents[1] / "benchmarks" / "overhead"
PASSED = {"imports": 8.0, "constructed": 8.5, "trained": 592.0, "saved": 592.25}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_overhead_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stages, inputs = load("stages"), load("inputs")


def timed_run(folder: Path) -> Path:
    """A run whose four branches took their last step after 103 of their 104.25 s."""
    run = write_run(folder)
    for path in run.glob("iterations/*/branch-*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1]["seconds"] = 103.0
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(run / "report.json", collect(run))
    return run


def test_stages_of_a_run_add_up_to_its_process(tmp_path: Path) -> None:
    found = stages.bam_stages(595.0, PASSED, timed_run(tmp_path / "run"))
    assert found["steps"] == pytest.approx(4 * 103.0 - (5.25 + 3 * 0.5) - 4 * 1.5)
    assert found["write adapters"] == pytest.approx(417.0 - 4 * 103.0)
    assert found["set up trainers"] == pytest.approx(6.75)
    assert found["report and more"] == pytest.approx(583.5 - 580.5)
    assert sum(found.values()) == pytest.approx(595.0 - 66.5)  # evaluation aside


def test_stages_of_the_plain_script_add_up(tmp_path: Path) -> None:
    found = stages.plain_stages(595.0, PASSED)
    assert found["steps"] == 583.5
    assert sum(found.values()) == pytest.approx(595.0)


def test_only_steps_and_data_grow_with_the_tokens() -> None:
    assert stages.scaled({"steps": 10.0, "data": 1.0, "fold": 3.0, "load": 2.0}, 5.0) == pytest.approx(60.0)


def test_documents_hold_at_least_the_tokens(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["Am Morgen ging sie los.", "Der Hund schlief.", "Es regnete den ganzen Tag."]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    sizes = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
    text = tmp_path / "text.jsonl"
    assert inputs.documents_for(text, tiny_base, sizes[0] + 1) == (2, sizes[0] + sizes[1])
    assert inputs.documents_for(text, tiny_base, 10**6) == (3, sum(sizes))
