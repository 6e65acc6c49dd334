"""Folding two adapters into a model: bam-lora beside plain copying, PEFT, mergekit and axolotl.

    python benchmarks/fold/run.py [--large] [--rounds 5] [--peers peft,mergekit,axolotl] [--work DIR]

Makes a random 1.1 B Llama in bf16 and two adapters of rank 64 on all linear layers, then runs everybody in turn, over
and over, each as a whole process up to the last byte on the disk, its inputs in the page cache. `--large` adds an 8 B
Llama in one 16 GB shard, for copying and bam-lora only: the peers hold all of it in memory. Time, memory and the error
against float64 go to `results/<date>.json` with provenance. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for common/, as scripts are run by path
from accuracy import errors
from common.provenance import provenance_of
from contenders import PEERS, ROOT, Contender, copying, ours, peers
from inputs import WEIGHTS, Inputs, make_inputs
from measuring import Failed, measure, warm
from tables import table

HERE = Path(__file__).resolve().parent
MEASURES = ("cp -r", "bam-lora")  # what all others are compared with
METHOD = (
    "whole processes in the same order each round; before each its inputs are read once (a warm page cache) and all "
    "else is synced; every file written is synced within its time; memory every 20 ms, summed over the process tree"
)


def main() -> None:
    options = parse()
    provenance = whence(options)
    names = ["tiny"] if options.tiny else ["1.1b", *(["8b"] if options.large else [])]
    inputs = {name: make_inputs(name, options.work) for name in dict.fromkeys(["tiny", *names])}
    present, absent = peers(options.peers, options.work)
    field = [copying(), ours(), *present]
    failed = trials(field, inputs["tiny"], options)
    results: dict[str, Any] = {"provenance": provenance, "method": METHOD, "weights": WEIGHTS, "models": {}}
    for name in names:
        # The large model is about scale: who holds a whole model in memory has no place in it.
        asked = [one for one in field if one.name not in failed and (name != "8b" or one.name in MEASURES)]
        results["models"][name] = measured(inputs[name], asked, options)
        absent.update({f"{one} on {name}": why for one, why in results["models"][name].pop("failed").items()})
    results["absent"] = {**absent, **failed}
    results["must_show"] = claims(results["models"])
    day = datetime.date.today().isoformat()
    target = options.work / "tiny.json" if options.tiny else HERE / "results" / f"{day}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results), target, sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "fold", help="models, environments, outputs")
    parser.add_argument("--rounds", type=int, default=5, help="times that each runs (the 8 B model: at most 3)")
    parser.add_argument("--peers", default=",".join(PEERS), help="which, with commas between; '' for none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="OMP_NUM_THREADS for all")
    parser.add_argument("--large", action="store_true", help="also an 8 B model in one shard (50 GB of disk)")
    parser.add_argument("--tiny", action="store_true", help="a model of 10 M parameters only, for trying")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a tree with uncommitted changes")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.peers = [name for name in options.peers.split(",") if name]
    unknown = sorted(set(options.peers) - set(PEERS))
    if unknown:
        parser.error(f"--peers: expected some of {', '.join(PEERS)}, found {', '.join(unknown)}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {options.rounds}")
    if not Path("/proc/self/status").exists():
        sys.exit("error: expected /proc/PID/status, to read memory from; found none; run this on Linux")
    return options


def whence(options: argparse.Namespace) -> dict[str, Any]:
    command = " ".join(["benchmarks/fold/run.py", "--rounds", str(options.rounds), *(["--large"] * options.large)])
    variables = {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "MKL_", "KMP_"))}
    facts = provenance_of(command, options.threads, allow_dirty=options.allow_dirty)
    return {**facts, "variables": variables, "load": os.getloadavg()}


def trials(field: Sequence[Contender], tiny: Inputs, options: argparse.Namespace) -> dict[str, str]:
    """Everybody once on the tiny model, not counted: fills caches of code, and shows who does not work here."""
    failed: dict[str, str] = {}
    for one in field:
        print(f"trying {one.name}", flush=True)
        attempt(one, tiny, options, failed)
    return failed


def attempt(one: Contender, inputs: Inputs, options: argparse.Namespace, failed: dict[str, str]) -> dict[str, Any]:
    """One run; a peer that fails is noted in `failed` and gives nothing, where copying or ours fails all is over."""
    try:
        return one.run(inputs, options.work / "out" / "fold", options.threads)
    except Failed as error:
        if one.name in MEASURES:
            sys.exit(f"error: {one.name} on {inputs.base}: expected a model, found {error}")
        failed[one.name] = f"failed: {error}"
        return {}


def measured(inputs: Inputs, field: Sequence[Contender], options: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one model; a peer that fails once is left out."""
    runs: dict[str, list[dict[str, Any]]] = {one.name: [] for one in field}
    imports: dict[str, list[dict[str, Any]]] = {one.name: [] for one in field}
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    rounds = min(options.rounds, 3) if inputs.name == "8b" else options.rounds
    for number, one in itertools.product(range(1, rounds + 1), field):
        if one.name in failed:
            continue
        imports[one.name].append(import_torch(one, options))
        warm([inputs.base, *inputs.adapters, inputs.stacked])
        taken = attempt(one, inputs, options, failed)
        print(f"{inputs.name} {number}/{rounds} {one.name}: {taken.get('seconds', math.nan):.2f} s", flush=True)
        runs[one.name].append(taken)
        out = options.work / "out" / "fold"
        if taken and number == rounds and one.name != "cp -r":
            found[one.name] = errors(inputs.base, out / one.result, inputs.adapters, WEIGHTS)
        shutil.rmtree(out)
    entries = {
        one.name: entry(runs[one.name], imports[one.name], runs, found.get(one.name), one.versions)
        for one in field
        if one.name not in failed
    }
    return {
        "inputs": inputs.facts,
        "bytes": inputs.base_bytes,
        "rounds": rounds,
        "arithmetic": arithmetic(inputs, options),
        "contenders": entries,
        "failed": failed,
    }


def import_torch(one: Contender, options: argparse.Namespace) -> dict[str, Any]:
    """What it takes to have torch at all, in a contender's environment."""
    return measure([one.python, "-c", "import torch"], options.work / "out" / "import.log",
                   environ=one.environ(options.threads))  # fmt: skip


def arithmetic(inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    given = [*map(str, (inputs.base, *inputs.adapters)), *map(str, WEIGHTS)]
    command = [sys.executable, str(HERE / "arithmetic.py"), *given]
    done = subprocess.check_output(command, env=ours().environ(options.threads), text=True)
    result: dict[str, Any] = json.loads(done.splitlines()[-1])
    return result


def entry(
    taken: list[dict[str, Any]],
    imports: list[dict[str, Any]],
    runs: dict[str, list[dict[str, Any]]],
    error: dict[str, Any] | None,
    versions: dict[str, str],
) -> dict[str, Any]:
    """What the JSON holds of one contender; ratios are medians over rounds of ratios within a round."""
    result: dict[str, Any] = {
        key: spread([one[key] for one in taken])
        for key in ("seconds", "sync_seconds", "peak_anonymous_bytes", "peak_file_bytes")
    }
    for key, name in (("over_copy", "cp -r"), ("over_bam_lora", "bam-lora")):
        pairs = zip(taken, runs[name], strict=True)
        result[key] = statistics.median(one["seconds"] / other["seconds"] for one, other in pairs)
    floor = statistics.median(one["peak_anonymous_bytes"] for one in imports)
    result["import_torch_seconds"] = spread([one["seconds"] for one in imports])
    result["import_torch_anonymous_bytes"] = floor
    result["anonymous_above_import_bytes"] = result["peak_anonymous_bytes"]["max"] - floor
    return {**result, "error": error, **({"versions": versions} if versions else {})}


def spread(values: list[float]) -> dict[str, Any]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "all": values}


def claims(models: dict[str, Any]) -> dict[str, Any]:
    """The numbers that the fold is judged by, next to each other."""
    result: dict[str, Any] = {}
    for name, model in models.items():
        entries = model["contenders"]
        mine = entries["bam-lora"]
        peers_over = {key: one["over_bam_lora"] for key, one in entries.items() if key in PEERS}
        others = [ratio for key, ratio in peers_over.items() if key != "peft"]
        floor = mine["import_torch_seconds"]["median"] + 1.2 * model["arithmetic"]["product_seconds"]
        result[name] = {
            "seconds_over_copy": mine["over_copy"],
            "seconds_over_import_and_1.2_arithmetic": mine["seconds"]["median"] / floor,
            "peft_over_bam_lora": peers_over.get("peft"),
            "best_other_peer_over_bam_lora": min(others) if others else None,
            "anonymous_above_import_bytes": mine["anonymous_above_import_bytes"],
            "identical": mine["error"]["identical"],
            "largest_ulp": mine["error"]["largest_ulp"],
            "seconds_per_gb": mine["seconds"]["median"] / model["bytes"] * 1e9,
        }
    if {"1.1b", "8b"} <= set(models):
        result["seconds_per_byte_8b_over_1.1b"] = result["8b"]["seconds_per_gb"] / result["1.1b"]["seconds_per_gb"]
    return result


if __name__ == "__main__":
    main()
