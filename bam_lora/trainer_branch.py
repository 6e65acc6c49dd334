"""The trainer of a `BamTrainer`'s branch: the caller's class and arguments, with this branch's rows, seed and steps."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.library_versions import seed_the_adapter
from bam_lora.plan import BranchPlan


@dataclass(frozen=True)
class TrainerParts:
    """What the caller gave for the trainers of the branches, apart from data.

    Attributes:
        trainer_cls: A TRL trainer class.
        args: Its arguments.
        processing_class: Tokenizer or processor.
        peft_config: The adapter of each branch.
        callbacks: The caller's callbacks, shared by all branches.
        prepared: Whether the rows are what the model takes, so that the trainer must not prepare them again.
        evaluation: Evaluation sets for evaluations inside a branch.
        others: Further keyword arguments of the class.
    """

    trainer_cls: Any
    args: Any
    processing_class: Any
    peft_config: Any
    callbacks: Sequence[Any] = ()
    prepared: bool = True
    evaluation: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerBranch:
    """Makes the trainer of one branch; a `branch.MakeTrainer`. `branches`: how many the run has in all."""

    parts: TrainerParts
    rows: Any
    plan: BranchPlan
    branches: int
    run_folder: Path
    listeners: Sequence[Any] = ()

    def __call__(self, view: Any, output: Path, callbacks: Sequence[Any]) -> Any:
        """The trainer."""
        parts = self.parts
        seed_the_adapter(self.plan.seed)
        with self._tracker_names():
            return parts.trainer_cls(
                model=view,
                args=self._arguments(output),
                train_dataset=self.rows,
                eval_dataset=parts.evaluation,
                processing_class=parts.processing_class,
                peft_config=copy.deepcopy(parts.peft_config),
                callbacks=[*callbacks, *self.listeners, *parts.callbacks],
                **parts.others,
            )

    def _arguments(self, output: Path) -> Any:
        args = copy.copy(self.parts.args)
        args.output_dir = str(output)
        args.max_steps = self.plan.steps
        args.seed = self.plan.seed
        args.save_steps = share(args.save_steps, self.branches)
        args.eval_steps = share(args.eval_steps, self.branches)
        args.warmup_steps = warmup_share(args.warmup_steps, self.branches, self.plan)
        args.run_name = branch_name(args, self.plan.iteration, self.plan.branch)
        args.disable_tqdm = True  # the run has one display for all its branches
        args.push_to_hub = False  # the result is, not its parts
        if self.parts.prepared:
            _take_as_prepared(args)
        return args

    @contextlib.contextmanager
    def _tracker_names(self) -> Iterator[None]:
        """One tracker run per branch, where trackers take its folder from the environment."""
        name = f"iteration-{self.plan.iteration:02}-branch-{self.plan.branch}"
        with tensorboard_folder(self.run_folder / "runs" / name):
            yield


def evaluation_trainer(parts: TrainerParts, view: Any, folder: Path, example: Any) -> Any:
    """A trainer that only evaluates: nothing is trained, tracked or published.

    Args:
        parts: With the sets in `evaluation`.
        view: The model.
        folder: For what it may write.
        example: Examples of the training data; a trainer wants some.
    """
    args = copy.copy(parts.args)
    args.output_dir, args.report_to, args.push_to_hub = str(folder), [], False
    args.eval_strategy, args.disable_tqdm = "no", True
    if parts.prepared:
        _take_as_prepared(args)
        example = next(iter(parts.evaluation.values())) if isinstance(parts.evaluation, Mapping) else parts.evaluation
    return parts.trainer_cls(
        model=view,
        args=args,
        train_dataset=example,
        eval_dataset=parts.evaluation,
        processing_class=parts.processing_class,
        peft_config=copy.deepcopy(parts.peft_config),  # starts at zero; a quantised model wants one
        **parts.others,
    )


def _take_as_prepared(args: Any) -> None:
    """Has a trainer take rows with `input_ids` and `labels` as they are."""
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    args.assistant_only_loss = False  # the labels say it; TRL wants the messages for it


def tensorboard_folder(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Has TensorBoard callbacks that are made meanwhile write to a folder."""
    return _variable("TENSORBOARD_LOGGING_DIR", str(folder))


def tracker_group(args: Any) -> contextlib.AbstractContextManager[None]:
    """Has trackers that start meanwhile put their runs into one group; a group that the user has set stays."""
    return _variable("WANDB_RUN_GROUP", os.environ.get("WANDB_RUN_GROUP") or group_name(args))


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def share(value: float | None, branches: int) -> float | None:
    """A number of steps of the whole run as one branch's share; one below 1 is a share of the steps already."""
    if value is None or value < 1:
        return value
    return max(1, math.ceil(value / branches))


def warmup_share(wanted: float, branches: int, plan: BranchPlan) -> float:
    """A branch's share of the warm-up of the whole run; a share of the steps stays what it is.

    Raises:
        UserError: If it takes the whole branch.
    """
    steps = share(wanted, branches) or 0
    if steps >= plan.steps and steps >= 1:
        raise UserError.of(
            "args.warmup_steps",
            expected=f"fewer than the {plan.steps} steps of a branch, once shared out over {branches}",
            found=str(wanted),
            remedy="Lower it; below 1 it is a share of each branch's steps",
        )
    return steps


def group_name(args: Any) -> str:
    """What a tracker calls the whole run."""
    given = args.run_name if args.run_name and args.run_name != args.output_dir else None
    return given or Path(args.output_dir).resolve().name


def branch_name(args: Any, iteration: int, branch: int) -> str:
    """What a tracker calls one branch."""
    return f"{group_name(args)}-iteration-{iteration:02}-branch-{branch}"
