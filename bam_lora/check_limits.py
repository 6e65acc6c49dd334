"""What `bam-lora check` says of a recipe's limits, by what the whole run is expected to take."""

from __future__ import annotations

from bam_lora.plan import iteration_count
from bam_lora.recipe import Recipe


def limit_lines(recipe: Recipe, tokens: float | None, seconds: float | None = None) -> list[str]:
    """How many iterations the limits are expected to hold.

    Args:
        recipe: A recipe.
        tokens: Training tokens of the whole run, repeated passes included, or None if that is not known.
        seconds: Wall-clock time of the whole run, or None.
    """
    limits, planned = recipe.limits, iteration_count(recipe)
    lines = []
    for name, limit, whole, unit in (
        ("tokens", limits.tokens, tokens, 1.0),
        ("hours", limits.hours, seconds, 3600.0),
    ):
        if limit is None:
            continue
        setting = f"limits.{name} {limit:,.10g}"
        if whole is None:
            lines.append(f"limits      {setting}: the run ends after the last iteration of {planned} that is within it")
            continue
        count = _whole_iterations(recipe, limit * unit / whole)
        lines.append(f"limits      {setting}: room for about {count} of {planned} iterations")
        if not count:
            how = "training.max_steps" if planned == 1 else "a higher bam.slices, or lower `tokens` of the sources"
            lines.append(
                f"note        without a first iteration there is no result: raise limits.{name}, or make it smaller "
                f"({how})"
            )
    return lines


def _whole_iterations(recipe: Recipe, share: float) -> int:
    """Iterations within a share of the whole run; all have the same number of slices but for a short last one."""
    if share >= 1:
        return iteration_count(recipe)
    return min(int(share * recipe.slices / recipe.branches), iteration_count(recipe))
