"""Counting what a training step would allocate on a GPU: torch's allocator in numbers, and a whole small count."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bam_lora import memory_parts
from bam_lora.memory import estimate
from bam_lora.memory_parts import four_bit_bytes
from bam_lora.memory_shape import BaseShape, shape_of_config
from bam_lora.recipe import recipe_from_dict

sys.path.extend([str(Path(__file__).parents[1] / "benchmarks" / folder) for folder in ("allocations", "gpu")])
from allocator import Block, CachingAllocator
from shapes import SHAPES

ROOT = Path(__file__).parents[1]
MB = 1 << 20
LARGE_PAGE, SMALL_PAGE = 20 * MB, 2 * MB


def test_blocks_are_rounded_and_pages_are_taken_as_they_are_needed() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(1) == Block("small", 0, 512)
    assert allocator.allocate(513) == Block("small", 512, 1024)
    assert allocator.reserved == SMALL_PAGE
    assert allocator.allocate(30 * MB) == Block("large", 0, 30 * MB)
    assert allocator.reserved == SMALL_PAGE + 2 * LARGE_PAGE
    assert allocator.allocate(10 * MB).start == 30 * MB
    assert allocator.reserved == SMALL_PAGE + 2 * LARGE_PAGE


def test_a_gap_is_used_again_before_the_segment_grows_and_neighbours_are_joined() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MB) for size in (8, 4, 6, 22)]
    allocator.free(blocks[1])
    allocator.free(blocks[2])
    assert allocator.allocate(10 * MB) == Block("large", 8 * MB, 10 * MB)
    assert allocator.reserved == 2 * LARGE_PAGE


def test_the_smallest_gap_that_fits_is_taken_and_the_end_last() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MB) for size in (9, 2, 5, 2, 15)]  # 33 of 40 MB: a gap of 7 at the end
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    assert allocator.allocate(4 * MB).start == 11 * MB
    assert allocator.allocate(7 * MB).start == 0
    assert allocator.allocate(7 * MB).start == 33 * MB


def test_what_was_taken_of_the_card_is_kept_and_the_peak_can_be_counted_anew() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(100 * MB))
    assert allocator.reserved == allocator.reserved_peak == 100 * MB
    allocator.begin()
    allocator.allocate(50 * MB)
    assert allocator.reserved_peak == 100 * MB


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 64 * MB)), max_size=60))
def test_blocks_never_overlap_and_what_is_given_back_is_found_again(steps: list[tuple[bool, int]]) -> None:
    allocator, held = CachingAllocator(), []
    for frees, size in steps:
        if frees and held:
            allocator.free(held.pop(size % len(held)))
        else:
            held.append(allocator.allocate(size))
        for name in ("small", "large"):
            ours = sorted((one.start, one.start + one.size) for one in held if one.segment == name)
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(ours))
        assert sum(one.size for one in held) <= allocator.reserved <= allocator.reserved_peak
    peak = allocator.reserved_peak
    for one in held:
        allocator.free(one)
    if peak >= LARGE_PAGE:  # all gaps are one again
        assert allocator.allocate(2 * MB).start == 0
    assert allocator.reserved_peak == peak


def recorded() -> list[tuple[str, dict[str, Any]]]:
    """The cases of the newest result."""
    newest = max((ROOT / "benchmarks" / "allocations" / "results").glob("*.json"))
    return list(json.loads(newest.read_text())["cases"].items())


@cache
def shape_of(name: str) -> BaseShape:
    return shape_of_config(SHAPES[name].config, name)


@pytest.mark.parametrize(("name", "case"), recorded())
def test_estimates_are_what_was_counted(name: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_parts, "_tiled_loss", lambda: True)  # as of the TRL that was counted
    chosen = {"per_device_train_batch_size": case["batch"], "checkpointing": case["checkpointing"]}
    recipe = {**case["recipe"], "training": {**case["recipe"]["training"], **chosen}}
    found = estimate(recipe_from_dict(recipe), shape_of(case["shape"]), attention=case["attention"], device="cuda")
    without_context = sum(one.bytes for one in found.training if one.name != "GPU context")
    assert without_context == pytest.approx(case["reserved"], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a CUDA device of its own")
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
def test_a_step_on_a_gpu_that_is_not_there_allocates_what_the_numbers_say(tmp_path: Path) -> None:
    recipe = {
        "base": "unused",
        "output": "unused",
        "data": {"target": [{"path": "unused.jsonl"}], "sequence_length": 256},
        "lora": {"r": 8},
        "training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    settings = {"shape": "tiny", "card_gib": None, "attention": "packed", "recipe": recipe, "work": str(tmp_path)}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    script = ROOT / "benchmarks" / "allocations" / "step.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, script, file], env=environment, check=True, capture_output=True, text=True)
    found = json.loads(said.stdout.splitlines()[-1])

    shape = shape_of_config(SHAPES["tiny"].config, "tiny")
    numbers = 8 * sum(one.rows + one.columns for one in shape.linears)
    parts = {one["name"]: one["bytes"] for one in found["estimated"]}
    small = 512 * 8 * len(shape.linears)  # blocks are rounded
    assert parts["adapter"] == 4 * numbers
    base = four_bit_bytes(shape.quantised, True) + 2 * (shape.embeddings + shape.others)
    stages = found["stages"]
    assert base <= stages["base"] <= base + 4 * small
    assert 4 * numbers <= stages["adapter"] - stages["base"] <= 4 * numbers + 2 * small
    state = stages["between steps"] - stages["adapter"]
    assert 8 * numbers <= state <= 8 * numbers + 8 * small
    assert found["allocated"] > stages["between steps"] + 4 * numbers  # the gradients
    assert found["at_peak"]["base"] == stages["base"]
    assert found["reserved"] >= found["allocated"]
