"""German for a tiny English model: `sft_plain.py` trains with TRL, `sft_bam.py` is the same with Branch-and-Merge.

    python examples/sft_plain.py
    python examples/sft_bam.py
    diff examples/sft_plain.py examples/sft_bam.py

Under a minute each on two cores. Both print their evaluation before and after; the second leaves a run directory, for
`bam-lora status runs/sft_bam` and `bam-lora report runs/sft_bam`.
"""

from pathlib import Path

from peft import LoraConfig
from tiny import BASE, read, show
from trl import SFTConfig

from bam_lora import BamConfig, BamTrainer

trainer = BamTrainer(
    bam=BamConfig(slices=4, branches=2),
    model=BASE,
    args=SFTConfig(
        output_dir=f"runs/{Path(__file__).stem}",
        learning_rate=4e-3,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        max_length=128,
        packing=True,
        packing_strategy="bfd_split",
        logging_steps=20,
        use_cpu=True,
    ),
    train_dataset=read("german", 80, seed=1),
    eval_dataset={"target": read("german", 16, seed=2), "source": read("english", 16, seed=3)},
    peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
)
show("before", trainer.evaluate())
trainer.train()
show("after", trainer.evaluate())
trainer.save_model()
