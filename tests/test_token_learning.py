"""New tokens: merges learned on from a tokenizer's own, in the order in which the grown tokenizer applies them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from bam_lora.errors import UserError
from bam_lora.grown_tokenizer import changed_share, check_tokenizer, open_backend, token_count, write_tokenizer
from bam_lora.sources import TextSource
from bam_lora.store import read_json, write_json
from bam_lora.text_filters import FilterRules
from bam_lora.token_learning import NewToken, count_words, learn_tokens, require_bpe
from bam_lora.vocabulary import Growth, learn_vocabulary
from tests.conftest import ENGLISH, GERMAN, write_jsonl

RUSSIAN = ["Мельник пошёл на рынок. Там он нашёл золотой ключ и очень обрадовался."] * 4


def grown(base: Path, texts: list[str], count: int, folder: Path) -> tuple[Tokenizer, list[NewToken], int]:
    before = open_backend(base)
    learned = learn_tokens(before, count_words(before, texts), count)
    folder.mkdir(exist_ok=True)
    first = write_tokenizer(base, learned, folder)
    return open_backend(folder), learned, first


def sentencepiece_like(folder: Path) -> Path:
    """As Llama 2's and Mistral's: byte-pairs on whole lines with marked spaces, unknown characters in bytes."""
    letters = sorted({character for text in ENGLISH for character in text.replace(" ", "▁")} | {"▁"})
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("n", "d"), ("▁a", "nd")]
    for token in [*letters, *("".join(pair) for pair in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", {**config, "unk_token": "<unk>"})
    return folder


def test_the_first_tokens_are_the_commonest_pairs_by_hand(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
    words = Counter({"aaaa": 3, "ab": 5, "cab": 2})
    learned = learn_tokens(tokenizer, words, 4)
    # ab occurs 7 times; aa twice in each of three words; aaaa and cab are left
    assert learned == [
        NewToken("ab", ("a", "b"), (0, 1), 7),
        NewToken("aa", ("a", "a"), (0, 0), 6),
        NewToken("aaaa", ("aa", "aa"), (0, 0, 0, 0), 3),
        NewToken("cab", ("c", "ab"), (2, 0, 1), 2),
    ]
    assert learn_tokens(tokenizer, words, 10) == learned  # nothing occurs twice any more


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "whole_words"])
def test_the_grown_tokenizer_saves_what_learning_counted(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    base = sentencepiece_like(tmp_path / "base") if kind == "sentencepiece" else tiny_base
    if kind == "whole_words":
        base = tmp_path / "base"
        base.mkdir()
        content = read_json(tiny_base / "tokenizer.json")
        content["model"]["ignore_merges"] = True
        write_json(base / "tokenizer.json", content)
    texts = [*GERMAN, *RUSSIAN]
    before = open_backend(base)
    after, learned, first = grown(base, texts, 120, tmp_path / "grown")
    assert len(learned) == 120
    lengths = [sum(len(t.encode(text, add_special_tokens=False).ids) for text in texts) for t in (before, after)]
    assert lengths[0] - lengths[1] == sum(one.saved for one in learned)
    for place, one in enumerate(learned):
        assert after.token_to_id(one.token) == first + place
        assert all(piece < first for piece in one.pieces)
    for text in [*texts, *ENGLISH, "Ωmega 漢字 \U0001f600  two  spaces\nline"]:
        assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)


def test_pieces_spell_the_token(tiny_base: Path, tmp_path: Path) -> None:
    before = open_backend(tiny_base)
    _, learned, _ = grown(tiny_base, GERMAN, 60, tmp_path / "grown")
    for one in learned:
        assert "".join(before.id_to_token(piece) for piece in one.pieces) == one.token


def test_characters_in_bytes_become_tokens_that_merges_join(tmp_path: Path) -> None:
    base = sentencepiece_like(tmp_path / "base")
    after, learned, _ = grown(base, RUSSIAN, 200, tmp_path / "grown")
    characters = [one for one in learned if one.pair is None]
    before = open_backend(base)
    assert {"о", "л", "к"} <= {one.token for one in characters}
    for one in characters:
        assert [before.id_to_token(piece) for piece in one.pieces] == [f"<0x{b:02X}>" for b in one.token.encode()]
    assert any(one.pair is not None and len(one.token) > 3 for one in learned)
    assert not any(token.startswith("<0x") for token in after.encode(RUSSIAN[0]).tokens)


def test_the_same_words_in_another_order_give_the_same_tokens(tiny_base: Path) -> None:
    tokenizer = open_backend(tiny_base)
    words = count_words(tokenizer, GERMAN)
    backwards = Counter(dict(reversed(words.items())))
    assert learn_tokens(tokenizer, backwards, 80) == learn_tokens(tokenizer, words, 80)


def test_old_text_takes_no_more_tokens_and_is_little_changed(tiny_base: Path, tmp_path: Path) -> None:
    before = open_backend(tiny_base)
    after, _, _ = grown(tiny_base, GERMAN, 40, tmp_path / "grown")
    for text in ENGLISH:
        assert len(after.encode(text).ids) <= len(before.encode(text).ids)
    german, english = (changed_share(before, after, count_words(before, texts)) for texts in (GERMAN, ENGLISH))
    assert english < 0.25 < german
    assert changed_share(before, before, count_words(before, GERMAN)) == 0


def test_long_texts_count_as_their_words_do(tiny_base: Path) -> None:
    tokenizer = open_backend(tiny_base)
    lines = [*GERMAN] * 30
    assert len(text := "\n".join(lines)) > 1 << 16
    assert count_words(tokenizer, [text])["ĠSchlÃ¼ssel"] == count_words(tokenizer, lines)["ĠSchlÃ¼ssel"]


def test_transformers_loads_it_with_special_tokens_behind_the_vocabulary(tiny_base: Path, tmp_path: Path) -> None:
    """As in Llama 3, whose special tokens have the highest numbers: the new ones come after them."""
    from bam_lora.base import load_tokenizer

    base = tmp_path / "base"
    base.mkdir()
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(base)
    (base / "tokenizer.model").write_bytes(b"the old vocabulary")
    after, learned, first = grown(base, GERMAN, 30, tmp_path / "grown")
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert after.token_to_id("<|turn|>") == turn
    assert first == turn + 1 == len(tokenizer)
    check_tokenizer(base, tmp_path / "grown", learned, first, [*GERMAN, *ENGLISH, "<|turn|>Am Morgen<|turn|>"])
    assert not (tmp_path / "grown" / "tokenizer.model").exists()
    loaded = load_tokenizer(tmp_path / "grown")
    assert token_count(loaded, GERMAN) < token_count(load_tokenizer(base), GERMAN)


def test_a_tokenizer_that_lost_a_token_is_found_out(tiny_base: Path, tmp_path: Path) -> None:
    _, learned, first = grown(tiny_base, GERMAN, 5, tmp_path / "grown")
    content = read_json(tmp_path / "grown" / "tokenizer.json")
    content["model"]["vocab"].pop(learned[-1].token)
    content["model"]["merges"].pop()
    write_json(tmp_path / "grown" / "tokenizer.json", content)
    with pytest.raises(UserError, match="352 tokens once it is grown"):
        check_tokenizer(tiny_base, tmp_path / "grown", learned, first, GERMAN)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (models.Unigram([("a", 0.0)]), "Unigram"),
        (models.WordPiece({"a": 0}, unk_token="a"), "WordPiece"),
        (models.BPE(vocab={"a": 0}, merges=[], end_of_word_suffix="</w>"), "BPE with marks for parts of words"),
        (None, "no tokenizer.json"),
    ],
)
def test_other_tokenizers_are_refused(model: Any, found: str) -> None:
    with pytest.raises(UserError, match=f"byte-pair.*{found}.*Leave out `vocabulary`"):
        require_bpe(None if model is None else Tokenizer(model), "some/base")


def test_what_the_filters_drop_teaches_no_token(tiny_base: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mixed.jsonl", [*GERMAN[:20], *["Zeppelin und Zeppelin. " * 20] * 40])
    source = TextSource(str(tmp_path / "mixed.jsonl"))
    found = {}
    for name, rules in (("kept", FilterRules()), ("dropped", FilterRules(exclude_pattern="Zeppelin"))):
        learn_vocabulary(tiny_base, [(source, rules)], Growth(40, 1_000_000, None), tmp_path / name)
        content = read_json(tmp_path / name / "vocabulary" / "vocabulary.json")
        found[name] = "ĠZeppelin" in {one["token"] for one in content["tokens"]}
    assert found == {"kept": True, "dropped": False}
