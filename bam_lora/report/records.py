"""Reading the files of a run directory: a damaged one is an error that names it, a missing one is None."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from bam_lora import store
from bam_lora.errors import UserError

# Enough for a smooth curve at any screen width; a long run's metrics would otherwise make the page megabytes large.
LOSS_POINTS = 200
SHRINK_FORMAT = 1
# Optimizer step, loss in nats per token, tokens trained on until then.
Logged = tuple[float, float, int | None]


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON record without its key, None if the run has not made it."""
    if not path.exists():
        return None
    body = store.read_record(path)
    if body is None:
        raise UserError.of(
            str(path),
            expected="a whole record",
            found="content that does not match its own hash",
            remedy="Resume the run, which makes it again, or restore the file",
        )
    body.pop("key", None)
    return body


def read_recipe(path: Path) -> dict[str, Any]:
    """The resolved recipe a run was started with.

    Raises:
        UserError: If it is not a YAML mapping.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        found = " ".join(str(error).split())
        raise UserError.of(str(path), expected="YAML", found=found, remedy="Restore the file") from None
    if not isinstance(recipe, dict):
        found = type(recipe).__name__
        raise UserError.of(str(path), expected="a resolved recipe", found=found, remedy="Restore the file")
    return recipe


def read_shrink(path: Path) -> list[dict[str, Any]] | None:
    """The points of `shrink.json`, None if there is no such file.

    Raises:
        UserError: If it is damaged or of another format.
    """
    body = read_record(path)
    if body is None:
        return None
    if body.get("format") != SHRINK_FORMAT:
        raise UserError.of(
            str(path),
            expected=f"format {SHRINK_FORMAT}",
            found=repr(body.get("format")),
            remedy="Delete the file and make it again with `bam-lora shrink`",
        )
    return list(body["points"])


def iteration_folder(run: Path, iteration: int) -> Path:
    """Where an iteration keeps its files; 0 is the base's."""
    return run / "iterations" / f"{iteration:02d}"


def read_losses(run: Path, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training loss (nats per token) of each branch that has logged any.

    Returns:
        {"iteration", "branch", "points": [[optimizer step, loss], ...], "tokens": [tokens trained on until that step,
        ...] or None where they were not logged} a branch.
    """
    result = []
    for item in planned:
        for branch in item["branches"]:
            folder = iteration_folder(run, item["iteration"]) / f"branch-{branch['branch']}"
            logged = _thinned(_metrics(folder / "metrics.jsonl", whole=(folder / store.MANIFEST).exists()))
            if logged:
                points = [[step, loss] for step, loss, _ in logged]
                tokens = [count for _, _, count in logged]
                known = None if None in tokens else tokens
                branch_of = {"iteration": item["iteration"], "branch": branch["branch"]}
                result.append({**branch_of, "points": points, "tokens": known})
    return result


def _metrics(path: Path, *, whole: bool) -> list[Logged]:
    if not path.exists():
        return []
    points = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step, loss, tokens = entry["step"], entry.get("loss"), entry.get("tokens")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            if not whole and number == len(lines):
                break  # the branch is being trained right now: its last line is half-written
            raise UserError.of(
                f"{path} line {number}",
                expected="JSON with a step",
                found=repr(line[:60]),
                remedy="Delete this branch's folder and resume the run",
            ) from None
        if isinstance(loss, int | float) and math.isfinite(loss):
            points.append((step, loss, tokens))
    return points


def _thinned(points: list[Logged]) -> list[Logged]:
    """At most LOSS_POINTS of them, evenly spaced, the first and the last among them."""
    if len(points) <= LOSS_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (LOSS_POINTS - 1))] for i in range(LOSS_POINTS)]
