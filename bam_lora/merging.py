"""The merge as a step of a run: from the branches' adapters to coefficients in the ledger and `merge.json`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from bam_lora.adapters import Adapter
from bam_lora.coefficients import Coefficients
from bam_lora.dense_methods import DenseOptions
from bam_lora.gpu_memory import LESS_TO_TRAIN, room_for
from bam_lora.learned_weights import LearnedWeights
from bam_lora.merge import MergedAdapters
from bam_lora.merge_learning import branch_folders, learn_merge, past_folders, search_merge
from bam_lora.merge_search import SearchedWeights
from bam_lora.merge_statistics import merge_statistics
from bam_lora.merge_weights import resolve_weights
from bam_lora.module_weights import resolve_by_module, weights_by_name
from bam_lora.outer import OuterStep, outer_update, past_merges
from bam_lora.plan import IterationPlan
from bam_lora.recipe_rules import SELECTED
from bam_lora.snapshots import Snapshot, read_snapshot, write_merged
from bam_lora.stages import Context
from bam_lora.store import digest, read_record, verify, write_record
from bam_lora.views import with_weights

_Found = TypeVar("_Found", LearnedWeights, SearchedWeights)


@dataclass(frozen=True)
class _Merged:
    """What a merge decided: the adapters it uses, its own branches' first, and what `merge.json` says of the choice."""

    folders: list[Path]
    weights: list[float]
    coefficients: dict[str, Coefficients]
    chosen: dict[str, Any] = field(default_factory=dict)
    snapshot: Snapshot | None = None


def merge(context: Context, iteration: IterationPlan) -> None:
    """Merges the branches' deltas and enters them into the ledger, unless that is done."""
    directory, number, wanted = context.directory, iteration.iteration, iteration.merge
    adapters = [Adapter.open(folder) for folder in branch_folders(directory, iteration)]
    weights = resolve_weights(wanted["weights"], len(adapters), iteration.tokens, wanted["scale"])
    by_module = resolve_by_module(wanted["weights_by_module"], len(adapters), iteration.tokens, wanted["scale"])
    key = _key(context, iteration, [adapter.hashes() for adapter in adapters], weights, by_module)
    path = directory.iteration(number) / "merge.json"
    if read_record(path, key) is not None and len(context.ledger.iterations) >= number:
        return
    context.progress.stage(f"iteration {number}: merging {len(adapters)} branches")
    started = time.monotonic()
    merged = _merged(context, iteration, adapters, weights, by_module)
    names = [folder.relative_to(directory.root).as_posix() for folder in merged.folders]
    snapshot = (merged.snapshot.path, merged.snapshot.same) if merged.snapshot else ()
    context.ledger.record(number, names, wanted["method"], merged.coefficients, *snapshot)
    context.ledger.save()
    record = {
        "iteration": number,
        "method": wanted["method"],
        "weights": merged.weights,
        "weights_by_module": by_module,
        "outer": wanted["outer"],
        "tokens": iteration.tokens,
        "seconds": time.monotonic() - started,
    }
    used = [Adapter.open(folder) for folder in merged.folders]
    norms = merged.snapshot.norms if merged.snapshot else None
    whole = {**record, **merge_statistics(used, merged.coefficients, len(adapters), norms), **merged.chosen}
    write_record(path, key, whole)
    context.front.merged(number, whole)


def _key(
    context: Context,
    iteration: IterationPlan,
    hashes: Sequence[Any],
    weights: Sequence[float],
    by_module: Mapping[str, Sequence[float]],
) -> str:
    wanted, before = iteration.merge, context.ledger.key(iteration.iteration - 1)
    key = digest([hashes, wanted["method"], weights, vars(dense_options(context, iteration))])
    if by_module or not OuterStep(**wanted["outer"]).is_plain:
        key = digest([key, list(by_module.items()), wanted["outer"], before])
    if wanted["weights"] in SELECTED:
        assert context.selection is not None
        settings = wanted["learned" if wanted["weights"] == "learned" else "search"]
        key = digest([key, settings, context.selection.key, [before, context.training_load.facts()]])
    return key


def _merged(
    context: Context,
    iteration: IterationPlan,
    adapters: Sequence[Adapter],
    weights: list[float],
    by_module: Mapping[str, list[float]],
) -> _Merged:
    directory, number, wanted = context.directory, iteration.iteration, iteration.merge
    folders = branch_folders(directory, iteration)
    if wanted["weights"] == "learned":
        if wanted["learned"]["scope"] == "run":
            folders += past_folders(directory, context.plan, number, context.training_load.compute_dtype)
        snapshot = _snapshot(context, number, MergedAdapters(adapters, weights))
        learned = _learned(context, iteration, [Adapter.open(folder) for folder in folders], weights, snapshot)
        return _Merged(folders, weights, learned.coefficients, {"learned": learned.record()}, snapshot)
    chosen = {}
    if wanted["weights"] == "search":
        snapshot = _snapshot(context, number, MergedAdapters(adapters, weights))
        searched = _searched(context, iteration, adapters, weights, snapshot)
        weights, chosen["searched"] = searched.weights, searched.record()
    names = {name for adapter in adapters for name in adapter.names}
    options, by_name = dense_options(context, iteration), weights_by_name(names, by_module)
    merged = MergedAdapters(adapters, weights, wanted["method"], options, by_name)
    coefficients = merged.all_coefficients()
    outer = OuterStep(**wanted["outer"])
    if outer.is_plain:
        return _Merged(folders, weights, coefficients, chosen, _snapshot(context, number, merged))
    earlier = [branch_folders(directory, one) for one in context.plan.iterations[: number - 1]]
    past = past_merges(context.ledger, earlier, outer)
    folders += [folder for one in past for folder in one.folders]
    return _Merged(folders, weights, outer_update(coefficients, len(adapters), past, outer), chosen)


def dense_options(context: Context, iteration: IterationPlan) -> DenseOptions:
    """What the recipe says to the methods that work element by element; each iteration has a seed of its own."""
    wanted = iteration.merge
    return DenseOptions(wanted["density"], wanted["gamma"], context.recipe.seed + iteration.iteration)


def _snapshot(context: Context, number: int, merged: MergedAdapters) -> Snapshot | None:
    """Whole weights where the merge is no low-rank product."""
    names = [name for name in merged.names() if merged.is_dense(name)]
    if not names:
        return None
    before, root = context.ledger.view(number - 1), context.directory.root
    manifests = [verify(adapter.path.parent, quick=True) for adapter in merged.adapters]
    types = {manifest["facts"].get("whole_in") or "float32" for manifest in manifests if manifest is not None}
    assert len(types) == 1, types  # branches of one iteration are trained alike
    return write_merged(root, number, context.original.folder, before, merged, names, getattr(torch, types.pop()))


def _learned(
    context: Context,
    iteration: IterationPlan,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    snapshot: Snapshot | None,
) -> LearnedWeights:
    result = _on_selection(
        context,
        iteration,
        adapters,
        weights,
        snapshot,
        learn_merge,
        "learned",
        "learning the merge weights, step {}/{}",
    )
    last = result.history[result.best]
    context.progress.say(
        f"iteration {iteration.iteration}: merge weights learned, held-out target {last['target']:.4f}, "
        f"source {last['source']:.4f}"
    )
    return result


def _searched(
    context: Context,
    iteration: IterationPlan,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    snapshot: Snapshot | None,
) -> SearchedWeights:
    result = _on_selection(
        context,
        iteration,
        adapters,
        weights,
        snapshot,
        search_merge,
        "search",
        "searching the merge weights, {} of at most {}",
    )
    found = "/".join(f"{weight:g}" for weight in result.weights)
    found = f"merge weights {found}" if any(result.weights) else "merge rejected, the base stays as it was"
    context.progress.say(f"iteration {iteration.iteration}: {found}, of {len(result.trials)} candidates")
    return result


def _on_selection(
    context: Context,
    iteration: IterationPlan,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    snapshot: Snapshot | None,
    find: Callable[..., _Found],
    settings: str,
    doing: str,
) -> _Found:
    """Finds weights by the selection sets on the branches' own base; a stop is heeded at every step."""
    assert context.selection is not None
    number = iteration.iteration

    def on_step(step: int, steps: int) -> None:
        context.stop.check()
        context.progress.stage(f"iteration {number}: {doing.format(step, steps)}")

    model = context.model(number - 1, context.training_load)
    with room_for(f"iteration {number}: choosing the merge weights", LESS_TO_TRAIN):
        if snapshot is not None:  # whole weights are averaged as they are, before the rest is chosen
            model = with_weights(model, read_snapshot(context.directory.root, snapshot), snapshot.same)
        return find(
            model,
            adapters, weights, context.selection, context.recipe, iteration, iteration.merge[settings],
            on_step=on_step,
        )  # fmt: skip
