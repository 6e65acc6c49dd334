"""What a run cost: time by stage, memory, disk, tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bam_lora.report.records import read_record

STAGES = ("data", "train", "evaluate", "merge", "fold", "other")
_OWN_FILES = {"report.json", "report.html"}


def cost(run: Path, iterations: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The `cost` entry of report.json: seconds, bytes and tokens; `other` is wall time no stage accounts for."""
    sessions = (read_record(run / "sessions.json") or {}).get("sessions", [])
    wall = total(session.get("seconds") for session in sessions)
    stages = {
        "data": (read_record(run / "data" / "facts.json") or {}).get("seconds"),
        "train": total(item["seconds"]["train"] for item in iterations),
        "evaluate": total(evaluation.get("seconds") for evaluation in evaluations),
        "merge": total(item["seconds"]["merge"] for item in iterations),
        "fold": total(item["seconds"]["fold"] for item in iterations),
    }
    # A killed session leaves no time of its own, but the steps it finished do: "other" must not become negative.
    other = None if wall is None else max(0.0, wall - (total(stages.values()) or 0.0))
    branches = [branch for item in iterations for branch in item["branches"]]
    gpu = [item.get("peak_gpu_bytes") for item in (*sessions, *branches)]
    return {
        "wall_seconds": wall,
        "seconds_by_stage": {**stages, "other": other},
        "peak_rss_bytes": max((s["peak_rss_bytes"] for s in sessions if s.get("peak_rss_bytes")), default=None),
        "peak_gpu_bytes": max((value for value in gpu if value), default=None),
        "disk_bytes": _disk_bytes(run),
        "train_tokens": sum(branch["tokens"] or 0 for branch in branches),
        "sessions": len(sessions),
        "sessions_cut_short": sum(session.get("seconds") is None for session in sessions),
    }


def _disk_bytes(run: Path) -> int:
    """Bytes below the run directory, hard links once, this report's own files left out (so it can be repeated)."""
    sizes: dict[tuple[int, int], int] = {}
    for path in run.rglob("*"):
        if path.parent == run and path.name in _OWN_FILES:
            continue
        # A run that is still going may rename or delete a file between listing and looking at it.
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                stat = path.stat()
                sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def total(values: Iterable[float | None]) -> float | None:
    """The sum of what is known, None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
