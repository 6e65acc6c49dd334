"""An interrupted fold goes on from its finished shards, and never mixes with another one."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numerics_helpers import Small, make_sharded, small_tensors, write_base

from bam_lora import fold_shard, store
from bam_lora.adapters import Adapter
from bam_lora.errors import UserError
from bam_lora.folding import fold_into
from bam_lora.merge import MergedAdapters

SHARDS = 4


@pytest.fixture(autouse=True)
def one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here shards have an order, however many cores there are; test_fold_writers.py has several at a time."""
    monkeypatch.setattr(fold_shard, "_WORKERS_TO_A_WRITER", 1 << 10)


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return make_sharded(tmp_path, SHARDS)


def run(small: Small, output: Path | None = None, **options: Any) -> dict[str, Any]:
    merged = MergedAdapters([Adapter.open(small.adapter)], [1.0])
    return fold_into(small.base, merged, output or small.out, **{"key": "k", **options})


def after_shards(count: int) -> Callable[[int, int], None]:
    """Progress that interrupts the fold in the shard after `count` whole ones."""
    limit = SHARDS_BYTES[count - 1] if count else 0
    seen = 0

    def note(written: int, total: int) -> None:
        nonlocal seen
        seen += written
        if seen > limit:
            raise KeyboardInterrupt

    return note


SHARDS_BYTES: list[int] = []


@pytest.fixture(autouse=True)
def sizes(small: Small) -> None:
    total = 0
    SHARDS_BYTES.clear()
    for path in sorted(small.base.glob("*.safetensors")):
        total += path.stat().st_size
        SHARDS_BYTES.append(total)


def interrupted(small: Small, count: int, **options: Any) -> Path:
    """The part folder of a fold that was interrupted after `count` shards."""
    with pytest.raises(KeyboardInterrupt):
        run(small, progress=after_shards(count), **options)
    (part,) = small.out.parent.glob(".out.part-*")
    return part


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside(small: Small) -> list[str]:
    return sorted(path.name for path in small.out.parent.iterdir())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_finished_shards_are_not_written_again(small: Small, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    reference = run(small, small.out.with_name("reference"))
    expected = contents(small.out.with_name("reference"))
    part = interrupted(small, count)
    files = {path.name: path.stat() for path in (part / "model").iterdir()}
    assert sorted(files) == sorted(path.name for path in small.base.glob("*.safetensors"))[:count]
    written = []
    write = fold_shard.ShardFolder.write
    monkeypatch.setattr(
        fold_shard.ShardFolder,
        "write",
        lambda self, shard, target: written.append(shard.name) or write(self, shard, target),
    )
    progress: list[int] = []
    facts = run(small, progress=lambda count, total: progress.append(count))
    assert len(written) == SHARDS - count
    assert not set(written) & set(files)
    assert contents(small.out) == expected
    for name, before in files.items():
        after = (small.out / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sum(progress) == facts["bytes"]
    assert (facts.pop("resumed_shards"), reference.pop("resumed_shards")) == (count, 0)
    facts.pop("seconds"), reference.pop("seconds")
    assert facts == reference  # norms too, though they are sums over shards that were not read again
    assert beside(small) == ["a", "base", "out", "reference"]


def damage_bytes(part: Path, name: str) -> None:
    path = part / "model" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_length(part: Path, name: str) -> None:
    os.truncate(part / "model" / name, 100)


def damage_record(part: Path, name: str) -> None:
    path = part / "shards" / f"{name}.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "bytes": record["bytes"] + 1}))


def lose_file(part: Path, name: str) -> None:
    (part / "model" / name).unlink()


def lose_record(part: Path, name: str) -> None:
    (part / "shards" / f"{name}.json").unlink()


def link_elsewhere(part: Path, name: str) -> None:
    path = part / "model" / name
    shutil.move(path, part.parent / "elsewhere")
    path.symlink_to(part.parent / "elsewhere")


@pytest.mark.parametrize("damage", [damage_bytes, damage_length, damage_record, lose_file, lose_record, link_elsewhere])
def test_what_does_not_verify_is_written_again(small: Small, damage: Callable[[Path, str], None]) -> None:
    run(small, small.out.with_name("reference"))
    part = interrupted(small, 2)
    (part / "model" / "config.json").write_text("{}")  # a kill may come after it, damage after that
    damage(part, "model-00001-of-00004.safetensors")
    assert run(small)["resumed_shards"] == 1
    assert contents(small.out) == contents(small.out.with_name("reference"))
    assert not any(path.is_symlink() for path in small.out.iterdir())
    assert not list(small.out.parent.glob(".out*"))


def touched(small: Small) -> None:
    """Another base of the same headers and sizes, in place."""
    tensors = {name: tensor * 2 for name, tensor in small_tensors().items()}
    shutil.rmtree(small.base)
    write_base(small.base, tensors, shards=SHARDS)


@pytest.mark.parametrize("change", [{"key": "other"}, {"dtype": "float32"}, {"max_shard_bytes": 500}, touched])
def test_shards_of_other_work_are_not_taken_over_but_removed(small: Small, change: Any) -> None:
    part = interrupted(small, 3)
    if callable(change):
        change(small)
        change = {}
    run(small, small.out.with_name("reference"), **change)
    assert part.is_dir()  # another output's fold leaves it alone
    assert run(small, **change)["resumed_shards"] == 0
    assert contents(small.out) == contents(small.out.with_name("reference"))
    assert beside(small) == ["a", "base", "out", "reference"]


def test_what_stood_there_stays_until_the_new_model_is_whole(small: Small) -> None:
    run(small, key="old")
    before = contents(small.out)
    part = interrupted(small, 2)
    assert contents(small.out) == before
    small.out.rename(part / "old")  # killed between the two renames
    with pytest.raises(KeyboardInterrupt):
        run(small, key="third", progress=after_shards(0))
    assert contents(small.out) == before
    run(small, key="k")
    assert store.verify(small.out, "k") is not None


def test_damaged_inputs_leave_no_shards(small: Small) -> None:
    tensors = small_tensors()
    tensors["model.layers.0.up_proj.weight"][0, 0] = float("nan")  # in the third shard
    shutil.rmtree(small.base)
    write_base(small.base, tensors, shards=SHARDS)
    with pytest.raises(UserError, match="NaN or Inf after the fold"):
        run(small)
    assert beside(small) == ["a", "base"]


def test_a_full_disk_leaves_the_finished_shards(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    put = fold_shard.ShardFolder._put
    left = SHARDS_BYTES[1]

    def full(self: Any, file: Any, data: Any, sha: Any) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(28, "No space left on device")
        put(self, file, data, sha)

    with monkeypatch.context() as patch:
        patch.setattr(fold_shard.ShardFolder, "_put", full)
        patch.delattr(os, "copy_file_range", raising=False)
        patch.setattr(
            fold_shard.ShardFolder,
            "_copy",
            lambda self, source, file, item, sha: full(
                self, file, os.pread(source.fileno(), item.stop - item.start, item.start), sha
            ),
        )
        with pytest.raises(UserError, match="No space left on device"):
            run(small)
    assert run(small)["resumed_shards"] == 2


def test_disk_space_is_asked_for_what_is_not_there_yet(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(small, 3)
    asked: list[int] = []
    monkeypatch.setattr("bam_lora.fold_write.require_space", lambda folder, needed, purpose: asked.append(needed))
    run(small)
    tokenizer = 2
    assert asked == [SHARDS_BYTES[3] - SHARDS_BYTES[2] + tokenizer]


def test_too_little_space_leaves_the_finished_shards(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(small, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="disk space for the folded model"):
            run(small)
    assert run(small)["resumed_shards"] == 2


def test_a_second_fold_into_the_same_output_is_refused(small: Small) -> None:
    begun, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def wait(count: int, total: int) -> None:
        begun.set()
        assert go_on.wait(30)

    def first() -> None:
        try:
            run(small, progress=wait)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(30)
    for key in ("k", "other"):
        with pytest.raises(UserError, match=r"output .*out: expected no other process writing there, found one"):
            run(small, key=key)
    run(small, small.out.with_name("sibling"))
    go_on.set()
    thread.join(30)
    assert not errors
    assert store.verify(small.out, "k") is not None
    assert beside(small) == ["a", "base", "out", "sibling"]


def test_a_lock_whose_holder_was_killed_holds_nobody_up(small: Small) -> None:
    (small.out.parent / ".out.lock").touch()
    run(small)
    assert beside(small) == ["a", "base", "out"]


def test_all_files_follow_the_umask(small: Small) -> None:
    (small.base / "tokenizer.json").chmod(0o600)
    old = os.umask(0o027)
    try:
        run(small)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [small.out, *small.out.rglob("*")]}
    assert len(modes) == SHARDS + 5  # index, config, manifest, tokenizer, the folder
    assert {name: mode for name, mode in modes.items() if mode != (0o750 if name == "out" else 0o640)} == {}


def test_a_run_that_starts_again_keeps_the_finished_shards(small: Small) -> None:
    """A run sweeps its folder of temporary files when it starts."""
    interrupted(small, 2)
    store.sweep(small.out.parent)
    assert run(small)["resumed_shards"] == 2


def test_the_parts_of_a_temporary_output_are_temporary(small: Small) -> None:
    small = small._replace(out=small.out.with_name(".tmp-x"))
    with pytest.raises(KeyboardInterrupt):
        run(small, progress=after_shards(2))
    assert list(small.out.parent.glob(".tmp-x.part-*"))
    store.sweep(small.out.parent)
    assert beside(small) == ["a", "base"]
