"""A run as one PEFT adapter: against the folded model, and against dense truncation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics_helpers import gaussian, random_adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bam_lora.adapters import Adapter
from bam_lora.base import file_hashes, find_base
from bam_lora.cli import app
from bam_lora.coefficients import Coefficients
from bam_lora.compression import truncated
from bam_lora.errors import UserError
from bam_lora.export import export_adapter
from bam_lora.folding import fold_into
from bam_lora.ledger import Ledger
from bam_lora.snapshots import write_snapshot

WIDE = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


def base_record(base: Path, root: Path) -> dict[str, Any]:
    return {"name": str(base), "revision": None, "files": file_hashes(find_base(str(base)), root)}


def shapes(base: Path) -> dict[str, tuple[int, int]]:
    model = AutoModelForCausalLM.from_pretrained(base)
    return {
        name: tuple(module.weight.shape)  # type: ignore[misc]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(WIDE)
    }


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> Path:
    """Two iterations of two branches, the second with a block for each branch; the last lacks a module."""
    root, sizes = tmp_path / "run", shapes(tiny_base)
    few = dict(list(sizes.items())[1:])
    root.mkdir()
    for place, named in (("a", sizes), ("b", sizes), ("c", sizes), ("d", few)):
        random_adapter(root / place, named, seed=ord(place), rank=3)
    ledger = Ledger.start(root, base_record(tiny_base, root))
    ledger.record(1, ["a", "b"], "linear", {f"{name}.weight": Coefficients.scalar([0.4, 0.6]) for name in sizes})
    blocks = {
        f"{name}.weight": Coefficients("blocks", gaussian(1, 18 if name in few else 9, seed=4).double().flatten())
        for name in sizes
    }
    ledger.record(2, ["c", "d"], "linear", blocks)
    ledger.save()
    return root


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 61).reshape(2, 30)
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def with_adapter(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


def test_peft_gives_what_the_folded_model_gives(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(run), "--output", str(tmp_path / "adapter")])
    assert result.exit_code == 0, result.output
    assert "rank 12 on" in result.output
    fold_into(tiny_base, Ledger.load(run).view(), tmp_path / "folded", key="k", dtype="float32")
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32))
    folded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32))
    got = logits(with_adapter(tiny_base, tmp_path / "adapter"))
    assert float((folded - base).norm() / base.norm()) > 0.05
    assert float((got - folded).norm() / folded.norm()) < 1e-5
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (12, 12, str(tiny_base))
    # Ours reads it too, and it is the ledger's delta.
    adapter, ledger = Adapter.open(tmp_path / "adapter"), Ledger.load(run)
    assert list(adapter.names) == ledger.names()
    for name in ledger.names():
        B, A = ledger.stacked(name) or pytest.fail(name)
        factors = adapter.factors(name)
        assert factors is not None
        torch.testing.assert_close(factors.B_or @ factors.A_ri, B @ A, rtol=1e-5, atol=1e-6)


def test_a_smaller_rank_is_the_best_one_and_says_what_it_costs(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(run), "--output", str(tmp_path / "small"), "--rank", "2"])
    assert result.exit_code == 0, result.output
    assert "relative error of the delta" in result.output
    facts = export_adapter(run, tmp_path / "again", rank=2)
    ledger, adapter = Ledger.load(run), Adapter.open(tmp_path / "small")
    left = whole = 0.0
    for name in ledger.names():
        B, A = ledger.stacked(name) or pytest.fail(name)
        dense = B.double() @ A.double()
        values = torch.linalg.svdvals(dense)
        factors = adapter.factors(name)
        assert factors is not None
        assert factors.A_ri.shape[0] == 2
        error = float((factors.B_or.double() @ factors.A_ri.double() - dense).norm())
        assert error == pytest.approx(float(values[2:].norm()), rel=1e-4)
        assert facts["errors"][name] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-6)
        left, whole = left + float(values[2:].square().sum()), whole + float(values.square().sum())
    assert facts["error"] == pytest.approx((left / whole) ** 0.5, rel=1e-6)


def test_weights_that_keep_their_rank_count_with_their_size(tiny_base: Path, tmp_path: Path) -> None:
    root, (narrow, wide, *_) = tmp_path / "run", shapes(tiny_base).items()
    root.mkdir()
    random_adapter(root / "a", dict([narrow]), seed=1, rank=2, scale=0.5)
    random_adapter(root / "b", dict([wide]), seed=2, rank=5)
    ledger = Ledger.start(root, base_record(tiny_base, root))
    ledger.record(1, ["a", "b"], "linear", {f"{n}.weight": Coefficients.scalar([1.0, 1.0]) for n, _ in (narrow, wide)})
    ledger.save()
    facts = export_adapter(root, tmp_path / "small", rank=2)
    left = whole = 0.0
    for name, kept in ((f"{narrow[0]}.weight", 2), (f"{wide[0]}.weight", 2)):
        B, A = ledger.stacked(name) or pytest.fail(name)
        values = torch.linalg.svdvals(B.double() @ A.double())
        left, whole = left + float(values[kept:].square().sum()), whole + float(values.square().sum())
    assert facts["error"] == pytest.approx((left / whole) ** 0.5, rel=1e-5)
    assert facts["errors"][f"{narrow[0]}.weight"] == 0


def test_branches_that_are_corrected_later_are_written_once(run: Path, tmp_path: Path) -> None:
    ledger = Ledger.load(run)
    names = Adapter.open(run / "a").names
    before = {name: (ledger.stacked(name) or pytest.fail(name)) for name in names}
    ledger.record(3, ["c", "a"], "linear", {name: Coefficients.scalar([0.5, -0.25]) for name in names})
    ledger.save()
    assert export_adapter(run, tmp_path / "adapter")["stacked_rank"] == 12
    adapter, first, third = (Adapter.open(folder) for folder in (tmp_path / "adapter", run / "a", run / "c"))
    for name, (B, A) in before.items():
        a, c, got = first.factors(name), third.factors(name), adapter.factors(name)
        assert a is not None and c is not None and got is not None  # noqa: PT018
        want = B @ A + 0.5 * c.scaling * c.B_or @ c.A_ri - 0.25 * a.scaling * a.B_or @ a.A_ri
        torch.testing.assert_close(got.B_or @ got.A_ri, want, rtol=1e-4, atol=1e-6)


def test_a_delta_is_never_wider_than_the_weight() -> None:
    B, A = gaussian(20, 50, seed=1), gaussian(50, 12, seed=2)
    B_or, A_ri, left_out, whole = truncated(B, A, 12)
    assert (B_or.shape, A_ri.shape) == ((20, 12), (12, 12))
    torch.testing.assert_close(B_or.double() @ A_ri.double(), B.double() @ A.double(), rtol=1e-5, atol=1e-4)
    assert left_out < 1e-20 * whole


def test_the_base_that_it_names_is_the_one_it_belongs_to(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    ledger = Ledger.load(run)
    ledger.base["name"] = str(base)
    ledger.save()
    export_adapter(run, tmp_path / "adapter")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    (base / "config.json").unlink()
    command = ["export", str(run), "--output", str(tmp_path / "other")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert f"base {base}: expected the files this run started from" in line
    assert "found others: config.json, model.safetensors" in line
    assert not (tmp_path / "other").exists()
    shutil.rmtree(base)  # nothing of it is needed, so one that is elsewhere now is no mistake
    assert CliRunner().invoke(app, command).exit_code == 0
    base.mkdir()  # as would be a Hub id that is also the name of a folder
    ledger.base["revision"] = "abc"
    ledger.save()
    assert CliRunner().invoke(app, command).exit_code == 0


def test_scale_and_refusals(run: Path, tmp_path: Path) -> None:
    export_adapter(run, tmp_path / "half", scale=0.5)
    half, ledger = Adapter.open(tmp_path / "half"), Ledger.load(run)
    name = ledger.names()[0]
    B, A = ledger.stacked(name) or pytest.fail(name)
    factors = half.factors(name)
    assert factors is not None
    torch.testing.assert_close(factors.B_or @ factors.A_ri, 0.5 * (B @ A), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="--rank: expected a rank of at least 1, found 0"):
        export_adapter(run, tmp_path / "none", rank=0)
    for scale in (float("nan"), float("inf"), -1.0):
        with pytest.raises(UserError, match="--scale: expected a number of at least 0"):
            export_adapter(run, tmp_path / "none", scale=scale)
    with pytest.raises(UserError, match="expected numbers within fp32, found an overflow"):
        export_adapter(run, tmp_path / "none", scale=1e45)
    with pytest.raises(UserError, match="expected a new"):
        export_adapter(run, run)
    with pytest.raises(UserError, match="expected a ledger, found nothing"):
        export_adapter(tmp_path / "half", tmp_path / "none")
    shape = ledger.shape(name)
    snapshot = write_snapshot(run, 3, {name: gaussian(*shape)})
    others = {other: Coefficients.scalar([1.0]) for other in Adapter.open(run / "a").names if other != name}
    ledger.record(3, ["a"], "x", others, snapshot=snapshot)
    ledger.save()
    with pytest.raises(UserError, match="expected low-rank merges, found an iteration with full weights"):
        export_adapter(run, tmp_path / "none")
    (run / "a" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="adapter_model"):
        export_adapter(run, tmp_path / "none")
    assert not (tmp_path / "none").exists()
