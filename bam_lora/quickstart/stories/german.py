"""German stories: articles, adjective endings, pronouns, contractions and the plots.

The cast is that of the English stories (H hero, F friend, K family, M and N masters of a trade, A animal, T thing) with
S and S2 for spots, P for where the hero lives, A.home for where the animal lives. A phrase is
`[preposition] article[+] role [case]`: `{von der+ M dat}`, `{ein T akk}`, `{sein:H K dat}`, `{0+ ...}` without an
article; `+` adds how it looks. `{er A akk}` is a pronoun, `{rel A akk}` a relative one, `{wo S}` and `{wohin S}` are a
spot with its preposition in the case it takes there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from bam_lora.quickstart.stories import german_words as lexicon
from bam_lora.quickstart.stories.german_plots import ANIMAL_SIZES, PLOTS, RULES, TRADE_USES, WEATHER
from bam_lora.quickstart.stories.weave import Weaver

CASES = ("nom", "akk", "dat", "gen")
DER = {"m": "der den dem des", "f": "die die der der", "n": "das das dem des", "p": "die die den der"}
# Endings of ein, kein, mein, sein, ihr; the plural is that of kein.
EIN = {"m": "- en em es", "f": "e e er er", "n": "- - em es", "p": "e e en er"}
# Endings of adjectives: after der (weak), after ein (mixed), after nothing (strong).
WEAK = {"m": "e en en en", "f": "e e en en", "n": "e e en en", "p": "en en en en"}
MIXED = {"m": "er en en en", "f": "e e en en", "n": "es es en en", "p": "en en en en"}
STRONG = {"m": "er en em en", "f": "e e er er", "n": "es es em en", "p": "e e en er"}
PRONOUNS = {"m": "er ihn ihm", "f": "sie sie ihr", "n": "es es ihm", "p": "sie sie ihnen"}
CONTRACTIONS = {
    "in dem": "im", "in das": "ins", "an dem": "am", "an das": "ans", "zu dem": "zum", "zu der": "zur",
    "von dem": "vom", "bei dem": "beim",
}  # fmt: skip
PREPOSITIONS = ("in", "an", "zu", "von", "bei", "aus")


@dataclass(frozen=True)
class Noun:
    """A noun: its gender (m, f, n; p for a plural), nominative and genitive, how it looks and where it is (in, auf)."""

    gender: str
    name: str
    genitive: str
    look: str = ""
    preposition: str = ""

    def form(self, case: str) -> str:
        """The noun in a case; weak masculines (Hase, Bauer) take their -n everywhere but in the nominative."""
        if self.gender == "p":
            return self.name + "n" if case == "dat" and self.name[-1] not in "ns" else self.name
        weak = self.gender == "m" and self.genitive in (self.name + "n", self.name + "en")
        return self.genitive if case == "gen" or (weak and case != "nom") else self.name


Cast = dict[str, Noun | str]

# What everybody in a story has.
BELONGINGS = {
    noun.name: noun
    for noun in (
        Noun("m", "Mantel", "Mantels"), Noun("f", "Tasche", "Tasche"), Noun("m", "Schal", "Schals"),
        Noun("p", "Schuhe", "Schuhe"), Noun("p", "Finger", "Finger"), Noun("p", "Füße", "Füße"),
        Noun("p", "Münzen", "Münzen"), Noun("m", "Apfel", "Apfels"), Noun("m", "Schatz", "Schatzes", "größt"),
    )
}  # fmt: skip


def ending(table: dict[str, str], gender: str, case: str) -> str:
    """Looks up a gender's form in a case; "-" in a table is no ending."""
    form = table[gender].split()[CASES.index(case)]
    return "" if form == "-" else form


def noun_phrase(article: str, noun: Noun, case: str, look: str = "") -> str:
    """Article, adjective and noun, agreeing in gender, number and case.

    Args:
        article: "der", a word that goes like "ein" (ein, kein, sein, ihr), or "0" for none.
        noun: The noun.
        case: nom, akk, dat or gen.
        look: An adjective without its ending, or nothing.
    """
    if article == "der":
        first, endings = ending(DER, noun.gender, case), WEAK
    elif article == "0" or (article == "ein" and noun.gender == "p"):
        first, endings = "", STRONG
    else:
        first, endings = article + ending(EIN, noun.gender, case), MIXED
    adjective = look + ending(endings, noun.gender, case) if look else ""
    return " ".join(word for word in (first, adjective, noun.form(case)) if word)


def phrase(cast: Cast, slot: str) -> str:
    """Says the inside of `{...}` (see the top of this file)."""
    parts = slot.split()
    if len(parts) == 1:
        entry = cast[slot]
        return entry.name if isinstance(entry, Noun) else entry
    preposition = parts.pop(0) if parts[0] in PREPOSITIONS else ""
    head, role, case = (*parts, "nom")[:3]
    noun = cast[role]
    assert isinstance(noun, Noun), slot
    if head == "er":
        return ending(PRONOUNS, noun.gender, case)
    if head == "rel":
        return ending(DER, noun.gender, case)
    if head in ("wo", "wohin"):
        preposition, case = noun.preposition, "dat" if head == "wo" else "akk"
        head = "ein+" if noun.look else "der"
    article, _, owner = head.rstrip("+").partition(":")
    if owner:
        possessor = cast[owner]
        assert isinstance(possessor, Noun), slot
        article = "ihr" if possessor.gender == "f" else "sein"
    first, *rest = noun_phrase(article, noun, case, noun.look if head.endswith("+") else "").split(" ", 1)
    joined = f"{preposition} {first}".strip()
    return " ".join([CONTRACTIONS.get(joined, joined), *rest])


def _person(cast: Cast, rng: random.Random, role: str, female: bool) -> None:
    names = [name for name in (lexicon.GIRLS if female else lexicon.BOYS) if cast.get("H.name") != name]
    name = rng.choice(names)
    cast[role] = Noun("f" if female else "m", name, name + "s")
    cast[f"{role}.name"] = name
    cast[f"{role}.er"] = "sie" if female else "er"
    cast[f"{role}.kind"] = "ein Mädchen" if female else "ein Junge"
    cast[f"{role}.das"] = "das" if female else "der"


def _master(cast: Cast, rng: random.Random, role: str, row: tuple[str, ...]) -> None:
    male, genitive, female_name = row[:3]
    female = rng.random() < 0.5
    cast[role] = Noun("f", female_name, female_name) if female else Noun("m", male, genitive)
    for key, start in (("shop", 3), ("tool", 6), ("ware", 9)):
        name, gender, second = row[start : start + 3]
        cast[f"{role}.{key}"] = Noun(gender, name, second)


def draw_cast(rng: random.Random, plot: str) -> Cast:
    """Draws who and what a story is about; whatever belongs together comes from one row of a table."""
    cast: Cast = {**BELONGINGS, "where": rng.choice(lexicon.WHERE), "food": rng.choice(lexicon.FOODS)}
    preposition, name, gender, genitive = rng.choice(lexicon.PLACES)
    cast["P"] = Noun(gender, name, genitive, rng.choice(lexicon.PLACE_LOOKS), preposition)
    for role in "HF":
        _person(cast, rng, role, rng.random() < 0.5)
    cast["Freunde"] = "Freundinnen" if cast["H.er"] == cast["F.er"] == "sie" else "Freunde"
    name, gender, genitive = rng.choice(lexicon.KIN)
    cast["K"] = Noun(gender, name, genitive)
    master = rng.choice([row for row in lexicon.TRADES if row[12] in TRADE_USES.get(plot, row[12])])
    other = rng.choice([row for row in lexicon.TRADES if row != master])
    _master(cast, rng, "M", master)
    _master(cast, rng, "N", other)
    animal = rng.choice([row for row in lexicon.ANIMALS if row[12] == ANIMAL_SIZES.get(plot, row[12])])
    name, gender, genitive, look, voice, move, food, preposition, how, home, home_gender, home_genitive, _ = animal
    cast["A"] = Noun(gender, name, genitive, look)
    cast["A.home"] = Noun(home_gender, home, home_genitive, how, preposition)
    cast |= {"A.voice": voice, "A.move": move, "A.food": food}
    name, gender, genitive = rng.choice(lexicon.THINGS)
    cast["T"] = Noun(gender, name, genitive, rng.choice(lexicon.LOOKS))
    for role, (preposition, name, gender, genitive) in zip(("S", "S2"), rng.sample(lexicon.SPOTS, 2), strict=True):
        cast[role] = Noun(gender, name, genitive, "", preposition)
    return cast


def tell(rng: random.Random) -> str:
    """Tells one German story."""
    plot = rng.choice(sorted(PLOTS))
    cast = draw_cast(rng, plot)
    sky = rng.choice(WEATHER.get(plot, tuple(sorted(lexicon.SKIES))))
    rules = RULES | {"sky": lexicon.SKIES[sky], "hard": RULES[f"hard_{sky}"]}
    weaver = Weaver(rng, rules, lambda slot: phrase(cast, slot))
    return " ".join(weaver.weave(beat) for beat in PLOTS[plot])
