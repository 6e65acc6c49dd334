"""Learned or searched weights for one merge of a run: which branches take part, and the settings of the recipe.

Also for a finished run, to see what its last merge would have been with another μ (`bam-lora shrink --source-weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.adapters import Adapter, Factors
from bam_lora.branch import ADAPTER
from bam_lora.learned_weights import LearnedWeights, LearningSettings, learn_weights
from bam_lora.merge_search import SearchedWeights, SearchSettings, search_weights
from bam_lora.plan import IterationPlan, Plan, derive_seed
from bam_lora.recipe import Recipe
from bam_lora.rundir import RunDirectory
from bam_lora.scoring import Windowed
from bam_lora.selection import split_selection

# Training an adapter takes 16 bytes a parameter (weights, gradients, two averages of Adam); so many frozen ones, of 2
# or 4 bytes, take no more.
_ROOM = {"bfloat16": 8, "float16": 8, "float32": 4}


def branch_folders(directory: RunDirectory, iteration: IterationPlan) -> list[Path]:
    """The adapters of an iteration's branches, in branch order."""
    return [directory.branch(branch.iteration, branch.branch) / ADAPTER for branch in iteration.branches]


def past_folders(directory: RunDirectory, plan: Plan, number: int, dtype: str) -> list[Path]:
    """The adapters of the iterations before `number`, the newest first, as many as there is room for.

    Args:
        directory: The run.
        plan: Its plan.
        number: The iteration that is merged.
        dtype: What the deltas are held in while weights are learned.
    """
    earlier = [branch for one in plan.iterations[: number - 1] for branch in one.branches]
    earlier.sort(key=lambda branch: (-branch.iteration, branch.branch))
    room = room_for_deltas(dtype, len(plan.iterations[number - 1].branches))
    return [directory.branch(branch.iteration, branch.branch) / ADAPTER for branch in earlier][:room]


def room_for_deltas(dtype: str, branches: int) -> int:
    """How many deltas of earlier iterations may stand beside those of so many branches, held in a type."""
    return max(0, _ROOM[dtype] - branches)


class _Factors(Mapping[str, Sequence[Factors | None]]):
    """The branches' factors by weight name, read when they are asked for: memory never holds all of them in fp32.

    Weights of which a branch has more than factors, such as the rows of new tokens, are left out.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters
        whole = {name for adapter in adapters for name in adapter.names if not _has_factors_alone(adapter, name)}
        self._names = sorted({name for adapter in adapters for name in adapter.names} - whole)

    def __getitem__(self, name: str) -> Sequence[Factors | None]:
        return [adapter.factors(name) for adapter in self._adapters]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _has_factors_alone(adapter: Adapter, name: str) -> bool:
    entry = adapter.entry(name)
    assert entry is not None, name
    return entry.is_low_rank and entry.value is None


def learn_merge(
    model: Any,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    selection: Windowed,
    recipe: Recipe,
    iteration: IterationPlan,
    wanted: Mapping[str, Any],
    *,
    on_step: Callable[[int, int], None],
) -> LearnedWeights:
    """Learns the weights of one merge on the selection sets.

    Args:
        model: The quantised base that the iteration's branches were trained on.
        adapters: The branches', then those of earlier iterations, which are in the base already: what is learned for
            them is a correction, from zero.
        weights: What the branches' own start from.
        selection: The selection sets.
        recipe: The run's.
        iteration: The iteration.
        wanted: `bam.merge.learned`, as plain values.
        on_step: Called with the step that begins and the number of steps.
    """
    seed = derive_seed(recipe.seed, "learned weights", iteration.iteration)
    settings = LearningSettings(
        source_weight=wanted["source_weight"],
        groups=wanted["groups"],
        steps=wanted["steps"],
        windows=wanted["windows"],
        learning_rate=wanted["learning_rate"],
        tokens=int(wanted["share"] * sum(iteration.tokens)),
        seed=seed,
        batch_tokens=recipe.training.per_device_train_batch_size * recipe.data.sequence_length,
        dtype=recipe.quantization.compute_dtype,
        checkpointing=recipe.training.checkpointing,
    )
    start = [*weights, *[0.0] * (len(adapters) - len(weights))]
    parts = split_selection(selection, wanted["held_out"], seed)
    return learn_weights(model, _Factors(adapters), start, parts, settings, on_step=on_step)


def search_merge(
    model: Any,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    selection: Windowed,
    recipe: Recipe,
    iteration: IterationPlan,
    wanted: Mapping[str, Any],
    *,
    on_step: Callable[[int, int], None],
) -> SearchedWeights:
    """Searches the weights of one merge by the selection sets; `wanted` is `bam.merge.search`, the rest as above."""
    settings = SearchSettings(
        source_weight=wanted["source_weight"],
        scales=wanted["scales"],
        evaluations=wanted["evaluations"],
        shares=wanted.get("shares", True),  # a plan of an older version does not say
        tokens=int(wanted["share"] * sum(iteration.tokens)),
        batch_tokens=recipe.training.per_device_train_batch_size * recipe.data.sequence_length,
        dtype=recipe.quantization.compute_dtype,
    )
    seed = derive_seed(recipe.seed, "searched weights", iteration.iteration)
    parts = split_selection(selection, wanted["held_out"], seed)
    return search_weights(model, _Factors(adapters), weights, parts, settings, on_step=on_step)
