"""Documents that have come before: exact copies by hash, near copies by MinHash with banded LSH.

Near copies: a document is the set of its word 5-grams. Of each of 128 hash functions the smallest value over the set is
kept; two sets agree in a share of these that estimates their Jaccard similarity |A ∩ B| / |A ∪ B| (Broder 1997), with a
standard error of 0.035 at 0.8. Documents that agree in all 8 values of one of 16 bands are compared (two of similarity
0.8 are with a probability of 0.95, of 0.9 with 0.9999), and those of similarity 0.8 or more count as copies (Lee et al.
2022, arXiv 2107.06499). Kept per document: 12 bytes for exact copies, 460 for near ones (16 bits of each minimum: b-bit
minwise hashing, Li and König 2010); while arrays grow, up to twice that for a moment.

Speed on one core (virtual, of a server of 2023), German technical text of 3 KB a document: exact 30,000 documents/s,
near 5,000 documents/s or 15 MB/s, which is several times as fast as tokenising.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bam_lora.sorted_runs import SortedRuns
from bam_lora.word_hashes import Hashes, Words, ngrams, scramble, sequence_hashes

Signatures = npt.NDArray[np.uint16]

SIMILARITY = 0.8
SHINGLE_WORDS = 5
FUNCTIONS = 128
_BANDS = 16
_SEED = 20240719  # part of the method: other functions would find other borderline pairs
_COMPARED_TOGETHER = 1 << 14  # pairs, 4 MB
_GROUP = 256  # documents that are looked up together
_PER_BUCKET = 16  # documents of a bucket that are compared: text from a template would otherwise fill it


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of d documents: hashes (d,) of the whole text, and, for near copies, signatures (d, 128)."""

    exact: Hashes
    signatures: Signatures

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Fingerprints:
        """Those of some of the documents."""
        chosen = np.asarray(rows, np.int64)
        return Fingerprints(self.exact[chosen], self.signatures[chosen])


def fingerprints(texts: Sequence[str], words: Words | None) -> Fingerprints:
    """Fingerprints of d texts. `words` are their words, for near copies; None leaves the signatures empty (d, 0)."""
    exact = np.fromiter((_exact_hash(text) for text in texts), np.uint64, len(texts))
    empty = np.zeros((len(texts), 0), np.uint16)
    return Fingerprints(exact, empty if words is None else signatures(words, exact))


def save(kept: Fingerprints, path: Path) -> None:
    """Writes fingerprints to a `.npz` file."""
    with path.open("wb") as file:
        np.savez(file, exact=kept.exact, signatures=kept.signatures)


def load(path: Path) -> Fingerprints:
    """Reads what `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Fingerprints(file["exact"], file["signatures"])


def join(parts: Sequence[Fingerprints]) -> Fingerprints:
    """The fingerprints of several lots of documents, one after the other."""
    return Fingerprints(
        np.concatenate([part.exact for part in parts]), np.concatenate([part.signatures for part in parts])
    )


def signatures(words: Words, exact: Hashes) -> Signatures:
    """MinHash signatures (d, 128) of d documents.

    A document of fewer words than a shingle has is its sequence of words as a whole; one without words, its exact hash.
    """
    shingles = ngrams(words, SHINGLE_WORDS)
    counts = np.diff(shingles.starts)
    whole = sequence_hashes(words)
    alone = np.flatnonzero(counts == 0)
    hashes = np.insert(shingles.hashes, shingles.starts[:-1][alone], np.where(whole == 0, exact, whole)[alone])
    starts = np.concatenate([[0], np.cumsum(np.maximum(counts, 1))])[:-1]
    factors, offsets = _functions()
    result = np.empty((len(counts), FUNCTIONS), np.uint16)
    if not len(counts):
        return result
    values = np.empty_like(hashes)
    for index in range(FUNCTIONS):
        np.multiply(hashes, factors[index], out=values)
        values += offsets[index]
        least = np.minimum.reduceat(values, starts)
        result[:, index] = (least >> np.uint64(16)).astype(np.uint16)  # the top bits of a minimum are zeros
    return result


class SeenDocuments:
    """The documents kept so far; says of new ones which are copies of them, or of one another."""

    def __init__(self, *, near: bool) -> None:
        self.near = near
        self._exact = SortedRuns()
        self._bands = SortedRuns()
        self._signatures: Signatures = np.zeros((0, FUNCTIONS), np.uint16)
        self._count = 0

    def none(self) -> Fingerprints:
        """The fingerprints of no documents, of the width that is kept here."""
        width = FUNCTIONS if self.near else 0
        return Fingerprints(np.zeros(0, np.uint64), np.zeros((0, width), np.uint16))

    def add(self, kept: Fingerprints) -> None:
        """Enters documents without asking whether they are copies."""
        rows = np.arange(self._count, self._count + len(kept.exact))
        self._exact.add(kept.exact, rows)
        if self.near:
            self._reserve(len(rows))
            self._signatures[rows] = kept.signatures
            self._bands.add(_band_keys(kept.signatures).ravel(), np.repeat(rows, _BANDS))
        self._count += len(rows)

    def screen(self, new: Fingerprints) -> list[str | None]:
        """Of each new document "duplicate", "near_duplicate" or None; those that are none are entered."""
        found: list[str | None] = []
        for start in range(0, len(new.exact), _GROUP):
            found += self._screen_group(new.take(range(start, min(start + _GROUP, len(new.exact)))))
        return found

    def _screen_group(self, new: Fingerprints) -> list[str | None]:
        found: list[str | None] = [None] * len(new.exact)
        for index in np.unique(self._exact.find(new.exact, 1)[0]):
            found[index] = "duplicate"
        first: dict[int, int] = {}
        for index, key in enumerate(new.exact.tolist()):
            if first.setdefault(key, index) != index:
                found[index] = "duplicate"
        if self.near:
            rest = [index for index, reason in enumerate(found) if reason is None]
            for place in self._near_copies(new.signatures[rest]):
                found[rest[place]] = "near_duplicate"
        self.add(new.take([index for index, reason in enumerate(found) if reason is None]))
        return found

    def _near_copies(self, new: Signatures) -> set[int]:
        """Which of the new documents are near copies of one kept before, or of an earlier new one that is none."""
        keys = _band_keys(new)
        asked, rows = self._bands.find(keys.ravel(), _PER_BUCKET)
        pairs = _similar(new, self._signatures, asked // _BANDS, rows)
        copies = set(pairs[0].tolist())
        group = SortedRuns()
        group.add(keys.ravel(), np.repeat(np.arange(len(new)), _BANDS))
        asked, rows = group.find(keys.ravel())
        later = rows < asked // _BANDS
        documents, earlier = _similar(new, new, asked[later] // _BANDS, rows[later])
        for document, before in zip(documents.tolist(), earlier.tolist(), strict=True):  # in order of the documents
            if before not in copies:
                copies.add(document)
        return copies

    def _reserve(self, more: int) -> None:
        if self._count + more > len(self._signatures):
            room = max(2 * len(self._signatures), self._count + more)
            grown = np.zeros((room, FUNCTIONS), np.uint16)
            grown[: self._count] = self._signatures[: self._count]
            self._signatures = grown


def _similar(
    new: Signatures, kept: Signatures, asked: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of the pairs (new, kept), each once, those whose signatures agree in at least `SIMILARITY` of the functions."""
    width = max(len(kept), 1)
    pairs = np.unique(asked * width + rows)
    enough = [np.zeros(0, np.int64)]
    for start in range(0, len(pairs), _COMPARED_TOGETHER):
        part = pairs[start : start + _COMPARED_TOGETHER]
        agreeing = (new[part // width] == kept[part % width]).sum(axis=1)
        enough.append(part[agreeing >= SIMILARITY * FUNCTIONS])
    chosen = np.concatenate(enough)
    return chosen // width, chosen % width


def _band_keys(values: Signatures) -> Hashes:
    """A key (d, 16) of each band's eight values; equal values in another band have another key."""
    halves = np.ascontiguousarray(values).view(np.uint64).reshape(len(values), _BANDS, 2)
    first: Hashes = np.add(halves[:, :, 0], np.arange(_BANDS, dtype=np.uint64))
    return scramble(scramble(first) ^ halves[:, :, 1])


def _functions() -> tuple[Hashes, Hashes]:
    """Factors (odd) and offsets of the hash functions x -> a·x + b mod 2^64."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    drawn = random.integers(0, 2**64, (2, FUNCTIONS), dtype=np.uint64)
    return drawn[0] | np.uint64(1), drawn[1]


def _exact_hash(text: str) -> int:
    """Hash of a text with runs of white space as one space."""
    return int.from_bytes(
        hashlib.blake2b(" ".join(text.split()).encode(errors="surrogatepass"), digest_size=8).digest()
    )
