"""The section of the recipe about how much a run may take."""

from __future__ import annotations

from pydantic import Field

from bam_lora.recipe_sources import Section
from bam_lora.recipe_values import Tokens


class Limits(Section):
    """A budget that ends a run after a merge; raised, the run goes on where it ended, as if it never had."""

    hours: float | None = Field(
        default=None,
        gt=0,
        description="Hours of wall-clock time over all sittings of the run. No iteration begins that would not end "
        "within them, by what the ones before took; none: no limit.",
    )
    tokens: Tokens = Field(
        default=None,
        description="Training tokens, as `50M`: the run ends after the last iteration that is within them; none: no "
        "limit.",
    )
