"""The recipe's limits: before which iteration a run ends, and what is left on record of that (`limits.json`).

The plan is always that of the whole run; a limit only decides how far down it the run goes. So a run that goes on when
its limit is raised is the run that would have been without one.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.plan import Plan
from bam_lora.recipe_limits import Limits
from bam_lora.report.format import duration
from bam_lora.store import read_record, write_record

HOUR = 3600.0
_FILE, _LEDGER, _SESSIONS = "limits.json", "ledger.json", "sessions.json"


@dataclass(frozen=True)
class Ended:
    """That limits ended a run before its last iteration.

    Attributes:
        by: `tokens` or `hours`.
        limit: Its value.
        iteration: The last iteration of the run.
        planned: How many there would have been.
        used_tokens: Trained in the iterations up to there.
        needed_tokens: Of the next iteration.
        used_seconds: Of all sittings, when it ended.
        needed_seconds: What the next iteration was expected to take; None where no time is measured.
    """

    by: str
    limit: float
    iteration: int
    planned: int
    used_tokens: int
    needed_tokens: int
    used_seconds: float
    needed_seconds: float | None

    def __str__(self) -> str:
        if self.by == "tokens":
            why = f"{self.used_tokens:,} tokens are trained, another iteration has {self.needed_tokens:,}"
        else:
            more = duration(self.needed_seconds)
            why = f"{duration(self.used_seconds)} are used, another iteration takes about {more}"
        return f"{self.setting} ended the run after iteration {self.iteration} of {self.planned}: {why}"

    @property
    def setting(self) -> str:
        """The limit as the recipe says it."""
        return f"limits.{self.by} {self.limit:,.10g}"

    @property
    def enough(self) -> str:
        """The smallest setting with which the next iteration would be begun."""
        if self.by == "tokens":
            return f"limits.tokens={self.used_tokens + self.needed_tokens}"
        hours = (self.used_seconds + (self.needed_seconds or 0.0)) / HOUR
        return f"limits.hours={rounded_up(hours)}"


def rounded_up(hours: float) -> str:
    """Two digits, and a little more than just enough."""
    hours = max(1.02 * hours, 1e-6)
    step = 10.0 ** (math.floor(math.log10(hours)) - 1)
    return f"{math.ceil(hours / step) * step:.6g}"


def read_ended(root: Path) -> Ended | None:
    """What is on record of a run that its limits ended, if it has not gone on since."""
    ledger = read_record(root / _LEDGER)
    record = read_record(root / _FILE, ledger["key"]) if ledger else None
    if record is None:
        return None
    return Ended(**{one.name: record[one.name] for one in dataclasses.fields(Ended)})


def reached(root: Path, plan: Plan) -> Plan:
    """The plan as far as the run goes: to its end, or to where its limits ended it."""
    ended = read_ended(root)
    return plan if ended is None else plan.first(ended.iteration)


def still_ended(root: Path, ended: Ended, limits: Limits) -> Ended | None:
    """The same where these limits hold the run still, else None. Writes it down if other limits do than before."""
    sessions = (read_record(root / _SESSIONS) or {"sessions": []})["sessions"]
    now = ended_by(limits, dataclasses.replace(ended, used_seconds=session_seconds(sessions)))
    if now is not None and (now.by, now.limit) != (ended.by, ended.limit):
        write_ended(root, now)
    return now


def ended_by(limits: Limits, facts: Ended) -> Ended | None:
    """The facts with the limit that does not leave room for another iteration, or None if there is room."""
    if limits.tokens is not None and facts.used_tokens + facts.needed_tokens > limits.tokens:
        return dataclasses.replace(facts, by="tokens", limit=limits.tokens)
    seconds = facts.used_seconds + (facts.needed_seconds or 0.0)
    if limits.hours is not None and seconds > HOUR * limits.hours:
        return dataclasses.replace(facts, by="hours", limit=limits.hours)
    return None


def write_ended(root: Path, ended: Ended) -> None:
    """Puts it on record, for the ledger as it is now."""
    ledger = read_record(root / _LEDGER)
    assert ledger is not None, "an iteration is merged"
    write_record(root / _FILE, ledger["key"], {"format": 1, **dataclasses.asdict(ended)})


def session_seconds(sessions: Sequence[Mapping[str, Any]]) -> float:
    """The time of all sittings in `sessions.json`; not the time that the run lay idle."""
    return math.fsum(session.get("seconds") or 0.0 for session in sessions)


def within(plan: Plan, limits: Limits) -> Plan:
    """The plan as far as the limit on tokens lets it go."""
    reach = list(itertools.accumulate(sum(one.tokens) for one in plan.iterations))
    return plan if limits.tokens is None else plan.first(bisect.bisect_right(reach, limits.tokens))


def describe_limits(limits: Limits, plan: Plan) -> str:
    """What the limits make of a plan, in a few words; none where there are none."""
    parts = []
    if limits.tokens is not None:
        short = within(plan, limits)
        parts.append(
            f"limits.tokens {limits.tokens:,}: {len(short.iterations)} of {len(plan.iterations)} iterations, "
            f"{short.tokens:,} tokens"
        )
    if limits.hours is not None:
        parts.append(f"limits.hours {limits.hours:g}: as many iterations as that lets begin and end")
    return "; ".join(parts)


def require_first(limits: Limits, plan: Plan) -> None:
    """Raises a UserError if a limit on tokens leaves no room for a single iteration."""
    first = plan.iterations[0]
    needed = sum(first.tokens)
    if limits.tokens is None or needed <= limits.tokens:
        return
    steps = sum(branch.steps for branch in first.branches) * limits.tokens // needed
    if len(plan.iterations) == 1 and steps >= len(first.branches):
        less = f"or set training.max_steps: {steps}, for which the learning-rate schedule is then laid out"
    else:
        less = "or make iterations smaller: a higher bam.slices, or a lower `tokens` of the sources"
    raise UserError.of(
        "limits.tokens",
        expected=f"at least {needed:,}, the training tokens of the first iteration, before which nothing is merged",
        found=f"{limits.tokens:,}",
        remedy=f"Raise it, {less}",
    )
