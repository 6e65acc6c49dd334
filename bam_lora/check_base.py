"""What the plan of `bam-lora check` needs to know of a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.base import load_tokenizer
from bam_lora.hub_metadata import BaseMetadata, base_metadata
from bam_lora.memory_shape import BaseShape, shape_of_config
from bam_lora.recipe import Recipe


@dataclass(frozen=True)
class PlannedBase:
    """A base as a plan sees it: `download_bytes` are what the Hub's cache lacks, `companion_bytes` its tokenizer's."""

    metadata: BaseMetadata
    shape: BaseShape
    tokenizer: Any
    companion_bytes: int

    @property
    def folder(self) -> Path:
        """Config and tokenizer; the weights need not be there."""
        return self.metadata.folder

    @property
    def weight_bytes(self) -> int:
        """The size of its weight files."""
        return self.metadata.weight_bytes

    @property
    def download_bytes(self) -> int:
        """What a run would still have to fetch from the Hub."""
        return self.metadata.missing_bytes


def planned_base(recipe: Recipe) -> PlannedBase:
    """The base of a recipe, of which a run need not have fetched the weights.

    Raises:
        UserError: If it is not there, or its memory cannot be estimated.
    """
    found = base_metadata(recipe.base, recipe.revision)
    return plan_base(found, recipe.base, load_tokenizer(found.folder))


def plan_base(found: BaseMetadata, name: str, tokenizer: Any) -> PlannedBase:
    """A base that has been looked at; `name` is what errors call it.

    Raises:
        UserError: If its memory cannot be estimated.
    """
    companions = sum((found.folder / file).stat().st_size for file in found.checkpoint.companions())
    return PlannedBase(found, shape_of_config(found.checkpoint.config, name), tokenizer, companions)
