"""Runs whose merges are not low rank: whole weights in the ledger, and folds by such methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GERMAN, write_jsonl
from dense_reference import in_full, reference
from numerics_helpers import delta, gaussian, random_adapter, write_base
from safetensors.torch import load_file

from bam_lora.adapters import Adapter
from bam_lora.dense_methods import DENSE_METHODS, DenseOptions
from bam_lora.errors import UserError
from bam_lora.export import export_adapter
from bam_lora.folding import fold, fold_into
from bam_lora.ledger import Ledger
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report import collect
from bam_lora.store import hash_file, read_record


def recipe(base: Path, folder: Path, keep: str = "last", **merge: Any) -> Recipe:
    write_jsonl(folder / "german.jsonl", GERMAN[:24])
    return recipe_from_dict(
        {
            "base": str(base),
            "output": "unused",
            "data": {"target": [{"path": str(folder / "german.jsonl")}], "sequence_length": 128},
            "bam": {"slices": 4, "branches": 2, "merge": {"method": "ties", "density": 0.3, **merge}},
            "lora": {"r": 4},
            "training": {"learning_rate": 5e-3, "per_device_train_batch_size": 2, "checkpointing": False},
            "keep": {"bases": keep},
        }
    )


def branch_deltas(root: Path, iteration: int, name: str) -> list[torch.Tensor]:
    result = []
    for branch in (1, 2):
        factors = Adapter.open(root / f"iterations/{iteration:02}/branch-{branch}/adapter").factors(name)
        assert factors is not None
        result.append(delta(factors.A_ri, factors.B_or, factors.scaling))
    return result


def test_a_run_with_ties_keeps_whole_weights_and_comes_back_after_a_stop(tiny_base: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(recipe(tiny_base, tmp_path, keep="all"), root)
    ledger = Ledger.load(root)
    base, model = load_file(tiny_base / "model.safetensors"), load_file(root / "model" / "model.safetensors")
    for name in ledger.names():
        wanted = base[name].double()
        for iteration in (1, 2):
            deltas = branch_deltas(root, iteration, name)
            merged, unsure = reference("ties", in_full(deltas), [0.5, 0.5], DenseOptions(0.3))
            found = ledger.start_value(name, iteration)
            assert found is not None
            assert ledger.stacked(name, iteration) is None
            error = (found.double() - wanted).numpy() - merged
            assert abs(error[~unsure]).max() <= 1e-5 * abs(merged).max()
            assert unsure.mean() < 0.05  # of 2,048 elements
            wanted = found.double()
        assert torch.equal(model[name], wanted.to(model[name].dtype))
    merge = read_record(root / "iterations" / "02" / "merge.json")
    assert merge is not None
    assert merge["method"] == "ties"
    assert 0 < merge["merged_norm"] < sum(merge["delta_norms"])
    assert collect(root)["iterations"][1]["cosine"] is not None
    before = hash_file(root / "model" / "model.safetensors")
    for path in ("model", "iterations/02/base"):
        for file in (root / path).glob("*"):
            file.unlink()
    (root / "iterations" / "02" / "merge.json").unlink()
    run(recipe(tiny_base, tmp_path, keep="all"), root)
    assert hash_file(root / "model" / "model.safetensors") == before
    fold_into(tiny_base, ledger.view(scale=0.5), tmp_path / "half", key="half")
    half = load_file(tmp_path / "half" / "model.safetensors")
    for name in ledger.names():
        whole = ledger.start_value(name)
        assert whole is not None
        wanted = ((base[name].double() + whole.double()) / 2).float().to(base[name].dtype)
        assert (half[name] != wanted).float().mean() < 1e-3  # of ties between two bf16 numbers
    for scale in (1.0, 0.5):
        with pytest.raises(UserError, match="low-rank merges, found an iteration with full weights"):
            export_adapter(root, tmp_path / "adapter", scale=scale)


@pytest.mark.parametrize("method", sorted(DENSE_METHODS))
def test_a_fold_by_elements(tmp_path: Path, method: str) -> None:
    shapes = {"model.layers.0.q_proj": (600, 1000), "model.layers.0.o_proj": (40, 24)}
    tensors = {f"{module}.weight": gaussian(*shape, seed=5) for module, shape in shapes.items()}
    write_base(tmp_path / "base", tensors)
    adapters = [random_adapter(tmp_path / str(seed), shapes, seed=seed, rank=8) for seed in (1, 2, 3)]
    weights, options = [0.5, 0.3, 0.2], DenseOptions(0.4, 0.05, seed=7)
    how: dict[str, Any] = {"weights": weights, "method": method, "options": options}
    fold(tmp_path / "base", adapters, tmp_path / "out", **how)
    fold(tmp_path / "base", adapters, tmp_path / "linear", weights=weights)
    found, linear = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "linear"))
    for name, original in tensors.items():
        deltas = []
        for adapter in adapters:
            factors = Adapter.open(adapter).factors(name)
            assert factors is not None
            deltas.append(delta(factors.A_ri, factors.B_or, factors.scaling))
        change = (found[name].double() - original.double()).numpy()
        wanted, unsure = reference(method, in_full(deltas), weights, options, name)
        assert abs(change - wanted)[~unsure].max() <= 1e-6  # fp32 weights of size one
        assert unsure.mean() < 0.01
        assert not torch.equal(found[name], linear[name])
    assert fold(tmp_path / "base", adapters, tmp_path / "again", **how)["changed"] == 2
    assert hash_file(tmp_path / "again" / "model.safetensors") == hash_file(tmp_path / "out" / "model.safetensors")


def test_whole_weights_go_when_newer_ones_are_there(tiny_base: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(recipe(tiny_base, tmp_path), root)
    assert sorted(path.name for path in (root / "snapshots").iterdir()) == ["02.safetensors"]
    ledger = Ledger.load(root)
    ledger.verify()
    with pytest.raises(UserError, match=r"01.safetensors.* found nothing. .*keep.bases: all"):
        ledger.verify(1)
    child = Ledger.start(tmp_path / "child", {})
    child.adopt(root)
    child.verify()
    assert child.names() == ledger.names()
    run(recipe(tiny_base, tmp_path), root)  # finished: finds all that it needs
