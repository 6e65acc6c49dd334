"""The tokenizer report on tokenizers whose tokens are counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN

from bam_lora.tokenizer_report import compare, describe, report, sample


@pytest.fixture(scope="module")
def byte_level(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """A SentencePiece-like BPE: whole words for two words, letters for some, bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def word_level() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "ein": 1, "Wort": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_byte_fallback_is_counted_but_not_ascii_characters(byte_fallback: Any) -> None:
    found = report(byte_fallback, ["ab é\n", "a"])  # ab ▁ C3 A9 0A | a
    assert (found["documents"], found["tokens"], found["bytes"], found["characters"], found["words"]) == (2, 6, 7, 6, 3)
    assert found["fragment_share"] == pytest.approx(2 / 6)
    assert found["unknown_share"] == 0
    assert found["bytes_per_token"] == pytest.approx(7 / 6)
    assert found["tokens_per_word"] == pytest.approx(2)


def test_parts_of_characters_of_a_byte_level_tokenizer_are_counted(byte_level: Any) -> None:
    english = report(byte_level, ENGLISH)
    assert english["fragment_share"] == 0
    text = "da ü"
    tokens = byte_level(text)["input_ids"]
    assert report(byte_level, [text])["fragment_share"] == pytest.approx(2 / len(tokens))  # the two bytes of ü
    assert report(byte_level, ["我们"])["fragment_share"] == 1
    assert report(byte_level, ["我们"])["unspaced"]
    assert not report(byte_level, ["我们 and many English words"])["unspaced"]


def test_unknown_tokens_are_counted(word_level: Any) -> None:
    found = report(word_level, ["ein Wort ein Satz"])
    assert (found["tokens"], found["unknown_share"]) == (4, 0.25)
    compared = compare(found, None)
    assert compared["covered"] == "poorly"
    assert "25.00% of the target's tokens are unknown" in compared["advice"]


def test_special_tokens_are_not_counted_and_empty_text_divides_nothing(byte_level: Any) -> None:
    assert report(byte_level, ["x"])["tokens"] == 1
    empty = report(byte_level, [""])
    assert (empty["tokens"], empty["bytes_per_token"], empty["tokens_per_word"]) == (0, None, None)
    assert compare(empty, empty)["premium"] is None
    assert describe(compare(empty, empty)) == []


def language(tokens_per_word: float, fragments: float = 0.0, unspaced: bool = False) -> dict[str, Any]:
    return {
        "tokens": 1000, "words": 500, "bytes_per_token": 4 / tokens_per_word, "tokens_per_word": tokens_per_word,
        "fragment_share": fragments, "unknown_share": 0.0, "unspaced": unspaced,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "source", "covered", "words"),
    [
        (language(1.6), language(1.3), "well", None),
        (language(1.9), language(1.3), "fairly", "1.5 times as many tokens a word as the source: training"),
        (
            language(2.8),
            language(1.3),
            "poorly",
            "2.2 times as many tokens a word .*new tokens for it are worth having",
        ),
        (language(1.4, 0.06), language(1.3), "poorly", "6% of the target's tokens are parts of characters, and .* 1.1"),
        (language(1.4, 0.06), None, "poorly", "6% of the target's tokens are parts of characters: new tokens"),
        (language(2.0, 0, True), language(1.0), "poorly", "2.0 times as many tokens a byte"),
        (None, language(1.0), None, None),
    ],
)
def test_judgement(target: Any, source: Any, covered: str | None, words: str | None) -> None:
    compared = compare(target, source)
    assert compared["covered"] == covered
    if words is None:
        assert compared["advice"] is None
    else:
        import re

        assert re.search(words, compared["advice"])
        assert describe(compared)[-1] == compared["advice"]


def test_german_costs_more_on_a_tokenizer_made_for_english(byte_level: Any) -> None:
    compared = compare(report(byte_level, GERMAN), report(byte_level, ENGLISH))
    assert compared["per"] == "word"
    assert compared["premium"] == pytest.approx(
        compared["target"]["tokens_per_word"] / compared["source"]["tokens_per_word"]
    )
    assert compared["premium"] > 2
    assert describe(compared)[0].startswith("target: ")


def test_sample_takes_what_a_report_needs() -> None:
    texts = sample(str(index % 10) * 100_000 for index in range(100))
    assert [len(text) for text in texts] == [100_000] * 4
    assert [len(text) for text in sample(["x" * 1_000_000])] == [400_000]
    assert sample([]) == []
