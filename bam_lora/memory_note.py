"""What a run was estimated to take, kept in its `environment.json` for the report to set beside what it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bam_lora.check_base import plan_base
from bam_lora.check_machine import find_machine
from bam_lora.check_plan import plan_resources
from bam_lora.errors import UserError
from bam_lora.hub_metadata import base_metadata
from bam_lora.recipe import Recipe
from bam_lora.rundir import RunDirectory
from bam_lora.store import read_record, write_record


def note_estimate(directory: RunDirectory, recipe: Recipe, start: Path, tokenizer: Any, tokens: int) -> None:
    """Enters the estimate into `environment.json`, unless there is one; null where none can be made.

    Args:
        directory: The run.
        recipe: Its recipe.
        start: The model that its first iteration starts from.
        tokenizer: Its tokenizer.
        tokens: Training tokens of the whole run.
    """
    record = read_record(directory.environment)
    if record is not None and "estimate" not in record:
        estimate = None if recipe.script is not None else _estimate(recipe, start, tokenizer, tokens)
        write_record(directory.environment, "environment", {**record, "estimate": estimate})


def _estimate(recipe: Recipe, start: Path, tokenizer: Any, tokens: int) -> dict[str, int | None] | None:
    try:
        base = plan_base(base_metadata(str(start)), recipe.base, tokenizer)
    except UserError:  # an architecture without the usual widths: it can be trained all the same
        return None
    plan = plan_resources(recipe, base, find_machine(), tokens=tokens)
    return {
        "peak_rss_bytes": plan.host.peak_bytes,
        "peak_gpu_bytes": None if plan.machine.unified else plan.model.peak_bytes,
        "peak_disk_bytes": plan.disk.peak_bytes,
        "disk_bytes": plan.disk.end_bytes,
    }
