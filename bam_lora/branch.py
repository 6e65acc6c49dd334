"""One branch: a fresh LoRA adapter trained on one slice by a TRL trainer, resumable, checked at every step."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bam_lora import loftq
from bam_lora.adapters import SCALES_FILE
from bam_lora.branch_adapters import dora_scales, no_input_casting, settle_adapter
from bam_lora.branch_callbacks import (
    CheckpointSeal,
    FiniteGuard,
    KeepAdapters,
    MetricsLog,
    StepReport,
    StopOnRequest,
    Stopwatch,
)
from bam_lora.errors import Interrupted, UserError, first_line
from bam_lora.interrupt import StopRequest
from bam_lora.kernels import fused
from bam_lora.machine import peak_memory, release_memory, trim_heap
from bam_lora.paged_optimizer import paged_state
from bam_lora.safetensors_stream import write_tensors
from bam_lora.store import MANIFEST, digest, fsync_path, seal, verify, write_text
from bam_lora.views import assert_not_repacked, branch_view, count_linear_modules

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TRAJECTORY = "trajectory"
INITIAL = "initial.safetensors"
OnStep = Callable[[int, float | None], None]
_FULL_BYTES = 1 << 20


class MakeTrainer(Protocol):
    """Makes the trainer of one branch."""

    def __call__(self, view: Any, output: Path, callbacks: Sequence[Any]) -> Any:
        """A transformers Trainer of `view` (the base, this branch's alone) with its data, adapter and seed.

        Args:
            view: The base; whatever is done to it is gone afterwards.
            output: Where its checkpoints go.
            callbacks: To be called before any others.
        """


@dataclass(frozen=True)
class BranchJob:
    """What one branch is to do; `label` names it in messages, `base_name` is what its adapter says of its base.

    `kernels`: the fused ones it computes with, see `kernels.choose_kernels`.
    """

    label: str
    key: str
    steps: int
    tokens: int
    base_name: str
    keep_checkpoints: bool = False
    kernels: str | None = None
    loftq: bool = False


def train_branch(
    model: Any, job: BranchJob, folder: Path, make: MakeTrainer, *, on_step: OnStep, stop: StopRequest
) -> dict[str, Any]:
    """Trains one branch into `folder`, goes on from its newest whole checkpoint, or finds it done.

    Args:
        model: The loaded base; it is left as it was.
        job: Steps, tokens, names.
        folder: Gets `adapter/`, `metrics.jsonl` and, last, the manifest.
        make: Makes its trainer.
        on_step: Called after every optimizer step with the step and the last logged loss.
        stop: Checked after every step; a request leaves a checkpoint.

    Returns:
        The facts in the manifest: seconds, steps, tokens, first and last loss, adapter's parameters.

    Raises:
        Interrupted: If a stop was asked for; a checkpoint is on disk.
        UserError: If loss or gradients are not finite.
    """
    done = verify(folder, job.key)
    if done is not None:
        return dict(done["facts"])
    (folder / MANIFEST).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if job.loftq and not (folder / INITIAL).is_file():  # without what it began with no checkpoint is of use
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    checkpoint = newest_checkpoint(folder / CHECKPOINTS, job.key)
    seconds_before = _forget_metrics_after(folder / METRICS, checkpoint)
    started = time.monotonic()
    watch = Stopwatch()
    metrics = MetricsLog(folder / METRICS, job.tokens / job.steps, seconds_before)
    callbacks = [
        FiniteGuard(job.label),
        metrics,
        CheckpointSeal(job.key),
        watch,
        StopOnRequest(stop),
        StepReport(on_step, metrics),
    ]
    if job.keep_checkpoints:
        if checkpoint is None:
            shutil.rmtree(folder / TRAJECTORY, ignore_errors=True)
        # Before the seal: a branch goes on from a sealed checkpoint, and would not come by this step again.
        keep = KeepAdapters(folder / TRAJECTORY, lambda model, place: _save_adapter(model, place, job, initial))
        callbacks.insert(0, keep)
    trim_heap()  # loading the base has left as much as the base is large
    trainer = make(branch_view(model), folder / CHECKPOINTS, callbacks)
    whole_in = _settle(trainer, model)
    initial = loftq.begin(trainer.model, folder / INITIAL, fresh=checkpoint is None) if job.loftq else {}
    patched = fused(trainer.model, job.kernels)
    with _clear_when_full(folder), paged_state(trainer), no_input_casting(trainer), patched:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    steps = trainer.state.global_step
    if steps < job.steps and stop:
        raise Interrupted(stop.signal_name)
    assert 0 < steps <= trainer.state.max_steps == job.steps, steps  # fewer: a callback of the caller's ended it
    with _clear_when_full(folder):
        _save_adapter(trainer.model, folder / ADAPTER, job, initial)
    facts = {
        "seconds": seconds_before + time.monotonic() - started,
        "setup_seconds": watch.setup_seconds,
        "checkpoint_seconds": watch.checkpoint_seconds,
        "steps": steps,
        "tokens": round(job.tokens * steps / job.steps),
        "loss_first": metrics.losses[0] if metrics.losses else None,
        "loss_last": metrics.losses[-1] if metrics.losses else None,
        "adapter_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "linear_modules": count_linear_modules(model),
        "whole_in": whole_in,
        **peak_memory(),
    }
    del trainer
    release_memory()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    (folder / INITIAL).unlink(missing_ok=True)
    fsync_path(folder / METRICS)
    seal(folder, job.key, facts, parts=[ADAPTER, METRICS])
    return facts


def newest_checkpoint(folder: Path, key: str) -> Path | None:
    """The newest checkpoint that verifies; incomplete and foreign ones are deleted, as nothing can use them."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for index, path in enumerate(found):
        if verify(path, digest([key, int(path.name.rpartition("-")[2])])) is not None:
            return path
        shutil.rmtree(found[index])
    return None


@contextlib.contextmanager
def _clear_when_full(folder: Path) -> Iterator[None]:
    """Says so when a writer of torch or safetensors failed for lack of space; theirs are not OSErrors."""
    try:
        yield
    except Exception as error:
        full = shutil.disk_usage(folder).free < _FULL_BYTES
        if isinstance(error, UserError | OSError) or not (full or "inline_container" in str(error)):
            raise
        raise UserError.of(
            f"a checkpoint in {folder}",
            expected="space to write it",
            found=first_line(error),
            remedy="Free some space; the same command goes on from the checkpoint before",
        ) from error


def _settle(trainer: Any, base: Any) -> str | None:
    """Takes the libraries' own displays from a trainer, and keeps what it trains in fp32; see `settle_adapter`."""
    import transformers

    for unwanted in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(unwanted)
    whole_in = settle_adapter(trainer.model, base)
    assert_not_repacked(trainer.model)
    return whole_in


def _save_adapter(model: Any, folder: Path, job: BranchJob, initial: loftq.Tensors) -> None:
    """Writes the adapter as PEFT does, its config in a fixed order and naming the base the user named."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model.save_pretrained(str(folder), safe_serialization=True)
    if scales := dora_scales(model):
        write_tensors(folder / SCALES_FILE, scales)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = job.base_name
    # PEFT keeps some lists as sets, in no order; that of token numbers is the order of their rows.
    ordered = {name: sorted(value) if _is_names(value) else value for name, value in config.items()}
    write_text(path, json.dumps(ordered, indent=2, sort_keys=True) + "\n")
    if initial:
        loftq.subtract(folder, initial)
    for file in folder.iterdir():
        fsync_path(file)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _forget_metrics_after(path: Path, checkpoint: Path | None) -> float:
    """Drops the lines of steps that a resumed branch will take again; returns the seconds spent up to there."""
    if checkpoint is None or not path.exists():
        path.unlink(missing_ok=True)
        return 0.0
    step = int(checkpoint.name.rpartition("-")[2])
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            break
        if entry["step"] <= step:
            kept.append(entry)
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return float(kept[-1]["seconds"]) if kept else 0.0
