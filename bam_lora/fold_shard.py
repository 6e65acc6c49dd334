"""One shard of a checkpoint through the fold: blocks for what changes, plain copying for what does not."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch

from bam_lora.fold_blocks import Block, BlockComputer, Delta, Done, as_matrix, row_ranges
from bam_lora.safetensors_stream import TORCH_DTYPES, Header, TensorRecord, build_header, damaged

_COPY_BYTES = 1 << 22
_FLUSH_BYTES = 1 << 27


class Changes(Protocol):
    """What is added to a base: a ledger's view or merged adapters. Shapes: o output, i input, R stacked rank."""

    def names(self) -> list[str]:
        """The weights that change, by their names in the checkpoint, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i) of such a weight."""
        ...

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B_oR, A_Ri) in fp32, whose product is added, or None."""
        ...

    def start_value(self, name: str) -> torch.Tensor | None:
        """(o, i) in fp32, to be taken instead of the base's value, or None."""
        ...


@dataclass(frozen=True)
class _Copy:
    """Bytes [start, stop) of the source file that stay as they are."""

    start: int
    stop: int


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


class ShardFolder:
    """Writes shards one after the other with threads that work ahead; keeps the sums over all of them."""

    def __init__(
        self,
        changes: Changes,
        pool: Executor,
        *,
        workers: int,
        device: str,
        dtype: str | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._changes = changes
        self._changed = set(changes.names())
        self._pool = pool
        # Enough blocks under way that neither the computing threads nor the writing one waits for the other.
        self._ahead = 2 * workers + 1
        self._computer = BlockComputer(device, buffers=self._ahead + 1)
        self._device = device
        self._dtype = dtype
        self._progress = progress or (lambda _: None)
        self.weight_squares: dict[str, float] = defaultdict(float)
        self.delta_squares: dict[str, float] = defaultdict(float)

    def target_dtype(self, record: TensorRecord) -> str:
        """The safetensors type that a tensor is written in: floating-point ones may be converted."""
        return self._dtype if self._dtype is not None and record.dtype in TORCH_DTYPES else record.dtype

    def header(self, header: Header) -> bytes:
        """The new shard's header: the old one's very bytes where no type changes."""
        records = header.tensors.values()
        if all(self.target_dtype(record) == record.dtype for record in records):
            return header.raw
        layout = [(record.name, self.target_dtype(record), record.shape) for record in records]
        return build_header(layout, header.metadata)

    def write(self, header: Header, target: Path) -> str:
        """Writes the folded shard.

        Args:
            header: The base's shard.
            target: The file to write.

        Returns:
            The new file's SHA-256.
        """
        sha = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(header.path.open("rb", buffering=0))
            file = stack.enter_context(target.open("wb", buffering=0))
            flusher = stack.enter_context(contextlib.closing(_Flusher(file)))
            self._put(file, self.header(header), sha)
            under_way: deque[tuple[_Copy | Block, Future[Done] | None]] = deque()
            for item in self._items(header):
                future = self._pool.submit(self._computer.compute, item) if isinstance(item, Block) else None
                under_way.append((item, future))
                while len(under_way) > self._ahead:
                    self._finish(*under_way.popleft(), source, file, sha)
                    flusher.note()
            while under_way:
                self._finish(*under_way.popleft(), source, file, sha)
        return sha.hexdigest()

    def _finish(
        self, item: _Copy | Block, future: Future[Done] | None, source: FileIO, file: FileIO, sha: hashlib._Hash
    ) -> None:
        if isinstance(item, _Copy):
            self._copy(source, file, item, sha)
            return
        assert future is not None
        done = future.result()
        self._put(file, done.data, sha)
        self._computer.release(done)
        name = item.record.name
        if name in self._changed:
            self.weight_squares[name] += done.weight_square
            self.delta_squares[name] += done.delta_square

    def _put(self, file: FileIO, data: bytes | memoryview, sha: hashlib._Hash) -> None:
        sha.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        self._progress(len(data))

    def _items(self, header: Header) -> Iterator[_Copy | Block]:
        """The shard's data in file order."""
        deltas = self._deltas([name for name in header.tensors if name in self._changed])
        start = stop = len(header.raw)  # of the run of untouched bytes before the next change
        for record in header.tensors.values():
            dtype = self.target_dtype(record)
            if record.name in self._changed or dtype != record.dtype:
                if start < stop:
                    yield _Copy(start, stop)
                delta = next(deltas) if record.name in self._changed else None
                rows, columns = as_matrix(record.shape)
                for first, count in row_ranges(rows, columns) if columns else ():
                    yield Block(header.path, record, first, count, columns, TORCH_DTYPES[dtype], delta)
                start = record.stop
            stop = record.stop
        if start < stop:
            yield _Copy(start, stop)

    def _deltas(self, names: list[str]) -> Iterator[Future[Delta]]:
        """Each changed weight's delta, read while the weight before it is being computed."""
        read = deque(self._pool.submit(self._delta, name) for name in names[:1])
        for name in names[1:]:
            read.append(self._pool.submit(self._delta, name))
            yield read.popleft()
        yield from read

    def _delta(self, name: str) -> Delta:
        stacked, start = self._changes.stacked(name), self._changes.start_value(name)
        # A delta of exactly zero must leave every bit alone, and adding 0 would turn -0 into +0.
        if stacked is None or not bool(stacked[0].any()) or not bool(stacked[1].any()):
            return Delta(start=start)
        return Delta(stacked[0].to(self._device), stacked[1].to(self._device), start)

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


def written_bytes(folder: ShardFolder, shards: Mapping[str, Header]) -> int:
    """The size of all shards as they will be written."""
    total = 0
    for header in shards.values():
        total += len(folder.header(header))
        for record in header.tensors.values():
            old, new = TORCH_DTYPES.get(record.dtype), TORCH_DTYPES.get(folder.target_dtype(record))
            size = record.stop - record.start
            total += size if old is None or new is None else size // old.itemsize * new.itemsize
    return total
