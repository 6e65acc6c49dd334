"""Axolotl: what its documentation has for QLoRA on one GPU, with its own kernels, through its own functions.

Its packing goes by its own order (documents cut at the length, rows filled by its sampler), so its curve is not
compared with the others' step by step.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peer_recording import Recorder, effective
from peer_settings import Settings

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""Its own Triton kernels for LoRA."""
_LIGER = {  # for the rest, also for cross-entropy with the output head
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_rope": True,
    "liger_rms_norm": True,
    "liger_glu_activation": True,
    "liger_fused_linear_cross_entropy": True,
}


def train(settings: Settings, recorder: Recorder, folder: Path) -> dict[str, Any]:
    """Trains, and returns what was really used."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import execute_training, setup_model_and_trainer

    file = folder / "axolotl.yaml"
    file.write_text(json.dumps(config(settings, folder)))  # JSON is YAML
    resolved = load_cfg(str(file))
    trainer = setup_model_and_trainer(resolved, load_datasets(cfg=resolved, cli_args=TrainerCliArgs()))[0]
    recorder.attach(trainer)
    execute_training(resolved, trainer, None)
    names = ("sample_packing", *KERNELS, "plugins", "sdpa_varlen")
    return effective(
        trainer,
        own={name: resolved.get(name) for name in names},
        not_as_set="rows: packed by axolotl in its own order; adapter's start: after its own seeding",
    )


def config(settings: Settings, folder: Path) -> dict[str, Any]:
    """The YAML of a job."""
    return {
        "base_model": settings.base,
        "load_in_4bit": True,
        "adapter": "qlora",
        "lora_r": settings.rank,
        "lora_alpha": 2 * settings.rank,
        "lora_dropout": 0.0,  # its kernels want none
        "lora_target_linear": True,
        "datasets": [{"path": settings.text, "ds_type": "json", "type": "completion", "field": "text"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "val_set_size": 0.0,
        "sequence_len": settings.length,
        "sample_packing": True,
        "pad_to_sequence_len": True,  # as its examples do: rows of one shape
        "micro_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "optimizer": settings.optimizer,
        "lr_scheduler": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": settings.seed,
        "bf16": settings.on_gpu,  # it has no switch for bf16 on a CPU, where it is only tried
        "tf32": settings.on_gpu,
        "gradient_checkpointing": settings.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if settings.checkpointing else None,
        "save_strategy": "no",
        "attn_implementation": attention(settings),
        **(_LIGER if settings.on_gpu else {}),
        **dict.fromkeys(KERNELS, settings.on_gpu),  # it turns them on by itself, even where they cannot run
    }


def attention(settings: Settings) -> str:
    """Flash attention where it is installed; else sdpa, whose packed rows axolotl sends to torch's varlen kernel."""
    if settings.attention is not None:
        return settings.attention
    return "flash_attention_2" if settings.on_gpu and find_spec("flash_attn") else "sdpa"
