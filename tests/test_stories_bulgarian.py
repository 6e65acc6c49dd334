"""The Bulgarian stories: definite suffixes, gender agreement, clitics."""

import re
from itertools import pairwise

import pytest

from bam_lora.quickstart.stories import bulgarian, bulgarian_words, stories

WORD = re.compile(r"[^\W\d_]+")


@pytest.fixture(scope="module")
def told() -> list[str]:
    return stories("bulgarian", 2000, 0)


BULGARIAN_PARADIGMS = {
    bulgarian.Noun("м", "фенер", "фенерът"): "червен фенер, фенерът, фенера, червеният фенер, червения фенер",
    bulgarian.Noun("м", "хлебар", "хлебарят"): "червен хлебар, хлебарят, хлебаря, червеният хлебар, червения хлебар",
    bulgarian.Noun("м", "буркан с мед", "бурканът с мед"): (
        "червен буркан с мед, бурканът с мед, буркана с мед, червеният буркан с мед, червения буркан с мед"
    ),
    bulgarian.Noun("ж", "котка", "котката"): "червена котка, котката, котката, червената котка, червената котка",
    bulgarian.Noun("с", "перо", "перото"): "червено перо, перото, перото, червеното перо, червеното перо",
    bulgarian.Noun(
        "мн", "ботуши", "ботушите"
    ): "червени ботуши, ботушите, ботушите, червените ботуши, червените ботуши",
    bulgarian.Noun("м", "баща", "бащата"): "червен баща, бащата, бащата, червеният баща, червения баща",
}


@pytest.mark.parametrize("noun", BULGARIAN_PARADIGMS)
def test_bulgarian_paradigm(noun: bulgarian.Noun) -> None:
    forms = [("", "червен"), ("ът", ""), ("а", ""), ("ът", "червен"), ("а", "червен")]
    assert ", ".join(bulgarian.noun_phrase(noun, *form) for form in forms) == BULGARIAN_PARADIGMS[noun]


def _bulgarian_nouns() -> list[bulgarian.Noun]:
    rows = bulgarian_words.KIN + bulgarian_words.PLACES + bulgarian_words.THINGS
    nouns = [bulgarian.Noun(gender, name, known) for name, gender, known in rows]
    nouns += [bulgarian.Noun(gender, name, known) for _, name, gender, known in bulgarian_words.SPOTS]
    nouns += [bulgarian.Noun(row[1], row[0], row[2]) for row in bulgarian_words.ANIMALS]
    nouns += [bulgarian.Noun(row[10], row[9], row[11]) for row in bulgarian_words.ANIMALS]
    for row in bulgarian_words.TRADES:
        nouns += [bulgarian.Noun("м", row[0], row[1]), bulgarian.Noun("ж", row[2], row[2] + "та")]
        nouns += [bulgarian.Noun(row[at + 1], row[at], row[at + 2]) for at in (3, 6, 9)]
    return nouns


def test_bulgarian_lexicon_suffixes_fit_the_gender() -> None:
    family = {row[0] for row in bulgarian_words.KIN}
    for noun in _bulgarian_nouns():
        bare, known = noun.name.split(" ")[0], noun.definite.split(" ")[0]
        if noun.gender == "м" and noun.name not in family:
            assert known in (bare + "ът", bare + "ят"), noun
            assert bare[-1] not in "аеиоуя", noun
        elif noun.name not in family:
            assert known == bare + {"ж": "та", "с": "то", "мн": "те"}[noun.gender], noun
            assert bare[-1] in {"ж": "ая", "с": "оеи", "мн": "и"}[noun.gender], noun
    for masculine, feminine, neuter, plural in bulgarian_words.ADJECTIVES:
        assert feminine[-1] in "ая"
        assert neuter[-1] == "о"
        assert plural[-1] == "и"
        assert masculine[-1] not in "аеиоуя"
    used = {*bulgarian_words.LOOKS, *bulgarian_words.PLACE_LOOKS, *(row[3] for row in bulgarian_words.ANIMALS)}
    assert used | {row[8] for row in bulgarian_words.ANIMALS} == set(bulgarian.ADJECTIVES)


def test_bulgarian_adjectives_agree_with_the_noun_after_them(told: list[str]) -> None:
    genders = {noun.name: noun.gender for noun in _bulgarian_nouns() if " " not in noun.name}
    genders |= {noun.name.split(" ")[0]: noun.gender for noun in _bulgarian_nouns()}
    agreeing: dict[str, set[str]] = {}
    for look, forms in bulgarian.ADJECTIVES.items():
        for gender in bulgarian.GENDERS:
            known = bulgarian.definite_adjective(look, gender)
            for form in (forms[gender], known, bulgarian.oblique(known)):
                agreeing.setdefault(form, set()).add(gender)
    found = 0
    for text in told:
        for adjective, noun in pairwise(WORD.findall(text.lower().replace("преди малко", ""))):
            if adjective in agreeing and noun in genders:
                assert genders[noun] in agreeing[adjective], (adjective, noun)
                found += 1
    assert found > 3_000


def test_bulgarian_full_article_never_follows_a_preposition(told: list[str]) -> None:
    definite = {noun.definite.split(" ")[0] for noun in _bulgarian_nouns() if noun.definite.endswith(("ът", "ят"))}
    prepositions = {"с", "със", "в", "във", "на", "при", "към", "за", "от", "под", "зад", "до", "пред", "край", "по"}
    for text in told:
        for first, second in pairwise(WORD.findall(text.lower())):
            assert not (first in prepositions and second in definite), (first, second)


def test_bulgarian_clitics_never_begin_a_sentence_and_prepositions_are_doubled(told: list[str]) -> None:
    text = " ".join(told)
    assert not re.search(r"(^|[.!?]“? |„)(Го|Му|Ѝ|Ги|Им|Си|Се|Я) ", text)
    assert not re.search(r"\b[Сс] [СсЗз]|\b[Вв] [ВвФф]", text)
    assert bulgarian.easy_to_say("с сестра в вода С зима В филм с мед") == "със сестра във вода Със зима Във филм с мед"


def test_bulgarian_choices_by_gender_are_feminine_in_second_place() -> None:
    lines = [line for block in (*bulgarian.PLOTS.values(), *bulgarian.RULES.values()) for line in block]
    choices = {slot for line in lines for slot in re.findall(r"\{(\w:[^{}]*)\}", line)}
    assert len(choices) > 15
    for choice in choices:
        _, feminine, *neuter = choice[2:].split("/")
        if feminine == "която":
            continue
        last = {word[-1] for word in feminine.removesuffix(" е").split() if word != "и"}
        assert last <= set("ая") or "момиче" in feminine, choice
        assert not neuter or neuter[0].removesuffix(" е")[-1] in "ое", choice
