"""Bases that are stored in 8-bit floating point, cast and not scaled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numerics_helpers import dense_delta, gaussian, load_all, random_adapter, ulp, write_base

from bam_lora.errors import UserError
from bam_lora.folding import fold

NAME = "model.layers.0.q_proj"
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
BITS = {torch.float8_e4m3fn: (-6, 3), torch.float8_e5m2: (-14, 2)}


@pytest.mark.parametrize("dtype", FP8)
def test_a_base_in_fp8_is_rounded_once(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numerics_helpers.GRID", BITS)
    base = gaussian(400, 300, seed=3).to(dtype)
    write_base(tmp_path / "base", {f"{NAME}.weight": base, "model.norm.weight": torch.ones(300)})
    adapter = random_adapter(tmp_path / "a", {NAME: (400, 300)}, scale=0.3)
    facts = fold(tmp_path / "base", [adapter], tmp_path / "out", verify=True)
    assert facts["verified"]["worst_ulp"] <= 1
    found = load_all(tmp_path / "out")[f"{NAME}.weight"]
    assert found.dtype == dtype
    exact = (base.double() + dense_delta(adapter, f"{NAME}.weight")).numpy()
    error = abs(found.double().numpy() - exact) / ulp(exact, dtype)
    assert error.max() <= 0.5 + 1e-4  # half a unit: the nearest value
    fold(tmp_path / "base", [adapter], tmp_path / "wide", dtype="bfloat16")
    wide = load_all(tmp_path / "wide")
    assert {tensor.dtype for tensor in wide.values()} == {torch.bfloat16}
    assert (wide[f"{NAME}.weight"].double() - torch.from_numpy(exact)).abs().max() < 0.02


def test_fp8_that_is_quantised_is_refused(tmp_path: Path) -> None:
    base = {f"{NAME}.weight": gaussian(40, 30).to(FP8[0])}
    adapter = random_adapter(tmp_path / "a", {NAME: (40, 30)})
    write_base(tmp_path / "said", base, config={"quantization_config": {"quant_method": "fp8"}})
    write_base(tmp_path / "scaled", {**base, f"{NAME}.weight_scale_inv": torch.ones(1)})
    for name in ("said", "scaled"):
        with pytest.raises(
            UserError, match=r"expected full-precision weights, found a quantised model .*original 16-bit"
        ):
            fold(tmp_path / name, [adapter], tmp_path / "out")


def test_an_overflow_of_fp8_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", {f"{NAME}.weight": torch.full((40, 30), 440.0).to(FP8[0])})
    adapter = random_adapter(tmp_path / "a", {NAME: (40, 30)}, scale=10)
    with pytest.raises(UserError, match="expected finite weights in float8_e4m3fn, found NaN or Inf"):
        fold(tmp_path / "base", [adapter], tmp_path / "out")
