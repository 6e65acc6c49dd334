"""Texts as tokens, in a file as they come."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bam_lora.chat import ChatReader, TokenBatch
from bam_lora.store import digest


@dataclass
class Documents:
    """What was written of a source: the tokens and the row of each document, and the size of their text."""

    lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    tokens: int = 0
    size_bytes: int = 0


def write_tokens(
    batches: Iterable[tuple[list[int], list[str]]], chat: ChatReader | None, tokenizer: Any, folder: Path,
    most_tokens: int | None,
) -> Documents:  # fmt: skip
    """Writes tokens as they come, until there are enough: `tokens.bin` (int32), of conversations `mask.bin` (bytes).

    Args:
        batches: Numbers of rows and their texts.
        chat: Makes tokens of conversations, with a mask of those that are trained; None: the texts are tokenised.
        tokenizer: A transformers tokenizer with an EOS token.
        folder: Where the files go.
        most_tokens: How many are enough; None: all.
    """
    kept = Documents()
    with (folder / "tokens.bin").open("wb") as file, (folder / "mask.bin").open("wb") as mask:
        for numbers, texts in batches:
            kept.size_bytes += sum(len(text.encode()) for text in texts)
            batch = chat.take(numbers) if chat else TokenBatch(numbers, tokenised(texts, tokenizer))
            # Not ndarray.tofile: it loses the error when the disk is full.
            file.write(np.fromiter(itertools.chain.from_iterable(batch.documents), dtype=np.int32).tobytes())
            mask.write(bytes(itertools.chain.from_iterable(batch.masks)))
            kept.lengths.extend(map(len, batch.documents))
            kept.rows.extend(batch.rows)
            kept.tokens += sum(map(len, batch.documents))
            if most_tokens is not None and kept.tokens >= most_tokens:
                break
    return kept


def tokenised(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each text, with EOS at the end."""
    return [
        ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        for ids in tokenizer(list(texts), verbose=False)["input_ids"]
    ]


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of everything that decides how a tokenizer splits text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([content, tokenizer.bos_token, tokenizer.eos_token])
