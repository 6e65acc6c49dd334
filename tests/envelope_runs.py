"""Run directories whose comparison at equal target scores has a known answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report_runs import write_run

from bam_lora.report import compare
from bam_lora.store import read_record


def scores(target: float, source: float) -> dict[str, float]:
    return {**dict.fromkeys(("docs.de", "stories.de"), target), "docs.en": source}


# Shuffled, and with the run's own ends measured again (and wrongly): those count as the run itself scored them.
CURVE = {0.8: scores(1.5, 1.24), 1.0: scores(1.2, 0.9), 0.5: scores(1.8, 1.18), 0.0: scores(1.6, 0.5)}
SINGLE = {"strategy": "single", "iterations": 1, "branches": 1, "final": scores(1.4, 1.30)}


def single(folder: Path, **changes: Any) -> Path:
    return write_run(folder, **{**SINGLE, "shrink": CURVE, "paired": True, **changes})


def bam(folder: Path, target: float = 1.6, source: float = 1.15, **changes: Any) -> Path:
    return write_run(folder, **{"final": scores(target, source), "paired": True, **changes})


def entry_of(folders: list[Path], group: str = "bam") -> dict[str, Any]:
    (entry,) = [one for one in compare(folders)["envelope"] if one["group"] == group]
    return dict(entry)


def read(path: Path) -> dict[str, Any]:
    body = read_record(path)
    assert body is not None
    return body
