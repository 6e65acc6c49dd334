"""Bulgarian stories: definite suffixes, gender agreement, clitics and the plots.

The cast is that of the English stories (H hero, F friend, K family, M and N masters of a trade, A animal, T thing) with
S and S2 for spots, P for where the hero lives. `{T}` is the bare noun, `{ът T}` the definite one as a subject, `{а T}`
the definite one elsewhere; `+` before these adds how it looks and moves the suffix there. `{той A}`, `{него A}`,
`{го A}`, `{му A}` are its pronouns, `{A:гладен/гладна/гладно}` chooses by its gender.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from bam_lora.quickstart.stories import bulgarian_words as lexicon
from bam_lora.quickstart.stories.bulgarian_plots import ANIMAL_SIZES, PLOTS, RULES, TRADE_USES, WEATHER
from bam_lora.quickstart.stories.weave import Weaver

GENDERS = ("м", "ж", "с", "мн")
ADJECTIVES = {row[0]: dict(zip(GENDERS, row, strict=True)) for row in lexicon.ADJECTIVES}
PRONOUNS = {
    "той": "той тя то те", "него": "него нея него тях", "го": "го я го ги", "му": "му ѝ му им",
}  # fmt: skip
_HARD_TO_SAY = (("с", "СЗсз"), ("в", "ВФвф"))


@dataclass(frozen=True)
class Noun:
    """A noun: its gender (м, ж, с; мн for a plural), bare and definite, and how it looks."""

    gender: str
    name: str
    definite: str = ""
    look: str = ""


Cast = dict[str, Noun | str]


def oblique(definite: str) -> str:
    """The short definite form, for all but subjects: masculine -ът becomes -а, -ят becomes -я (on the first word)."""
    head, *tail = definite.split(" ", 1)
    if head.endswith("ът"):
        head = head[:-2] + "а"
    elif head.endswith("ят"):
        head = head[:-2] + "я"
    return " ".join([head, *tail])


def definite_adjective(look: str, gender: str) -> str:
    """The definite form of an adjective, as a subject: червеният, червената, червеното, червените."""
    forms = ADJECTIVES[look]
    suffixes = {"м": "ят", "ж": "та", "с": "то", "мн": "те"}
    return (forms["мн"] if gender == "м" else forms[gender]) + suffixes[gender]


def noun_phrase(noun: Noun, article: str = "", look: str = "") -> str:
    """Adjective and noun in agreement.

    Args:
        noun: The noun.
        article: "ът" for a definite subject, "а" for another definite place in the sentence, "" for none.
        look: An adjective in its masculine form, or nothing.
    """
    if not article:
        return f"{ADJECTIVES[look][noun.gender]} {noun.name}" if look else noun.name
    definite = definite_adjective(look, noun.gender) if look else noun.definite
    said = definite if article == "ът" or noun.gender != "м" else oblique(definite)
    return f"{said} {noun.name}" if look else said


def phrase(cast: Cast, slot: str) -> str:
    """Says the inside of `{...}` (see the top of this file)."""
    if ":" in slot:
        role, forms = slot.split(":")
        noun = cast[role]
        assert isinstance(noun, Noun), slot
        return forms.split("/")[GENDERS.index(noun.gender)]
    form, _, role = slot.rpartition(" ")
    plus = form.startswith("+") or role.startswith("+")
    noun = cast[role.lstrip("+")]
    if isinstance(noun, str):
        return noun
    if form in PRONOUNS:
        return PRONOUNS[form].split()[GENDERS.index(noun.gender)]
    return noun_phrase(noun, form.lstrip("+"), noun.look if plus else "")


def easy_to_say(text: str) -> str:
    """Doubles the prepositions с and в where the next word begins alike: със сестра, във ветровит ден."""
    for preposition, sounds in _HARD_TO_SAY:
        text = re.sub(rf"\b([{preposition}{preposition.upper()}]) (?=[{sounds}])", rf"\1ъ{preposition} ", text)
    return re.sub(r"\bвъв ", "във ", text)


def _master(rng: random.Random, cast: Cast, role: str, row: tuple[str, ...]) -> None:
    male, definite, female = row[:3]
    cast[role] = Noun("ж", female, female + "та") if rng.random() < 0.5 else Noun("м", male, definite)
    for key, start in (("shop", 3), ("tool", 6), ("ware", 9)):
        name, gender, known = row[start : start + 3]
        cast[f"{role}.{key}"] = Noun(gender, name, known)


def draw_cast(rng: random.Random, plot: str) -> Cast:
    """Draws who and what a story is about; whatever belongs together comes from one row of a table."""
    cast: Cast = {"where": rng.choice(lexicon.WHERE), "food": rng.choice(lexicon.FOODS)}
    name, gender, known = rng.choice(lexicon.PLACES)
    cast["P"] = "в " + noun_phrase(Noun(gender, name, known), "", rng.choice(lexicon.PLACE_LOOKS))
    girls, boys = rng.sample(lexicon.GIRLS, 2), rng.sample(lexicon.BOYS, 2)
    for role in "HF":
        cast[role] = Noun("ж", girls.pop()) if rng.random() < 0.5 else Noun("м", boys.pop())
    two_girls = all(isinstance(noun := cast[role], Noun) and noun.gender == "ж" for role in "HF")
    cast |= {"двамата": "двете" if two_girls else "двамата", "приятели": "приятелки" if two_girls else "приятели"}
    name, gender, known = rng.choice(lexicon.KIN)
    cast["K"] = Noun(gender, name, known)
    master = rng.choice([row for row in lexicon.TRADES if row[12] in TRADE_USES.get(plot, row[12])])
    other = rng.choice([row for row in lexicon.TRADES if row != master])
    _master(rng, cast, "M", master)
    _master(rng, cast, "N", other)
    animal = rng.choice([row for row in lexicon.ANIMALS if row[12] == ANIMAL_SIZES.get(plot, row[12])])
    name, gender, known, look, voice, move, food, preposition, how, home, home_gender, home_known, _ = animal
    cast["A"] = Noun(gender, name, known, look)
    cast["A.home"] = f"{preposition} {noun_phrase(Noun(home_gender, home, home_known), '', how)}"
    cast |= {"A.voice": voice, "A.move": move, "A.food": food}
    name, gender, known = rng.choice(lexicon.THINGS)
    cast["T"] = Noun(gender, name, known, rng.choice(lexicon.LOOKS))
    for role, (preposition, name, gender, known) in zip(("S", "S2"), rng.sample(lexicon.SPOTS, 2), strict=True):
        cast[role] = f"{preposition} {noun_phrase(Noun(gender, name, known), 'а')}"
    return cast


def tell(rng: random.Random) -> str:
    """Tells one Bulgarian story."""
    plot = rng.choice(sorted(PLOTS))
    cast = draw_cast(rng, plot)
    sky = rng.choice(WEATHER.get(plot, tuple(sorted(lexicon.SKIES))))
    rules = RULES | {"sky": lexicon.SKIES[sky], "hard": RULES[f"hard_{sky}"]}
    weaver = Weaver(rng, rules, lambda slot: phrase(cast, slot))
    return easy_to_say(" ".join(weaver.weave(beat) for beat in PLOTS[plot]))
