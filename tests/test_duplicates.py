"""Copies: exact ones by whitespace only, near ones by their Jaccard similarity, in whatever batches."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_lora.duplicates import SIMILARITY, SeenDocuments, fingerprints, join, load, save, signatures
from bam_lora.sorted_runs import SortedRuns
from bam_lora.word_hashes import hash_words


def screen(seen: SeenDocuments, texts: list[str]) -> list[str | None]:
    return seen.screen(fingerprints(texts, hash_words(texts) if seen.near else None))


def story(seed: int, words: int = 300) -> list[str]:
    rng = random.Random(seed)
    return [f"wort{rng.randrange(2000)}" for _ in range(words)]


def changed(words: list[str], count: int) -> list[str]:
    """`count` words replaced at equal distances: each takes five shingles with it."""
    copy = list(words)
    for index in range(count):
        copy[10 + index * (len(words) // count)] = f"anders{index}"
    return copy


def jaccard(first: list[str], second: list[str]) -> float:
    sets = [{tuple(words[start : start + 5]) for start in range(len(words) - 4)} for words in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_exact_copies_differ_in_white_space_only() -> None:
    texts = ["Ein Satz.", "ein Satz.", " Ein\n Satz. ", "Ein Satz", "x < 0", "x > 0", "Ein Satz."]
    assert screen(SeenDocuments(near=False), texts) == [None, None, "duplicate", None, None, None, "duplicate"]


@pytest.mark.parametrize("near", [False, True])
def test_batches_make_no_difference(near: bool) -> None:
    stories = [story(index) for index in range(40)]
    texts = [" ".join(words) for words in [*stories, *stories[:7], *(changed(words, 3) for words in stories[7:20])]]
    random.Random(1).shuffle(texts)
    whole = screen(SeenDocuments(near=near), texts)
    seen = SeenDocuments(near=near)
    assert [reason for start in range(0, len(texts), 7) for reason in screen(seen, texts[start : start + 7])] == whole
    assert whole.count("duplicate") == 7
    assert whole.count("near_duplicate") == (13 if near else 0)


def test_signatures_estimate_the_jaccard_similarity() -> None:
    errors = []
    for seed in range(40):
        words = story(seed)
        other = changed(words, 1 + seed % 20)
        values = signatures(hash_words([" ".join(words), " ".join(other)]), np.zeros(2, np.uint64))
        errors.append(float((values[0] == values[1]).mean()) - jaccard(words, other))
    assert abs(np.mean(errors)) < 0.015  # standard error 0.035 / sqrt(40)
    assert np.std(errors) < 0.06


def test_near_copies_are_those_above_the_similarity() -> None:
    close, far = 0, 0
    for seed in range(30):
        words = story(seed)
        near, other = changed(words, 3), changed(words, 20)
        assert jaccard(words, near) > SIMILARITY + 0.09
        assert jaccard(words, other) < SIMILARITY - 0.2
        seen = SeenDocuments(near=True)
        assert screen(seen, [" ".join(words)]) == [None]
        close += screen(seen, [" ".join(near)]) == ["near_duplicate"]
        far += screen(seen, [" ".join(other)]) == ["near_duplicate"]
    assert (close, far) == (30, 0)


def test_a_copy_of_a_dropped_document_is_compared_with_those_that_were_kept() -> None:
    words = story(0)
    chain = [words, changed(words, 5), changed(changed(words, 5)[::-1], 14)[::-1]]
    assert jaccard(chain[0], chain[1]) > 0.82
    assert jaccard(chain[0], chain[2]) < 0.7
    assert screen(SeenDocuments(near=True), [" ".join(part) for part in chain]) == [None, "near_duplicate", None]


def test_short_texts_are_compared_whole() -> None:
    texts = ["Guten Morgen", "Guten Abend", "guten morgen!", "...", "!!!", "..."]
    assert screen(SeenDocuments(near=True), texts) == [None, None, "near_duplicate", None, None, "duplicate"]
    assert screen(SeenDocuments(near=True), []) == []


def test_kept_fingerprints_go_on_in_another_session(tmp_path: Path) -> None:
    first, second = [" ".join(story(index)) for index in range(3)], [" ".join(story(index)) for index in range(3, 5)]
    parts = [fingerprints(texts, hash_words(texts)) for texts in (first, second)]
    save(join(parts), tmp_path / "kept.npz")
    seen = SeenDocuments(near=True)
    seen.add(load(tmp_path / "kept.npz").take(range(4)))
    texts = [first[2], second[0], second[1], " ".join(changed(story(0), 2))]
    assert screen(seen, texts) == ["duplicate", "duplicate", None, "near_duplicate"]


def test_text_from_a_template_is_not_compared_pair_by_pair() -> None:
    """Thousands of documents in one bucket: all pairs would be 16 million comparisons."""
    opening = " ".join(f"gleich{index}" for index in range(60))
    texts = [f"{opening} " + " ".join(f"eigen{number}x{index}" for index in range(40)) for number in range(4000)]
    values = fingerprints(texts, hash_words(texts))
    started = time.process_time()
    assert set(SeenDocuments(near=True).screen(values)) == {None}
    assert time.process_time() - started < 30  # a second or two; minutes if it grew with the square


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=9), max_size=9),
    st.lists(st.integers(0, 12), max_size=9),
)
def test_sorted_runs_find_what_was_added(batches: list[list[tuple[int, int]]], asked: list[int]) -> None:
    runs = SortedRuns()
    for batch in batches:
        pairs = np.array(batch, np.int64).reshape(-1, 2)
        runs.add(pairs[:, 0].astype(np.uint64), pairs[:, 1])
    places, rows = runs.find(np.array(asked, np.uint64))
    entries = [entry for batch in batches for entry in batch]
    expected = sorted((place, row) for place, key in enumerate(asked) for entered, row in entries if entered == key)
    assert sorted(zip(places.tolist(), rows.tolist(), strict=True)) == expected


def test_real_text_at_its_size(bench_data: Path) -> None:
    """12 MB of German: what is planted is found, and nothing else; the time is printed, not judged."""
    with (bench_data / "data" / "de_docs.train.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    planted = [" ".join(changed(text.split(), 2)) for text in texts[:200] if len(text.split()) > 200]
    started = time.perf_counter()
    seen = SeenDocuments(near=True)
    before = screen(seen, texts)
    seconds = time.perf_counter() - started
    print(f"{len(texts) / seconds:,.0f} documents/s, {sum(map(len, texts)) / seconds / 1e6:.1f} million characters/s")
    assert before.count(None) >= 0.98 * len(texts)
    assert set(screen(seen, planted)) == {"near_duplicate"}
    assert screen(seen, texts[:50]) == ["duplicate"] * 50
