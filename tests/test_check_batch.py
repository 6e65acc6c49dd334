"""The advice of `check` on batches of packed sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import GERMAN, write_jsonl

from bam_lora import check_batch
from bam_lora.check import check_recipe
from bam_lora.recipe import recipe_from_dict

WIDTHS, PARAMETERS = 256 * 8, 8_392_960  # of the base that was measured (docs/log.md)


@pytest.mark.parametrize(
    ("batch", "length", "better"),
    [(4, 256, 4), (8, 256, 4), (2, 512, 2), (8, 512, 2), (4, 1024, 1), (6, 512, 2), (7, 1024, 1), (1, 100_000, 1)],
)
def test_the_batch_is_the_largest_divisor_that_costs_little(batch: int, length: int, better: int) -> None:
    assert check_batch.smaller_batch(batch, length, WIDTHS, PARAMETERS) == better


def test_a_large_model_with_short_rows_keeps_its_batch() -> None:
    assert check_batch.smaller_batch(4, 2048, 4096 * 32, 8_000_000_000) == 4


def described(base: Path, folder: Path, attention: str = "sdpa", **training: Any) -> str:
    write_jsonl(folder / "german.jsonl", GERMAN[:8])
    values = {
        "base": str(base),
        "output": str(folder / "run"),
        "data": {"target": [{"path": str(folder / "german.jsonl")}], "sequence_length": 128},
        "lora": {"r": 4},
        "quantization": {"attention": attention},
        "training": training,
    }
    return check_recipe(recipe_from_dict(values))


def batch_note(base: Path, folder: Path, *, by_document: bool) -> bool:
    """Whether a large batch is advised against for a machine that goes through documents apart, or does not."""
    values = {"base": str(base), "output": "run", "data": {"target": [{"path": "x.txt"}], "sequence_length": 128},
              "training": {"per_device_train_batch_size": 64}}  # fmt: skip
    return bool(check_batch.batch_lines(recipe_from_dict(values), base, 10**5, by_document=by_document))


def test_check_names_a_batch_and_its_accumulation(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = described(tiny_base, tmp_path, per_device_train_batch_size=64, gradient_accumulation_steps=2)
    note = next(line for line in text.splitlines() if "packed sequences" in line)
    sizes = {key: int(note.split(f"{key}: ")[1].split()[0]) for key in
             ("per_device_train_batch_size", "gradient_accumulation_steps")}  # fmt: skip
    assert sizes["per_device_train_batch_size"] < 64
    assert sizes["per_device_train_batch_size"] * sizes["gradient_accumulation_steps"] == 128
    assert "64 packed sequences of 128 tokens are one row of 8,192" in note
    assert "packed sequences" not in described(tiny_base, tmp_path, per_device_train_batch_size=1)
    assert "packed sequences" not in described(tiny_base, tmp_path, "packed", per_device_train_batch_size=64)
    assert batch_note(tiny_base, tmp_path, by_document=False)
    assert not batch_note(tiny_base, tmp_path, by_document=True)
    monkeypatch.setattr(check_batch, "choose_attention", lambda *given: "flash_attention_2")
    assert "packed sequences" not in described(tiny_base, tmp_path, per_device_train_batch_size=64)
