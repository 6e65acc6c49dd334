"""How much of what was learned is still there after many folds: the ledger's replay beside folding again and again.

    python benchmarks/precision/run.py [--weights 2] [--width 2048] [--work DIR]

Each iteration merges two adapters of rank 64 into bf16 weights; its merged delta is 1e-4 to 1e-2 of the weights' norm.
After 1, 2, 5, 10 and 20 iterations four ways are compared with the exact sum of all deltas in float64:

- ledger: bam_lora's, every iteration from the original weights, in fp32, rounded once;
- bf16: each iteration folded into the rounded weights of the one before, in fp32;
- peft: the same with PEFT on a bf16 model: `add_weighted_adapter(combination_type="cat")`, `merge_and_unload`;
- nf4: dequantise, add, quantise again, from weights that were quantised before the first iteration.

Kept is <achieved, wanted> / |wanted|², the projection of the achieved change on the wanted one; the relative error is
|achieved - wanted| / |wanted|. What nf4 achieves is counted from its own quantised start. Results go to
`results/<date>.json` with provenance; minutes on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for common/, as scripts are run by path
import torch
from common.provenance import ROOT, provenance_of
from ways import METHODS, Branch

HERE = Path(__file__).resolve().parent
RELATIVE_DELTAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
ITERATIONS = (1, 2, 5, 10, 20)
RANK, BRANCHES = 64, 2
WEIGHT_STD = 0.02
# How much of its factors an iteration has for itself: training pulls on in one direction, unrelated tasks do not.
DRIFTS = {"steady": 0.2, "unrelated": 1.0}


@dataclass(frozen=True)
class Weight:
    """One bf16 weight and what each iteration adds to it. Shapes: o output, i input, r rank."""

    name: str
    start_oi: torch.Tensor
    iterations: list[list[Branch]]

    def delta(self, iteration: int) -> torch.Tensor:
        """The merged delta of an iteration, counted from 0, in float64."""
        branches = self.iterations[iteration]
        total = sum((B_or.double() @ A_ri.double() for A_ri, B_or in branches), torch.zeros((), dtype=torch.float64))
        return total / len(branches)


def main() -> None:
    options = parse()
    provenance = provenance_of("make bench-precision", len(os.sched_getaffinity(0)), allow_dirty=options.allow_dirty)
    shutil.rmtree(options.work, ignore_errors=True)
    results: list[dict[str, Any]] = []
    for drift, own in DRIFTS.items():
        for relative in options.relative_deltas:
            print(f"{drift}, {relative:.0e}", flush=True)
            seeds = range(options.weights)
            weights = [make_weight(n, options.width, own, relative, max(options.iterations)) for n in seeds]
            for entry in compare(weights, options.iterations, options.work / f"{drift}-{relative:.0e}"):
                results.append({"drift": drift, "relative_delta": relative, **entry})
    settings = {"weights": options.weights, "width": options.width, "rank": RANK, "branches": BRANCHES,
                "own_share": DRIFTS, "weight_std": WEIGHT_STD}  # fmt: skip
    target = (
        options.work / "tiny.json" if options.tiny else HERE / "results" / f"{datetime.date.today().isoformat()}.json"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"provenance": provenance, "settings": settings, "results": results}, indent=1) + "\n")
    print(table(results), target, sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "precision", help="emptied first; 1 GB")
    parser.add_argument("--weights", type=int, default=2, help="how many weights")
    parser.add_argument("--width", type=int, default=2048, help="rows and columns of each")
    parser.add_argument("--tiny", action="store_true", help="small weights, two sizes, two iterations, for trying")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a tree with uncommitted changes")
    options = parser.parse_args()
    options.relative_deltas, options.iterations = RELATIVE_DELTAS, ITERATIONS
    if options.tiny:
        options.width, options.relative_deltas, options.iterations = 128, (1e-3, 1e-2), (1, 2)
    return options


def make_weight(number: int, width: int, own: float, relative: float, iterations: int) -> Weight:
    """A Gaussian weight whose every iteration's merged delta has `relative` of its norm; seeded by `number`."""
    generator = torch.Generator().manual_seed(number)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    start = (gaussian(width, width) * WEIGHT_STD).to(torch.bfloat16)
    size = relative * float(start.double().norm())
    common = [(gaussian(RANK, width), gaussian(width, RANK)) for _ in range(BRANCHES)]
    weight = Weight(f"layers.{number}.proj", start, [])
    for iteration in range(iterations):
        branches = []
        for A_ri, B_or in common:
            parts = [math.sqrt(1 - own**2) * half + own * gaussian(*half.shape) for half in (A_ri, B_or)]
            branches.append((parts[0], parts[1]))
        weight.iterations.append(branches)
        factor = size / float(weight.delta(iteration).norm())
        weight.iterations[iteration] = [(A_ri, B_or * factor) for A_ri, B_or in branches]
    return weight


def compare(weights: Sequence[Weight], iterations: Sequence[int], folder: Path) -> Iterator[dict[str, Any]]:
    """One entry for each way and count of iterations, over all weights."""
    starts = {weight.name: weight.start_oi for weight in weights}
    steps = [
        {weight.name: weight.iterations[number] for weight in weights} for number in range(len(weights[0].iterations))
    ]
    exact = {weight.name: torch.zeros(weight.start_oi.shape, dtype=torch.float64) for weight in weights}
    wanted: dict[int, dict[str, torch.Tensor]] = {}
    for number in range(1, len(steps) + 1):
        for weight in weights:
            exact[weight.name] += weight.delta(number - 1)
        if number in iterations:
            wanted[number] = {name: total.clone() for name, total in exact.items()}
    for method, way in METHODS.items():
        for number, achieved in way(starts, steps, iterations, folder / method):
            yield {"method": method, "iterations": number, **scores(achieved, wanted[number])}
    shutil.rmtree(folder)


def scores(achieved: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """{"kept", "relative_error"} over all weights together, of changes in float64."""
    inner = math.fsum(float((achieved[name] * wanted[name]).sum()) for name in wanted)
    whole = math.fsum(float(wanted[name].square().sum()) for name in wanted)
    missed = math.fsum(float((achieved[name] - wanted[name]).square().sum()) for name in wanted)
    return {"kept": inner / whole, "relative_error": math.sqrt(missed / whole)}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Kept (relative error) by drift, delta size and iterations, as Markdown."""
    found = {(one["drift"], one["relative_delta"], one["iterations"], one["method"]): one for one in results}
    lines = []
    for drift in dict.fromkeys(key[0] for key in found):
        lines += ["", f"{drift}: kept (relative error)", "", f"| delta | iterations | {' | '.join(METHODS)} |"]
        lines += ["|---" * (2 + len(METHODS)) + "|"]
        for _, relative, number in dict.fromkeys(key[:3] for key in found if key[0] == drift):
            entries = [found[drift, relative, number, method] for method in METHODS]
            cells = [f"{one['kept']:.1%} ({one['relative_error']:.2g})" for one in entries]
            lines.append(f"| {relative:.0e} | {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
