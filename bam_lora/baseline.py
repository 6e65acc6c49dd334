"""A probe of whether the recipe earns its keep: it and one plain run, both on a small share of the tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.base import context_length, load_tokenizer
from bam_lora.errors import UserError
from bam_lora.loop import run
from bam_lora.planning import is_source
from bam_lora.progress import RunProgress
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.recipe_rules import SELECTED
from bam_lora.report import compare
from bam_lora.rundir import RunDirectory, recipe_key
from bam_lora.scoring_sets import selection_windows
from bam_lora.shrink import SCALES, shrink
from bam_lora.slicing import quotas
from bam_lora.sources import TextSource, text_source
from bam_lora.store import digest, read_record, write_record
from bam_lora.token_files import tokenised

_FOLDER = "baseline"
_MOST = 0.1  # of the target tokens, that selection text may take the place of


def probe_baseline(root: Path, recipe: Recipe, share: float) -> dict[str, Any]:
    """Trains a finished run's recipe and a `single` run on a share of its tokens, and compares them.

    Both lie in `RUN/baseline/`; the single run's delta is scored at several sizes, and the recipe is judged at its own
    target score against that curve. Where the recipe learns its merge weights, the single run has the source text that
    they are learned from as replay: a fair rival gets the same text. A second call goes on with what is there.

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
    groups = {branch.get("group") for iteration in plan["iterations"] for branch in iteration["branches"]}
    probe = probe_recipe(recipe, plan["data"]["sources"], share, len(groups))
    place = root / _FOLDER / f"{share:g}-{recipe_key(probe)[:8]}"  # an extended run has another probe
    own, single = place / recipe.strategy, place / "single"
    run(probe, own, progress=RunProgress(title=f"baseline {own.name}"))
    rival, note = _rival_of(probe, RunDirectory(own))
    run(rival, single, progress=RunProgress(title="baseline single"))
    shrink(single, SCALES, progress=RunProgress(title="baseline single"))
    comparison = compare([single, own])
    report = comparison["runs"][1]
    entry = next(one for one in comparison["envelope"] if report["name"] in one["runs"])
    record = {"share": share, "tokens": report["cost"]["train_tokens"], "envelope": entry, "note": note}
    write_record(RunDirectory(root).baseline, digest(record), record)
    return record


def probe_recipe(recipe: Recipe, used: Sequence[dict[str, Any]], share: float, groups: int = 1) -> Recipe:
    """The recipe on a share of the tokens that each target source gave, replay in proportion.

    Slices are cut to two iterations' worth at the most: as many as the whole run has would hold a few steps each.

    Args:
        recipe: A finished run's recipe.
        used: The sources in that run's plan.
        share: Of their target tokens.
        groups: Groups that the run's data is sliced by; the slices stay a multiple of them.
    """
    values = copy.deepcopy(recipe.resolved())
    for source, wanted in zip(values["data"]["target"], recipe.data.target, strict=True):
        tokens = sum(one["used_tokens"] for one in used if one["role"] == "target" and is_source(one, wanted))
        source["tokens"] = max(1, round(share * tokens))
    if values["training"]["max_steps"] > 0:
        values["training"]["max_steps"] = max(values["bam"]["slices"], round(share * values["training"]["max_steps"]))
    values["bam"]["slices"] = min(recipe.bam.slices, math.lcm(groups, 2 * recipe.branches))
    values["evaluation"].update(samples=[], branches=False, tasks=[])
    values["limits"] = {}
    return recipe_from_dict(values)


def rival_recipe(
    probe: Recipe, used: Sequence[Mapping[str, Any]], texts: Sequence[tuple[TextSource, int]]
) -> tuple[Recipe, int]:
    """The probe as one plain run over the same number of tokens: nothing to merge, nothing learned.

    What the probe only looks at, to learn its merge weights by, this run trains on: as replay in place of target text,
    at most a tenth of that, beside the replay that the probe has, whose tokens stay as they are.

    Args:
        probe: The probe's recipe.
        used: The sources in the plan of its run, which say how much it took of each.
        texts: Source text of its selection sets, each with all of its tokens.

    Returns:
        The recipe, and how many tokens of `texts` it trains on.
    """
    values = copy.deepcopy(probe.resolved())
    values["strategy"] = "single"
    values["bam"]["merge"].update(weights="uniform", weights_by_module={}, scale=1.0)
    values["bam"]["outer"].update(learning_rate=1.0, momentum=0.0)
    data = values["data"]
    target, replay = ([one["used_tokens"] for one in used if one["role"] == role] for role in ("target", "replay"))
    sizes = [tokens for _, tokens in texts]
    added = quotas(sizes, [None] * len(sizes), min(sum(sizes), int(_MOST * sum(target))))
    if not sum(added):
        return recipe_from_dict(values), 0
    kept = quotas(target, [None] * len(target), sum(target) - sum(added))
    data["target"] = [
        {**source, "tokens": tokens, "weight": None}
        for source, tokens in zip(data["target"], kept, strict=True)
        if tokens
    ]
    data["replay"] = [  # weights in tokens: the probe's own mix, whatever decided it, and so much of the new
        {**source, "weight": float(tokens)} for source, tokens in zip(data["replay"], replay, strict=True) if tokens
    ] + [
        {**where.described(), "tokens": size, "weight": float(tokens), "filters": {}}
        for (where, size), tokens in zip(texts, added, strict=True)
        if tokens
    ]
    data["replay_share"] = (sum(replay) + sum(added)) / (sum(target) + sum(replay))
    values["selection"] = {"target": [], "source": []}  # this run chooses nothing by it: it is training text now
    return recipe_from_dict(values), sum(added)


def _rival_of(probe: Recipe, own: RunDirectory) -> tuple[Recipe, str | None]:
    """The single run that the finished probe is set against, and what it lacks of the text that the probe had."""
    plan = read_record(own.plan)
    assert plan is not None, "the probe is finished"
    texts = _selection_text(probe, own) if probe.bam.merge.weights in SELECTED else []
    rival, added = rival_recipe(probe, plan["data"]["sources"], texts)
    there = sum(tokens for _, tokens in texts)
    if added == there:
        return rival, None
    return rival, (
        f"The single run trained on {added:,} of the {there:,} tokens of source text that the recipe learns its "
        "weights from: more would leave it too little target text."
    )


def _selection_text(probe: Recipe, own: RunDirectory) -> list[tuple[TextSource, int]]:
    """The source text that merge weights are learned from and that is not replayed anyway, with its tokens."""
    tokenizer = load_tokenizer(own.model)
    selection = selection_windows(probe, tokenizer, own.selection, context_length(own.model))
    assert selection is not None, "learned weights have selection sets"
    sets = [part for part in selection.sets if part.role == "source"]
    replayed = [text_source(source) for source in probe.data.replay]
    return [
        (text_source(source), sum(map(len, tokenised(part.documents, tokenizer))))
        for source, part in zip(probe.selection.source, sets, strict=True)
        if text_source(source) not in replayed
    ]
