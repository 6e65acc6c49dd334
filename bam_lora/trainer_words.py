"""What the loop says in a recipe's words, in those of a script with a `BamTrainer`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from bam_lora.errors import UserError

_WORDS = (
    (r"the recipe this run was started with", "the arguments this run was started with"),
    (r"Use the old recipe or a new --output; --extend .* run\.", "Take them back, or another output_dir."),
    (r"--output\b", "args.output_dir"),
    (r"\bscript\.", ""),
    (r"\bdata\.target\b", "train_dataset"),
    (r"\bdata\.replay\b", "replay_dataset"),
    (r"\bdata\.sequence_length\b", "args.max_length"),
    (r"\bdata\.(replay_share|slicing_column|slicing)\b", r"BamConfig(\1)"),
    (r"\bdata\.chat_template\b", "processing_class.chat_template"),
    (r"\bbam\.merge\.(weights|scale)\b", r"BamConfig(\1)"),
    (r"\bbam\.merge(\.method)?(?=\W)", "BamConfig(merge)"),
    (r"\bbam\.(slices|branches|outer)\b", r"BamConfig(\1)"),
    (r"--set limits\.(hours|tokens)=", r"BamConfig(max_\1)="),
    (r"\blimits\.(hours|tokens)\b", r"BamConfig(max_\1)"),
    (r"give the same command again", "call train() again"),
    (r" \(`bam-lora check RECIPE --fit` chooses\)", ""),
    (r"\bevaluation\.batch_size\b", "args.per_device_eval_batch_size"),
    (r", a smaller evaluation\.window_bytes takes a new run", ""),
    (r"\bquantization\.compute_dtype: float16\b", "args.fp16"),
    (r"\bquantization\.compute_dtype: float32\b", "neither args.bf16 nor args.fp16"),
    (r" \(quantization\.bits\)", " (quantization_config)"),
    (r"\btraining\.checkpointing\b", "args.gradient_checkpointing"),
    (r"\btraining\.", "args."),
    (r"\blora\.", "peft_config."),
    (r"\bselection\.(target|source)\b", r"selection_dataset['\1']"),
    (r"\bevaluation\.(target|source)\b", r"eval_dataset['\1']"),
    (r"`evaluation`", "eval_dataset"),
    (r"\A(\S+: )?recipe: ", r"\1"),
)  # fmt: skip


@contextlib.contextmanager
def script_words() -> Iterator[None]:
    """Has errors that the user can put right name the arguments of a script, not the keys of a recipe."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for pattern, replacement in _WORDS:
            text = re.sub(pattern, replacement, text)
        raise (error if text == str(error) else type(error)(text)) from None
