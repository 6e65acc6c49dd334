"""The only place that knows the order of things: prepare, branch, merge, fold, score, report; and how to go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bam_lora.base import (
    BaseFiles,
    context_length,
    device,
    file_hashes,
    find_base,
    load_tokenizer,
    require_fitting_base,
)
from bam_lora.data import Layout, TrainingSource, prepare, tokenizer_digest
from bam_lora.errors import UserError
from bam_lora.interrupt import StopRequest, stop_on_signals
from bam_lora.ledger import LEDGER_FILE, Ledger
from bam_lora.machine import environment, use_one_gpu
from bam_lora.plan import Plan, SlicePlan, derive_seed, make_plan
from bam_lora.progress import RunProgress
from bam_lora.quiet import quiet, quiet_libraries
from bam_lora.recipe import EvaluationSource, Recipe, Source
from bam_lora.report import collect, model_card, write_report
from bam_lora.rundir import RunDirectory, Session, check_recipe_of, keep_recipe, locked, recipe_key
from bam_lora.scoring import SetSource, Windowed, prepare_evaluation
from bam_lora.sources import TextSource
from bam_lora.stages import (
    Context,
    base_folder,
    drop_bases,
    merge,
    score_model,
    train,
    write_model,
    write_result,
    write_samples,
)
from bam_lora.store import digest, read_record, require_space, verify, write_record


def run(
    recipe: Recipe, output: str | Path | None = None, *, extend: bool = False, progress: RunProgress | None = None
) -> dict[str, Any]:
    """Runs a recipe from start to end, goes on with what is there, or finds that all is done.

    Args:
        recipe: What to do.
        output: The run directory; None takes the recipe's.
        extend: Train a finished run further: on more slices, with data it has not seen.
        progress: Where progress is shown; None shows it on stderr.

    Returns:
        The report, as in `report.json`.

    Raises:
        UserError: If anything the user can put right is wrong.
        Interrupted: After Ctrl-C or SIGTERM; the run directory can be resumed.
    """
    quiet()
    use_one_gpu()
    root = Path(output or recipe.output).expanduser().resolve()
    with locked(root) as directory, stop_on_signals() as stop, progress or RunProgress() as display:
        finished = is_finished(directory)
        check_recipe_of(directory, recipe, extend=extend, finished=finished)
        if finished and not extend:
            display.say(f"{root}: all is done; the model is in {directory.model}")
            return write_report(root)
        if not directory.recipe.exists():
            keep_recipe(directory, recipe)
        quiet_libraries()
        session = Session(directory.sessions)
        context = _prepare(directory, recipe, display, stop)
        _iterate(context, session)
        _finish(context)
        session.update()
        report = write_report(root)
        display.say(f"done: the model is in {directory.model}, the report in {root / 'report.html'}")
        return report


def is_finished(directory: RunDirectory) -> bool:
    """Whether the result is there, whole, and belongs to the ledger's last iteration."""
    if not (directory.root / LEDGER_FILE).exists() or not directory.plan.exists():
        return False
    plan = read_record(directory.plan)
    ledger = Ledger.load(directory.root)
    if plan is None or len(plan["iterations"]) != len(ledger.iterations):
        return False
    return verify(directory.model, ledger.key()) is not None and (directory.root / "report.json").exists()


def _prepare(directory: RunDirectory, recipe: Recipe, progress: RunProgress, stop: StopRequest) -> Context:
    """Everything before the first branch: base, ledger, data, plan, evaluation sets."""
    progress.stage("looking at the base")
    threads = _fix_threads(directory)
    ledger, original, start = _open_base(directory, recipe)
    weights = sum(file.stat().st_size for file in original.folder.glob("*.safetensors"))
    require_space(directory.root, weights + weights // 4, "the folded model and the adapters")
    tokenizer = load_tokenizer(start)
    require_fitting_base(recipe.base, start, tokenizer, recipe.data.sequence_length)
    plan = _make_plan(directory, recipe, tokenizer, ledger.key(0), progress, threads)
    keep_recipe(directory, recipe)
    progress.plan(plan.tokens)
    progress.say(describe(plan))
    evaluation = _evaluation(directory, recipe, tokenizer, context_length(start))
    return Context(directory, recipe, plan, ledger, original, start, tokenizer, evaluation, progress, stop)


def _fix_threads(directory: RunDirectory) -> int:
    """Uses as many threads as the first session did: on a CPU their number changes the last bits of a result."""
    import torch

    record = read_record(directory.environment)
    if record is not None:
        torch.set_num_threads(record["threads"])
    else:
        write_record(directory.environment, "environment", environment(device(), torch.get_num_threads()))
    return int(torch.get_num_threads())


def _open_base(directory: RunDirectory, recipe: Recipe) -> tuple[Ledger, BaseFiles, Path]:
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
        original = find_base(ledger.base["name"], ledger.base["revision"])
    else:
        original = find_base(recipe.base, ledger.base.get("revision") or recipe.revision)
    ledger.verify(upto=0)  # what a finished run handed over; this run's own adapters are checked branch by branch
    files = file_hashes(original, directory.root)
    if ledger.base and ledger.base["files"] != files:
        changed = sorted(n for n in {*files, *ledger.base["files"]} if files.get(n) != ledger.base["files"].get(n))
        raise UserError.of(
            f"base {original.name}",
            expected="the files this run started from",
            found=f"others: {', '.join(changed)}",
            remedy="Restore them; every fold starts from the original weights",
        )
    if not started:
        ledger.base = {"name": original.name, "revision": original.revision, "files": files}
        ledger.save()
    return ledger, original, parent.model if chained else original.folder


def _make_plan(
    directory: RunDirectory, recipe: Recipe, tokenizer: Any, base_key: str, progress: RunProgress, threads: int
) -> Plan:
    """The plan on disk if it is this recipe's, else a new one; after `--extend`, with new iterations at its end."""
    record = read_record(directory.plan)
    if record is not None and record["recipe"] == recipe_key(recipe):
        plan = Plan.from_json(record)
        if not all(verify(directory.branch(b.iteration, b.branch), b.key, quick=True) for b in plan.all_branches()):
            _restore_data(directory, recipe, tokenizer, record["parts"], progress)
        return plan
    parts = record["parts"] if record else []
    earlier = Plan.from_json(record) if record else None
    count = recipe.slices if earlier is None or recipe.strategy == "single" else recipe.slices - earlier.slices
    if count < 1:
        assert earlier is not None
        raise UserError.of(
            f"--extend of {directory.root}",
            expected=f"bam.slices above {earlier.slices}, those already trained",
            found=str(recipe.slices),
            remedy="Raise it by the number of new slices",
        )
    part = _prepare_part(directory, recipe, tokenizer, parts, count, progress)
    slices = [
        SlicePlan(part["part"], (one["rows"][0], one["rows"][1]), one["target_tokens"], one["replay_tokens"])
        for one in part["slices"]
    ]
    plan = make_plan(recipe, slices, base_key=base_key, earlier=earlier)
    parts = [*parts, part]
    write_record(directory.root / "data" / "facts.json", part["part"], {"seconds": sum(p["seconds"] for p in parts)})
    body = {**plan.to_json(), "recipe": recipe_key(recipe), "threads": threads, "parts": parts}
    write_record(directory.plan, "plan", {**body, "data": _totals(plan, parts)})
    return plan


def _prepare_part(
    directory: RunDirectory, recipe: Recipe, tokenizer: Any, earlier: Sequence[dict[str, Any]], slices: int,
    progress: RunProgress,
) -> dict[str, Any]:  # fmt: skip
    """Packs the data of one part of the run, or finds it packed; returns what `plan.json` keeps of it."""
    name = f"{len(earlier) + 1:02}"
    seed = derive_seed(recipe.seed, "data", name)
    layout = Layout(slices, recipe.data.sequence_length, recipe.data.slicing, recipe.data.replay_share, seed)
    key = digest(["data", recipe_key(recipe), tokenizer_digest(tokenizer), name])
    sources = _training_sources(recipe, earlier)
    facts = prepare(sources, layout, tokenizer, directory.data(name), key=key, say=progress.say)
    return {"part": name, **facts}


def _restore_data(
    directory: RunDirectory, recipe: Recipe, tokenizer: Any, parts: Sequence[dict[str, Any]], progress: RunProgress
) -> None:
    """Makes packed data that is lost or damaged again; earlier parts of an extended run are trained already."""
    *earlier, part = parts
    again = _prepare_part(directory, recipe, tokenizer, earlier, len(part["slices"]), progress)
    if again["slices"] != part["slices"]:
        raise UserError.of(
            str(directory.data(part["part"])),
            expected="the data this run was planned with",
            found="other text in its sources",
            remedy="Restore the sources, or start a new run",
        )


def _totals(plan: Plan, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    branches = plan.all_branches()
    return {
        "target_tokens": sum(branch.target_tokens for branch in branches),
        "replay_tokens": sum(branch.replay_tokens for branch in branches),
        "train_tokens": plan.tokens,
        "sources": [source for part in parts for source in part["sources"]],
    }


def _training_sources(recipe: Recipe, parts: Sequence[dict[str, Any]]) -> list[TrainingSource]:
    """The recipe's sources; of those that earlier parts of the run have read, what is left."""
    sources = []
    for role, listed in (("target", recipe.data.target), ("replay", recipe.data.replay)):
        for source in listed:
            where = _where(source)
            seen = [s for part in parts for s in part["sources"] if role == "target" == s["role"] and _is(s, where)]
            used = sum(s["used_tokens"] for s in seen)
            limit = None if source.tokens is None else source.tokens - used
            if limit is None or limit > 0:
                skip = max((s["next_row"] for s in seen), default=0)
                sources.append(TrainingSource(where, role, limit, source.weight, skip))
    return sources


def _where(source: Source | EvaluationSource) -> TextSource:
    return TextSource(source.path, source.name, source.split, source.revision, source.text)


def _is(facts: dict[str, Any], where: TextSource) -> bool:
    return all(facts[name] == value for name, value in vars(where).items())


def _evaluation(directory: RunDirectory, recipe: Recipe, tokenizer: Any, context_tokens: int | None) -> Windowed | None:
    wanted = recipe.evaluation
    sources = [
        SetSource(source.set, role, _where(source), source.documents)
        for role, listed in (("target", wanted.target), ("source", wanted.source))
        for source in listed
    ]
    if not sources:
        return None
    return prepare_evaluation(
        sources,
        tokenizer,
        directory.evaluation,
        window_bytes=wanted.window_bytes,
        overlap_bytes=wanted.overlap_bytes,
        context_tokens=context_tokens,
    )


def describe(plan: Plan) -> str:
    """The plan in one line."""
    steps = [branch.steps for branch in plan.all_branches()]
    return (
        f"plan: {plan.strategy}, {plan.tokens:,} tokens in {plan.slices} slices, "
        f"{len(plan.iterations)} iterations of {plan.branches} branches, {sum(steps):,} steps in all"
    )


def _iterate(context: Context, session: Session) -> None:
    """The loop itself: branch, merge, fold, score, until the slices are used up."""
    score_model(context, 0)
    write_samples(context, 0)
    tokens = 0
    for iteration in context.plan.iterations:
        number = iteration.iteration
        for branch in iteration.branches:
            context.stop.check()
            train(context, branch, tokens)
            tokens += branch.tokens
            session.update()
            context.stop.check()
            score_model(context, number, branch.branch)
        merge(context, iteration)
        context.stop.check()
        if number == len(context.plan.iterations) or context.recipe.keep.bases == "all":
            base_folder(context, number)  # any other is folded when it is first needed
        score_model(context, number)
        drop_bases(context, number)
        session.update()


def _finish(context: Context) -> None:
    """Samples, the size of the change, the model with its card."""
    last = len(context.plan.iterations)
    write_samples(context, last)
    context.slot.clear()
    write_result(context)
    context.stop.check()
    report = collect(context.directory.root)
    write_model(context, model_card(report, context.recipe.resolved()))
