"""What `auto` leaves to the machine, and a run then keeps to from its first session on: attention and kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bam_lora.attention import AUTO, Recorded, attention_of
from bam_lora.base import Loading, device
from bam_lora.front import Front
from bam_lora.kernels import choose_kernels
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


def settle_attention(
    directory: RunDirectory, training: Loading, scoring: Loading, folder: Path
) -> tuple[Loading, Loading, str | None]:
    """Holds a run to the attention it began with, where `quantization.attention` leaves that open.

    Null in `environment.json`: transformers' own choice, as in runs from before there was a choice.

    Returns:
        How to train and score, with what to keep to, and what to tell the user where this machine cannot.
    """
    before, chosen = _settle(
        directory, "attention", lambda before: attention_of(replace(training, before=before), folder, device())
    )
    note = None
    if before is not None and training.attention == AUTO and chosen != before.name:
        note = f"attention was {before.name} so far, which this machine or model cannot do: now {chosen or 'sdpa'}"
    keep = Recorded(chosen)
    return replace(training, before=keep), replace(scoring, before=keep), note


def settle_kernels(directory: RunDirectory, wanted: str, folder: Path) -> tuple[str | None, str | None]:
    """Holds a run to the kernels it began with, where `training.kernels` leaves that open.

    Null in `environment.json`: none, as in runs from before there was a choice.

    Returns:
        The kernels, and what to tell the user where this machine cannot have those of before.
    """
    before, chosen = _settle(
        directory, "kernels", lambda before: choose_kernels(wanted, folder, device(), before=before)
    )
    if before is None or wanted != AUTO or chosen == before.name:
        return chosen, None
    return chosen, f"kernels were {before.name} so far, which this machine or model cannot have: now {chosen or 'none'}"


def _settle(
    directory: RunDirectory, what: str, choose: Callable[[Recorded | None], str | None]
) -> tuple[Recorded | None, str | None]:
    """What a run was computed by before, None in its first session, and is now; the first goes on record."""
    record = read_record(directory.environment) or {}
    before = Recorded(record.get(what)) if what in record or not is_fresh(directory) else None
    chosen = choose(before)
    if what not in record:
        write_record(directory.environment, "environment", {**record, what: chosen})
    return before, chosen
