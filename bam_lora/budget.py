"""How far a run may go by its recipe's limits, by what it has taken so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bam_lora.errors import UserError
from bam_lora.ledger import Ledger
from bam_lora.limits import HOUR, Ended, ended_by, require_first, rounded_up, write_ended
from bam_lora.plan import IterationPlan, Plan
from bam_lora.recipe_limits import Limits
from bam_lora.report.format import duration
from bam_lora.rundir import RunDirectory
from bam_lora.session import Session
from bam_lora.store import MANIFEST, read_record

_MEASURE_SECONDS = 60.0  # of training, before a first iteration is judged by its speed
_UPDATE_SECONDS = 60.0


class Budget:
    """How far a run may go, by its limits and by what it has taken so far.

    Args:
        limits: The recipe's.
        directory: Of the run.
        plan: Of the whole run.
        session: This sitting.
    """

    def __init__(self, limits: Limits, directory: RunDirectory, plan: Plan, session: Session) -> None:
        self._limits, self._directory, self._plan, self._session = limits, directory, plan, session
        self._last_pace = 0.0  # seconds a token of the iteration before, as far as this sitting saw it
        self._began: tuple[float, int] | None = None
        self._first_step: tuple[float, float] | None = None
        self._judged = False

    def ends_before(self, iteration: IterationPlan) -> bool:
        """Whether the run ends here, before an iteration that is not merged yet; then that is on record.

        Raises:
            UserError: If it is the first, and there is no room even for that.
        """
        done = len(Ledger.load(self._directory.root).iterations)
        self._note_pace(iteration)
        if iteration.iteration <= done:
            return False
        if not done:
            self._require_time()
            return False
        ended = ended_by(self._limits, self._facts(iteration))
        if ended is not None:
            write_ended(self._directory.root, ended)
        return ended is not None

    def _note_pace(self, iteration: IterationPlan) -> None:
        """Takes the time of the iteration before this one."""
        now = self._session.seconds
        if self._began is not None and self._began[1]:
            self._last_pace = (now - self._began[0]) / self._began[1]
        self._began = now, sum(iteration.tokens) - self._trained([iteration])

    def _facts(self, iteration: IterationPlan) -> Ended:
        before = self._plan.iterations[: iteration.iteration - 1]
        trained = self._trained([*before, iteration])
        left = sum(iteration.tokens) - self._trained([iteration])
        pace = max(self._session.working_seconds / trained, self._last_pace)
        fold = read_record(self._directory.iteration(len(before)) / "fold.json") or {}
        return Ended(
            by="",
            limit=math.inf,
            iteration=len(before),
            planned=len(self._plan.iterations),
            used_tokens=sum(sum(one.tokens) for one in before),
            needed_tokens=sum(iteration.tokens),
            used_seconds=self._session.seconds,
            needed_seconds=pace * left + fold.get("seconds", 0.0),
        )

    def _trained(self, iterations: Sequence[IterationPlan]) -> int:
        """Tokens of their branches that are done."""
        return sum(
            branch.tokens
            for one in iterations
            for branch in one.branches
            if read_record(self._directory.branch(branch.iteration, branch.branch) / MANIFEST) is not None
        )

    def _require_time(self) -> None:
        require_first(self._limits, self._plan)
        hours = self._limits.hours
        if hours is not None and self._session.seconds >= HOUR * hours:
            raise UserError.of(
                "limits.hours",
                expected="time for a first iteration, before which nothing is merged",
                found=f"{hours:g}, of which {duration(self._session.seconds)} are used",
                remedy="Raise it",
            )

    def step(self, tokens: float) -> None:
        """Called after every step of a branch with the tokens that the run has trained so far.

        Raises:
            UserError: If the first iteration cannot end in time, by the speed of its first minute of training.
        """
        self._session.update(every=_UPDATE_SECONDS)
        first = sum(self._plan.iterations[0].tokens)
        if self._judged or self._limits.hours is None or tokens >= first:
            return
        now = self._session.seconds
        if self._first_step is None:
            self._first_step = now, tokens
        since, before = self._first_step
        if now - since < _MEASURE_SECONDS or tokens <= before:
            return
        self._judged = True
        speed = (tokens - before) / (now - since)
        whole = now + (first - tokens) / speed
        if whole > HOUR * self._limits.hours:
            self._refuse(speed, whole)

    def _refuse(self, speed: float, whole: float) -> None:
        hours = self._limits.hours
        assert hours is not None
        if len(self._plan.iterations) == 1:
            less = "a new run with a lower training.max_steps, for which the learning-rate schedule is then laid out"
        else:
            less = "a new run with smaller iterations: a higher bam.slices, or a lower `tokens` of the sources"
        raise UserError.of(
            "limits.hours",
            expected=f"at least {rounded_up(whole / HOUR)}, for the first iteration alone, before which nothing is "
            f"merged, at {speed:,.{0 if speed >= 10 else 2}f} tokens a second",
            found=f"{hours:g}",
            remedy=f"Raise it and go on, or start {less}",
        )
