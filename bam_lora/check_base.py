"""What the plan of `bam-lora check` needs to know of a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.base import find_base, load_tokenizer, weight_bytes
from bam_lora.checkpoint import open_checkpoint
from bam_lora.errors import UserError
from bam_lora.ledger import LEDGER_FILE
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
    folder = _folder(recipe)
    checkpoint = open_checkpoint(folder)
    companions = sum((folder / name).stat().st_size for name in checkpoint.companions())
    shape = shape_of_config(checkpoint.config, recipe.base)
    return PlannedBase(folder, shape, load_tokenizer(folder), weight_bytes(folder), companions, 0)


def _folder(recipe: Recipe) -> Path:
    finished = Path(recipe.base)
    if (finished / LEDGER_FILE).is_file():
        if not (finished / "model" / "config.json").is_file():
            raise UserError.of(
                recipe.base, expected="a finished run", found="one that is not", remedy="Finish it first"
            )
        return finished / "model"
    return find_base(recipe.base, recipe.revision).folder
