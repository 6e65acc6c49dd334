"""What goes wrong in a script is told in its own words: arguments of `BamTrainer`, not keys of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN
from datasets import Dataset, DatasetDict
from trainer_runs import bam_trainer, rows
from transformers import default_data_collator

from bam_lora import BamConfig, BamTrainer, UserError


def test_mistakes_are_told_in_the_words_of_a_script(tmp_path: Path, tiny_base: Path) -> None:
    splits = DatasetDict(train=rows(GERMAN), test=rows(GERMAN))
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"train_dataset": splits}, r"train_dataset: .* found splits train, test\. Pass one.* dataset\['train'\]"),
        ({}, {"bam": default_data_collator}, r"bam: expected a BamConfig, found function"),
        ({}, {"replay_datasets": rows(ENGLISH)}, "replay_datasets: .* Perhaps replay_dataset is meant"),
        ({}, {"tokenizer": None}, "tokenizer: expected an argument of BamTrainer or SFTTrainer"),
        ({}, {"train_dataset": Dataset.from_dict({"body": GERMAN})}, r"found columns body\. .*dataset_text_field"),
        ({}, {"bam": BamConfig(slices=500)}, r"train_dataset: expected enough text .* or fewer BamConfig\(slices\)"),
        ({}, {"bam": BamConfig(merge="linar")}, r"^BamConfig\(merge\): expected linear"),
        ({}, {"bam": BamConfig(weights="learned")}, r"selection_dataset\['target'\]: .* not in eval_dataset"),
        ({"max_steps": 1}, {}, r"^args.max_steps: .* or lower BamConfig\(slices\)"),
        ({"max_length": 4096}, {}, "^args.max_length: expected at most 256"),
        ({"warmup_steps": 4000}, {}, "^args.warmup_steps: expected fewer than"),
    ]  # fmt: skip
    for number, (args, changes, expected) in enumerate(cases):
        with pytest.raises(UserError, match=expected):
            bam_trainer(tmp_path / str(number), tiny_base, args=args, **changes).train()
    with pytest.raises(UserError, match=r"args: expected an SFTConfig.* found dict"):
        BamTrainer(str(tiny_base), {"output_dir": "x"}, train_dataset=rows(GERMAN))
