"""`--verify`: what is right passes, with its share of identical elements; what is wrong is not put in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics_helpers import (
    BF16,
    SMALL_SHAPES,
    gaussian,
    make_small,
    random_adapter,
    small_tensors,
    write_adapter,
    write_base,
)
from numerics_helpers import round_directly as reference_rounding

from bam_lora import fold_blocks, fold_shard
from bam_lora.errors import UserError
from bam_lora.fold_verify import round_directly
from bam_lora.folding import fold

SHAPES = {"q": (700, 900), "k": (64, 900)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
@pytest.mark.parametrize("scale", [1e-4, 0.05])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_right_fold_passes(tmp_path: Path, dtype: str | None, scale: float, rounding: str) -> None:
    tensors = {f"{name}.weight": gaussian(*shape, scale=0.02, dtype=BF16) for name, shape in SHAPES.items()}
    write_base(tmp_path / "base", {**tensors, "norm.weight": torch.ones(900, dtype=BF16)}, shards=2)
    adapters = [random_adapter(tmp_path / name, SHAPES, rank=24, seed=n, scale=scale) for n, name in enumerate("ab")]
    facts = fold(tmp_path / "base", adapters, tmp_path / "out", dtype=dtype, rounding=rounding, verify=True)
    verified = facts["verified"]
    converted = dtype is not None and dtype != "bfloat16"
    assert (verified["tensors"], verified["rows"]) == ((3, 24) if converted else (2, 16))
    assert verified["elements"] == 16 * 900 + (8 if converted else 0)
    assert verified["worst_ulp"] <= 1
    if dtype != "float32":
        # Rounding at random takes the further neighbour often, but hardly ever where the delta is tiny.
        low, high = (0.999, 1.0) if rounding == "nearest" else (0.2, 0.9 if scale > 0.01 else 0.9999)
        assert low <= verified["identical"] <= high
    assert fold(tmp_path / "base", adapters, tmp_path / "out")["verified"] is None


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "breadcrumbs"])
def test_methods_with_thresholds_are_computed_again_in_the_same_blocks(tmp_path: Path, method: str) -> None:
    """A threshold is the magnitude of an element, so another precision would keep another one."""
    shapes = {"q": (1300, 900)}  # more than two blocks
    write_base(tmp_path / "base", {"q.weight": gaussian(1300, 900, scale=0.02, dtype=BF16)})
    adapters = [random_adapter(tmp_path / name, shapes, rank=24, seed=n, scale=0.03) for n, name in enumerate("ab")]
    facts = fold(tmp_path / "base", adapters, tmp_path / "out", method=method, dtype="float32", verify=True)
    assert facts["verified"]["identical"] == 1


def flip_in_every_row(data: bytes | memoryview, bit: int) -> bytes:
    """Every 16-bit element one, two, four, ... steps off."""
    values = np.frombuffer(data, dtype=np.uint16) ^ np.uint16(1 << bit)
    return values.tobytes()


def damaged_blocks(monkeypatch: pytest.MonkeyPatch, bit: int) -> None:
    compute = fold_blocks.BlockComputer.compute

    def wrong(self: Any, block: Any) -> Any:
        done = compute(self, block)
        return fold_blocks.Done(
            done.name, memoryview(flip_in_every_row(done.data, bit)), done.buffer, done.weight_square, done.delta_square
        )

    monkeypatch.setattr(fold_blocks.BlockComputer, "compute", wrong)


def damaged_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(self: Any, source: Any, file: Any, item: Any, sha: Any) -> None:
        self._put(file, flip_in_every_row(os.pread(source.fileno(), item.stop - item.start, item.start), 0), sha)

    monkeypatch.setattr(fold_shard.ShardFolder, "_copy", copy)


def a_delta_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    add = fold_blocks.Delta.add

    def wrong(self: Any, original: torch.Tensor, first: int, result: torch.Tensor) -> torch.Tensor:
        return add(self, original, first, result) * 1.05

    monkeypatch.setattr(fold_blocks.Delta, "add", wrong)


def rows_of_another_block(monkeypatch: pytest.MonkeyPatch) -> None:
    add = fold_blocks.Delta.add
    monkeypatch.setattr(
        fold_blocks.Delta,
        "add",
        lambda self, original, first, result: add(self, original.flip(0), first, result),
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda patch: damaged_blocks(patch, 1),
            r"expected .* in row \d+, column \d+, give or take one unit, found .*2 un",
        ),
        (lambda patch: damaged_blocks(patch, 7), r"units off"),
        (a_delta_too_large, r"units off"),
        (rows_of_another_block, r"units off"),
        (damaged_copies, r"expected the base's bytes, found others"),
    ],
)
def test_a_wrong_fold_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    small = make_small(tmp_path)
    damage(monkeypatch)
    with pytest.raises(UserError, match=rf"verifying tensor '.*' in model.safetensors: .*{words}"):
        fold(small.base, [small.adapter], small.out, verify=True)
    assert sorted(os.listdir(tmp_path)) == ["a", "base"]
    fold(small.base, [small.adapter], small.out)  # nobody has looked


def test_one_unit_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_small(tmp_path)
    damaged_blocks(monkeypatch, 0)
    verified = fold(small.base, [small.adapter], small.out, verify=True)["verified"]
    assert verified["identical"] == 0
    assert verified["worst_ulp"] == 1


def test_where_terms_cancel_fp32_sets_the_unit(tmp_path: Path) -> None:
    """W + ΔW ≈ 0 within fp32's rounding: hundreds of units of the tiny result, and still as good as fp32 can."""
    A, B = gaussian(64, 900, seed=3), gaussian(700, 64, seed=4)
    base = -(B.double() @ A.double()).float()
    write_base(tmp_path / "base", {"q.weight": base})
    adapter = write_adapter(tmp_path / "a", {"q": (A, B)}, alpha=64)
    facts = fold(tmp_path / "base", [adapter], tmp_path / "out", verify=True)
    assert facts["verified"]["worst_ulp"] <= 1


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_rounding_of_the_reference_is_direct(dtype: torch.dtype) -> None:
    values = torch.cat([gaussian(4000, scale=10.0**power).double() for power in (-9, -6, -3, 0, 3)])
    ties = (values.to(dtype).double() + torch.nextafter(values.to(dtype), torch.tensor(9e9, dtype=dtype)).double()) / 2
    above = ties * (1 + 2**-40)  # fp32 would make a tie of it
    for exact in (values, ties, above):
        assert np.array_equal(round_directly(exact.numpy(), dtype), reference_rounding(exact, dtype).double().numpy())
    assert not np.array_equal(round_directly(above.numpy(), dtype), above.to(dtype).double().numpy())


def test_small_tensors_of_every_shape(tmp_path: Path) -> None:
    tensors = {**small_tensors(), "scalar": torch.tensor(2.0), "empty": torch.empty(0, 4), "mask": torch.ones(3) > 0}
    write_base(tmp_path / "base", tensors)
    adapter = random_adapter(tmp_path / "a", SMALL_SHAPES)
    for dtype in (None, "float16"):
        assert fold(tmp_path / "base", [adapter], tmp_path / "out", dtype=dtype, verify=True)["verified"]["rows"] >= 16
