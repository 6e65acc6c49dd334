"""Learning against forgetting: Branch-and-Merge and its rivals at equal tokens, over paired seeds.

    BAM_LORA_BENCH_DATA=folder python benchmarks/forgetting/run.py [--subset quick] [--hours 2] [--output DIR]

Runs what grid.yaml lists, in the order in which answers matter. Every run is a run directory of its own, started and
resumed by `bam-lora run`, its curve by `bam-lora shrink`, so the whole can be stopped and goes on; what is finished is
kept. Then `bam-lora compare` judges each arm without a curve against all that have one, and the numbers go to
`results/<date>.json` with provenance and to docs/results.md; a subset is only shown, beside what is recorded.
With `--report` nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for common/, as scripts are run by path
import yaml
from common.provenance import ROOT, provenance_of
from tables import beside_recorded, table, write, write_document

from bam_lora.report import compare

HERE = Path(__file__).resolve().parent
BASES = "bases"
WRITTEN = ("docs/results.md", "docs/figures/")  # by this script, beside its results


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    regime: str
    arm: str
    seed: int
    settings: dict[str, Any]
    scales: list[float]
    base: str | None = None  # one of the grid's bases, made by a run of its own
    against: tuple[str, ...] = ()  # rivals that it is also judged against alone

    def folder(self, output: Path) -> Path:
        """Its run directory."""
        return output / self.regime / self.arm / f"seed-{self.seed}"

    def overrides(self, output: Path) -> list[str]:
        """What its recipe changes of recipe.yaml, as `--set` takes it."""
        settings = {**self.settings, "seed": self.seed}
        if self.base:
            settings["base"] = str(output.resolve() / BASES / self.base / "seed-0" / "model")
        return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "forgetting")
    parser.add_argument("--subset", help="a subset named in grid.yaml, such as quick")
    parser.add_argument("--hours", type=float, default=6.0, help="start no run after so many hours")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, the cores shared out among them")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is finished")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a tree with uncommitted changes")
    options = parser.parse_args()
    if not os.environ.get("BAM_LORA_BENCH_DATA"):
        sys.exit("error: set BAM_LORA_BENCH_DATA to a folder with data/ and models/ (benchmarks/README.md)")
    given = [f"--{name} {value}" for name, value in (("subset", options.subset), ("jobs", options.jobs)) if value]
    command = " ".join(["benchmarks/forgetting/run.py", *given])
    cores = len(os.sched_getaffinity(0))
    provenance = provenance_of(command, cores, allow_dirty=options.allow_dirty, written=WRITTEN)
    grid = yaml.safe_load((HERE / "grid.yaml").read_text(encoding="utf-8"))
    cells = cells_of(grid, options.subset)
    deadline = time.monotonic() + options.hours * 3600
    threads = str(max(1, len(os.sched_getaffinity(0)) // options.jobs))
    if not options.report:
        for cell in bases_of(grid, cells):
            print(f"== base {cell.arm}", flush=True)
            carry_out(cell, options.output, str(len(os.sched_getaffinity(0))))

    def work(numbered: tuple[int, Cell]) -> None:
        number, cell = numbered
        if not options.report and time.monotonic() < deadline:
            print(f"== {number}/{len(cells)}: {cell.regime}, {cell.arm}, seed {cell.seed}", flush=True)
            carry_out(cell, options.output, threads)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, enumerate(cells, start=1)))
    finished = [cell for cell in cells if is_finished(cell, options.output)]
    print(f"{len(finished)} of {len(cells)} runs are finished")
    if finished:
        results = {"provenance": provenance, "runs": len(finished), "of": len(cells_of(grid, None)),
                   "regimes": judged(finished, options.output)}  # fmt: skip
        path = write(results, f"-{options.subset}" if options.subset else "")
        if options.subset:
            print(
                "\n".join(table(arms) for arms in results["regimes"].values()), beside_recorded(results, path), sep="\n"
            )
        else:
            write_document(results, path)
        print(path)


def cells_of(grid: dict[str, Any], subset: str | None) -> list[Cell]:
    """The runs of the grid, regime by regime, and of each regime seed by seed."""
    if subset is not None and subset not in grid["subsets"]:
        sys.exit(f"error: --subset: expected one of {', '.join(grid['subsets'])}, found {subset}")
    chosen = grid["subsets"][subset] if subset else {}
    return [
        make_cell(regime, name, seed, where, arm)
        for regime, where in grid["regimes"].items()
        if regime in chosen.get("regimes", grid["regimes"])
        for seed in chosen.get("seeds", grid["seeds"])
        if seed in where.get("seeds", grid["seeds"])
        for name, arm in grid["arms"].items()
        if name in chosen.get("arms", grid["arms"]) and regime in arm.get("regimes", grid["regimes"])
        if seed in arm.get("seeds", grid["seeds"])
    ]


def bases_of(grid: dict[str, Any], cells: list[Cell]) -> list[Cell]:
    """The runs that make the bases of these cells, each before any cell is run."""
    named = dict.fromkeys(cell.base for cell in cells if cell.base)
    return [Cell(BASES, name, 0, grid["bases"][name], []) for name in named]


def make_cell(regime: str, name: str, seed: int, where: dict[str, Any], arm: dict[str, Any]) -> Cell:
    settings = {**where["set"], **arm["set"]}
    rivals = tuple(arm.get("against", ()))
    return Cell(regime, name, seed, settings, arm.get("shrink", []), where.get("base"), rivals)


def carry_out(cell: Cell, output: Path, threads: str) -> None:
    """Runs one cell and its curve, or finds them done; what it says goes to a log beside its folder."""
    folder = cell.folder(output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environ = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": threads}
    sets = [part for override in cell.overrides(output) for part in ("--set", override)]
    commands = [["run", str(HERE / "recipe.yaml"), "--output", str(folder), *sets]]
    if cell.scales:
        scales = [part for scale in cell.scales for part in ("--scale", str(scale))]
        commands.append(["shrink", str(folder), *scales])
    with folder.with_suffix(".log").open("a") as log:
        for command in commands:
            status = subprocess.call([sys.executable, "-m", "bam_lora", *command], stdout=log, stderr=log, env=environ)
            if status:
                sys.exit(f"error: {folder}: exit status {status}; see {log.name}")


def is_finished(cell: Cell, output: Path) -> bool:
    folder = cell.folder(output)
    if not (folder / "report.json").exists() or not (folder / "model").is_dir():
        return False
    curve = folder / "shrink.json"
    points = json.loads(curve.read_text())["points"] if curve.exists() else []
    shrunk = {point["scale"] for point in points if point["kind"] == "shrink"}
    return shrunk >= set(cell.scales)


def judged(cells: list[Cell], output: Path) -> dict[str, Any]:
    """For every regime each run's scores, and each arm without a curve against the envelope of those with one."""
    result: dict[str, Any] = {}
    for regime in dict.fromkeys(cell.regime for cell in cells):
        here = [cell for cell in cells if cell.regime == regime]
        rivals = [cell for cell in here if cell.scales]
        arms: dict[str, Any] = {}
        for name in dict.fromkeys(cell.arm for cell in here):
            own = [cell for cell in here if cell.arm == name]
            arms[name] = {"runs": [summary(cell, output) for cell in own], "rival": bool(own[0].scales)}
            others = [cell for cell in rivals if cell.arm != name]
            if others and not own[0].scales:
                arms[name]["envelope"] = against(own, others, output)
            few = [cell for cell in others if cell.arm in own[0].against]
            if few:
                arms[name]["against"] = {"arms": own[0].against, "envelope": against(own, few, output)}
        result[regime] = arms
    return result


def against(own: list[Cell], others: list[Cell], output: Path) -> dict[str, Any] | None:
    """What `bam-lora compare` says of an arm beside its rivals, in the seeds in which all of them stand.

    A rival that was looked at with one seed only counts where the arm has no other seed either.
    """
    seeds = {name: {cell.seed for cell in others if cell.arm == name} for name in {cell.arm for cell in others}}
    several = [found for found in seeds.values() if len(found) > 1]
    shared = {cell.seed for cell in own}
    if len(shared) > 1 and several:
        shared = shared.intersection(*several)
    chosen = [cell for cell in others if cell.seed in shared and seeds[cell.arm] >= shared]
    mine = [cell for cell in own if cell.seed in shared]
    if not mine or not chosen:
        return None
    comparison = compare([cell.folder(output) for cell in (*mine, *chosen)])
    entry: dict[str, Any] = next(
        entry for entry in comparison["envelope"] if any(own[0].arm in run.split("/") for run in entry["runs"])
    )
    return entry


def summary(cell: Cell, output: Path) -> dict[str, Any]:
    report = json.loads((cell.folder(output) / "report.json").read_text())
    scores = ("target_after", "source_after", "learned", "forgotten")
    kept = ("target_before", "source_before", *scores, *(f"{key}_stderr" for key in scores), "delta_relative")
    return {
        "seed": cell.seed,
        **{key: report["summary"][key] for key in kept},
        "cosine": [one["cosine"] for one in report["iterations"]],
        "seconds_by_stage": report["cost"]["seconds_by_stage"],
        "train_tokens": report["cost"]["train_tokens"],
        "peak_rss_bytes": report["cost"]["peak_rss_bytes"],
        "commit": report["environment"]["commit"],
        "threads": report["environment"]["threads"],
        "curve": [
            {key: point[key] for key in ("label", "scale", "target", "source")} for point in report["shrink"] or []
        ],
    }


if __name__ == "__main__":
    main()
