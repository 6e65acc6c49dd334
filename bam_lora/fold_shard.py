"""One shard of a checkpoint through the fold: blocks for what changes, plain copying for what does not."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import torch

from bam_lora.fold_blocks import Block, BlockComputer, Delta, Done, as_matrix, row_ranges, stored_blocks
from bam_lora.fold_plan import Changes, FoldPlan, Part
from bam_lora.safetensors_stream import DTYPE_BITS, TORCH_DTYPES, Header, TensorRecord, build_header, damaged

_COPY_BYTES = 1 << 22
_FLUSH_BYTES = 1 << 27


@dataclass(frozen=True)
class _Output:
    """A tensor to be written: what it begins as, and the parts of it that change."""

    name: str
    shape: tuple[int, ...]
    record: TensorRecord
    parts: Sequence[Part]


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
        plan: FoldPlan,
        pool: Executor,
        *,
        workers: int,
        device: str,
        dtype: str | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._changes = changes
        self._plan = plan
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

    def _outputs(self, header: Header) -> list[_Output]:
        """What is written for a shard of the base, in order: its own tensors, then those that begin as one of them."""
        plan = self._plan
        outputs = [
            _Output(record.name, self._shape(record.name, record), record, plan.parts.get(record.name, ()))
            for record in header.tensors.values()
        ]
        for name, (source, parts) in plan.added.items():
            if source in header.tensors:
                record = header.tensors[source]
                outputs.append(_Output(name, self._shape(name, record), record, parts))
        return outputs

    def _shape(self, name: str, record: TensorRecord) -> tuple[int, ...]:
        return (self._plan.rows[name], *record.shape[1:]) if name in self._plan.rows else record.shape

    def layout(self, header: Header) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, type, shape) of what is written for a shard, in order."""
        return [(one.name, self.target_dtype(one.record), one.shape) for one in self._outputs(header)]

    def header(self, header: Header) -> bytes:
        """The new shard's header: the old one's very bytes where no name, type or shape changes."""
        layout = self.layout(header)
        if layout == [(record.name, record.dtype, record.shape) for record in header.tensors.values()]:
            return header.raw
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
        if done.name is not None:
            self.weight_squares[done.name] += done.weight_square
            self.delta_squares[done.name] += done.delta_square

    def _put(self, file: FileIO, data: bytes | memoryview, sha: hashlib._Hash) -> None:
        sha.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        self._progress(len(data))

    def _items(self, header: Header) -> Iterator[_Copy | Block]:
        """The shard's data in the order in which it is written."""
        outputs = self._outputs(header)
        deltas = self._deltas(header.path, [part for one in outputs for part in one.parts])
        start = stop = len(header.raw)  # of the run of untouched bytes before the next change
        for one in outputs:
            record, dtype = one.record, self.target_dtype(one.record)
            if one.parts or dtype != record.dtype or record.start != stop:
                if start < stop:
                    yield _Copy(start, stop)
                if one.parts or dtype != record.dtype:
                    yield from self._changed(header.path, one, TORCH_DTYPES[dtype], deltas)
                    start = record.stop
                else:
                    start = record.start
            stop = record.stop
        if start < stop:
            yield _Copy(start, stop)

    def _changed(
        self, path: Path, output: _Output, dtype: torch.dtype, deltas: Iterator[Future[Delta]]
    ) -> Iterator[_Copy | Block]:
        """One tensor's data: its changing parts and what lies between them."""
        record, position = output.record, output.record.start
        for part in output.parts:
            yield from _unchanged(path, record, position, part.record.start, dtype)
            rows, columns = as_matrix(part.record.shape)
            rows = self._plan.rows.get(output.name, rows)
            delta = next(deltas)
            for first, count in row_ranges(rows, columns) if columns else ():
                yield Block(part.name, path, part.record, first, count, columns, dtype, delta)
            position = part.record.stop
        yield from _unchanged(path, record, position, record.stop, dtype)

    def _deltas(self, path: Path, parts: Sequence[Part]) -> Iterator[Future[Delta]]:
        """Each changed part's delta, read while the part before it is being computed."""
        read = deque(self._pool.submit(self._delta, path, part) for part in parts[:1])
        for part in parts[1:]:
            read.append(self._pool.submit(self._delta, path, part))
            yield read.popleft()
        yield from read

    def _delta(self, path: Path, part: Part) -> Delta:
        stacked, start = self._changes.stacked(part.name), self._changes.start_value(part.name)
        delta = Delta(start=None if start is None else part.start(start))
        # A delta of exactly zero must leave every bit alone, and adding 0 would turn -0 into +0.
        if stacked is not None and bool(stacked[0].any()) and bool(stacked[1].any()):
            B_oR, A_Ri = part.low_rank(*stacked)
            delta = replace(delta, B_oR=B_oR.to(self._device), A_Ri=A_Ri.to(self._device))
        dense = self._changes.dense(part.name)
        if dense is None:
            return delta
        before = replace(delta, B_oR=_on_cpu(delta.B_oR), A_Ri=_on_cpu(delta.A_Ri))
        resolve = part.dense(dense).bind(lambda: stored_blocks(path, part.record, before))
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


def _on_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()


def _unchanged(path: Path, record: TensorRecord, start: int, stop: int, dtype: torch.dtype) -> Iterator[_Copy | Block]:
    """The bytes [start, stop) of a tensor as they are, or in another type."""
    if start == stop:
        return
    if TORCH_DTYPES[record.dtype] == dtype:
        yield _Copy(start, stop)
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


def written_bytes(folder: ShardFolder, shards: Mapping[str, Header]) -> int:
    """The size of all shards as they will be written."""
    total = 0
    for header in shards.values():
        sizes = (math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in folder.layout(header))
        total += len(folder.header(header)) + sum(sizes)
    return total
