"""Snapshots: whole fp32 weights after an iteration whose change is not low rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bam_lora.checkpoint import Checkpoint, open_checkpoint
from bam_lora.dense_change import DenseChange
from bam_lora.difference import Known
from bam_lora.errors import UserError
from bam_lora.fold_blocks import Delta, exact_products, stored_blocks
from bam_lora.fold_plan import Changes, Part
from bam_lora.outline import Outline
from bam_lora.safetensors_stream import TORCH_DTYPES, map_tensor, read_header, write_stream, write_tensors
from bam_lora.store import inside, require_space
from bam_lora.tied_weights import plan_fold


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
        return self._merged.shape(name) if self._whole(name) is None else self._before.shape(name)

    def _whole(self, name: str) -> int | None:
        """The rows of a weight that begins as a snapshot; with a resized vocabulary they are not the base's."""
        return self._before.outline(name).stored_rows

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._before.stacked(name)

    def start_value(self, name: str) -> torch.Tensor | None:
        return self._before.start_value(name)

    def dense(self, name: str) -> DenseChange | None:
        return self._merged.dense(name)

    def outline(self, name: str) -> Outline:
        found, rows = self._merged.outline(name), self._whole(name)
        if rows is None:
            return found
        # All its rows have values: any sum of weights will do, and any method.
        return replace(found, by_element=False, rows_alone=False, stored_rows=rows, whole_share=1.0)


@dataclass(frozen=True)
class Snapshot:
    """A written snapshot: its file relative to the root, {name: norm of the change}, and weights equal to others."""

    path: str
    norms: Mapping[str, float]
    same: Mapping[str, str]


def write_merged(
    root: Path,
    iteration: int,
    base: Path,
    before: Changes,
    merged: Changes,
    names: Sequence[str],
    whole_in: torch.dtype,
) -> Snapshot:
    """Writes weights as a merge that is not low rank leaves them, one in memory at a time.

    Args:
        root: The run's folder.
        iteration: The iteration that is merged.
        base: Folder of the original full-precision base.
        before: What the run has added to it so far.
        merged: The merge, whose `dense` changes these are.
        names: The weights.
        whole_in: The type of the weights that the branches saw and trained whole.

    Returns:
        The snapshot, for `Ledger.record`; norms are Frobenius norms.

    Raises:
        UserError: If the base does not store one of them as a matrix of its own, or the disk is full.
    """
    checkpoint = open_checkpoint(base)
    where, same, changes = find_parts(checkpoint, before, merged, names)
    squares: dict[str, float] = {}

    def values() -> Iterator[torch.Tensor]:
        for path, part in where.values():
            value, squares[part.name] = _value(path, part, changes, whole_in)
            yield value

    layout = [(name, "F32", part.matrix) for name, (_, part) in where.items()]
    require_space(root, sum(4 * math.prod(shape) for _, _, shape in layout), "the snapshot of a merge")
    with exact_products():
        write_stream(inside(root, _path(iteration)), layout, values())
    return Snapshot(_path(iteration), {name: math.sqrt(square) for name, square in squares.items()}, same)


def read_snapshot(root: Path, snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """A snapshot's weights in fp32, left on the disk until they are used."""
    file = inside(root, snapshot.path)
    return {name: map_tensor(file, record) for name, record in read_header(file).tensors.items()}


def find_parts(
    checkpoint: Checkpoint, before: Changes, merged: Changes, names: Sequence[str]
) -> tuple[dict[str, tuple[Path, Part]], dict[str, str], Changes]:
    """Where the weights of a snapshot begin.

    Args:
        checkpoint: The original base.
        before: What has been added to it so far.
        merged: The merge, of which only the kinds and shapes are looked at.
        names: Its weights that are not low rank.

    Returns:
        ({weight: (file, part)}, {weight: the one that it is equal to}, the changes that these are parts of).

    Raises:
        UserError: If the base does not store one of them as a matrix of its own.
    """
    changes: Changes = _Over(before, merged, names)
    # Embeddings that an earlier iteration has untied stay apart, whatever the original base says.
    untied = plan_fold(checkpoint, before)[0].config.get("tie_word_embeddings") is False
    plan, changes = plan_fold(checkpoint, changes, untied=untied, partly=True)
    files = {stored: header.path for header in checkpoint.shards.values() for stored in header.tensors}
    placed = [(files[stored], part) for stored, parts in plan.parts.items() for part in parts]
    placed += [(files[source], part) for source, parts in plan.added.values() for part in parts]
    for _, part in placed:
        if not part.whole or part.transposed:
            raise UserError.of(
                f"weight {part.name!r} in {checkpoint.folder}",
                expected="a matrix stored as it is in memory, for a merge that is not low rank",
                found="several tensors, or its transpose",
                remedy="Choose plain LoRA and a merge method such as linear",
            )
    where = {part.name: (path, part) for path, part in placed if part.name not in plan.same}
    return dict(sorted(where.items())), plan.same, changes


def _value(path: Path, part: Part, changes: Changes, whole_in: torch.dtype) -> tuple[torch.Tensor, float]:
    """One weight after the merge, and the squared norm of what the merge changed."""
    dense = changes.dense(part.name)
    assert dense is not None, part.name
    seen = (TORCH_DTYPES[part.record.dtype], whole_in)
    dense = part.dense(dense).each(lambda one: replace(one, seen=seen))
    stacked, rows_o = changes.stacked(part.name), part.matrix[0]
    B_oR, A_Ri = (None, None) if stacked is None else part.low_rank(*stacked)
    before = Delta(B_oR, A_Ri, changes.start_value(part.name))
    resolve = dense.bind(lambda: stored_blocks(path, part.record, before, rows_o), part.identity)
    value = torch.empty(part.matrix)
    square = 0.0
    for first, rows in stored_blocks(path, part.record, before, rows_o):
        result = resolve(rows, first)
        value[first : first + len(rows)] = result
        square += float((result.double() - rows.double()).square().sum())
    return value, square
