"""The section of the recipe about new tokens for the target language."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bam_lora.recipe_sources import Section


class Vocabulary(Section):
    """New tokens for the target language, learned from its text; they begin as the mean of their pieces' rows."""

    tokens: int | None = Field(
        default=None, ge=1, description="How many to add, such as 2000; none: the vocabulary stays as it is."
    )
    train: Literal["new", "all"] = Field(
        default="new",
        description="Rows of the embedding and of the output head that the branches train: the new tokens', or all of "
        "both, which takes far more memory.",
    )
    sample_bytes: int = Field(
        default=20_000_000,
        ge=1000,
        description="Target text to learn them from, in bytes of UTF-8, as much of each source.",
    )
    pad_to_multiple_of: int | None = Field(
        default=64,
        ge=1,
        description="Rows are added up to a multiple of this, which GPUs compute faster; none: no more.",
    )
