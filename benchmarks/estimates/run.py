"""What `bam-lora check` estimates of memory and disk, against what whole runs take, for three sizes of base.

    BAM_LORA_BENCH_DATA=folder python benchmarks/estimates/run.py [--cases 8m,8m-text,100m,...] [--work DIR]

Each case is one whole run (four slices, two branches; inputs.py says what else) in a process of its own: its peak
resident set as the system reports it, the peak of its folder, looked at all through the run, and on a GPU the peak of
what torch reserves, with the context that is assumed. The random bases are made on the first call.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for common/, as scripts are run by path
import torch
from common.provenance import ROOT, provenance_of
from inputs import base_folder, cases, recipe_of

from bam_lora.check_base import planned_base
from bam_lora.check_machine import find_machine
from bam_lora.check_plan import plan_resources
from bam_lora.memory import CONTEXT_BYTES
from bam_lora.recipe import dump_recipe, recipe_from_dict

HERE = Path(__file__).resolve().parent
RECORDED = "8m,8m-text,100m,100m-text,500m"
_PAUSE = 0.02  # seconds between looks at the folder


def main() -> None:
    options = parse()
    threads, device = torch.get_num_threads(), find_machine().device
    facts = provenance_of("make bench-estimates", threads, allow_dirty=options.allow_dirty, device=device)
    provenance = {**facts, "load": os.getloadavg()}
    data = Path(os.environ["BAM_LORA_BENCH_DATA"]).resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"provenance": provenance, "cases": {}}
    for name in options.cases:
        results["cases"][name] = attempt(name, data, options)
        print(table({name: results["cases"][name]}), flush=True)
    recorded = ",".join(options.cases) == RECORDED
    day = datetime.date.today().isoformat()
    target = HERE / "results" / f"{day}.json" if recorded else options.work / "trial.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results["cases"]), target, sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "estimates", help="bases, runs")
    parser.add_argument("--cases", default=RECORDED, help=f"of {', '.join(cases())}, with commas between")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a tree with uncommitted changes")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.cases = options.cases.split(",")
    unknown = sorted(set(options.cases) - set(cases()))
    if unknown:
        parser.error(f"--cases: expected some of {', '.join(cases())}, found {', '.join(unknown)}")
    if not os.environ.get("BAM_LORA_BENCH_DATA"):
        sys.exit("error: set BAM_LORA_BENCH_DATA to a folder with data/ and models/ (benchmarks/README.md)")
    return options


def attempt(name: str, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The estimate for one base, and what a run took."""
    recipe = recipe_from_dict(recipe_of(name, base_folder(name, data, options.work), data))
    base, machine = planned_base(recipe), find_machine()
    plan = plan_resources(recipe, base, machine)
    output = options.work / f"run-{name}"
    shutil.rmtree(output, ignore_errors=True)
    file = options.work / f"{name}.yaml"
    file.write_text(dump_recipe(recipe))
    started = time.perf_counter()
    peak_disk, usage = watched(file, output)
    seconds = time.perf_counter() - started
    sessions = json.loads((output / "sessions.json").read_text())
    gpu = sessions["sessions"][-1]["peak_gpu_bytes"]
    measured = {"ram": usage, "disk_peak": peak_disk, "disk_end": folder_bytes(output)}
    estimated = {"ram": plan.host.peak_bytes, "disk_peak": plan.disk.peak_bytes, "disk_end": plan.disk.end_bytes}
    if gpu is not None:
        measured["gpu"], estimated["gpu"] = gpu + CONTEXT_BYTES, plan.model.peak_bytes
    shutil.rmtree(output)
    return {
        "parameters": base.shape.parameters,
        "device": machine.name,
        "seconds": seconds,
        "measured": measured,
        "estimated": estimated,
        "ratio": {key: estimated[key] / measured[key] for key in measured},
        "components": plan.to_json(),
    }


def watched(recipe: Path, output: Path) -> tuple[int, int]:
    """Peak bytes of the folder while a whole run fills it, and peak resident bytes of its process."""
    command = [sys.executable, "-m", "bam_lora", "run", str(recipe), "--output", str(output)]
    log = output.with_suffix(".log")
    with log.open("w") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": str(ROOT)})
        peak = 0
        while True:
            peak = max(peak, folder_bytes(output))
            done, status, usage = os.wait4(child.pid, os.WNOHANG)
            if done:
                break
            time.sleep(_PAUSE)
    if status:
        sys.exit(f"error: the run failed:\n{log.read_text()}")
    return peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, one that is there under two names counted once."""
    sizes: dict[int, int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(root, name))
            except FileNotFoundError:  # it went while we looked
                continue
            sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())


def table(measured: dict[str, Any]) -> str:
    """Estimated and measured, as Markdown."""
    lines = ["| case | what | estimated | measured | estimated / measured |", "|---|---|---|---|---|"]
    for name, size in measured.items():
        for key, taken in size["measured"].items():
            estimated = size["estimated"][key]
            lines.append(
                f"| {name} ({size['parameters'] / 1e6:.0f} M) | {key} | {estimated / 1e6:,.0f} MB | "
                f"{taken / 1e6:,.0f} MB | {size['ratio'][key]:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
