"""How many tokens a run will train on, before any data is prepared."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.recipe import Recipe, Source
from bam_lora.sources import open_source, read_texts, text_source

_NEAR = 0.05  # of an estimate by the first documents
_SAMPLE = 50  # documents
_PLAIN = (".jsonl", ".json", ".txt")


def training_tokens(recipe: Recipe, tokenizer: Any) -> int | None:
    """Training tokens of one pass over the data, replay included, or None if a source says nothing of its size.

    At most what the limits allow; of plain files about what they hold, by the bytes per token at their beginning.
    """
    amounts = [_source_tokens(source, tokenizer) for source in recipe.data.target]
    if any(amount is None for amount in amounts):
        return None
    return round(sum(amount for amount in amounts if amount is not None) / (1 - recipe.data.replay_share))


def replay_tokens(recipe: Recipe, tokenizer: Any) -> int | None:
    """About how many tokens the replay sources hold, or None if one says nothing of its size."""
    amounts = [_file_tokens(source, tokenizer) for source in recipe.data.replay]
    found = [
        amount if source.tokens is None else min(amount, source.tokens)
        for source, amount in zip(recipe.data.replay, amounts, strict=True)
        if amount is not None
    ]
    return sum(found) if found and len(found) == len(amounts) else None


def replay_findings(recipe: Recipe, tokenizer: Any, tokens: int | None) -> tuple[list[UserError], list[str]]:
    """Whether the replay sources have enough for their share.

    Args:
        recipe: A valid recipe.
        tokenizer: The base's.
        tokens: Of the whole run, replay included, as `training_tokens` counts them.

    Returns:
        Problems, and notes where the estimate is too near to tell.
    """
    share = recipe.data.replay_share
    held = replay_tokens(recipe, tokenizer) if tokens is not None and share else None
    if tokens is None or held is None or held >= tokens * share * (1 + _NEAR):
        return [], []
    remedy = "Add replay data, lower data.replay_share, or limit the target with `tokens`"
    if held >= tokens * share * (1 - _NEAR):
        return [], [f"data.replay holds about as many tokens as the run needs of it ({tokens * share:,.0f}). {remedy}"]
    enough = held / (tokens * (1 - share) + held)
    remedy = remedy.replace("replay_share", f"replay_share to {math.floor(enough * 100 * (1 - _NEAR)) / 100:g}")
    needed = f"about {tokens * share:,.0f} tokens (replay_share {share:g} of all training tokens)"
    return [UserError.of("data.replay", expected=needed, found=f"about {held:,}", remedy=remedy)], []


def _source_tokens(source: Source, tokenizer: Any) -> int | None:
    held = _file_tokens(source, tokenizer)
    if source.tokens is None or held is None:
        return source.tokens if held is None else held
    return min(source.tokens, held)


def _file_tokens(source: Source, tokenizer: Any) -> int | None:
    path = Path(source.path)
    where = text_source(source)
    if not path.is_file() or path.suffix not in _PLAIN or where.mode == "chat" or where.where is not None:
        return None
    with tempfile.TemporaryDirectory() as cache:
        opened = open_source(where, streaming=True, cache=Path(cache))
        texts = [text for _, text in itertools.islice(read_texts(where, opened), _SAMPLE)]
    rows = texts if path.suffix == ".txt" else [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    size = sum(len(row.encode()) + 1 for row in rows)
    tokens = sum(len(ids) + 1 for ids in tokenizer(texts, verbose=False)["input_ids"])
    return round(path.stat().st_size * tokens / size) if texts else None
