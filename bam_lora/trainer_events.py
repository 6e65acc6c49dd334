"""What a `BamTrainer` tells its callbacks, its log and its trackers while it runs."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from bam_lora.branch import METRICS
from bam_lora.plan import BranchPlan
from bam_lora.trainer_branch import group_name, tensorboard_folder

EVENTS = ("on_branch_begin", "on_branch_end", "on_merge", "on_fold", "on_iteration_end")
"""What callbacks see beside the Trainer's own events; each is called with (args, state, control, **details)."""


class RunLog(TrainerCallback):  # type: ignore[misc]
    """Keeps the state of the whole run while one branch trains: steps count from the run's start.

    Args:
        state: The run's.
        branch: The branch.
        before: Steps of the branches before it.
        folder: The branch's folder.
    """

    def __init__(self, state: TrainerState, branch: BranchPlan, before: int, folder: Path) -> None:
        self.state, self.branch, self.before, self.folder = state, branch, before, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the lines of the steps that an interrupted session has taken."""
        self.state.log_history += log_lines(self.folder, self.branch, self.before)
        self.state.global_step = self.before + state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the step."""
        self.state.global_step = self.before + state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keeps the log line with the run's step, the iteration and the branch."""
        place = {"iteration": self.branch.iteration, "branch": self.branch.branch}
        self.state.log_history.append({**(logs or {}), **place, "step": self.before + state.global_step})


def log_lines(folder: Path, branch: BranchPlan, before: int) -> list[dict[str, Any]]:
    """The log lines that a branch has on disk, with the run's steps."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    place = {"iteration": branch.iteration, "branch": branch.branch}
    return [{**entry, **place, "step": before + entry["step"]} for entry in map(json.loads, lines)]


def tell(
    callbacks: Sequence[Any], event: str, args: Any, state: TrainerState, control: TrainerControl, **details: Any
) -> None:
    """Calls an event of ours on every callback that has it."""
    for callback in callbacks:
        method = getattr(callback, event, None)
        if method is not None:
            method(args, state, control, **details)


def finish_trackers(args: Any) -> None:
    """Ends the trackers' current run, so that the next branch gets one of its own."""
    for name, end in (("wandb", "finish"), ("trackio", "finish"), ("mlflow", "end_run"), ("swanlab", "finish")):
        module = sys.modules.get(name)
        if name in (args.report_to or []) and module is not None:
            getattr(module, end)()


def log_merged(args: Any, model: Any, points: Sequence[tuple[int, Mapping[str, Any]]], run_folder: Path) -> None:
    """Gives the trackers one run of the merged models, with training tokens as its steps.

    Args:
        args: The trainer's arguments.
        model: What trackers read a config from; may be None.
        points: (tokens, figures) of every merged model, the base first.
        run_folder: The run directory; TensorBoard writes under its `runs`.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    if not points:
        return
    merged = copy.copy(args)
    merged.run_name = f"{group_name(args)}-merged"
    with tensorboard_folder(run_folder / "runs" / "merged"):
        trackers = [make() for make in get_reporting_integration_callbacks(args.report_to or [])]
    state, control = TrainerState(), TrainerControl()
    for tracker in trackers:
        tracker.on_train_begin(merged, state, control, model=model)
        for tokens, figures in points:
            state.global_step = tokens
            tracker.on_log(merged, state, control, model=model, logs=dict(figures))
        tracker.on_train_end(merged, state, control, model=model, processing_class=None)
    finish_trackers(args)
