"""Benchmarks of a run's models and of single models: scored once, kept in the run and for other runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.base import BaseFiles, Loading, file_hashes
from bam_lora.chat import template_digest
from bam_lora.ledger import LEDGER_FILE, Ledger
from bam_lora.ledger_history import history_key
from bam_lora.limits import read_ended
from bam_lora.recipe import Recipe
from bam_lora.recipe_paths import is_task_file
from bam_lora.rundir import RunDirectory
from bam_lora.stages import Context
from bam_lora.store import digest, read_record, write_record
from bam_lora.task_files import read_task_file
from bam_lora.tasks import FoundTask, TaskSpec, describe_task, find_tasks, require_known, score_task

TASKS_FILE = "tasks.json"
_RECORD = "tasks"


def task_specs(recipe: Recipe) -> list[TaskSpec]:
    """The recipe's tasks, in plain values."""
    return [TaskSpec(**task.model_dump()) for task in recipe.evaluation.tasks]


def cache_folder() -> Path:
    """Where scores of all runs are kept: BAM_LORA_CACHE, or `bam_lora` in the user's cache folder."""
    named = os.environ.get("BAM_LORA_CACHE")
    general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named).expanduser() if named else general / "bam_lora") / "tasks"


def task_lines(recipe: Recipe) -> list[str]:
    """The recipe's tasks for `bam-lora check`, each looked up and its data loaded.

    Raises:
        UserError: If one cannot be done.
    """
    return (
        [f"task        {describe_task(one)}" for one in find_tasks(task_specs(recipe))]
        if recipe.evaluation.tasks
        else []
    )


def require_tasks(recipe: Recipe) -> None:
    """Checks that the harness is installed and has the recipe's tasks, and that task files are as they should be.

    Raises:
        UserError: If not. Whether a task's data can be had is only known when it is done.
    """
    for one in find_tasks(task_specs(recipe)) if recipe.evaluation.tasks else ():
        require_known(one)


def score_tasks(context: Context, iteration: int) -> None:
    """Scores the model after an iteration (0: the base as the run found it) on the recipe's tasks, unless that is done.

    Each score is written as soon as it is there, so that a run that is stopped goes on with the next task.
    """
    specs = task_specs(context.recipe)
    ends = context.recipe.evaluation.task_when == "ends"
    if not specs or (ends and iteration not in (0, len(context.plan.iterations))):
        return
    found = find_tasks(specs)
    subject = _Subject(context, iteration)
    keys = [one.key(subject.identity, context.scoring_load.facts(), subject.template) for one in found]
    path = context.directory.iteration(iteration) / TASKS_FILE
    known = {entry["key"]: entry for entry in (read_record(path, _RECORD) or {"tasks": []})["tasks"]}

    def write() -> None:
        pairs = [(one, known[key]) for one, key in zip(found, keys, strict=True) if key in known]
        entries = [{**entry, **_asked(one, context.recipe.evaluation.precision)} for one, entry in pairs]
        before = read_record(path, _RECORD)
        if before is None or before["tasks"] != entries:
            write_record(path, _RECORD, {"format": 1, "iteration": iteration, "tasks": entries})

    for one, key in zip(found, keys, strict=True):
        if key not in known:
            known[key] = cached(one, key, subject.score)
            context.progress.say(f"{subject.name}: {task_line(known[key])}")
            write()
    write()


def _asked(found: FoundTask, precision: str) -> dict[str, Any]:
    return {"wanted": found.spec.wanted(), "role": found.spec.role, "precision": precision}


class _Subject:
    """The model of a run after an iteration, as it does tasks."""

    def __init__(self, context: Context, iteration: int) -> None:
        self.context, self.iteration = context, iteration
        self.name = f"merged model of iteration {iteration}" if iteration else "base"
        self.identity, self.tokenizer = context.ledger.key(iteration), context.tokenizer
        if iteration == 0 and context.found is not None:
            self.identity, self.tokenizer = digest([self.identity, "as found"]), context.found.tokenizer
        self.chat = context.recipe.mode == "chat"
        self.template = template_digest(self.tokenizer) if self.chat else None

    def score(self, task: FoundTask) -> dict[str, Any]:
        """Its scores on a task."""
        context, how = self.context, self.context.scoring_load
        context.stop.check()
        context.progress.stage(f"{self.name}: task {task.name}")
        model = context.model(self.iteration, how) if self.iteration else context.found_model(how)[0]
        batch_size = context.recipe.evaluation.batch_size
        shown = [0]

        def tick(done: int, total: int) -> None:
            context.stop.check()
            tenth = 10 * done // max(total, 1)
            if tenth != shown[0]:  # a log file gets a line each time: not one for every batch
                shown[0] = tenth
                context.progress.stage(f"{self.name}: task {task.name}, {done:,} of {total:,} prompts")

        with context.clock.stage("evaluate"):
            return score_task(
                model, self.tokenizer, task, batch_size=batch_size, dtype=how.compute_dtype, chat=self.chat,
                on_progress=tick,
            )  # fmt: skip


def tasks_left(directory: RunDirectory, recipe: Recipe) -> bool:
    """Whether a finished run has not scored all tasks that the recipe names now, or not as they are now."""
    wanted = [(spec, _file_content(spec.task)) for spec in task_specs(recipe)]
    if not wanted:
        return False
    ended = read_ended(directory.root)
    last = ended.iteration if ended else len((read_record(directory.plan) or {"iterations": []})["iterations"])
    precision = recipe.evaluation.precision
    for number in range(last + 1) if recipe.evaluation.task_when == "iterations" else (0, last):
        record = read_record(directory.iteration(number) / TASKS_FILE, _RECORD) or {"tasks": []}
        done = [(entry["wanted"], entry["role"], entry["precision"]) for entry in record["tasks"]]
        contents = [entry["content"] for entry in record["tasks"]]
        for spec, content in wanted:
            asked = (spec.wanted(), spec.role, precision)
            if asked not in done or content not in (None, contents[done.index(asked)]):
                return True
    return False


def _file_content(task: str) -> str | None:
    """Hash of a task file and its data; None for a name of the harness, and for a file that is gone."""
    return digest(read_task_file(Path(task)).content) if is_task_file(task) and Path(task).is_file() else None


def cached(found: FoundTask, key: str, score: Callable[[FoundTask], dict[str, Any]]) -> dict[str, Any]:
    """The scores with this key from the cache of all runs, or scored now and put there."""
    path = cache_folder() / f"{key}.json"
    entry = read_record(path, key)
    if entry is None:
        entry = {**score(found), "content": digest(found.content), "key": key}
        try:
            write_record(path, key, entry)
        except OSError:  # a cache that cannot be written saves nothing, and costs nothing: the run keeps its own
            return entry
    return {**entry, "key": key}


def score_model_tasks(
    model: str, base: BaseFiles, loaded: Any, tokenizer: Any, how: Loading, specs: Sequence[TaskSpec], *,
    chat: bool = False, batch_size: int = 8, say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Scores a single model that is loaded, with the same cache as runs have.

    Args:
        model: What the user called it; of a run the scores are those of its result.
        base: Where its files are.
        loaded: The model.
        tokenizer: Its tokenizer.
        how: How it is held.
        specs: The tasks.
        chat: Put the prompts through its chat template.
        batch_size: Prompts at once at the most.
        say: Told what is being scored.
    """
    found = find_tasks(specs)
    identity = _identity(model, base)
    template = template_digest(tokenizer) if chat else None

    def score(one: FoundTask) -> dict[str, Any]:
        if say:
            say(f"task {one.name}")
        return score_task(loaded, tokenizer, one, batch_size=batch_size, dtype=how.compute_dtype, chat=chat)

    return [{**cached(one, one.key(identity, how.facts(), template), score), "role": one.spec.role} for one in found]


def _identity(model: str, base: BaseFiles) -> str:
    """The hash that runs know a model by: of a run its result's, of any other folder that of a base."""
    if (Path(model) / LEDGER_FILE).is_file():
        return Ledger.load(Path(model)).key()
    return history_key({"files": file_hashes(base, cache_folder().parent / "models" / digest(str(base.folder)))}, [])


def task_line(scores: Mapping[str, Any]) -> str:
    """Scores of one task in one line, such as "belebele_bul_Cyrl acc 0.4122 ± 0.0164"."""
    parts = []
    for one in scores["results"][:4]:
        error = "" if one["stderr"] is None else f" ± {one['stderr']:.4f}"
        name = "" if one["task"] == scores["name"] else f"{one['task']} "
        parts.append(f"{name}{one['metric']} {one['value']:.4f}{error}")
    more = len(scores["results"]) - 4
    cut = f"; {scores['truncated']:,} prompts were cut to the context" if scores["truncated"] else ""
    return f"{scores['name']} " + ", ".join(parts) + (f" and {more} more" if more > 0 else "") + cut
