"""What differs between the ways to start a run: by a recipe, as here, or by a script (`BamTrainer`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.branch import MakeTrainer
from bam_lora.contamination import HeldOutSet
from bam_lora.evaluate import EvaluationSet
from bam_lora.packing import load_rows
from bam_lora.plan import BranchPlan, SlicePlan, epoch_steps, warmup_steps
from bam_lora.recipe import Recipe
from bam_lora.rundir import RunDirectory
from bam_lora.scoring import SetSource, read_set
from bam_lora.scoring_sets import scoring_load, training_load
from bam_lora.sft_branch import SftBranch, adapter_config

PreparePart = Callable[[Path, str, Sequence[HeldOutSet]], dict[str, Any]]
"""Makes the data of a run at a folder, under a key, or finds it there; gives its facts, as `data.prepare` does.

It is searched for the text of the held-out sets.
"""


class Front:
    """How a recipe's run gets its models, data and trainers; others override what they do in their own way."""

    prepare_part: PreparePart | None = None
    """Makes the data where that is not read from the recipe's sources."""
    say: Callable[[str], None] | None = None
    """Receives lines about what takes long."""
    kernels: str | None = None
    """The fused kernels of the branches, as a run settles them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.lora = recipe.lora  # new tokens add rows to it
        self.training_load = training_load(recipe)
        self.scoring_load = scoring_load(recipe)

    def tokenizer(self, folder: Path) -> Any:
        """The tokenizer of a model folder."""
        return load_tokenizer(folder)

    def load(self, folder: Path, how: Loading) -> Any:
        """A model folder, loaded and frozen."""
        return load_model(folder, how)

    def read_set(self, source: SetSource) -> EvaluationSet:
        """The documents of an evaluation or selection set."""
        return read_set(source, say=self.say)

    def epoch_steps(self, part: SlicePlan) -> int:
        """Optimizer steps of one pass over a slice."""
        return epoch_steps(self.recipe, part)

    def adapter_config(self) -> Any:
        """The `LoraConfig` of the branches."""
        return adapter_config(self.lora.arguments())

    def warmup_steps(self, branch: BranchPlan) -> float:
        """Warm-up of a branch, in steps; raises a UserError if it takes the whole branch."""
        return warmup_steps(self.recipe.training.warmup_steps, branch)

    def trainer(self, directory: RunDirectory, tokenizer: Any, branch: BranchPlan) -> MakeTrainer:
        """What makes the trainer of a branch."""
        recipe = self.recipe
        return SftBranch(
            how=self.training_load,
            tokenizer=tokenizer,
            rows=load_rows(directory.data(branch.data), branch.rows),
            adapter=self.lora.arguments(),
            arguments={
                **recipe.training.sft_arguments(),
                "warmup_steps": self.warmup_steps(branch),
            },
            steps=branch.steps,
            seed=branch.seed,
            sequence_length=recipe.data.sequence_length,
        )

    def branch_begin(self, branch: BranchPlan) -> None:
        """Called before a branch trains; not for one that is found done."""

    def branch_found(self, branch: BranchPlan, folder: Path) -> None:
        """Called for a branch that was trained before, with its folder."""

    def branch_end(self, branch: BranchPlan, facts: Mapping[str, Any]) -> None:
        """Called when a branch has been trained, with the facts of its manifest."""

    def own_files(self, folder: Path) -> list[str]:
        """Puts files of its own, such as a tokenizer, into the result, and names those that are not as they came."""
        return []

    def merged(self, iteration: int, record: Mapping[str, Any]) -> None:
        """Called after a merge, with what `merge.json` says."""

    def folded(self, iteration: int, folder: Path) -> None:
        """Called when an iteration's model has been folded."""

    def iteration_end(self, iteration: int, tokens: int, scores: Mapping[str, Any] | None) -> None:
        """Called when an iteration is done, or found done: training tokens so far, and what `eval.json` says."""
