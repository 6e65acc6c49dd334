"""The steps of a run, each a function from hashed inputs to one artefact; done again only if it does not verify."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_lora.base import BaseFiles, Loading
from bam_lora.branch import ADAPTER, BranchJob, train_branch
from bam_lora.chat_result import OTHER_TEMPLATES, TEMPLATE, chat_files
from bam_lora.folding import fold_into
from bam_lora.front import Front
from bam_lora.gpu_memory import LESS_TO_SCORE, LESS_TO_TRAIN, room_for
from bam_lora.interrupt import StopRequest
from bam_lora.ledger import Ledger
from bam_lora.machine import release_memory
from bam_lora.plan import BranchPlan, Plan
from bam_lora.progress import RunProgress
from bam_lora.recipe import Recipe
from bam_lora.recipe_chat import trains_chat
from bam_lora.report.card_files import write_card
from bam_lora.report.format import scores_line
from bam_lora.rundir import RunDirectory
from bam_lora.scoring import FoundBase, Windowed, sample_texts, score_sets
from bam_lora.stage_clock import StageClock
from bam_lora.store import digest, link_or_copy, new_folder, read_record, seal, verify, write_record
from bam_lora.terminal_text import escaped
from bam_lora.views import adapted, count_linear_modules


class ModelSlot:
    """Holds at most one loaded base: a 4-bit copy serves its branches and its scores, then makes room."""

    def __init__(self, load: Callable[[Path, Loading], Any]) -> None:
        self._load = load
        self._key: tuple[str, Loading] | None = None
        self._model: Any = None

    def get(self, key: str, folder: Callable[[], Path], how: Loading) -> Any:
        """The base with this key, loaded in this way; whatever else was held is freed first."""
        if self._key != (key, how):
            self.clear()
            self._model = self._load(folder(), how)
            self._key = (key, how)
        return self._model

    def clear(self) -> None:
        """Frees the model."""
        self._model = self._key = None
        release_memory()


@dataclass
class Context:
    """What every stage of one run works with."""

    directory: RunDirectory
    recipe: Recipe
    plan: Plan
    ledger: Ledger
    original: BaseFiles  # the weights every fold starts from
    start: Path  # the model the first iteration starts from: the original, or a finished run's result
    tokenizer: Any
    evaluation: Windowed | None
    selection: Windowed | None
    progress: RunProgress
    stop: StopRequest
    front: Front
    clock: StageClock
    found: FoundBase | None = None  # the base before this run grew its vocabulary
    slot: ModelSlot = field(init=False)
    verified: set[Path] = field(default_factory=set)  # folders whose every byte this process has hashed

    def __post_init__(self) -> None:
        self.slot = ModelSlot(self._load)

    def _load(self, folder: Path, how: Loading) -> Any:
        """A model, loaded; loading one in a way that only scoring needs is part of scoring."""
        with self.clock.stage("load" if how == self.training_load else "evaluate"):
            return self.front.load(folder, how)

    @property
    def training_load(self) -> Loading:
        """How the base is held under the branches."""
        return self.front.training_load

    @property
    def scoring_load(self) -> Loading:
        """How every model is held that is scored."""
        return self.front.scoring_load

    def found_model(self, how: Loading) -> tuple[Any, Any]:
        """The base as the run found it, and its tokenizer."""
        if self.found is None:
            return self.model(0, how), self.tokenizer
        folder = self.found.folder
        return self.slot.get("as found", lambda: folder, how), self.found.tokenizer

    def model(self, iteration: int, how: Loading) -> Any:
        """The model after an iteration (0: what the first branches start from), loaded."""
        return self.slot.get(self.ledger.key(iteration), lambda: base_folder(self, iteration), how)


def base_folder(context: Context, iteration: int) -> Path:
    """The full-precision model after an iteration; folded from the ledger if it is not on disk."""
    if iteration == 0:
        return context.start
    fold_iteration(context, iteration)
    return context.directory.folded(iteration)


def train(context: Context, branch: BranchPlan, tokens_before: int, watch: Callable[[float], None]) -> None:
    """Trains one branch, or finds it done; `watch` is told the run's tokens after every step."""
    progress, recipe = context.progress, context.recipe
    folder = context.directory.branch(branch.iteration, branch.branch)
    # The plan's key, and the very base: on a GPU a branch that had to be trained again may differ in its last bits.
    key = digest([branch.key, context.ledger.key(branch.iteration - 1)])
    if verify(folder, key) is None:
        label = f"iteration {branch.iteration}/{len(context.plan.iterations)}, branch {branch.branch}"
        progress.stage(f"{label}: loading the base")
        model = context.model(branch.iteration - 1, context.training_load)
        job = BranchJob(
            label=f"{label}, slice {branch.slice}" + (f" ({escaped(branch.group)})" if branch.group else ""),
            key=key,
            steps=branch.steps,
            tokens=branch.tokens,
            base_name=context.original.name,
            keep_checkpoints=recipe.keep.checkpoints,
            kernels=context.front.kernels,
            loftq=recipe.lora.init == "loftq",
        )

        def on_step(step: int, loss: float | None) -> None:
            done = tokens_before + branch.tokens * step / branch.steps
            progress.step(label, step, branch.steps, loss, done)
            watch(done)

        context.front.branch_begin(branch)
        make = context.front.trainer(context.directory, context.tokenizer, branch)
        with context.clock.stage("train"), room_for(f"training {job.label}", LESS_TO_TRAIN):
            facts = train_branch(model, job, folder, make, on_step=on_step, stop=context.stop)
        context.front.branch_end(branch, facts)
    else:
        context.front.branch_found(branch, folder)
    progress.branch_done(tokens_before + branch.tokens)


def score_model(context: Context, iteration: int, branch: int | None = None) -> None:
    """Scores the model after an iteration, or one of its branches, unless that is done.

    A branch is scored on the base it was trained on plus its adapter, at the precision of all scores of the run.
    """
    if context.evaluation is None:
        return
    directory = context.directory
    folder = directory.iteration(iteration) if branch is None else directory.branch(iteration, branch)
    adapter = None if branch is None else folder / ADAPTER
    identity = context.ledger.key(iteration) if adapter is None else _adapter_key(context, iteration, folder)
    how = context.scoring_load
    key = digest([identity, context.evaluation.key, how.facts()])
    if read_record(folder / "eval.json", key) is not None:
        return
    context.progress.stage("scoring " + _name(iteration, branch))
    model = context.model(iteration if branch is None else iteration - 1, how)
    with adapted(model, adapter) as subject:
        scores = scored(context, subject, context.tokenizer, context.evaluation)
    record = {"format": 1, "iteration": iteration, "branch": branch, "precision": context.recipe.evaluation.precision}
    write_record(folder / "eval.json", key, {**record, "linear_modules": count_linear_modules(model), **scores})
    context.progress.say(f"{_name(iteration, branch)}: {scores_line(scores['scores'])}")


def scored(context: Context, model: Any, tokenizer: Any, evaluation: Windowed) -> dict[str, Any]:
    """What `score_sets` says of a model, by the recipe's settings."""
    with context.clock.stage("evaluate"):
        return score_sets(
            model,
            tokenizer,
            evaluation,
            batch_size=context.recipe.evaluation.batch_size,
            dtype=context.scoring_load.compute_dtype,
            on_batch=lambda count: context.stop.check(),
        )


def score_branch(context: Context, branch: BranchPlan) -> None:
    """Scores one branch, if the recipe wants that."""
    if context.recipe.evaluation.branches:
        score_model(context, branch.iteration, branch.branch)


def _adapter_key(context: Context, iteration: int, folder: Path) -> str:
    manifest = verify(folder, quick=True)
    assert manifest is not None, folder
    return digest([context.ledger.key(iteration - 1), manifest["files"][f"{ADAPTER}/adapter_model.safetensors"]])


def _name(iteration: int, branch: int | None) -> str:
    if branch is not None:
        return f"iteration {iteration}, branch {branch}"
    return f"merged model of iteration {iteration}" if iteration else "base"


def fold_iteration(context: Context, iteration: int) -> None:
    """Folds the ledger up to an iteration into the original weights, unless that model is there already."""
    directory, ledger = context.directory, context.ledger
    key = ledger.key(iteration)
    target = directory.folded(iteration)
    facts_file = directory.iteration(iteration) / "fold.json"
    if read_record(facts_file, key) is not None and verify(target, key, quick=target in context.verified) is not None:
        context.verified.add(target)
        return
    context.progress.stage(f"iteration {iteration}: folding into the full-precision weights")
    with context.clock.stage("fold"):
        ledger.verify(iteration)  # a damaged adapter or matrix would become a whole-looking model
        facts = fold_into(context.original.folder, ledger.view(iteration), target, key=key)
    kept = {name: facts[name] for name in ("seconds", "bytes", "weight_norm", "delta_norm")}
    write_record(facts_file, key, {"iteration": iteration, **kept})
    context.verified.add(target)
    context.front.folded(iteration, target)


def drop_bases(context: Context, before: int) -> None:
    """Deletes folded models that nothing needs any more, and the whole weights that newer ones have taken over from.

    Any iteration can be rebuilt from the ledger, but for those that rest on such weights.
    """
    if context.recipe.keep.bases == "all":
        return
    for number in range(1, before):
        shutil.rmtree(context.directory.folded(number), ignore_errors=True)
    context.ledger.drop_snapshots(before)


def write_samples(context: Context, iteration: int) -> None:
    """What the model after an iteration writes after the recipe's prompts, unless that is done."""
    prompts = context.recipe.evaluation.samples
    if not prompts:
        return
    path, identity = context.directory.samples, context.ledger.key(iteration)
    record = read_record(path) or {"samples": [], "models": {}}
    key = digest([identity, list(prompts), context.scoring_load.facts()])
    if record["models"].get(str(iteration)) == key:
        return
    context.progress.stage(f"writing samples with the {_name(iteration, None)}")
    how = context.scoring_load
    model, tokenizer = (context.model(iteration, how), context.tokenizer) if iteration else context.found_model(how)
    others = [sample for sample in record["samples"] if sample["iteration"] != iteration]
    chat = context.recipe.mode == "chat"
    with context.clock.stage("evaluate"), room_for("writing samples", LESS_TO_SCORE):
        new = sample_texts(model, tokenizer, prompts, iteration, how.compute_dtype, chat=chat)
    models = {**record["models"], str(iteration): key}
    samples = sorted(others + new, key=lambda sample: sample["iteration"])
    write_record(path, "samples", {"samples": samples, "models": models})


def write_result(context: Context) -> None:
    """The size of the whole change: |ΔW| against the original base, absolute and relative to the weights it changes."""
    directory, last = context.directory, len(context.plan.iterations)
    key = context.ledger.key(last)
    if read_record(directory.result, key) is not None:
        return
    fold = read_record(directory.iteration(last) / "fold.json", key)
    assert fold is not None
    relative = fold["delta_norm"] / fold["weight_norm"] if fold["weight_norm"] else None
    write_record(directory.result, key, {"delta_norm": fold["delta_norm"], "delta_relative": relative})


def write_model(context: Context, report: Mapping[str, Any]) -> None:
    """Puts the last folded model, its tokenizer and its card at `model/`, unless it is there."""
    directory, last = context.directory, len(context.plan.iterations)
    key = context.ledger.key(last)
    if verify(directory.model, key) is None:
        source = base_folder(context, last)
        manifest = verify(source, key, quick=True)
        assert manifest is not None
        chat = chat_files(source, context.start, context.tokenizer, trained=trains_chat(context.recipe))
        with new_folder(directory.model) as folder:
            for name in manifest["files"]:
                if name not in chat and not (TEMPLATE in chat and name.startswith(OTHER_TEMPLATES)):
                    link_or_copy(source / name, folder / name)
            for name, text in chat.items():
                (folder / name).write_text(text, encoding="utf-8")
            hashes = {name: file["sha256"] for name, file in manifest["files"].items()}
            for name in (*chat, *context.front.own_files(folder)):
                hashes.pop(name, None)
            seal(folder, key, {}, hashes=hashes)
            # The card may be edited by its owner, so it is not part of what has to verify.
            write_card(folder, report, context.recipe.resolved())
    if context.recipe.keep.bases == "none":
        drop_bases(context, last + 1)
    if context.recipe.keep.bases != "all":  # of a grown vocabulary; what needs it makes it again from the original
        shutil.rmtree(directory.folded(0), ignore_errors=True)
