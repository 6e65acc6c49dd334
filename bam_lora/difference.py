"""A frozen delta between two whole models, such as a chat vector: weight · (model - base), added tensor by tensor.

Task arithmetic: arXiv 2212.04089; instruct minus base as a chat vector: arXiv 2310.04799. It is added to the matrices
as the checkpoint stores them, on top of what adapters make of them.
Shapes: o output, i input, as stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bam_lora.checkpoint import CONFIG, INDEX, Checkpoint, local_folder, open_checkpoint
from bam_lora.dense_change import DenseChange, Resolver
from bam_lora.errors import UserError
from bam_lora.fold_blocks import as_matrix
from bam_lora.fold_plan import EMBEDDING_NAMES, Changes, FoldPlan, Part
from bam_lora.outline import LOW_RANK, Outline
from bam_lora.safetensors_stream import TORCH_DTYPES, Header, TensorRecord, map_tensor
from bam_lora.store import digest


@dataclass(frozen=True)
class StoredDifference:
    """weight · (model - base) of some rows of a stored tensor; both stay on the disk until a block of them is used."""

    model_path: Path
    model: TensorRecord
    base_path: Path
    base: TensorRecord
    weight: float

    def after(self, resolve: Resolver | None) -> Resolver:
        """What adds the difference to blocks of the weight, once `resolve` has changed them."""
        model_oi, base_oi = map_tensor(self.model_path, self.model), map_tensor(self.base_path, self.base)

        def resolver(original: torch.Tensor, first: int) -> torch.Tensor:
            before = original if resolve is None else resolve(original, first)
            # A vocabulary that adapters have resized: new rows have no difference, dropped ones need none.
            count = max(0, min(len(before), len(model_oi) - first))
            stop = first + count
            changed = add_difference(before[:count], model_oi[first:stop], base_oi[first:stop], self.weight)
            return changed if count == len(before) else torch.cat([changed, before[count:]])

        return resolver


def add_difference(
    before_oi: torch.Tensor, model_oi: torch.Tensor, base_oi: torch.Tensor, weight: float
) -> torch.Tensor:
    """Before + weight · (model - base) in float64, rounded to the type of `before`.

    Where model and base are the same to the bit, so is the result; where before = weight · base it is weight · model to
    the bit: the base plus its whole difference to a model is that model.
    """
    before, model, base = before_oi.double(), model_oi.double(), base_oi.double()
    rest, share = before - weight * base, weight * model
    total = torch.where(rest == 0, share, rest + share)
    same = model.view(torch.int64) == base.view(torch.int64)
    return torch.where(same, before, total).to(before_oi.dtype)


class Known:
    """The changes of adapters, if any, among the weights of a whole model: what they do not name they leave alone."""

    def __init__(self, changes: Changes | None) -> None:
        self._changes = changes
        self._names = frozenset(changes.names() if changes is not None else ())

    def names(self) -> list[str]:
        """See `Changes`."""
        return sorted(self._names)

    def shape(self, name: str) -> tuple[int, int]:
        """See `Changes`."""
        assert self._changes is not None, name
        return self._changes.shape(name)

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `Changes`."""
        return None if self._changes is None or name not in self._names else self._changes.stacked(name)

    def start_value(self, name: str) -> torch.Tensor | None:
        """See `Changes`."""
        return None if self._changes is None or name not in self._names else self._changes.start_value(name)

    def dense(self, name: str) -> DenseChange | None:
        """See `Changes`."""
        return None if self._changes is None or name not in self._names else self._changes.dense(name)

    def outline(self, name: str) -> Outline:
        """See `Changes`."""
        return LOW_RANK if self._changes is None or name not in self._names else self._changes.outline(name)


@dataclass(frozen=True)
class Difference:
    """weight · (model - base) of two full-precision checkpoints."""

    model: Checkpoint
    base: Checkpoint
    weight: float

    @classmethod
    def open(cls, model: str | Path, base: str | Path, weight: float) -> Difference:
        """Opens two folders or Hub ids.

        Raises:
            UserError: If one is damaged or quantised, or the weight is not finite.
        """
        if not math.isfinite(weight):
            raise UserError.of(
                "the weight of the difference", expected="a finite number", found=f"{weight:g}", remedy="Try 1"
            )
        files = [CONFIG, INDEX, "*.safetensors"]
        minuend, subtrahend = (open_checkpoint(local_folder(name, files)) for name in (model, base))
        return cls(minuend, subtrahend, weight)

    def identity(self) -> dict[str, Any]:
        """What it is a function of; a file is known by its header, size and time."""

        def files(checkpoint: Checkpoint) -> str:
            headers = checkpoint.shards.items()
            return digest([[name, one.file_bytes, one.path.stat().st_mtime_ns, one.raw.hex()] for name, one in headers])

        return {"model": files(self.model), "base": files(self.base), "weight": self.weight}

    def added_to(self, plan: FoldPlan, checkpoint: Checkpoint) -> FoldPlan:
        """The plan of a fold into a checkpoint, with this difference on top.

        Raises:
            UserError: If the three do not have the same tensors, naming the first that is not the same.
        """
        for other in (self.model, self.base):
            _require_same_tensors(checkpoint, other)
        if self.weight == 0:
            return plan
        tensors = checkpoint.tensors()
        model, base = _places(self.model), _places(self.base)

        def covered(name: str, source: str, parts: Sequence[Part]) -> list[Part]:
            return _covered(name, tensors[source], parts, model[source], base[source], self.weight)

        changing = [name for name, one in tensors.items() if one.dtype in TORCH_DTYPES and one.stop > one.start]
        return replace(
            plan,
            parts={name: covered(name, name, plan.parts.get(name, ())) for name in changing},
            added={name: (source, covered(name, source, parts)) for name, (source, parts) in plan.added.items()},
        )


def _places(checkpoint: Checkpoint) -> dict[str, tuple[Header, TensorRecord]]:
    return {name: (header, one) for header in checkpoint.shards.values() for name, one in header.tensors.items()}


def _covered(
    name: str,
    whole: TensorRecord,
    parts: Sequence[Part],
    model: tuple[Header, TensorRecord],
    base: tuple[Header, TensorRecord],
    weight: float,
) -> list[Part]:
    """A stored tensor's parts with their share of the difference, and parts for what lies between them."""

    def share(of: TensorRecord) -> StoredDifference:
        return StoredDifference(
            model[0].path, _cut(model[1], whole, of), base[0].path, _cut(base[1], whole, of), weight
        )

    def gap(start: int, stop: int) -> list[Part]:
        if start == stop:
            return []
        columns = whole.shape[-1] if len(whole.shape) > 1 else 1
        rows = (stop - start) // (columns * TORCH_DTYPES[whole.dtype].itemsize)
        record = replace(whole, shape=(rows, columns), start=start, stop=stop)
        return [Part(name, record, 0, rows, flipped=False, transposed=False, whole=True, difference=share(record))]

    result, position = [], whole.start
    for part in parts:
        result += [*gap(position, part.record.start), replace(part, difference=share(part.record))]
        position = part.record.stop
    return result + gap(position, whole.stop)


def _cut(record: TensorRecord, whole: TensorRecord, part: TensorRecord) -> TensorRecord:
    """Of another file's tensor of the same shape, what `part` is of `whole`."""
    here, there = TORCH_DTYPES[whole.dtype].itemsize, TORCH_DTYPES[record.dtype].itemsize
    rows, columns = as_matrix(part.shape)
    start = record.start + (part.start - whole.start) // here * there
    return replace(record, shape=(rows, columns), start=start, stop=start + rows * columns * there)


def _require_same_tensors(checkpoint: Checkpoint, other: Checkpoint) -> None:
    ours, theirs = checkpoint.tensors(), other.tensors()
    for name in sorted({*ours, *theirs}):
        here, there = ours.get(name), theirs.get(name)
        if here is None or there is None:
            holder = checkpoint if here is None else other
            raise _differs(name, holder, f"it, as {(other if here is None else checkpoint).folder} has it", "none")
        if here.shape != there.shape:
            resized = name.endswith(EMBEDDING_NAMES) and here.shape[1:] == there.shape[1:]
            found = f"{list(there.shape)}" + (", a resized vocabulary" if resized else "")
            raise _differs(name, other, f"shape {list(here.shape)}, as in {checkpoint.folder}", found)
        if (here.dtype in TORCH_DTYPES) != (there.dtype in TORCH_DTYPES):
            raise _differs(name, other, f"a type like {here.dtype}, as in {checkpoint.folder}", there.dtype)


def _differs(name: str, holder: Checkpoint, expected: str, found: str) -> UserError:
    return UserError.of(
        f"tensor {name!r} of {holder.folder}",
        expected=expected,
        found=found,
        remedy="A difference needs models of one architecture and vocabulary",
    )
