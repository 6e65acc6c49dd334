"""Damaged and lying files, base and adapter alike: one clear line that names the file, and nothing written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics_helpers import SMALL_SHAPES, Small, gaussian, make_small, random_adapter, small_tensors, write_base
from safetensors.torch import load_file, save_file

from bam_lora.errors import UserError
from bam_lora.folding import fold


@pytest.fixture
def small(tmp_path: Path) -> Small:
    small = make_small(tmp_path)
    (small.base / "model.safetensors").unlink()
    write_base(small.base, small_tensors(), shards=2)
    return small


def refused(small: Small, words: str) -> None:
    """The fold is refused in one line, twice the same, and leaves the folder around as it was."""
    around = small.base.parent
    before = sorted(path.relative_to(around) for path in around.rglob("*"))
    with pytest.raises(UserError, match=words) as first:
        fold(small.base, [small.adapter], small.out)
    assert "\n" not in str(first.value)
    assert len(str(first.value)) < 600
    with pytest.raises(UserError, match=words):
        fold(small.base, [small.adapter], small.out, verify=True, max_shard_bytes=100)
    assert sorted(path.relative_to(around) for path in around.rglob("*")) == before


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A file whose header says something else; the data stay."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        raw = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return damage


def names(header: dict[str, Any]) -> list[str]:
    """The tensors in file order."""
    own = [name for name in header if name != "__metadata__"]
    return sorted(own, key=lambda name: header[name]["data_offsets"])


def overlap(header: dict[str, Any]) -> None:
    first, second = names(header)[:2]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    start = header[first]["data_offsets"][1] - 2
    header[second]["data_offsets"] = [start, start + size]


def gap(header: dict[str, Any]) -> None:
    last = names(header)[-1]
    header[last]["data_offsets"] = [offset + 4 for offset in header[last]["data_offsets"]]


def first_says(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[names(header)[0]].update(values)


def twice(header: dict[str, Any]) -> bytes:
    name = names(header)[0]
    pairs = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in [*header.items(), (name, header[name])]]
    return ("{" + ", ".join(pairs) + "}").encode()


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: os.truncate(path, path.stat().st_size - 5), r"expected .* for tensor '.*\(truncated\)"),
    (lambda path: os.truncate(path, 40), "expected a header inside 40 bytes"),
    (lambda path: os.truncate(path, 0), "expected a safetensors file, found 0 bytes"),
    (lambda path: path.write_bytes(path.read_bytes() + b"more"), r"expected \d+ bytes, found \d+ bytes"),
    (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "expected a header"),
    (long_header, "found one of 1152921504606846976 bytes"),
    (rewritten(lambda header: b"{not json"), "expected a JSON header"),
    (rewritten(lambda header: b"[" * 100_000), "expected a JSON header"),
    (rewritten(lambda header: b"[1]"), "expected a JSON object as header, found list"),
    (rewritten(twice), "expected each name once in the header, found '.*' twice"),
    (rewritten(overlap), "found tensor '.*' overlaps the one before"),
    (rewritten(gap), "found tensor '.*' leaves a gap before it"),
    (rewritten(first_says(shape=[1, 2, 3])), r"expected .* bytes for tensor '.*' \(.* \[1, 2, 3\]\)"),
    (rewritten(first_says(shape=[-12, -8])), r"a shape for tensor '.*', found \[-12, -8\]"),
    (rewritten(first_says(shape=[1 << 40, 1 << 40])), "expected .* bytes for tensor"),
    (rewritten(first_says(dtype="F17")), "expected a known dtype for tensor '.*', found 'F17'"),
    (rewritten(first_says(data_offsets=[0, 1 << 62])), "expected .* bytes for tensor"),
    (rewritten(first_says(data_offsets=[-8, 8])), "expected two data_offsets for tensor"),
    (rewritten(lambda header: header.update({"__metadata__": {"a": 1}})), "expected __metadata__ that maps text"),
]


@pytest.mark.parametrize("which", ["base/model-00001-of-00002.safetensors", "a/adapter_model.safetensors"])
@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_files(small: Small, which: str, damage: Callable[[Path], Any], words: str) -> None:
    damage(small.base.parent / which)
    refused(small, f"{which}: .*{words}|{which}: {words}")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_adapter_without_one_half(small: Small, half: str) -> None:
    path = small.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"base_model.model.model.layers.0.q_proj.{half}.weight"]
    save_file(tensors, path)
    refused(small, rf"q_proj.*{half}|{half}.*q_proj")


def test_an_adapter_with_a_tensor_too_many(small: Small) -> None:
    path = small.adapter / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.model.layers.0.q_proj.surprise": torch.ones(3)}, path)
    refused(small, r"surprise")


def test_halves_of_different_rank(small: Small) -> None:
    path = small.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.q_proj.lora_B.weight"] = gaussian(12, 3)
    save_file(tensors, path)
    refused(small, r"q_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_adapter_with_numbers_that_are_none(small: Small, half: str, value: float) -> None:
    path = small.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.model.layers.0.q_proj.{half}.weight"][1, 1] = value
    save_file(tensors, path)
    refused(small, rf"q_proj.{half}.weight' in .*found NaN or Inf")


def test_a_second_adapter_of_other_shapes(small: Small, tmp_path: Path) -> None:
    other = random_adapter(tmp_path / "other", {name: (rows, 9) for name, (rows, _) in SMALL_SHAPES.items()})
    with pytest.raises(
        UserError, match=r"q_proj.weight' in .*other: expected shape \[12, 8\], as in .*found \[12, 9\]"
    ):
        fold(small.base, [small.adapter, other], small.out)


def test_a_shard_that_is_missing(small: Small) -> None:
    (small.base / "model-00002-of-00002.safetensors").unlink()
    refused(small, r"model-00002-of-00002.safetensors: expected a readable file")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("inside", [False, True])
def test_links_that_lead_out_of_the_folder(small: Small, name: str, inside: bool) -> None:
    (small.base / "tokenizer.json").write_text("{}")
    target = (small.base if inside else small.base.parent) / "elsewhere"
    (small.base / name).rename(target)
    (small.base / name).symlink_to(target)
    if inside:
        fold(small.base, [small.adapter], small.out)
        assert not (small.out / name).is_symlink()
    else:
        refused(small, rf"{name}: expected a file of its own folder, found a link to .*elsewhere")


def test_weights_may_lie_on_another_disk(small: Small) -> None:
    name = "model-00001-of-00002.safetensors"
    (small.base / name).rename(small.base.parent / "elsewhere")
    (small.base / name).symlink_to(small.base.parent / "elsewhere")
    fold(small.base, [small.adapter], small.out)
    assert not (small.out / name).is_symlink()
    (small.base.parent / "elsewhere").write_text("a secret of some length, and no tensors")
    refused(small, r"expected a header inside .* bytes")


def test_an_index_through_a_linked_folder(small: Small) -> None:
    (small.base.parent / "other").mkdir()
    (small.base / "model-00001-of-00002.safetensors").rename(small.base.parent / "other" / "x.safetensors")
    (small.base / "sub").symlink_to(small.base.parent / "other")
    path = small.base / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001-of-00002.safetensors", "sub/x.safetensors"))
    refused(small, r"files of its own folder, found 'sub/x.safetensors'")
