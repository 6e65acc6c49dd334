"""The same loop and fold on a GPU; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENGLISH, GERMAN, write_jsonl

from bam_lora.adapters import Adapter
from bam_lora.folding import fold_into
from bam_lora.loop import run
from bam_lora.merge import MergedAdapters
from bam_lora.recipe import recipe_from_dict
from bam_lora.store import read_record

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("bits", [4, 16])
def test_the_loop_runs_on_the_gpu(tiny_base: Path, tmp_path: Path, bits: int) -> None:
    write_jsonl(tmp_path / "german.jsonl", GERMAN)
    write_jsonl(tmp_path / "english.jsonl", ENGLISH[:4])
    recipe = recipe_from_dict(
        {
            "base": str(tiny_base),
            "output": "unused",
            "data": {"target": [{"path": str(tmp_path / "german.jsonl")}], "sequence_length": 64},
            "bam": {"slices": 4, "branches": 2},
            "lora": {"r": 8},
            "quantization": {"bits": bits},
            "training": {"learning_rate": 5e-3, "gradient_accumulation_steps": 1},
            "evaluation": {
                "target": [{"path": str(tmp_path / "german.jsonl"), "documents": 4}],
                "source": [{"path": str(tmp_path / "english.jsonl")}],
            },
        }
    )
    report = run(recipe, tmp_path / "run")
    assert report["environment"]["device"] == "cuda"
    assert report["summary"]["learned"] > 0
    assert report["cost"]["peak_gpu_bytes"] > 0
    branch = read_record(tmp_path / "run" / "iterations" / "02" / "branch-2" / "done.json")
    assert branch is not None
    assert branch["facts"]["linear_modules"]["4bit"] == (14 if bits == 4 else 0)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"]

    adapters = [Adapter.open(tmp_path / "run" / "iterations" / "01" / f"branch-{k}" / "adapter") for k in (1, 2)]
    merged = MergedAdapters(adapters, [0.5, 0.5])
    for where in ("cpu", "cuda"):
        fold_into(tiny_base, merged, tmp_path / where, key="k", device=where)
    on_cpu, on_gpu = ((tmp_path / where / "model.safetensors").read_bytes() for where in ("cpu", "cuda"))
    assert len(on_cpu) == len(on_gpu)
    same = sum(a == b for a, b in zip(on_cpu, on_gpu, strict=True)) / len(on_cpu)
    assert same > 0.9999


def test_the_allocator_grows_its_segments_although_cuda_was_in_use(tiny_base: Path) -> None:
    settings = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom bam_lora.base import Loading, load_model\n"
        "torch.cuda.get_device_properties(0)\nmodel = load_model(Path(sys.argv[1]), Loading(4))\n"
        "print(any(one['is_expandable'] for one in torch.cuda.memory_snapshot()))"
    )
    environ = {name: value for name, value in os.environ.items() if name not in settings}
    done = subprocess.run([sys.executable, "-c", code, str(tiny_base)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
