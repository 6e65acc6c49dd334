"""A folder that is filled file by file, survives being killed, and appears whole or not at all.

Beside OUTPUT stands `.OUTPUT.part-KEY/` while it is made: `model/` is the folder to be, `shards/NAME.json` a record of
each shard in it that is finished and on the disk. The name holds the key of the work and no process number, so the next
process that does the same work finds it and goes on.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.lock_file import held
from bam_lora.store import fsync_path, hash_file, read_record, write_record

_KEY_DIGITS = 16
_HALF = ".part"


class Parts:
    """The folder to be and the records of its finished shards."""

    def __init__(self, output: Path, key: str) -> None:
        self._output = output
        self._key = key
        self.root = output.with_name(f".{_bare(output)}.part-{key[:_KEY_DIGITS]}")
        self.folder = self.root / "model"
        self._records = self.root / "shards"
        self._finishing: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finish")

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record of a shard whose bytes are all there: {"bytes", "file_sha256", and what `finish` was given}."""
        record = read_record(self._record(name), self._key)
        path = self.folder / name
        if record is None or not path.is_file() or path.is_symlink() or path.stat().st_size != record["bytes"]:
            return None
        return record if hash_file(path) == record["file_sha256"] else None

    def begin(self, keep: Sequence[str]) -> None:
        """Makes the folder, or empties it but for the shards named.

        The config goes first: a folder without one cannot be loaded, so it never looks whole while it is not.
        """
        for path in (self.folder, self._records):
            path.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.iterdir(), key=lambda path: (path.suffix != ".json", path.name)):
            if path.name not in keep:
                _remove(path)
        for path in self._records.iterdir():
            if path.name.removesuffix(".json") not in keep:
                _remove(path)

    def unfinished(self, name: str) -> Path:
        """Where a shard is written before it is finished."""
        return self.folder / (name + _HALF)

    def finish(self, name: str, sha256: str, facts: Mapping[str, Any]) -> None:
        """Gives a written shard its name and record, once it is on the disk; the caller does not wait for that."""
        for future in self._finishing:
            if future.done():
                future.result()
        self._finishing.append(self._pool.submit(self._finish, name, sha256, dict(facts)))

    def _finish(self, name: str, sha256: str, facts: dict[str, Any]) -> None:
        path = self.unfinished(name)
        fsync_path(path)
        path.rename(self.folder / name)
        fsync_path(self.folder)
        size = (self.folder / name).stat().st_size
        write_record(self._record(name), self._key, {**facts, "bytes": size, "file_sha256": sha256})

    def wait(self) -> None:
        """Waits until every shard is on the disk and passes on what went wrong."""
        for future in self._finishing:
            future.result()

    def publish(self) -> None:
        """Puts the folder in the output's place in one step; what stood there is deleted."""
        for path in sorted(self.folder.rglob("*")):
            fsync_path(path)
        fsync_path(self.folder)
        if self._output.exists():
            self._output.rename(self._old())
        self.folder.rename(self._output)
        fsync_path(self._output.parent)
        if self._old().exists():
            self._old().rename(self.root / "gone")  # what is half deleted must not be put back
        _remove(self.root)

    def clear_others(self) -> None:
        """Deletes what interrupted work with other keys has left; puts back what it had moved aside."""
        name = re.compile(re.escape(f".{_bare(self._output)}.part-") + rf"[0-9a-f]{{{_KEY_DIGITS}}}")
        for path in sorted(self._output.parent.iterdir()):
            if name.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    if not self._output.exists():
                        (path / self._old().name).rename(self._output)
                ours = path == self.root and not path.is_symlink()
                for leftover in (self._old(), self.root / "gone") if ours else (path,):
                    _remove(leftover)

    def close(self) -> None:
        """Ends the thread; without a finished shard nothing is left on the disk."""
        self._pool.shutdown(wait=True)
        if self.folder.is_dir():
            for path in self.folder.glob(f"*{_HALF}"):
                _remove(path)
        if not self._records.is_dir() or not any(self._records.glob("*.json")):
            _remove(self.root)

    def discard(self) -> None:
        """Deletes everything, finished shards too."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        _remove(self.root)

    def _record(self, name: str) -> Path:
        return self._records / f"{name}.json"

    def _old(self) -> Path:
        return self.root / "old"


@contextlib.contextmanager
def parts_of(output: Path, key: str) -> Iterator[Parts]:
    """Holds an output folder for this process and yields what is there of it under this key.

    Finished shards stay when the body is interrupted, for the next call with the same key.

    Raises:
        UserError: If another process writes the same output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with held(output.with_name(f".{_bare(output)}.lock"), f"output {output}"):
        parts = Parts(output, key)
        parts.clear_others()
        try:
            yield parts
        finally:
            parts.close()


@contextlib.contextmanager
def filling(parts: Parts) -> Iterator[None]:
    """Publishes the folder if the body succeeds.

    An interrupt or an error of the system leaves the finished shards. Where the inputs are at fault they are of no use:
    the same work would fail again.
    """
    try:
        yield
        parts.publish()
    except UserError:
        parts.discard()
        raise


def _bare(output: Path) -> str:
    """So that what belongs to a temporary folder (.tmp-x) is temporary by its own name, too."""
    return output.name.lstrip(".")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for config in path.rglob("config.json"):  # first, so that a model half deleted does not load
            config.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
