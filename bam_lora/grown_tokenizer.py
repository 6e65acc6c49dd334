"""A tokenizer with new tokens at its end: its files, and what it does to text."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bam_lora.base import load_tokenizer
from bam_lora.checkpoint import files_like
from bam_lora.errors import UserError
from bam_lora.store import read_json, write_json
from bam_lora.token_learning import NewToken

TOKENIZER_JSON = "tokenizer.json"
# What describes the tokenizer beside its vocabulary. Others, such as tokenizer.model, hold the old one.
_KEPT = (
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
)


def open_backend(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a model folder, or None if it has no tokenizer.json."""
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_JSON
    return Tokenizer.from_file(str(path)) if path.is_file() else None


def write_tokenizer(base: Path, learned: Sequence[NewToken], folder: Path) -> int:
    """Writes a base's tokenizer with new tokens.

    The new ones follow every number in use; their merges follow the old merges. Files that only the old vocabulary is
    in, such as tokenizer.model, are left behind.

    Args:
        base: The base's folder, with a byte-pair tokenizer in tokenizer.json.
        learned: The new tokens, in order.
        folder: Gets the files.

    Returns:
        The number of the first new token.
    """
    content = read_json(base / TOKENIZER_JSON)
    model, added = content["model"], content.get("added_tokens") or []
    vocabulary: dict[str, int] = model["vocab"]
    first: int = 1 + max([*vocabulary.values(), *(token["id"] for token in added)])
    numbers = set(vocabulary.values())
    # Special tokens stand beside the vocabulary; where new ones follow them, they would be holes in it.
    vocabulary.update({one["content"]: one["id"] for one in added if one["id"] not in numbers})
    vocabulary.update({one.token: first + place for place, one in enumerate(learned)})
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    pairs = [one.pair for one in learned if one.pair is not None]
    model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in pairs]
    for name in files_like(base, _KEPT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, folder / name)
    write_json(folder / TOKENIZER_JSON, content)
    return first


def check_tokenizer(base: Path, folder: Path, learned: Sequence[NewToken], first: int, texts: Iterable[str]) -> None:
    """Checks that transformers loads a grown tokenizer as it was written, and that it keeps every text.

    Args:
        base: The base's folder.
        folder: The grown tokenizer's.
        learned: The new tokens.
        first: The number of the first one.
        texts: Text to try.

    Raises:
        UserError: If a token has another number, or a text does not come back as the base's tokenizer gives it back.
    """
    before, after = load_tokenizer(base), load_tokenizer(folder)
    wanted = {**before.get_vocab(), **{one.token: first + place for place, one in enumerate(learned)}}
    if after.get_vocab() != wanted:
        raise UserError.of(
            f"the tokenizer of {base}",
            expected=f"{len(wanted)} tokens once it is grown, the old ones with their numbers",
            found=f"{len(after.get_vocab())} or others, as {type(after).__name__} loads it",
            remedy="Leave out `vocabulary`",
        )
    for text in texts:
        if _round_trip(after, text) != _round_trip(before, text):
            raise UserError.of(
                f"the grown tokenizer of {base}",
                expected="the text back that the old one gives back",
                found=f"{_round_trip(after, text)[:60]!r} for {text[:60]!r}",
                remedy="Leave out `vocabulary`",
            )


def _round_trip(tokenizer: Any, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def token_count(tokenizer: Any, texts: Sequence[str]) -> int:
    """Tokens of some texts, without special ones.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts.
    """
    return sum(map(len, tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]))


def changed_share(before: Any, after: Any, words: Counter[str]) -> float:
    """The share of a text's words that two `tokenizers.Tokenizer` split in different ways; words from `count_words`."""
    total = changed = 0
    for word, count in words.items():
        one, two = ([token.value for token in tokenizer.model.tokenize(word)] for tokenizer in (before, after))
        total += count
        changed += count * (one != two)
    return changed / total if total else 0.0


def read_learned(path: Path) -> list[NewToken]:
    """The tokens that `learned_record` wrote."""
    return [
        NewToken(one["token"], tuple(one["pair"]) if one["pair"] else None, tuple(one["pieces"]), one["saved"])
        for one in json.loads(path.read_text(encoding="utf-8"))["tokens"]
    ]


def learned_record(learned: Sequence[NewToken]) -> list[dict[str, Any]]:
    """New tokens as JSON values."""
    return [
        {"token": one.token, "pair": list(one.pair) if one.pair else None, "pieces": list(one.pieces),
         "saved": one.saved}
        for one in learned
    ]  # fmt: skip
