"""A byte-level BPE tokenizer of any vocabulary and text in its words: made here, as nothing can be fetched.

Words are of one to four syllables, a consonant and a vowel each. As pairs of letters only syllables merge, so that
every word becomes the token that it is meant to be. How often a word comes goes by its rank, as in a language; there
is nothing else to be learned.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SPACE = "Ġ"  # a space, as byte-level BPE writes it
_SYLLABLES = ["".join(pair) for pair in itertools.product("bcdfghjklmnpqrstvwxyz", "aeiou")]
_SPECIAL = ("<unk>", "<s>", "</s>")
_MEDIAN_WORDS = 600  # of a document
_SPREAD = 1.0  # of its logarithm


def write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Writes a tokenizer of as many tokens as a config's `vocab_size`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = config["vocab_size"] - len(letters) - len(_SPECIAL)
    merges = list(itertools.islice(_merges(), room))
    tokens = [*letters, *("".join(pair) for pair in merges), *_SPECIAL]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **names,
                "model_max_length": config["max_position_embeddings"]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs in the order of their rank: syllables, the first of a word, words of two, three and four."""
    yield from ((one[0], one[1]) for one in _SYLLABLES)
    known = [_SPACE]
    while True:
        known = [one + syllable for one in known for syllable in _SYLLABLES]
        yield from ((one[:-2], one[-2:]) for one in known)


def words(vocabulary: int) -> list[str]:
    """All words that are one token of a tokenizer of this many, with their space before them."""
    room = vocabulary - len(pre_tokenizers.ByteLevel.alphabet()) - len(_SPECIAL)
    merged = ("".join(pair) for pair in itertools.islice(_merges(), room))
    return [token.replace(_SPACE, " ") for token in merged if token.startswith(_SPACE)]


def write_text(path: Path, vocabulary: int, tokens: int, seed: int) -> None:
    """JSON lines with a column `text`: documents of at least so many words in all, one token each."""
    known = np.array(words(vocabulary))
    generator = np.random.Generator(np.random.PCG64(seed))
    share = 1.0 / np.arange(1, len(known) + 1)  # Zipf
    limits = np.cumsum(share) / share.sum()
    with path.open("w", encoding="utf-8") as file:
        while tokens > 0:
            length = max(8, round(_MEDIAN_WORDS * float(np.exp(_SPREAD * generator.standard_normal()))))
            ranks = np.minimum(np.searchsorted(limits, generator.random(length)), len(known) - 1)
            file.write(json.dumps({"text": "".join(known[ranks])}) + "\n")
            tokens -= length
