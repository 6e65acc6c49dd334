"""The trainer of a recipe's branch: TRL's `SFTTrainer` on packed rows, as the recipe says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.base import Loading, device
from bam_lora.library_versions import seed_the_adapter


def adapter_config(arguments: Mapping[str, Any]) -> Any:
    """A `LoraConfig` of a causal language model, from its keyword arguments."""
    from peft import LoraConfig

    return LoraConfig(**arguments, task_type="CAUSAL_LM")


@dataclass(frozen=True)
class SftBranch:
    """Makes the trainer of one branch; a `branch.MakeTrainer`.

    Attributes:
        how: How the base was loaded.
        tokenizer: Its tokenizer.
        rows: Packed rows (`input_ids`, `seq_lengths`).
        adapter: Keyword arguments of `LoraConfig`.
        arguments: Fields of `SFTConfig`.
        steps: Optimizer steps.
        seed: Of the adapter and of the order of the rows.
        sequence_length: Tokens in a row at the most.
    """

    how: Loading
    tokenizer: Any
    rows: Any
    adapter: Mapping[str, Any]
    arguments: Mapping[str, Any]
    steps: int
    seed: int
    sequence_length: int

    def __call__(self, view: Any, output: Path, callbacks: Sequence[Any]) -> Any:
        """The trainer."""
        from trl import SFTConfig, SFTTrainer

        seed_the_adapter(self.seed)
        return SFTTrainer(
            view,
            args=SFTConfig(**self._arguments(output)),
            train_dataset=as_arrays(self.rows),
            processing_class=self.tokenizer,
            peft_config=adapter_config(self.adapter),
            callbacks=list(callbacks),
        )

    def _arguments(self, output: Path) -> dict[str, Any]:
        return {
            "warmup_steps": 0,
            "report_to": "none",
            "dataloader_pin_memory": device() in ("cuda", "xpu"),  # Metal has none, and warns
            **self.arguments,
            "output_dir": str(output),
            "max_steps": self.steps,
            "seed": self.seed,
            "data_seed": self.seed,
            "use_cpu": device() == "cpu",
            "bf16": self.how.compute_dtype == "bfloat16",
            "fp16": self.how.compute_dtype == "float16",
            "packing": True,
            "packing_strategy": "bfd_split",
            "max_length": self.sequence_length,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "save_strategy": "steps",
            "eval_strategy": "no",
            "disable_tqdm": True,
            "logging_nan_inf_filter": False,
        }


def as_arrays(rows: Any) -> Any:
    """Packed rows, their tokens and labels as arrays: lists take three times as long to become a batch."""
    import numpy

    columns = [name for name in ("input_ids", "labels") if name in rows.column_names]
    return rows.with_format("numpy", columns=columns, output_all_columns=True, dtype=numpy.int64)
