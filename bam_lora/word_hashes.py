"""Words of many texts as 64-bit hashes, in numpy: what duplicates and contamination are found by.

A word is a run of letters, digits and combining marks, in lower case and Unicode's composed form (NFC); white space and
punctuation only part words. Characters of scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer,
Burmese, Tibetan) are a word each. Legend: n words of all texts in a row, t texts, g n-grams.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]

_TABLE = 0x20000  # code points looked up; those above are ideographs, or not assigned
UNSPACED = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
)  # fmt: skip
_CHUNK_CHARACTERS = 1 << 20  # some 40 bytes of memory each
_LETTERS = 256  # places in a word that are told apart
_MIX = np.uint64(0x9E3779B97F4A7C15)
_STEP = np.uint64(0xD1342543DE82EF95)


@dataclass(frozen=True)
class Words:
    """The words of t texts: `hashes` (n,), and `starts` (t + 1,), where each text's words begin, the end last."""

    hashes: Hashes
    starts: Offsets


def hash_words(texts: Sequence[str]) -> Words:
    """The words of each text, hashed; equal words have equal hashes, on every machine and in every session.

    Memory is some 40 MB beside the result (8 bytes a word), however long a text is.
    """
    hashes: list[Hashes] = [np.zeros(0, np.uint64)]
    counts = np.zeros(len(texts) + 1, np.int64)
    for first, group in _groups(texts):
        found, numbers = _hash_group(group)
        hashes.append(found)
        counts[first + 1 : first + 1 + len(group)] += np.bincount(numbers, minlength=len(group))
    return Words(np.concatenate(hashes), np.cumsum(counts))


def ngrams(words: Words, n: int) -> Words:
    """The word n-grams of each text, hashed (g,); a text of fewer words has none."""
    count = len(words.hashes) - n + 1
    owner = np.repeat(np.arange(len(words.starts) - 1), np.diff(words.starts))
    if count <= 0:
        return Words(np.zeros(0, np.uint64), np.zeros_like(words.starts))
    hashes = np.zeros(count, np.uint64)
    for place in range(n):
        hashes *= _STEP
        hashes += words.hashes[place : place + count]
    inside = owner[:count] == owner[n - 1 :]
    per_text = np.bincount(owner[:count][inside], minlength=len(words.starts) - 1)
    return Words(scramble(hashes[inside]), np.concatenate([[0], np.cumsum(per_text)]))


def sequence_hashes(words: Words) -> Hashes:
    """One hash (t,) of each text's whole sequence of words; 0 for a text without words."""
    place = np.arange(len(words.hashes)) - np.repeat(words.starts[:-1], np.diff(words.starts))
    weighed = scramble(words.hashes ^ (place.astype(np.uint64) * _MIX))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(weighed, dtype=np.uint64)])
    result: Hashes = sums[words.starts[1:]] - sums[words.starts[:-1]]
    return result


def scramble(hashes: Hashes) -> Hashes:
    """Spreads every bit of a hash over all of them (the finaliser of MurmurHash3)."""
    hashes = hashes ^ (hashes >> np.uint64(33))
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xC4CEB9FE1A85EC53)
    hashes ^= hashes >> np.uint64(33)
    return hashes


def _groups(texts: Sequence[str]) -> list[tuple[int, list[str]]]:
    """Texts in groups of about a chunk, with the number of the first; a longer text is cut where white space is."""
    groups: list[tuple[int, list[str]]] = []
    size = _CHUNK_CHARACTERS + 1  # no group has room yet
    for number, text in enumerate(texts):
        text = unicodedata.normalize("NFC", text)
        while len(text) > _CHUNK_CHARACTERS:
            cut = max(text.rfind(mark, 1, _CHUNK_CHARACTERS) for mark in " \n")
            cut = cut if cut > 0 else _CHUNK_CHARACTERS
            groups.append((number, [text[:cut]]))
            text, size = text[cut:], _CHUNK_CHARACTERS + 1
        if size + len(text) > _CHUNK_CHARACTERS:
            groups.append((number, []))
            size = 0
        groups[-1][1].append(text)
        size += len(text) + 1
    return groups


def _hash_group(texts: Sequence[str]) -> tuple[Hashes, Offsets]:
    """Hashes of all words (n,), and of which text each is (n,)."""
    kinds, lower, mix = _tables()
    data = "\n".join(texts).encode("utf-32-le", errors="surrogatepass")
    points = np.minimum(np.frombuffer(data, np.uint32), _TABLE - 1)
    kind = kinds[points]
    inside = kind > 0
    begins = inside.copy()
    begins[1:] &= (kind[1:] == 2) | (kind[:-1] != 1)
    begin = np.flatnonzero(begins[inside])
    letters = lower[points[inside]]
    if not len(begin):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    lengths = np.diff(np.append(begin, len(letters)))
    place = np.arange(len(letters)) - np.repeat(begin, lengths)
    values = mix[letters] * _place_factors()[place % _LETTERS]
    ends = np.cumsum([len(text) + 1 for text in texts])
    return scramble(np.add.reduceat(values, begin)), np.searchsorted(ends, np.flatnonzero(begins), side="right")


@functools.cache
def _tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32], Hashes]:
    """Per code point: no word, part of one, or one by itself (0, 1, 2); its lower case; a random number."""
    kinds = np.zeros(_TABLE, np.uint8)
    lower = np.arange(_TABLE, dtype=np.uint32)
    for point in range(_TABLE):
        character = chr(point)
        if character.isalnum() or unicodedata.category(character)[0] == "M":
            kinds[point] = 1
            small = character.lower()
            if len(small) == 1 and ord(small) < _TABLE:
                lower[point] = ord(small)
    for first, last in UNSPACED:
        kinds[first : last + 1] *= 2
    kinds[_TABLE - 1] = 2
    return kinds, lower, scramble(np.arange(1, _TABLE + 1, dtype=np.uint64) * _MIX)


@functools.cache
def _place_factors() -> Hashes:
    return scramble(np.arange(1, _LETTERS + 1, dtype=np.uint64) * _STEP) | np.uint64(1)
