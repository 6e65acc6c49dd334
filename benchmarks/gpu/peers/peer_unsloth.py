"""Unsloth: `FastLanguageModel`, its checkpointing and packing, in TRL's `SFTTrainer`, as its notebooks have it.

Written against the source of 2026.10.7 and not yet run: it refuses to be imported without a GPU (environments.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peer_recording import Recorder, effective
from peer_settings import Settings

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer but the output head of the models that are measured; it does not take "all-linear" of PEFT's."""


def train(settings: Settings, recorder: Recorder, folder: Path) -> dict[str, Any]:
    """Trains, and returns what was really used."""
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(folder / "compiled")  # else in the current folder
    import unsloth  # before the others, which it patches  # noqa: I001
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=settings.base,
        max_seq_length=settings.length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing(settings),
        random_state=settings.seed,
    )
    model = unsloth.FastLanguageModel.get_peft_model(model, **adapter(settings))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(settings, folder)),
        train_dataset=Dataset.from_dict({"text": settings.texts()}),
        processing_class=tokenizer,
    )
    recorder.attach(trainer)
    trainer.train()
    return effective(
        trainer,
        own={"use_gradient_checkpointing": checkpointing(settings)},
        not_as_set="attention: unsloth's own choice; rows: as its patch of TRL packs them",
    )


def adapter(settings: Settings) -> dict[str, Any]:
    """Arguments of `get_peft_model`."""
    return {
        "r": settings.rank,
        "lora_alpha": 2 * settings.rank,
        "lora_dropout": 0,  # its kernels want none
        "bias": "none",
        "target_modules": list(TARGETS),
        "use_gradient_checkpointing": checkpointing(settings),
        "random_state": settings.seed,
    }


def checkpointing(settings: Settings) -> str | bool:
    """Its own kind, which keeps activations in the machine's memory, or none."""
    return "unsloth" if settings.checkpointing else False


def arguments(settings: Settings, folder: Path) -> dict[str, Any]:
    """Fields of `SFTConfig`: as for TRL at its best, where unsloth does not do it itself."""
    return {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": settings.optimizer,
        "max_length": settings.length,
        "packing": True,
        "packing_strategy": "bfd_split",
        "bf16": True,
        "gradient_checkpointing": settings.checkpointing,
        "seed": settings.seed,
        "data_seed": settings.seed if settings.order_seed is None else settings.order_seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
