"""Before which iteration a run ends, by a clock that is set by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bam_lora.budget import Budget
from bam_lora.errors import UserError
from bam_lora.limits import Ended, describe_limits, read_ended, require_first, within
from bam_lora.plan import BranchPlan, IterationPlan, Plan
from bam_lora.recipe_limits import Limits
from bam_lora.rundir import RunDirectory
from bam_lora.session import Session
from bam_lora.stage_clock import StageClock
from bam_lora.store import write_record

HOUR = 3600.0


class Clocked:
    """A plan of three iterations of 1,000 tokens each, and a session whose time is set by hand."""

    def __init__(self, root: Path, iterations: int = 3) -> None:
        self.root, self.seconds = root, 0.0
        self.plan = plan(iterations)
        self.clock = StageClock()
        self.session = Session(root / "sessions.json", self.clock, now=lambda: self.seconds)
        write_record(root / "ledger.json", "key 0", {"format": 1, "base": {}, "inherited": [], "iterations": []})

    def budget(self, **limits: Any) -> Budget:
        return Budget(Limits(**limits), RunDirectory(self.root), self.plan, self.session)

    def train(self, number: int, branches: int = 2) -> None:
        for branch in range(1, branches + 1):
            folder = self.root / "iterations" / f"{number:02}" / f"branch-{branch}"
            folder.mkdir(parents=True)
            write_record(folder / "done.json", "key", {"facts": {}})

    def merge(self, number: int) -> None:
        done = [{"iteration": one + 1} for one in range(number)]
        write_record(
            self.root / "ledger.json", f"key {number}",
            {"format": 1, "base": {}, "inherited": [], "iterations": done},
        )  # fmt: skip


def plan(iterations: int) -> Plan:
    def branch(iteration: int, number: int) -> BranchPlan:
        return BranchPlan(
            iteration=iteration, branch=number, slice=1, data="01", rows=(0, 1), target_tokens=500, replay_tokens=0,
            tokens=500, sequences=1, steps=10, seed=0, key="",
        )  # fmt: skip

    numbers = range(1, iterations + 1)
    return Plan("bam", 6, 2, 64, tuple(IterationPlan(n, (branch(n, 1), branch(n, 2)), {}) for n in numbers))


def test_half_an_iteration_that_is_done_is_not_paid_again(tmp_path: Path) -> None:
    clocked = Clocked(tmp_path)
    clocked.train(1)
    clocked.merge(1)
    clocked.train(2, branches=1)
    clocked.seconds = 1.5 * HOUR
    assert not clocked.budget(hours=2.01).ends_before(clocked.plan.iterations[1])
    assert clocked.budget(hours=1.99).ends_before(clocked.plan.iterations[1])
    ended = read_ended(tmp_path)
    assert ended is not None
    assert ended.needed_seconds == pytest.approx(0.5 * HOUR)
    assert not clocked.budget(hours=1.99).ends_before(clocked.plan.iterations[0])  # that is merged


def test_a_slower_last_iteration_counts(tmp_path: Path) -> None:
    clocked = Clocked(tmp_path)
    budget = clocked.budget(hours=4.8)
    for number, hours in ((1, 1.0), (2, 2.0)):
        assert not budget.ends_before(clocked.plan.iterations[number - 1])
        clocked.train(number)
        clocked.merge(number)
        clocked.seconds += hours * HOUR
    assert not clocked.budget(hours=4.8).ends_before(clocked.plan.iterations[2])  # another sitting: 3 + the mean, 1.5
    assert budget.ends_before(clocked.plan.iterations[2])  # which saw the last one: 3 + 2


def test_a_limit_that_is_just_enough_is_enough(tmp_path: Path) -> None:
    clocked = Clocked(tmp_path)
    clocked.train(1)
    clocked.merge(1)
    assert clocked.budget(tokens=1999).ends_before(clocked.plan.iterations[1])
    ended = read_ended(tmp_path)
    assert ended is not None
    assert ended.enough == "limits.tokens=2000"
    assert not clocked.budget(tokens=2000).ends_before(clocked.plan.iterations[1])


def test_preparing_data_is_not_part_of_the_pace(tmp_path: Path) -> None:
    record = {"seconds": 3 * HOUR, "seconds_by_stage": {"data": 2 * HOUR, "train": HOUR}}
    write_record(tmp_path / "sessions.json", "sessions", {"sessions": [record]})
    clocked = Clocked(tmp_path)
    clocked.train(1)
    clocked.merge(1)
    assert not clocked.budget(hours=4.1).ends_before(clocked.plan.iterations[1])
    assert clocked.budget(hours=3.9).ends_before(clocked.plan.iterations[1])
    clocked.clock.seconds["data"] = 5 * HOUR  # as in an extension, in this sitting
    clocked.seconds = 5 * HOUR
    assert not clocked.budget(hours=9.1).ends_before(clocked.plan.iterations[1])
    assert clocked.budget(hours=8.9).ends_before(clocked.plan.iterations[1])


def test_a_first_iteration_that_cannot_end_in_time_is_refused_in_its_first_minutes(tmp_path: Path) -> None:
    clocked = Clocked(tmp_path, iterations=1)
    budget = clocked.budget(hours=1.0)
    assert not budget.ends_before(clocked.plan.iterations[0])
    clocked.seconds = 500.0  # loading, and a slow first step
    budget.step(10)
    clocked.seconds += 59.0
    budget.step(20)  # too early to tell
    clocked.seconds += 41.0
    with pytest.raises(
        UserError, match=r"limits\.hours: expected at least 1\.6, .* at 0\.20 tokens a second, found 1\. .*max_steps"
    ):
        budget.step(30)  # 20 tokens in 100 seconds: 4,850 seconds for the other 970
    fits = clocked.budget(hours=1.6)
    fits.step(30)
    clocked.seconds += 100.0
    fits.step(50)
    clocked.seconds += 100.0 * HOUR
    fits.step(60)  # an iteration that has begun is finished
    with pytest.raises(UserError, match="expected time for a first iteration"):
        clocked.budget(hours=1.6).ends_before(clocked.plan.iterations[0])


def test_the_plan_within_a_limit() -> None:
    assert [len(within(plan(3), Limits(tokens=n)).iterations) for n in (999, 1000, 1999, 2000, 9999)] == [0, 1, 1, 2, 3]
    assert within(plan(3), Limits()) == plan(3)
    assert describe_limits(Limits(tokens=2500, hours=2), plan(3)) == (
        "limits.tokens 2,500: 2 of 3 iterations, 2,000 tokens; limits.hours 2: as many iterations as that lets begin "
        "and end"
    )
    assert describe_limits(Limits(), plan(3)) == ""


@pytest.mark.parametrize(("used", "needed", "enough"), [(7200, 3600, "3.1"), (36, 36, "0.021"), (360_000, 0, "110")])
def test_what_is_said_to_be_enough_is(used: float, needed: float, enough: str) -> None:
    ended = Ended("hours", 1.0, 1, 2, 1, 1, used, needed)
    assert ended.enough == f"limits.hours={enough}"
    assert float(enough) * HOUR > used + needed


def test_tokens_of_a_single_run_are_said_in_steps() -> None:
    with pytest.raises(UserError, match=r"set training\.max_steps: 5, for which the learning-rate schedule"):
        require_first(Limits(tokens=250), plan(1).first(1))
    with pytest.raises(UserError, match="Raise it, or make iterations smaller"):
        require_first(Limits(tokens=20), plan(1))
