"""A recipe from its fragments: merged, complete, its data and slices suited to time and card."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bam_lora.cards import Card, instead_of_bfloat16
from bam_lora.commented_yaml import Commented, Tree, look_up, merge_trees, put, write_tree
from bam_lora.init_budget import (
    Budget,
    budget,
    fewer_slices,
    rounded_tokens,
    short_number,
    short_warmup,
)
from bam_lora.languages import DATASET, Language
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.recipe_yaml import read_yaml

if TYPE_CHECKING:
    from bam_lora.fit import Fit
    from bam_lora.init_fragments import Base, Goal

_DEFAULT_TOKENS = 200_000_000
_HELD_BACK = 500  # documents to score on
_TOKENS = re.compile(r"(, *tokens: *)[\w.]+")


@dataclass(frozen=True)
class Choices:
    """What a recipe is made of.

    Attributes:
        language: What is learned.
        goal: What for.
        base: The base's fragment; for a base that has none, one made of defaults.
        language_data: The language's own fragment; None: FineWeb-2 as it is.
        card: What it runs on; None: a CPU.
        hours: The time there is; None: no limit.
        file: Where the recipe goes.
        name: Of the run.
    """

    language: Language
    goal: Goal
    base: Base
    language_data: Commented | None
    card: Card | None
    hours: float | None
    file: Path
    name: str

    @property
    def gpu_bytes(self) -> int | None:
        """Memory of the card; None: a CPU."""
        return None if self.card is None else self.card.memory_bytes


@dataclass
class Draft:
    """A recipe in the making.

    Attributes:
        tree: Its keys.
        choices: What it is made of.
        budget: The tokens it trains on; None for conversations, of which there are as many as there are.
        fit: What was chosen for the card; None: nothing.
        exact: Whether that went by the base's own shape, not by its size alone.
    """

    tree: Tree
    choices: Choices
    budget: Budget | None = None
    fit: Fit | None = None
    exact: bool = True

    def recipe(self) -> Recipe:
        """The recipe as it stands."""
        values = read_yaml("\n".join(write_tree(self.tree)), None).value
        return recipe_from_dict(values, origin="the new recipe", folder=self.choices.file.absolute().parent)


def recipe_name(language: Language, goal: Goal, folder: Path | None) -> str:
    """The name of the file and of the run: the language, and what sets a goal apart from continued pretraining.

    Args:
        language: What is learned.
        goal: What for.
        folder: The language's own folder of recipes, which it is called by; None if it has none.
    """
    name = folder.name if folder is not None else language.slug
    return name if goal.name.startswith("pretrain") else f"{name}-{goal.name}"


def draft_recipe(choices: Choices) -> Draft:
    """The fragments merged, with what the choices change in them, but for the card."""
    tree: Tree = {}
    for fragment in (choices.base.file, choices.goal.file, choices.language_data or plain_data(choices.language)):
        merge_trees(tree, fragment.tree)
    for key, value in (("strategy", "bam"), ("output", f"runs/{choices.name}"), ("seed", "0")):
        if look_up(tree, key) is None:
            put(tree, key, value)
    draft = Draft(tree, choices)
    suit_compute_type(draft, choices.base.model)
    if not choices.goal.chat:
        _set_budget(draft)
    if choices.hours is not None:
        put(tree, "limits.hours", f"{choices.hours:g}")
    return draft


def plain_data(language: Language) -> Commented:
    """The fragment of a language that has none of its own: its part of FineWeb-2, scored on text held back."""
    source = f"path: {DATASET}, name: {language.config}"
    name = f"documents: {_HELD_BACK}, set: fineweb-2-{language.config}"
    if language.has_test:
        train, held = "", "split: test, "
    else:  # the smallest have no split of their own to score on
        train, held = ', split: "train[:90%]"', 'split: "train[90%:]", '
    tree: Tree = {}
    put(tree, "data.target", f"- {{{source}{train}, tokens: {short_number(_DEFAULT_TOKENS)}}}")
    put(tree, "evaluation.target", f"- {{{source}, {held}{name}}}")
    put(tree, "evaluation.samples", '- "The capital of France is"', "add beginnings in the language that is learned")
    return Commented([f"{language.plain_name} text"], tree)


def suit_compute_type(draft: Draft, base: str) -> None:
    """Sets what a card without bfloat16 computes in; `base`: the base's name, or its kind where that is known."""
    card = draft.choices.card
    if card is not None and not card.bfloat16:
        put(draft.tree, "quantization.compute_dtype", instead_of_bfloat16(base), "the card has no bfloat16")


def apply_fit(draft: Draft, fit: Fit, *, exact: bool) -> None:
    """Sets what was chosen for a card."""
    draft.fit, draft.exact = fit, exact
    for key, value in fit.settings.items():
        put(draft.tree, key, str(value).lower() if isinstance(value, bool) else str(value))


def shorten(draft: Draft, context: int) -> None:
    """Cuts the sequence length to a base's context, with as many more sequences in a step where that can be."""
    recipe = draft.recipe()
    length = recipe.data.sequence_length
    if length <= context:
        return
    put(draft.tree, "data.sequence_length", str(context), "the base's context")
    accumulation = recipe.training.gradient_accumulation_steps * max(1, length // context)
    put(draft.tree, "training.gradient_accumulation_steps", str(accumulation))


def tokens_per_step(recipe: Recipe) -> int:
    """Tokens of an optimizer step."""
    training = recipe.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * recipe.data.sequence_length


def steps_per_branch(draft: Draft, recipe: Recipe) -> float:
    """Steps that a branch of the draft's recipe takes, at most; 0 if unknown."""
    return draft.budget.total_tokens / tokens_per_step(recipe) / recipe.slices if draft.budget else 0.0


def _set_budget(draft: Draft) -> None:
    """Sets how much of the target's text is used, the number of slices and the warm-up."""
    choices, recipe = draft.choices, draft.recipe()
    wanted = sum(source.tokens or 0 for source in recipe.data.target) or _DEFAULT_TOKENS
    draft.budget = found = budget(
        choices.language,
        wanted,
        recipe.data.replay_share,
        choices.hours,
        choices.base.parameters,
        choices.gpu_bytes,
    )
    if found.target_tokens is None:
        _change_target(draft, lambda match: "")
    elif found.target_tokens != wanted:
        factor = found.target_tokens / wanted
        limits = iter([source.tokens for source in recipe.data.target if source.tokens])
        _change_target(draft, lambda match: match[1] + short_number(rounded_tokens(next(limits) * factor)))
    slices = fewer_slices(recipe.bam.slices, found.total_tokens, tokens_per_step(recipe))
    if recipe.strategy == "bam" and slices < recipe.bam.slices:
        put(draft.tree, "bam.slices", str(slices))
        put(draft.tree, "bam.branches", str(min(slices, recipe.bam.branches)))
    if short_warmup(steps_per_branch(draft, draft.recipe())):
        put(draft.tree, "training.warmup_steps", "0.1", "of every branch's steps, of which there are not many")


def _change_target(draft: Draft, change: Callable[[re.Match[str]], str]) -> None:
    text = look_up(draft.tree, "data.target")
    assert text is not None, "a language's fragment has data.target"
    put(draft.tree, "data.target", _TOKENS.sub(change, text))
