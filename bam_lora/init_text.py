"""The text of a new recipe: in the order of docs/recipe.md, with comments to learn from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from bam_lora.commented_yaml import Entry, comment_lines, write_tree
from bam_lora.init_budget import too_few
from bam_lora.init_recipe import Draft, steps_per_branch
from bam_lora.languages import DATASET, readable_count
from bam_lora.plan import iteration_count
from bam_lora.recipe import Recipe
from bam_lora.recipe_catalogue import head_lines, read_catalogue

if TYPE_CHECKING:
    from bam_lora.init_fragments import Base

_LONG = 48  # hours, from which a run that nobody has limited is worth a word

_SECTIONS = {
    "output": "The folder of the run: data, adapters, merged models, report and, in model/, the result.",
    "strategy": "bam: Branch-and-Merge; or what it is held against: single (one adapter), sequential (one branch at a "
    "time).",
    "mode": "text: plain documents; chat: conversations, of which the assistant's answers are learned.",
    "data": "What it learns (target), and text like the base's own that keeps it from forgetting (replay). Text of "
    "your own: {path: texts/*.jsonl, text: COLUMN}; JSON, Parquet, text files and folders, too.",
    "bam": "The data is dealt out into `slices`. Each iteration trains `branches` of them apart, merges their adapters "
    "and folds the merge into the base: slices / branches iterations.",
    "lora": "The adapter of a branch. A higher r learns more, and takes more memory and disk.",
    "quantization": "How the frozen base is held while a branch trains; folding always goes into the full weights.",
    "training": "A step is per_device_train_batch_size x gradient_accumulation_steps x data.sequence_length tokens. "
    "For another card, `bam-lora check RECIPE --fit` chooses again. Learned too little: a higher learning_rate; forgot "
    "too much: a lower one, or more replay.",
    "limits": "When this is used up, the run ends at the next merge, with a whole model.",
    "evaluation": "What is measured before and after, in bits per byte, on text that is not trained on: target shows "
    "what was learned, source what was forgotten. Both models continue the samples for the report.",
    "seed": "Another number deals the data out otherwise.",
}
_ROUNDING = 1.1  # tokens are rounded to two digits


def render_recipe(draft: Draft, catalogue: Path, command: Sequence[str]) -> str:
    """The recipe's text.

    Args:
        draft: What it holds.
        catalogue: The descriptions of the data sets, for columns and licences.
        command: The words of the command that writes it again.
    """
    recipe = draft.recipe()
    sections = {**_SECTIONS, "base": _about_base(draft.choices.base)}
    order = [key for key in Recipe.model_fields if key in draft.tree]
    assert set(order) == set(draft.tree), "a fragment has a key that no recipe has"
    parts = [_comment(_head(draft, recipe, command))]
    for key in order:
        lines = [_comment(comment_lines(sections[key]))] if key in sections else []
        if key == "data":
            lines += [_comment(comment_lines(text)) for text in _about_data(draft)]
            lines += head_lines(recipe, read_catalogue(catalogue))
        parts.append("\n".join([*lines, *write_tree({key: _ordered(key, draft.tree[key])})]))
    return "\n\n".join(parts) + "\n"


def _ordered(section: str, entry: Entry) -> Entry:
    """The section's keys in the order of the reference, not of the fragments they came from."""
    model = Recipe.model_fields[section].annotation
    if not isinstance(entry.value, dict) or not (isinstance(model, type) and issubclass(model, BaseModel)):
        return entry
    order = list(model.model_fields)
    rank = {key: order.index(key) if key in order else len(order) for key in entry.value}
    return replace(entry, value={key: entry.value[key] for key in sorted(entry.value, key=lambda key: rank[key])})


def _comment(lines: Sequence[str]) -> str:
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _about_base(base: Base) -> str:
    return f"The model to start from: a Hub id, a folder, or a finished run. {base.file.notes}".strip()


def _about_data(draft: Draft) -> list[str]:
    """What the fragments say of the text: the goal's of its replay, the language's of its own."""
    language, goal = draft.choices.language_data, draft.choices.goal
    said = [("Replay" if not goal.chat else "Conversations", goal.file.notes)]
    said += [(draft.choices.language.plain_name, language.notes)] if language is not None else []
    return [f"{name}: {notes}" for name, notes in said if notes]


def _head(draft: Draft, recipe: Recipe, command: Sequence[str]) -> list[str]:
    file = shlex.quote(draft.choices.file.name)
    facts = [("Hardware", _hardware(draft)), *amounts(draft, recipe), ("Expect", _expected(draft, recipe))]
    lines = [
        *comment_lines(_title(draft, recipe)),
        "",
        f"    bam-lora check {file}    # what it takes, and whether it will work; trains nothing",
        f"    bam-lora run   {file}    # starts, or goes on where it was stopped",
        "",
    ]
    for name, text in facts:
        first, *others = comment_lines(text, 106)
        lines += [f"{name + ':':9} {first}", *(f"{'':10}{line}" for line in others)]
    for note in notes(draft, recipe):
        first, *others = comment_lines(note, 106)
        lines += [f"{'Note:':9} {first}", *(f"{'':10}{line}" for line in others)]
    return [*lines, "", f"Written by: {shlex.join(command)}", "Every key: docs/recipe.md, or `bam-lora schema`."]


def _title(draft: Draft, recipe: Recipe) -> str:
    name, base = draft.choices.language.plain_name, draft.choices.base.title
    learns = f"learns to answer in {name}" if draft.choices.goal.chat else f"learns {name} and keeps its English"
    if recipe.strategy != "bam":
        return f"{base} {learns}: one adapter over all the data, the baseline of Branch-and-Merge."
    return (
        f"{base} {learns}: Branch-and-Merge, {recipe.slices} slices, {recipe.branches} branches, "
        f"{iteration_count(recipe)} iteration{'s' if iteration_count(recipe) > 1 else ''}."
    )


def _hardware(draft: Draft) -> str:
    gpu_bytes = draft.choices.gpu_bytes
    if gpu_bytes is None:
        return "no GPU: a CPU is enough for the smallest bases and little text."
    named = draft.choices.card.name if draft.choices.card is not None else ""
    size = f"with {gpu_bytes / 2**30:.0f} GB"
    card = f"one {named} GPU {size}" if named else f"one GPU {size}"
    if draft.fit is None:
        return f"{card}; whether that is enough, `bam-lora check` says: the size of the base is not known here."
    card = card if named else f"one GPU (NVIDIA: RTX 30 or newer) {size}"
    by = "estimate" if draft.exact else "estimate by the base's size alone"
    return f"{card}, of which {draft.fit.estimate.peak_bytes / 2**30:.1f} are used at the peak ({by})."


def amounts(draft: Draft, recipe: Recipe) -> list[tuple[str, str]]:
    """How much text it trains on and for how long, as far as that is known: names and sentences."""
    name = draft.choices.language.plain_name
    if draft.budget is None:
        return [("Tokens", "all the conversations there are; `bam-lora check` counts them.")]
    total, each = draft.budget.total_tokens, steps_per_branch(draft, recipe)
    replay = round(total * recipe.data.replay_share)
    tokens = (
        f"{readable_count(total - replay)} of {name} and {readable_count(replay)} of replay, some "
        f"{each * recipe.slices:,.0f} steps, {each:,.0f} a branch."
    )
    hours = draft.budget.seconds / 3600
    time = (
        f"about {readable_hours(hours)}, guessed at {draft.budget.tokens_per_second:,.0f} tokens a second, right "
        "within a factor of three; `bam-lora check --measure` measures it."
    )
    if draft.choices.hours is None and hours > _LONG:
        time += " Less: init with --hours 20."
    return [("Tokens", tokens), ("Time", time)]


def _expected(draft: Draft, recipe: Recipe) -> str:
    name = draft.choices.language.plain_name
    if draft.choices.goal.chat:
        return f"{name} answers in far fewer bits per byte, English ones not worse (not measured)."
    if recipe.strategy != "bam":
        return f"{name} bits per byte lower, English ones higher than with strategy bam (not measured)."
    single = f"{recipe.output}-single"
    return (
        f"{name} bits per byte lower, English ones nearly unchanged (not measured). To compare: the same recipe with "
        f"`--set strategy=single --output {single}`, then `bam-lora compare {single} {recipe.output}`."
    )


def notes(draft: Draft, recipe: Recipe) -> list[str]:
    """What the user should know before the run, for the head of the recipe and for the screen."""
    language, found = draft.choices.language, []
    if not language.verified:
        found.append(
            f"{language.config} has the form of a configuration of {DATASET}, but is not in the list that this version "
            "knows; `bam-lora check` says whether it is there."
        )
    if language.mostly_bible:
        found.append(
            f"most of {language.plain_name} in {DATASET} is Bible translation: add text of your own under data.target."
        )
    if draft.budget is not None and draft.budget.target_tokens is None:
        found.append(
            f"{DATASET} has {readable_count(language.words)} words of {language.plain_name}; all of them are used. "
            "More passes over them: training.num_train_epochs."
        )
    hours, limit = (draft.budget.seconds / 3600 if draft.budget else 0.0), recipe.limits.hours
    if limit is not None and hours > limit * _ROUNDING:
        found.append(
            f"even so little text takes about {readable_hours(hours)}, more than limits.hours, by which the run ends: "
            "more hours, or a smaller base."
        )
    if too_few(steps_per_branch(draft, recipe)) and draft.budget is not None:
        found.append("so few steps hardly move an adapter: more hours, more text or smaller steps.")
    if draft.choices.base.gated:
        page = f"https://huggingface.co/{draft.choices.base.model}"
        found.append(f"the base is gated: accept its terms at {page}, then `hf auth login`.")
    return [*found, *(f"{note}." for note in (draft.fit.notes if draft.fit else ()))]


def readable_hours(hours: float) -> str:
    """Hours in words: minutes below two, days above three of them."""
    if hours < 2:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.0f} hours" if hours < 72 else f"{hours / 24:.0f} days"
