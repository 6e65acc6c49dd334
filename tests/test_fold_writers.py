"""Several shards written at a time: the same bytes, and an end that leaves only whole ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics_helpers import Small, make_sharded, random_adapter, small_tensors, write_base

from bam_lora import fold_blocks, fold_shard
from bam_lora.adapters import Adapter
from bam_lora.errors import UserError
from bam_lora.folding import fold_into
from bam_lora.merge import MergedAdapters

SHARDS = 4


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return make_sharded(tmp_path, SHARDS)


def run(small: Small, output: Path | None = None, **options: Any) -> dict[str, Any]:
    merged = MergedAdapters([Adapter.open(small.adapter)], [1.0])
    return fold_into(small.base, merged, output or small.out, **{"key": "k", **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Meeting:
    """Lets the first `_put` of every shard go on only when so many shards are being written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parties: int) -> None:
        barrier, put, met = threading.Barrier(parties, timeout=60), fold_shard.ShardFolder._put, set[str]()

        def wait(this: Any, file: Any, data: Any, sha: Any) -> None:
            if file.name not in met:
                met.add(file.name)
                barrier.wait()
            put(this, file, data, sha)

        monkeypatch.setattr(fold_shard.ShardFolder, "_put", wait)


def test_shards_written_together_have_the_bytes_and_sums_of_those_written_in_turn(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fold_shard, "_WORKERS_TO_A_WRITER", 1 << 10)
        expected = run(small, small.out.with_name("reference"))
    counts: list[int] = []
    Meeting(monkeypatch, SHARDS)  # fails unless all are under way at once
    facts = run(small, progress=lambda count, total: counts.append(count))
    assert contents(small.out) == contents(small.out.with_name("reference"))
    assert sum(counts) == facts["bytes"]
    expected.pop("seconds"), facts.pop("seconds")
    assert facts == expected


def test_a_weight_that_is_not_finite_ends_all_shards_and_leaves_nothing(small: Small) -> None:
    tensors = small_tensors()
    tensors["model.layers.0.up_proj.weight"][0, 0] = float("nan")
    for path in small.base.glob("*.safetensors"):
        path.unlink()
    write_base(small.base, tensors, shards=SHARDS)
    with pytest.raises(UserError, match="NaN or Inf after the fold"):
        run(small)
    assert sorted(path.name for path in small.out.parent.iterdir()) == ["a", "base"]


def test_an_interrupt_ends_the_other_shards_at_their_next_block_and_the_next_call_goes_on(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small, small.out.with_name("reference"))
    first = sorted(small.base.glob("*.safetensors"))[0].name
    put, finished = fold_shard.ShardFolder._put, threading.Event()
    ended: list[str] = []

    def stop(this: Any, file: Any, data: Any, sha: Any) -> None:
        shard = Path(file.name).name.removesuffix(".part")
        if shard != first:
            assert finished.wait(60)
            if not ended:
                ended.append(shard)
                raise KeyboardInterrupt
            assert this._ended.wait(60)
        put(this, file, data, sha)

    finish = fold_shard.ShardFolder.write_all

    def note(this: Any, shards: Any, place: Any, done: Any) -> None:
        def said(shard: Any, written: Any) -> None:
            done(shard, written)
            finished.set()

        finish(this, shards, place, said)

    with monkeypatch.context() as patch:
        patch.setattr(fold_shard.ShardFolder, "_put", stop)
        patch.setattr(fold_shard.ShardFolder, "write_all", note)
        with pytest.raises(KeyboardInterrupt):
            run(small)
    (part,) = small.out.parent.glob(".out.part-*")
    assert [path.name for path in (part / "model").iterdir()] == [first]
    assert run(small)["resumed_shards"] == 1
    assert contents(small.out) == contents(small.out.with_name("reference"))


def test_after_a_failure_no_further_shard_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given up keeps its buffers: the blocks of further shards would wait for some for ever."""
    shapes = {f"model.layers.{number}.up_proj": (8, 8) for number in range(2 * SHARDS)}
    base = write_base(tmp_path / "base", {f"{name}.weight": torch.ones(8, 8) for name in shapes}, shards=2 * SHARDS)
    small = Small(base, random_adapter(tmp_path / "a", shapes), tmp_path / "out")
    together, begun, put = threading.Barrier(SHARDS, timeout=60), list[str](), fold_shard.ShardFolder._put

    def fail(this: Any, file: Any, data: Any, sha: Any) -> None:
        if file.name in begun:
            put(this, file, data, sha)
            return
        begun.append(file.name)
        if len(begun) <= SHARDS and together.wait() == 0:
            raise UserError("a faulty tensor")
        assert this._ended.wait(5)

    def last_first(futures: Any) -> Any:
        """The caller hears late of the failure, and first of what it has ended."""
        done = list(as_completed(futures))
        return sorted(done, key=lambda one: not isinstance(one.exception(), fold_shard._Ended))

    monkeypatch.setattr(fold_shard.ShardFolder, "_put", fail)
    monkeypatch.setattr(fold_shard, "as_completed", last_first)
    with pytest.raises(UserError, match="a faulty tensor"):
        run(small)
    assert len(begun) == SHARDS


def test_one_shard_keeps_all_threads_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"model.layers.0.up_proj": (64, 64)}
    base = write_base(tmp_path / "base", {"model.layers.0.up_proj.weight": torch.ones(64, 64)})
    small = Small(base, random_adapter(tmp_path / "a", shapes), tmp_path / "out")
    monkeypatch.setattr(fold_blocks, "BLOCK_ELEMENTS", 2 * 64)
    together, compute, met = threading.Barrier(8, timeout=30), fold_blocks.BlockComputer.compute, set[int]()

    def wait(this: Any, block: Any) -> Any:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            together.wait()
        return compute(this, block)

    monkeypatch.setattr(fold_blocks.BlockComputer, "compute", wait)
    run(small)
    assert len(met) == 8
