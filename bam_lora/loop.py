"""The only place that knows the order of things: prepare, branch, merge, fold, score, report; and how to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bam_lora.base import (
    BaseFiles,
    context_length,
    file_hashes,
    find_base,
    require_fitting_base,
    require_same_files,
    require_targets,
    weight_bytes,
)
from bam_lora.base_card import keep_base_card
from bam_lora.budget import Budget
from bam_lora.compute_types import emulation_note
from bam_lora.default_template import settle_template
from bam_lora.errors import UserError
from bam_lora.front import Front
from bam_lora.gpu_memory import freed_after_errors, use_one_gpu
from bam_lora.growing import found_base, grow, run_windows, score_start
from bam_lora.hub_pins import pinned
from bam_lora.interrupt import StopRequest, stop_on_signals
from bam_lora.ledger import LEDGER_FILE, Ledger
from bam_lora.limits import Ended, read_ended, still_ended, within
from bam_lora.machine import import_training_libraries, spared_collections
from bam_lora.memory_note import note_estimate
from bam_lora.merging import merge
from bam_lora.module_weights import require_patterns
from bam_lora.planning import describe, settle_plan
from bam_lora.progress import RunProgress
from bam_lora.quiet import quiet, quiet_libraries
from bam_lora.recipe import Recipe
from bam_lora.recipe_chat import has_chat
from bam_lora.rehearsal import require_mergeable
from bam_lora.report import collect, write_report
from bam_lora.report.chain import chain_of
from bam_lora.run_choices import settle_choices
from bam_lora.rundir import (
    RunDirectory,
    check_recipe_of,
    fix_threads,
    is_fresh,
    keep_recipe,
    locked,
    recipe_key,
    require_own,
)
from bam_lora.scoring_sets import check_selection, selection_windows
from bam_lora.screening import held_out_sets
from bam_lora.session import Session
from bam_lora.stage_clock import StageClock
from bam_lora.stages import (
    Context,
    base_folder,
    drop_bases,
    score_branch,
    score_model,
    train,
    write_model,
    write_result,
    write_samples,
)
from bam_lora.store import read_record, require_space, verify, write_record
from bam_lora.task_scores import require_tasks, score_tasks, tasks_left
from bam_lora.vocabulary import branch_lora


def run(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    extend: bool = False,
    progress: RunProgress | None = None,
    front: Front | None = None,
) -> dict[str, Any]:
    """Runs a recipe from start to end, goes on with what is there, or finds that all is done.

    Args:
        recipe: What to do.
        output: The run directory; None takes the recipe's.
        extend: Train a finished run further: on more slices, with data it has not seen.
        progress: Where progress is shown; None shows it on stderr.
        front: Where models, data and trainers come from if not from the recipe.

    Returns:
        The report, as in `report.json`.

    Raises:
        UserError: If anything the user can put right is wrong.
        Interrupted: After Ctrl-C or SIGTERM; the run directory can be resumed.
    """
    if front is None:
        require_own(recipe, output or recipe.output)
    quiet()
    use_one_gpu()
    root = Path(output or recipe.output).expanduser().resolve()
    with locked(root) as directory, stop_on_signals() as stop, progress or RunProgress() as display:
        finished, ended = is_finished(directory), read_ended(directory.root)
        check_recipe_of(directory, recipe, extend=extend, finished=finished and ended is None)
        held = None if ended is None else still_ended(directory.root, ended, recipe.limits)
        trained = finished and _is_planned(directory, recipe) and (ended is None or held is not None)
        if trained and held is not None:
            keep_recipe(directory, recipe)  # the limits that hold it now
        if trained and not tasks_left(directory, recipe):
            display.say(f"{root}: {_all_done(held)}; the model is in {directory.model}")
            return write_report(root)
        if is_fresh(directory):
            require_tasks(recipe)  # before anything that takes long
            for path in (directory.root / LEDGER_FILE, directory.chain):  # of a first start that came no further
                path.unlink(missing_ok=True)
            keep_recipe(directory, recipe)
        # Of the result before what now comes; tasks that were added to a finished run leave it as it is.
        for path in (directory.shrink, directory.baseline, directory.limits) if not trained else ():
            path.unlink(missing_ok=True)
        quiet_libraries()
        clock = StageClock()
        session = Session(directory.sessions, clock)
        with pinned(directory.hub):
            context = _prepare(directory, recipe, display, stop, front or Front(recipe), clock)
        with context.clock.stage("train"):
            import_training_libraries()
        with spared_collections(), freed_after_errors(context.slot.clear):
            _iterate(context, session)
            _finish(context)
        session.update()
        report = write_report(root)
        where = f"the model is in {directory.model}, the report in {root / 'report.html'}"
        ended = read_ended(directory.root)
        display.say(f"done: {where}" if ended is None else f"{_all_done(ended)}; {where}")
        return report


def is_finished(directory: RunDirectory) -> bool:
    """Whether the result is there, whole, and belongs to the ledger's last iteration."""
    if not (directory.root / LEDGER_FILE).exists() or not directory.plan.exists():
        return False
    plan = read_record(directory.plan)
    ledger = Ledger.load(directory.root)
    if plan is None or (len(plan["iterations"]) != len(ledger.iterations) and read_ended(directory.root) is None):
        return False
    records = [directory.environment, directory.sessions, directory.samples, directory.result]
    records += [directory.iteration(n) / "merge.json" for n in range(1, len(ledger.iterations) + 1)]
    records.append(directory.iteration(len(ledger.iterations)) / "fold.json")
    if not all(read_record(path) for path in records if path.exists()):
        return False  # a damaged one is made again
    report = read_record(directory.root / "report.json")
    if report is None or len(report["iterations"]) != len(ledger.iterations):
        return False
    return verify(directory.model, ledger.key()) is not None


def _is_planned(directory: RunDirectory, recipe: Recipe) -> bool:
    plan = read_record(directory.plan)
    return plan is not None and plan["recipe"] == recipe_key(recipe)


def _all_done(ended: Ended | None) -> str:
    """What to say of a run that is finished."""
    if ended is None:
        return "all is done"
    return f"finished within its limits; {ended}; {ended.enough} or more goes on from there"


def _prepare(
    directory: RunDirectory, recipe: Recipe, progress: RunProgress, stop: StopRequest, front: Front, clock: StageClock
) -> Context:
    """Everything before the first branch: base, ledger, data, plan, evaluation sets."""
    if emulated := emulation_note(front.training_load.compute_dtype, recipe.base):  # before a base is fetched
        progress.say(emulated)
    progress.stage("looking at the base")
    threads, front.say = fix_threads(directory), progress.say
    ledger, original, start = _open_base(directory, recipe, progress)
    for changed in settle_choices(directory, front, start):
        progress.say(changed)
    weights = weight_bytes(original.folder)
    require_space(directory.root, weights + weights // 4, "the folded model and the adapters")
    tokenizer = front.tokenizer(start)
    own = recipe.script is None  # else the template is the script's to choose
    note = settle_template(tokenizer, recipe.data.chat_template) if own and has_chat(recipe) else None
    if note:
        progress.say(note)
    # Without packing `max_length` only cuts what is longer, and may well be more than the context.
    packed = recipe.script is None or bool(recipe.script["args"].get("packing"))
    require_fitting_base(recipe.base, start, tokenizer, recipe.data.sequence_length if packed else None)
    if own:  # else they are PEFT's to find
        require_targets(start, recipe.lora.target_modules)
    require_patterns(start, recipe.lora.target_modules, recipe.bam.merge.weights_by_module)
    front.lora = branch_lora(recipe, directory.root, original.folder)
    method, bits = recipe.bam.merge.method, recipe.quantization.bits
    require_mergeable(start, original.folder, ledger.view(0), front.adapter_config(), method, bits)
    limit = context_length(start)
    found = found_base(directory, recipe, ledger, front)
    with clock.stage("evaluate"):
        evaluation = run_windows(found, recipe, tokenizer, directory.evaluation, limit, front.read_set)
        selection = selection_windows(recipe, tokenizer, directory.selection, limit, front.read_set)
        check_selection(selection, evaluation, recipe.bam.merge)
        held_out = held_out_sets(evaluation, selection)
    with clock.stage("data"):
        plan = settle_plan(directory, recipe, tokenizer, ledger.key(0), progress, threads, front, held_out)
    note_estimate(directory, recipe, start, tokenizer, plan.tokens)
    keep_recipe(directory, recipe)
    progress.plan(within(plan, recipe.limits).tokens)
    progress.say(describe(plan, recipe.limits))
    return Context(
        directory, recipe, plan, ledger, original, start, tokenizer, evaluation, selection, progress, stop, front,
        clock, found,
    )  # fmt: skip


def _open_base(directory: RunDirectory, recipe: Recipe, progress: RunProgress) -> tuple[Ledger, BaseFiles, Path]:
    """The ledger, the original base it starts from, and the model that the first iteration starts from."""
    parent = RunDirectory(Path(recipe.base))
    chained = (parent.root / LEDGER_FILE).is_file()
    if chained and not is_finished(parent):
        raise UserError.of(
            f"base {recipe.base}", expected="a finished run", found="one that is not", remedy="Finish it first"
        )
    started = (directory.root / LEDGER_FILE).exists()
    ledger = Ledger.load(directory.root) if started else Ledger.start(directory.root, {})
    if chained:
        if not started:
            ledger.adopt(parent.root)
        original = find_base(ledger.base["name"], ledger.base["revision"], progress.download)
    else:
        original = find_base(recipe.base, ledger.base.get("revision") or recipe.revision, progress.download)
    ledger.verify(upto=0)  # what a finished run handed over; this run's own adapters are checked branch by branch
    files = file_hashes(original, directory.root)
    if ledger.base:
        require_same_files(original, files, ledger.base["files"])
    keep_base_card(directory.root, original.folder)
    if not started:
        ledger.base |= {"name": original.name, "revision": original.revision, "files": files}
        ledger.save()
    if chained and verify(parent.model, ledger.key(0)) is None:
        raise UserError.of(
            f"base {recipe.base}",
            expected="the finished run this one started from",
            found="a model that has changed since (it was extended or edited)",
            remedy="Restore it, or start a new run from it",
        )
    if chained and read_record(directory.chain, ledger.key(0)) is None:
        write_record(directory.chain, ledger.key(0), {"format": 1, "runs": chain_of(parent.root)})
    grown = grow(directory, recipe, ledger, original, progress)
    return ledger, grown, parent.model if chained else grown.folder


def _iterate(context: Context, session: Session) -> None:
    """The loop itself: branch, merge, fold, score, until the slices are used up or the recipe's limits reached."""
    score_start(context)
    write_samples(context, 0)
    score_tasks(context, 0)
    tokens = 0
    plan = context.plan
    budget = Budget(context.recipe.limits, context.directory, plan, session)
    for iteration in plan.iterations:
        if budget.ends_before(iteration):
            context.plan = plan.first(iteration.iteration - 1)
            base_folder(context, iteration.iteration - 1)
            score_tasks(context, iteration.iteration - 1)  # which is the run's result now
            return
        number = iteration.iteration
        for branch in iteration.branches:
            context.stop.check()
            train(context, branch, tokens, budget.step)
            tokens += branch.tokens
            session.update()
            context.stop.check()
            if context.training_load == context.scoring_load:
                score_branch(context, branch)
        for branch in iteration.branches:  # at another precision all of them after one loading
            score_branch(context, branch)
            context.stop.check()
        with context.clock.stage("merge"):
            merge(context, iteration)
        context.stop.check()
        if number == len(context.plan.iterations) or context.recipe.keep.bases == "all":
            base_folder(context, number)  # any other is folded when it is first needed
        score_model(context, number)
        score_tasks(context, number)
        drop_bases(context, number)
        context.front.iteration_end(number, tokens, read_record(context.directory.iteration(number) / "eval.json"))
        session.update()


def _finish(context: Context) -> None:
    """Samples, the size of the change, the model with its card."""
    write_samples(context, len(context.plan.iterations))
    context.slot.clear()
    write_result(context)
    context.stop.check()
    write_model(context, collect(context.directory.root))
