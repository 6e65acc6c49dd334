"""What happens around the optimizer steps of a branch, as callbacks of the transformers Trainer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bam_lora.errors import UserError
from bam_lora.interrupt import StopRequest
from bam_lora.store import digest, fsync_path, new_folder, seal


class FiniteGuard(TrainerCallback):  # type: ignore[misc]
    """Stops before the update when a gradient, and so the loss, is not a finite number."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks every trainable gradient; with fp16 the loss scaler does so itself and skips the step."""
        if args.fp16:
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.requires_grad and p.grad is not None]
        total = torch.stack(torch._foreach_norm(gradients)).sum().item()
        if not math.isfinite(total):
            self._stop(state.global_step + 1, "gradient")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Checks the logged loss, which the fp16 scaler does not."""
        if logs and "loss" in logs and not math.isfinite(float(logs["loss"])):
            self._stop(state.global_step, "loss")

    def _stop(self, step: int, what: str) -> None:
        raise UserError.of(
            f"{self.label}, step {step}",
            expected=f"a finite {what}",
            found="NaN or infinity",
            remedy="Start a new run with a lower training.learning_rate or max_grad_norm, or look at this slice's text",
        )


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Writes what the Trainer logs as JSON lines: step, loss, learning_rate, grad_norm, tokens, seconds."""

    def __init__(self, path: Path, tokens_per_step: float, seconds_before: float) -> None:
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.started = time.monotonic() - seconds_before
        self.losses = self._losses_so_far()

    def _losses_so_far(self) -> list[float]:
        self.path.touch()
        return [json.loads(line)["loss"] for line in self.path.read_text(encoding="utf-8").splitlines()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Has the last step logged, however short the branch is."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Appends one line; the summary that the Trainer logs at its end is not one."""
        if not logs or "loss" not in logs:
            return
        entry = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            # None where fp16's loss scaler skipped the step
            "grad_norm": norm if math.isfinite(norm := float(logs.get("grad_norm", math.nan))) else None,
            "tokens": round(state.global_step * self.tokens_per_step),
            "seconds": round(time.monotonic() - self.started, 3),
        }
        self.losses.append(entry["loss"])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


class CheckpointSeal(TrainerCallback):  # type: ignore[misc]
    """Gives every finished checkpoint a manifest; one without is never resumed from."""

    def __init__(self, key: str) -> None:
        self.key = key

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Spares the checkpoint that the Trainer makes of the last step: the adapter itself is written right after."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Syncs and seals the checkpoint that was just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in folder.rglob("*"):
            fsync_path(path)
        seal(folder, digest([self.key, state.global_step]))


class KeepAdapters(TrainerCallback):  # type: ignore[misc]
    """Keeps the adapter as it is at every checkpoint, for scoring; the checkpoints themselves go."""

    def __init__(self, folder: Path, save: Callable[[Any, Path], None]) -> None:
        self.folder = folder
        self.save = save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes it whole or not at all; a checkpoint that only a stop asked for is not one of the curve."""
        if state.global_step % int(args.save_steps):
            return
        with new_folder(self.folder / f"step-{state.global_step:06}") as folder:
            self.save(kwargs["model"], folder)


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times what a branch does besides taking steps: up to the first one, and writing checkpoints.

    Attributes:
        setup_seconds: From the making of this object to the first step.
        checkpoint_seconds: Of all checkpoints, with what callbacks before this one do to them.
    """

    def __init__(self) -> None:
        self.setup_seconds = self.checkpoint_seconds = 0.0
        self._since = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the setting up."""
        self.setup_seconds = time.monotonic() - self._since

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint may begin here, or after a log line or an evaluation."""
        self._since = time.monotonic()

    on_log = on_evaluate = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a checkpoint."""
        self.checkpoint_seconds += time.monotonic() - self._since


class StopOnRequest(TrainerCallback):  # type: ignore[misc]
    """On a request to stop: one checkpoint, then the end of training."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the Trainer to save and to stop."""
        if self.request and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


class StepReport(TrainerCallback):  # type: ignore[misc]
    """Tells the progress display about every step."""

    def __init__(self, on_step: Callable[[int, float | None], None], metrics: MetricsLog) -> None:
        self.report = on_step
        self.metrics = metrics

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports the step a resumed branch starts from."""
        self.report(state.global_step, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports the step and the last logged loss."""
        self.report(state.global_step, self.metrics.losses[-1] if self.metrics.losses else None)
