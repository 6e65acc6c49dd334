"""One script in the style of TRL's documentation, with `SFTTrainer` or `BamTrainer`: the class and `bam=` differ.

    python script.py plain|bam SETTINGS.json OUTPUT

Both load the base in NF4, tokenise and pack the same documents, train fp32 adapters, and write the result: the
adapter for plain, the merged and folded model for Branch-and-Merge. The last line it prints is JSON: the seconds since
the start of the process at which each part was over.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.time()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def main(way: str, settings: dict[str, Any], output: Path) -> None:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from bam_lora import BamConfig, BamTrainer

    passed = {"imports": time.time() - STARTED}
    rows = load_dataset("json", data_files=settings["text"], split="train").select_columns(["text"])
    rows = rows.select(range(settings["documents"]))
    arguments: dict[str, Any] = {
        "model": settings["base"],
        "args": SFTConfig(**arguments_of(settings, output)),
        "train_dataset": rows,
        "processing_class": AutoTokenizer.from_pretrained(settings["base"]),
        "peft_config": LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM"),
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    }
    if way == "bam":
        bam = BamConfig(slices=settings["slices"], branches=settings["branches"])
        trainer: Any = BamTrainer(**arguments, bam=bam)
    else:
        trainer = SFTTrainer(**arguments)
        for parameter in trainer.model.parameters():  # TRL has the adapter of a quantised base in bf16
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    passed["constructed"] = time.time() - STARTED
    trainer.train()
    passed["trained"] = time.time() - STARTED
    if way == "plain":  # the other result lies in the run directory's model/ already
        trainer.save_model(str(output / "adapter"))
    passed["saved"] = time.time() - STARTED
    print(json.dumps({"passed": passed, "steps": trainer.state.global_step}))


def arguments_of(settings: dict[str, Any], output: Path) -> dict[str, Any]:
    """Fields of `SFTConfig`, the same for both."""
    import torch

    return {
        "output_dir": str(output),
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": settings["accumulation"],
        "num_train_epochs": 1,
        "max_length": settings["sequence_length"],
        "packing": True,
        "packing_strategy": "bfd_split",
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "bfloat16"},
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "steps" if settings["save_steps"] else "no",
        "save_steps": settings["save_steps"] or 500,
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
