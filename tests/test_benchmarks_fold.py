"""The fold benchmark's own measuring: its reference rounds once and finds errors; its memory and time are real."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numerics_helpers import BF16, gaussian, load_all, make_small, random_adapter, round_directly, ulp, write_base
from numerics_helpers import SMALL_SHAPES as SHAPES
from safetensors.torch import save_file

from bam_lora.folding import fold

FOLDER = Path(__file__).parents[1] / "benchmarks" / "fold"
CHILD = "import time; held = bytearray(64 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.3)"
PARENT = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {CHILD!r}]))"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_fold_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


accuracy, measuring = load("accuracy"), load("measuring")


def test_its_rounding_is_that_of_the_tests() -> None:
    values = torch.cat([gaussian(2000, seed=1).double() * torch.logspace(-40, 4, 2000), torch.zeros(1).double()])
    assert np.array_equal(accuracy.round_directly(values.numpy()), round_directly(values, BF16).double().numpy())
    assert np.array_equal(accuracy.ulp(values.numpy()), ulp(values.numpy(), BF16))


def test_errors_of_a_good_and_of_damaged_models(tmp_path: Path) -> None:
    small = make_small(tmp_path)
    adapters = [small.adapter, random_adapter(tmp_path / "b", SHAPES, seed=7)]
    fold(small.base, adapters, small.out, weights=[0.5, 0.5])
    good = accuracy.errors(small.base, small.out, adapters, [0.5, 0.5], rows=99)
    assert good["elements"] == sum(rows * columns for rows, columns in SHAPES.values())
    assert good["identical"] > 0.99
    assert good["largest_ulp"] <= 1
    assert good["untouched_identical"]
    assert (good["missing"], good["other"]) == ([], [])

    unchanged = accuracy.errors(small.base, small.base, adapters, [0.5, 0.5])
    assert unchanged["kept"] == 0
    assert unchanged["relative_error"] == pytest.approx(1)
    turned_around = accuracy.errors(small.base, small.out, adapters, [-0.5, -0.5], rows=99)
    assert turned_around["kept"] == pytest.approx(-good["kept"])
    assert turned_around["relative_error"] > 1.5

    tensors = load_all(small.out)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    up = "model.layers.0.up_proj.weight"
    tensors["stray"] = tensors.pop(up)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    save_file(tensors, damaged / "model.safetensors")
    bad = accuracy.errors(small.base, damaged, adapters, [0.5, 0.5])
    assert not bad["untouched_identical"]
    assert (bad["missing"], bad["other"]) == ([up], ["stray"])


def test_errors_sees_one_wrong_element(tmp_path: Path) -> None:
    """Off by two units in the last place: not identical, and by how much."""
    base = write_base(tmp_path / "base", {"q.weight": torch.ones(4, 8, dtype=BF16)})
    adapter = random_adapter(tmp_path / "a", {"q": (4, 8)}, scale=1e-4)
    weights = torch.ones(4, 8, dtype=BF16)
    weights[3, 5] += 2.0**-6
    out = write_base(tmp_path / "out", {"q.weight": weights})
    found = accuracy.errors(base, out, [adapter], [1.0])
    assert found["identical"] == 31 / 32
    assert found["largest_ulp"] == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    alone = measuring.measure([sys.executable, "-c", "pass"], tmp_path / "log", environ=os.environ)
    taken = measuring.measure([sys.executable, "-c", PARENT], tmp_path / "log", environ=os.environ)
    assert 64 << 20 <= taken["peak_anonymous_bytes"] < 128 << 20
    assert alone["peak_anonymous_bytes"] < 32 << 20
    assert taken["peak_file_bytes"] > 0
    assert taken["seconds"] >= 0.3


def test_a_failed_process_is_never_a_time(tmp_path: Path) -> None:
    with pytest.raises(measuring.Failed, match="exit status 3: out of luck"):
        measuring.measure(
            [sys.executable, "-c", "import sys; print('out of luck'); sys.exit(3)"],
            tmp_path / "log",
            environ=os.environ,
        )
