"""New tokens: what they do to each evaluation set, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.records import iteration_folder, read_record
from bam_lora.report.tables import Cell, Table

_COLUMNS = ["Set", "Bytes a token, before", "After", "Words split otherwise", "Bits per byte, new tokens untrained"]


def read_vocabulary(run: Path) -> dict[str, Any] | None:
    """What a run that grew its base's vocabulary measured of it; None where it did not, or measures nothing.

    Returns:
        {"tokens": how many were added, "rows": of the grown embedding, "sets": [{"set", "role", "bytes",
        "tokens_before", "tokens_after", "words_changed"}], "scores": those of the grown base before any training}.
    """
    record = read_record(iteration_folder(run, 0) / "vocabulary.json")
    if record is None:
        return None
    scores = [{key: one[key] for key in ("set", "role", "bits_per_byte", "stderr")} for one in record["scores"]]
    return {**{key: record[key] for key in ("tokens", "rows", "sets")}, "scores": scores}


def vocabulary_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """One row a set, for every run with new tokens."""
    grown = [(report["name"], report["vocabulary"]) for report in reports if report.get("vocabulary")]
    rows = []
    for name, vocabulary in grown:
        scores = {one["set"]: one for one in vocabulary["scores"]}
        for one in vocabulary["sets"]:
            label = one["set"] if len(reports) == 1 else f"{name}, {one['set']}"
            before, after = (one["bytes"] / one[key] if one[key] else None for key in ("tokens_before", "tokens_after"))
            score = scores[one["set"]]
            rows.append(
                [
                    Cell(f"{label} ({one['role']})"),
                    Cell(fmt.signless(before, 2), before, number=True),
                    Cell(fmt.signless(after, 2), after, number=True),
                    Cell(fmt.percent(one["words_changed"]), one["words_changed"], number=True),
                    Cell(fmt.with_error(score["bits_per_byte"], score["stderr"]), score["bits_per_byte"], number=True),
                ]
            )
    note = "; ".join(f"{name}: {fmt.count(one['tokens'])} new tokens" for name, one in grown)
    return Table("Vocabulary", _COLUMNS, rows, note and f"{note}. They begin as the mean of their pieces.")
