"""What Branch-and-Merge costs beside plain SFTTrainer over the same tokens, with N=4 and K=2, evaluation aside.

    BAM_LORA_BENCH_DATA=folder python benchmarks/overhead/run.py [--rounds 3] [--sizes 8m,100m] [--full] [--work DIR]

One script (script.py), once with `SFTTrainer` and once with `BamTrainer`, each a whole process, in turn, round after
round, the one that goes first changing. Plain is: load the base in NF4, tokenise, pack, train, save the adapter; ours
ends with the merged and folded model, its report and its card. Time is from the start of the process to its end, and,
as others, from the end of the imports to the result on disk, and of the processor. The ratio is the median over rounds
of the ratio within a round.

500 k tokens of German on the 8 M base; the random 100 M base takes them too with `--full` (a quarter of an hour a
process on two cores), else 64 k. From those the ratio at 500 k is estimated: steps and data are taken to grow with the
tokens, all other stages to stay. Plain's loading and data are not told apart and taken to stay, which is against us.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for common/, as scripts are run by path
from common.provenance import ROOT, provenance_of
from common.random_base import given_or_random_base
from inputs import SHAPES, documents_for, parameters
from stages import bam_stages, plain_stages, scaled

HERE = Path(__file__).resolve().parent
WAYS = ("plain", "bam")
WHOLE_TOKENS = 500_000
TOKENS = {"8m": WHOLE_TOKENS, "100m": 64_000, "tiny": 8_000}
SETTINGS = {"slices": 4, "branches": 2, "sequence_length": 256, "batch_size": 4, "accumulation": 4}


def main() -> None:
    options = parse()
    facts = provenance_of("make bench-overhead", options.threads, allow_dirty=options.allow_dirty)
    provenance = {**facts, "load": os.getloadavg()}
    data = Path(os.environ["BAM_LORA_BENCH_DATA"]).resolve()
    results: dict[str, Any] = {"provenance": provenance, "settings": SETTINGS, "sizes": {}}
    for name in options.sizes:
        results["sizes"][name] = measured(name, data, options)
    day = datetime.date.today().isoformat()
    recorded = options.tokens is None and "tiny" not in options.sizes
    target = HERE / "results" / f"{day}.json" if recorded else options.work / "trial.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results), target, sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "overhead", help="bases, runs")
    parser.add_argument("--rounds", type=int, default=3, help="times that each runs")
    parser.add_argument("--sizes", default="8m,100m", help=f"of 8m, {', '.join(SHAPES)}, with commas between")
    parser.add_argument("--full", action="store_true", help="500 k tokens on every base")
    parser.add_argument("--tokens", type=int, default=None, help="another number, for trying")
    parser.add_argument("--save-steps", type=int, default=0, help="checkpoints as SFTConfig's save_steps; 0: none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="OMP_NUM_THREADS for both")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a tree with uncommitted changes")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.sizes = options.sizes.split(",")
    unknown = sorted(set(options.sizes) - {"8m", *SHAPES})
    if unknown:
        parser.error(f"--sizes: expected some of 8m, {', '.join(SHAPES)}, found {', '.join(unknown)}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {options.rounds}")
    if not os.environ.get("BAM_LORA_BENCH_DATA"):
        sys.exit("error: set BAM_LORA_BENCH_DATA to a folder with data/ and models/ (benchmarks/README.md)")
    return options


def measured(name: str, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON holds of one base."""
    base = given_or_random_base(name, SHAPES, data, options.work, tied=True)
    text = data / "data" / "de_docs.train.jsonl"
    wanted = options.tokens or (WHOLE_TOKENS if options.full else TOKENS[name])
    documents, tokens = documents_for(text, base, wanted)
    settings = {
        **SETTINGS,
        "base": str(base),
        "text": str(text),
        "documents": documents,
        "save_steps": options.save_steps,
    }
    rounds = []
    for number in range(options.rounds):
        order = WAYS if number % 2 == 0 else WAYS[::-1]
        entry = {way: attempt(way, settings, options) for way in order}
        entry = {way: entry[way] for way in WAYS}
        rounds.append({**entry, "load": os.getloadavg()[0]})
        print(f"{name}, round {number + 1}: " + ", ".join(f"{way} {entry[way]['seconds']:.1f} s" for way in WAYS))
    factor = WHOLE_TOKENS / tokens
    ratios = {key: ratio(rounds, key) for key in ("seconds", "seconds_after_imports", "cpu_seconds")}
    whole = [scaled(one["bam"]["stages"], factor) / scaled(one["plain"]["stages"], factor) for one in rounds]
    return {
        "parameters": parameters(base),
        "tokens": tokens,
        "documents": documents,
        "save_steps": options.save_steps,
        "ratio": ratios,
        "estimated_ratio_at_500k": {"median": statistics.median(whole), "all": whole}
        if tokens < WHOLE_TOKENS
        else None,
        "stages": {way: medians([one[way]["stages"] for one in rounds]) for way in WAYS},
        "rounds": rounds,
    }


def attempt(way: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One process from start to end, from an empty folder."""
    output = options.work / "out" / way
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    file = options.work / "settings.json"
    file.write_text(json.dumps(settings))
    threads = str(options.threads)
    environ = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    os.sync()
    command = [sys.executable, str(HERE / "script.py"), way, str(file), str(output)]
    started, busy = time.perf_counter(), cpu_seconds()
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"error: {way} failed:\n{done.stderr}")
    said = json.loads(done.stdout.splitlines()[-1])
    passed = said["passed"]
    stages = bam_stages(seconds, passed, output) if way == "bam" else plain_stages(seconds, passed)
    after = passed["saved"] - passed["imports"]
    times = {"seconds": seconds, "seconds_after_imports": after, "cpu_seconds": cpu_seconds() - busy}
    return {**times, "steps": said["steps"], "stages": stages}


def cpu_seconds() -> float:
    """Processor time of the processes that this one has waited for: steadier on a machine that others use, too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ratio(rounds: list[dict[str, Any]], key: str) -> dict[str, Any]:
    values = [one["bam"][key] / one["plain"][key] for one in rounds]
    return {"median": statistics.median(values), "all": values}


def medians(entries: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in entries) for name in entries[0]}


def table(results: dict[str, Any]) -> str:
    """Ratios and stages, as Markdown."""
    lines = []
    for name, size in results["sizes"].items():
        estimate = size["estimated_ratio_at_500k"]
        lines += [
            "",
            f"{name}: {size['parameters']:,} parameters, {size['tokens']:,} tokens, {len(size['rounds'])} rounds",
            f"bam / plain: {size['ratio']['seconds']['median']:.3f} whole processes, "
            f"{size['ratio']['seconds_after_imports']['median']:.3f} after imports, "
            f"{size['ratio']['cpu_seconds']['median']:.3f} in processor time"
            + (f", {estimate['median']:.3f} estimated at 500 k tokens" if estimate else ""),
            "",
            "| stage | plain, s | bam, s |",
            "|---|---|---|",
        ]
        for stage in dict.fromkeys([*size["stages"]["bam"], *size["stages"]["plain"]]):
            cells = [f"{size['stages'][way][stage]:.2f}" if stage in size["stages"][way] else "" for way in WAYS]
            lines.append(f"| {stage} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
