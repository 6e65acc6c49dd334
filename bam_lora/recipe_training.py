"""The recipe's sections on how a branch is trained: the base under its adapter, and TRL's arguments."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from bam_lora import sft_arguments
from bam_lora.recipe_sources import Section
from bam_lora.recipe_values import findings_error


class Quantization(Section):
    """The frozen base under the adapter while a branch trains; folding always uses the full weights."""

    bits: Literal[4, 8, 16] = Field(default=4, description="Bits of a weight of the frozen base; 16: not quantised.")
    type: Literal["nf4", "fp4"] = Field(default="nf4", description="4-bit number format.")
    double: bool = Field(
        default=True, description="Quantise the quantisation constants too (0.4 bits less per weight)."
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="What activations are computed in; float16 for GPUs older than Ampere."
    )
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto",
        description="By what attention is computed. `packed`: document by document, by torch alone, for common models "
        "(docs/memory.md). `auto`: flash attention 2 where the package flash-attn and GPU (Ampere or newer), model and "
        "format fit; else `packed` where it fits; else transformers' choice, `sdpa`. A run keeps what it began with.",
    )


class Training(Section):
    """How a branch is trained: the keys below, and any other field of TRL's `SFTConfig` by its own name."""

    model_config = ConfigDict(extra="allow")

    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    per_device_train_batch_size: int = Field(default=4, ge=1, description="Sequences per device and step.")
    gradient_accumulation_steps: int = Field(
        default=4, ge=1, description="Batches whose gradients are added up for one step."
    )
    num_train_epochs: float = Field(default=1.0, gt=0, description="Passes of a branch over its slice.")
    max_steps: int = Field(
        default=-1, ge=-1, description="Steps of the whole run, shared out over the branches; -1: all the data."
    )
    lr_scheduler_type: str = Field(
        default="cosine", description="Learning-rate schedule, started afresh by every branch."
    )
    warmup_steps: float = Field(
        default=0.03,
        ge=0,
        description="Warm-up of every branch: a share of its steps if below 1, else a number of steps.",
    )
    optim: str = Field(default="adamw_torch_fused", description="Optimizer, started afresh by every branch.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are clipped to this norm; 0: not clipped.")
    checkpointing: bool = Field(
        default=True, description="Recompute activations in the backward pass: slower, far less memory."
    )
    kernels: Literal["auto", "liger", "none"] = Field(
        default="auto",
        description="Fused kernels for norms, rotary embeddings and gated activations (docs/speed.md). `liger`: those "
        "of the package liger-kernel. `auto`: these on an NVIDIA GPU (Ampere or newer) where the package is there and "
        "knows the model; else none. A run keeps what it began with.",
    )
    logging_steps: int = Field(default=10, ge=1, description="A line of metrics every so many steps.")
    save_steps: int = Field(default=200, ge=1, description="A checkpoint inside a branch every so many steps.")
    save_total_limit: int = Field(default=2, ge=1, description="Checkpoints to keep while a branch trains.")

    @model_validator(mode="after")
    def _check_sft_fields(self) -> Training:
        given = self.model_dump(exclude_defaults=True)
        ours = set(type(self).model_fields) - sft_arguments.CHOICES
        if findings := sft_arguments.check({name: value for name, value in given.items() if name not in ours}):
            raise findings_error(findings)
        return self

    def sft_arguments(self) -> dict[str, Any]:
        """All of it as keyword arguments of `SFTConfig`.

        `max_steps` is still the whole run's, as the recipe says it; a branch takes its share from the plan.
        """
        values = self.model_dump(exclude={sft_arguments.KERNELS})
        values[sft_arguments.checkpointing_name()] = values.pop(sft_arguments.CHECKPOINTING)
        return values
