"""The merge as a step of a run: from the branches' adapters to coefficients in the ledger and `merge.json`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.adapters import Adapter, Factors
from bam_lora.branch import ADAPTER
from bam_lora.learned_weights import LearningSettings, learn_weights, split_selection
from bam_lora.merge import MergedAdapters
from bam_lora.merge_methods import Coefficients, resolve_weights
from bam_lora.merge_statistics import merge_statistics
from bam_lora.plan import IterationPlan, derive_seed
from bam_lora.stages import Context
from bam_lora.store import digest, read_record, write_record

# Training an adapter takes 16 bytes a parameter (weights, gradients, two averages of Adam); so many frozen ones, of 2
# or 4 bytes, take no more.
_ROOM = {"bfloat16": 8, "float16": 8, "float32": 4}


def merge(context: Context, iteration: IterationPlan) -> None:
    """Merges the branches' deltas and enters them into the ledger, unless that is done."""
    directory, number = context.directory, iteration.iteration
    folders = [directory.branch(number, branch.branch) / ADAPTER for branch in iteration.branches]
    adapters = [Adapter.open(folder) for folder in folders]
    wanted = iteration.merge
    weights = resolve_weights(wanted["weights"], len(adapters), iteration.tokens, wanted["scale"])
    key = digest([[adapter.hashes() for adapter in adapters], wanted["method"], weights])
    if wanted["weights"] == "learned":
        assert context.selection is not None
        base = [context.ledger.key(number - 1), vars(context.training_load)]
        key = digest([key, wanted["learned"], context.selection.key, base])
    path = directory.iteration(number) / "merge.json"
    if read_record(path, key) is not None and len(context.ledger.iterations) >= number:
        return
    context.progress.stage(f"iteration {number}: merging {len(adapters)} branches")
    started = time.monotonic()
    merged = MergedAdapters(adapters, weights, wanted["method"])
    learned: dict[str, Any] = {}
    if wanted["weights"] == "learned":
        folders += _past(context, number, len(adapters)) if wanted["learned"]["scope"] == "run" else []
        adapters = [Adapter.open(folder) for folder in folders]
        coefficients, learned["learned"] = learned_coefficients(context, iteration, adapters, weights)
    else:
        coefficients = {name: merged.coefficients(name) for name in merged.names()}
    names = [folder.relative_to(directory.root).as_posix() for folder in folders]
    context.ledger.record(number, names, wanted["method"], coefficients)
    context.ledger.save()
    record = {
        "iteration": number,
        "method": wanted["method"],
        "weights": weights,
        "tokens": iteration.tokens,
        "seconds": time.monotonic() - started,
    }
    write_record(path, key, {**record, **merge_statistics(adapters, coefficients, len(weights)), **learned})


def _past(context: Context, number: int, own: int) -> list[Path]:
    """The adapters of the run's earlier iterations, the newest first, as many as there is room for."""
    earlier = [branch for one in context.plan.iterations[: number - 1] for branch in one.branches]
    earlier.sort(key=lambda branch: (-branch.iteration, branch.branch))
    folders = [context.directory.branch(branch.iteration, branch.branch) / ADAPTER for branch in earlier]
    return folders[: max(0, _ROOM[context.training_load.compute_dtype] - own)]


class _Factors(Mapping[str, Sequence[Factors | None]]):
    """The branches' factors by weight name, read when they are asked for: memory never holds all of them in fp32."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters
        self._names = sorted({name for adapter in adapters for name in adapter.names})

    def __getitem__(self, name: str) -> Sequence[Factors | None]:
        return [adapter.factors(name) for adapter in self._adapters]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def learned_coefficients(
    context: Context, iteration: IterationPlan, adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[dict[str, Coefficients], dict[str, Any]]:
    """Learns the weights of one merge on the selection sets; returns them and what the record keeps of it.

    Adapters beyond the iteration's own are in the base already; what is learned for them is a correction, from zero.
    """
    assert context.selection is not None
    start = [*weights, *[0.0] * (len(adapters) - len(weights))]
    recipe, number, wanted = context.recipe, iteration.iteration, iteration.merge["learned"]
    seed = derive_seed(recipe.seed, "learned weights", number)
    selection = split_selection(context.selection, wanted["held_out"], seed)
    settings = LearningSettings(
        source_weight=wanted["source_weight"],
        groups=wanted["groups"],
        steps=wanted["steps"],
        windows=wanted["windows"],
        learning_rate=wanted["learning_rate"],
        tokens=int(wanted["share"] * sum(iteration.tokens)),
        seed=seed,
        batch_tokens=recipe.training.per_device_train_batch_size * recipe.data.sequence_length,
        dtype=context.training_load.compute_dtype,
        checkpointing=recipe.training.checkpointing,
    )
    model = context.model(number - 1, context.training_load)
    branches = _Factors(adapters)

    def on_step(step: int, steps: int) -> None:
        context.stop.check()
        context.progress.stage(f"iteration {number}: learning the merge weights, step {step}/{steps}")

    result = learn_weights(model, branches, start, selection, settings, on_step=on_step)
    last = result.history[result.best]
    context.progress.say(
        f"iteration {number}: merge weights learned, held-out target {last['target']:.4f}, source {last['source']:.4f}"
    )
    return result.coefficients, result.record()
