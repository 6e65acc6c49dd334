"""Where the time of a measured process went, and what that makes of a longer run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

GROWING = {"data", "steps"}
"""Stages that grow with the tokens; the others are taken to stay as they are."""


def plain_stages(seconds: float, passed: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage of the plain script.

    Args:
        seconds: Of the whole process.
        passed: Seconds since its start at which each part was over.
    """
    return {
        "imports": passed["imports"],
        "load and data": passed["constructed"] - passed["imports"],
        "steps": passed["trained"] - passed["constructed"],  # with the Trainer's own preparation and checkpoints
        "save": passed["saved"] - passed["trained"],
        "start and exit": seconds - passed["saved"],
    }


def bam_stages(seconds: float, passed: Mapping[str, float], run: Path) -> dict[str, float]:
    """Seconds by stage of Branch-and-Merge, from the records of its run directory.

    Args:
        seconds: Of the whole process.
        passed: Seconds since its start at which each part was over.
        run: The run directory.
    """
    report = json.loads((run / "report.json").read_text())
    stages, wall = report["cost"]["seconds_by_stage"], report["cost"]["wall_seconds"]
    branches = [branch for item in report["iterations"] for branch in item["branches"]]
    setup, checkpoints = (sum(b[f"{name}_seconds"] for b in branches) for name in ("setup", "checkpoint"))
    folders = [
        run / f"iterations/{t['iteration']:02}/branch-{b['branch']}"
        for t in report["iterations"]
        for b in t["branches"]
    ]
    steps = sum(map(_last_step, folders)) - setup - checkpoints
    return {
        "imports": passed["imports"],
        "construct": passed["constructed"] - passed["imports"],
        "data": stages["data"],
        "load": stages["load"],
        "set up trainers": setup,
        "steps": steps,
        "checkpoints": checkpoints,
        "write adapters": stages["train"] - setup - steps - checkpoints,
        "merge": stages["merge"],
        "fold": stages["fold"],
        "rest of the run": stages["other"],
        "report and more": passed["trained"] - passed["constructed"] - wall,
        "save": passed["saved"] - passed["trained"],
        "start and exit": seconds - passed["saved"],
    }


def _last_step(branch: Path) -> float:
    """Seconds from a branch's start to its last step, by its last line of metrics."""
    return float(json.loads((branch / "metrics.jsonl").read_text().splitlines()[-1])["seconds"])


def scaled(stages: Mapping[str, float], factor: float) -> float:
    """Seconds of a whole process on `factor` times the tokens."""
    return sum(seconds * (factor if name in GROWING else 1.0) for name, seconds in stages.items())
