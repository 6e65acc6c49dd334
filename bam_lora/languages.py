"""The languages of FineWeb-2, by name or code.

`languages.tsv` beside this file lists every configuration of the dataset; `make_languages` writes it.
"""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from bam_lora.errors import UserError, some

TABLE = Path(__file__).with_name("languages.tsv")
DATASET = "HuggingFaceFW/fineweb-2"
_CONFIG = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_PARENTHESES = re.compile(r"\s*\([^)]*\)")
_LIKE = 0.8  # of difflib's ratio: one or two letters wrong in a name
_TAG = re.compile(r"([a-zA-Z]{2,3})([-_][a-zA-Z]{4})?[-_][A-Z]{2}")  # pt-BR, sr-Cyrl-RS: a region at its end
_CODES = {"iw": "he", "in": "id", "ji": "yi", "tl": "fil"}  # old ones, and the one that Filipino is better known by
_HAN = ("hans", "hant")  # which FineWeb-2 does not tell apart
_ALMOST_ALL = 0.99  # of the words that a name can mean: the rest is dialects, or another script's few pages
_ENGLISH = ("english", "en", "eng", "eng latn")
_SHOWN = 6
_SCRIPTS = {
    "Arab": "Arabic",
    "Armn": "Armenian",
    "Beng": "Bengali",
    "Cans": "Canadian syllabics",
    "Cyrl": "Cyrillic",
    "Deva": "Devanagari",
    "Ethi": "Ethiopic",
    "Geor": "Georgian",
    "Grek": "Greek",
    "Hang": "Hangul",
    "Hani": "Chinese",
    "Hebr": "Hebrew",
    "Jpan": "Japanese",
    "Latn": "Latin",
    "Mong": "Mongolian",
    "Mymr": "Burmese",
    "Telu": "Telugu",
    "Taml": "Tamil",
    "Thai": "Thai",
    "Tibt": "Tibetan",
}


@dataclass(frozen=True)
class Language:
    """One configuration of FineWeb-2: a language in one script.

    Attributes:
        config: Its name, ISO 639-3 and ISO 15924: `bul_Cyrl`.
        code: ISO 639-1, or "" where there is none: `bg`.
        name: In English.
        others: Other names: in English, of its group, its own.
        words: Words of its training split, about; 0 if unknown.
        has_test: Whether it has a split `test`.
        mostly_bible: Whether more than half of its text is from Bible translations.
        verified: Whether the list has it; a code of the right form that it lacks may be newer than the list.
    """

    config: str
    code: str
    name: str
    others: tuple[str, ...] = ()
    words: int = 0
    has_test: bool = True
    mostly_bible: bool = False
    verified: bool = True

    @property
    def plain_name(self) -> str:
        """The name without what stands in brackets: `Modern Greek`."""
        return _PARENTHESES.sub("", self.name) or self.name

    @property
    def script(self) -> str:
        """Its script in English, or its ISO 15924 code."""
        short = self.config[4:]
        return _SCRIPTS.get(short, short)

    @property
    def slug(self) -> str:
        """The name as a file's: `modern-greek`; with the script where there is more in another: `serbian-cyrillic`."""
        same = [one for one in all_languages() if one.config[:3] == self.config[:3]]
        lesser = any(one.words > self.words for one in same)
        name = f"{self.plain_name} {self.script}" if lesser else self.plain_name
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or self.config.lower()

    def describe(self) -> str:
        """Name, script and size, for a list to choose from."""
        size = f", {readable_count(self.words)} words" if self.words else ""
        return f"{self.plain_name}, {self.script} script{size}"


@functools.cache
def all_languages() -> tuple[Language, ...]:
    """Every configuration of FineWeb-2 that the list has, sorted by its name."""
    rows = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return tuple(
        Language(config, code, name, tuple(filter(None, others.split("|"))), int(words), "t" in marks, "b" in marks)
        for config, code, name, others, words, marks in rows
    )


def find_languages(text: str) -> list[Language]:
    """The languages that a name or code can mean, most words first.

    Args:
        text: A configuration (`bul_Cyrl`), ISO 639-3 or 639-1, either of them with a script (`sr-Latn`), or a name:
            English, its group's (`Norwegian`) or its own (`български`), in any case, with or without accents.

    Returns:
        One or more; a configuration that the list lacks comes back unverified. Empty if nothing fits.
    """
    wanted = _plain_tag(text)
    code, _, script = wanted.replace("-", "_").partition("_")
    exact = f"{code.lower()}_{script.title()}"
    for one in all_languages():
        if exact in (one.config, f"{one.code}_{one.config[4:]}"):
            return [one]
    if _CONFIG.fullmatch(exact) and code.lower() != "eng":
        return [Language(exact, "", exact, verified=False)]
    key = _key(wanted)
    if not key or key in _ENGLISH:
        return []
    by_name = _by_key()
    found = by_name.get(key, [])
    if not found:
        words = set(key.split())
        found = [one for name, held in by_name.items() if words <= set(name.split()) for one in held]
    return sorted(set(found), key=lambda one: (-one.words, one.config))


def _plain_tag(text: str) -> str:
    """A language tag as FineWeb-2's names go: without its region, with newer codes and scripts; a name as it is."""
    plain = text.strip()
    tag = _TAG.fullmatch(plain)
    plain = tag[1] + (tag[2] or "") if tag else plain
    code, mark, script = plain.replace("-", "_").partition("_")
    code = _CODES.get(code.lower(), code) if not mark else code
    return f"{code}_Hani" if script.lower() in _HAN else code if not mark else plain


def near_names(text: str) -> list[str]:
    """English names and own names that are spelled almost like a text, nearest first."""
    names = _by_key()
    close = difflib.get_close_matches(_key(text), names, n=_SHOWN, cutoff=_LIKE)
    return list(dict.fromkeys(names[key][0].plain_name for key in close))[:3]


def choose_language(text: str, preferred: Container[str] = ()) -> Language:
    """The one language that a name or code means.

    Args:
        text: As for `find_languages`.
        preferred: Configurations that win where a name can mean several.

    Returns:
        The language.

    Raises:
        UserError: If none fits, with names spelled like it; or if several do, with their codes.
    """
    found = find_languages(text)
    if not found:
        raise unknown_language(text)
    chosen = likeliest(found, preferred)
    if chosen is None:
        listed = some([f"{one.config} ({one.plain_name}, {one.script} script)" for one in found])
        raise UserError.of(
            f"--language {text}", expected="one language in one script", found=listed, remedy="Give one of these codes"
        )
    return chosen


def likeliest(found: Sequence[Language], preferred: Container[str]) -> Language | None:
    """The one of several that is meant: the only preferred one, or that with almost all the words; else None."""
    known = [one for one in found if one.config in preferred]
    if len(known) == 1:
        return known[0]
    total = sum(one.words for one in found)
    return found[0] if len(found) == 1 or found[0].words > _ALMOST_ALL * total else None


def unknown_language(text: str) -> UserError:
    """The error for a text that is no language of the list."""
    if _key(_plain_tag(text)) in _ENGLISH:
        return UserError.of(
            f"--language {text}",
            expected="a language to learn",
            found="the one that the bases know best, which FineWeb-2 leaves out",
            remedy="Name another; for English text of your own write data.target yourself (docs/recipe.md)",
        )
    near = near_names(text)
    remedy = f"Did you mean {' or '.join(near)}?" if near else "Give its English name, or its code such as bul_Cyrl"
    return UserError.of(
        f"--language {text}",
        expected=f"one of the {len(all_languages()):,} that FineWeb-2 has text in, by name or code",
        found="no such one",
        remedy=remedy,
    )


def readable_count(number: int) -> str:
    """A number in three digits or fewer: `1.2 billion`, `340 million`, `12 thousand`."""
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.1f} {name}" if number < 10 * size else f"{number / size:.0f} {name}"
    return str(number)


@functools.cache
def _by_key() -> dict[str, list[Language]]:
    """Languages by each of their names and codes in plain spelling, those with more words first."""
    held: dict[str, list[Language]] = {}
    for one in sorted(all_languages(), key=lambda one: -one.words):
        names = (one.name, one.plain_name, *one.others, one.config[:3], one.code)
        for key in dict.fromkeys(key for name in names for key in (_key(name), _bare(name)) if key):
            held.setdefault(key, []).append(one)
    return held


def _key(name: str) -> str:
    """A name in lower case, its marks of punctuation as blanks."""
    kept = (char if char.isalnum() or unicodedata.category(char)[0] == "M" else " " for char in name.casefold())
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())


def _bare(name: str) -> str:
    """The same without accents, for Latin letters."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return _key(plain) if sum(char.isascii() for char in name) * 2 > len(name) else _key(name)
