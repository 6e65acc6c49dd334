"""A few real steps of a recipe, for `bam-lora check --measure`: a very short run in a temporary folder beside its own.

It is the real loop in a process of its own: the base as the recipe loads it, its data, its batch, one branch of a few
steps, one merge, one fold, a few documents scored. Nothing is left behind. From its times follow the whole run's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bam_lora.check_machine import folder_beside
from bam_lora.errors import UserError
from bam_lora.plan import iteration_count
from bam_lora.recipe import Recipe, dump_recipe, recipe_from_dict
from bam_lora.rundir import RunDirectory
from bam_lora.scoring import read_set
from bam_lora.scoring_sets import set_sources
from bam_lora.scratch import scratch_folder
from bam_lora.store import read_record

if TYPE_CHECKING:
    from bam_lora.check_plan import Resources

STEPS = 6
_WARM_UP = 2  # steps that are slower than the rest
_DOCUMENTS = 4
_LABEL = 12
_PREFIX = ".bam-lora-measure-"


@dataclass(frozen=True)
class Measured:
    """What a short run took, and what follows for the whole one.

    Attributes:
        steps: Optimizer steps that were timed.
        seconds_per_step: Of one of them, the median.
        tokens_per_second: While it trains.
        peak_rss_bytes: Of the process.
        peak_gpu_bytes: Of torch on a GPU, its context left out; None without one.
        hours: Of the whole run by stage; without "train" where the data has no limit.
        left_out: What the run does beside it, which is not in the hours.
    """

    steps: int
    seconds_per_step: float
    tokens_per_second: float
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    hours: dict[str, float]
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {**vars(self), "total_hours": sum(self.hours.values()) if "train" in self.hours else None}

    def lines(self, plan: Resources) -> list[str]:
        """For the terminal, beside what was estimated."""
        lines = [
            f"{'measured':{_LABEL}}{self.tokens_per_second:,.0f} tokens/s, {self.seconds_per_step:.2f} s a step "
            f"({self.steps} steps)",
            f"{'':{_LABEL}}RAM {self.peak_rss_bytes / 2**30:.2f} GiB; estimated for the whole run "
            f"{plan.host.peak_bytes / 2**30:.2f} GiB",
        ]
        if self.peak_gpu_bytes is not None:
            lines.append(
                f"{'':{_LABEL}}GPU {self.peak_gpu_bytes / 2**30:.2f} GiB without the context; estimated with it "
                f"{plan.model.peak_bytes / 2**30:.2f} GiB"
            )
        if "train" not in self.hours:
            return [*lines, f"{'hours':{_LABEL}}not known: the data has no limit in tokens"]
        parts = ", ".join(f"{stage} {_hours(value)}" for stage, value in self.hours.items())
        lines.append(f"{'hours':{_LABEL}}{_hours(sum(self.hours.values()))} in all: {parts}")
        return lines + [f"{'note':{_LABEL}}not in the hours: {what}" for what in self.left_out]


def _hours(value: float) -> str:
    if value >= 1:
        return f"{value:.1f} h"
    return f"{value * 60:.1f} min" if value >= 1 / 60 else f"{value * 3600:.1f} s"


def measure_run(recipe: Recipe, *, steps: int | None, tokens: int | None) -> Measured:
    """Takes a few real steps.

    Args:
        recipe: The recipe.
        steps: Optimizer steps of the whole run, or None if unknown.
        tokens: Its training tokens, or None.

    Raises:
        UserError: If the short run fails, such as for lack of memory.
        Interrupted: On SIGTERM.
    """
    # Not where temporary files go, which may be in memory or small: a whole folded model is written.
    with scratch_folder(folder_beside(recipe.output), _PREFIX) as folder:
        short = short_recipe(recipe)
        (folder / "recipe.yaml").write_text(dump_recipe(short), encoding="utf-8")
        _run(folder)
        directory = RunDirectory(folder / "run")
        return _measured(recipe, short, directory, steps, tokens)


def short_recipe(recipe: Recipe) -> Recipe:
    """One branch of a few steps, scored on a few documents, merged and folded: every stage, none of the length."""
    values = recipe.resolved()
    data, training = values["data"], values["training"]
    per_step = (
        training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * data["sequence_length"]
    )
    needed = 2 * STEPS * per_step  # twice: a copy or a filter may drop some of it
    for source in (*data["target"], *data["replay"]):
        source["tokens"] = min(source["tokens"] or needed, needed)
    data |= {"slicing": "random", "slicing_column": None}
    merge = {"method": "linear", "weights": "uniform", "weights_by_module": {}}
    values["bam"] |= {"slices": 1, "branches": 1, "merge": {**values["bam"]["merge"], **merge}}
    training |= {"max_steps": STEPS, "logging_steps": 1, "save_steps": 10**6, "warmup_steps": 0}
    for source in (*values["evaluation"]["target"], *values["evaluation"]["source"]):
        source["documents"] = min(source["documents"] or _DOCUMENTS, _DOCUMENTS)
    values["evaluation"] |= {"samples": [], "branches": False, "tasks": []}  # benchmarks take hours
    values["selection"] = {"target": [], "source": []}
    values["limits"] = {}  # those of the whole run
    return recipe_from_dict({**values, "strategy": "single", "output": "unused"})


def _run(folder: Path) -> None:
    """The short run, in a process of its own: its peak of memory is not this one's."""
    command = [sys.executable, "-m", "bam_lora", "run", str(folder / "recipe.yaml"), "--output", str(folder / "run")]
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError.of(
            "the measured steps",
            expected="them to run",
            found=said[-1].removeprefix("error: ")
            if said
            else f"exit status {done.returncode}: killed, or out of memory",
            remedy="Put that right, or let bam-lora check RECIPE --fit choose smaller settings",
        )


def _measured(
    recipe: Recipe, short: Recipe, directory: RunDirectory, steps: int | None, tokens: int | None
) -> Measured:
    record, plan = read_record(directory.sessions), read_record(directory.plan)
    fold = read_record(directory.iteration(1) / "fold.json")
    assert record is not None
    assert plan is not None
    assert fold is not None
    session = record["sessions"][-1]
    lines = (directory.branch(1, 1) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    per_step = step_seconds(entries)
    trained = plan["data"]["train_tokens"]
    tokenised = sum(source["tokens"] for source in plan["data"]["sources"])
    hours = whole_hours(recipe, per_step, session, directory, steps, tokens, tokenised, float(fold["seconds"]))
    return Measured(
        steps=len(entries),
        seconds_per_step=per_step,
        tokens_per_second=trained / len(entries) / per_step,
        peak_rss_bytes=session["peak_rss_bytes"],
        peak_gpu_bytes=session["peak_gpu_bytes"],
        hours=hours,
        left_out=left_out(recipe),
    )


def left_out(recipe: Recipe) -> tuple[str, ...]:
    """What a run of the recipe does that the short run does not, in words."""
    evaluation, weights = recipe.evaluation, recipe.bam.merge.weights
    found = []
    if evaluation.tasks:
        models = "every merged model" if evaluation.task_when == "iterations" else "base and result"
        found.append(f"evaluation.tasks, {len(evaluation.tasks)} on {models}")
    if weights in ("learned", "search") and recipe.strategy == "bam":
        share = (recipe.bam.merge.learned if weights == "learned" else recipe.bam.merge.search).share
        found.append(f"bam.merge.weights: {weights}, at most {share:.3g} of the training's time")
    return tuple(found)


def step_seconds(entries: Sequence[Mapping[str, Any]]) -> float:
    """Median seconds of a step, the first ones left out where there are more."""
    times = [float(entry["seconds"]) for entry in entries]
    differences = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    return float(statistics.median(differences[_WARM_UP:] or differences[-1:]))


def whole_hours(
    recipe: Recipe, per_step: float, session: Mapping[str, Any], directory: RunDirectory, steps: int | None,
    tokens: int | None, tokenised: int, fold_seconds: float,
) -> dict[str, float]:  # fmt: skip
    """Hours of the whole run by stage: training by its steps, data by its tokens, scoring by its bytes, once a fold."""
    stages = session["seconds_by_stage"]
    count = iteration_count(recipe)
    seconds = {}
    if steps is not None and tokens is not None:
        seconds["data"] = stages.get("data", 0.0) * max(1.0, tokens / tokenised)
        seconds["train"] = per_step * steps
    seconds["load"] = float(session["first_load_seconds"]) * count
    seconds["score"] = _scoring_seconds(recipe, directory) * _scored_models(recipe, count)
    seconds["merge and fold"] = (stages.get("merge", 0.0) + fold_seconds) * count
    return {stage: value / 3600 for stage, value in seconds.items() if value}


def _scored_models(recipe: Recipe, iterations: int) -> int:
    return 1 + iterations + (recipe.slices if recipe.evaluation.branches else 0)


def _scoring_seconds(recipe: Recipe, directory: RunDirectory) -> float:
    """Seconds to score one model on all the evaluation text, by the bytes that were scored of it."""
    record = read_record(directory.iteration(1) / "eval.json")
    if record is None:
        return 0.0
    scored = sum(one["bytes"] for one in record["scores"])
    whole = sum(
        sum(len(text.encode()) for text in read_set(source).documents) for source in set_sources(recipe.evaluation)
    )
    return float(record["seconds"] * max(1.0, whole / scored))
