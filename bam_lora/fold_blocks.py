"""Weights in row blocks: read, add the delta in fp32, round once; a few threads ahead of the one that writes.

Shapes: o output (rows), i input (columns), R stacked rank.
Each block is computed by one thread with a single-threaded product, and its shape depends on the weight alone, so the
result has the same bytes whatever the number of threads.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bam_lora.dense_change import Resolver
from bam_lora.errors import UserError
from bam_lora.fold_rounding import Rounding
from bam_lora.safetensors_stream import TORCH_DTYPES, TensorRecord, byte_view, map_tensor

# Part of the format: 2 MB of fp32, so that a block and its result stay in a core's second-level cache.
BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Delta:
    """What becomes of a weight: `start` (fp32, None: the base's value) plus B_oR · A_Ri, then `dense`."""

    B_oR: torch.Tensor | None = None
    A_Ri: torch.Tensor | None = None
    start: torch.Tensor | None = None
    dense: Resolver | None = None

    def to(self, device: str) -> Delta:
        """The same with its factors on a device."""
        if self.B_oR is None or self.A_Ri is None:
            return self
        return replace(self, B_oR=self.B_oR.to(device), A_Ri=self.A_Ri.to(device))

    def add(self, original: torch.Tensor, first: int, result: torch.Tensor) -> torch.Tensor:
        """Rows of the weight before `dense`, in `result` or, unchanged, `original` itself.

        Args:
            original: The base's rows in fp32.
            first: The number of the first of them.
            result: Memory of the same shape.
        """
        stop = first + len(original)
        begin = original if self.start is None else result.copy_(self.start[first:stop])
        if self.B_oR is None or self.A_Ri is None:
            return begin
        return torch.addmm(begin, self.B_oR[first:stop], self.A_Ri, out=result)


@dataclass(frozen=True)
class Block:
    """Rows [first, first + rows) of a stored matrix and the type that they are written in.

    `name` is the changed weight's, None where only the type changes. A matrix may get more rows than are stored.
    """

    name: str | None
    path: Path
    record: TensorRecord
    first: int
    rows: int
    columns: int
    dtype: torch.dtype
    delta: Future[Delta] | None


@dataclass(frozen=True)
class Done:
    """A computed block: its bytes, which stay valid until `buffer` is given back, and two sums of squares."""

    name: str | None
    data: memoryview
    buffer: Buffer
    weight_square: float
    delta_square: float


class Buffer:
    """Memory that grows to the largest block asked of it and is used again and again."""

    def __init__(self, device: str = "cpu", *, pinned: bool = False) -> None:
        """`pinned`: of the machine's memory, where a GPU can write to it by itself."""
        self._device, self._pinned = device, pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised (rows, columns) view of it."""
        needed = rows * columns * dtype.itemsize
        if self._bytes.numel() < needed:
            self._bytes = torch.empty(needed, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)
        return self._bytes[:needed].view(dtype).view(rows, columns)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor of any shape, its first axis as rows."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def row_ranges(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Cuts a matrix into (first row, row count) blocks of a fixed size.

    A short remainder joins the block before it: a product of a single row takes another path through the linear
    algebra library and differs in its last bit.
    """
    height = max(2, BLOCK_ELEMENTS // max(columns, 1))
    first = 0
    while first < rows:
        left = rows - first
        remainder = left - height
        count = left if remainder < max(2, height // 2) else height
        yield first, count
        first += count


class BlockComputer:
    """Computes blocks on several threads; `buffers` bounds how many are under way at once."""

    def __init__(self, device: str, buffers: int, rounding: Rounding) -> None:
        self._device = device
        self._rounding = rounding
        self._work = threading.local()
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        for _ in range(buffers):
            self._free.put(Buffer(pinned=device != "cpu"))

    def release(self, done: Done) -> None:
        """Gives a block's buffer back."""
        self._free.put(done.buffer)

    def compute(self, block: Block) -> Done:
        """One block from the file to the bytes to be written.

        Raises:
            UserError: If the file is truncated or a resulting weight is not finite.
        """
        delta = block.delta.result() if block.delta is not None else Delta()
        buffer = self._free.get()
        size = (block.rows, block.columns)
        # Only products are worth the way to a GPU; thresholds of dense changes were found with the CPU's own products.
        where = "cpu" if delta.B_oR is None or delta.dense is not None else self._device
        original, result = (self._room(name, where).matrix(*size, torch.float32) for name in ("original", "result"))
        _read_stored(block.path, block.record, original, block.first)
        weight_square = _square(original)
        result = delta.add(original, block.first, result)
        if delta.dense is not None:
            result = delta.dense(result, block.first)
        rounded = buffer.matrix(*size, block.dtype)
        self._rounding(result, rounded, f"{block.name}:{block.record.name}:{block.record.start}:{block.first}")
        _check_finite(block, result)
        delta_square = 0.0
        if result is not original:
            delta_square = _square(torch.sub(result, original, out=original))
        return Done(block.name, byte_view(rounded), buffer, weight_square, delta_square)

    def _room(self, name: str, where: str) -> Buffer:
        """This thread's own memory to work in."""
        rooms = vars(self._work)
        buffer: Buffer = rooms.setdefault(f"{name} on {where}", Buffer(where))
        return buffer


def _read_stored(path: Path, record: TensorRecord, into: torch.Tensor, first: int) -> None:
    """Rows in the type of `into`; zeros beyond the last."""
    rows, columns = as_matrix(record.shape)
    there = max(0, min(len(into), rows - first))
    row_bytes = columns * TORCH_DTYPES[record.dtype].itemsize
    start = record.start + first * row_bytes
    part = replace(record, shape=(there, columns), start=start, stop=start + there * row_bytes)
    if part.stop > part.start:  # straight from the page cache, without a copy in between
        # To a GPU as it is stored, for torch would convert it on the CPU and send twice the bytes.
        into[:there].copy_(map_tensor(path, part).to(into.device))
    into[there:] = 0


def stored_blocks(path: Path, record: TensorRecord, delta: Delta, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
    """A stored matrix block by block, in fp32, with a delta but for its `dense`: (first row, rows).

    `rows` may be more than are stored: the rest begins as zeros.
    """
    columns = as_matrix(record.shape)[1]
    for first, count in row_ranges(rows, columns) if columns else ():
        original = torch.empty(count, columns)
        _read_stored(path, record, original, first)
        yield first, delta.add(original, first, torch.empty_like(original))


def _square(matrix: torch.Tensor) -> float:
    """The sum of squares of a block: fp32 within a row, float64 over the rows (and by the caller, over blocks)."""
    square = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    return square if math.isfinite(square) else float(matrix.double().square().sum())  # beyond 1e19 fp32 overflows


def _check_finite(block: Block, result: torch.Tensor) -> None:
    """Sees NaN, Inf and an overflow of the narrower type; the sum of squares bounds every element, if it is small."""
    flat = result.reshape(-1)
    if float(torch.dot(flat, flat)) < min(torch.finfo(block.dtype).max, 1e19) ** 2 / 4:
        return
    extremes = torch.stack(torch.aminmax(result))
    # Some conversions to 8 bits clamp what is too large.
    clamped = block.dtype.itemsize == 1 and bool((extremes.abs() > torch.finfo(block.dtype).max).any())
    if clamped or not bool(torch.isfinite(extremes.to(block.dtype).float()).all()):
        raise UserError.of(
            f"tensor {block.record.name!r} of {block.path}",
            expected=f"finite weights in {str(block.dtype).removeprefix('torch.')}",
            found="NaN or Inf after the fold",
            remedy="The base or an adapter is damaged, or the type too narrow; check both or choose another dtype",
        )


@contextlib.contextmanager
def exact_products() -> Iterator[int]:
    """fp32 products in full fp32 and single-threaded, whatever the program around has set; yields its thread count."""
    # TF32 on CUDA, bf16 on CPUs that have it. The older switch, set_float32_matmul_precision, raises where the program
    # has used these.
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    threads, precisions = torch.get_num_threads(), [switch.fp32_precision for switch in switches]
    try:
        torch.set_num_threads(1)
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield threads
    finally:
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision
        torch.set_num_threads(threads)
