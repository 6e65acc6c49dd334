"""The peer: what a careful user of TRL writes for the same tokens, as a plain script in a process of its own.

One QLoRA run with `SFTTrainer` over the same German text, packed by TRL, fp32 checkpoints off, the adapter saved.
Prints the seconds from the start of the process to the saved adapter as its last line.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STARTED = time.time()
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as bam_lora sets it, so that both wait in the same way


def main(recipe_file: Path, output: Path) -> None:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from bam_lora.recipe import load_recipe

    recipe = load_recipe(recipe_file)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base)
    source = recipe.data.target[0]
    assert source.tokens is not None
    data = load_dataset("json", data_files=source.path, split="train").remove_columns(["source"])
    data = data.select(range(documents_for(data["text"], tokenizer, source.tokens)))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(recipe.base, quantization_config=quantization, dtype=torch.bfloat16)
    training = recipe.training
    arguments = SFTConfig(
        output_dir=str(output),
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        optim=training.optim,
        num_train_epochs=1,
        max_length=recipe.data.sequence_length,
        packing=True,
        packing_strategy="bfd_split",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
    )
    config = LoraConfig(
        r=recipe.lora.r, lora_alpha=recipe.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=config)
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"])
    trainer.train()
    trainer.save_model(str(output))
    print(f"{tokens} {time.time() - STARTED:.3f}")


def documents_for(texts: list[str], tokenizer: object, tokens: int) -> int:
    """How many documents, in order, hold about so many tokens."""
    total = 0
    for count, text in enumerate(texts, start=1):
        total += len(tokenizer(text)["input_ids"]) + 1  # type: ignore[operator]
        if total >= tokens:
            return count
    return len(texts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
