"""A probe of whether the recipe earns its keep: it and one plain run, both on a small share of the tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.loop import run
from bam_lora.planning import is_source
from bam_lora.progress import RunProgress
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report import compare
from bam_lora.rundir import RunDirectory, recipe_key
from bam_lora.shrink import SCALES, shrink
from bam_lora.store import digest, read_record, write_record

_FOLDER = "baseline"


def probe_baseline(root: Path, recipe: Recipe, share: float) -> dict[str, Any]:
    """Trains a finished run's recipe and a `single` run on a share of its tokens, and compares them.

    Both lie in `RUN/baseline/`; the single run's delta is scored at several sizes, and the recipe is judged at its own
    target score against that curve. A second call goes on with what is there.

    Args:
        root: Directory of the finished run.
        recipe: Its recipe.
        share: Of the tokens of each target source, above 0 and at most 1.

    Returns:
        `baseline.json`: {"share", "tokens", "envelope": the recipe's entry as `compare` gives it, "note": its limits}.

    Raises:
        UserError: If the share is out of range, the recipe is the baseline itself, or nothing is measured.
    """
    if not 0 < share <= 1:
        raise UserError.of(
            "--baseline", expected="a share above 0 and at most 1", found=f"{share:g}", remedy="Try 0.05"
        )
    if recipe.strategy == "single":
        raise UserError.of(
            "--baseline",
            expected="a recipe to compare with a single run",
            found="strategy: single",
            remedy="Leave it out",
        )
    if not recipe.evaluation.target or not recipe.evaluation.source:
        raise UserError.of(
            "--baseline", expected="evaluation.target and evaluation.source", found="not both", remedy="Name the sets"
        )
    plan = read_record(RunDirectory(root).plan)
    assert plan is not None, "the run is finished"
    probes = {name: probe_recipe(recipe, plan["data"]["sources"], share, name) for name in ("single", recipe.strategy)}
    place = root / _FOLDER / f"{share:g}-{recipe_key(probes[recipe.strategy])[:8]}"  # an extended run has another probe
    folders = {name: place / name for name in probes}
    for name, probe in probes.items():
        run(probe, folders[name], progress=RunProgress(title=f"baseline {name}"))
    shrink(folders["single"], SCALES, progress=RunProgress(title="baseline single"))
    comparison = compare(list(folders.values()))
    own = comparison["runs"][list(probes).index(recipe.strategy)]
    entry = next(one for one in comparison["envelope"] if own["name"] in one["runs"])
    tokens = own["cost"]["train_tokens"]
    learned = recipe.bam.merge.weights == "learned"
    note = (
        "The single run did not train on the selection text that the recipe learns its weights from."
        if learned
        else None
    )
    record = {"share": share, "tokens": tokens, "envelope": entry, "note": note}
    write_record(RunDirectory(root).baseline, digest(record), record)
    return record


def probe_recipe(recipe: Recipe, used: list[dict[str, Any]], share: float, strategy: str) -> Recipe:
    """The recipe on a share of the tokens that each target source gave, replay in proportion.

    Slices are cut to two iterations' worth at the most: as many as the whole run has would hold a few steps each.
    """
    values = copy.deepcopy(recipe.resolved())
    for source, wanted in zip(values["data"]["target"], recipe.data.target, strict=True):
        tokens = sum(one["used_tokens"] for one in used if one["role"] == "target" and is_source(one, wanted))
        source["tokens"] = max(1, round(share * tokens))
    if values["training"]["max_steps"] > 0:
        values["training"]["max_steps"] = max(values["bam"]["slices"], round(share * values["training"]["max_steps"]))
    values["bam"]["slices"] = min(recipe.bam.slices, 2 * recipe.branches)
    values["evaluation"].update(samples=[], branches=False)
    values["strategy"] = strategy
    if strategy == "single":  # a plain one: nothing to merge, nothing learned
        values["bam"]["merge"].update(weights="uniform", scale=1.0)
    return recipe_from_dict(values)
