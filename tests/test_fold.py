"""Folding leaves alone what does not change, takes along what belongs to a model, and repeats to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics_helpers import (
    BF16,
    SMALL_SHAPES,
    Small,
    dense_delta,
    gaussian,
    load_all,
    make_small,
    random_adapter,
    round_directly,
    small_tensors,
    write_adapter,
    write_base,
)

from bam_lora import fold_shard, store
from bam_lora.adapters import Adapter
from bam_lora.errors import UserError
from bam_lora.fold_blocks import exact_products
from bam_lora.folding import fold, fold_into
from bam_lora.ledger import Ledger
from bam_lora.merge import Coefficients, MergedAdapters
from bam_lora.safetensors_stream import read_header
from bam_lora.snapshots import write_snapshot


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return make_small(tmp_path)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_a_zero_delta_changes_no_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = small_tensors(dtype)
    tensors["model.layers.0.q_proj.weight"][0, :3] = torch.tensor([-0.0, 1e-7, torch.finfo(dtype).max])
    write_base(tmp_path / "base", tensors)
    modules = {m: (gaussian(4, i), torch.zeros(o, 4)) for m, (o, i) in SMALL_SHAPES.items()}
    facts = fold(tmp_path / "base", [write_adapter(tmp_path / "a", modules)], tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()
    assert facts["delta_norm"] == 0
    assert facts["changed"] == 2


def test_the_same_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    shapes = {"q": (1500, 700), "k": (333, 700)}
    write_base(tmp_path / "base", {f"{m}.weight": gaussian(*s, dtype=BF16) for m, s in shapes.items()}, shards=2)
    adapter = random_adapter(tmp_path / "a", shapes, rank=33)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            fold(tmp_path / "base", [adapter], tmp_path / "out")
            assert torch.get_num_threads() == threads
            results.append({p.name: store.hash_file(p) for p in (tmp_path / "out").glob("*.safetensors")})
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]
    manifest = store.verify(tmp_path / "out")
    assert manifest is not None
    assert results[0].items() <= {name: file["sha256"] for name, file in manifest["files"].items()}.items()


@pytest.mark.parametrize("coarse", ["bf16", "tf32", "high", None])
def test_products_are_exact_whatever_the_program_has_set(coarse: str | None) -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        if coarse == "high":
            torch.set_float32_matmul_precision("high")
        elif coarse is not None:
            matmul.fp32_precision = coarse
        kept = (matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision, torch.get_num_threads())
        with exact_products() as threads:
            assert threads == kept[2]
            assert torch.get_num_threads() == 1
            A, B = gaussian(64, 256, seed=1), gaussian(256, 64, seed=2)
            want = B.double() @ A.double()
            assert float((B @ A - want).norm() / want.norm()) < 1e-6
        assert (matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision, torch.get_num_threads()) == kept
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_and_their_index(tmp_path: Path, shards: int) -> None:
    tensors = small_tensors()
    write_base(tmp_path / "base", tensors, shards=shards)
    written = []
    adapter = random_adapter(tmp_path / "a", SMALL_SHAPES)
    merged = MergedAdapters([Adapter.open(adapter)], [1.0])
    facts = fold_into(
        tmp_path / "base",
        merged,
        tmp_path / "out",
        key="k",
        progress=lambda count, total: written.append((count, total)),
    )
    got = load_all(tmp_path / "out")
    assert set(got) == set(tensors)
    for name, base in tensors.items():
        if name.removesuffix(".weight") in SMALL_SHAPES:
            assert torch.equal(got[name], round_directly(base.double() + dense_delta(adapter, name), BF16))
        else:
            assert torch.equal(got[name], base)
    for path in (tmp_path / "base").glob("model*"):
        new = tmp_path / "out" / path.name
        assert new.stat().st_size == path.stat().st_size or path.suffix == ".json"
        if path.suffix == ".safetensors":
            assert read_header(new).raw == read_header(path).raw
        else:
            assert json.loads(new.read_text()) == json.loads(path.read_text())
    sizes = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert facts["bytes"] == sizes == sum(count for count, _ in written)
    assert {total for _, total in written} == {sizes}
    assert (facts["tensors"], facts["changed"]) == (4, 2)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype(tmp_path: Path, dtype: str, shards: int) -> None:
    tensors = {**small_tensors(), "mask": torch.ones(3, dtype=torch.uint8), "scalar": torch.tensor(2.0)}
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    write_base(tmp_path / "base", tensors, shards=shards, config=config)
    adapter = random_adapter(tmp_path / "a", SMALL_SHAPES)
    fold(tmp_path / "base", [adapter], tmp_path / "out", dtype=dtype)
    got, wanted = load_all(tmp_path / "out"), getattr(torch, dtype)
    for name, base in tensors.items():
        assert got[name].dtype == (torch.uint8 if name == "mask" else wanted)
        assert got[name].shape == base.shape
        if name.removesuffix(".weight") not in SMALL_SHAPES:
            assert torch.equal(got[name], base.to(got[name].dtype))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == config["text_config"]["dtype"] == dtype
    if shards == 2:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in got.values())


def test_what_goes_along(small: Small) -> None:
    files = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    files += ["vocab.json", "generation_config.json", "special_tokens_map.json", "LICENSE", "modeling_x.py"]
    files += ["additional_chat_templates/rag.jinja"]
    for name in files:
        (small.base / name).parent.mkdir(exist_ok=True)
        (small.base / name).write_text(name)
    for name in ("README.md", "pytorch_model.bin", "optimizer.pt", "adapter_model.safetensors"):
        (small.base / name).write_text("not part of the model")
    config = {
        "model_type": "llama",
        "quantization_config": {"quant_method": "bitsandbytes"},
        "tie_word_embeddings": True,
    }
    (small.base / "config.json").write_text(json.dumps(config))  # dequantised: the config still says otherwise
    fold(small.base, [small.adapter], small.out)
    found = sorted(p.relative_to(small.out).as_posix() for p in small.out.rglob("*") if p.is_file())
    assert found == sorted([*files, "config.json", "done.json", "model.safetensors"])
    assert all((small.out / name).read_text() == name for name in files)
    assert json.loads((small.out / "config.json").read_text()) == {"model_type": "llama", "tie_word_embeddings": True}
    umask = os.umask(0)
    os.umask(umask)
    assert (small.out / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert store.verify(small.out) is not None


def test_without_copying_in_the_kernel(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    fold(small.base, [small.adapter], small.out)
    want = (small.out / "model.safetensors").read_bytes()
    calls = []

    def refuses(source: int, target: int, count: int, offset_src: int) -> int:
        """Ten bytes, then no more."""
        calls.append(count)
        if len(calls) > 1:
            raise OSError(18, "Invalid cross-device link")
        return os.write(target, os.pread(source, 10, offset_src))

    monkeypatch.setattr(os, "copy_file_range", refuses, raising=False)
    fold(small.base, [small.adapter], small.out)
    assert calls
    assert (small.out / "model.safetensors").read_bytes() == want
    monkeypatch.delattr(os, "copy_file_range")
    fold(small.base, [small.adapter], small.out)
    assert (small.out / "model.safetensors").read_bytes() == want


def test_a_long_shard_is_synced_while_it_is_written(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_shard, "_FLUSH_BYTES", 10)
    fold(small.base, [small.adapter], small.out)
    assert store.verify(small.out) is not None

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fold_shard.os, "fsync", fails)
    with pytest.raises(UserError, match=r"output .*expected to write it, found Input/output error"):
        fold(small.base, [small.adapter], small.out.with_name("other"))


def test_snapshots_replace_the_base(tmp_path: Path) -> None:
    write_base(tmp_path / "base", small_tensors())
    random_adapter(tmp_path / "run/a", SMALL_SHAPES)
    ledger = Ledger.start(tmp_path / "run", {"name": "b", "revision": None, "files": {}})
    q, up, norm = ("model.layers.0.q_proj.weight", "model.layers.0.up_proj.weight", "model.norm.weight")
    value = gaussian(12, 8, seed=50)
    coefficients = {up: Coefficients.scalar([1.0])}
    ledger.record(1, ["a"], "x", coefficients, snapshot=write_snapshot(tmp_path / "run", 1, {q: value}))
    facts = fold_into(tmp_path / "base", ledger.view(), tmp_path / "out", key="k")
    got = load_all(tmp_path / "out")
    assert torch.equal(got[q], value.to(BF16))
    assert torch.equal(got[norm], small_tensors()[norm])
    assert facts["delta_norms"][q] == pytest.approx(float((value - small_tensors()[q].float()).norm()), rel=1e-5)
    random_adapter(tmp_path / "run/b", SMALL_SHAPES, seed=4)
    ledger.record(2, ["b"], "linear", {name: Coefficients.scalar([1.0]) for name in (q, up)})
    fold_into(tmp_path / "base", ledger.view(), tmp_path / "out", key="k", dtype="float32")
    want = value.double() + dense_delta(tmp_path / "run/b", q)
    torch.testing.assert_close(load_all(tmp_path / "out")[q].double(), want, rtol=1e-6, atol=1e-7)


MEMORY_SCRIPT = """
import resource, sys
from bam_lora.folding import fold
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
fold(sys.argv[1], [sys.argv[2]], sys.argv[3])
before = peak()
fold(sys.argv[4], [sys.argv[5]], sys.argv[6])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in kilobytes")
def test_memory_stays_at_a_few_blocks(small: Small, tmp_path: Path) -> None:
    """A base of 160 MB in one shard; the small one first, so that what libraries need once is not counted."""
    shapes = {f"m{n}": (4000, 1000) for n in range(10)}
    write_base(tmp_path / "large", {f"{m}.weight": torch.full(s, 0.5) for m, s in shapes.items()})
    adapter = random_adapter(tmp_path / "b", shapes, rank=8)
    arguments = [small.base, small.adapter, small.out, tmp_path / "large", adapter, tmp_path / "out2"]
    command = [sys.executable, "-c", MEMORY_SCRIPT, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert int(output) < 64e6
