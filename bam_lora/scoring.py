"""Scores of models on the recipe's evaluation sets, as records in the run directory."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bam_lora.chat import template_digest
from bam_lora.chat_scoring import answer_question, chat_windows, chats_from_json, chats_to_json, read_chat_set
from bam_lora.errors import UserError
from bam_lora.evaluate import (
    EvaluationSet,
    Window,
    bits_per_byte,
    choose_window,
    make_windows,
    require_fit,
    score,
)
from bam_lora.sampling import continue_text
from bam_lora.sources import TextSource, open_source, read_rows, read_texts
from bam_lora.store import digest, read_record, write_record
from bam_lora.token_files import tokenizer_digest

SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class SetSource:
    """Where an evaluation set comes from; `documents` limits it to the first so many."""

    name: str
    role: str
    where: TextSource
    documents: int | None = None


@dataclass(frozen=True)
class Windowed:
    """The evaluation of a run, ready to be scored: sets with their windows, and how they were cut."""

    key: str
    sets: tuple[EvaluationSet, ...]
    windows: tuple[tuple[Window, ...], ...]
    window_bytes: int
    overlap_bytes: int


@dataclass(frozen=True)
class FoundBase:
    """A base as a run found it, with its own tokenizer, before its vocabulary grew."""

    folder: Path
    tokenizer: Any
    evaluation: Windowed | None


def read_set(source: SetSource, *, say: Callable[[str], None] | None = None, sample: bool = False) -> EvaluationSet:
    """Reads the documents of a set.

    Args:
        source: The set.
        say: Receives a line now and then where its `where` chooses few rows.
        sample: Of rows that are chosen take those found soon, be they fewer than the set is to have.

    Raises:
        UserError: If it cannot be read or holds no text.
    """
    documents = []
    with tempfile.TemporaryDirectory() as cache:
        opened = open_source(source.where, streaming=True, cache=Path(cache))
        opened.say = say
        if sample and source.where.where is not None:
            opened.sample()
        if source.where.mode == "chat":
            rows = read_rows(source.where, opened)
            return read_chat_set(source.name, source.role, source.where, rows, source.documents)
        for _, text in read_texts(source.where, opened):
            documents.append(text)
            if source.documents is not None and len(documents) >= source.documents:
                break
    if not documents:
        raise UserError.of(
            source.where.path, expected="text to score", found="no rows with text", remedy="Check the file and column"
        )
    return EvaluationSet(source.name, source.role, tuple(documents))


ReadSet = Callable[[SetSource], EvaluationSet]


def prepare_evaluation(
    sources: Sequence[SetSource], tokenizer: Any, path: Path | None, *, window_bytes: int | None,
    overlap_bytes: int | None, context_tokens: int | None, read: ReadSet = read_set,
) -> Windowed:  # fmt: skip
    """Reads the sets once, keeps them at `path`, and cuts them into windows.

    Args:
        sources: The sets.
        tokenizer: The base's tokenizer.
        path: JSON record that holds the texts and the window from then on, or None to keep nothing.
        window_bytes: Size of a window; None chooses the largest that fits.
        overlap_bytes: Context before the scored bytes; None is a quarter of the window.
        context_tokens: The base's context length, or None if unknown.
        read: Reads a set that is not kept yet.
    """
    wanted = [[s.name, s.role, s.where.described(), s.documents] for s in sources]
    chat = any(source.where.mode == "chat" for source in sources)
    template = [template_digest(tokenizer)] if chat else []
    key = digest([wanted, window_bytes, overlap_bytes, tokenizer_digest(tokenizer), *template])
    record = read_record(path, key) if path else None
    if record is None:
        sets = [read(source) for source in sources]
        plain = [part for part in sets if not part.chats]
        size = window_bytes or choose_window(plain, tokenizer, context_tokens, overlap_bytes)
        texts = [_set_to_json(part) for part in sets]
        record = {"window_bytes": size, "overlap_bytes": _overlap(size, overlap_bytes), "sets": texts}
        if path:
            write_record(path, key, record)
    sets = [
        EvaluationSet(s["name"], s["role"], tuple(s["documents"]), chats_from_json(s.get("chats", [])))
        for s in record["sets"]
    ]
    size, overlap = record["window_bytes"], record["overlap_bytes"]
    windows = tuple(
        tuple(
            chat_windows(part, tokenizer, context_tokens)
            if part.chats
            else make_windows(part.documents, tokenizer, size, overlap)
        )
        for part in sets
    )
    for part, cut in zip(sets, windows, strict=True):
        require_fit(cut, part.name, size, context_tokens)
    texts_key = digest([list(_set_to_json(part).values()) for part in sets])
    return Windowed(digest([texts_key, size, overlap, *template]), tuple(sets), windows, size, overlap)


def _set_to_json(part: EvaluationSet) -> dict[str, Any]:
    chats = {"chats": chats_to_json(part.chats)} if part.chats else {}
    return {"name": part.name, "role": part.role, "documents": list(part.documents), **chats}


def recut(evaluation: Windowed, tokenizer: Any, context_tokens: int | None) -> Windowed:
    """The same sets in the same windows of bytes, as another tokenizer splits them."""
    size, overlap = evaluation.window_bytes, evaluation.overlap_bytes
    windows = tuple(tuple(make_windows(part.documents, tokenizer, size, overlap)) for part in evaluation.sets)
    for part, cut in zip(evaluation.sets, windows, strict=True):
        require_fit(cut, part.name, size, context_tokens)
    return replace(evaluation, windows=windows)


def _overlap(window_bytes: int, overlap_bytes: int | None) -> int:
    overlap = window_bytes // 4 if overlap_bytes is None else overlap_bytes
    if overlap >= window_bytes:
        raise UserError.of(
            "evaluation.overlap_bytes",
            expected=f"less than the window of {window_bytes} bytes",
            found=str(overlap),
            remedy="Lower it or raise evaluation.window_bytes",
        )
    return overlap


def score_sets(
    model: Any, tokenizer: Any, evaluation: Windowed, *, batch_size: int, dtype: str,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores one model on every set; `on_batch` is called with the number of windows just scored.

    Returns:
        {"window_bytes", "overlap_bytes", "seconds", "scores": [{"set", "role", "bits_per_byte", "stderr",
        "documents", "bytes", "per_document": {"bits", "bytes"}}]}.
    """
    started = time.monotonic()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # it is masked
    scores = []
    for part, windows in zip(evaluation.sets, evaluation.windows, strict=True):
        nats, sizes = score(model, windows, pad=pad, batch_size=batch_size, dtype=dtype, on_batch=on_batch)
        if not np.isfinite(nats).all():
            raise UserError.of(
                f"the score of the model on {part.name!r}",
                expected="a finite number",
                found="NaN or infinity",
                remedy="Check the base's weights; in float16 some models overflow: use compute_dtype bfloat16",
            )
        value, stderr = bits_per_byte(nats, sizes)
        scores.append(
            {
                "set": part.name,
                "role": part.role,
                "bits_per_byte": value,
                "stderr": stderr,
                "documents": len(part.documents),
                "bytes": int(sizes.sum()),
                # Differences between models are judged document by document, so each document's score is kept.
                "per_document": {"bits": (nats / math.log(2)).tolist(), "bytes": [int(size) for size in sizes]},
            }
        )
    return {
        "window_bytes": evaluation.window_bytes,
        "overlap_bytes": evaluation.overlap_bytes,
        "seconds": time.monotonic() - started,
        "scores": scores,
    }


def sample_texts(
    model: Any, tokenizer: Any, prompts: Sequence[str], iteration: int, dtype: str, *, chat: bool = False
) -> list[dict[str, Any]]:
    """What a model writes after each prompt, or answers to it: [{"iteration", "prompt", "text"}]."""
    write = answer_question if chat else continue_text
    return [
        {"iteration": iteration, "prompt": prompt, "text": write(model, tokenizer, prompt, SAMPLE_TOKENS, dtype)}
        for prompt in prompts
    ]
