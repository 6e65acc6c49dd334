"""Whether two loss curves are equal, and within what.

    python benchmarks/gpu/peers/curves.py A.json B.json [--repeats R1.json R2.json ...] [--seeds S1.json S2.json ...]

What is compared, of two results of job.py: at every step, the loss in nats per trained token on that step's rows before
its update. It is a comparison only if both took the same rows in the same order: the checksums of every step must be
equal, which tokens in another place, row or step change. Rows, seed, learning rate, schedule, adapter and precision of
the base are the same for all ways by peer_settings; the first loss of two such runs is equal whatever the adapter's
start (its delta is zero then), so the curve tells of the updates, not of the model.

The tolerance is on the largest difference at any step, and is the largest of
- FLOOR_RELATIVE of the mean loss: another order of the same sums. A bf16 product is off by at most 2^-9; over a
  thousand tokens or more, their errors independent, the mean of their losses is off by 2^-9 / sqrt(1000) = 6e-5.
- REPEATS times the largest difference between runs that are the same in everything: what a GPU's unordered sums do,
  grown over the steps. Needs at least two; zero on a CPU with a fixed number of threads.
- SEEDS of the largest difference between runs over the same rows whose adapters begin as other random numbers: less
  than that nobody could tell from chance. Only for ways whose arithmetic differs by design, such as adapters in bf16
  beside fp32; the verdict says which of the three it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOOR_RELATIVE = 1e-4
REPEATS = 3.0
SEEDS = 0.5
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Tolerance:
    """The largest difference at any step that still counts as equal, in nats per token, and where it comes from."""

    nats: float
    source: str


@dataclass(frozen=True)
class Verdict:
    """How two curves compare.

    Attributes:
        equal: Whether no step differs by more than the tolerance.
        reason: In one line.
        steps: Compared.
        largest: Difference at any step, in nats per token.
        mean: Of the second curve less the first, over the steps: a bias, where one is always above.
        tolerance: As given.
    """

    equal: bool
    reason: str
    steps: int
    largest: float
    mean: float
    tolerance: Tolerance


class NotComparable(Exception):
    """Two results that are not of the same rows; the message is one line."""


def require_same_rows(first: Result, second: Result) -> None:
    """Checks that both took the same rows in the same order.

    Raises:
        NotComparable: Naming the first step that differs.
    """
    names = f"{first['way']} and {second['way']}"
    for key in ("losses", "tokens", "checksums"):
        if not first[key] or len(first[key]) != len(second[key]):
            raise NotComparable(
                f"{names}: {key}: expected as many steps, found {len(first[key])} and {len(second[key])}"
            )
    for step, (one, other) in enumerate(zip(first["checksums"], second["checksums"], strict=True), start=1):
        if one != other:
            raise NotComparable(f"{names}, step {step}: expected the same rows in the same order, found others")


def differences(first: Result, second: Result) -> list[float]:
    """Second less first, per step, in nats per token; raises NotComparable."""
    require_same_rows(first, second)
    return [other - one for one, other in zip(first["losses"], second["losses"], strict=True)]


def spread(results: Sequence[Result]) -> float:
    """The largest difference at any step between any two of them; zero for fewer than two."""
    pairs = itertools.combinations(results, 2)
    return max((abs(value) for one, other in pairs for value in differences(one, other)), default=0.0)


def tolerance_of(reference: Result, repeats: Sequence[Result] = (), seeds: Sequence[Result] = ()) -> Tolerance:
    """The tolerance for a comparison with `reference`, as the module says.

    Args:
        reference: The curve that is compared with.
        repeats: Runs the same as each other in everything, `reference` itself among them or not.
        seeds: Runs over the same rows that differ in what the adapter began as.
    """
    found = {
        "rounding": FLOOR_RELATIVE * statistics.fmean(reference["losses"]),
        "repeats": REPEATS * spread(repeats),
        "seeds": SEEDS * spread(seeds),
    }
    source = max(found, key=lambda name: found[name])
    return Tolerance(found[source], source)


def compare(first: Result, second: Result, tolerance: Tolerance) -> Verdict:
    """Whether two curves are equal.

    Raises:
        NotComparable: If they are not of the same rows.
    """
    found = differences(first, second)
    largest = max(map(abs, found))
    beyond = next((step for step, value in enumerate(found, start=1) if not abs(value) <= tolerance.nats), None)
    within = f"{tolerance.nats:.2g} nats per token ({tolerance.source})"
    reason = (
        f"all {len(found)} steps within {within}, largest difference {largest:.2g}"
        if beyond is None
        else f"step {beyond}: {abs(found[beyond - 1]):.2g} is more than {within}"
    )
    return Verdict(beyond is None, reason, len(found), largest, statistics.fmean(found), tolerance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--repeats", type=Path, nargs="+", default=[], help="runs that are the same in everything")
    parser.add_argument("--seeds", type=Path, nargs="+", default=[], help="runs whose adapters begin differently")
    given = parser.parse_args()
    try:
        first, second = read(given.first), read(given.second)
        tolerance = tolerance_of(first, [*map(read, given.repeats)], [*map(read, given.seeds)])
        verdict = compare(first, second, tolerance)
    except NotComparable as error:
        sys.exit(f"error: {error}")
    print(json.dumps(dataclasses.asdict(verdict)))
    sys.exit(0 if verdict.equal else 1)


def read(file: Path) -> dict[str, Any]:
    """The result of a job, from a file that ends with its line of JSON."""
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8").strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
