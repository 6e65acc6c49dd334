"""Which tensor goes into which file of the folded model: the base's layout, or one by size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bam_lora.checkpoint import SINGLE
from bam_lora.errors import UserError
from bam_lora.fold_plan import FoldPlan, Part
from bam_lora.safetensors_stream import DTYPE_BITS, TORCH_DTYPES, Header, TensorRecord, build_header

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B)?")
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: what it begins as, in which file of the base, and the parts of it that change."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    record: TensorRecord
    parts: Sequence[Part]

    def changes(self) -> bool:
        """Whether other bytes than the base's are written."""
        return bool(self.parts) or self.dtype != self.record.dtype or self.resized()

    def resized(self) -> bool:
        """Whether it gets other rows than it had."""
        return self.shape != self.record.shape

    def data_bytes(self) -> int:
        """Its size as written."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class OutputShard:
    """One file to write: its header's bytes, then its tensors in this order."""

    name: str
    header: bytes
    tensors: Sequence[OutputTensor]

    def data_bytes(self) -> int:
        """The size of its tensors."""
        return sum(one.data_bytes() for one in self.tensors)

    def file_bytes(self) -> int:
        """The size of the file."""
        return len(self.header) + self.data_bytes()


def plan_shards(
    shards: Mapping[str, Header], plan: FoldPlan, dtype: str | None, max_shard_bytes: int | None = None
) -> list[OutputShard]:
    """Lays out the folded model's files.

    Args:
        shards: The base's headers by file name.
        plan: What changes.
        dtype: The safetensors type of all floating-point tensors, or None to keep each one's.
        max_shard_bytes: None keeps the base's files, and the very bytes of their headers where no name, type or shape
            changes. Else the tensors are packed in file order into shards of at most so many bytes of data; one that
            is larger has a shard of its own.

    Returns:
        The files in order; a single one by size is called as transformers calls it, without a number.
    """
    if max_shard_bytes is None:
        return [_kept(name, header, _outputs(header, plan, dtype)) for name, header in shards.items()]
    groups = list(
        _packed((one for header in shards.values() for one in _outputs(header, plan, dtype)), max_shard_bytes)
    )
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    metadata = next((header.metadata for header in shards.values() if header.metadata is not None), None)
    return [_laid_out(*one, metadata) for one in zip(names if count > 1 else [SINGLE], groups, strict=True)]


def _outputs(header: Header, plan: FoldPlan, dtype: str | None) -> list[OutputTensor]:
    """What is written for a shard of the base, in order: its own tensors, then those that begin as one of them."""

    def output(name: str, record: TensorRecord, parts: Sequence[Part]) -> OutputTensor:
        shape = (plan.rows[name], *record.shape[1:]) if name in plan.rows else record.shape
        written = dtype if dtype is not None and record.dtype in TORCH_DTYPES else record.dtype
        return OutputTensor(name, written, shape, header.path, record, parts)

    own = [output(name, record, plan.parts.get(name, ())) for name, record in header.tensors.items()]
    added = [
        output(name, header.tensors[source], parts)
        for name, (source, parts) in plan.added.items()
        if source in header.tensors
    ]
    return own + added


def _kept(name: str, header: Header, tensors: Sequence[OutputTensor]) -> OutputShard:
    layout = [(one.name, one.dtype, one.shape) for one in tensors]
    if layout == [(record.name, record.dtype, record.shape) for record in header.tensors.values()]:
        return OutputShard(name, header.raw, tensors)
    return _laid_out(name, tensors, header.metadata)


def _packed(tensors: Iterable[OutputTensor], max_shard_bytes: int) -> Iterator[list[OutputTensor]]:
    group: list[OutputTensor] = []
    filled = 0
    for one in tensors:
        if group and filled + one.data_bytes() > max_shard_bytes:
            yield group
            group, filled = [], 0
        group.append(one)
        filled += one.data_bytes()
    yield group


def _laid_out(name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str] | None) -> OutputShard:
    # Widest type first, as the format's own writer does, so that every tensor stays aligned; else in the order given.
    ordered = sorted(tensors, key=lambda one: -DTYPE_BITS[one.dtype])
    return OutputShard(name, build_header([(one.name, one.dtype, one.shape) for one in ordered], metadata), ordered)


def parse_size(text: str | int) -> int:
    """A file size in bytes from "5GB", "500MB" (decimal, as in transformers), "2GiB" (binary) or a plain number.

    Raises:
        UserError: If it is none of these, or nothing.
    """
    match = _SIZE.fullmatch(str(text).strip().upper())
    size = 0
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** _POWERS.get(unit, 0))
    if size < 1:
        raise UserError.of(
            "the maximal shard size", expected="a size such as 5GB or 500MB", found=repr(text), remedy="Correct it"
        )
    return size
