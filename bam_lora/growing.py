"""A larger vocabulary as the step of a run that comes before its iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bam_lora.base import BaseFiles, context_length, find_base
from bam_lora.front import Front
from bam_lora.grown_tokenizer import changed_share, open_backend, token_count
from bam_lora.ledger import Ledger
from bam_lora.progress import RunProgress
from bam_lora.recipe import Recipe
from bam_lora.report.format import scores_line
from bam_lora.rundir import RunDirectory
from bam_lora.scoring import FoundBase, ReadSet, Windowed, read_set, recut
from bam_lora.scoring_sets import evaluation_windows
from bam_lora.screening import filter_rules
from bam_lora.sources import text_source
from bam_lora.stages import Context, score_model, scored
from bam_lora.store import digest, read_json, read_record, write_record
from bam_lora.token_learning import count_words
from bam_lora.views import count_linear_modules
from bam_lora.vocabulary import TOKENS, VOCABULARY, Growth, grown_files, learn_vocabulary, require_fresh_base


def grow(
    directory: RunDirectory, recipe: Recipe, ledger: Ledger, original: BaseFiles, progress: RunProgress
) -> BaseFiles:
    """The base that every fold of a run starts from: the original, or that with the new tokens that the ledger records.

    Args:
        directory: The run's.
        recipe: Its recipe; new tokens are learned where it asks for them and the ledger has none.
        ledger: Its ledger; saved with what was grown.
        original: The original base.
        progress: Told what is being done.

    Raises:
        UserError: If the tokens cannot be learned, or the base is a finished run.
    """
    wanted, known = recipe.vocabulary, ledger.base.get("vocabulary")
    require_fresh_base(recipe.base, wanted.tokens, chained=bool(ledger.inherited))
    if known is None and wanted.tokens is None:
        return original
    if known is None:
        assert wanted.tokens is not None
        progress.stage("learning new tokens from the target text")
        growth = Growth(wanted.tokens, wanted.sample_bytes, wanted.pad_to_multiple_of)
        sources = [(text_source(source), filter_rules(recipe, source)) for source in recipe.data.target]
        ledger.base["vocabulary"] = learn_vocabulary(original.folder, sources, growth, directory.root, progress.say)
        progress.say(_learned_line(read_json(directory.root / VOCABULARY / TOKENS)))
    progress.stage("the base with the new tokens")
    grown = grown_files(original, ledger.base, directory.root, directory.folded(0))
    if known is None:
        ledger.save()
    return grown


def _learned_line(content: dict[str, Any]) -> str:
    sample = content["sample"]
    before, after = (sample["bytes"] / sample[key] for key in ("tokens_before", "tokens_after"))
    return f"{len(content['tokens']):,} new tokens: {after:.2f} bytes of target text a token, {before:.2f} before"


def found_base(directory: RunDirectory, recipe: Recipe, ledger: Ledger, front: Front) -> FoundBase | None:
    """The base before this run grew it; None where it did not."""
    if (ledger.base.get("vocabulary") or {}).get("path") != VOCABULARY:
        return None
    folder = find_base(ledger.base["name"], ledger.base["revision"]).folder
    tokenizer, limit = front.tokenizer(folder), context_length(folder)
    return FoundBase(
        folder, tokenizer, evaluation_windows(recipe, tokenizer, directory.evaluation, limit, front.read_set)
    )


def run_windows(
    found: FoundBase | None, recipe: Recipe, tokenizer: Any, path: Path, limit: int | None, read: ReadSet = read_set
) -> Windowed | None:
    """The evaluation sets for a run's own tokenizer, in the windows of the base that it found."""
    if found is None:
        return evaluation_windows(recipe, tokenizer, path, limit, read)
    return found.evaluation and recut(found.evaluation, tokenizer, limit)


def score_start(context: Context) -> None:
    """Scores the base as the run found it; where its vocabulary grew, with its own tokenizer, and once grown, too."""
    found, evaluation = context.found, context.evaluation
    if found is None:
        score_model(context, 0)
        return
    if found.evaluation is None or evaluation is None:
        return
    how, folder, identity = context.scoring_load, context.directory.iteration(0), context.ledger.key(0)
    key = digest([identity, "as found", found.evaluation.key, how.facts()])
    if read_record(folder / "eval.json", key) is None:
        context.progress.stage("scoring the base")
        model, tokenizer = context.found_model(how)
        scores = scored(context, model, tokenizer, found.evaluation)
        record = {"format": 1, "iteration": 0, "branch": None, "precision": context.recipe.evaluation.precision}
        write_record(folder / "eval.json", key, {**record, "linear_modules": count_linear_modules(model), **scores})
        context.progress.say(f"base: {scores_line(scores['scores'])}")
    key = digest([identity, "grown", evaluation.key, how.facts()])
    if read_record(folder / TOKENS, key) is None:
        context.progress.stage("scoring the base with the new tokens")
        scores = scored(context, context.model(0, how), context.tokenizer, evaluation)
        write_record(folder / TOKENS, key, _measures(context, found) | {"scores": scores["scores"]})
        context.progress.say(f"base with the new tokens, not trained yet: {scores_line(scores['scores'])}")


def _measures(context: Context, found: FoundBase) -> dict[str, Any]:
    """What the new tokens do to the evaluation sets."""
    assert found.evaluation is not None
    content = read_json(context.directory.root / VOCABULARY / TOKENS)
    before, after = open_backend(found.folder), open_backend(context.directory.root / VOCABULARY)
    sets = [
        {
            "set": part.name,
            "role": part.role,
            "bytes": sum(len(text.encode()) for text in part.documents),
            "tokens_before": token_count(found.tokenizer, part.documents),
            "tokens_after": token_count(context.tokenizer, part.documents),
            "words_changed": changed_share(before, after, count_words(before, part.documents)),
        }
        for part in found.evaluation.sets
    ]
    return {"format": 1, "tokens": len(content["tokens"]), "rows": content["rows"], "sets": sets}
