"""Everything wrong with the input of a fold is one line, and leaves nothing half written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics_helpers import (
    BF16,
    SMALL_SHAPES,
    Small,
    gaussian,
    make_small,
    random_adapter,
    small_tensors,
    write_adapter,
    write_base,
)

from bam_lora import store
from bam_lora.adapters import Adapter
from bam_lora.errors import UserError
from bam_lora.folding import fold, fold_into
from bam_lora.merge import MergedAdapters


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return make_small(tmp_path)


def test_an_adapter_of_another_base(small: Small, tmp_path: Path) -> None:
    other = random_adapter(tmp_path / "other", {f"model.layers.{n}.q_proj": (12, 8) for n in range(9)})
    with pytest.raises(UserError, match=r"found no model.layers.1.q_proj.weight, .* and 5 more.*another base"):
        fold(small.base, [other], small.out)
    wrong = random_adapter(tmp_path / "wrong", {"model.layers.0.q_proj": (12, 9)})
    with pytest.raises(UserError, match=r"q_proj.weight \[12, 8\], not \[12, 9\].*another base"):
        fold(small.base, [wrong], small.out)
    named = random_adapter(tmp_path / "named", SMALL_SHAPES, base_model_name_or_path="org/Llama-3-8B")
    with pytest.raises(UserError, match=r"expected 'base', the base given, found 'org/Llama-3-8B'.*--any-base"):
        fold(small.base, [named], small.out)
    assert not small.out.exists()
    fold(small.base, [named], small.out, any_base=True)


@pytest.mark.parametrize("name", ["org/BASE", "unsloth/base-unsloth-bnb-4bit", "/somewhere/base/", "org/base-bnb-4bit"])
def test_other_names_of_the_same_base(small: Small, tmp_path: Path, name: str) -> None:
    adapter = random_adapter(tmp_path / "named", SMALL_SHAPES, base_model_name_or_path=name)
    fold(small.base, [adapter], small.out)


def test_a_base_in_the_hub_cache(small: Small, tmp_path: Path) -> None:
    """Its folder is named by the commit, and its files are links that lead out of it."""
    cache = tmp_path / "models--org--Base" / "snapshots" / "0123abc"
    cache.mkdir(parents=True)
    blobs = tmp_path / "models--org--Base" / "blobs"
    blobs.mkdir()
    for path in small.base.iterdir():
        path.rename(blobs / path.name)
        (cache / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    adapter = random_adapter(tmp_path / "named", SMALL_SHAPES, base_model_name_or_path="org/base")
    fold(cache, [adapter], small.out)
    assert not any(path.is_symlink() for path in small.out.iterdir())


def test_tied_embeddings(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": gaussian(30, 8, dtype=BF16)}
    adapter = random_adapter(tmp_path / "a", {"lm_head": (30, 8)})
    write_base(tmp_path / "free", tensors)
    fold(tmp_path / "free", [adapter], tmp_path / "out")
    write_base(tmp_path / "tied", tensors, config={"tie_word_embeddings": True})
    with pytest.raises(
        UserError, match=r"expected the input embedding, .* to change lm_head.weight, found only lm_head.weight"
    ):
        fold(tmp_path / "tied", [adapter], tmp_path / "out")


@pytest.mark.parametrize(
    "extra",
    [
        {"model.layers.0.q_proj.weight": torch.zeros(48, 1, dtype=torch.uint8)},
        {"model.layers.0.q_proj.weight": torch.zeros(12, 8).to(torch.float8_e4m3fn)},
        {"model.layers.0.q_proj.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
        {"model.layers.0.q_proj.qweight": torch.zeros(9, dtype=torch.int32)},
        {"model.layers.0.q_proj.weight_scale_inv": torch.zeros(9)},
    ],
)
def test_a_quantised_base(small: Small, extra: dict[str, torch.Tensor]) -> None:
    write_base(small.base, {**small_tensors(), **extra}, config={"quantization_config": {"quant_method": "some4bit"}})
    with pytest.raises(UserError, match=r"found a quantised model \(some4bit; tensor .*Use the original 16-bit model"):
        fold(small.base, [small.adapter], small.out)
    assert not small.out.exists()


def test_folders_that_are_no_base(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: expected a folder or a Hub id"):
        fold(tmp_path / "nowhere", [small.adapter], small.out)
    with pytest.raises(UserError, match=r"expected a model folder with config.json"):
        fold(small.adapter, [small.adapter], small.out)
    (small.base / "model.safetensors").rename(small.base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"found pytorch_model.bin.*save it again"):
        fold(small.base, [small.adapter], small.out)
    (small.base / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="found neither"):
        fold(small.base, [small.adapter], small.out)
    (small.base / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: expected JSON"):
        fold(small.base, [small.adapter], small.out)
    with pytest.raises(UserError, match="dtype: expected one of bfloat16, float16, float32, found 'int8'"):
        fold(write_base(tmp_path / "b", small_tensors()), [small.adapter], small.out, dtype="int8", any_base=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": "../base2/x.safetensors"}, "files of its own folder, found '../base2/x.safetensors'"),
        ({"model.norm.weight": "/etc/passwd"}, "files of its own folder, found '/etc/passwd'"),
        ({"model.norm.weight": ".."}, "files of its own folder"),
        ({"model.norm.weight": 3}, "weight_map of names to files"),
        ({"model.norm.weight": "missing.safetensors"}, "missing.safetensors: expected a readable file"),
        (
            {"model.norm.weight": "model-00001-of-00002.safetensors"},
            "'model.norm.weight' in .*as model.safetensors.index",
        ),
        ({"model.more.weight": "model-00001-of-00002.safetensors"}, "'model.more.weight' in .*found it nowhere"),
    ],
)
def test_an_index_that_lies(small: Small, change: dict[str, Any], words: str) -> None:
    shutil.rmtree(small.base)
    path = write_base(small.base, small_tensors(), shards=2) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    where = index["weight_map"]["model.norm.weight"]
    if change.get("model.norm.weight") == where:
        change = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    index["weight_map"].update(change)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        fold(small.base, [small.adapter], small.out)
    assert not small.out.exists()


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"max_shard_bytes": 400}])
def test_an_index_without_metadata(small: Small, options: dict[str, Any]) -> None:
    shutil.rmtree(small.base)
    path = write_base(small.base, small_tensors(), shards=2) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "metadata": None}))
    fold(small.base, [small.adapter], small.out, any_base=True, **options)
    assert json.loads((small.out / path.name).read_text())["metadata"]["total_size"] > 0
    path.write_text(json.dumps({**index, "metadata": "x"}))
    with pytest.raises(UserError, match=r"metadata in .*index.json: expected an object, found 'x'"):
        fold(small.base, [small.adapter], small.out, any_base=True, **options)


@pytest.mark.parametrize("value", ["x", 5, ["x"]])
def test_a_config_whose_text_config_is_none(small: Small, value: object) -> None:
    path = small.base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_config": value}))
    with pytest.raises(UserError, match=r"text_config in .*config.json: expected an object, found"):
        fold(small.base, [small.adapter], small.out, any_base=True)


def test_weights_that_are_none(small: Small) -> None:
    for weights in (["a"], [None]):
        with pytest.raises(UserError, match=r"merge weights: expected numbers, found \["):
            fold(small.base, [small.adapter], small.out, any_base=True, weights=weights)  # type: ignore[arg-type]


def test_one_tensor_in_two_shards(small: Small) -> None:
    shutil.rmtree(small.base)
    write_base(small.base, small_tensors(), shards=2)
    twice = small.base / "model-00001-of-00002.safetensors"
    shutil.copy(twice, small.base / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"expected it once, found it in model-00001.* and model-00002"):
        fold(small.base, [small.adapter], small.out)


def test_a_truncated_shard(small: Small) -> None:
    path = small.base / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(UserError, match=r"base/model.safetensors: expected .*for tensor '.*truncated"):
        fold(small.base, [small.adapter], small.out)
    assert not small.out.exists()


def test_numbers_that_are_none(small: Small, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    A = gaussian(4, 8)
    A[2, 2] = float("nan")
    broken = write_adapter(tmp_path / "a", {"model.layers.0.q_proj": (A, gaussian(12, 4))})
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight' in .*found NaN or Inf"):
        fold(small.base, [broken], small.out)
    tensors = small_tensors()
    tensors["model.layers.0.up_proj.weight"][19, 7] = float("nan")
    write_base(small.base, tensors)
    random_adapter(tmp_path / "a", SMALL_SHAPES)
    with pytest.raises(UserError, match=r"'model.layers.0.up_proj.weight' of .*found NaN or Inf after the fold"):
        fold(small.base, [small.adapter], small.out)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_result_too_large_for_its_type(tmp_path: Path) -> None:
    write_base(tmp_path / "base", {"q.weight": torch.full((4, 4), 6e4, dtype=torch.float16)})
    adapter = write_adapter(tmp_path / "a", {"q": (torch.ones(1, 4), torch.full((4, 1), 6e3))}, alpha=1)
    with pytest.raises(UserError, match=r"'q.weight' of .*expected finite weights in float16"):
        fold(tmp_path / "base", [adapter], tmp_path / "out")
    fold(tmp_path / "base", [adapter], tmp_path / "out", dtype="bfloat16")


def test_no_space_left(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"disk space for the folded model .*found 0.00 GB"):
        fold(small.base, [small.adapter], small.out)
    assert not small.out.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_output(small: Small, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"output .*expected to write it, found Permission denied"):
        fold(small.base, [small.adapter], locked / "out")


def test_an_output_below_a_file(small: Small, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output .*expected to write it, found"):
        fold(small.base, [small.adapter], tmp_path / "file" / "out")


def test_the_base_is_never_overwritten(small: Small, tmp_path: Path) -> None:
    before = store.hash_file(small.base / "model.safetensors")
    for output in (small.base, tmp_path, small.adapter):
        with pytest.raises(UserError, match="it holds the input"):
            fold(small.base, [small.adapter], output)
    assert store.hash_file(small.base / "model.safetensors") == before


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link(small: Small, tmp_path: Path, there: bool) -> None:
    """What it leads to is the output: people link to a larger disk."""
    disk = tmp_path / "disk" / "model"
    (disk if there else disk.parent).mkdir(parents=True)
    small.out.symlink_to(disk)
    for _ in range(2):  # anew, and over an earlier result
        fold(small.base, [small.adapter], small.out, any_base=True)
        assert small.out.is_symlink()
        assert (disk / "config.json").is_file()
        assert [path.name for path in disk.parent.iterdir()] == ["model"]
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(UserError, match=r"output .*circle: expected"):
        fold(small.base, [small.adapter], circle, any_base=True)


def test_an_interrupted_fold_leaves_no_folder(small: Small, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    merged = MergedAdapters([Adapter.open(small.adapter)], [1.0])

    def interrupt(count: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold_into(small.base, merged, small.out, key="k", progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == before
    fold_into(small.base, merged, small.out, key="one")
    with pytest.raises(KeyboardInterrupt):
        fold_into(small.base, merged, small.out, key="two", progress=interrupt)
    assert store.verify(small.out, "one") is not None  # what stood there still does
