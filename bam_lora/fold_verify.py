"""Sampled rows of a folded model against the same computed in float64 and rounded directly.

The reference is made anew from the base and the changes, row by row, by none of the fold's block code; the folded bytes
are read back from the files. Shapes: o output, i input, R stacked rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bam_lora.dense_change import DenseChange
from bam_lora.errors import UserError
from bam_lora.fold_blocks import as_matrix, row_ranges
from bam_lora.fold_layout import OutputShard, OutputTensor
from bam_lora.fold_plan import Changes, Part
from bam_lora.safetensors_stream import TORCH_DTYPES, Header, TensorRecord, read_header, read_rows

_ROWS = 8
_UNTOUCHED_TENSORS = 64
_UNTOUCHED_BYTES = 1 << 16
_MAGNITUDE_MARGIN = 4.0  # DoRA's magnitude over the norm is about 1
_RANK_CHUNK = 64  # rank directions in float64 at once
# Smallest normal exponent and bits of mantissa.
_GRIDS = {
    torch.bfloat16: (-126, 7),
    torch.float16: (-14, 10),
    torch.float32: (-126, 23),
    torch.float64: (-1022, 52),
    torch.float8_e4m3fn: (-6, 3),
    torch.float8_e5m2: (-14, 2),
}


@dataclass(frozen=True)
class _Compared:
    tensor: str
    rows: int
    elements: int
    identical: int
    worst_ulp: float


def round_directly(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 to the nearest value of a type, half to even, in one rounding (`Tensor.to` goes through fp32)."""
    step = unit_in_last_place(values, dtype)
    rounded: np.ndarray = np.rint(values / step) * step
    return rounded


def unit_in_last_place(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of a type at these float64 values."""
    smallest, mantissa_bits = _GRIDS[dtype]
    _, exponent = np.frexp(values)  # |value| = m * 2**exponent with 0.5 <= m < 1
    unit: np.ndarray = np.ldexp(1.0, np.maximum(exponent - 1, smallest) - mantissa_bits)
    return unit


def verify_folded(
    folder: Path, *, shards: Sequence[OutputShard], changes: Changes, pool: Executor, seed: int = 0
) -> dict[str, Any]:
    """Compares a folded model with its inputs.

    Of every changed part of a tensor some rows are computed in float64. A difference is counted in units in the last
    place of the written type; where terms cancel, or the type is fp32 itself, fp32's own error bound is the unit if it
    is larger. Of tensors that do not change, bytes are compared.

    Args:
        folder: The new model; only its headers and tensors are read.
        shards: What should be in it.
        changes: What was added to the base.
        pool: Threads.
        seed: Which rows are looked at follows from it.

    Returns:
        {"tensors", "rows", "elements", "identical", "worst_ulp"}: what was compared in float64, the share of elements
        that are identical, and the largest difference.

    Raises:
        UserError: If a tensor is not there as it should be, or is more than one unit off anywhere.
    """
    jobs: list[Callable[[], _Compared | None]] = []
    untouched: list[Callable[[], _Compared | None]] = []
    for shard in shards:
        header = read_header(folder / shard.name)
        for one in shard.tensors:
            record = _record_of(header, one)
            jobs += [partial(_compare_part, changes, one, part, header.path, record, seed) for part in one.parts]
            if not one.parts:
                untouched.append(partial(_compare_untouched, one, header.path, record, seed))
    random.Random(seed).shuffle(untouched)
    jobs += untouched[:_UNTOUCHED_TENSORS]
    compared = [result for result in pool.map(lambda job: job(), jobs) if result is not None]
    elements = sum(one.elements for one in compared)
    return {
        "tensors": len({one.tensor for one in compared}),
        "rows": sum(one.rows for one in compared),
        "elements": elements,
        "identical": sum(one.identical for one in compared) / elements if elements else 1.0,
        "worst_ulp": max((one.worst_ulp for one in compared), default=0.0),
    }


def _record_of(header: Header, one: OutputTensor) -> TensorRecord:
    record = header.tensors.get(one.name)
    if record is None or (record.dtype, record.shape) != (one.dtype, one.shape):
        found = "none" if record is None else f"{record.dtype} {list(record.shape)}"
        raise _wrong(header.path, one.name, f"{one.dtype} {list(one.shape)}", found)
    return record


def _compare_part(
    changes: Changes, one: OutputTensor, part: Part, path: Path, record: TensorRecord, seed: int
) -> _Compared | None:
    """Rows of one changed matrix."""
    rows, columns = as_matrix(part.record.shape)
    rows = one.shape[0] if one.resized() else rows
    if not rows * columns:
        return None
    written = _written_part(one, part.record, record, rows)
    chosen = sorted(random.Random(f"{seed}:{one.name}:{part.record.start}").sample(range(rows), min(_ROWS, rows)))
    expected, bound = _expected(changes, one.path, part, chosen)
    got = np.stack([_row(path, written, row, columns) for row in chosen])
    return _compare(one, path, got, expected, bound, chosen)


def _written_part(one: OutputTensor, stored: TensorRecord, record: TensorRecord, rows: int) -> TensorRecord:
    """Where the new file holds the matrix that `stored` is in the base."""
    old, new = TORCH_DTYPES[stored.dtype].itemsize, TORCH_DTYPES[record.dtype].itemsize
    start = record.start + (stored.start - one.record.start) // old * new
    shape = (rows, *stored.shape[1:])
    return replace(record, shape=shape, start=start, stop=start + rows * as_matrix(stored.shape)[1] * new)


def _expected(changes: Changes, path: Path, part: Part, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The chosen rows in float64, and by how much an fp32 computation may miss them."""
    reference = _Reference(changes, path, part)
    original = torch.cat([reference.stored(row, 1) for row in chosen])
    expected, terms = reference.before_dense(original, chosen)
    if reference.resolver is not None:
        expected = torch.cat([reference.resolved(expected[n : n + 1], row) for n, row in enumerate(chosen)])
        terms = terms + reference.dense_terms(chosen)
    bound = (reference.rank + 16) * 2.0**-24 * (terms + expected.abs())
    return expected.numpy(), bound.numpy()


class _Reference:
    """One stored matrix as the changes make it, in float64."""

    def __init__(self, changes: Changes, path: Path, part: Part) -> None:
        self._path, self._record, self._matrix = path, part.record, part.matrix
        start, stacked, dense = changes.start_value(part.name), changes.stacked(part.name), changes.dense(part.name)
        self._start = None if start is None else part.start(start)
        self._factors = None if stacked is None else part.low_rank(*stacked)
        self.rank = 0 if self._factors is None else self._factors[1].shape[0]
        self._dense: DenseChange | None = None
        self._elementwise = dense is not None and dense.prepare is not None
        if dense is not None:
            self.rank += sum(len(one.factors.A_ri) for one in dense.branches if one is not None and one.factors)
            # Methods that compare elements with a threshold are only the same in the same precision and blocks.
            self._dense = part.dense(dense)
        self.resolver = part.resolver(dense, self._blocks32 if self._elementwise else self._blocks)

    def stored(self, first: int, count: int) -> torch.Tensor:
        """Rows of the base; zeros beyond the last."""
        rows, columns = as_matrix(self._record.shape)
        into = torch.zeros(count, columns, dtype=TORCH_DTYPES[self._record.dtype])
        read_rows(self._path, self._record, into[: max(0, min(count, rows - first))], min(first, rows))
        return into.double()

    def before_dense(self, original: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows with what is low rank, and a bound on the magnitude of the terms they are the sum of."""
        chosen = list(rows)
        begin = original if self._start is None else self._start[chosen].double()
        terms = original.abs() + begin.abs()
        if self._factors is None:
            return begin, terms
        B_oR, A_Ri = self._factors
        total, norms_i = begin.clone(), torch.zeros(A_Ri.shape[1], dtype=torch.float64)
        for first in range(0, len(A_Ri), _RANK_CHUNK):
            A = A_Ri[first : first + _RANK_CHUNK].double()
            total += B_oR[chosen, first : first + _RANK_CHUNK].double() @ A
            norms_i += A.square().sum(dim=0)
        return total, terms + B_oR[chosen].double().norm(dim=1)[:, None] * norms_i.sqrt()

    def dense_terms(self, rows: Sequence[int]) -> torch.Tensor | float:
        """A bound on the magnitude of the products in what is not low rank; a magnitude may scale them up."""
        total: torch.Tensor | float = 0.0
        if self._dense is None:
            return total
        for one, weight in zip(self._dense.branches, self._dense.weights, strict=True):
            if one is not None and one.factors is not None:
                sizes = one.factors.B_or[list(rows)].double().norm(dim=1)[:, None] * one.factors.A_ri.double().norm(
                    dim=0
                )
                scale = abs(weight * one.factors.scaling) * (1 if one.magnitude is None else _MAGNITUDE_MARGIN)
                total = total + scale * sizes
        return total

    def resolved(self, row: torch.Tensor, number: int) -> torch.Tensor:
        """A row with what is not low rank."""
        assert self.resolver is not None
        if not self._elementwise:
            return self.resolver(row, number)
        ranges = row_ranges(*self._matrix)
        first, count = next((first, count) for first, count in ranges if first <= number < first + count)
        block = self._block(first, count).float()
        return self.resolver(block, first)[number - first][None].double()

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        for first, count in row_ranges(*self._matrix):
            yield first, self._block(first, count)

    def _block(self, first: int, count: int) -> torch.Tensor:
        return self.before_dense(self.stored(first, count), range(first, first + count))[0]

    def _blocks32(self) -> Iterator[tuple[int, torch.Tensor]]:
        return ((first, block.float()) for first, block in self._blocks())


def _compare_untouched(one: OutputTensor, path: Path, record: TensorRecord, seed: int) -> _Compared | None:
    """A tensor that only moves, or only changes its type."""
    size = one.record.stop - one.record.start
    if not size:
        return None
    if not one.changes():
        offset = random.Random(f"{seed}:{one.name}").randrange(size)
        count = min(_UNTOUCHED_BYTES, size - offset)
        if _bytes(one.path, one.record.start + offset, count) != _bytes(path, record.start + offset, count):
            raise _wrong(path, one.name, "the base's bytes", "others")
        return None
    rows, columns = as_matrix(one.shape)
    chosen = sorted(random.Random(f"{seed}:{one.name}").sample(range(rows), min(_ROWS, rows)))
    expected = np.stack([_row(one.path, one.record, row, columns) for row in chosen])
    got = np.stack([_row(path, record, row, columns) for row in chosen])
    return _compare(one, path, got, expected, np.zeros_like(expected), chosen)


def _bytes(path: Path, start: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(count)


def _row(path: Path, record: TensorRecord, row: int, columns: int) -> np.ndarray:
    into = torch.empty(1, columns, dtype=TORCH_DTYPES[record.dtype])
    read_rows(path, record, into, row)
    result: np.ndarray = into[0].double().numpy()
    return result


def _compare(
    one: OutputTensor, path: Path, got: np.ndarray, expected: np.ndarray, bound: np.ndarray, chosen: Sequence[int]
) -> _Compared:
    dtype = TORCH_DTYPES[one.dtype]
    rounded = round_directly(expected, dtype)
    units = np.abs(got - rounded) / np.maximum(unit_in_last_place(expected, dtype), bound)
    worst = float(units.max())
    if not worst <= 1:  # NaN, too
        row, column = np.unravel_index(int(units.argmax()), units.shape)
        raise _wrong(
            path,
            one.name,
            f"{rounded[row, column]:.9g} in row {chosen[int(row)]}, column {int(column)}, give or take one unit",
            f"{got[row, column]:.9g}, {worst:.3g} units off",
        )
    return _Compared(one.name, len(chosen), got.size, int((got == rounded).sum()), worst)


def _wrong(path: Path, name: str, expected: str, found: str) -> UserError:
    return UserError.of(
        f"verifying tensor {name!r} in {path.name}",
        expected=expected,
        found=found,
        remedy="Nothing was put in place; check memory and disk, fold again, and report it if it comes back",
    )
