"""Evaluation text that is in the training text: a score on it would measure memory.

A document of an evaluation (or selection) set counts as found in a training document if the two share at least half of
the word 13-grams of the shorter one (13-grams: Brown et al. 2020, arXiv 2005.14165, appendix C), or if the normalised
texts are equal, which finds documents of fewer than 13 words. So it finds an evaluation document inside a longer page,
and a passage of it alone; a shared sentence of boilerplate does not count. Beside that, the share of a set's 13-grams
that stand anywhere in the training text is reported. Memory: some 30 bytes a word of the evaluation text; the training
text streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bam_lora.sorted_runs import SortedRuns
from bam_lora.store import digest
from bam_lora.word_hashes import Words, hash_words, ngrams, sequence_hashes

NGRAM_WORDS = 13
SHARE = 0.5
Rows = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class HeldOutSet:
    """Documents that should not be trained on: a named set of the evaluation or of the selection."""

    name: str
    role: str  # "target" or "source"
    documents: tuple[str, ...]
    kind: str = "evaluation"  # or "selection"


@dataclass(frozen=True)
class Matches:
    """What a batch of training documents shares with the held-out ones.

    `training` and `held_out` (m,) are the pairs found; `seen` says of every held-out 13-gram whether it is there.
    """

    training: Rows
    held_out: Rows
    seen: Flags


class HeldOutText:
    """The held-out documents of all sets, indexed, numbered through set after set."""

    def __init__(self, sets: Sequence[HeldOutSet]) -> None:
        self.sets = tuple(sets)
        self.key = digest([[part.kind, part.name, part.role, list(part.documents)] for part in sets])
        texts = [text for part in sets for text in part.documents]
        words = hash_words(texts)
        grams = ngrams(words, NGRAM_WORDS)
        self._keys, numbers = np.unique(grams.hashes, return_inverse=True)
        pairs = np.unique(_owners(grams) * max(len(self._keys), 1) + numbers)  # a gram once a document
        self._documents, self._grams = pairs // max(len(self._keys), 1), pairs % max(len(self._keys), 1)
        self._distinct = np.bincount(self._documents, minlength=len(texts))
        self._by_gram = SortedRuns()
        self._by_gram.add(self._grams.astype(np.uint64), self._documents)
        self._whole = SortedRuns()
        whole = sequence_hashes(words)
        self._whole.add(whole[whole != 0], np.flatnonzero(whole))

    @property
    def documents(self) -> int:
        """Number of documents of all sets."""
        return len(self._distinct)

    @property
    def ngrams(self) -> int:
        """Number of different 13-grams."""
        return len(self._keys)

    def match(self, words: Words) -> Matches:
        """Which of some documents, given by their words, hold which held-out documents, or passages of them."""
        whole = sequence_hashes(words)
        equal, found = self._whole.find(whole)
        equal, found = equal[whole[equal] != 0], found[whole[equal] != 0]
        seen = np.zeros(self.ngrams, np.bool_)
        grams = ngrams(words, NGRAM_WORDS)
        if not self.ngrams or not len(grams.hashes):
            return Matches(equal, found, seen)
        place = np.searchsorted(self._keys, grams.hashes)
        hits = np.flatnonzero(self._keys[np.minimum(place, self.ngrams - 1)] == grams.hashes)
        seen[place[hits]] = True
        shared = np.unique(_owners(grams)[hits] * self.ngrams + place[hits])  # a gram once a document
        asked, documents = self._by_gram.find((shared % self.ngrams).astype(np.uint64))
        many = len(self._distinct)
        pairs, counts = np.unique((shared // self.ngrams)[asked] * many + documents, return_counts=True)
        distinct = _distinct_grams(grams, np.unique(pairs // many), len(words.starts) - 1)
        shorter = np.minimum(distinct[pairs // many], self._distinct[pairs % many])
        chosen = np.unique(np.concatenate([pairs[counts >= SHARE * shorter], equal * many + found]))
        return Matches(chosen // many, chosen % many, seen)

    def place(self, document: int) -> tuple[int, int]:
        """The set of a held-out document and its number there, both from 0."""
        ends = np.cumsum([len(part.documents) for part in self.sets])
        index = int(np.searchsorted(ends, document, side="right"))
        return index, document - int(ends[index] - len(self.sets[index].documents))

    def describe(self, found: Flags, seen: Flags) -> list[dict[str, object]]:
        """Per set: how many of its documents were found (e documents), and the share of its 13-grams that was seen."""
        result: list[dict[str, object]] = []
        start = 0
        for part in self.sets:
            stop = start + len(part.documents)
            grams = np.unique(self._grams[(self._documents >= start) & (self._documents < stop)])
            result.append(
                {
                    "set": part.name,
                    "kind": part.kind,
                    "role": part.role,
                    "documents": len(part.documents),
                    "found": int(found[start:stop].sum()),
                    "ngram_share": float(seen[grams].mean()) if len(grams) else None,
                }
            )
            start = stop
        return result


def _owners(grams: Words) -> Rows:
    return np.repeat(np.arange(len(grams.starts) - 1), np.diff(grams.starts))


def _distinct_grams(grams: Words, wanted: Rows, texts: int) -> Rows:
    """Number (t,) of different n-grams of the texts in `wanted`; 0 for the others, which nobody asks about."""
    result = np.zeros(texts, np.int64)
    for text in wanted:
        result[text] = len(np.unique(grams.hashes[grams.starts[text] : grams.starts[text + 1]]))
    return result
