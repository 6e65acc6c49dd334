"""safetensors files read and written piece by piece, trusting nothing that the header says.

A file is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors, "Format"). Every name, shape, type and offset is checked against the
size of the file before anyone acts on it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bam_lora.errors import UserError
from bam_lora.store import fsync_path

MAXIMUM_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
_ALIGNMENT_BYTES = 8

# Bits, not bytes: the format has types narrower than a byte.
DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: `start` and `stop` are byte positions in the file, not in its data part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header: `raw` is its exact bytes (length field included), `tensors` are in file order."""

    path: Path
    raw: bytes
    tensors: dict[str, TensorRecord]
    metadata: dict[str, str] | None
    file_bytes: int


def damaged(path: Path, expected: str, found: str) -> UserError:
    """The error for a safetensors file that is not what its header says."""
    return UserError.of(str(path), expected=expected, found=found, remedy="The file is damaged; download it again")


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a file that the system does not let us read."""
    found = error.strerror or str(error)
    return UserError.of(str(path), expected="a readable file", found=found, remedy="Check the path and its permissions")


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        The header, every tensor of it inside the file, without gaps or overlaps.

    Raises:
        UserError: If the file is missing, truncated or its header does not hold up, naming the tensor.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise damaged(path, "a safetensors file", f"{file_bytes} bytes")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(MAXIMUM_HEADER_BYTES, file_bytes - 8):
                raise damaged(path, f"a header inside {file_bytes} bytes", f"one of {header_bytes} bytes")
            raw = prefix + file.read(header_bytes)
    except OSError as error:
        raise unreadable(path, error) from None
    entries = _parse(path, raw[8:])
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise damaged(path, "__metadata__ that maps text to text", repr(metadata)[:80])
    tensors = place_tensors(path, entries, 8 + header_bytes, file_bytes)
    return Header(path, raw, tensors, metadata, file_bytes)


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise damaged(path, "each name once in the header", f"{twice!r} twice")
        return result

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise damaged(path, "a JSON header", str(error)[:120]) from None
    if not isinstance(entries, dict):
        raise damaged(path, "a JSON object as header", type(entries).__name__)
    return entries


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorRecord:
    """One header entry as a record; its own three fields are checked here, its place in `place_tensors`."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise damaged(path, f"a known dtype for tensor {name!r}", repr(dtype)[:80])
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise damaged(path, f"a shape for tensor {name!r}", repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise damaged(path, f"two data_offsets for tensor {name!r}", repr(offsets)[:80])
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        raise damaged(path, f"{bits / 8:g} bytes for tensor {name!r} ({dtype} {shape})", f"data_offsets {offsets}")
    return TensorRecord(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def place_tensors(path: Path, entries: Mapping[str, Any], data_start: int, file_bytes: int) -> dict[str, TensorRecord]:
    """A header's entries as records; a UserError names one that is not inside the file, right after the one before."""
    records = [_entry(path, name, value, data_start) for name, value in entries.items()]
    records.sort(key=lambda record: (record.start, record.stop))
    position = data_start
    for record in records:
        if record.start != position:
            problem = "overlaps the one before" if record.start < position else "leaves a gap before it"
            raise damaged(path, "tensors one after the other", f"tensor {record.name!r} {problem}")
        if record.stop > file_bytes:
            needed = f"{record.stop} bytes or more, for tensor {record.name!r}"
            raise damaged(path, needed, f"{file_bytes} bytes (truncated)")
        position = record.stop
    if position != file_bytes:
        raise damaged(path, f"{position} bytes", f"{file_bytes} bytes")
    return {record.name: record for record in records}


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header bytes, length field included, of tensors (name, dtype, shape) that lie in the order given."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(raw)) + raw


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without copying them."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_rows(path: Path, record: TensorRecord, into: torch.Tensor, first_row: int = 0) -> None:
    """Fills a contiguous tensor with rows of a stored one.

    Args:
        path: The file that holds it.
        record: The stored tensor.
        into: (rows, ...) of the stored type: as many rows as are wanted.
        first_row: The stored row to begin with.

    Raises:
        UserError: If it cannot be read, or ends before the rows do (it changed since its header was read).
    """
    target = byte_view(into)
    row_bytes = (record.stop - record.start) // max(record.shape[0], 1) if record.shape else 0
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(record.start + first_row * row_bytes)
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise damaged(path, f"all of tensor {record.name!r}", "the end of the file")
                done += count
    except OSError as error:
        raise unreadable(path, error) from None


def map_tensor(path: Path, record: TensorRecord) -> torch.Tensor:
    """One whole floating-point tensor as stored, its bytes left in the file until they are used.

    Raises:
        UserError: If it has another type, or the file cannot be read or is too short.
    """
    dtype = _torch_dtype(path, record)
    try:
        raw: np.ndarray = np.memmap(path, np.uint8, "c", offset=record.start, shape=(record.stop - record.start,))
    except (OSError, ValueError) as error:
        raise damaged(path, f"all of tensor {record.name!r}", str(error)) from None
    if record.start % dtype.itemsize:  # legal, if rare; a view needs aligned numbers
        raw = np.array(raw)
    return torch.from_numpy(raw).view(dtype).view(record.shape)


def _torch_dtype(path: Path, record: TensorRecord) -> torch.dtype:
    dtype = TORCH_DTYPES.get(record.dtype)
    if dtype is None:
        raise UserError.of(
            f"tensor {record.name!r} in {path}",
            expected=f"one of {', '.join(TORCH_DTYPES)}",
            found=record.dtype,
            remedy="Save it in one of these types",
        )
    return dtype


def read_tensor(path: Path, record: TensorRecord) -> torch.Tensor:
    """One whole floating-point tensor as stored; UserError for other types."""
    tensor = torch.empty(record.shape, dtype=_torch_dtype(path, record))
    read_rows(path, record, tensor)
    return tensor


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: from its extremes, ten times as fast as element by element."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes floating-point CPU tensors as one safetensors file, whole or not at all, with the usual file mode."""
    # Widest type first, as the format's own writer does, so that every tensor stays aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    layout = [(name, _DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names]
    write_stream(path, layout, (tensors[name] for name in names), metadata)


def write_stream(
    path: Path,
    layout: Sequence[tuple[str, str, tuple[int, ...]]],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors that need not be in memory together.

    Args:
        path: The file; it appears whole or not at all.
        layout: Name, safetensors type and shape of each tensor, in file order.
        tensors: The CPU tensors themselves, in the same order.
        metadata: Text to keep in the header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(build_header(layout, metadata))
            for (name, dtype, shape), tensor in zip(layout, tensors, strict=True):
                assert (_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) == (dtype, shape), name
                file.write(byte_view(tensor.contiguous()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)
