"""A `BamTrainer`'s arguments as the recipe of its run directory, which status, report, compare and shrink read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from bam_lora.adapter_config import check_config
from bam_lora.bam_config import BamConfig
from bam_lora.kernels import LIGER, NONE
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.trainer_inputs import formatting_hash, tokenizer_hash
from bam_lora.trainer_models import ModelSource, TrainerLoading
from bam_lora.trainer_sets import NamedSet, TrainingSet
from bam_lora.trainer_words import script_words

# Fields of the trainer's arguments that change nothing in what is trained, or that the recipe has in its own words.
_SILENT = (
    "output_dir", "run_name", "report_to", "project", "logging", "log_", "disable_tqdm", "hub_", "push_to_hub",
    "save_", "eval_", "per_device_eval", "do_", "trackio", "dataloader_num_workers", "dataloader_pin_memory",
    "dataset_num_proc", "resume_from_checkpoint", "model_init_kwargs", "batch_eval_metrics", "prediction_loss_only",
    "include_", "use_cpu", "restore_callback_states", "local_rank", "ddp_",
)  # fmt: skip
# Of `training` in a recipe: what the report tells of.
_TRAINING = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
             "max_steps", "weight_decay", "max_grad_norm", "warmup_steps")  # fmt: skip


def describe_run(
    *, model: ModelSource, how: TrainerLoading, args: Any, peft: Any, bam: BamConfig, trainer: str,
    processing: Any, formatting: Any,
    target: Sequence[TrainingSet], replay: Sequence[TrainingSet], evaluation: Sequence[NamedSet],
    selection: Sequence[NamedSet],
) -> Recipe:  # fmt: skip
    """The run as a recipe; its sources name data sets of the script, with a hash of their content as revision.

    Raises:
        UserError: If something does not fit together; all of it at once, in the recipe's words.
    """
    check_config(Path("peft_config"), plain(peft.to_dict()))
    values = {
        "base": model.name,
        "revision": model.revision,
        "output": args.output_dir,
        "data": {
            "target": [one.source() for one in target],
            "replay": [one.source() for one in replay],
            "replay_share": bam.share(bool(replay)),
            "sequence_length": max(8, args.max_length or 0) if getattr(args, "max_length", None) else 2048,
            "slicing": bam.slicing,
            "slicing_column": bam.slicing_column,
            "deduplicate": bam.deduplicate,
            "contamination": bam.contamination,
        },
        "bam": {
            "slices": bam.slices,
            "branches": bam.branches,
            "merge": bam.merge_section(),
            "outer": dict(bam.outer),
        },
        "lora": _lora(peft),
        "quantization": {
            "bits": how.bits, "type": how.quant_type, "double": how.double, "compute_dtype": how.compute_dtype,
        },
        "training": _training(args),
        "evaluation": {
            **_sets(evaluation), "precision": "4bit" if how.bits == 4 else "16bit",
            "branches": bam.score_branches, "batch_size": args.per_device_eval_batch_size,
            "samples": list(bam.samples),
        },
        "selection": _sets(selection),
        "seed": args.seed,
        "keep": dict(bam.keep),
        "limits": {"hours": bam.max_hours, "tokens": bam.max_tokens},
        "script": {
            "trainer": trainer,
            "args": _arguments(args),
            "peft_config": plain(peft.to_dict()),
            "model": how.options,
            "formatting_func": formatting_hash(formatting, target[0].rows),
            "tokenizer": tokenizer_hash(processing),
        },
    }  # fmt: skip
    with script_words():
        return recipe_from_dict(values)


def plain(value: Any) -> Any:
    """A value in plain JSON types, the same in every process: sets sorted, other objects by their name."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return getattr(value, "__qualname__", None) or str(value)


def _arguments(args: Any) -> dict[str, Any]:
    values = plain(args.to_dict())
    kept = {name: value for name, value in values.items() if not name.startswith(_SILENT)}
    return dict(json.loads(json.dumps(kept, allow_nan=True), parse_constant=str))


def _training(args: Any) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in _TRAINING}
    values["lr_scheduler_type"] = plain(args.lr_scheduler_type)
    values["optim"] = plain(args.optim)
    values["kernels"] = LIGER if getattr(args, "use_liger_kernel", False) else NONE
    return values


def _lora(peft: Any) -> dict[str, Any]:
    targets = peft.target_modules
    if targets is None:
        targets = ["PEFT's choice for this model"]
    elif not isinstance(targets, str):
        targets = sorted(targets)
    elif targets != "all-linear":
        targets = [targets]
    return {
        "r": peft.r,
        "alpha": peft.lora_alpha,
        "target_modules": targets,
        "dropout": peft.lora_dropout,
        "rslora": peft.use_rslora,
        "init": "gaussian" if peft.init_lora_weights == "gaussian" else "default",
        "dora": peft.use_dora,
        "bias": peft.bias,
        "lora_bias": peft.lora_bias,
        "modules_to_save": sorted(peft.modules_to_save or []),
        "trainable_token_indices": peft.trainable_token_indices or [],
        "ensure_weight_tying": peft.ensure_weight_tying,
    }


def _sets(sets: Sequence[NamedSet]) -> dict[str, list[dict[str, Any]]]:
    return {role: [one.source() for one in sets if one.role == role] for role in ("target", "source")}
