"""The files of a folded model: by the base's layout or by size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from numerics_helpers import BF16, SMALL_SHAPES, gaussian, load_all, random_adapter, small_tensors, write_base
from safetensors.torch import load_file
from typer.testing import CliRunner

from bam_lora.cli import app
from bam_lora.errors import UserError
from bam_lora.fold_layout import parse_size
from bam_lora.folding import fold

INDEX = "model.safetensors.index.json"


def sizes(folder: Path) -> list[int]:
    return [sum(t.numel() * t.element_size() for t in load_file(p).values()) for p in sorted(folder.glob("model-*"))]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("limit", [100, 400, 700, 10**9])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_shards_of_a_size(tmp_path: Path, shards: int, limit: int, dtype: str | None) -> None:
    """(12, 8), (20, 8), (30, 8) and (8,) in bf16: 192, 320, 480 and 16 bytes."""
    write_base(tmp_path / "base", small_tensors(), shards=shards)
    adapter = random_adapter(tmp_path / "a", SMALL_SHAPES)
    fold(tmp_path / "base", [adapter], tmp_path / "kept", dtype=dtype)
    facts = fold(tmp_path / "base", [adapter], tmp_path / "out", max_shard_bytes=limit, dtype=dtype, verify=True)
    got, want = load_all(tmp_path / "out"), load_all(tmp_path / "kept")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert facts["shards"] == len(files)
    assert facts["bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in files)
    if limit == 10**9:
        assert files == ["model.safetensors"]
        assert not (tmp_path / "out" / INDEX).exists()
        return
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    total = sum(t.numel() * t.element_size() for t in want.values())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"] == {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    for file, size in zip(files, sizes(tmp_path / "out"), strict=True):
        assert size <= limit or len(load_file(tmp_path / "out" / file)) == 1
    pairs = zip(sizes(tmp_path / "out"), sizes(tmp_path / "out")[1:], strict=False)
    assert all(one + two > limit for one, two in pairs)  # no file could have been saved


def test_tensors_stay_in_file_order(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": gaussian(4, 4, dtype=BF16) for name in "dbcaeg"}
    write_base(tmp_path / "base", tensors, shards=2)
    adapter = random_adapter(tmp_path / "a", {"c": (4, 4)})
    fold(tmp_path / "base", [adapter], tmp_path / "out", max_shard_bytes=64)
    order = [sorted(load_file(path)) for path in sorted((tmp_path / "out").glob("model-*.safetensors"))]
    # The first file of the base holds a, c, e.
    assert order == [["a.weight", "c.weight"], ["b.weight", "e.weight"], ["d.weight", "g.weight"]]


def test_types_of_different_width_stay_aligned(tmp_path: Path) -> None:
    """The odd bytes of one file come before the wider tensors of the next."""
    tensors = {
        "a.weight": gaussian(4, 4, dtype=BF16),
        "b.mask": torch.ones(3, dtype=torch.uint8),
        "c.weight": gaussian(4, 4, dtype=BF16),
        "d.mask": torch.ones(5, dtype=torch.uint8),
        "e.weight": gaussian(4, 4),
    }
    write_base(tmp_path / "base", tensors, shards=2)
    adapter = random_adapter(tmp_path / "a", {"c": (4, 4)}, scale=0.0)
    fold(tmp_path / "base", [adapter], tmp_path / "out", max_shard_bytes=10**6, verify=True)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 500 * 10**6), ("1.5kb", 1500), (" 2 TB ", 2 * 10**12), ("2GiB", 2**31), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 bananas", "-5GB", "0", "0.1", "5Gb5", "1e9"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"maximal shard size: expected a size such as 5GB or 500MB, found '"):
        parse_size(text)


def test_the_command(tmp_path: Path) -> None:
    write_base(tmp_path / "base", small_tensors())
    adapter = random_adapter(tmp_path / "a", SMALL_SHAPES)
    command = ["fold", "--base", str(tmp_path / "base"), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    options = ["--max-shard-size", "0.5kB", "--verify", "--rounding", "stochastic", "--seed", "3"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    assert "verified 16 rows of 2 tensors: " in result.output
    assert len(sizes(tmp_path / "out")) == 3
    wrong = CliRunner().invoke(app, [*command, "--max-shard-size", "much"])
    assert wrong.exit_code == 1, wrong.output
    assert "expected a size such as 5GB" in str(wrong.exception) + wrong.output
