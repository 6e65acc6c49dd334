"""LoftQ corrects the 4-bit base only: what is folded into the full weights is what a branch has learned beyond it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_kinds_loop import _Stopping, recipe

from bam_lora.adapters import Adapter
from bam_lora.base import Loading, load_model
from bam_lora.errors import Interrupted, UserError
from bam_lora.export import export_adapter
from bam_lora.loftq import low_rank_part
from bam_lora.loop import run
from bam_lora.store import hash_file

LOFTQ: dict[str, Any] = {"init": "loftq"}


def training(learning_rate: float) -> dict[str, Any]:
    return {
        "learning_rate": learning_rate,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "checkpointing": False,
        "save_steps": 1,
    }


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_the_best_approximation(rows: int, columns: int, rank: int) -> None:
    E_oi = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    B_or, A_ri = low_rank_part(E_oi, rank)
    assert (B_or.shape, A_ri.shape) == ((rows, rank), (rank, columns))
    left = torch.linalg.svdvals(E_oi.double())[rank:].square().sum().sqrt()
    assert abs((E_oi - B_or @ A_ri).double().norm() - left) <= 1e-3 * E_oi.norm()


@pytest.mark.parametrize("rslora", [False, True])
def test_what_was_not_learned_is_not_folded(tiny_base: Path, tmp_path: Path, rslora: bool) -> None:
    root = tmp_path / "run"
    wanted = recipe(tiny_base, tmp_path, {**LOFTQ, "rslora": rslora}, training=training(1e-12), evaluation={})
    run(wanted, root)
    base, found = (load_file(folder / "model.safetensors") for folder in (tiny_base, root / "model"))
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    adapter = Adapter.open(root / "iterations/01/branch-1/adapter")
    assert adapter.scaling(adapter.names[0]) == pytest.approx(wanted.lora.alpha / (4**0.5 if rslora else 4))
    model = load_model(tiny_base, Loading(4))
    for name in adapter.names:
        factors = adapter.factors(name)
        assert factors is not None
        first = -factors.scaling * factors.B_or[:, 4:] @ factors.A_ri[4:]
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        error = base[name].float() - dequantize_4bit(weight, weight.quant_state).float()
        values = torch.linalg.svdvals(error.double())
        assert abs((error - first).double().norm() - values[4:].square().sum().sqrt()) <= 1e-3 * values[0]


@pytest.mark.slow
def test_what_was_learned_is_folded_and_a_stop_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    wanted = recipe(tiny_base, tmp_path, LOFTQ, training=training(5e-3), keep={"bases": "all", "checkpoints": True})
    run(wanted, tmp_path / "whole")
    base, found = (load_file(one / "model.safetensors") for one in (tiny_base, tmp_path / "whole/iterations/01/base"))
    folders = [tmp_path / f"whole/iterations/01/branch-{number}/adapter" for number in (1, 2)]
    for name in Adapter.open(folders[0]).names:
        exact = base[name].double()
        for folder, weight in zip(folders, (0.75, 0.5), strict=True):
            tensors = load_file(folder / "adapter_model.safetensors")
            A, B = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"] for half in "AB")
            assert A.shape[0] == 8
            exact += weight * 2 * (B.double() @ A.double())
        assert (found[name] != exact.to(found[name].dtype)).double().mean() <= 0.002
        assert not torch.equal(found[name], base[name])
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    with pytest.raises(Interrupted):
        run(wanted, tmp_path / "cut", progress=_Stopping("iteration 1/2, branch 2", 2))
    run(wanted, tmp_path / "cut")
    models = [tmp_path / name / "model/model.safetensors" for name in ("whole", "cut")]
    assert hash_file(models[0]) == hash_file(models[1])
    assert not list(tmp_path.glob("*/iterations/*/branch-*/initial.safetensors"))
    assert export_adapter(tmp_path / "whole", tmp_path / "adapter")["stacked_rank"] == 32


@pytest.mark.parametrize(
    ("changes", "lora", "expected"),
    [
        (
            {"quantization": {"bits": 16}},
            LOFTQ,
            "expected default or gaussian, since the base is in 16 bits",
        ),
        ({}, {**LOFTQ, "dora": True}, "lora.init: expected default or gaussian beside lora.dora"),
        ({}, {"dora": True, "lora_bias": True}, "lora.lora_bias: expected false beside lora.dora"),
        ({}, {"init": "pissa"}, "lora.init: expected default or gaussian or loftq, found 'pissa'"),
    ],
)
def test_what_does_not_go_with_it(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any], lora: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        recipe(tiny_base, tmp_path, lora, **changes)
