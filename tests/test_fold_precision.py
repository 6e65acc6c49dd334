"""Folding rounds once: against float64, through ten iterations, and against PEFT's own model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_helpers import (
    BF16,
    dense_delta,
    gaussian,
    load_all,
    round_directly,
    ulp,
    write_adapter,
    write_base,
)

from bam_lora import fold_blocks
from bam_lora.adapters import Adapter
from bam_lora.fold_blocks import BLOCK_ELEMENTS, row_ranges
from bam_lora.folding import fold, fold_into
from bam_lora.ledger import Ledger
from bam_lora.merge import Coefficients, MergedAdapters


def assert_rounded_once(got: torch.Tensor, base: torch.Tensor, exact: torch.Tensor, identical: float) -> None:
    """At least `identical` of the elements as rounded directly, none off by more than one unit in the last place."""
    want = round_directly(exact, got.dtype)
    same = got.view(torch.int16) == want.view(torch.int16)
    assert float(same.double().mean()) >= identical
    larger = torch.maximum(base.double().abs(), exact.abs()).numpy()
    error = (got.double() - want.double()).abs().numpy()
    assert np.all(error <= ulp(larger, got.dtype))


def test_the_reference_itself_rounds_once() -> None:
    halfway_in_fp32 = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8], dtype=torch.float64)
    assert round_directly(halfway_in_fp32, BF16).tolist() == [1 + 2.0**-7, 1.0, 1 + 2.0**-6]
    values = gaussian(1000, seed=1)  # from fp32 there is only one rounding, and torch does that right
    for dtype in (BF16, torch.float16):
        scaled = values * torch.logspace(-7, 4, 1000)
        assert torch.equal(round_directly(scaled, dtype), scaled.to(dtype))
        if dtype == BF16:
            tiny = values * 1e-39
            assert torch.equal(round_directly(tiny, dtype), tiny.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "identical", "relative", "shape"),
    [
        (BF16, 0.9999, 5e-4, (2048, 5632)),
        (BF16, 0.9999, 5e-2, (2048, 2048)),
        (torch.float16, 0.9998, 5e-4, (2048, 1024)),
        (torch.float16, 0.9998, 5e-2, (1024, 2048)),
    ],
)
def test_one_iteration_at_realistic_sizes(
    tmp_path: Path, dtype: torch.dtype, identical: float, relative: float, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    tensors = {"q.weight": gaussian(*shape, scale=0.02, seed=3, dtype=dtype)}
    write_base(tmp_path / "base", tensors)
    adapters = []
    for k in (10, 20):
        halves = (gaussian(64, columns, seed=k, scale=1 / 64), gaussian(rows, 64, seed=k + 1, scale=0.16 * relative))
        adapters.append(write_adapter(tmp_path / f"a{k}", {"q": halves}, alpha=128))
    facts = fold(tmp_path / "base", adapters, tmp_path / "out", weights=[0.4, 0.6])
    got = load_all(tmp_path / "out")
    for name, base in tensors.items():
        change = 0.4 * dense_delta(adapters[0], name) + 0.6 * dense_delta(adapters[1], name)
        assert relative / 3 < float(change.norm() / base.double().norm()) < relative * 3
        assert_rounded_once(got[name], base, base.double() + change, identical)
        assert facts["delta_norms"][name] == pytest.approx(float(change.norm()), rel=1e-5)
        assert facts["weight_norms"][name] == pytest.approx(float(base.double().norm()), rel=1e-6)


@pytest.fixture(scope="module")
def ten_iterations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """(run folder, base weight, exact result in float64): two branches each, every merged delta 3e-4 of the weight.

    The iterations pull the same way, as training does, with a fifth of each of its own.
    """
    root = tmp_path_factory.mktemp("ten")
    base = gaussian(1024, 768, scale=0.02, seed=1, dtype=BF16)
    write_base(root / "base", {"q.weight": base, "norm.weight": torch.ones(8, dtype=BF16)})
    ledger = Ledger.start(root, {"name": "b", "revision": None, "files": {}})
    exact = base.double()
    common = [(gaussian(64, 768, seed=2 + k), gaussian(1024, 64, seed=4 + k)) for k in (0, 1)]
    for t in range(1, 11):
        halves = [(A, B + 0.2 * gaussian(1024, 64, seed=10 * t + k)) for k, (A, B) in enumerate(common)]
        dense = 0.5 * sum(B.double() @ A.double() for A, B in halves)
        shrink = 3e-4 * float(base.double().norm() / dense.norm())
        for k, (A, B) in enumerate(halves):
            write_adapter(root / f"i{t}/b{k}", {"q": (A, B * shrink)}, alpha=64)
        ledger.record(t, [f"i{t}/b0", f"i{t}/b1"], "linear", {"q.weight": Coefficients.scalar([0.5, 0.5])})
        exact = exact + 0.5 * (dense_delta(root / f"i{t}/b0", "q.weight") + dense_delta(root / f"i{t}/b1", "q.weight"))
    ledger.save()
    return root, base, exact


def kept(result: torch.Tensor, base: torch.Tensor, exact: torch.Tensor) -> float:
    """The share of the wanted change that the result holds (its projection onto it)."""
    wanted, got = exact - base.double(), result.double() - base.double()
    return float((wanted * got).sum() / (wanted * wanted).sum())


def test_ten_iterations_through_the_ledger(ten_iterations: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    root, base, exact = ten_iterations
    fold_into(root / "base", Ledger.load(root).view(), root / "out", key="k")
    got = load_all(root / "out")["q.weight"]
    assert_rounded_once(got, base, exact, 0.9999)
    assert kept(got, base, exact) >= 0.9
    # For contrast, what this product is for: each iteration folded into the one before, which rounds ten times.
    ledger, rounded = Ledger.load(root), base
    stacked = ledger.stacked("q.weight")
    assert stacked is not None
    for B, A in zip(stacked[0].split(128, dim=1), stacked[1].split(128), strict=True):
        rounded = (rounded.float() + B @ A).to(BF16)
    assert kept(rounded, base, exact) < 0.25


def test_any_iteration_can_be_rebuilt(ten_iterations: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    root, base, exact = ten_iterations
    ledger = Ledger.load(root)
    fold_into(root / "base", ledger.view(0), root / "zero", key="k")
    assert (root / "zero/model.safetensors").read_bytes() == (root / "base/model.safetensors").read_bytes()
    fold_into(root / "base", ledger.view(10), root / "fp32", key="k", dtype="float32")
    got = load_all(root / "fp32")["q.weight"].double()
    assert float((got - exact).norm() / (exact - base.double()).norm()) < 1e-4
    assert float((got - exact).norm() / exact.norm()) < 1e-7


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 6)), min_size=1, max_size=4),
    dtype=st.sampled_from([BF16, torch.float16, torch.float32]),
    weights=st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.1), min_size=1, max_size=3),
    elements=st.sampled_from([1, 7, 64, BLOCK_ELEMENTS]),
    seed=st.integers(0, 99),
)
def test_tiny_tensors_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, int, int]],
    dtype: torch.dtype,
    weights: list[float],
    elements: int,
    seed: int,
) -> None:
    """Single rows, single columns, many blocks, ranks that differ by branch: against float64."""
    root = tmp_path_factory.mktemp("tiny")
    tensors = {f"m{n}.weight": gaussian(o, i, seed=seed + n, dtype=dtype) for n, (o, i, _) in enumerate(sizes)}
    write_base(root / "base", tensors, shards=min(2, len(sizes)))
    modules = [
        {f"m{n}": (gaussian(r + k, i, seed=k), gaussian(o, r + k, seed=9 + k)) for n, (o, i, r) in enumerate(sizes)}
        for k in range(len(weights))
    ]
    opened = [Adapter.open(write_adapter(root / f"a{k}", each, alpha=1)) for k, each in enumerate(modules)]
    patch = pytest.MonkeyPatch()
    patch.setattr(fold_blocks, "BLOCK_ELEMENTS", elements)
    try:
        fold_into(root / "base", MergedAdapters(opened, weights), root / "out", key="k")
    finally:
        patch.undo()
    got = load_all(root / "out")
    for name, base in tensors.items():
        exact = base.double()
        size = base.double().abs()
        for k, weight in enumerate(weights):
            exact = exact + weight * dense_delta(root / f"a{k}", name)
            factors = opened[k].factors(name)
            assert factors is not None
            size = size + abs(weight * factors.scaling) * (factors.B_or.double().abs() @ factors.A_ri.double().abs())
        error = (got[name].double() - exact).abs()
        if dtype == torch.float32:
            assert bool((error <= 3e-7 * size).all())
        else:
            allowed = 0.5 * torch.from_numpy(ulp(got[name].double().abs().numpy(), dtype)) + 3e-7 * size
            assert bool((error <= allowed).all())
    shutil.rmtree(root)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 3000), st.integers(1, 5000))
def test_blocks_cover_all_rows_and_are_never_one_row(rows: int, columns: int, elements: int) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(fold_blocks, "BLOCK_ELEMENTS", elements)
    try:
        ranges = list(row_ranges(rows, columns))
    finally:
        patch.undo()
    assert [row for first, count in ranges for row in range(first, first + count)] == list(range(rows))
    assert rows == 1 or all(count >= 2 for _, count in ranges)
    assert all(count <= max(3, 1.5 * elements / columns) for _, count in ranges) or rows == 1


def test_the_same_logits_as_peft(tmp_path: Path) -> None:
    """Two adapters on a real Llama: PEFT's unmerged model against the folded one, through plain from_pretrained."""
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapters")
    wrapped.add_weighted_adapter(["one", "two"], [0.5, 1.5], "both", combination_type="cat")
    wrapped.set_adapter("both")
    tokens = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        want = wrapped(tokens).logits
    names = [tmp_path / "adapters" / name for name in ("one", "two")]
    facts = fold(tmp_path / "base", names, tmp_path / "out", weights=[0.5, 1.5], any_base=True)
    assert facts["changed"] == 14
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        got = folded(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()(tokens).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert float((got - plain).abs().max()) > 0.01
