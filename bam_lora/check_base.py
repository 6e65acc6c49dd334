"""What the plan of `bam-lora check` needs to know of a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.base import load_tokenizer
from bam_lora.hub_metadata import base_metadata
from bam_lora.memory_shape import BaseShape, shape_of_config
from bam_lora.recipe import Recipe


@dataclass(frozen=True)
class PlannedBase:
    """A base as a plan sees it: `download_bytes` are what the Hub's cache lacks, `companion_bytes` its tokenizer's."""

    folder: Path
    shape: BaseShape
    tokenizer: Any
    weight_bytes: int
    companion_bytes: int
    download_bytes: int


def planned_base(recipe: Recipe) -> PlannedBase:
    """The base of a recipe.

    Raises:
        UserError: If it is not there, or its memory cannot be estimated.
    """
    base = base_metadata(recipe.base, recipe.revision)
    companions = sum((base.folder / name).stat().st_size for name in base.checkpoint.companions())
    shape = shape_of_config(base.checkpoint.config, recipe.base)
    tokenizer = load_tokenizer(base.folder)
    return PlannedBase(base.folder, shape, tokenizer, base.weight_bytes, companions, base.missing_bytes)
