"""New tokens on real German text and a real small base: shorter text, better scores, a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bam_lora.base import load_tokenizer
from bam_lora.loop import run
from bam_lora.recipe import recipe_from_dict
from tests.conftest import write_jsonl

pytestmark = pytest.mark.slow
TRAIN_BYTES = 200_000


def german(data: Path, folder: Path) -> Path:
    texts: list[str] = []
    with (data / "data" / "de_docs.train.jsonl").open(encoding="utf-8") as file:
        while sum(len(text.encode()) for text in texts) < TRAIN_BYTES:
            texts.append(json.loads(file.readline())["text"])
    return write_jsonl(folder / "german.jsonl", texts)


def trained(data: Path, folder: Path, name: str, **changed: Any) -> dict[str, Any]:
    held_out = {
        role: [{"path": str(data / "data" / f"{language}_docs.valid.jsonl"), "documents": 8, "set": language}]
        for role, language in (("target", "de"), ("source", "en"))
    }
    values = {
        "base": str(data / "models" / "en-docs-8m"),
        "output": "unused",
        "data": {"target": [{"path": str(folder / "german.jsonl")}], "sequence_length": 256},
        "bam": {"slices": 2, "branches": 2},
        "training": {
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0.1,
            "checkpointing": False,
        },
        "evaluation": {**held_out, "batch_size": 4, "branches": False},
    }
    return run(recipe_from_dict(values | changed), folder / name)


def test_new_tokens_shorten_german_and_learn_it_better(bench_data: Path, tmp_path: Path) -> None:
    import transformers

    german(bench_data, tmp_path)
    plain = trained(bench_data, tmp_path, "plain")
    grown = trained(bench_data, tmp_path, "grown", vocabulary={"tokens": 1000})
    before, after = plain["summary"], grown["summary"]
    assert after["target_before"] == pytest.approx(before["target_before"], rel=1e-9), "as the base came, in both"
    assert after["source_before"] == pytest.approx(before["source_before"], rel=1e-9)
    assert after["target_after"] < before["target_after"]
    held_out = {one["set"]: one for one in grown["vocabulary"]["sets"]}
    assert held_out["de"]["tokens_after"] < 0.65 * held_out["de"]["tokens_before"]
    assert held_out["en"]["tokens_after"] <= held_out["en"]["tokens_before"]
    assert held_out["en"]["words_changed"] < 0.15 < held_out["de"]["words_changed"]
    assert grown["cost"]["train_tokens"] < 0.65 * plain["cost"]["train_tokens"]
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "grown" / "model", output_loading_info=True
    )
    assert not loaded["missing_keys"]
    tokenizer = load_tokenizer(tmp_path / "grown" / "model")
    text = "Die Datenbank enthält größere Tabellen, die Sie prüfen müssen."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    more = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokenizer.decode(more[0], skip_special_tokens=True).startswith(text)
