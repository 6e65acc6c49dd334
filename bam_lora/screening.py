"""From a recipe to what its training text is screened by, and what came of that in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.contamination import HeldOutSet, HeldOutText
from bam_lora.duplicates import load
from bam_lora.errors import UserError
from bam_lora.recipe import Recipe, Source
from bam_lora.scoring import Windowed
from bam_lora.sieve import FINGERPRINTS, Screening, describe_example
from bam_lora.store import verify
from bam_lora.text_filters import FilterRules


def filter_rules(recipe: Recipe, source: Source) -> FilterRules:
    """The filters of one source: its own, or those of all data."""
    chosen = recipe.data.filters if source.filters is None else source.filters
    return FilterRules(**chosen.model_dump())


def held_out_sets(evaluation: Windowed | None, selection: Windowed | None) -> list[HeldOutSet]:
    """The sets that should not be trained on."""
    return [
        HeldOutSet(part.name, part.role, part.documents, kind)
        for kind, sets in (("evaluation", evaluation), ("selection", selection))
        for part in (sets.sets if sets is not None else ())
    ]


def screening_of(recipe: Recipe, held_out: Sequence[HeldOutSet], earlier: Sequence[Path]) -> Screening:
    """What a part of a run is screened by.

    Args:
        recipe: The recipe.
        held_out: The evaluation and selection sets.
        earlier: The data folders of the run's earlier parts, whose copies are looked for too.

    Raises:
        UserError: If one of those is gone.
    """
    data = recipe.data
    seen = [_fingerprints(folder) for folder in earlier] if data.deduplicate != "none" else []
    text = HeldOutText(held_out) if held_out else None
    return Screening(data.deduplicate, data.contamination, text, tuple(load(path) for path in seen))


def _fingerprints(folder: Path) -> Path:
    if verify(folder, quick=True) is None:
        raise UserError.of(
            f"{folder / FINGERPRINTS}",
            expected="the fingerprints of what the run was trained on, since data.deduplicate is on",
            found="none, or a damaged folder",
            remedy="Restore the folder, or start a new run with this one as its `base`",
        )
    return folder / FINGERPRINTS


def findings(facts: Mapping[str, Any]) -> list[str]:
    """What is to be said of the evaluation text in the training text, a line a set; none where there is none.

    Args:
        facts: `sources` and `contamination` as `prepare` gives them.
    """
    lines = []
    for part in facts["contamination"]:
        if part["found"]:
            of = f"{part['found']:,} of {part['documents']:,} documents of {part['kind']} set {part['set']!r}"
            share = "" if part["ngram_share"] is None else f", {part['ngram_share']:.1%} of its 13-grams"
            lines.append(f"{of} were found in the training sources{share}")
    for source in facts["sources"] if lines else ():
        if source["contaminated"]:
            dropped = source["dropped"].get("contaminated", 0)
            what = "left out" if dropped else "trained on; data.contamination: drop leaves them out"
            example = describe_example(source["example"])
            lines.append(f"  in {source['path']}: {source['contaminated']:,} with such text, {what}; {example}")
    return lines
