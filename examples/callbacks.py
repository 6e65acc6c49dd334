"""Callbacks: what happens in a run, as it happens, beside all that a Trainer tells its callbacks anyway.

    python examples/callbacks.py

Under a minute on two cores. Every callback of a `BamTrainer` sees the Trainer's own events in each branch
(`on_step_end`, `on_log`, ...), and five more of the whole run. Here one prints a line for each of the five, and writes
the scores of the merged models to a table.
"""

import csv
from pathlib import Path

from peft import LoraConfig
from tiny import BASE, read
from transformers import TrainerCallback
from trl import SFTConfig

from bam_lora import BamConfig, BamTrainer

OUTPUT = Path("runs/callbacks")


class Diary(TrainerCallback):
    """Prints what the run does, and keeps the scores after every iteration in `table`."""

    def __init__(self, table: Path) -> None:
        self.table = table
        self.rows = []

    def on_branch_begin(self, args, state, control, *, iteration, branch, slice, tokens, **kwargs):
        """Before a branch trains; one that is found done, on resuming, tells nothing."""
        print(f"iteration {iteration}, branch {branch}: slice {slice}, {tokens:,} tokens")

    def on_branch_end(self, args, state, control, *, iteration, branch, facts, **kwargs):
        """After it has trained."""
        print(f"iteration {iteration}, branch {branch}: {facts['steps']} steps; the run is at {state.global_step}")

    def on_merge(self, args, state, control, *, iteration, merge, **kwargs):
        """After the branches' deltas have been merged; `merge` is what merge.json says."""
        print(f"iteration {iteration}: merged by {merge['method']}, weights {merge['weights']}")

    def on_fold(self, args, state, control, *, iteration, folder, **kwargs):
        """When the merged model is there as a folder that transformers can load."""
        print(f"iteration {iteration}: folded into {folder.name}/")

    def on_iteration_end(self, args, state, control, *, iteration, tokens, metrics, **kwargs):
        """After the merged model has been scored; `tokens` counts from the run's start."""
        self.rows.append({"iteration": iteration, "tokens": tokens, **metrics})
        with self.table.open("w", newline="") as file:
            table = csv.DictWriter(file, self.rows[0])
            table.writeheader()
            table.writerows(self.rows)


trainer = BamTrainer(
    model=BASE,
    bam=BamConfig(slices=4, branches=2),
    args=SFTConfig(
        output_dir=str(OUTPUT),
        learning_rate=4e-3,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        max_length=128,
        packing=True,
        packing_strategy="bfd_split",
        use_cpu=True,
    ),
    train_dataset=read("german", 60, seed=1),
    replay_dataset=read("english", 40, seed=4),
    eval_dataset={"target": read("german", 8, seed=2), "source": read("english", 8, seed=3)},
    peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[Diary(OUTPUT.parent / "callbacks.csv")],
)
trainer.train()
print((OUTPUT.parent / "callbacks.csv").read_text())
