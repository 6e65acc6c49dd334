"""A run directory -> `report.json`: nothing is measured here, everything is read from the run's own records.

What a run has not made yet is null, so a report can be written at any moment. A record that is there but damaged is
an error, never a gap. The meaning of every key is in docs/format.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bam_lora import store
from bam_lora.base_card import BASE_CARD
from bam_lora.errors import no_run
from bam_lora.report.cost import cost, total
from bam_lora.report.layers import cosine_by_layer, norm_by_layer
from bam_lora.report.noise import difference_error, pooled
from bam_lora.report.records import iteration_folder, read_losses, read_recipe, read_record, read_shrink
from bam_lora.report.tasks import read_tasks
from bam_lora.report.vocabulary import read_vocabulary

FORMAT = 1
ROLES = ("target", "source")
# Names such as `bul_Cyrl` (FineWeb-2, FLORES): ISO 639-3 language, ISO 15924 script.
_LANGUAGE = re.compile(r"([a-z]{3})_[A-Z][a-z]{3}")


def collect(run: Path) -> dict[str, Any]:
    """Gathers what a run directory holds, finished or not, into one JSON value.

    Args:
        run: The run directory.

    Returns:
        The content of `report.json`. Scores are in bits per byte, times in seconds, sizes in bytes; null is "not
        measured (yet)".

    Raises:
        UserError: If `run` is not a run directory, or one of its records is damaged.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise no_run(run)
    recipe = read_recipe(run / "recipe.yaml")
    plan = read_record(run / "plan.json") or {}
    ended = read_record(run / "limits.json")
    planned = plan.get("iterations", [])[: ended["iteration"] if ended else None]
    evaluations = read_evaluations(run, planned)
    summary = _summary(run, evaluations)
    iterations = [_iteration(run, item, evaluations, summary) for item in planned]
    return {
        "format": FORMAT,
        **_identity(run, recipe, planned),
        "status": _status(planned, iterations, evaluations, ended),
        "limits": ended,
        "evaluation": _settings(evaluations),
        "scores": _scores(evaluations),
        "summary": summary,
        "iterations": iterations,
        "inherited": (read_record(run / "chain.json") or {}).get("runs", []),
        "shrink": _shrink(run, summary),
        "baseline": read_record(run / "baseline.json"),
        "vocabulary": read_vocabulary(run),
        "tasks": read_tasks(run, planned, recipe),
        "cost": cost(run, iterations, evaluations),
        "data": plan.get("data"),
        "tokenizer": plan.get("tokenizer"),
        "losses": read_losses(run, planned),
        "base_card": read_record(run / BASE_CARD),
        "samples": (read_record(run / "samples.json") or {}).get("samples", []),
        "recipe": recipe,
        "environment": read_record(run / "environment.json"),
    }


def _identity(run: Path, recipe: Mapping[str, Any], planned: list[dict[str, Any]]) -> dict[str, Any]:
    """What run this is, and what it was made from."""
    return {
        "name": run.resolve().name,
        "strategy": recipe.get("strategy"),
        "mode": recipe.get("mode"),
        "base": recipe.get("base"),
        "revision": recipe.get("revision"),
        "languages": _languages(recipe),
        "recipe_sha256": store.hash_file(run / "recipe.yaml"),
        "seeds": {
            "run": recipe.get("seed"),
            "branches": [[branch["seed"] for branch in item["branches"]] for item in planned],
        },
    }


def _languages(recipe: Mapping[str, Any]) -> dict[str, list[str]]:
    """ISO 639-3 codes, as far as the data sets' configuration names tell them."""
    data = recipe.get("data") or {}
    result = {}
    for role, key in (("target", "target"), ("source", "replay")):
        names = [str(source.get("name") or "") for source in data.get(key) or []]
        result[role] = sorted({match[1] for name in names if (match := _LANGUAGE.fullmatch(name))})
    return result


def read_evaluations(run: Path, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every eval.json in the order the models were made: base, then each iteration's branches and merged model."""
    paths: list[tuple[int, int | None, Path]] = [(0, None, iteration_folder(run, 0))]
    for item in planned:
        folder = iteration_folder(run, item["iteration"])
        paths += [(item["iteration"], b["branch"], folder / f"branch-{b['branch']}") for b in item["branches"]]
        paths.append((item["iteration"], None, folder))
    found = [(iteration, branch, read_record(folder / "eval.json")) for iteration, branch, folder in paths]
    return [{**body, "iteration": t, "branch": k} for t, k, body in found if body is not None]


def _settings(evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not evaluations:
        return None
    return {key: evaluations[0].get(key) for key in ("precision", "window_bytes", "overlap_bytes")}


def _scores(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("set", "role", "bits_per_byte", "stderr", "documents", "bytes")
    return [
        {
            "iteration": evaluation["iteration"],
            "branch": evaluation["branch"],
            **{key: score.get(key) for key in keys},
            "precision": evaluation.get("precision"),
        }
        for evaluation in evaluations
        for score in evaluation["scores"]
    ]


def _status(
    planned: list[dict[str, Any]], iterations: list[dict[str, Any]], evaluations: list[dict[str, Any]],
    ended: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """How far the run is; finished once every iteration up to its end is merged and, if at all, measured."""
    done = sum(item["coefficients"] is not None for item in iterations)
    measured = max((e["iteration"] for e in evaluations if e["branch"] is None), default=None)
    return {
        "finished": bool(planned) and done == len(planned) and measured in (None, planned[-1]["iteration"]),
        "iterations_done": done,
        "iterations_planned": ended["planned"] if ended else len(planned) or None,
        "measured_iteration": measured,
    }


def scores_of(
    evaluations: list[dict[str, Any]], iteration: int | None, branch: int | None = None
) -> list[dict[str, Any]]:
    """The score entries of one model, or of the newest merged one for `iteration` None; empty if not measured."""
    chosen = [e for e in evaluations if e["branch"] == branch]
    if iteration is None:
        chosen = [e for e in chosen if e["iteration"] > 0]
    else:
        chosen = [e for e in chosen if e["iteration"] == iteration]
    return list(chosen[-1]["scores"]) if chosen else []


def _summary(run: Path, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    before, after = scores_of(evaluations, 0), scores_of(evaluations, None)
    values: dict[str, float | None] = {}
    for role in ROLES:
        values[f"{role}_before"], values[f"{role}_before_stderr"] = pooled(before, role)
        values[f"{role}_after"], values[f"{role}_after_stderr"] = pooled(after, role)
    (learned_error, paired), (forgotten_error, _) = (difference_error(before, after, role) for role in ROLES)
    result = read_record(run / "result.json") or {}
    return {
        **{f"{role}_{when}": values[f"{role}_{when}"] for role in ROLES for when in ("before", "after")},
        "learned": _difference(values["target_before"], values["target_after"]),
        "forgotten": _difference(values["source_after"], values["source_before"]),
        "delta_norm": result.get("delta_norm"),
        "delta_relative": result.get("delta_relative"),
        **{f"{role}_{when}_stderr": values[f"{role}_{when}_stderr"] for role in ROLES for when in ("before", "after")},
        "learned_stderr": learned_error,
        "forgotten_stderr": forgotten_error,
        "paired_stderr": paired,
    }


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _measured(scores: list[dict[str, Any]], summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The pooled scores of one model, and what it has learned and forgotten since the base."""
    values: dict[str, float | None] = {}
    for role in ROLES:
        values[role], values[f"{role}_stderr"] = pooled(scores, role)
    values["learned"] = _difference(summary["target_before"], values["target"])
    values["forgotten"] = _difference(values["source"], summary["source_before"])
    return values


def _shrink(run: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The other models of the run that were scored: its change scaled by λ, checkpoints, averages, learned weights."""
    points = read_shrink(run / "shrink.json")
    if points is None:
        return None
    keys = ("kind", "label", "scale", "delta_norm")
    return [{**{key: point.get(key) for key in keys}, **_measured(point["scores"], summary)} for point in points]


def _iteration(
    run: Path, planned: Mapping[str, Any], evaluations: list[dict[str, Any]], summary: Mapping[str, Any]
) -> dict[str, Any]:
    number = planned["iteration"]
    folder = iteration_folder(run, number)
    merge = read_record(folder / "merge.json") or {}
    fold = read_record(folder / "fold.json") or {}
    evaluation = read_record(folder / "eval.json") or {}
    branches = [
        {
            **_branch(folder / f"branch-{b['branch']}", b),
            "measured": _measured(scores_of(evaluations, number, b["branch"]), summary),
        }
        for b in planned["branches"]
    ]
    return {
        "iteration": number,
        "tokens": sum(b["tokens"] for b in planned["branches"]),
        "cosine": merge.get("cosine"),
        "cosine_by_layer": cosine_by_layer(merge.get("tensors") or {}),
        "norm_by_layer": norm_by_layer(merge.get("tensors") or {}),
        "delta_norms": merge.get("delta_norms"),
        "merged_norm": merge.get("merged_norm"),
        "method": merge.get("method"),
        "coefficients": merge.get("weights"),
        "learned": merge.get("learned"),
        "searched": merge.get("searched"),
        "delta_norm": fold.get("delta_norm"),
        "weight_norm": fold.get("weight_norm"),
        "measured": _measured(scores_of(evaluations, number), summary),
        "branches": branches,
        "seconds": {
            "train": total(b["seconds"] for b in branches),
            "evaluate": total([evaluation.get("seconds"), *(b["evaluate_seconds"] for b in branches)]),
            "merge": merge.get("seconds"),
            "fold": fold.get("seconds"),
        },
    }


def _branch(folder: Path, planned: Mapping[str, Any]) -> dict[str, Any]:
    """One branch: what was planned for it, and what came of it once its manifest is there."""
    facts = (read_record(folder / store.MANIFEST) or {}).get("facts", {})
    evaluation = read_record(folder / "eval.json") or {}
    plan_keys = ("branch", "slice", "group", "seed", "target_tokens", "replay_tokens", "steps")
    times = ("seconds", "setup_seconds", "checkpoint_seconds")
    fact_keys = ("tokens", *times, "loss_first", "loss_last", "peak_gpu_bytes")
    return {
        **{key: planned.get(key) for key in plan_keys},
        **{key: facts.get(key) for key in fact_keys},
        "evaluate_seconds": evaluation.get("seconds"),
    }
