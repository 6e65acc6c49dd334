"""Snapshots: whole fp32 weights after an iteration whose change is not low rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from bam_lora.checkpoint import open_checkpoint
from bam_lora.dense_change import DenseChange
from bam_lora.difference import Known
from bam_lora.errors import UserError
from bam_lora.fold_blocks import Delta, exact_products, stored_blocks
from bam_lora.fold_plan import Changes, Part, check_apart, place
from bam_lora.safetensors_stream import write_stream, write_tensors
from bam_lora.store import inside, require_space


def write_snapshot(root: Path, iteration: int, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes the fp32 values of weights after an iteration whose change is not low rank.

    Args:
        root: The run's folder.
        iteration: The iteration they belong to.
        tensors: Whole weights by name.

    Returns:
        The file's path relative to the root, for `Ledger.record`.
    """
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values()), "snapshots are fp32"
    path = _path(iteration)
    write_tensors(inside(root, path), tensors)
    return path


def _path(iteration: int) -> str:
    return f"snapshots/{iteration:02d}.safetensors"


class _Over:
    """The dense changes of a merge on top of a state of the weights."""

    def __init__(self, before: Changes, merged: Changes, names: Sequence[str]) -> None:
        self._before, self._merged, self._names = Known(before), merged, list(names)

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, int]:
        return self._merged.shape(name)

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._before.stacked(name)

    def start_value(self, name: str) -> torch.Tensor | None:
        return self._before.start_value(name)

    def dense(self, name: str) -> DenseChange | None:
        return self._merged.dense(name)


def write_merged(
    root: Path, iteration: int, base: Path, before: Changes, merged: Changes, names: Sequence[str]
) -> tuple[str, dict[str, float]]:
    """Writes weights as a merge that is not low rank leaves them, one in memory at a time.

    Args:
        root: The run's folder.
        iteration: The iteration that is merged.
        base: Folder of the original full-precision base.
        before: What the run has added to it so far.
        merged: The merge, whose `dense` changes these are.
        names: The weights.

    Returns:
        The file's path relative to the root, for `Ledger.record`, and the Frobenius norm of each weight's change.

    Raises:
        UserError: If the base does not store one of them as a matrix of its own, or the disk is full.
    """
    checkpoint = open_checkpoint(base)
    changes = _Over(before, merged, names)
    plan = place(checkpoint, changes, {})
    check_apart(checkpoint, plan)
    where = {part.name: (header.path, part) for header in checkpoint.shards.values() for stored in header.tensors
             for part in plan.parts.get(stored, ())}  # fmt: skip
    for name in names:
        part = where[name][1]
        if not part.whole or part.transposed:
            raise UserError.of(
                f"weight {name!r} in {base}",
                expected="a matrix stored as it is in memory, for a merge method that is not low rank",
                found="several tensors, or its transpose",
                remedy="Choose a merge method such as linear",
            )
    squares: dict[str, float] = {}

    def values() -> Iterator[torch.Tensor]:
        for name in names:
            value, squares[name] = _value(*where[name], changes)
            yield value

    layout = [(name, "F32", where[name][1].matrix) for name in names]
    require_space(root, sum(4 * math.prod(shape) for _, _, shape in layout), "the snapshot of a merge")
    with exact_products():
        write_stream(inside(root, _path(iteration)), layout, values())
    return _path(iteration), {name: math.sqrt(square) for name, square in squares.items()}


def _value(path: Path, part: Part, changes: Changes) -> tuple[torch.Tensor, float]:
    """One weight after the merge, and the squared norm of what the merge changed."""
    dense = changes.dense(part.name)
    assert dense is not None, part.name
    stacked, rows_o = changes.stacked(part.name), part.matrix[0]
    B_oR, A_Ri = (None, None) if stacked is None else part.low_rank(*stacked)
    before = Delta(B_oR, A_Ri, changes.start_value(part.name))
    resolve = part.dense(dense).bind(lambda: stored_blocks(path, part.record, before, rows_o), part.identity)
    value = torch.empty(part.matrix)
    square = 0.0
    for first, rows in stored_blocks(path, part.record, before, rows_o):
        result = resolve(rows, first)
        value[first : first + len(rows)] = result
        square += float((result.double() - rows.double()).square().sum())
    return value, square
