"""The plan is a pure function: the same recipe and slices give the same plan, and it adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_lora.errors import UserError
from bam_lora.plan import Plan, SlicePlan, derive_seed, iteration_count, make_plan
from bam_lora.recipe import Recipe, recipe_from_dict


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {"base": "org/model", "output": "out", "data": {"target": [{"path": "org/data"}]}}
    return recipe_from_dict({**values, **changes})


def slices(count: int, rows: int = 40) -> list[SlicePlan]:
    return [SlicePlan("01", (i * rows, (i + 1) * rows), rows * 100, rows * 25) for i in range(count)]


@given(st.integers(1, 12), st.integers(1, 4))
def test_every_slice_is_one_branch(count: int, branches: int) -> None:
    if count < branches:
        return
    chosen = recipe(bam={"slices": count, "branches": branches})
    plan = make_plan(chosen, slices(count), base_key="base")
    assert len(plan.iterations) == iteration_count(chosen) == -(-count // branches)
    every = [branch for iteration in plan.iterations for branch in iteration.branches]
    assert [branch.slice for branch in every] == list(range(1, count + 1))
    assert len({branch.key for branch in every}) == len({branch.seed for branch in every}) == count
    assert plan.tokens == count * 40 * 125
    assert all(len(iteration.branches) == branches for iteration in plan.iterations[:-1])
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(("strategy", "expected"), [("bam", (3, 2)), ("sequential", (6, 1)), ("single", (1, 1))])
def test_strategies(strategy: str, expected: tuple[int, int]) -> None:
    chosen = recipe(strategy=strategy, bam={"slices": 6, "branches": 2})
    plan = make_plan(chosen, slices(chosen.slices), base_key="base")
    assert (len(plan.iterations), len(plan.iterations[0].branches)) == expected


def test_steps_are_those_the_trainer_takes() -> None:
    training = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "num_train_epochs": 2.0}
    plan = make_plan(recipe(bam={"slices": 2}, training=training), slices(2), base_key="base")
    assert plan.iterations[0].branches[0].steps == 2 * 4  # 40 rows: 14 batches, 4 steps an epoch


def test_max_steps_are_shared_out_exactly() -> None:
    parts = [SlicePlan("01", (0, 10), tokens, 0) for tokens in (1000, 1000, 500, 7)]
    plan = make_plan(recipe(bam={"slices": 4}, training={"max_steps": 103}), parts, base_key="base")
    steps = [branch.steps for iteration in plan.iterations for branch in iteration.branches]
    assert sum(steps) == 103
    assert steps == [41, 40, 21, 1]
    with pytest.raises(UserError, match=r"training\.max_steps: expected at least one step for each of 4 branches"):
        make_plan(recipe(bam={"slices": 4}, training={"max_steps": 4 - 1}), parts, base_key="base")


def test_keys_depend_on_all_that_matters() -> None:
    def keys(chosen: Recipe, base: str = "base", rows: int = 40) -> list[str]:
        plan = make_plan(chosen, slices(4, rows), base_key=base)
        return [branch.key for iteration in plan.iterations for branch in iteration.branches]

    bam = {"slices": 4, "branches": 2}
    plain = keys(recipe(bam=bam))
    assert keys(recipe(bam=bam)) == plain
    changed = [
        keys(recipe(bam=bam), base="other"),
        keys(recipe(bam=bam), rows=41),
        keys(recipe(bam=bam, seed=1)),
        keys(recipe(bam=bam, lora={"r": 8})),
        keys(recipe(bam=bam, training={"learning_rate": 0.1})),
    ]
    assert all(not set(other) & set(plain) for other in changed)
    merged = keys(recipe(bam={**bam, "merge": {"scale": 0.5}}))
    assert merged[:2] == plain[:2]
    assert not set(merged[2:]) & set(plain[2:])  # another base under the second iteration


def test_an_extension_leaves_the_finished_part_alone() -> None:
    first = make_plan(recipe(bam={"slices": 3}), slices(3), base_key="base")
    more = [SlicePlan("02", (0, 9), 900, 0), SlicePlan("02", (9, 18), 900, 0)]
    second = make_plan(recipe(bam={"slices": 5}, training={"learning_rate": 0.1}), more, base_key="base", earlier=first)
    assert second.iterations[:2] == first.iterations
    assert [branch.slice for branch in second.iterations[2].branches] == [4, 5]
    assert second.slices == 5


def test_an_extension_takes_what_is_left_of_max_steps() -> None:
    first = make_plan(recipe(bam={"slices": 2}, training={"max_steps": 10}), slices(2), base_key="base")
    longer = recipe(bam={"slices": 4}, training={"max_steps": 16})
    second = make_plan(longer, slices(2), base_key="base", earlier=first)
    assert sum(branch.steps for branch in second.all_branches()) == 16
    with pytest.raises(UserError, match="found 0 left"):
        make_plan(recipe(bam={"slices": 4}, training={"max_steps": 10}), slices(2), base_key="base", earlier=first)


def test_tokens_count_every_pass() -> None:
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    once = make_plan(recipe(bam={"slices": 2}, training=training), slices(2), base_key="base")
    twice = make_plan(
        recipe(bam={"slices": 2}, training={**training, "num_train_epochs": 2.0}), slices(2), base_key="b"
    )
    half = make_plan(recipe(bam={"slices": 2}, training={**training, "max_steps": 10}), slices(2), base_key="b")
    assert (once.tokens, twice.tokens, half.tokens) == (10_000, 20_000, 5_000)


def test_seeds_differ_by_place_and_stay_the_same() -> None:
    assert derive_seed(0, "branch", 1, 2) != derive_seed(0, "branch", 2, 1)
    assert derive_seed(0, "data", "01") == 506294037


def test_plan_and_recipe_load_no_torch() -> None:
    code = "import sys, bam_lora, bam_lora.plan, bam_lora.recipe, bam_lora.report, bam_lora.status; "
    code += "print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
