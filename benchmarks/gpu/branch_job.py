"""One branch, trained as a run trains it: what it takes of memory, stage by stage, and how fast it is.

    python benchmarks/gpu/branch_job.py SETTINGS.json

The base is loaded in NF4, the text tokenised and packed, the adapter trained by the very functions of the loop
(`load_model`, `data.prepare`, `SftBranch`, `train_branch`), with the batch and the checkpointing that `check --fit`
chooses for the card.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops import flops_per_token, seen_tokens
from inputs_place import folder_of
from job import job
from measuring import WARM_UP_STEPS, DevicePeak, is_cuda, step_clock

GIB = 1 << 30
RANK = 64


@dataclass(frozen=True)
class Planned:
    """A recipe that fits its card, the shape of its base, and what its training is estimated to take."""

    recipe: Any
    outline: Any
    attention: str | None
    kernels: str | None
    estimate: Any


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Trains, and returns what was measured; see `result` and `peak_facts`."""
    from bam_lora.quiet import quiet

    quiet()
    with DevicePeak(settings["device"]) as peak, tempfile.TemporaryDirectory(dir=settings["work"]) as folder:
        planned = plan(settings)
        measured = train(settings, planned, Path(folder), peak)
    return {**result(planned, measured), "memory": peak_facts(peak, planned.estimate)}


def plan(settings: Mapping[str, Any]) -> Planned:
    """The recipe as `check --fit` makes it for the card; without a card, or if it shall not be fitted, as given."""
    from bam_lora.attention import choose_attention
    from bam_lora.fit import fit_recipe
    from bam_lora.kernels import choose_kernels
    from bam_lora.memory import estimate
    from bam_lora.memory_shape import shape_of_folder
    from bam_lora.recipe import recipe_from_dict

    base = folder_of(settings["shape"], Path(settings["work"])) / "base"
    outline, recipe = shape_of_folder(base), recipe_from_dict(recipe_values(settings, base))
    chosen = recipe.quantization
    attention = choose_attention(chosen.attention, base, chosen.compute_dtype, settings["device"])
    kernels = choose_kernels(recipe.training.kernels, base, settings["device"])
    how: dict[str, Any] = {"attention": attention, "device": settings["device"], "kernels": kernels}
    if settings["card_gib"] is not None and settings.get("fit", True):
        memory = round(settings["card_gib"] * GIB)
        fit = fit_recipe(recipe, outline, memory, **how)
        recipe = fit.applied(recipe)
    return Planned(recipe, outline, attention, kernels, estimate(recipe, outline, **how))


def recipe_values(settings: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The recipe of one branch of so many steps; the tokens of a step are the settings'."""
    length, rows = settings["length"], settings["step_tokens"] // settings["length"]
    batch = settings.get("batch", 1)
    training = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": rows // batch,
        "checkpointing": settings.get("checkpointing", True),
        "learning_rate": settings["learning_rate"],
        "logging_steps": 1,
        "save_steps": 10**6,
        "warmup_steps": 0,
    }
    tokens = settings["steps"] * settings["step_tokens"]
    text = str(base.parent / "text.jsonl")
    data = {"target": [{"path": text, "tokens": tokens}], "sequence_length": length}
    return {"base": str(base), "output": "unused", "data": data, "lora": {"r": RANK}, "training": training}


def train(settings: Mapping[str, Any], planned: Planned, work: Path, peak: DevicePeak) -> dict[str, Any]:
    """Loads, packs and trains; returns times, losses and the lengths of the documents in the rows."""
    from bam_lora.base import load_model, load_tokenizer
    from bam_lora.branch import BranchJob, train_branch
    from bam_lora.interrupt import StopRequest
    from bam_lora.scoring_sets import training_load

    recipe, steps = planned.recipe, settings["steps"]
    base, how = Path(recipe.base), training_load(planned.recipe)
    tokenizer = load_tokenizer(base)
    rows = packed_rows(recipe, tokenizer, work)
    started = time.perf_counter()
    model = load_model(base, how)
    peak.mark("base loaded")
    loaded = time.perf_counter()
    clock = step_clock(settings["device"], lambda: peak.mark("adapter and trainer made"))
    make = timed(branch_maker(recipe, how, tokenizer, rows, steps), clock)

    def on_step(step: int, loss: float | None) -> None:
        if step == 1:
            peak.mark("after the first step")

    lengths = [sum(row) for row in rows["seq_lengths"]]
    tokens = round(statistics.mean(lengths) * rows_of_step(recipe) * steps)
    todo = BranchJob(
        "branch", key="benchmark", steps=steps, tokens=tokens, base_name=str(base), kernels=planned.kernels
    )
    facts = train_branch(model, todo, work / "branch", make, on_step=on_step, stop=StopRequest())
    return {
        "load_seconds": loaded - started,
        "setup_seconds": facts["setup_seconds"],
        "branch_seconds": facts["seconds"],
        "adapter_parameters": facts["adapter_parameters"],
        "step_seconds": clock.step_seconds,
        "losses": clock.losses,
        "tokens": [tokens / steps] * steps,
        "documents": [length for row in rows["seq_lengths"] for length in row],
    }


def timed(make_trainer: Any, clock: Any) -> Any:
    """What makes the same trainers, with a callback that times their steps."""

    def make(view: Any, output: Path, callbacks: Sequence[Any]) -> Any:
        trainer = make_trainer(view, output, callbacks)
        trainer.add_callback(clock)
        return trainer

    return make


def packed_rows(recipe: Any, tokenizer: Any, work: Path) -> Any:
    """The recipe's text as a run packs it, in one slice."""
    from bam_lora.data import Layout, TrainingSource, prepare
    from bam_lora.packing import load_rows
    from bam_lora.sources import text_source

    (source,) = recipe.data.target
    layout = Layout(1, recipe.data.sequence_length, "random", 0.0, recipe.seed)
    sources = [TrainingSource(text_source(source), "target", source.tokens)]
    facts = prepare(sources, layout, tokenizer, work / "data", key="benchmark", say=lambda line: None)
    start, stop = facts["slices"][0]["rows"]
    return load_rows(work / "data", (start, stop))


def branch_maker(recipe: Any, how: Any, tokenizer: Any, rows: Any, steps: int) -> Any:
    """What `Front.trainer` gives the branches of a recipe."""
    from bam_lora.sft_branch import SftBranch

    return SftBranch(
        how=how,
        tokenizer=tokenizer,
        rows=rows,
        adapter=recipe.lora.arguments(),
        arguments={**recipe.training.sft_arguments(), "warmup_steps": 0},
        steps=steps,
        seed=recipe.seed,
        sequence_length=recipe.data.sequence_length,
    )


def rows_of_step(recipe: Any) -> int:
    """Rows in an optimizer step."""
    return int(recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps)


def result(planned: Planned, measured: dict[str, Any]) -> dict[str, Any]:
    """Speed of the median step, the first ones left out, and the operations behind it."""
    documents = measured.pop("documents")
    times = measured["step_seconds"]
    median = statistics.median(times[WARM_UP_STEPS:] or times)
    per_token = flops_per_token(planned.outline, measured["adapter_parameters"], seen_tokens(documents))
    speed = measured["tokens"][0] / median
    recipe = planned.recipe
    used = {
        "batch": recipe.training.per_device_train_batch_size,
        "accumulation": recipe.training.gradient_accumulation_steps,
        "checkpointing": recipe.training.checkpointing,
        "length": recipe.data.sequence_length,
        "optimizer": recipe.training.optim,
        "attention": planned.attention or "sdpa",
        "kernels": planned.kernels,
    }
    speeds = {"median_step_seconds": median, "tokens_per_second": speed, "flops_per_token": per_token}
    return {**measured, **speeds, "flops_per_second": speed * per_token["total"], "effective": used}


def peak_facts(peak: DevicePeak, estimate: Any) -> dict[str, Any]:
    """What the driver and torch counted, by stage, beside the estimate by component; the branch scores nothing."""
    estimated = sum(one.bytes for one in estimate.training)
    return {
        "source": peak.source,
        "peak_driver_bytes": peak.driver_bytes,
        "peak_torch_bytes": peak.torch_bytes,
        "stages": peak.marks,
        "estimated_bytes": estimated,
        "estimated_components": [dataclasses.asdict(one) for one in estimate.training],
        # On a CPU the estimate leaves out what the process itself takes.
        "estimated_over_measured": estimated / peak.driver_bytes if is_cuda(peak.device) else None,
    }


if __name__ == "__main__":
    job(main)
