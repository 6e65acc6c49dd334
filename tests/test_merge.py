"""Merged adapters and their statistics against dense references, and what PEFT makes of them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics_helpers import delta, gaussian, random_adapter, write_adapter

from bam_lora import merge_methods
from bam_lora.adapters import Adapter
from bam_lora.errors import UserError
from bam_lora.merge import (
    METHODS,
    Coefficients,
    linear,
    merge_statistics,
)
from bam_lora.merged_adapter import merge_adapters
from bam_lora.store import seal

SHAPES = {"model.layers.0.q_proj": (12, 8), "model.layers.0.up_proj": (20, 12), "model.layers.10.up_proj": (20, 12)}


def dense_or_zero(adapter: Adapter, name: str) -> torch.Tensor:
    f = adapter.factors(name)
    if f is None:
        return torch.zeros(SHAPES[name.removesuffix(".weight")], dtype=torch.float64)
    return delta(f.A_ri, f.B_or, f.scaling)


def test_statistics_against_dense_deltas(tmp_path: Path) -> None:
    adapters = [Adapter.open(random_adapter(tmp_path / f"{k}", SHAPES, seed=k, rank=2 + k)) for k in range(3)]
    last = dict(list(SHAPES.items())[:2])  # this one lacks a module
    adapters.append(Adapter.open(random_adapter(tmp_path / "last", last, seed=9)))
    weights = [0.4, 0.3, 0.2, 0.1]
    names = [f"{module}.weight" for module in SHAPES]
    per_tensor = {name: [dense_or_zero(adapter, name) for adapter in adapters] for name in names}
    whole = torch.stack([torch.cat([per_tensor[name][k].flatten() for name in names]) for k in range(4)])
    unit = whole / whole.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    got = merge_statistics(adapters, {name: Coefficients.scalar(weights) for name in names})
    assert got["delta_norms"] == pytest.approx(whole.norm(dim=1).tolist(), rel=1e-12)
    assert got["merged_norm"] == pytest.approx(float((torch.tensor(weights).double() @ whole).norm()), rel=1e-6)
    pairs = [float(cosines[i, j]) for i in range(4) for j in range(i)]
    assert got["cosine"] == pytest.approx(sum(pairs) / 6, abs=1e-12)
    for name in names:
        assert got["tensors"][name]["norms"] == pytest.approx([float(d.norm()) for d in per_tensor[name]], rel=1e-12)
    assert got["tensors"]["model.layers.10.up_proj.weight"]["norms"][3] == 0
    json.dumps(got, allow_nan=False)
    ranks = sum(adapter.rank(names[0]) for adapter in adapters)
    diagonal = merge_statistics(adapters, {names[0]: Coefficients("diagonal", torch.ones(ranks, dtype=torch.float64))})
    assert diagonal["merged_norm"] == pytest.approx(float(sum(per_tensor[names[0]]).norm()), rel=1e-6)


def test_statistics_of_one_branch_and_of_zero_deltas(tmp_path: Path) -> None:
    adapter = Adapter.open(random_adapter(tmp_path / "a", SHAPES))
    one = merge_statistics([adapter], {name: Coefficients.scalar([1.0]) for name in adapter.names})
    assert one["cosine"] is None
    assert one["merged_norm"] == pytest.approx(one["delta_norms"][0])
    zero = Adapter.open(write_adapter(tmp_path / "z", {"q": (gaussian(4, 8), torch.zeros(8, 4))}))
    none = merge_statistics([zero, zero], {"q.weight": Coefficients.scalar([0.5, 0.5])})
    assert (none["cosine"], none["merged_norm"], none["delta_norms"]) == (None, 0.0, [0.0, 0.0])


@pytest.mark.parametrize("method", ["slerp", "karcher", "model_stock"])
def test_a_method_decides_for_every_weight_by_itself(tmp_path: Path, method: str) -> None:
    paths = [random_adapter(tmp_path / f"{k}", SHAPES, seed=k, rank=2 + k) for k in range(2)]
    statistics = merge_adapters(paths, tmp_path / "merged", method=method, weights=[0.3, 0.7])
    merged, (first, second) = Adapter.open(tmp_path / "merged"), (Adapter.open(path) for path in paths)
    found = set()
    for name in merged.names:
        one, two = first.factors(name), second.factors(name)
        scalars = METHODS[method]([one, two], [0.3, 0.7]).values
        want = scalars[0] * dense_or_zero(first, name) + scalars[1] * dense_or_zero(second, name)
        torch.testing.assert_close(dense_or_zero(merged, name), want, rtol=1e-6, atol=1e-7)
        found.add(round(float(scalars[0]), 9))
    assert len(found) > 1  # not one number for all
    norms = [one["merged_norm"] for one in statistics["tensors"].values()]
    assert statistics["merged_norm"] == pytest.approx(sum(norm**2 for norm in norms) ** 0.5)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 12, bias=False)
        self.q = torch.nn.Linear(8, 8, bias=False)
        self.down = torch.nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)) + self.q(x)


def peft_adapter(folder: Path, seed: int, **config: Any) -> dict[str, torch.Tensor]:
    """Saves a random PEFT adapter of Tiny; returns PEFT's own dense deltas."""
    import peft

    torch.manual_seed(seed)
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(init_lora_weights=False, **config))
    model.save_pretrained(folder)
    modules = dict(model.base_model.model.named_modules())
    return {
        name: modules[name].get_delta_weight("default").detach().double()
        for name in ("up", "q", "down")
        if hasattr(modules[name], "get_delta_weight")
    }


def test_peft_loads_the_merged_adapter(tmp_path: Path) -> None:
    import peft

    first = peft_adapter(tmp_path / "1", 1, r=2, target_modules=["up", "q"], rank_pattern={"q": 5}, use_rslora=True)
    second = peft_adapter(tmp_path / "2", 2, r=3, lora_alpha=7, target_modules=["q", "down"])
    result = merge_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "merged", weights=[0.6, 0.7])
    assert result["weights"] == [0.6, 0.7]
    model = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "merged")
    modules = dict(model.base_model.model.named_modules())
    zero = torch.zeros((), dtype=torch.float64)
    want = {name: 0.6 * first.get(name, zero) + 0.7 * second.get(name, zero) for name in ("up", "q", "down")}
    for name, dense_delta in want.items():
        got = modules[name].get_delta_weight("default").detach().double()
        assert float((got - dense_delta).norm() / dense_delta.norm()) < 1e-6, name
    norm = math.sqrt(sum(float(dense_delta.norm()) ** 2 for dense_delta in want.values()))
    assert result["merged_norm"] == pytest.approx(norm, rel=1e-6)


def test_merging_once_more_changes_nothing(tmp_path: Path) -> None:
    random_adapter(tmp_path / "a", SHAPES)
    merge_adapters([tmp_path / "a"], tmp_path / "one")
    merge_adapters([tmp_path / "one"], tmp_path / "two")
    one, two = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_the_mean_of_equal_adapters_is_the_adapter(tmp_path: Path) -> None:
    random_adapter(tmp_path / "a", SHAPES)
    merge_adapters([tmp_path / "a"] * 3, tmp_path / "merged")
    merged, single = Adapter.open(tmp_path / "merged"), Adapter.open(tmp_path / "a")
    assert merged.config["target_modules"] == single.config["target_modules"]
    for name in single.names:
        f, g = merged.factors(name), single.factors(name)
        assert f is not None
        assert g is not None
        torch.testing.assert_close(delta(f.A_ri, f.B_or, 1), delta(g.A_ri, g.B_or, g.scaling), rtol=1e-6, atol=1e-9)


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    a = random_adapter(tmp_path / "a", SHAPES, base_model_name_or_path="org/Model-7B")
    same = random_adapter(tmp_path / "same", SHAPES, base_model_name_or_path="unsloth/model-7b-unsloth-bnb-4bit")
    other = random_adapter(tmp_path / "other", SHAPES, base_model_name_or_path="org/Other")
    shape = random_adapter(tmp_path / "shape", {"model.layers.0.q_proj": (12, 9)})
    out = tmp_path / "out"
    merge_adapters([a, same], out)
    for arguments, words in (
        (([],), "expected at least one"),
        (([a, other],), "base of .*other.*found 'org/Other'.*--any-base"),
        (([a, shape],), r"'model.layers.0.q_proj.weight' in .*shape: expected shape \[12, 8\].*found \[12, 9\]"),
        (([a, tmp_path / "nowhere"],), "nowhere: expected a folder"),
        (([a, "./nowhere/x"],), "nowhere/x: expected a folder"),
    ):
        with pytest.raises(UserError, match=words):
            merge_adapters(*arguments, tmp_path / "new")
    with pytest.raises(UserError, match="one for each of 2 adapters, found 1"):
        merge_adapters([a, same], tmp_path / "new", weights=[1.0])
    with pytest.raises(
        UserError, match=r"expected one of breadcrumbs, .*karcher, linear, model_stock, slerp, ties, found best"
    ):
        merge_adapters([a, same], tmp_path / "new", method="best")
    assert not (tmp_path / "new").exists()
    merge_adapters([a, other], tmp_path / "new", any_base=True)


def test_outputs_that_would_destroy_something(tmp_path: Path) -> None:
    a = random_adapter(tmp_path / "in" / "a", SHAPES)
    for output, words in (
        (a, "it holds the input"),
        (tmp_path / "in", "it holds the input"),
        (tmp_path, "it holds the input"),
    ):
        with pytest.raises(UserError, match=words):
            merge_adapters([a], output)
    branch = random_adapter(tmp_path / "branch-1", SHAPES)
    seal(branch, "key", {"steps": 3})
    with pytest.raises(UserError, match="a folder with other files"):  # sealed, but not by a merge
        merge_adapters([a], branch)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").touch()
    with pytest.raises(UserError, match="a folder with other files"):
        merge_adapters([a], tmp_path / "precious")
    with pytest.raises(UserError, match="found a file"):
        merge_adapters([a], tmp_path / "precious" / "thesis.txt")
    with pytest.raises(UserError, match=r"output .*expected to write it, found File exists"):
        merge_adapters([a], tmp_path / "precious" / "thesis.txt" / "merged")
    merge_adapters([a], tmp_path / "out")
    merge_adapters([a], tmp_path / "out")  # an earlier result may be replaced
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(UserError, match="a folder with other files"):
        merge_adapters([a], tmp_path / "out")


def test_a_damaged_adapter_leaves_no_output(tmp_path: Path) -> None:
    A = gaussian(4, 8)
    A[0, 0] = float("nan")
    broken = write_adapter(tmp_path / "a", {"q": (A, gaussian(8, 4))})
    with pytest.raises(UserError, match=r"q.lora_A.weight' in .*NaN or Inf"):
        merge_adapters([broken], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_methods_are_looked_up_by_name() -> None:
    assert METHODS["linear"] is linear
    assert merge_methods.find_method("linear") is linear
