"""Where a run is and what is left, from what is on disk; loads no torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from bam_lora.errors import no_run
from bam_lora.limits import read_ended, session_seconds
from bam_lora.report.format import duration, scores_line
from bam_lora.report.records import read_recipe
from bam_lora.store import MANIFEST, read_record
from bam_lora.terminal_text import escaped


def describe_run(root: Path) -> str:
    """A few lines about a run.

    Raises:
        UserError: If the folder is not a run.
    """
    if not (root / "recipe.yaml").is_file():
        raise no_run(root)
    plan = read_record(root / "plan.json")
    if plan is None:
        state = _lock_state(root)
        started = f"{root}: {'running' if state == 'running' else 'started'}; the data is not prepared yet"
        return started if state == "running" else f"{started}\n  go on with: {shlex.join(_again(root))}"
    branches = [branch for iteration in plan["iterations"] for branch in iteration["branches"]]
    done = [branch for branch in branches if _branch_done(root, branch)]
    trained = sum(branch["tokens"] for branch in done)
    total = sum(branch["tokens"] for branch in branches)
    ended = read_ended(root)
    whole = len(done) == len(branches) or ended is not None
    finished = whole and (root / "model" / MANIFEST).exists() and (root / "report.json").exists()
    state = "finished" if finished else _lock_state(root)
    lines = [
        f"{root}: {plan['strategy']}, {state}",
        f"  trained    {len(done)} of {len(branches)} branches, {trained:,} of {total:,} tokens",
        f"  merged     {_merged(root, plan)} of {len(plan['iterations'])} iterations",
    ]
    for branch in branches:
        step = _newest_step(root, branch)
        if step and not _branch_done(root, branch):
            group = f" ({escaped(branch['group'])})" if branch.get("group") else ""
            place = f"iteration {branch['iteration']}, branch {branch['branch']}{group}"
            lines.append(f"  under way  {place}: step {step} of {branch['steps']}")
    scores = _newest_scores(root, plan)
    if scores:
        lines.append(f"  scores     {scores}")
    again = _again(root)
    if finished:
        lines.append(f"  model      {root / 'model'}")
    if not finished and (budget := _budget(root, trained)):
        lines.append(f"  limits     {budget}")
    if ended is not None:
        lines.append(f"  limits     {ended}")
        again += ["--set", ended.enough]
    if finished:
        lines.append(f"  next: {shlex.join(['bam-lora', 'report', str(root)])}")
    if ended is not None or state == "stopped":
        lines.append(f"  go on with: {shlex.join(again)}")
    return "\n".join(lines)


def _again(root: Path) -> list[str]:
    return ["bam-lora", "run", str(root / "recipe.yaml"), "--output", str(root)]


def _budget(root: Path, trained: int) -> str:
    """How much of the recipe's limits is used."""
    limits = read_recipe(root / "recipe.yaml").get("limits") or {}
    parts = []
    if (hours := limits.get("hours")) is not None:
        sessions = (read_record(root / "sessions.json") or {"sessions": []})["sessions"]
        parts.append(f"{duration(session_seconds(sessions))} of {hours:g} hours used")
    if (tokens := limits.get("tokens")) is not None:
        parts.append(f"{trained:,} of {tokens:,} tokens used")
    return "; ".join(parts)


def _folder(root: Path, branch: dict[str, Any]) -> Path:
    return root / "iterations" / f"{branch['iteration']:02}" / f"branch-{branch['branch']}"


def _branch_done(root: Path, branch: dict[str, Any]) -> bool:
    return read_record(_folder(root, branch) / MANIFEST) is not None


def _merged(root: Path, plan: dict[str, Any]) -> int:
    folders = (root / "iterations" / f"{iteration['iteration']:02}" for iteration in plan["iterations"])
    return sum(read_record(folder / "merge.json") is not None for folder in folders)


def _newest_step(root: Path, branch: dict[str, Any]) -> int | None:
    folders = (_folder(root, branch) / "checkpoints").glob(f"checkpoint-*/{MANIFEST}")
    return max((int(path.parent.name.rpartition("-")[2]) for path in folders), default=None)


def _newest_scores(root: Path, plan: dict[str, Any]) -> str | None:
    for number in range(len(plan["iterations"]), -1, -1):
        record = read_record(root / "iterations" / f"{number:02}" / "eval.json")
        if record:
            where = f"after iteration {number}" if number else "base"
            return f"{where}: {scores_line(record['scores'])}"
    return None


def _lock_state(root: Path) -> str:
    """Whether some process works on the run now."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(root / ".lock"), timeout=0)
    try:
        with lock:
            return "stopped"
    except Timeout:
        return "running"
