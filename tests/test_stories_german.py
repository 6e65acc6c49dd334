"""The German stories: cases, articles, adjective endings, contractions, verb-second."""

import re
from itertools import product

import pytest

from bam_lora.quickstart.stories import german, german_words, stories


@pytest.fixture(scope="module")
def told() -> list[str]:
    return stories("german", 2000, 0)


# German: endings written out by hand, one noun of each gender

GERMAN_PARADIGMS = {
    ("der", german.Noun("m", "Hut", "Hutes")): "der rote Hut, den roten Hut, dem roten Hut, des roten Hutes",
    ("ein", german.Noun("m", "Hut", "Hutes")): "ein roter Hut, einen roten Hut, einem roten Hut, eines roten Hutes",
    ("0", german.Noun("m", "Hut", "Hutes")): "roter Hut, roten Hut, rotem Hut, roten Hutes",
    ("der", german.Noun("f", "Uhr", "Uhr")): "die rote Uhr, die rote Uhr, der roten Uhr, der roten Uhr",
    ("ihr", german.Noun("f", "Uhr", "Uhr")): "ihre rote Uhr, ihre rote Uhr, ihrer roten Uhr, ihrer roten Uhr",
    ("0", german.Noun("f", "Uhr", "Uhr")): "rote Uhr, rote Uhr, roter Uhr, roter Uhr",
    ("der", german.Noun("n", "Buch", "Buches")): "das rote Buch, das rote Buch, dem roten Buch, des roten Buches",
    ("kein", german.Noun("n", "Buch", "Buches")): (
        "kein rotes Buch, kein rotes Buch, keinem roten Buch, keines roten Buches"
    ),
    ("0", german.Noun("n", "Buch", "Buches")): "rotes Buch, rotes Buch, rotem Buch, roten Buches",
    ("der", german.Noun("p", "Schuhe", "Schuhe")): (
        "die roten Schuhe, die roten Schuhe, den roten Schuhen, der roten Schuhe"
    ),
    ("sein", german.Noun("p", "Schuhe", "Schuhe")): (
        "seine roten Schuhe, seine roten Schuhe, seinen roten Schuhen, seiner roten Schuhe"
    ),
    ("ein", german.Noun("p", "Schuhe", "Schuhe")): "rote Schuhe, rote Schuhe, roten Schuhen, roter Schuhe",
    ("der", german.Noun("m", "Hase", "Hasen")): "der rote Hase, den roten Hasen, dem roten Hasen, des roten Hasen",
    ("ein", german.Noun("m", "Bauer", "Bauern")): (
        "ein roter Bauer, einen roten Bauern, einem roten Bauern, eines roten Bauern"
    ),
}


@pytest.mark.parametrize(("article", "noun"), GERMAN_PARADIGMS)
def test_german_paradigm(article: str, noun: german.Noun) -> None:
    said = [german.noun_phrase(article, noun, case, "rot") for case in german.CASES]
    assert ", ".join(said) == GERMAN_PARADIGMS[article, noun]


# The endings that show gender and case; one word of a phrase shows them, the adjective only if the article does not.
STRONG_ENDINGS = {"m": "r n m s", "f": "e e r r", "n": "s s m s", "p": "e e n r"}


def _german_nouns() -> dict[str, german.Noun]:
    nouns = [german.Noun(gender, name, second) for name, gender, second in german_words.KIN + german_words.THINGS]
    nouns += [german.Noun(gender, name, second) for _, name, gender, second in german_words.PLACES + german_words.SPOTS]
    nouns += [german.Noun(row[1], row[0], row[2]) for row in german_words.ANIMALS]
    nouns += [german.Noun(row[10], row[9], row[11]) for row in german_words.ANIMALS]
    for row in german_words.TRADES:
        nouns += [german.Noun("m", row[0], row[1]), german.Noun("f", row[2], row[2])]
        nouns += [german.Noun(row[at + 1], row[at], row[at + 2]) for at in (3, 6, 9)]
    nouns += german.BELONGINGS.values()
    return {noun.name: noun for noun in nouns}


def test_german_one_word_of_every_phrase_shows_gender_and_case() -> None:
    for noun, article, case in product(_german_nouns().values(), ("der", "ein", "sein", "0"), german.CASES):
        strong = STRONG_ENDINGS[noun.gender].split()[german.CASES.index(case)]
        *before, adjective, _ = german.noun_phrase(article, noun, case, "rot").split(" ")[: 3 if article != "0" else 2]
        shown = before[0] if before else ""
        if shown.endswith(strong) and shown not in ("ein", "sein"):
            assert adjective in ("rote", "roten"), (noun, article, case)
        elif strong == "s" and case == "gen":
            assert adjective == "roten"  # here the noun itself shows it: "roten Hutes"
        else:
            assert adjective.endswith(strong), (noun, article, case)


def test_german_lexicon_gives_each_noun_one_gender_and_a_possible_genitive() -> None:
    seen: dict[str, str] = {}
    for noun in _german_nouns().values():
        assert seen.setdefault(noun.name, noun.gender) == noun.gender
        head = noun.genitive.split(" ")[0]
        assert head[-1] in ("sn" if noun.gender == "m" else "s" if noun.gender == "n" else head[-1])
        assert noun.gender not in "fp" or noun.genitive == noun.name
        assert noun.name[0].isupper()


GERMAN_ARTICLE = re.compile(
    r"\b([Dd](?:er|ie|as|en|em|es)|(?:[Ee]in|[Ss]ein|[Ii]hr|[Mm]ein)(?:e[nmrs]?)?) (?:([a-zäöüß]+) )?"
)


def test_german_stories_hold_only_combinations_that_some_case_allows(told: list[str]) -> None:
    nouns = {name: noun for name, noun in _german_nouns().items() if " " not in name}
    allowed: dict[str, set[tuple[str, str]]] = {}
    for name, noun in nouns.items():
        for case, article in product(german.CASES, ("der", "ein", "sein", "ihr", "mein")):
            if noun.gender == "p" and article == "ein":
                continue
            first, adjective, said = german.noun_phrase(article, noun, case, "rot").split(" ")
            allowed.setdefault(said, set()).update({(first, adjective.removeprefix("rot")), (first, "")})
            allowed.setdefault(name, set())
    found = 0
    looks = {*german_words.LOOKS, *german_words.PLACE_LOOKS, *(row[3] for row in german_words.ANIMALS)}
    looks |= {row[8] for row in german_words.ANIMALS} | {"größt", "eigen"}
    for text in told:
        for match in re.finditer(GERMAN_ARTICLE.pattern + r"([A-ZÄÖÜ][a-zäöüß]+)\b", text):
            first, adjective, name = match[1].lower(), match[2] or "", match[3]
            look = next((look for look in looks if re.fullmatch(look + "e[nmrs]?", adjective)), None)
            if name in allowed and (look or not adjective):
                assert (first, adjective.removeprefix(look or "")) in allowed[name], match[0]
                found += 1
    assert found > 10_000


def test_german_contractions_and_relative_pronouns(told: list[str]) -> None:
    text = " ".join(told)
    assert not re.search(r"\b([Ii]n|[Aa]n|[Zz]u|[Vv]on|[Bb]ei) dem\b|\b[Zz]u der\b|\b[Ii]n das\b", text)
    assert set(re.findall(r"ein (?:Mädchen|Junge) namens \w+, (\w+)", text)) == {"das", "der"}
    assert not re.search(r"ein Mädchen namens \w+, der|ein Junge namens \w+, das", text)


def test_german_second_place_is_the_verbs() -> None:
    """After an opening place or time comes the verb, never the subject."""
    text = " ".join(stories("german", 500, 1))
    verbs = r"(?:lebte|wohnte|zogen|war|drehte|wehte|schien|stand|roch|stieg|trommelte|regnete|klopfte|traf|begegnete)"
    for start in (
        "Vor langer Zeit",
        "Eines Tages",
        "Seit .{3,4} Tagen",
        "Im Januar",
        "Auf dem Rückweg",
        "Erst am Abend",
    ):
        for sentence in re.findall(rf"(?<=[.] ){start} \w+", text):
            assert re.search(rf"{verbs}$", sentence), sentence
