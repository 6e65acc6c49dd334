"""The ledger: any weight at any iteration, exactly; files that changed are named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from numerics_helpers import delta, gaussian, random_adapter, write_adapter

from bam_lora.adapters import Adapter
from bam_lora.errors import UserError
from bam_lora.ledger import Ledger
from bam_lora.merge import Coefficients, linear
from bam_lora.snapshots import write_snapshot

SHAPES = {"layers.0.q_proj": (12, 8), "layers.0.up_proj": (20, 12)}
Q, UP = "layers.0.q_proj.weight", "layers.0.up_proj.weight"
BASE = {"name": "org/model", "revision": "abc", "files": {"model.safetensors": {"bytes": 3, "sha256": "0" * 64}}}


def grow(root: Path, iterations: int, *, branches: int = 2, first: int = 1, ledger: Ledger | None = None) -> Ledger:
    """A ledger with Gaussian branches of differing ranks."""
    ledger = ledger or Ledger.start(root, BASE)
    for iteration in range(first, first + iterations):
        paths = []
        for branch in range(branches):
            paths.append(f"iterations/{iteration:02d}/branch-{branch + 1}/adapter")
            random_adapter(root / paths[-1], SHAPES, rank=2 + branch, seed=10 * iteration + branch, scale=0.1)
        ledger.record(iteration, paths, "linear", {name: Coefficients.scalar([0.25, 0.75]) for name in (Q, UP)})
    ledger.save()
    return ledger


def dense(root: Path, name: str, iterations: range) -> torch.Tensor:
    total = torch.zeros(SHAPES[name.removesuffix(".weight")], dtype=torch.float64)
    for iteration in iterations:
        for branch, weight in ((1, 0.25), (2, 0.75)):
            factors = Adapter.open(root / f"iterations/{iteration:02d}/branch-{branch}/adapter").factors(name)
            assert factors is not None
            total += weight * delta(factors.A_ri, factors.B_or, factors.scaling)
    return total


def product(ledger: Ledger, name: str, upto: int | None = None) -> torch.Tensor:
    stacked = ledger.stacked(name, upto)
    assert stacked is not None
    return stacked[0].double() @ stacked[1].double()


def test_ten_iterations_replay_exactly(tmp_path: Path) -> None:
    grow(tmp_path, 10)
    ledger = Ledger.load(tmp_path)
    assert ledger.base == BASE
    assert ledger.names() == [Q, UP]
    assert ledger.names(upto=0) == []
    for upto in (1, 4, 10, None):
        for name in (Q, UP):
            want = dense(tmp_path, name, range(1, (upto or 10) + 1))
            got = product(ledger, name, upto)
            assert float((got - want).norm() / want.norm()) < 1e-6
            assert ledger.norms(upto)[name] == pytest.approx(float(want.norm()), rel=1e-6)
            assert ledger.view(upto).shape(name) == tuple(want.shape)
    assert ledger.stacked(Q, upto=0) is None
    assert ledger.start_value(Q) is None
    ledger.verify()


def test_recording_again_replaces_and_drops_what_came_later(tmp_path: Path) -> None:
    ledger = grow(tmp_path, 3)
    keys = [ledger.key(upto) for upto in range(4)]
    assert len(set(keys)) == 4
    assert ledger.key() == keys[3]
    grow(tmp_path, 1, first=2, ledger=ledger)  # the same again
    assert len(ledger.iterations) == 2
    assert ledger.key() == keys[2] == Ledger.load(tmp_path).key()
    random_adapter(tmp_path / "other", SHAPES, seed=99)
    ledger.record(2, ["other"], "linear", {name: Coefficients.scalar([1.0]) for name in (Q, UP)})
    assert ledger.key() not in keys


def test_an_adapter_that_comes_up_again_is_known_by_its_content(tmp_path: Path) -> None:
    """Nothing is hashed to know it, weight by weight: the ledger states the hashes."""
    ledger = grow(tmp_path, 2)
    shutil.copytree(tmp_path / "iterations/01/branch-1/adapter", tmp_path / "copy")
    config = tmp_path / "iterations/01/branch-2/adapter/adapter_config.json"
    shutil.copytree(config.parent, tmp_path / "other")  # the same weights under another config are another adapter
    (tmp_path / "other" / config.name).write_text(config.read_text() + "\n")
    ledger.record(3, ["copy", "other"], "linear", {name: Coefficients.scalar([0.5, 0.125]) for name in (Q, UP)})
    before, added = dense(tmp_path, Q, range(1, 3)), torch.zeros(12, 8, dtype=torch.float64)
    for folder, weight in (("copy", 0.5), ("other", 0.125)):
        factors = Adapter.open(tmp_path / folder).factors(Q)
        assert factors is not None
        added += weight * delta(factors.A_ri, factors.B_or, factors.scaling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hashlib.sha256", lambda *_: pytest.fail("hashed"))
        stacked = ledger.stacked(Q)
        assert ledger.rank(Q) == 2 * (2 + 3) + 3
    assert stacked is not None
    assert stacked[1].shape[0] == 2 * (2 + 3) + 3
    torch.testing.assert_close(stacked[0].double() @ stacked[1].double(), before + added, rtol=1e-5, atol=1e-7)


def test_the_key_is_of_content_not_of_places(tmp_path: Path) -> None:
    grow(tmp_path / "a", 2)
    grow(tmp_path / "b", 2)
    assert Ledger.load(tmp_path / "a").key() == Ledger.load(tmp_path / "b").key()
    renamed = Ledger.start(tmp_path / "b", {**BASE, "name": "/elsewhere/model"})
    assert renamed.key() == Ledger.start(tmp_path / "a", BASE).key()
    other = Ledger.start(tmp_path, {**BASE, "files": {"model.safetensors": {"bytes": 3, "sha256": "1" * 64}}})
    assert other.key() != renamed.key()


def test_a_module_that_one_branch_lacks(tmp_path: Path) -> None:
    random_adapter(tmp_path / "a", SHAPES, seed=1)
    random_adapter(tmp_path / "b", {"layers.0.q_proj": (12, 8)}, seed=2)
    ledger = Ledger.start(tmp_path, BASE)
    adapters = [Adapter.open(tmp_path / path) for path in "ab"]
    coefficients = {name: linear([a.factors(name) for a in adapters], [0.5, 0.5]) for name in (Q, UP)}
    ledger.record(1, ["a", "b"], "linear", coefficients)
    factors = adapters[0].factors(UP)
    assert factors is not None
    want = 0.5 * delta(factors.A_ri, factors.B_or, factors.scaling)
    torch.testing.assert_close(product(ledger, UP), want, rtol=1e-6, atol=1e-9)


def test_diagonal_and_matrix_coefficients_come_back_bit_for_bit(tmp_path: Path) -> None:
    random_adapter(tmp_path / "a", SHAPES, rank=3, seed=1)
    ledger = Ledger.start(tmp_path, BASE)
    M, d = gaussian(3, 3, seed=1).double() / 3, gaussian(3, seed=2).double() / 3
    ledger.record(1, ["a"], "later", {Q: Coefficients("matrix", M), UP: Coefficients("diagonal", d)})
    ledger.save()
    again = Ledger.load(tmp_path)
    adapter = Adapter.open(tmp_path / "a")
    q, up = adapter.factors(Q), adapter.factors(UP)
    assert q is not None
    assert up is not None
    torch.testing.assert_close(
        product(again, Q), q.scaling * q.B_or.double() @ M @ q.A_ri.double(), rtol=1e-5, atol=1e-8
    )
    torch.testing.assert_close(
        product(again, UP), up.scaling * up.B_or.double() * d @ up.A_ri.double(), rtol=1e-5, atol=1e-8
    )
    (tmp_path / "coefficients" / "01.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"coefficients/01.safetensors: expected the file that the ledger records"):
        again.verify()


def test_replay_starts_from_the_newest_snapshot(tmp_path: Path) -> None:
    ledger = grow(tmp_path, 2)
    value = gaussian(12, 8, seed=7)
    entry = ledger.iterations[1]
    paths = [adapter["path"] for adapter in entry["adapters"]]
    snapshot = write_snapshot(tmp_path, 2, {Q: value})
    ledger.record(2, paths, "elementwise", {UP: Coefficients.scalar([0.25, 0.75])}, snapshot=snapshot)
    ledger = grow(tmp_path, 1, first=3, ledger=ledger)
    ledger = Ledger.load(tmp_path)
    start = ledger.start_value(Q)
    assert start is not None
    assert torch.equal(start, value)
    torch.testing.assert_close(product(ledger, Q), dense(tmp_path, Q, range(3, 4)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(product(ledger, UP), dense(tmp_path, UP, range(1, 4)), rtol=1e-6, atol=1e-8)
    assert ledger.start_value(UP) is None
    # Before it, and right at it
    assert ledger.start_value(Q, upto=1) is None
    torch.testing.assert_close(product(ledger, Q, upto=1), dense(tmp_path, Q, range(1, 2)), rtol=1e-6, atol=1e-8)
    assert ledger.stacked(Q, upto=2) is None
    assert ledger.start_value(Q, upto=2) is not None
    (tmp_path / snapshot).write_bytes(b"gone")
    with pytest.raises(UserError, match=r"snapshots/02.safetensors: expected the file that the ledger records"):
        ledger.verify()
    ledger.verify(upto=1)


def test_a_weight_that_only_a_snapshot_changes(tmp_path: Path) -> None:
    ledger = grow(tmp_path, 1)
    norm = {"norm.weight": torch.ones(6, 1)}
    paths = [adapter["path"] for adapter in ledger.iterations[0]["adapters"]]
    coefficients = {name: Coefficients.scalar([0.5, 0.5]) for name in (Q, UP)}
    ledger.record(1, paths, "linear", coefficients, snapshot=write_snapshot(tmp_path, 1, norm))
    assert ledger.names() == [Q, UP, "norm.weight"]
    assert ledger.shape("norm.weight") == (6, 1)
    assert ledger.stacked("norm.weight") is None
    assert ledger.norms()["norm.weight"] == 0.0


def test_damage_is_named(tmp_path: Path) -> None:
    ledger = grow(tmp_path, 2)
    with pytest.raises(UserError, match=r"nowhere/ledger.json: expected a ledger, found nothing"):
        Ledger.load(tmp_path / "nowhere")
    path = tmp_path / "ledger.json"
    whole = path.read_text()
    for text in (whole.replace("0.25", "0.26"), whole[:-50], "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"ledger.json: expected a ledger that matches its own hash"):
            Ledger.load(tmp_path)
    weights = tmp_path / "iterations/02/branch-1/adapter/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ledger.verify(upto=1)
    with pytest.raises(UserError, match=r"02/branch-1/adapter/adapter_model.safetensors: .*found another one"):
        ledger.verify()
    weights.unlink()
    with pytest.raises(UserError, match=r"02/branch-1/adapter/adapter_model.safetensors: .*found nothing"):
        ledger.verify()


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_lora.ledger.FORMAT", 99)
    grow(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"expected format 1, found 99.*Update bam_lora"):
        Ledger.load(tmp_path)


def test_paths_stay_inside(tmp_path: Path) -> None:
    random_adapter(tmp_path / "outside", SHAPES)
    ledger = Ledger.start(tmp_path / "run", BASE)
    with pytest.raises(UserError, match=r"inside this folder, found '../outside'"):
        ledger.record(1, ["../outside"], "linear", {})


def test_a_nan_in_an_adapter_is_found_on_replay(tmp_path: Path) -> None:
    B = gaussian(12, 2)
    B[3, 1] = float("inf")
    write_adapter(tmp_path / "a", {"layers.0.q_proj": (gaussian(2, 8), B)})
    ledger = Ledger.start(tmp_path, BASE)
    ledger.record(1, ["a"], "linear", {Q: Coefficients.scalar([1.0])})
    with pytest.raises(UserError, match=r"q_proj.lora_B.weight' in .*NaN or Inf"):
        ledger.stacked(Q)


def test_a_run_continues_finished_runs(tmp_path: Path) -> None:
    """Two generations: the grandchild carries everything itself, as one longer run would."""
    grow(tmp_path / "one", 2)
    child = Ledger.start(tmp_path / "two", {"name": "one", "revision": None, "files": {}})
    child.adopt(tmp_path / "one")
    assert child.base == BASE
    assert child.key(upto=0) == Ledger.load(tmp_path / "one").key()
    snapshot = write_snapshot(tmp_path / "two", 1, {UP: gaussian(20, 12)})
    random_adapter(tmp_path / "two" / "a", SHAPES, rank=3, seed=77)
    child.record(1, ["a"], "x", {Q: Coefficients("matrix", gaussian(3, 3).double())}, snapshot=snapshot)
    child.save()
    grandchild = Ledger.start(tmp_path / "three", {"name": "two", "revision": None, "files": {}})
    grandchild.adopt(tmp_path / "two")
    grandchild.adopt(tmp_path / "two")  # again, after an interruption
    grow(tmp_path / "three", 1, ledger=grandchild)
    assert len(grandchild.inherited) == 3
    for folder in ("one", "two"):
        os.rename(tmp_path / folder, tmp_path / f"{folder} is gone")
    again = Ledger.load(tmp_path / "three")
    again.verify()
    assert again.key(upto=0) == child.key()
    child = Ledger.load(tmp_path / "two is gone")
    want = product(child, Q) + dense(tmp_path / "three", Q, range(1, 2))
    torch.testing.assert_close(product(again, Q), want, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(product(again, UP), dense(tmp_path / "three", UP, range(1, 2)), rtol=1e-6, atol=1e-8)
    assert again.start_value(UP) is not None


def test_a_damaged_parent_is_not_adopted(tmp_path: Path) -> None:
    grow(tmp_path / "one", 1)
    (tmp_path / "one/iterations/01/branch-2/adapter/adapter_config.json").write_text("{}")
    child = Ledger.start(tmp_path / "two", BASE)
    with pytest.raises(UserError, match=r"branch-2/adapter/adapter_config.json: expected the file"):
        child.adopt(tmp_path / "one")
    assert not (tmp_path / "two" / "parent").exists()


def test_what_is_written_is_strict_json(tmp_path: Path) -> None:
    grow(tmp_path, 1)
    body = json.loads((tmp_path / "ledger.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert body["key"] == Ledger.load(tmp_path).key()
    assert {"format", "base", "inherited", "iterations", "key", "sha256"} == set(body)
