"""A whole run of one iteration: two slices, two branches, merge, fold, scores; how long each stage takes.

    python benchmarks/gpu/run_job.py SETTINGS.json

The times are those that the run itself keeps: `sessions.json`, the branches' manifests, `metrics.jsonl`. To change from
one branch to the next is to write the one's adapter and to set up the other's trainer.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from branch_job import recipe_values
from inputs_place import folder_of
from job import job
from measuring import WARM_UP_STEPS, DevicePeak, is_cuda

GIB = 1 << 30
BRANCHES = 2


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs, and returns stages, memory and the estimate of `check`."""
    from bam_lora.loop import run

    device, work = settings["device"], Path(settings["work"])
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    with DevicePeak(device) as peak:
        recipe = recipe_of(settings, work)
        report = run(recipe, output)
    try:
        return {**stages_of(report, output), "memory": memory_facts(peak, output)}
    finally:
        shutil.rmtree(output, ignore_errors=True)


def recipe_of(settings: Mapping[str, Any], work: Path) -> Any:
    """The recipe that is run, with the settings that `check --fit` chooses for the card if there is one."""
    from bam_lora.attention import choose_attention
    from bam_lora.fit import fit_recipe
    from bam_lora.kernels import choose_kernels
    from bam_lora.memory_shape import shape_of_folder
    from bam_lora.recipe import recipe_from_dict

    root = folder_of(settings["shape"], work)
    base, held_out = root / "base", str(root / "held-out.jsonl")
    values = recipe_values(settings, base)
    values["data"]["target"][0]["tokens"] *= BRANCHES  # `steps` are each branch's
    scored = {"target": [{"path": held_out, "documents": settings["scored_documents"], "set": "held-out"}]}
    values |= {"bam": {"slices": BRANCHES, "branches": BRANCHES}, "evaluation": {**scored, "branches": False}}
    recipe = recipe_from_dict(values)
    if settings["card_gib"] is None:
        return recipe
    chosen = recipe.quantization
    attention = choose_attention(chosen.attention, base, chosen.compute_dtype, settings["device"])
    kernels = choose_kernels(recipe.training.kernels, base, settings["device"])
    how: dict[str, Any] = {"attention": attention, "device": settings["device"], "kernels": kernels}
    fit = fit_recipe(recipe, shape_of_folder(base), round(settings["card_gib"] * GIB), **how)
    return fit.applied(recipe)


def stages_of(report: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Seconds by stage, and what one branch takes besides its steps."""
    from bam_lora.rundir import RunDirectory
    from bam_lora.store import read_json

    directory = RunDirectory(output)
    session = read_json(directory.sessions)["sessions"][-1]
    (iteration,) = report["iterations"]
    branches = iteration["branches"]
    steps = [step_facts(directory.branch(1, one["branch"])) for one in branches]
    scored = read_json(directory.iteration(1) / "eval.json")
    seconds, tokens = session["seconds_by_stage"], report["cost"]["train_tokens"]
    return {
        "seconds_by_stage": seconds,
        "wall_seconds": session["seconds"],
        "load_seconds": session["first_load_seconds"],
        "fold_seconds": read_json(directory.iteration(1) / "fold.json")["seconds"],
        "branches": [{**one, **times} for one, times in zip(branches, steps, strict=True)],
        "setup_seconds": statistics.mean(one["setup_seconds"] for one in branches),
        "write_seconds": statistics.mean(
            one["seconds"] - times["last_step_seconds"] for one, times in zip(branches, steps, strict=True)
        ),
        "median_step_seconds": statistics.mean(one["median_step_seconds"] for one in steps),
        "tokens_per_step": tokens / sum(one["count"] for one in steps),
        "train_tokens": tokens,
        "evaluation": {"seconds": scored["seconds"], "bytes": sum(one["bytes"] for one in scored["scores"])},
    }


def step_facts(branch: Path) -> dict[str, Any]:
    """Steps of a branch; seconds from its start to the last one; seconds of the median one, the first left out."""
    lines = (branch / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ends = [float(json.loads(line)["seconds"]) for line in lines]
    times = [after - before for before, after in itertools.pairwise(ends)]
    kept = times[WARM_UP_STEPS - 1 :] or times or ends  # the first step is not among them
    return {"count": len(ends), "last_step_seconds": ends[-1], "median_step_seconds": statistics.median(kept)}


def memory_facts(peak: DevicePeak, output: Path) -> dict[str, Any]:
    """The peak, beside the estimate that the run itself has kept."""
    from bam_lora.rundir import RunDirectory
    from bam_lora.store import read_json

    estimate = read_json(RunDirectory(output).environment).get("estimate") or {}
    estimated = estimate.get("peak_gpu_bytes" if is_cuda(peak.device) else "peak_rss_bytes")
    return {
        "source": peak.source,
        "peak_driver_bytes": peak.driver_bytes,
        "peak_torch_bytes": peak.torch_bytes,
        "estimated_bytes": estimated,
        "estimated_over_measured": None if estimated is None else estimated / peak.driver_bytes,
    }


if __name__ == "__main__":
    job(main)
