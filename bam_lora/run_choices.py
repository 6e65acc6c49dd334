"""What `auto` leaves to the machine, and a run then keeps to from its first session on: attention and kernels."""

from __future__ import annotations

from pathlib import Path

from bam_lora.base import device
from bam_lora.front import Front
from bam_lora.kernels import AUTO, Recorded, choose_kernels
from bam_lora.run_attention import settle_attention
from bam_lora.rundir import RunDirectory, is_fresh
from bam_lora.store import read_record, write_record


def settle_choices(directory: RunDirectory, front: Front, folder: Path) -> list[str]:
    """Sets, in `front`, by what a run computes; says what of it is no longer as it was.

    Args:
        directory: The run; `environment.json` gets what is chosen first.
        front: Its front.
        folder: The base.
    """
    loads = front.training_load, front.scoring_load
    front.training_load, front.scoring_load, attention = settle_attention(directory, *loads, folder)
    kernels = None
    if front.recipe.script is None:  # a script's trainer does by itself what its arguments say
        front.kernels, kernels = settle_kernels(directory, front.recipe.training.kernels, folder)
    return [note for note in (attention, kernels) if note]


def settle_kernels(directory: RunDirectory, wanted: str, folder: Path) -> tuple[str | None, str | None]:
    """Holds a run to the kernels it began with, where `training.kernels` leaves that open.

    Null in `environment.json`: none, as in runs from before there was a choice.

    Returns:
        The kernels, and what to tell the user where this machine cannot have those of before.
    """
    record = read_record(directory.environment) or {}
    known = "kernels" in record or not is_fresh(directory)
    before = Recorded(record.get("kernels")) if known else None
    chosen = choose_kernels(wanted, folder, device(), before=before)
    if "kernels" not in record:
        write_record(directory.environment, "environment", {**record, "kernels": chosen})
    if before is None or wanted != AUTO or chosen == before.name:
        return chosen, None
    return chosen, f"kernels were {before.name} so far, which this machine or model cannot have: now {chosen or 'none'}"
