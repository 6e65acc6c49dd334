"""The merge as a step of a run: from the branches' adapters to coefficients in the ledger and `merge.json`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from bam_lora.adapters import Adapter
from bam_lora.dense_methods import DenseOptions
from bam_lora.learned_weights import LearnedWeights
from bam_lora.merge import MergedAdapters
from bam_lora.merge_learning import branch_folders, learn_merge, past_folders
from bam_lora.merge_statistics import merge_statistics
from bam_lora.merge_weights import resolve_weights
from bam_lora.plan import IterationPlan
from bam_lora.snapshots import write_merged
from bam_lora.stages import Context
from bam_lora.store import digest, read_record, write_record


def merge(context: Context, iteration: IterationPlan) -> None:
    """Merges the branches' deltas and enters them into the ledger, unless that is done."""
    directory, number = context.directory, iteration.iteration
    folders = branch_folders(directory, iteration)
    adapters = [Adapter.open(folder) for folder in folders]
    wanted = iteration.merge
    weights = resolve_weights(wanted["weights"], len(adapters), iteration.tokens, wanted["scale"])
    options = vars(dense_options(context, iteration))
    key = digest([[adapter.hashes() for adapter in adapters], wanted["method"], weights, options])
    if wanted["weights"] == "learned":
        assert context.selection is not None
        base = [context.ledger.key(number - 1), vars(context.training_load)]
        key = digest([key, wanted["learned"], context.selection.key, base])
    path = directory.iteration(number) / "merge.json"
    if read_record(path, key) is not None and len(context.ledger.iterations) >= number:
        return
    context.progress.stage(f"iteration {number}: merging {len(adapters)} branches")
    started = time.monotonic()
    merged = MergedAdapters(adapters, weights, wanted["method"], dense_options(context, iteration))
    learned: dict[str, Any] = {}
    snapshot, norms = _snapshot(context, number, merged)
    if wanted["weights"] == "learned":
        if wanted["learned"]["scope"] == "run":
            folders += past_folders(directory, context.plan, number, context.training_load.compute_dtype)
        adapters = [Adapter.open(folder) for folder in folders]
        result = _learned(context, iteration, adapters, weights)
        coefficients, learned["learned"] = result.coefficients, result.record()
    else:
        coefficients = merged.all_coefficients()
    names = [folder.relative_to(directory.root).as_posix() for folder in folders]
    context.ledger.record(number, names, wanted["method"], coefficients, snapshot)
    context.ledger.save()
    record = {
        "iteration": number,
        "method": wanted["method"],
        "weights": weights,
        "tokens": iteration.tokens,
        "seconds": time.monotonic() - started,
    }
    statistics = merge_statistics(adapters, coefficients, len(weights), norms)
    write_record(path, key, {**record, **statistics, **learned})


def dense_options(context: Context, iteration: IterationPlan) -> DenseOptions:
    """What the recipe says to the methods that work element by element; each iteration has a seed of its own."""
    wanted = iteration.merge
    return DenseOptions(wanted["density"], wanted["gamma"], context.recipe.seed + iteration.iteration)


def _snapshot(context: Context, number: int, merged: MergedAdapters) -> tuple[str | None, dict[str, float]]:
    """Whole weights where the merge is no low-rank product: (file, norm of the change by weight)."""
    names = [name for name in merged.names() if merged.is_dense(name)]
    if not names:
        return None, {}
    before = context.ledger.view(number - 1)
    root, base = context.directory.root, context.original.folder
    return write_merged(root, number, base, before, merged, names)


def _learned(
    context: Context, iteration: IterationPlan, adapters: Sequence[Adapter], weights: Sequence[float]
) -> LearnedWeights:
    assert context.selection is not None
    number = iteration.iteration

    def on_step(step: int, steps: int) -> None:
        context.stop.check()
        context.progress.stage(f"iteration {number}: learning the merge weights, step {step}/{steps}")

    result = learn_merge(
        context.model(number - 1, context.training_load),
        adapters, weights, context.selection, context.recipe, iteration, iteration.merge["learned"],
        on_step=on_step,
    )  # fmt: skip
    last = result.history[result.best]
    context.progress.say(
        f"iteration {number}: merge weights learned, held-out target {last['target']:.4f}, source {last['source']:.4f}"
    )
    return result
