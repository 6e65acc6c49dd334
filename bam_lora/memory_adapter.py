"""How many numbers a branch trains, counted from the recipe and the base's shape as PEFT would add the adapter."""

from __future__ import annotations

import re

from bam_lora.memory_shape import BaseShape, Linear
from bam_lora.recipe import Recipe


def adapter_numbers(recipe: Recipe, shape: BaseShape) -> int:
    """Trained numbers: r·(inputs + outputs) of every adapted layer, and what is trained beside the factors."""
    lora = recipe.lora
    adapted = [one for one in (*shape.linears, *shape.fused) if _is_adapted(one, recipe)]
    numbers = sum(one.count * _rank(one, recipe) * (one.rows + one.columns) for one in adapted)
    if lora.target_modules == "all-linear":  # experts as PEFT finds them in this family
        numbers += lora.r * shape.expert_unit
    if lora.dora:
        numbers += sum(one.rows for one in adapted)
    if lora.bias != "none":
        numbers += shape.others  # norms and biases: the most that it can be
    return numbers + _embedding_numbers(recipe, shape)


def _is_adapted(layer: Linear, recipe: Recipe) -> bool:
    lora, target = recipe.lora, recipe.lora.target_modules
    if any(_ends(layer.name, name) for name in lora.exclude_modules):
        return False
    if any(_ends(layer.name, name) for name in lora.target_parameters):
        return True
    if target == "all-linear":
        return layer.count == 1
    if isinstance(target, str):
        return re.fullmatch(target, layer.name) is not None
    return any(_ends(layer.name, name) for name in target)


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _rank(layer: Linear, recipe: Recipe) -> int:
    for pattern, rank in recipe.lora.rank_pattern.items():
        if re.search(rf"(.*\.)?({pattern})$", layer.name):
            return rank
    return recipe.lora.r


def _embedding_numbers(recipe: Recipe, shape: BaseShape) -> int:
    """Rows of the embeddings that are trained: whole ones, single ones, and those of new tokens."""
    lora, wanted = recipe.lora, recipe.vocabulary
    width, sides = shape.hidden, 1 if shape.tied else 2
    numbers = 0
    if lora.modules_to_save:
        named = [name for name in lora.modules_to_save if "embed" in name or "head" in name or "wte" in name]
        numbers += min(sides, len(named)) * shape.vocabulary * width
    rows = lora.trainable_token_indices
    listed = list(rows.values()) if isinstance(rows, dict) else [rows]
    numbers += sum(len(one) for one in listed if one) * width
    if wanted.tokens is not None:
        numbers += sides * width * (wanted.tokens + (shape.vocabulary if wanted.train == "all" else 0))
    return numbers
