"""The attention that a run keeps to from its first session on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bam_lora.attention import AUTO, Recorded, attention_of
from bam_lora.base import Loading, device
from bam_lora.rundir import RunDirectory, is_fresh
from bam_lora.store import read_record, write_record


def settle_attention(
    directory: RunDirectory, training: Loading, scoring: Loading, folder: Path
) -> tuple[Loading, Loading, str | None]:
    """Holds a run to the attention it began with, where `quantization.attention` leaves that open.

    What the first session trains with goes into `environment.json`; null: transformers' own choice, which is also what
    runs have from before there was a choice.

    Returns:
        How to train and score, with what to keep to, and what to tell the user where this machine cannot.
    """
    record = read_record(directory.environment) or {}
    known = "attention" in record or not is_fresh(directory)
    before = Recorded(record.get("attention")) if known else None
    chosen = attention_of(replace(training, before=before), folder, device())
    if "attention" not in record:
        write_record(directory.environment, "environment", {**record, "attention": chosen})
    note = None
    if before is not None and training.attention == AUTO and chosen != before.name:
        note = f"attention was {before.name} so far, which this machine or model cannot do: now {chosen or 'sdpa'}"
    keep = Recorded(chosen)
    return replace(training, before=keep), replace(scoring, before=keep), note
