"""How much room a text takes in a picture, roughly: fonts differ, so this is on the wide side."""

from __future__ import annotations

import unicodedata

# Against a Latin letter of the widest usual font.
_WIDE, _BROAD = 1.7, 1.4
_BROAD_LETTERS = frozenset("mwMW@%—…ЖМШЩЫЮжмшщыю")


def width_of(text: str) -> float:
    """The width in Latin letters: wide characters and symbols count more, combining marks nothing."""
    return sum(_width(character) for character in text)


def _width(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    wide = unicodedata.east_asian_width(character) in "WF" or unicodedata.category(character) == "So"
    return _WIDE if wide else _BROAD if character in _BROAD_LETTERS else 1.0


def short(name: str, most: int = 16) -> str:
    """A name cut to the width of so many letters."""
    if width_of(name) <= most:
        return name
    kept = ""
    for character in name:
        if width_of(kept + character) > most - 1:
            break
        kept += character
    return f"{kept}…"
