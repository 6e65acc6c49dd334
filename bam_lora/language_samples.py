"""Text of the target and the source language, to judge a tokenizer by."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bam_lora import tokenizer_report
from bam_lora.chat import message_column
from bam_lora.chat_rows import read_row
from bam_lora.contamination import HeldOutSet
from bam_lora.recipe import Recipe
from bam_lora.sources import OpenSource, TextSource, open_source, read_rows, read_texts, text_source

_DOCUMENTS = 2000


def compare_languages(recipe: Recipe | None, tokenizer: Any, held_out: Sequence[HeldOutSet]) -> dict[str, Any]:
    """The tokenizer report on target and source (`tokenizer_report.compare`).

    Args:
        recipe: A recipe whose data can be read: a role without evaluation sets is judged by the first documents there.
            None leaves it out.
        tokenizer: A transformers tokenizer.
        held_out: The evaluation sets.
    """
    data = recipe.data if recipe is not None else None
    reports = []
    for role in ("target", "source"):
        texts = [
            text for part in held_out if part.role == role and part.kind == "evaluation" for text in part.documents
        ]
        if not texts and data is not None:
            sources = data.target if role == "target" else data.replay
            share = tokenizer_report.SAMPLE_CHARACTERS // max(len(sources), 1)
            texts = [text for source in sources for text in first_texts(text_source(source), share)]
        reports.append(tokenizer_report.report(tokenizer, tokenizer_report.sample(texts)) if texts else None)
    return tokenizer_report.compare(*reports)


def first_texts(where: TextSource, characters: int) -> list[str]:
    """The first texts of a source, as many as hold so many characters; none where those that it chooses come late.

    Raises:
        UserError: If it cannot be read.
    """
    return [text for _, text in first_rows(where, characters, may_be_empty=True)]


def first_rows(where: TextSource, characters: int, *, may_be_empty: bool = False) -> list[tuple[int, str]]:
    """The same with their row numbers; unless it may be empty, it is an error where none is found soon."""

    def until_full(rows: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        size = 0
        for number, text in rows:
            yield number, text
            size += len(text)
            if size >= characters:
                return

    with tempfile.TemporaryDirectory() as cache:
        opened = open_source(where, streaming=True, cache=Path(cache))
        if where.where is not None:
            opened.sample(may_be_empty=may_be_empty)
        texts = _said(where, opened) if where.mode == "chat" else read_texts(where, opened)
        return list(itertools.islice(until_full(texts), _DOCUMENTS))


def _said(where: TextSource, opened: OpenSource) -> Iterator[tuple[int, str]]:
    """Row numbers and what is said in the conversations of a source."""
    for number, row in read_rows(where, opened):
        yield number, read_row(row, f"{where.path}, row {number + 1}", message_column(where)).text
