"""What a run will do, as data: pure functions from a recipe and the prepared slices to iterations and branches.

The plan is made before anything is trained, written to `plan.json`, and printed. Its keys name every branch by all
that it is a function of, so that a resumed run knows what is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bam_lora.errors import UserError
from bam_lora.recipe import Recipe
from bam_lora.store import digest


@dataclass(frozen=True)
class SlicePlan:
    """One slice as the data stage made it: rows `[start, stop)` of the packed data of one part of the run.

    `group` is the data set or column value that its target text is of, where the data is sliced by such.
    """

    data: str
    rows: tuple[int, int]
    target_tokens: int
    replay_tokens: int
    group: str | None = None


CountSteps = Callable[[SlicePlan], int]


@dataclass(frozen=True)
class BranchPlan:
    """One training run on one slice. Counting from 1; `steps` are optimizer steps.

    `target_tokens` and `replay_tokens` are the slice's; `tokens` is what is trained on, over all passes.
    """

    iteration: int
    branch: int
    slice: int
    data: str
    rows: tuple[int, int]
    target_tokens: int
    replay_tokens: int
    tokens: int
    sequences: int
    steps: int
    seed: int
    key: str
    group: str | None = None


@dataclass(frozen=True)
class IterationPlan:
    """K branches from the same base (fewer in a short last group), one merge, one fold."""

    iteration: int
    branches: tuple[BranchPlan, ...]
    merge: Mapping[str, Any]

    @property
    def tokens(self) -> list[int]:
        """Training tokens of each branch [branches], for weights by tokens."""
        return [branch.tokens for branch in self.branches]


@dataclass(frozen=True)
class Plan:
    """The whole run."""

    strategy: str
    slices: int
    branches: int
    sequence_length: int
    iterations: tuple[IterationPlan, ...]

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return sum(sum(iteration.tokens) for iteration in self.iterations)

    def all_branches(self) -> list[BranchPlan]:
        """Every branch of every iteration, in the order in which they are trained."""
        return [branch for iteration in self.iterations for branch in iteration.branches]

    def first(self, count: int) -> Plan:
        """The plan as far as its first iterations go."""
        return replace(self, iterations=self.iterations[:count])

    def to_json(self) -> dict[str, Any]:
        """The plan in plain JSON types, as `plan.json` holds it."""
        return {"format": 1, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        iterations = tuple(
            IterationPlan(
                iteration["iteration"],
                tuple(BranchPlan(**{**branch, "rows": tuple(branch["rows"])}) for branch in iteration["branches"]),
                iteration["merge"],
            )
            for iteration in value["iterations"]
        )
        scalars = {name: value[name] for name in ("strategy", "slices", "branches", "sequence_length")}
        return cls(**scalars, iterations=iterations)


def make_plan(
    recipe: Recipe,
    slices: Sequence[SlicePlan],
    *,
    base_key: str,
    earlier: Plan | None = None,
    count: CountSteps | None = None,
) -> Plan:
    """Deals slices to iterations and branches.

    Args:
        recipe: What the user wants.
        slices: The slices of the data that is not trained yet, in order.
        base_key: Hash of the base that the first of these iterations starts from.
        earlier: The plan of a finished run that this one extends.
        count: Optimizer steps of one pass over a slice; none: as the Trainer counts packed rows.

    Returns:
        The plan, with the iterations of `earlier` first, unchanged.
    """
    done = earlier.iterations if earlier else ()
    one_pass = [count(part) if count else epoch_steps(recipe, part) for part in slices]
    steps = _steps(recipe, slices, one_pass, sum(branch.steps for branch in earlier.all_branches()) if earlier else 0)
    settings = _settings(recipe)
    iterations = list(done)
    previous = digest([base_key, *(branch.key for iteration in done for branch in iteration.branches)])
    trained = sum(len(iteration.branches) for iteration in done)
    for start in range(0, len(slices), recipe.branches):
        number = len(iterations) + 1
        branches = tuple(
            _branch(recipe, slices[index], number, index - start + 1, trained + index + 1, steps[index],
                    one_pass[index], digest([previous, settings]))
            for index in range(start, min(start + recipe.branches, len(slices)))
        )  # fmt: skip
        iterations.append(IterationPlan(number, branches, merge_settings(recipe)))
        previous = digest([previous, iterations[-1].merge, *(branch.key for branch in branches)])
    return Plan(
        strategy=recipe.strategy,
        slices=trained + len(slices),
        branches=recipe.branches,
        sequence_length=recipe.data.sequence_length,
        iterations=tuple(iterations),
    )


def warmup_steps(wanted: float, branch: BranchPlan) -> int:
    """Warm-up of one branch, in steps. A share is rounded down: of a few steps none is spent at a rate of zero.

    Raises:
        UserError: If the warm-up takes the whole branch.
    """
    steps = int(wanted * branch.steps) if wanted < 1 else int(wanted)
    if steps >= branch.steps:
        raise UserError.of(
            f"training.warmup_steps of iteration {branch.iteration}, branch {branch.branch}",
            expected=f"fewer than its {branch.steps} steps",
            found=str(steps),
            remedy="Lower it (below 1 it is a share of the steps), or train on more data",
        )
    return steps


def iteration_count(recipe: Recipe) -> int:
    """ceil(N/K): how many merges a run of this recipe makes."""
    return math.ceil(recipe.slices / recipe.branches)


def merge_settings(recipe: Recipe) -> dict[str, Any]:
    """How an iteration is merged and added, in plain values: `bam.merge` with `bam.outer` as its "outer"."""
    return {**recipe.bam.merge.model_dump(mode="json"), "outer": recipe.bam.outer.model_dump(mode="json")}


def describe_merge(merge: Mapping[str, Any]) -> str:
    """What `merge_settings` says, in one line."""
    text = f"{merge['method']}, weights {_words(merge['weights'])}"
    text += "".join(f", {_words(weights)} for {pattern}" for pattern, weights in merge["weights_by_module"].items())
    text += f", scale {merge['scale']:g}" if merge["scale"] != 1 else ""
    outer = merge["outer"]
    if outer["learning_rate"] != 1 or outer["momentum"]:
        text += f"; outer learning rate {outer['learning_rate']:g}, momentum {outer['momentum']:g}"
    return text


def _words(weights: str | Sequence[float]) -> str:
    return weights if isinstance(weights, str) else "/".join(f"{weight:g}" for weight in weights)


def derive_seed(seed: int, *path: str | int) -> int:
    """A seed for one part of the run, below 2**31, the same on every machine."""
    return int(digest([seed, *path])[:8], 16) & 0x7FFFFFFF


def _branch(
    recipe: Recipe, part: SlicePlan, iteration: int, branch: int, number: int, steps: int, one_pass: int, key: str
) -> BranchPlan:
    seed = derive_seed(recipe.seed, "branch", iteration, branch)
    if recipe.script is not None and iteration == branch == 1:
        seed = recipe.seed  # so that one slice and one branch give what the plain trainer gives
    return BranchPlan(
        iteration=iteration,
        branch=branch,
        slice=number,
        **asdict(part),
        tokens=round((part.target_tokens + part.replay_tokens) * steps / one_pass),
        sequences=part.rows[1] - part.rows[0],
        steps=steps,
        seed=seed,
        key=digest([key, part.data, list(part.rows), seed, steps]),
    )


def _settings(recipe: Recipe) -> str:
    """Hash of what decides how a branch trains, apart from base, data and seed."""
    parts = recipe.resolved()
    settings = {name: parts[name] for name in ("lora", "quantization", "training", "mode")}
    if recipe.script is not None:
        settings["script"] = parts["script"]
    if recipe.vocabulary.tokens is not None:
        settings["vocabulary"] = parts["vocabulary"]
    return digest(settings)


def epoch_steps(recipe: Recipe, part: SlicePlan) -> int:
    """Optimizer steps of one pass, as the Trainer counts: a last, incomplete accumulation is a step of its own."""
    batches = math.ceil((part.rows[1] - part.rows[0]) / recipe.training.per_device_train_batch_size)
    return math.ceil(batches / recipe.training.gradient_accumulation_steps)


def _steps(recipe: Recipe, slices: Sequence[SlicePlan], one_pass: Sequence[int], taken: int) -> list[int]:
    """Optimizer steps of each branch; `max_steps` is the whole run's: what is left of it is shared out by tokens."""
    training = recipe.training
    if training.max_steps > 0:
        return _share(training.max_steps - taken, [part.target_tokens + part.replay_tokens for part in slices])
    return [math.ceil(training.num_train_epochs * steps) for steps in one_pass]


def _share(total: int, amounts: Sequence[int]) -> list[int]:
    """`total` shared out in proportion to `amounts`, by largest remainder; everyone gets at least one."""
    if total < len(amounts):
        raise UserError.of(
            "training.max_steps",
            expected=f"at least one step for each of {len(amounts)} branches",
            found=f"{max(total, 0)} left",
            remedy="Raise it (it counts the steps of the whole run) or lower bam.slices",
        )
    exact = [(total - len(amounts)) * amount / sum(amounts) for amount in amounts]
    steps = [1 + int(value) for value in exact]
    by_remainder = sorted(range(len(amounts)), key=lambda index: int(exact[index]) - exact[index])
    for index in by_remainder[: total - sum(steps)]:
        steps[index] += 1
    return steps
