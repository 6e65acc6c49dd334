"""How well a tokenizer covers a language: what its text costs, and how much of it falls to pieces.

Tokens per word is the tokenizer's *fertility* (Rust et al. 2021, arXiv 2012.15613); its ratio between two languages the
*premium* that one of them pays in training time, context and generation (Petrov et al. 2023, arXiv 2305.15425; Ahia et
al. 2023, arXiv 2305.13707). Bytes do not compare across scripts: a Cyrillic letter has two, a Chinese character three.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bam_lora.word_hashes import UNSPACED, hash_words

SAMPLE_CHARACTERS = 400_000
NOTABLE_PREMIUM = 1.3  # below it is the usual difference between languages of one script
POOR_PREMIUM = 2.0  # half of all compute goes into the tokenizer
POOR_UNKNOWN = 0.001
POOR_FRAGMENTS = 0.05  # a tokenizer that has the script's letters needs fragments for rare signs and emoji only
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNSPACED = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED) + "]")


def report(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """What a tokenizer makes of some texts.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts, not empty; a few hundred thousand characters are enough (see `sample`).

    Returns:
        `documents`, `characters`, `bytes` (UTF-8), `words`, `tokens` (no special ones), `bytes_per_token`,
        `tokens_per_word`, `fragment_share` and `unknown_share` of the tokens, `unspaced` (whether most words are single
        characters of a script without spaces). A fragment is a token that is not a whole character: a byte that
        SentencePiece falls back to (`<0xC3>`), or a piece of a byte-level tokenizer that ends inside one. Numbers are
        null where there is nothing to divide by.
    """
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for row in rows for token in row]
    distinct, counts = np.unique(np.asarray(ids, np.int64), return_counts=True)
    fragments = sum(int(n) for token, n in zip(distinct, counts, strict=True) if _is_fragment(tokenizer, int(token)))
    unknown = int(counts[distinct == tokenizer.unk_token_id].sum()) if tokenizer.unk_token_id is not None else 0
    words = len(hash_words(texts).hashes)
    size_bytes = sum(len(text.encode()) for text in texts)
    unspaced = sum(len(_UNSPACED.findall(text)) for text in texts)
    return {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "bytes": size_bytes,
        "words": words,
        "tokens": len(ids),
        "bytes_per_token": _ratio(size_bytes, len(ids)),
        "tokens_per_word": _ratio(len(ids), words),
        "fragment_share": _ratio(fragments, len(ids)),
        "unknown_share": _ratio(unknown, len(ids)),
        "unspaced": 2 * unspaced > words,
    }


def sample(texts: Iterable[str]) -> list[str]:
    """The first texts, as many as a report needs."""
    chosen: list[str] = []
    size = 0
    for text in texts:
        if size >= SAMPLE_CHARACTERS:
            break
        chosen.append(text[: SAMPLE_CHARACTERS - size])
        size += len(text)
    return chosen


def compare(target: Mapping[str, Any] | None, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """Two reports against each other.

    Args:
        target: Report on text in the language to learn, or None.
        source: The same of the language that the base knows, or None.

    Returns:
        `target`, `source`; `premium`: how many times as many tokens the target takes, and `per`: `word`, or `byte`
        where one of the two is written without spaces; `covered`: `well`, `fairly`, `poorly`, or null if there is no
        target; `advice`: a sentence, or null.
    """
    premium, per = _premium(target, source)
    covered, advice = _judge(target, premium, per) if target else (None, None)
    return {
        "target": dict(target) if target else None,
        "source": dict(source) if source else None,
        "premium": premium,
        "per": per,
        "covered": covered,
        "advice": advice,
    }


def describe(compared: Mapping[str, Any]) -> list[str]:
    """A comparison in lines."""
    lines = []
    for role in ("target", "source"):
        one = compared[role]
        if one and one["tokens"]:
            words = not one["unspaced"] and one["tokens_per_word"] is not None
            per_word = f"{one['tokens_per_word']:.2f} tokens a word, " if words else ""
            lines.append(
                f"{role}: {per_word}{one['bytes_per_token']:.2f} bytes a token, "
                f"{one['fragment_share']:.1%} of the tokens parts of characters, {one['unknown_share']:.1%} unknown"
            )
    return lines + ([compared["advice"]] if compared["advice"] else [])


def _premium(target: Mapping[str, Any] | None, source: Mapping[str, Any] | None) -> tuple[float | None, str | None]:
    if not target or not source or not target["tokens"] or not source["tokens"]:
        return None, None
    if target["unspaced"] or source["unspaced"] or not target["words"] or not source["words"]:
        return source["bytes_per_token"] / target["bytes_per_token"], "byte"
    return target["tokens_per_word"] / source["tokens_per_word"], "word"


def _judge(target: Mapping[str, Any], premium: float | None, per: str | None) -> tuple[str, str | None]:
    if (target["unknown_share"] or 0) >= POOR_UNKNOWN:
        share = f"{target['unknown_share']:.2%} of the target's tokens are unknown to the tokenizer"
        return "poorly", f"{share}: it can neither read nor write them; grow the vocabulary, or use another base"
    costs = f"the target takes {premium:.1f} times as many tokens a {per} as the source" if premium else ""
    if (target["fragment_share"] or 0) >= POOR_FRAGMENTS:
        parts = f"{target['fragment_share']:.0%} of the target's tokens are parts of characters"
        return "poorly", f"{parts}{costs and f', and {costs}'}: new tokens for it are worth having"
    if premium is not None and premium >= NOTABLE_PREMIUM:
        advice = f"{costs}: training, context and generation cost that much more"
        poor = premium >= POOR_PREMIUM
        return ("poorly", f"{advice}; new tokens for it are worth having") if poor else ("fairly", advice)
    return "well", None


def _is_fragment(tokenizer: Any, token: int) -> bool:
    byte = _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token)))
    if byte is not None:
        return int(byte[1], 16) >= 0x80  # below it is a character of its own, such as a line break
    return "\ufffd" in tokenizer.decode([token])


def _ratio(amount: float, of: float) -> float | None:
    return amount / of if of else None
