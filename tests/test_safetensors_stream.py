"""The safetensors reader trusts nothing, and what it writes the format's own library reads."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from bam_lora.errors import UserError
from bam_lora.safetensors_stream import build_header, read_header, read_rows, read_tensor, write_stream, write_tensors

TENSORS = {
    "b": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.empty(0, 4, dtype=torch.float64),
}


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(TENSORS, {"format": "pt"}))
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert path.read_bytes().startswith(header.raw)
    for name, tensor in TENSORS.items():
        read = read_tensor(path, header.tensors[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    rows = torch.empty(2, 4)
    read_rows(path, header.tensors["b"], rows, first_row=1)
    assert torch.equal(rows, TENSORS["b"][1:])


def test_the_library_reads_what_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.safetensors"
    write_tensors(path, TENSORS, {"note": "größer"})
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "größer"}
    assert len(read_header(path).raw) % 8 == 0
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # the library itself leaves 0600
    assert os.listdir(path.parent) == ["x.safetensors"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Any:
        yield torch.zeros(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(tmp_path / "x.safetensors", [("a", "F32", (2,)), ("b", "F32", (2,))], tensors())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "'b' overlaps"),
        ({"a": entry(0, 2), "b": entry(4, 6)}, b"123456", "'b' leaves a gap"),
        ({"a": entry(2, 6)}, b"123456", "'a' leaves a gap"),
        ({"a": entry(0, 400)}, b"123456", "tensor 'a', found 421 bytes|truncated"),
        ({"a": entry(0, 4)}, b"123456", "expected .* bytes, found"),
        ({"a": entry(0, 4, [2, 3])}, b"1234", "6 bytes for tensor 'a'"),
        ({"a": entry(0, 4, [-2, -2])}, b"1234", "shape for tensor 'a'"),
        ({"a": entry(0, 4, [1 << 62, 1 << 62])}, b"1234", "bytes for tensor 'a'"),
        ({"a": entry(0, 4, [True, 4])}, b"1234", "shape for tensor 'a'"),
        ({"a": entry(4, 0, [4])}, b"1234", "bytes for tensor 'a'"),
        ({"a": entry(0, 4, dtype="Q7")}, b"1234", "known dtype for tensor 'a'.*Q7"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, b"1234", "two data_offsets for tensor 'a'"),
        ({"a": 3}, b"1234", "known dtype for tensor 'a'"),
        ({"__metadata__": {"x": 3}, "a": entry(0, 4)}, b"1234", "__metadata__"),
        (b"[1, 2]", b"", "JSON object"),
        (b"{not json", b"", "JSON header"),
        (b'{"\xff": 1}', b"", "JSON header"),
        (b"[" * 100_000, b"", "JSON header"),
        (b'{"a": 1, "a": 2}', b"", "'a' twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}', b"", "'dtype' twice"),
    ],
)
def test_a_lying_header_is_one_clear_line(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UserError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [1 << 63, 100_000_001, 1000])
def test_a_huge_header_length_reserves_no_memory(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(0, 4)}, b"1234", length=length)
    with pytest.raises(UserError, match=f"found one of {length} bytes"):
        read_header(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_header(tmp_path / "missing.safetensors")
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(UserError, match="found 3 bytes"):
        read_header(tmp_path / "short")
    with pytest.raises(UserError, match=r"readable file.*Is a directory"):
        read_header(tmp_path)


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
def test_truncated(tmp_path: Path, keep: float) -> None:
    whole = save(TENSORS)
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"x\.safetensors: expected .* found .*\. The file is damaged"):
        read_header(path)


def test_truncated_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(100)})
    header = read_header(path)
    os.truncate(path, 200)
    with pytest.raises(UserError, match="all of tensor 'a', found the end of the file"):
        read_tensor(path, header.tensors["a"])


def test_integer_tensors_are_not_read_as_numbers(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(0, 4)}, b"1234")
    with pytest.raises(UserError, match=r"tensor 'a' in .*found U8"):
        read_tensor(path, read_header(path).tensors["a"])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_read_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(save(TENSORS, {"format": "pt"}))
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    whole[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(whole)
    try:
        header = read_header(path)
    except UserError:
        return
    assert sum(record.stop - record.start for record in header.tensors.values()) == len(whole) - len(header.raw)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=5), st.lists(st.integers(0, 4), max_size=3)), unique_by=lambda x: x[0]))
def test_headers_round_trip(tmp_path_factory: pytest.TempPathFactory, named: list[tuple[str, list[int]]]) -> None:
    layout = [(name, "F32", tuple(shape)) for name, shape in named if name != "__metadata__"]
    tensors = [torch.zeros(shape) for _, _, shape in layout]
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    write_stream(path, layout, tensors)
    assert {name: record.shape for name, record in read_header(path).tensors.items()} == {n: s for n, _, s in layout}
    assert read_header(path).raw == build_header(layout)
