"""Which fields of `SFTConfig` a recipe's `training` may set, and which are said elsewhere or are the loop's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from bam_lora.recipe_values import Finding
from bam_lora.sft_fields import sft_fields

_EVALUATION = "say under `evaluation` what to score; a branch is not evaluated while it trains"
_COMPUTE = "say quantization.compute_dtype instead"
_CHECKPOINTING = "say training.checkpointing instead"
_LENGTH = "say data.sequence_length instead"
_PACKING = "the loop packs documents itself, apart from each other and without losing a token"
_DATASET = "the loop prepares the data itself; say under `data` what to read"
_DEVICE = "the device is found by itself; hide GPUs with CUDA_VISIBLE_DEVICES"
_ONE_PROCESS = "a branch trains in one process in this version; leave it out"
_RESUME = "a run resumes by itself; say training.save_steps for how often it saves"
_LAST_STEP = "a branch ends with its last step; leave it out"
_PUBLISH = "publish the finished model instead; leave it out"
_PROGRESS = "the run has a progress display of its own; leave it out"
_ANSWERS = "say `mode: chat`: then the answers are trained, and nothing else"
_TOKENIZER = "the base's own tokenizer is used as it is; leave it out"
_MODEL = "the loop loads the base itself; say `base`, `revision` and `quantization`"
_DO = "the loop decides what runs when; leave it out"
_ORDER = "the order of the data is the plan's; say data.slicing and seed"
_STEPS = "the plan fixes batches and steps; leave it out"
_SEED = "say `seed` instead, for the whole run"

_KERNELS = "say training.kernels: liger, or none, instead"

_ON_PLATEAU = "reduce_lr_on_plateau"

OWNED: dict[str, str] = {
    "output_dir": "say `output` instead",
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), _COMPUTE),
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), _CHECKPOINTING),
    "max_length": _LENGTH,
    "truncation_mode": _LENGTH,
    **dict.fromkeys(("packing", "packing_strategy", "padding_free", "pad_to_multiple_of"), _PACKING),
    "dataset_text_field": "say `text` at the source under `data` instead",
    **dict.fromkeys(("dataset_kwargs", "dataset_num_proc", "length_column_name", "label_names"), _DATASET),
    **dict.fromkeys(("remove_unused_columns", "dataloader_drop_last"), _DATASET),
    **dict.fromkeys(("shuffle_dataset", "train_sampling_strategy"), _ORDER),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), _ANSWERS),
    "chat_template_path": "say data.chat_template instead",
    **dict.fromkeys(("eos_token", "pad_token"), _TOKENIZER),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code", "use_cache"), _MODEL),
    "per_device_eval_batch_size": "say evaluation.batch_size instead",
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_packing"), _EVALUATION),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), _EVALUATION),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "prediction_loss_only"), _EVALUATION),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _DO),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _LAST_STEP),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _PUBLISH),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _PUBLISH),
    **dict.fromkeys(("resume_from_checkpoint", "ignore_data_skip", "enable_jit_checkpoint"), _RESUME),
    **dict.fromkeys(("restore_callback_states_from_checkpoint", "save_only_model", "save_strategy"), _RESUME),
    "save_on_each_node": _ONE_PROCESS,
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "local_rank"), _ONE_PROCESS),
    "use_cpu": _DEVICE,
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _KERNELS),
    "auto_find_batch_size": _STEPS,
    "logging_strategy": "say training.logging_steps instead",
    "logging_nan_inf_filter": "a loss that is not finite stops the branch; leave it out",
    "disable_tqdm": _PROGRESS,
}
"""Fields of `SFTConfig` that a recipe does not set under `training`, and what to do instead."""

RENAMED: dict[str, str] = {
    "warmup_ratio": "say warmup_steps instead: a number below 1 is a share of the steps",
    "max_seq_length": _LENGTH,
    "group_by_length": _ORDER,
    "evaluation_strategy": _EVALUATION,
    "no_cuda": _DEVICE,
    "overwrite_output_dir": _RESUME,
    "lr": "say learning_rate instead",
    "batch_size": "say per_device_train_batch_size instead",
}
"""Names from older versions or other tools, and what to say today."""

CHECKPOINTING = "checkpointing"
"""The recipe's own name for what transformers calls one thing in 5.17 and another in 5.23."""
KERNELS = "kernels"
"""The recipe's own, too: TRL deprecates its name for them."""
CHOICES = frozenset({"optim", "lr_scheduler_type"})
"""Of the recipe's own training keys, those whose choices only `SFTConfig` knows; the models check the others."""


def checkpointing_name() -> str:
    """What the installed transformers calls recomputing activations."""
    return "activation_checkpointing" if "activation_checkpointing" in sft_fields() else "gradient_checkpointing"


def settable() -> list[str]:
    """Names of the fields of `SFTConfig` that a recipe may set under `training`."""
    return [name for name in sft_fields() if name not in OWNED]


def check(values: Mapping[str, Any]) -> list[Finding]:
    """What is wrong with the keys of `training`, each by itself.

    Args:
        values: Keys as in the recipe; those at their default can be left out, which spares reading TRL's source.

    Returns:
        The findings, places relative to `training`.
    """
    findings: list[Finding] = []
    for name, value in values.items():
        if name != CHECKPOINTING and (message := _problem(str(name), value)):
            findings.append(((name,), message))
    return findings


def _problem(name: str, value: Any) -> str | None:
    if name in OWNED:
        return f"not set here: {OWNED[name]}"
    if name in RENAMED:
        return f"unknown key; {RENAMED[name]}"
    field = sft_fields().get(name)
    if field is None:
        near = difflib.get_close_matches(name, [CHECKPOINTING, KERNELS, *settable()], n=1)
        hint = f"did you mean {near[0]}?" if near else "it takes the fields of TRL's SFTConfig"
        return f"unknown key; {hint}"
    if not field.allows(value):
        near = difflib.get_close_matches(value, field.choices, n=1) if isinstance(value, str) else []
        return f"expected {field.expected}, found {value!r}" + (f"; did you mean {near[0]}?" if near else "")
    if name == "lr_scheduler_type" and value == _ON_PLATEAU:
        return f"{_ON_PLATEAU!r} needs evaluations inside a branch, which there are not; use another, such as cosine"
    return None
