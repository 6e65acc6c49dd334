"""The stories agree with the grammar of their language, and stay the same."""

import hashlib
import random
import re

import pytest

from bam_lora.errors import UserError
from bam_lora.quickstart import stories as room
from bam_lora.quickstart.stories import bulgarian, english, german, stories
from bam_lora.quickstart.stories.weave import Weaver, capitalise

MODULES = {"english": english, "german": german, "bulgarian": bulgarian}
LANGUAGES = sorted(MODULES)
HASHES = {
    "english": "74d1d977b00caaa9",
    "german": "51502264af3afb1e",
    "bulgarian": "c5e007eecd71d8dc",
}
WORD = re.compile(r"[^\W\d_]+")


@pytest.fixture(scope="module")
def told() -> dict[str, list[str]]:
    return {language: stories(language, 2000, 0) for language in LANGUAGES}


# All languages


@pytest.mark.parametrize("language", LANGUAGES)
def test_same_seed_gives_same_bytes_on_every_machine(language: str, told: dict[str, list[str]]) -> None:
    text = "\n".join(told[language][:200])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == HASHES[language]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_longer_list_begins_with_the_shorter_one(language: str) -> None:
    assert stories(language, 30, 7)[:10] == stories(language, 10, 7)
    assert stories(language, 10, 7) != stories(language, 10, 8)
    assert stories(language, 0, 7) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_stories_differ_and_are_one_line_of_60_to_200_words(language: str, told: dict[str, list[str]]) -> None:
    texts = told[language]
    assert len(set(texts)) == len(texts) == 2000
    assert all(60 <= len(text.split()) <= 200 for text in texts)
    assert not [text for text in texts if re.search(r"[{}()<>|\n]|  | [.,!?]|[.!?][^\W\d_]", text)]
    assert all(text[-1] in '."“' for text in texts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_vocabulary_is_some_hundred_words(language: str, told: dict[str, list[str]]) -> None:
    vocabulary = {word.lower() for text in told[language] for word in WORD.findall(text)}
    assert 700 <= len(vocabulary) <= 1300


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_begin_with_a_capital_letter_and_quotes_are_paired(language: str, told: dict[str, list[str]]) -> None:
    for text in told[language]:
        if language == "english":
            assert text.count('"') % 2 == 0
            assert not re.search(r"\. [a-z]", text)
        else:
            assert text.count("„") == text.count("“")
            assert not re.search(r"[.!?][“]? [a-zäöüа-яѝ]", text)
            assert not re.search(r"(^|[.!?]) „[a-zäöüа-яѝ]", text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_phrase_of_every_line_can_be_said(language: str) -> None:
    module = MODULES[language]
    lines = [line for block in (*module.PLOTS.values(), *module.RULES.values()) for line in block]
    lines += [line for block in module.lexicon.SKIES.values() for line in block]
    slots = {slot for line in lines for slot in re.findall(r"\{([^{}]*)\}", line)}
    for seed in range(20):
        cast = module.draw_cast(random.Random(seed), sorted(module.PLOTS)[0])
        for slot in sorted(slots):
            assert module.phrase(cast, slot).strip(), slot
    named = {rule for line in lines for rule in re.findall(r"<(\w+)>", line)}
    assert named <= {*module.RULES, "sky", "hard"}
    assert {f"hard_{sky}" for sky in module.lexicon.SKIES} <= set(module.RULES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_plot_needs_is_in_the_lexicon(language: str) -> None:
    module = MODULES[language]
    for needs in (module.WEATHER, module.ANIMAL_SIZES, module.TRADE_USES):
        assert set(needs) <= set(module.PLOTS)
    assert {sky for skies in module.WEATHER.values() for sky in skies} <= set(module.lexicon.SKIES)
    assert set(module.ANIMAL_SIZES.values()) <= {row[-1] for row in module.lexicon.ANIMALS}
    assert {use for uses in module.TRADE_USES.values() for use in uses} <= {row[-1] for row in module.lexicon.TRADES}


def test_unknown_language_and_negative_number_are_refused() -> None:
    with pytest.raises(UserError, match=r"language: expected one of english, german, bulgarian, found 'klingon'"):
        stories("klingon", 1, 0)
    with pytest.raises(UserError, match=r"documents: expected a number >= 0, found -1"):
        stories("german", -1, 0)
    assert set(room.LANGUAGES) == set(LANGUAGES)


def test_weaver_expands_nested_choices_and_repeats_no_line_while_another_is_left() -> None:
    rules = {"animal": ["cat", "dog", "hen"]}
    for seed in range(30):
        weaver = Weaver(random.Random(seed), rules, str.upper)
        text = weaver.weave("<animal>, <animal>, <animal> ((a|b) {x}|c).")
        assert set(re.findall(r"cat|dog|hen", text.lower())) == {"cat", "dog", "hen"}
        assert re.search(r" (a X|b X|c)\.$", text)


def test_capitalise_leaves_the_words_after_a_question_in_a_sentence() -> None:
    assert capitalise('one. "two?" asked Tom. three! four') == 'One. "Two?" asked Tom. Three! Four'
    assert capitalise("„wo?“, fragte er. „hier.“ dann: „das?“") == "„Wo?“, fragte er. „Hier.“ Dann: „Das?“"


# English


def test_english_articles_and_plurals(told: dict[str, list[str]]) -> None:
    assert [english.article(word) for word in ("owl", "red owl", "old hat", "oak table")] == ["an", "a", "an", "an"]
    for text in told["english"]:
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)
        assert not re.search(r"\b(boots|apples|nuts|oats|carrots|berries|potatoes) (is|was|has)\b", text)


def test_english_pronouns_follow_the_hero() -> None:
    for seed in range(200):
        cast = english.draw_cast(random.Random(seed), "lost")
        female = cast["H"] in english.lexicon.GIRLS
        assert (cast["H.he"], cast["H.his"]) == (("she", "her") if female else ("he", "his"))
        assert cast["K.the"].startswith(cast["H.his"])
        assert cast["H"] != cast["F"]
        assert cast["M"] != cast["N"]
