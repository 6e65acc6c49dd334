"""What can be known about a run before anything is spent on it: `bam-lora check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bam_lora.base import load_tokenizer, require_fitting_base, require_targets
from bam_lora.check_batch import batch_lines
from bam_lora.check_data import data_lines
from bam_lora.check_rows import source_lines
from bam_lora.check_template import template_lines
from bam_lora.checkpoint import Checkpoint
from bam_lora.default_template import settle_template
from bam_lora.difference import Known
from bam_lora.front import Front
from bam_lora.grown_tokenizer import open_backend
from bam_lora.hub_metadata import BaseMetadata, base_metadata
from bam_lora.ledger import LEDGER_FILE
from bam_lora.memory import readable_bytes
from bam_lora.module_weights import require_patterns
from bam_lora.plan import describe_merge, iteration_count, merge_settings
from bam_lora.planning import require_groups
from bam_lora.quiet import quiet_libraries
from bam_lora.recipe import Recipe
from bam_lora.recipe_chat import has_chat
from bam_lora.rehearsal import require_mergeable
from bam_lora.rundir import require_own
from bam_lora.task_scores import task_lines
from bam_lora.token_learning import require_bpe
from bam_lora.vocabulary import require_fresh_base


def check_recipe(
    recipe: Recipe,
    base: BaseMetadata | None = None,
    tokenizer: Any = None,
    *,
    colour: bool = False,
    by_document: bool | None = None,
) -> str:
    """Looks at everything a recipe names and says what a run will do.

    Args:
        recipe: A valid recipe.
        base: Its base, where it has been looked at already.
        tokenizer: The base's, where it is loaded already.
        colour: Mark the trained tokens by colour, for a terminal, not by brackets.
        by_document: Whether documents of a packed row are gone through apart; None: as on this machine.

    Returns:
        Lines for the terminal: base, sources with their columns and a row, iterations.

    Raises:
        UserError: If the run could not work: base or data missing, no EOS, sequences beyond the base's context.
    """
    require_own(recipe, recipe.output)
    quiet_libraries()
    base = base or base_metadata(recipe.base, recipe.revision)
    folder, checkpoint = base.folder, base.checkpoint
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    note = settle_template(tokenizer, recipe.data.chat_template) if has_chat(recipe) else None
    require_fitting_base(recipe.base, folder, tokenizer, recipe.data.sequence_length)
    require_targets(checkpoint, recipe.lora.target_modules)
    require_patterns(folder, recipe.lora.target_modules, recipe.bam.merge.weights_by_module)
    method, bits = recipe.bam.merge.method, recipe.quantization.bits
    require_mergeable(folder, checkpoint, Known(None), Front(recipe).adapter_config(), method, bits)
    lines = [f"base        {recipe.base}: {_parameters(checkpoint):,} parameters"]
    if base.missing_bytes:
        lines.append(f"download    {readable_bytes(base.missing_bytes)}, when the run starts; commit {base.commit}")
    lines += template_lines(tokenizer, note) if has_chat(recipe) else []
    lines += source_lines(recipe, tokenizer, colour=colour)
    lines += task_lines(recipe)
    if not recipe.data.replay:
        lines.append(
            "note        without replay much is forgotten: a tenth of the tokens in text like the base's own under "
            "data.replay keeps more than anything done afterwards"
        )
    if not recipe.evaluation.target or not recipe.evaluation.source:
        lines.append(
            "note        without evaluation.target and evaluation.source, learning or forgetting is not measured"
        )
    require_groups(recipe)
    lines += _vocabulary_lines(recipe, folder) + data_lines(recipe, tokenizer) + _plan_lines(recipe)
    lines += batch_lines(recipe, folder, _parameters(checkpoint), by_document=by_document)
    return "\n".join(lines)


def _parameters(checkpoint: Checkpoint) -> int:
    total = 0
    for record in checkpoint.tensors().values():
        count = 1
        for size in record.shape:
            count *= size
        total += count
    return total


def _vocabulary_lines(recipe: Recipe, folder: Path) -> list[str]:
    wanted = recipe.vocabulary
    if wanted.tokens is None:
        return []
    require_fresh_base(recipe.base, wanted.tokens, chained=(Path(recipe.base) / LEDGER_FILE).is_file())
    require_bpe(open_backend(folder), recipe.base)
    return [
        f"vocabulary  {wanted.tokens:,} new tokens at most, learned from {wanted.sample_bytes / 1e6:g} MB of target; "
        f"tokens per byte above are the base's own; trained: {wanted.train} rows"
    ]


def _plan_lines(recipe: Recipe) -> list[str]:
    training = recipe.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * recipe.data.sequence_length
    lines = [
        f"plan        {recipe.strategy}: {recipe.slices} slices, {recipe.branches} branches, "
        f"{iteration_count(recipe)} iterations; {per_step:,} tokens a step",
        f"merge       {describe_merge(merge_settings(recipe))}",
    ]
    limits = [source.tokens for source in recipe.data.target]
    if all(limit is not None for limit in limits):
        target = sum(limit for limit in limits if limit is not None)
        total = round(target / (1 - recipe.data.replay_share))
        steps = -(-total // per_step)
        lines.append(
            f"tokens      {total:,} at most, {total - target:,} of them replay: "
            f"about {total // recipe.slices:,} a slice, {steps:,} steps in all"
        )
        if steps < recipe.slices * 20:
            lines.append(
                "note        fewer than 20 steps a branch: adapters hardly move; use fewer slices or smaller steps"
            )
    return lines
