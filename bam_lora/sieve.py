"""What is kept of the training text: filters, held-out text, copies; with a count for every reason.

A sieve goes through the sources of one part of a run, target before replay, so that of two copies the target's is kept.
Rules apply in the order filters, contamination, copies; a document is counted under the first that drops it. So the
rows read are the documents kept plus those dropped, reason by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bam_lora.contamination import HeldOutText
from bam_lora.duplicates import Fingerprints, SeenDocuments, fingerprints, join, load, save
from bam_lora.errors import UserError
from bam_lora.store import digest
from bam_lora.terminal_text import escaped
from bam_lora.text_filters import FilterRules, broken_rule
from bam_lora.word_hashes import Words, hash_words

FINGERPRINTS = "fingerprints.npz"
_HELD_OUT = "held_out.npz"
_KEPT_ROWS = "kept_rows.npy"
_EXCERPT_CHARACTERS = 90
EMPTY, CONTAMINATED, NOT_WANTED = "empty", "contaminated", "where"


@dataclass(frozen=True)
class Screening:
    """What to do with the text; the default keeps all of it.

    Attributes:
        deduplicate: "none", "exact" or "near".
        contamination: "warn", "drop" or "error", for training documents that hold held-out text.
        held_out: The text that should not be trained on, or None.
        earlier: Fingerprints of what earlier parts of the run were trained on.
    """

    deduplicate: str = "none"
    contamination: str = "warn"
    held_out: HeldOutText | None = None
    earlier: tuple[Fingerprints, ...] = ()


class Sieve:
    """Screens the documents of several sources, one source after the other."""

    def __init__(self, screening: Screening) -> None:
        self.screening = screening
        self._seen = None if screening.deduplicate == "none" else SeenDocuments(near=screening.deduplicate == "near")
        held_out = screening.held_out
        self._found = np.zeros(held_out.documents if held_out else 0, np.bool_)
        self._ngrams = np.zeros(held_out.ngrams if held_out else 0, np.bool_)
        for part in screening.earlier:
            assert self._seen is not None
            self._seen.add(part)
        settings = [screening.deduplicate, screening.contamination, held_out.key if held_out else None]
        self.key = digest([settings, [fingerprint_key(part) for part in screening.earlier]])

    def source(self, name: str, rules: FilterRules) -> SourceSieve:
        """The sieve for the next source."""
        return SourceSieve(self.screening, self._seen, name, rules)

    def take_over(self, folder: Path, key: str, *, screened: bool) -> None:
        """Goes on from a source that lies in its folder: what the next source keeps depends on it.

        Args:
            folder: Where its `SourceSieve` was closed.
            key: The key of the folder.
            screened: Whether this sieve has just screened it, so that its fingerprints are entered already.
        """
        self.key = digest([self.key, key])
        if self._seen is not None and not screened:
            self._seen.add(load(folder / FINGERPRINTS))
        if self.screening.held_out is not None:
            with np.load(folder / _HELD_OUT, allow_pickle=False) as file:
                self._found |= file["found"]
                self._ngrams |= file["ngrams"]

    def keep_fingerprints(self, folder: Path, sources: Sequence[Path], facts: Sequence[Mapping[str, Any]]) -> None:
        """Writes the fingerprints of the target text that is trained on, for an extension of the run.

        Replay is left out: an extension reads it from its beginning again.

        Args:
            folder: Where to.
            sources: Folders of the sources.
            facts: `role` and `next_row` of each: rows before that are used.
        """
        if self._seen is not None:
            used = [self._seen.none()]
            for source, fact in zip(sources, facts, strict=True):
                if fact["role"] == "target":
                    rows = np.load(source / _KEPT_ROWS, allow_pickle=False)
                    used.append(load(source / FINGERPRINTS).take(np.flatnonzero(rows < fact["next_row"])))
            save(join(used), folder / FINGERPRINTS)

    def contamination(self) -> list[dict[str, Any]]:
        """Per held-out set: `set`, `kind`, `role`, `documents`, `found` and `ngram_share` (see `HeldOutText`)."""
        held_out = self.screening.held_out
        return held_out.describe(self._found, self._ngrams) if held_out else []


class SourceSieve:
    """Screens one source, batch by batch, and counts."""

    def __init__(self, screening: Screening, seen: SeenDocuments | None, name: str, rules: FilterRules) -> None:
        self._screening, self._seen, self._name, self._rules = screening, seen, name, rules
        self._rows = 0
        self._contaminated = 0
        self._example: dict[str, Any] | None = None
        self._kept: list[Fingerprints] = []
        self._kept_rows: list[int] = []
        held_out = screening.held_out
        self._found = np.zeros(held_out.documents if held_out else 0, np.bool_)
        self._ngrams = np.zeros(held_out.ngrams if held_out else 0, np.bool_)
        self.dropped: Counter[str] = Counter()

    def batches(self, batches: Iterable[tuple[list[int], list[str]]]) -> Iterator[tuple[list[int], list[str]]]:
        """Row numbers and texts, without what is dropped; batches of which nothing is left are passed over."""
        for numbers, texts in batches:
            kept = self.keep(numbers, texts)
            if kept:
                yield [numbers[index] for index in kept], [texts[index] for index in kept]

    def keep(self, numbers: Sequence[int], texts: Sequence[str]) -> list[int]:
        """Which of some documents are kept, as places in the lists.

        Args:
            numbers: The documents' rows in the source.
            texts: Their texts.
        """
        self._rows += len(texts)
        rules = self._rules
        broken = [broken_rule(text, rules) for text in texts] if rules.on else [None] * len(texts)
        kept = self._sort_out(range(len(texts)), broken)
        needs_words = self._screening.held_out is not None or (self._seen is not None and self._seen.near)
        words = hash_words([texts[index] for index in kept]) if needs_words else None
        if self._screening.held_out is not None and words is not None:
            held = self._hold(self._screening.held_out, words, [(numbers[index], texts[index]) for index in kept])
            kept = self._sort_out(kept, held)
            if any(held):
                words = hash_words([texts[index] for index in kept])
        if self._seen is not None:
            new = fingerprints([texts[index] for index in kept], words if self._seen.near else None)
            copies = self._seen.screen(new)
            self._kept.append(new.take([place for place, reason in enumerate(copies) if reason is None]))
            kept = self._sort_out(kept, copies)
            self._kept_rows += [numbers[index] for index in kept]
        return kept

    def close(self, folder: Path, empty_rows: int, left_out: int = 0) -> dict[str, Any]:
        """Writes what later sources need into the source's folder, and gives its counts.

        Args:
            folder: The source's.
            empty_rows: Rows without text.
            left_out: Rows that its `where` left out.

        Returns:
            `rows` read, `dropped` by reason, `contaminated` (documents with held-out text, whether dropped or not) and
            an `example` of these.

        Raises:
            UserError: If held-out text was found and that is to be an error.
        """
        if self._example is not None and self._screening.contamination == "error":
            raise UserError.of(
                self._name,
                expected="no text of the evaluation or selection sets",
                found=f"such text in {self._contaminated:,} of its documents: {describe_example(self._example)}",
                remedy="Say data.contamination: drop to leave them out of the training, or warn to train on them",
            )
        if self._seen is not None:
            save(join([self._seen.none(), *self._kept]), folder / FINGERPRINTS)
            np.save(folder / _KEPT_ROWS, np.asarray(self._kept_rows, np.int64))
        if self._screening.held_out is not None:
            with (folder / _HELD_OUT).open("wb") as file:
                np.savez(file, found=self._found, ngrams=self._ngrams)
        self.dropped += Counter({EMPTY: empty_rows})
        if left_out:
            self.dropped[NOT_WANTED] += left_out
        counts = {"rows": self._rows + empty_rows + left_out, "dropped": dict(sorted(self.dropped.items()))}
        return {**counts, "contaminated": self._contaminated, "example": self._example}

    def describe_dropped(self) -> str:
        """What was dropped so far, in words; "" for nothing."""
        return describe_dropped(self._rows, self.dropped)

    def _hold(self, held_out: HeldOutText, words: Words, documents: Sequence[tuple[int, str]]) -> list[str | None]:
        """Notes which of the documents hold held-out text; the reason to drop them, if they are to be dropped."""
        matches = held_out.match(words)
        self._found[matches.held_out] = True
        self._ngrams |= matches.seen
        places = sorted(set(matches.training.tolist()))
        self._contaminated += len(places)
        if places and self._example is None:
            index, document = held_out.place(int(matches.held_out[0]))
            number, text = documents[int(matches.training[0])]
            part = held_out.sets[index]
            excerpt = " ".join(text.split())[:_EXCERPT_CHARACTERS]
            self._example = {
                "row": number, "set": part.name, "kind": part.kind, "document": document, "excerpt": excerpt,
            }  # fmt: skip
        reasons: list[str | None] = [None] * len(documents)
        if self._screening.contamination == "drop":
            for place in places:
                reasons[place] = CONTAMINATED
        return reasons

    def _sort_out(self, places: Sequence[int], reasons: Sequence[str | None]) -> list[int]:
        self.dropped += Counter(reason for reason in reasons if reason is not None)
        return [place for place, reason in zip(places, reasons, strict=True) if reason is None]


def fingerprint_key(kept: Fingerprints) -> str:
    """Hash of a part's fingerprints."""
    return digest(kept.exact.tolist())


def describe_example(example: dict[str, Any]) -> str:
    """An example of contamination in words."""
    return (
        f"row {example['row'] + 1} holds document {example['document'] + 1} of {example['kind']} set "
        f"{example['set']!r}, “{escaped(example['excerpt'])}…”"
    )


def describe_dropped(rows: int, dropped: Mapping[str, int]) -> str:
    """Counts of what was dropped in words, or "" if nothing was; empty rows are no loss and are not named."""
    counts = {reason: count for reason, count in dropped.items() if reason != EMPTY and count}
    if not counts:
        return ""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
    return f"{sum(counts.values()):,} of {rows:,} rows dropped ({reasons})"
