"""The bases and recipes of the estimates' benchmark: the 8 M base, and random Llamas of about 100 M and 500 M.

A case is a base with a bare recipe ("8m"), which trains a few steps and scores next to nothing, or with an ordinary one
("8m-text"): replay, every branch and merged model scored on dozens of documents in the default batches, a text
continued, and so many steps that batches come in ever new lengths.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for common/, as scripts are run by path
from common.random_base import given_or_random_base

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 6144},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12, "vocab_size": 16384},
    "500m": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 24,
             "num_key_value_heads": 8, "vocab_size": 32768},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Random weights, the 8 M base's tokenizer; memory does not depend on values."""
TRAINING: dict[str, dict[str, Any]] = {
    "8m": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "checkpointing": False},
    "tiny": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "checkpointing": False},
    "100m": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "checkpointing": False},
    "500m": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "checkpointing": True},
    "8b": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "checkpointing": True},
}
TEXT: dict[str, dict[str, Any]] = {
    "8m": {"tokens": 120_000, "documents": 60, "training": TRAINING["8m"]},
    "tiny": {"tokens": 16_000, "documents": 2, "training": TRAINING["8m"]},
    "100m": {"tokens": 24_000, "documents": 12,
             "training": {**TRAINING["100m"], "per_device_train_batch_size": 2, "checkpointing": True}},
}  # fmt: skip
"""The bases that have an ordinary recipe, too: training tokens, documents of each evaluation set."""
LENGTH = 256
STEPS = 3  # of a branch


def cases() -> list[str]:
    """Names of all cases."""
    return [*TRAINING, *(f"{name}-text" for name in TEXT)]


def base_folder(case: str, data: Path, work: Path) -> Path:
    """The folder of a case's base: the given 8 M one, or a random one, made on the first call."""
    return given_or_random_base(case.removesuffix("-text"), SHAPES, data, work, tied=False)


def recipe_of(case: str, base: Path, data: Path) -> dict[str, Any]:
    """The recipe of a case, as plain types."""
    name = case.removesuffix("-text")
    return _bare(name, base, data) if name == case else _ordinary(name, base, data)


def _ordinary(name: str, base: Path, data: Path) -> dict[str, Any]:
    """As a user would write it: all that is not said here is at its default."""
    text = TEXT[name]
    files = {
        key: data / "data" / f"{key}.jsonl" for key in ("de_docs.train", "en_books", "de_docs.valid", "en_docs.valid")
    }
    return {
        "base": str(base),
        "output": "run",
        "data": {
            "target": [{"path": str(files["de_docs.train"]), "tokens": text["tokens"]}],
            "replay": [{"path": str(files["en_books"])}],
            "replay_share": 0.2,
            "sequence_length": LENGTH,
        },
        "bam": {"slices": 4, "branches": 2},
        "training": {**text["training"], "learning_rate": 1e-3},
        "evaluation": {
            "target": [{"path": str(files["de_docs.valid"]), "documents": text["documents"]}],
            "source": [{"path": str(files["en_docs.valid"]), "documents": text["documents"]}],
            "samples": ["Die Funktion"],
        },
    }


def _bare(name: str, base: Path, data: Path) -> dict[str, Any]:
    """Four slices, two branches, three steps a branch, with checkpoints inside, the merged models scored."""
    training = TRAINING[name]
    per_step = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * LENGTH
    sets = {
        "target": [{"path": str(data / "data" / "de_docs.valid.jsonl"), "documents": 1, "set": "german"}],
        "source": [{"path": str(data / "data" / "en_docs.valid.jsonl"), "documents": 1, "set": "english"}],
    }
    return {
        "base": str(base),
        "output": "run",
        "data": {
            "target": [{"path": str(data / "data" / "de_docs.train.jsonl"), "tokens": 4 * STEPS * per_step}],
            "sequence_length": LENGTH,
        },
        "bam": {"slices": 4, "branches": 2},
        "lora": {"r": 32},
        "training": {**training, "learning_rate": 1e-4, "warmup_steps": 0, "save_steps": 1, "logging_steps": 1},
        "evaluation": {**sets, "branches": False},
    }
