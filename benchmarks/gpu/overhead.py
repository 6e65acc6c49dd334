"""What the loop costs beside plain training over the same tokens, worked out from the stages of a short run.

One iteration of K branches of T tokens each. Plain training takes K T / speed. The loop takes that and, once an
iteration, load + merge + fold + the rest of the run, and for each branch its setting up and the writing of its adapter.
Scoring aside, which plain training would want as well, and preparing the data, which both do. The rest holds what is
done once a run, imports and report, as if every iteration did it. Plain training's own loading and setting up are not
counted for it. Both are against us. A second share, `share_beside_a_script`, counts what a script of plain training
does once besides its steps, too: it loads the base, sets up a trainer, writes an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BRANCH_TOKENS = 10_000_000


def overhead(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arithmetic of the run that is recorded; None without one."""
    runs = [one for one in values["jobs"].values() if one["kind"] == "run" and "result" in one]
    if not runs:
        return None
    return {"shape": runs[0]["settings"]["shape"], **arithmetic(runs[0]["result"], BRANCH_TOKENS)}


def arithmetic(run: Mapping[str, Any], branch_tokens: int) -> dict[str, Any]:
    """Each term in seconds, and `share`, what the loop adds over what plain training takes.

    Args:
        run: What run_job.py measured.
        branch_tokens: T.
    """
    branches = len(run["branches"])
    stages = run["seconds_by_stage"]
    speed = run["tokens_per_step"] / run["median_step_seconds"]
    per_iteration = {
        "load": stages.get("load", 0.0),
        "merge": stages.get("merge", 0.0),
        "fold": stages.get("fold", 0.0),
        "rest of the run": max(0.0, run["wall_seconds"] - sum(stages.values())),
    }
    per_branch = {"set up the trainer": run["setup_seconds"], "write the adapter": run["write_seconds"]}
    added = sum(per_iteration.values()) + branches * sum(per_branch.values())
    plain = branches * branch_tokens / speed
    once = run["load_seconds"] + sum(per_branch.values())  # what a script of plain training does, too
    return {
        "branches": branches,
        "branch_tokens": branch_tokens,
        "tokens_per_second": speed,
        "plain_seconds": plain,
        "per_iteration_seconds": per_iteration,
        "per_branch_seconds": per_branch,
        "added_seconds": added,
        "share": added / plain,
        "share_beside_a_script": (added - once) / (plain + once),
        "left_out": ["data", "evaluate"],
    }
