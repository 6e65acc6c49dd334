"""What `bam-lora check` says of the texts: what is dropped, evaluation text in them, how the tokenizer covers them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bam_lora import tokenizer_report
from bam_lora.contamination import HeldOutSet
from bam_lora.language_samples import compare_languages, first_rows
from bam_lora.recipe import Recipe
from bam_lora.scoring import SetSource, read_set
from bam_lora.scoring_sets import set_sources
from bam_lora.screening import filter_rules, findings, screening_of
from bam_lora.sieve import Sieve, describe_dropped
from bam_lora.sources import text_source

_SAMPLE_CHARACTERS = 4_000_000


def data_lines(recipe: Recipe, tokenizer: Any) -> list[str]:
    """Lines about a sample of every source: up to 2,000 documents or 4 million characters from its beginning.

    Args:
        recipe: A recipe.
        tokenizer: The base's tokenizer.

    Raises:
        UserError: If a source cannot be read, or holds evaluation text where that is to be an error.
    """
    held_out, lines = [], []
    for kind, sets in (("evaluation", recipe.evaluation), ("selection", recipe.selection)):
        for source in set_sources(sets):
            part = read_set(source, sample=True)
            held_out.append(HeldOutSet(part.name, part.role, part.documents, kind))
            lines += _short_line(kind, source, len(part.documents))
    return [*lines, *_screen(recipe, held_out)] + [
        f"tokenizer   {line}" for line in tokenizer_report.describe(compare_languages(recipe, tokenizer, held_out))
    ]


def _short_line(kind: str, source: SetSource, found: int) -> list[str]:
    """Says so where `where` chooses so few rows that a run would read on for the rest of a set."""
    if source.where.where is None or source.documents is None or found >= source.documents:
        return []
    return [
        f"note        {kind} set {source.name}: of {source.documents:,} documents {found:,} were found soon, where "
        f"{source.where.where.describe()}; a run reads on for the others, to the end if need be"
    ]


def _screen(recipe: Recipe, held_out: Sequence[HeldOutSet]) -> list[str]:
    screening = screening_of(recipe, held_out, [])
    counted = screening.deduplicate == "none"  # copies are counted even where they stay
    sieve = Sieve(replace(screening, deduplicate="exact") if counted else screening)
    lines, facts = [], []
    for source in [*recipe.data.target, *recipe.data.replay]:
        rows = first_rows(text_source(source), _SAMPLE_CHARACTERS)
        screen = sieve.source(source.path, filter_rules(recipe, source))
        screen.keep([number for number, _ in rows], [text for _, text in rows])
        copies = screen.dropped.pop("duplicate", 0) if counted else 0
        if dropped := describe_dropped(len(rows), screen.dropped):
            lines.append(f"screening   {source.path}, from its beginning: {dropped}")
        if copies:
            lines.append(
                f"note        {copies:,} of the first {len(rows):,} documents of {source.path} are copies of earlier "
                "ones; data.deduplicate: exact leaves them out"
            )
        with tempfile.TemporaryDirectory() as folder:
            facts.append({"path": source.path, **screen.close(Path(folder), 0)})
            sieve.take_over(Path(folder), source.path, screened=True)
    found = findings({"sources": facts, "contamination": sieve.contamination()})
    return lines + [f"screening   {line}" for line in found]
