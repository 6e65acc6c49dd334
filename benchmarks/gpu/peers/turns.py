"""Tokens per second of processor time of ways in turn, for a CPU that others use, too.

    python benchmarks/gpu/peers/turns.py SETTINGS.json --ways trl-best trl-best-fp32 ours --rounds 3 > RESULT.json

SETTINGS.json is a job's; its `way` does not matter. All runs are in this process, so only ways of this project's
environment; the way that goes first changes from round to round. The first steps of a run are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--ways", nargs="+", default=["trl-best", "trl-best-fp32", "ours"])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    from job import QUIET, run
    from peer_settings import Settings

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    settings = Settings.read(given.settings)
    rounds: list[dict[str, Any]] = []
    for number in range(given.rounds):
        first = number % len(given.ways)
        found = {way: run(dataclasses.replace(settings, way=way)) for way in given.ways[first:] + given.ways[:first]}
        rounds.append({way: found[way] for way in given.ways})
        print(f"round {number + 1}: {speeds(rounds[-1])}", file=sys.stderr)
    print(json.dumps(summary(rounds), indent=1))


def speeds(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Tokens per second of processor time of each way's run, without its first steps."""
    return {
        way: sum(result["tokens"][WARM_UP_STEPS:]) / sum(result["step_cpu_seconds"][WARM_UP_STEPS:])
        for way, result in results.items()
    }


def summary(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What is recorded of several rounds: speeds, losses, settings that were used, versions; of each way."""
    by_round = [speeds(one) for one in rounds]
    kept = ("losses", "checksums", "effective", "versions")
    ways = {
        way: {
            "tokens_per_cpu_second": [one[way] for one in by_round],
            "step_cpu_seconds": [one[way]["step_cpu_seconds"] for one in rounds],
            "same_losses_in_all_rounds": all(one[way]["losses"] == rounds[0][way]["losses"] for one in rounds),
            **{key: rounds[0][way][key] for key in kept},
        }
        for way in rounds[0]
    }
    return {"warm_up_steps": WARM_UP_STEPS, "rounds": len(rounds), "ways": ways}


if __name__ == "__main__":
    main()
