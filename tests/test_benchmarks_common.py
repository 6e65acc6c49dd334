"""What the benchmarks share: a result names the code that gave it, and a random base is made once, whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from common.provenance import provenance_of
from common.random_base import given_or_random_base

SHAPES = {
    "small": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1},
}  # fmt: skip


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The changes that git tells of."""
    lines: list[str] = []

    def status(command: list[str], **_: object) -> str:
        return "".join(f" M {line}\n" for line in lines) if "status" in command else "0" * 40

    monkeypatch.setattr(subprocess, "check_output", status)
    return lines


def test_a_changed_tree_gives_no_result(changed: list[str]) -> None:
    changed.append("bam_lora/fold.py")
    with pytest.raises(SystemExit, match="uncommitted changes"):
        provenance_of("make bench", 2, allow_dirty=False)
    facts = provenance_of("make bench", 2, allow_dirty=True)
    assert (facts["dirty"], facts["command"], facts["threads"], facts["device"]) == (True, "make bench", 2, "cpu")


def test_what_a_benchmark_writes_is_no_change(changed: list[str]) -> None:
    changed += ["benchmarks/fold/results/2026-01-01.json", "docs/results.md"]
    assert provenance_of("make bench", 1, allow_dirty=False, written=["docs/results.md"])["dirty"] is False
    with pytest.raises(SystemExit, match="uncommitted changes"):
        provenance_of("make bench", 1, allow_dirty=False)


@pytest.mark.parametrize("tied", [True, False])
def test_a_random_base_has_the_shape_and_the_tokenizer(tiny_base: Path, tmp_path: Path, tied: bool) -> None:
    from safetensors import safe_open

    models = tmp_path / "models"
    models.mkdir()
    (models / "en-docs-8m").symlink_to(tiny_base)
    folder = given_or_random_base("small", SHAPES, tmp_path, tmp_path / "work", tied=tied)
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in SHAPES["small"]} == SHAPES["small"]
    assert config["head_dim"] == 16
    assert (folder / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) is not tied
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert given_or_random_base("small", SHAPES, tmp_path, tmp_path / "work", tied=tied) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert given_or_random_base("8m", SHAPES, tmp_path, tmp_path / "work", tied=tied) == models / "en-docs-8m"
