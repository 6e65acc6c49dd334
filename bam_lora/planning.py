"""From a recipe and its texts to the plan on disk: what is prepared, what an extension adds, what is made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bam_lora.chat import template_digest
from bam_lora.contamination import HeldOutSet
from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.errors import UserError
from bam_lora.front import Front
from bam_lora.language_samples import compare_languages
from bam_lora.limits import describe_limits, require_first
from bam_lora.merge_weights import resolve_weights
from bam_lora.module_weights import resolve_by_module
from bam_lora.plan import Plan, SlicePlan, derive_seed, describe_merge, make_plan
from bam_lora.progress import RunProgress
from bam_lora.recipe import Recipe, Source
from bam_lora.recipe_chat import has_chat
from bam_lora.recipe_limits import Limits
from bam_lora.rundir import RunDirectory, recipe_key
from bam_lora.screening import filter_rules, findings, screening_of
from bam_lora.slice_groups import GROUPED, dataset_names
from bam_lora.slicing import require_even_groups
from bam_lora.sources import Shuffle, TextSource, text_source
from bam_lora.store import digest, read_record, write_record
from bam_lora.token_files import tokenizer_digest


def settle_plan(
    directory: RunDirectory, recipe: Recipe, tokenizer: Any, base_key: str, progress: RunProgress, threads: int,
    front: Front, held_out: Sequence[HeldOutSet] = (),
) -> Plan:  # fmt: skip
    """The plan on disk if it is this recipe's, else a new one; after `--extend`, with new iterations at its end.

    `held_out` is the text that the training text is searched for.
    """
    record = read_record(directory.plan)
    if record is not None and record["recipe"] == recipe_key(recipe):
        plan = Plan.from_json(record)
        *before, part = record["parts"]  # an extension starts from a finished run, so only the last is still needed
        _prepare_part(directory, recipe, tokenizer, before, len(part["slices"]), progress, part, front, held_out)
        return plan
    if record is None and directory.data("02").exists():  # of one part it can be made again, the same
        raise UserError.of(
            str(directory.plan),
            expected="the plan of this run, which was extended",
            found="a damaged file" if directory.plan.exists() else "none",
            remedy="Restore it from a backup, or start a new run",
        )
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
    part = _prepare_part(directory, recipe, tokenizer, parts, count, progress, None, front, held_out)
    slices = [
        SlicePlan(
            part["part"], (one["rows"][0], one["rows"][1]), one["target_tokens"], one["replay_tokens"], one.get("group")
        )
        for one in part["slices"]
    ]
    plan = make_plan(recipe, slices, base_key=base_key, earlier=earlier, count=front.epoch_steps)
    _require_sense(plan, front)
    require_first(recipe.limits, plan)  # before the plan is there: until then the recipe may be changed
    parts = [*parts, part]
    write_record(directory.root / "data" / "facts.json", part["part"], {"seconds": sum(p["seconds"] for p in parts)})
    body = {**plan.to_json(), "recipe": recipe_key(recipe), "threads": threads, "parts": parts}
    body["tokenizer"] = compare_languages(recipe if front.prepare_part is None else None, tokenizer, held_out)
    write_record(directory.plan, "plan", {**body, "data": _totals(plan, parts)})
    return plan


def _require_sense(plan: Plan, front: Front) -> None:
    """Raises a UserError for what would only fail after hours of training, while the recipe can still be changed."""
    for iteration in plan.iterations:
        merge = iteration.merge
        resolve_weights(merge["weights"], len(iteration.branches), iteration.tokens, merge["scale"])
        resolve_by_module(merge["weights_by_module"], len(iteration.branches), iteration.tokens, merge["scale"])
    for branch in plan.all_branches():
        front.warmup_steps(branch)


def _prepare_part(
    directory: RunDirectory, recipe: Recipe, tokenizer: Any, earlier: Sequence[dict[str, Any]], slices: int,
    progress: RunProgress, expected: dict[str, Any] | None, front: Front, held_out: Sequence[HeldOutSet],
) -> dict[str, Any]:  # fmt: skip
    """Packs the data of one part of the run, or finds it packed; returns what `plan.json` keeps of it.

    Data that is lost is made again; `expected` is what the plan says of it.
    """
    name = f"{len(earlier) + 1:02}"
    seed = derive_seed(recipe.seed, "data", name)
    layout = Layout(slices, recipe.data.sequence_length, slicing_of(recipe), recipe.data.replay_share, seed)
    template = [template_digest(tokenizer)] if has_chat(recipe) else []
    key = digest(["data", recipe_key(recipe), tokenizer_digest(tokenizer), name, *template])
    if front.prepare_part is not None:
        facts = front.prepare_part(directory.data(name), key, held_out)
        for line in findings(facts) if expected is None else ():
            progress.say(line)
        return {"part": name, **facts}
    sources = _training_sources(recipe, earlier)
    if not earlier:  # before hours of tokenising; an extension knows its groups only once it has read on
        require_groups(recipe)
    facts = prepare(
        sources, layout, tokenizer, directory.data(name), key=key, say=progress.say, expected=expected,
        screening=lambda: screening_of(recipe, held_out, [directory.data(part["part"]) for part in earlier]),
    )  # fmt: skip
    for line in findings(facts) if expected is None else ():
        progress.say(line)
    return {"part": name, **facts}


def _totals(plan: Plan, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    branches = plan.all_branches()
    slices = [one for part in parts for one in part["slices"]]
    known = all("trained_tokens" in one for one in slices)
    trained = {"trained_tokens": sum(one["trained_tokens"] for one in slices)} if known else {}
    return {
        "target_tokens": sum(branch.target_tokens for branch in branches),
        "replay_tokens": sum(branch.replay_tokens for branch in branches),
        "train_tokens": plan.tokens,
        **trained,
        "sources": [source for part in parts for source in part["sources"]],
        "contamination": [found for part in parts for found in part.get("contamination", [])],
    }


def _training_sources(recipe: Recipe, parts: Sequence[dict[str, Any]]) -> list[TrainingSource]:
    """The recipe's sources; of those that earlier parts of the run have read, what is left."""
    sources = []
    column = recipe.data.slicing_column if slicing_of(recipe) == "by_column" else None
    targets = zip(recipe.data.target, _groups(recipe), strict=True)
    listed = [*(("target", one, group, column) for one, group in targets)]
    listed += [("replay", one, None, None) for one in recipe.data.replay]
    for role, source, group, by in listed:
        where = text_source(source)
        seen = [s for part in parts for s in part["sources"] if role == "target" == s["role"] and _is(s, where)]
        used = sum(s["used_tokens"] for s in seen)
        limit = None if source.tokens is None else source.tokens - used
        if limit is None or limit > 0:
            skip = max((s["next_row"] for s in seen), default=0)
            commit = seen[-1].get("commit") if seen else None
            shuffle = _shuffle(recipe, source, seen)
            rules = filter_rules(recipe, source)
            sources.append(TrainingSource(where, role, limit, source.weight, skip, group, by, shuffle, commit, rules))
    return sources


def _shuffle(recipe: Recipe, source: Source, seen: Sequence[dict[str, Any]]) -> Shuffle | None:
    """How a source is shuffled; one that was read before goes on in the order it was read in."""
    for before in seen:
        if before.get("shuffle_buffer") != source.shuffle_buffer:
            raise UserError.of(
                f"shuffle_buffer of {source.path}",
                expected=f"{before.get('shuffle_buffer')}, as the run has read it before",
                found=str(source.shuffle_buffer),
                remedy="Set it back: in another order text would come twice",
            )
    if source.shuffle_buffer is None:
        return None
    return Shuffle(source.shuffle_buffer, derive_seed(recipe.seed, "shuffle", source.path))


def slicing_of(recipe: Recipe) -> str:
    """`data.slicing` as the strategy makes it: one slice of everything has no groups."""
    return "random" if recipe.strategy == "single" and recipe.data.slicing in GROUPED else recipe.data.slicing


def require_groups(recipe: Recipe) -> None:
    """Raises a UserError if a new run's slices cannot be shared out to its data sets."""
    if slicing_of(recipe) == "by_dataset":
        require_even_groups([name for name in _groups(recipe) if name is not None], recipe.slices)


def _groups(recipe: Recipe) -> list[str | None]:
    """The group of each target source, where its data set is its group."""
    targets = recipe.data.target
    if slicing_of(recipe) != "by_dataset":
        return [None] * len(targets)
    return [*dataset_names([text_source(source) for source in targets])]


def is_source(facts: dict[str, Any], source: Source) -> bool:
    """Whether facts of the plan's data are those of this source of the recipe."""
    return _is(facts, text_source(source))


def _is(facts: dict[str, Any], where: TextSource) -> bool:
    before = {"mode": "text", **facts}  # plans from before there were conversations do not say it
    said = where.described()
    return before.get("where") == said.get("where") and all(before[name] == value for name, value in said.items())


def describe(plan: Plan, limits: Limits) -> str:
    """The plan in one line."""
    steps = [branch.steps for branch in plan.all_branches()]
    limited = describe_limits(limits, plan)
    return (
        f"plan: {plan.strategy}, {plan.tokens:,} tokens in {plan.slices} slices, "
        f"{len(plan.iterations)} iteration{'s' if len(plan.iterations) != 1 else ''} of {plan.branches} "
        f"branch{'es' if plan.branches != 1 else ''}, {sum(steps):,} steps in all; "
        f"merged by {describe_merge(plan.iterations[-1].merge)}" + (f"; {limited}" if limited else "")
    )
