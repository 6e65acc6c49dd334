"""Another trainer class: preferences with TRL's `DPOTrainer`, by Branch-and-Merge.

    python examples/dpo.py

Under a minute on two cores. The tiny English model sees the first words of a German story with two continuations, and
is to prefer the German one to the English one. Any TRL trainer class that takes a model, a data set and a `LoraConfig`
can train the branches; its own arguments and data go in as they are. Such examples are dealt out to the slices by
number, not by tokens.
"""

from datasets import Dataset
from peft import LoraConfig
from tiny import BASE, read
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from bam_lora import BamConfig, BamTrainer


def pairs(documents: int, seed: int) -> Dataset:
    """Beginnings of German stories, each with its own next words as chosen and English ones as rejected."""
    german, english = ([text.split() for text in read(name, documents, seed)["text"]] for name in ("german", "english"))
    return Dataset.from_dict(
        {
            "prompt": [" ".join(words[:6]) for words in german],
            "chosen": [" " + " ".join(words[6:30]) for words in german],
            "rejected": [" " + " ".join(words[6:30]) for words in english],
        }
    )


trainer = BamTrainer(
    model=BASE,
    bam=BamConfig(slices=4, branches=2),
    trainer_cls=DPOTrainer,
    args=DPOConfig(
        output_dir="runs/dpo",
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        max_length=128,
        logging_steps=5,
        use_cpu=True,
    ),
    train_dataset=pairs(96, seed=1),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()

# Each branch has measured itself against the base of its iteration; this is the result against the original one.
judge = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(trainer.directory.model),
    ref_model=AutoModelForCausalLM.from_pretrained(BASE),
    processing_class=trainer.processing_class,
    args=DPOConfig(output_dir="runs/dpo-judge", max_length=128, use_cpu=True),
    train_dataset=pairs(1, seed=3),
    eval_dataset=pairs(16, seed=2),
)
judged = judge.evaluate()
print(f"margin {judged['eval_rewards/margins']:.3f}, loss {judged['eval_loss']:.3f} (0.693 is the base's)")
