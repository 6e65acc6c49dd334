"""Text or conversations: which mode a recipe's sources have, and what of it does not fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bam_lora.recipe_values import Finding

if TYPE_CHECKING:
    from bam_lora.recipe_models import Data, Evaluation, Recipe, Selection


def with_modes(values: Any) -> Any:
    """A raw recipe whose sources without a mode have that of the recipe; what is not as it should be stays so."""
    if not isinstance(values, Mapping):
        return values
    filled = dict(values)
    for section in ("data", "evaluation", "selection"):
        held = values.get(section)
        if isinstance(held, Mapping):
            filled[section] = {
                name: [_with_mode(source, values.get("mode", "text")) for source in entry]
                if name in ("target", "replay", "source") and isinstance(entry, list)
                else entry
                for name, entry in held.items()
            }
    return filled


def _with_mode(source: Any, mode: Any) -> Any:
    fits = isinstance(source, Mapping) and source.get("mode") is None and mode in ("text", "chat")
    return {**source, "mode": mode} if fits else source


def check_modes(mode: str, data: Data, evaluation: Evaluation, selection: Selection) -> list[Finding]:
    """What in the sources does not fit the recipe's mode."""
    if mode == "chat" and all(source.mode == "text" for source in data.target):
        return [(("data", "target"), "expected conversations in one of them, since `mode` is chat, found only text")]
    lists = (data.target, data.replay, evaluation.target, evaluation.source, selection.target, selection.source)
    if data.chat_template is not None and all(source.mode == "text" for listed in lists for source in listed):
        message = "expected none, since no source is in `mode: chat`, found one; leave it out"
        return [(("data", "chat_template"), message)]
    return []


def trains_chat(recipe: Recipe) -> bool:
    """Whether conversations are trained on."""
    return any(source.mode == "chat" for source in (*recipe.data.target, *recipe.data.replay))


def has_chat(recipe: Recipe) -> bool:
    """Whether anything that a run reads is conversations."""
    held_out = (
        *recipe.evaluation.target,
        *recipe.evaluation.source,
        *recipe.selection.target,
        *recipe.selection.source,
    )
    return trains_chat(recipe) or any(source.mode == "chat" for source in held_out)
