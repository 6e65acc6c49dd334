"""Words, n-grams and whole texts as hashes, against plain Python."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bam_lora.word_hashes as word_hashes
from bam_lora.word_hashes import hash_words, ngrams, sequence_hashes


def plain_words(text: str) -> list[str]:
    return re.findall("(?:[^\\W_]|\u0301)+", unicodedata.normalize("NFC", text).lower())


@given(st.lists(st.text(alphabet="aäBß9 _.,\n-e\u0301é", max_size=30), max_size=6))
def test_hashes_are_equal_where_words_are(texts: list[str]) -> None:
    words = hash_words(texts)
    expected = [plain_words(text) for text in texts]
    assert np.diff(words.starts).tolist() == [len(part) for part in expected]
    flat = [word for part in expected for word in part]
    by_word = dict(zip(flat, words.hashes.tolist(), strict=True))
    assert [by_word[word] for word in flat] == words.hashes.tolist()
    assert len(set(by_word.values())) == len(by_word)


@given(st.lists(st.text(alphabet="ab ", max_size=20), max_size=5), st.integers(1, 4))
def test_ngrams_stay_inside_a_text(texts: list[str], n: int) -> None:
    grams = ngrams(hash_words(texts), n)
    expected = []
    for text in texts:
        words = plain_words(text)
        expected.append([tuple(words[start : start + n]) for start in range(len(words) - n + 1)])
    assert np.diff(grams.starts).tolist() == [len(part) for part in expected]
    flat = [gram for part in expected for gram in part]
    assert len(set(zip(flat, grams.hashes.tolist(), strict=True))) == len(set(flat)) == len(set(grams.hashes.tolist()))


def test_a_sequence_is_its_words_in_order_whatever_stands_between_them() -> None:
    texts = ["Der Fuchs, der!", "der  fuchs\nDER", "der der Fuchs", "der Fuchs", "", " ... "]
    hashes = sequence_hashes(hash_words(texts)).tolist()
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:4])) == 3
    assert hashes[4:] == [0, 0]


def test_scripts_without_spaces_are_cut_by_character_and_marks_stay_in_their_word() -> None:
    counts = np.diff(hash_words(["我爱学习 GPU 模型", "हिन्दी में", "ไทย", "e\u0301te", "été"]).starts)
    assert counts.tolist() == [7, 2, 3, 1, 1]


def test_long_texts_and_many_texts_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["eins zwei drei " * 40, "vier", "", "x" * 100, "fünf sechs\n" * 30]
    whole = hash_words(texts)
    monkeypatch.setattr(word_hashes, "_CHUNK_CHARACTERS", 64)
    cut = hash_words(texts)
    kept = np.arange(len(texts)) != 3  # a word longer than a chunk is cut
    assert (np.diff(cut.starts)[kept] == np.diff(whole.starts)[kept]).all()
    assert set(whole.hashes.tolist()) - set(cut.hashes.tolist()) == {int(whole.hashes[whole.starts[3]])}


def test_hashes_do_not_depend_on_the_session() -> None:
    """They are kept on disk for extensions of a run."""
    assert hash_words(["Am Morgen"]).hashes.tolist() == [796022924957397615, 16873032997881425922]
