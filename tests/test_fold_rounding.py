"""Stochastic rounding: unbiased, exact where the type is, and a function of the seed alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from numerics_helpers import BF16, gaussian, load_all, random_adapter, write_base

from bam_lora.errors import UserError
from bam_lora.fold_rounding import find_rounding
from bam_lora.folding import fold

FP16 = torch.float16


def rounded(values: torch.Tensor, dtype: torch.dtype, stream: str = "s") -> torch.Tensor:
    into = torch.empty(values.shape, dtype=dtype)
    find_rounding("stochastic", 0)(values, into, stream)
    return into


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("low", [1.0, -1.0, 0.123046875, 1.9921875, 3.0e-6, -1.1e-5, 6e-8, 0.0])
def test_the_expected_value_is_the_value(dtype: torch.dtype, share: float, low: float) -> None:
    """Also across a power of two and below fp16's normal numbers."""
    start = torch.tensor(low).to(dtype)
    # The next value of the narrow type away from zero: one more in its bits.
    stop = (start.view(torch.int16) + 1).view(dtype)
    value = torch.tensor(start.item() + share * (stop.item() - start.item()), dtype=torch.float32)
    count = 200_000
    got = rounded(value.expand(400, count // 400).contiguous(), dtype).double()
    assert set(got.unique().tolist()) <= {start.item(), stop.item()}
    step = stop.double().item() - start.double().item()
    exact = (value.double().item() - start.double().item()) / step
    mean = (got.mean().item() - start.double().item()) / step
    assert abs(mean - exact) < 4 * math.sqrt(exact * (1 - exact) / count) + 2**-15


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_values_that_the_type_holds_stay(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)].view(-1, 2)
    got = rounded(every.float(), dtype)
    assert torch.equal(got.view(torch.int16), every.view(torch.int16))  # the sign of zero, too


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_only_neighbours_and_never_infinity(dtype: torch.dtype) -> None:
    values = torch.cat([gaussian(1000, 64, scale=10.0**power) for power in (-30, -7, -5, 0, 4)])
    values = values[values.abs() < torch.finfo(dtype).max].view(1, -1)
    got, nearest = rounded(values, dtype).double(), values.to(dtype)
    smallest, mantissa_bits = (-126, 7) if dtype == BF16 else (-14, 10)
    exponent = (torch.frexp(values.double()).exponent - 1).clamp(min=smallest)
    step = torch.ldexp(torch.ones_like(got), exponent - mantissa_bits)
    assert bool(((got - values.double()).abs() < step).all())
    assert bool((got != nearest.double()).any())


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_largest_number_is_not_rounded_to_infinity(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    below = torch.full((64, 64), largest).nextafter(torch.tensor(0.0))
    above = torch.full((64, 64), largest).nextafter(torch.tensor(math.inf))
    assert bool((rounded(below, dtype) >= largest * (1 - 2**-7)).all())
    assert bool((rounded(-above, dtype) == -largest).all())
    assert bool(torch.isinf(rounded(torch.full((2, 2), math.inf), dtype)).all())  # for the caller to refuse


def test_every_block_has_draws_of_its_own() -> None:
    values = torch.full((32, 32), 1 + 2**-9)
    assert not torch.equal(rounded(values, BF16, "q:0"), rounded(values, BF16, "q:1"))
    assert torch.equal(rounded(values, BF16, "q:0"), rounded(values, BF16, "q:0"))


def test_wider_types_keep_the_value() -> None:
    values = gaussian(8, 8)
    assert torch.equal(rounded(values, torch.float32), values)


def folded(root: Path, out: str, **options: object) -> dict[str, torch.Tensor]:
    fold(root / "base", [root / "a"], root / out, **options)  # type: ignore[arg-type]
    return load_all(root / out)


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    shapes = {"q": (1500, 700), "k": (1500, 700)}
    base = gaussian(1500, 700, dtype=BF16)
    write_base(tmp_path / "base", {**{f"{m}.weight": base.clone() for m in shapes}, "norm.weight": base[0].clone()})
    random_adapter(tmp_path / "a", shapes, scale=0.01)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(folded(tmp_path, f"out{threads}", rounding="stochastic", seed=7))
    finally:
        torch.set_num_threads(before)
    nearest = folded(tmp_path, "nearest")
    other = folded(tmp_path, "other", rounding="stochastic", seed=8)
    exact = folded(tmp_path, "exact", dtype="float32")
    for name in ("q.weight", "k.weight"):
        assert torch.equal(results[0][name], results[1][name])
        assert not torch.equal(results[0][name], nearest[name])
        assert not torch.equal(results[0][name], other[name])
        # The error of the mean is that of a mean over a million: rounding to nearest has lost most of such a delta.
        added = exact[name].double() - base.double()
        kept = results[0][name].double() - base.double()
        assert float((kept * added).sum() / added.square().sum()) == pytest.approx(1, abs=0.02)
    assert torch.equal(results[0]["norm.weight"], nearest["norm.weight"])


def test_another_word(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rounding: expected nearest or stochastic, found 'up'"):
        find_rounding("up", 0)
