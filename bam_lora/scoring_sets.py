"""The recipe's evaluation and selection sets, read and cut into windows, and how a run's models are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bam_lora.base import Loading
from bam_lora.contamination import HeldOutSet, HeldOutText
from bam_lora.errors import UserError
from bam_lora.recipe import Evaluation, Merge, Recipe, Selection
from bam_lora.recipe_rules import SELECTED
from bam_lora.scoring import ReadSet, SetSource, Windowed, prepare_evaluation, read_set
from bam_lora.selection import split_selection
from bam_lora.sources import text_source
from bam_lora.word_hashes import hash_words


def training_load(recipe: Recipe) -> Loading:
    """How the base is held under the branches."""
    chosen = recipe.quantization
    return Loading(chosen.bits, chosen.type, chosen.double, chosen.compute_dtype, attention=chosen.attention)


def scoring_load(recipe: Recipe) -> Loading:
    """How every model of a run is held that is scored."""
    chosen = recipe.quantization
    bits = 4 if recipe.evaluation.precision == "4bit" else 16
    return Loading(bits, chosen.type, chosen.double, chosen.compute_dtype, attention=chosen.attention)


def evaluation_windows(
    recipe: Recipe, tokenizer: Any, path: Path, context_tokens: int | None, read: ReadSet = read_set
) -> Windowed | None:
    """The evaluation sets, kept at `path` from then on; None if the recipe names none."""
    wanted = recipe.evaluation
    sources = set_sources(wanted)
    if not sources:
        return None
    return prepare_evaluation(
        sources, tokenizer, path, window_bytes=wanted.window_bytes, overlap_bytes=wanted.overlap_bytes,
        context_tokens=context_tokens, read=read,
    )  # fmt: skip


def selection_windows(
    recipe: Recipe, tokenizer: Any, path: Path, context_tokens: int | None, read: ReadSet = read_set
) -> Windowed | None:
    """The selection sets, kept at `path` from then on; None if the recipe names none.

    In windows no longer than a training sequence, so that learning from them needs no more memory than training.
    """
    sources = set_sources(recipe.selection)
    if not sources:
        return None
    longest = min(recipe.data.sequence_length, context_tokens or recipe.data.sequence_length)
    return prepare_evaluation(
        sources, tokenizer, path, window_bytes=None, overlap_bytes=0, context_tokens=longest,
        read=read,
    )  # fmt: skip


def check_selection(selection: Windowed | None, evaluation: Windowed | None, merge: Merge) -> None:
    """Checks what would only fail after an iteration of training, or flatter the result.

    Raises:
        UserError: If the merge weights are to be learned or searched by too little text, or by text that is also
            scored.
    """
    if selection is None:
        return
    if merge.weights in SELECTED:
        held_out = merge.learned.held_out if merge.weights == "learned" else merge.search.held_out
        split_selection(selection, held_out, 0)
    scored = [HeldOutSet(part.name, part.role, part.documents) for part in (evaluation.sets if evaluation else ())]
    index = HeldOutText(scored)
    for part in selection.sets:
        matches = index.match(hash_words(part.documents))
        shared = sorted(set(matches.training.tolist()))
        if shared:
            where = scored[index.place(int(matches.held_out[0]))[0]].name
            raise UserError.of(
                f"selection set {part.name!r}",
                expected="text that is in no evaluation set",
                found=f"{len(shared)} of its {len(part.documents)} documents in {where!r}, "
                f"whole or for the greater part, document {shared[0] + 1} first",
                remedy="Choose by other text than you test on",
            )


def set_sources(wanted: Evaluation | Selection) -> list[SetSource]:
    """Where the sets of a section come from."""
    return [
        SetSource(source.set, role, text_source(source), source.documents)
        for role, listed in (("target", wanted.target), ("source", wanted.source))
        for source in listed
    ]
