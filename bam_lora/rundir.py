"""The run directory: where everything is, who may write to it, and what recipe it belongs to (docs/format.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.attention import AUTO
from bam_lora.base import device
from bam_lora.errors import UserError
from bam_lora.limits import read_ended
from bam_lora.machine import environment
from bam_lora.recipe import Recipe, changed_keys, dump_recipe, load_recipe
from bam_lora.recipe_paths import SOURCES
from bam_lora.store import digest, read_record, sweep, write_record, write_text

# What an extension of a finished run may change; the rest would make earlier iterations another run's.
_EXTENSIBLE = ("data.target", "data.replay", "bam.slices", "training.")
_HARMLESS = ("output", "keep.", "limits.", "evaluation.task")  # the last: tasks can be added to a run at any time
_UNBINDING = ("output", "keep", "limits")  # sections that do not make a run another one
_MARKS = ("plan.json", "ledger.json", "environment.json")  # a recipe.yaml alone may be a project of the user's


@dataclass(frozen=True)
class RunDirectory:
    """Paths in a run directory."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """The plan."""
        return self.root / "plan.json"

    @property
    def hub(self) -> Path:
        """At which commits the run reads the Hub."""
        return self.root / "hub.json"

    @property
    def environment(self) -> Path:
        """Versions, device and threads of the first session."""
        return self.root / "environment.json"

    @property
    def sessions(self) -> Path:
        """Start, end and peak memory of every session."""
        return self.root / "sessions.json"

    @property
    def result(self) -> Path:
        """Size of the whole change."""
        return self.root / "result.json"

    @property
    def samples(self) -> Path:
        """Texts written by base and result."""
        return self.root / "samples.json"

    @property
    def limits(self) -> Path:
        """That the recipe's limits ended the run, if they did."""
        return self.root / "limits.json"

    @property
    def model(self) -> Path:
        """The result: a Hugging Face model folder."""
        return self.root / "model"

    @property
    def evaluation(self) -> Path:
        """The texts of the evaluation sets and their windows."""
        return self.root / "data" / "evaluation.json"

    @property
    def selection(self) -> Path:
        """The same of the selection sets."""
        return self.root / "data" / "selection.json"

    @property
    def chain(self) -> Path:
        """What this run keeps of the reports of the runs that it continues."""
        return self.root / "chain.json"

    @property
    def shrink(self) -> Path:
        """Scores of the result with its whole delta scaled."""
        return self.root / "shrink.json"

    @property
    def baseline(self) -> Path:
        """What a probe on a share of the tokens said."""
        return self.root / "baseline.json"

    def data(self, part: str) -> Path:
        """Packed rows of one part of the run: "01", and "02" on for extensions."""
        return self.root / "data" / part

    def iteration(self, number: int) -> Path:
        """Everything of one iteration; 0 is the base as it came."""
        return self.root / "iterations" / f"{number:02}"

    def branch(self, iteration: int, branch: int) -> Path:
        """One branch of one iteration."""
        return self.iteration(iteration) / f"branch-{branch}"

    def folded(self, iteration: int) -> Path:
        """The folded model after an iteration, while it is needed."""
        return self.iteration(iteration) / "base"


@contextmanager
def locked(root: Path) -> Iterator[RunDirectory]:
    """Holds the run directory for this process; what a killed one left half-written is swept away.

    Raises:
        UserError: If another process holds it, it cannot be written, or it is some other folder.
    """
    from filelock import FileLock, Timeout

    if root.exists() and not root.is_dir():
        raise UserError.of(str(root), expected="a folder", found="a file", remedy="Choose another --output")
    if root.is_dir() and not any((root / name).exists() for name in _MARKS) and not _ours_alone(root):
        raise UserError.of(
            str(root),
            expected="a new or empty folder, or a run of bam-lora",
            found="other files",
            remedy="Choose another --output",
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(root / ".lock"), timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError.of(
            str(root),
            expected="a run that no other process works on",
            found="one that is running",
            remedy="Wait for it or stop it",
        ) from None
    except OSError as error:
        raise UserError.of(
            str(root),
            expected="a folder that can be written",
            found=str(error.strerror),
            remedy="Choose another --output",
        ) from error
    try:
        sweep(root)
        yield RunDirectory(root)
    finally:
        lock.release()


def _ours_alone(root: Path) -> bool:
    """Whether a folder without a recipe holds nothing but what a first start of ours may have left."""
    names = {entry.name for entry in root.iterdir() if not entry.name.startswith(".tmp-")}
    return names <= {".lock", "recipe.yaml"} and (".lock" in names or not names)


def check_recipe_of(directory: RunDirectory, recipe: Recipe, *, extend: bool, finished: bool) -> None:
    """Checks that a recipe is that of the run in the directory, or may extend it. Writes nothing.

    Raises:
        UserError: If it differs (naming the keys), except for what `extend` may change on a finished run.
    """
    if not directory.recipe.exists():
        if extend:
            raise UserError.of(
                str(directory.root), expected="a finished run to extend", found="none", remedy="Leave out --extend"
            )
        return
    plan = read_record(directory.plan)
    if plan is not None and plan["recipe"] == recipe_key(recipe):
        return
    if is_fresh(directory):
        return  # a first start that failed may be put right
    before = load_recipe(directory.recipe).resolved()
    changed = [key for key in changed_keys(before, recipe.resolved()) if not key.startswith(_HARMLESS)]
    if not changed and (extend or plan is None):
        return
    if not changed:
        raise UserError.of(
            str(directory.root),
            expected="a run of a version with the same recipe keys",
            found="one that an earlier version of bam_lora planned",
            remedy="Finish it with that version (environment.json names it), or choose a new --output",
        )
    if not extend:
        raise UserError.of(
            str(directory.root),
            expected="the recipe this run was started with",
            found=f"other values for {', '.join(changed)}",
            remedy="Use the old recipe or a new --output; --extend adds data or slices to a finished run",
        )
    foreign = [key for key in changed if not key.startswith(_EXTENSIBLE)]
    if foreign:
        raise UserError.of(
            f"--extend of {directory.root}",
            expected=f"changes of {', '.join(key.rstrip('.') for key in _EXTENSIBLE)} only",
            found=f"other values for {', '.join(foreign)}",
            remedy="Set them back, or start a new run with this one as its `base`",
        )
    if not finished:
        ended = read_ended(directory.root)
        how = "the same command without --extend, with the old recipe"
        raise UserError.of(
            f"--extend of {directory.root}",
            expected="a finished run" if ended is None else "a run that has trained all of its slices",
            found="one that is not" if ended is None else f"{ended.iteration} of {ended.planned} iterations, its limit",
            remedy=f"Finish it first: {how}" + ("" if ended is None else " and limits that are higher, or none"),
        )


def require_own(recipe: Recipe, output: str | Path) -> None:
    """Refuses the recipe of a `BamTrainer`'s run where its script would be needed.

    Raises:
        UserError: If it is one.
    """
    if recipe.script is not None:
        raise UserError.of(
            str(output),
            expected="a recipe of the user's own",
            found="one that BamTrainer wrote",
            remedy="Run the script again that made it; its train() goes on with the run",
        )


def fix_threads(directory: RunDirectory) -> int:
    """Uses as many threads as the first session did: on a CPU their number changes the last bits of a result."""
    import torch

    record = read_record(directory.environment)
    if record is not None:
        torch.set_num_threads(record["threads"])
    else:
        write_record(directory.environment, "environment", environment(device(), torch.get_num_threads()))
    return int(torch.get_num_threads())


def is_fresh(directory: RunDirectory) -> bool:
    """Whether nothing is planned or trained yet."""
    return not directory.plan.exists() and not directory.iteration(1).exists()


def keep_recipe(directory: RunDirectory, recipe: Recipe) -> None:
    """Writes the recipe the run goes on with. After the plan of an extension, so that a refused one leaves no trace."""
    text = dump_recipe(recipe)
    if not directory.recipe.exists() or directory.recipe.read_text(encoding="utf-8") != text:
        write_text(directory.recipe, text)


def recipe_key(recipe: Recipe) -> str:
    """Hash of what the plan is made from."""
    values = recipe.resolved()
    merge = values["bam"]["merge"]
    merge["weights_by_module"] = list(merge["weights_by_module"].items())  # their order counts, as a mapping's does not
    if values["vocabulary"]["tokens"] is None:
        del values["vocabulary"]
    for name in ("tasks", "task_when"):
        del values["evaluation"][name]
    for section, role in SOURCES:
        for source in values[section][role]:
            if source["where"] is None:  # as before there was any: it makes no other run
                del source["where"]
    if values["training"]["kernels"] == AUTO or recipe.script is not None:  # a script says it in its arguments
        del values["training"]["kernels"]
    _leave_out_room(values["training"], values["evaluation"], (values.get("script") or {}).get("args", {}))
    return digest({name: value for name, value in values.items() if name not in _UNBINDING})


def _leave_out_room(training: dict[str, Any], evaluation: dict[str, Any], script: dict[str, Any]) -> None:
    """What only decides how much memory a run takes: a run that did not fit can go on with less of it.

    A step sees the same rows however it is cut into batches, and recomputing changes no number.
    """
    training["gradient_accumulation_steps"] *= training["per_device_train_batch_size"]
    for name in ("per_device_train_batch_size", "checkpointing"):
        del training[name]
    del evaluation["batch_size"]
    said = ("per_device_train_batch_size", "gradient_accumulation_steps", "_checkpointing")  # the same, in a script
    for name in [name for name in script if name.endswith(said)]:
        del script[name]
