"""One shard of a checkpoint through the fold: blocks for what changes, plain copying for what does not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import torch

from bam_lora.fold_blocks import Block, BlockComputer, Delta, Done, as_matrix, row_ranges, stored_blocks
from bam_lora.fold_layout import OutputShard, OutputTensor
from bam_lora.fold_plan import Changes, Part
from bam_lora.fold_rounding import Rounding
from bam_lora.safetensors_stream import TORCH_DTYPES, TensorRecord, damaged

_COPY_BYTES = 1 << 22
_FLUSH_BYTES = 1 << 27
# One thread hashes and writes about 1 GB/s: less than what so many computing threads give, and what many disks take.
_WORKERS_TO_A_WRITER = 2


@dataclass(frozen=True)
class _Copy:
    """Bytes [start, stop) of a file of the base that stay as they are."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Written:
    """A shard's hash, and per changed weight the sums of squares of what of it lies in this shard."""

    sha256: str
    weight_squares: dict[str, float]
    delta_squares: dict[str, float]


class _Flusher:
    """Pushes a growing file to the disk while more of it is computed; else the final sync waits for all of it."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flush: Future[None] | None = None
        self._synced_bytes = 0

    def note(self) -> None:
        """Starts a sync if enough was written since the last one, which must be over."""
        enough = self._file.tell() - self._synced_bytes >= _FLUSH_BYTES
        if enough and (self._flush is None or self._flush.done()):
            if self._flush is not None:
                self._flush.result()  # the system reports a failed write once, here
            self._synced_bytes = self._file.tell()
            self._flush = self._pool.submit(os.fsync, self._file.fileno())

    def close(self) -> None:
        """Waits for the sync under way and passes on its error."""
        self._pool.shutdown(wait=True)
        if self._flush is not None:
            self._flush.result()


class _Ended(Exception):
    """Another shard has failed, or the user has stopped the fold."""


class ShardFolder:
    """Writes shards, with threads that work ahead; several at a time where there are many threads."""

    def __init__(
        self,
        changes: Changes,
        pool: Executor,
        *,
        workers: int,
        shards: int,
        device: str,
        rounding: Rounding,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._changes = changes
        self._pool = pool
        self._writers = max(1, min(shards, workers // _WORKERS_TO_A_WRITER))
        # Enough blocks under way that neither the computing threads nor the writing ones wait for the others.
        self._ahead = 2 * workers // self._writers + 1
        self._computer = BlockComputer(device, buffers=self._writers * (self._ahead + 1), rounding=rounding)
        self._device = device
        self._report = progress or (lambda _: None)
        self._reporting = threading.Lock()
        self._ended = threading.Event()

    def write_all(
        self,
        shards: Sequence[OutputShard],
        place: Callable[[str], Path],
        finish: Callable[[OutputShard, Written], None],
    ) -> None:
        """Writes folded shards; where one fails, or the caller is interrupted, the others end at their next block.

        Args:
            shards: What goes into them.
            place: The file to write, by a shard's name.
            finish: Called with each that is written, by the caller's thread.
        """
        if self._writers == 1:
            for shard in shards:
                finish(shard, self.write(shard, place(shard.name)))
            return
        with ThreadPoolExecutor(self._writers, thread_name_prefix="write") as writers:
            try:
                under_way = {writers.submit(self._write_or_end, shard, place(shard.name)): shard for shard in shards}
                for done in as_completed(under_way):
                    if not isinstance(done.exception(), _Ended):  # what has ended it comes by, too
                        finish(under_way[done], done.result())
            except BaseException:
                self._ended.set()
                writers.shutdown(cancel_futures=True)
                raise

    def _write_or_end(self, shard: OutputShard, target: Path) -> Written:
        """Writes a shard, and where it fails ends the others before this thread takes up the next one.

        The blocks of a shard that is given up keep their buffers: with those of one more there would be too few.
        """
        if self._ended.is_set():
            raise _Ended
        try:
            return self.write(shard, target)
        except BaseException:
            self._ended.set()
            raise

    def write(self, shard: OutputShard, target: Path) -> Written:
        """Writes a folded shard.

        Args:
            shard: What goes into it.
            target: The file to write.
        """
        sha, weights, deltas = hashlib.sha256(), defaultdict[str, float](float), defaultdict[str, float](float)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(target.open("wb", buffering=0))
            flusher = stack.enter_context(contextlib.closing(_Flusher(file)))
            self._put(file, shard.header, sha)
            under_way: deque[tuple[_Copy | Block, Future[Done] | None]] = deque()
            items = self._items(shard)
            while (item := next(items, None)) is not None or under_way:
                if self._ended.is_set():
                    raise _Ended
                if item is not None:
                    future = self._pool.submit(self._computer.compute, item) if isinstance(item, Block) else None
                    under_way.append((item, future))
                if item is None or len(under_way) > self._ahead:
                    done = self._finish(*under_way.popleft(), file, sha)
                    if done is not None and done.name is not None:
                        weights[done.name] += done.weight_square
                        deltas[done.name] += done.delta_square
                    flusher.note()
            assert file.tell() == shard.file_bytes(), (
                f"{shard.name}: wrote {file.tell()}, not {shard.file_bytes()} bytes"
            )
        return Written(sha.hexdigest(), dict(weights), dict(deltas))

    def _finish(
        self, item: _Copy | Block, future: Future[Done] | None, file: FileIO, sha: hashlib._Hash
    ) -> Done | None:
        if isinstance(item, _Copy):
            with item.path.open("rb", buffering=0) as source:
                self._copy(source, file, item, sha)
            return None
        assert future is not None
        done = future.result()
        self._put(file, done.data, sha)
        self._computer.release(done)
        return done

    def _progress(self, count: int) -> None:
        with self._reporting:
            self._report(count)

    def _put(self, file: FileIO, data: bytes | memoryview, sha: hashlib._Hash) -> None:
        sha.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        self._progress(len(data))

    def _items(self, shard: OutputShard) -> Iterator[_Copy | Block]:
        """The shard's data in the order in which it is written."""
        deltas = self._deltas([(one.path, part) for one in shard.tensors for part in one.parts])
        run: _Copy | None = None  # of untouched bytes before the next change
        for one in shard.tensors:
            record = one.record
            if one.changes():
                if run is not None:
                    yield run
                    run = None
                yield from self._changed(one, deltas)
            elif run is not None and (run.path, run.stop) == (one.path, record.start):
                run = replace(run, stop=record.stop)
            else:
                if run is not None:
                    yield run
                run = _Copy(one.path, record.start, record.stop)
        if run is not None:
            yield run

    def _changed(self, output: OutputTensor, deltas: Iterator[Future[Delta]]) -> Iterator[_Copy | Block]:
        """One tensor's data: its changing parts and what lies between them."""
        path, record, position = output.path, output.record, output.record.start
        dtype = TORCH_DTYPES[output.dtype]
        for part in output.parts:
            yield from _unchanged(path, record, position, part.record.start, dtype)
            rows, columns = part.matrix
            delta = next(deltas)
            for first, count in row_ranges(rows, columns) if columns else ():
                yield Block(part.name, path, part.record, first, count, columns, dtype, delta)
            position = part.record.stop
        yield from _unchanged(path, record, position, record.stop, dtype)

    def _deltas(self, parts: Sequence[tuple[Path, Part]]) -> Iterator[Future[Delta]]:
        """Each changed part's delta, read while the part before it is being computed."""
        read = deque(self._pool.submit(self._delta, *part) for part in parts[:1])
        for part in parts[1:]:
            read.append(self._pool.submit(self._delta, *part))
            yield read.popleft()
        yield from read

    def _delta(self, path: Path, part: Part) -> Delta:
        stacked, start = self._changes.stacked(part.name), self._changes.start_value(part.name)
        delta = Delta(start=None if start is None else part.start(start))
        # A delta of exactly zero must leave every bit alone, and adding 0 would turn -0 into +0.
        if stacked is not None and bool(stacked[0].any()) and bool(stacked[1].any()):
            B_oR, A_Ri = part.low_rank(*stacked)
            delta = replace(delta, B_oR=B_oR, A_Ri=A_Ri)
        dense = self._changes.dense(part.name)
        if dense is None and part.difference is None:
            return delta.to(self._device)
        resolve = part.resolver(dense, lambda: stored_blocks(path, part.record, delta, part.matrix[0]))
        return replace(delta, dense=resolve)

    def _copy(self, source: FileIO, file: FileIO, item: _Copy, sha: hashlib._Hash) -> None:
        """Untouched bytes, inside the kernel where it can (shared blocks on some file systems), hashed on the way."""
        copied = _copy_in_kernel(source, file, item) if hasattr(os, "copy_file_range") else 0
        source.seek(item.start)
        position = item.start
        while position < item.stop:
            data = source.read(min(_COPY_BYTES, item.stop - position))
            if not data:
                raise damaged(Path(str(source.name)), f"{item.stop} bytes", f"{position} bytes (it changed)")
            missing = max(0, position + len(data) - (item.start + copied))
            sha.update(data)
            rest = memoryview(data)[len(data) - min(missing, len(data)) :]
            while rest:
                rest = rest[file.write(rest) :]
            position += len(data)
            self._progress(len(data))


def _unchanged(path: Path, record: TensorRecord, start: int, stop: int, dtype: torch.dtype) -> Iterator[_Copy | Block]:
    """The bytes [start, stop) of a tensor as they are, or in another type."""
    if start == stop:
        return
    if TORCH_DTYPES[record.dtype] == dtype:
        yield _Copy(path, start, stop)
        return
    _, columns = as_matrix(record.shape[-2:] if len(record.shape) > 2 else record.shape)
    rows = (stop - start) // (columns * TORCH_DTYPES[record.dtype].itemsize)
    part = replace(record, shape=(rows, columns), start=start, stop=stop)
    for first, count in row_ranges(rows, columns):
        yield Block(None, path, part, first, count, columns, dtype, None)


def _copy_in_kernel(source: FileIO, file: FileIO, item: _Copy) -> int:
    """How many of the bytes the kernel copied; file systems that cannot say so, and the caller writes the rest."""
    position = item.start
    with contextlib.suppress(OSError):
        while position < item.stop:
            count = os.copy_file_range(source.fileno(), file.fileno(), item.stop - position, offset_src=position)
            if count == 0:
                break
            position += count
    return position - item.start
