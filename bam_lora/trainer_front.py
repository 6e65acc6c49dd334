"""How a `BamTrainer`'s run gets its models, data and trainers, and whom it tells what happens."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState

from bam_lora.base import Loading
from bam_lora.branch import MakeTrainer
from bam_lora.evaluate import EvaluationSet
from bam_lora.front import Front
from bam_lora.packing import load_rows
from bam_lora.plan import BranchPlan, SlicePlan, epoch_steps
from bam_lora.recipe import Recipe
from bam_lora.rundir import RunDirectory
from bam_lora.scoring import SetSource
from bam_lora.trainer_branch import TrainerBranch, TrainerParts, warmup_share
from bam_lora.trainer_events import RunLog, finish_trackers, log_lines, tell
from bam_lora.trainer_models import ModelSource, TrainerLoading
from bam_lora.trainer_sets import NamedSet, read_named
from bam_lora.trainer_slices import TrainerData


class TrainerFront(Front):
    """The front of one `train()`.

    Args:
        recipe: The run as a recipe.
        model: Where its base is.
        how: How that is held.
        parts: What the branches' trainers are made of.
        data: Makes the slices.
        sets: Evaluation and selection sets by name.
        formatting: The caller's formatting function.
        state: The run's state, kept up to date.
    """

    def __init__(
        self, recipe: Recipe, model: ModelSource, how: TrainerLoading, parts: TrainerParts, data: TrainerData,
        sets: Sequence[NamedSet], formatting: Any, state: TrainerState,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.training_load: Loading = how
        self.scoring_load: Loading = model.scoring_load(how)
        self.prepare_part = data
        self.points: list[tuple[int, dict[str, Any]]] = []
        self._model, self._parts, self._sets, self._formatting, self._state = model, parts, sets, formatting, state
        self._first: Path | None = None
        self._steps = 0

    def tokenizer(self, folder: Path) -> Any:
        """The caller's; `folder` is that of the first base."""
        self._first = folder
        return getattr(self._parts.processing_class, "tokenizer", self._parts.processing_class)

    def load(self, folder: Path, how: Loading) -> Any:
        """As the caller has the base loaded; the first one is the caller's own model, if that was passed loaded."""
        if self._model.instance is not None and folder == self._first and how == self.training_load:
            return self._model.first()
        return self._model.load(folder, how)

    def read_set(self, source: SetSource) -> EvaluationSet:
        """The texts of one of the caller's sets."""
        (one,) = (one for one in self._sets if one.path == source.where.path)
        return read_named(one, getattr(self._parts.args, "dataset_text_field", "text"), self._formatting)

    def epoch_steps(self, part: SlicePlan) -> int:
        """As the Trainer counts; an incomplete last batch may be dropped."""
        args = self._parts.args
        if not args.dataloader_drop_last:
            return epoch_steps(self.recipe, part)
        batches = (part.rows[1] - part.rows[0]) // args.per_device_train_batch_size
        return max(1, int(batches) // int(args.gradient_accumulation_steps))

    def adapter_config(self) -> Any:
        """The caller's."""
        return copy.deepcopy(self._parts.peft_config)

    def warmup_steps(self, branch: BranchPlan) -> float:
        """The branch's share of what the caller's arguments say for the whole run."""
        return warmup_share(self._parts.args.warmup_steps, self.recipe.slices, branch)

    def trainer(self, directory: RunDirectory, tokenizer: Any, branch: BranchPlan) -> MakeTrainer:
        """The caller's trainer class on the branch's rows."""
        folder = directory.branch(branch.iteration, branch.branch)
        return TrainerBranch(
            self._parts,
            load_rows(directory.data(branch.data), branch.rows),
            branch,
            self.recipe.slices,
            directory.root,
            [RunLog(self._state, branch, self._steps, folder)],
        )

    def branch_found(self, branch: BranchPlan, folder: Path) -> None:
        """Takes up its log."""
        self._state.log_history += log_lines(folder, branch, self._steps)
        self._steps += branch.steps
        self._state.global_step = self._steps

    def branch_begin(self, branch: BranchPlan) -> None:
        """Tells the callbacks."""
        self._tell("on_branch_begin", **_place(branch))

    def branch_end(self, branch: BranchPlan, facts: Mapping[str, Any]) -> None:
        """Tells the callbacks; the next branch is another run for trackers."""
        self._steps += branch.steps
        finish_trackers(self._parts.args)
        self._tell("on_branch_end", **_place(branch), facts=dict(facts))

    def merged(self, iteration: int, record: Mapping[str, Any]) -> None:
        """Tells the callbacks."""
        self._tell("on_merge", iteration=iteration, merge=dict(record))

    def folded(self, iteration: int, folder: Path) -> None:
        """Tells the callbacks."""
        self._tell("on_fold", iteration=iteration, folder=folder)

    def iteration_end(self, iteration: int, tokens: int, scores: Mapping[str, Any] | None) -> None:
        """Logs the merged model's scores and tells the callbacks."""
        figures = score_figures(scores)
        self.points.append((tokens, figures))
        self._state.log_history.append({**figures, "iteration": iteration, "tokens": tokens, "step": self._steps})
        self._tell("on_iteration_end", iteration=iteration, tokens=tokens, metrics=figures)

    def own_files(self, folder: Path) -> list[str]:
        """The caller's tokenizer or processor, which may have another template or other special tokens."""
        with tempfile.TemporaryDirectory() as place:
            self._parts.processing_class.save_pretrained(place)
            names = sorted(path.relative_to(place).as_posix() for path in Path(place).rglob("*") if path.is_file())
            for name in names:
                (folder / name).unlink(missing_ok=True)  # it may be a hard link into the base
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(place) / name, folder / name)
        return names

    def _tell(self, event: str, **details: Any) -> None:
        tell(self._parts.callbacks, event, self._parts.args, self._state, TrainerControl(), **details)


def score_figures(scores: Mapping[str, Any] | None) -> dict[str, float]:
    """What `eval.json` says, by the names that a Trainer gives metrics: `eval_target_bits_per_byte`."""
    listed = (scores or {}).get("scores", [])
    return {f"eval_{score['set']}_bits_per_byte": score["bits_per_byte"] for score in listed}


def _place(branch: BranchPlan) -> dict[str, Any]:
    return {"iteration": branch.iteration, "branch": branch.branch, "slice": branch.slice, "tokens": branch.tokens}
