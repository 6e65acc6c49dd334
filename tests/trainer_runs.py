"""What the tests of `BamTrainer` share: its arguments at a tiny size, and the plain trainer to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import ENGLISH, GERMAN
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from bam_lora import BamConfig, BamTrainer


def rows(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


def arguments(folder: Path, **changes: Any) -> SFTConfig:
    values: dict[str, Any] = {
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "max_length": 64,
        "packing": True,
        "packing_strategy": "bfd_split",
        "logging_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "seed": 11,
    }
    return SFTConfig(str(folder), **{**values, **changes})


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")


def plain_adapter(
    folder: Path, base: Path, args: SFTConfig, dataset: Dataset, **others: Any
) -> dict[str, torch.Tensor]:
    args.disable_tqdm = True
    transformers.set_seed(args.seed)  # TRL 1.10 does not, before it draws the adapter
    trainer = SFTTrainer(str(base), args=args, train_dataset=dataset, peft_config=lora(), **others)
    for module in trainer.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    trainer.model.save_pretrained(folder / "plain")
    return load_file(folder / "plain" / "adapter_model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, theirs[name]), name


def bam_trainer(folder: Path, base: Path, *, args: dict[str, Any] | None = None, **others: Any) -> BamTrainer:
    given: dict[str, Any] = {
        "train_dataset": rows(GERMAN),
        "replay_dataset": rows(ENGLISH),
        "eval_dataset": {"target": rows(GERMAN[::7]), "source": rows(ENGLISH[::9])},
        "peft_config": lora(),
        "bam": BamConfig(slices=4, branches=2),
    }
    return BamTrainer(str(base), arguments(folder, **(args or {})), **{**given, **others})
