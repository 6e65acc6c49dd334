"""What a run cost: time by stage, what of it plain training would not have spent, memory, disk, tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.report.records import read_record

STAGES = ("data", "load", "train", "evaluate", "merge", "fold", "other")
_OWN_FILES = {"report.json", "report.html"}


def cost(run: Path, iterations: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The `cost` entry of report.json: seconds, bytes and tokens; `other` is wall time no stage accounts for."""
    sessions = (read_record(run / "sessions.json") or {}).get("sessions", [])
    wall = total(session.get("seconds") for session in sessions)
    timed = bool(sessions) and all("seconds_by_stage" in session for session in sessions)
    stages = _by_clock(sessions) if timed else _by_artefact(run, iterations, evaluations)
    # A killed session leaves no time of its own, but the steps it finished do: "other" must not become negative.
    other = None if wall is None else max(0.0, wall - (total(stages.values()) or 0.0))
    branches = [branch for item in iterations for branch in item["branches"]]
    gpu = [item.get("peak_gpu_bytes") for item in (*sessions, *branches)]
    return {
        "wall_seconds": wall,
        "seconds_by_stage": {**stages, "other": other},
        "loop_overhead": _overhead(sessions, branches, {**stages, "wall": wall}) if timed else None,
        "peak_rss_bytes": max((s["peak_rss_bytes"] for s in sessions if s.get("peak_rss_bytes")), default=None),
        "peak_gpu_bytes": max((value for value in gpu if value), default=None),
        "disk_bytes": _disk_bytes(run),
        "train_tokens": sum(branch["tokens"] or 0 for branch in branches),
        "sessions": len(sessions),
        "sessions_cut_short": sum(session.get("seconds") is None for session in sessions),
    }


def _by_clock(sessions: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What the sessions' own clocks say: they exclude one another, and lie within the wall time."""
    return {name: sum(s["seconds_by_stage"].get(name, 0.0) for s in sessions) for name in STAGES if name != "other"}


def _by_artefact(
    run: Path, iterations: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """What the artefacts say, for runs whose sessions had no clock yet; loading is not known of them."""
    return {
        "data": (read_record(run / "data" / "facts.json") or {}).get("seconds"),
        "load": None,
        "train": total(item["seconds"]["train"] for item in iterations),
        "evaluate": total(evaluation.get("seconds") for evaluation in evaluations),
        "merge": total(item["seconds"]["merge"] for item in iterations),
        "fold": total(item["seconds"]["fold"] for item in iterations),
    }


def _overhead(
    sessions: Sequence[Mapping[str, Any]],
    branches: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float | None],
) -> dict[str, float | None]:
    """Time that one plain training run over the same tokens would not have taken, evaluation aside.

    Plain training reads and packs the data, loads the base once a session, sets a trainer up once, and takes the steps.
    The rest is the loop's: loading again, setting up further branches, merging, folding, and `other`.
    """
    wall = (seconds["wall"] or 0.0) - (seconds["evaluate"] or 0.0)
    setups = [branch["setup_seconds"] or 0.0 for branch in branches]
    setting_up_again = sum(setups) - max(setups, default=0.0)
    plain = (seconds["data"] or 0.0) + sum(session["first_load_seconds"] for session in sessions)
    plain += (seconds["train"] or 0.0) - setting_up_again
    overhead = max(0.0, wall - plain)
    return {"seconds": overhead, "share": overhead / wall if wall > 0 else None}


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
