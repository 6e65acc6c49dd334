"""Rules that drop a text before training: pure functions of one text, after those used for web corpora.

The measures are those of C4 (Raffel et al. 2020, arXiv 1910.10683), Gopher (Rae et al. 2021, arXiv 2112.11446, A.1.1)
and FineWeb (Penedo et al. 2024, arXiv 2406.17557); a text is judged whole, nothing in it is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class FilterRules:
    """Bounds that a text must keep, None for no bound; `pattern` must be found in it, `exclude_pattern` must not."""

    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    max_symbols: float | None = None
    max_digits: float | None = None
    max_repeated_lines: float | None = None
    max_repeated_words: float | None = None
    pattern: str | None = None
    exclude_pattern: str | None = None

    @property
    def on(self) -> bool:
        """Whether any rule is set."""
        return any(getattr(self, rule.name) is not None for rule in fields(self))


def broken_rule(text: str, rules: FilterRules) -> str | None:
    """The first rule that a text breaks, in the order of `FilterRules`, or None."""
    for name, breaks in _RULES.items():
        bound = getattr(rules, name)
        if bound is not None and breaks(text, bound):
            return name
    return None


def symbol_share(text: str) -> float:
    """Share of the characters other than white space that are neither letter, digit nor combining mark."""
    visible = len("".join(text.split()))
    return 1 - len(_WORD_CHARACTER.findall(text)) / visible if visible else 0.0


def digit_share(text: str) -> float:
    """Share of the characters other than white space that are digits."""
    visible = len("".join(text.split()))
    return len(_DIGIT.findall(text)) / visible if visible else 0.0


def repeated_line_share(text: str) -> float:
    """Share of the lines with text that have stood in it before."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def repeated_words_share(text: str) -> float:
    """Share of the runs of ten words that have stood in it before; 0 for fewer than ten words."""
    words = text.split()
    runs = [tuple(words[start : start + _RUN_WORDS]) for start in range(len(words) - _RUN_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


# \w leaves out combining marks, which scripts such as Devanagari write their vowels with.
_WORD_CHARACTER = re.compile(r"[^\W_]|[\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u064b-\u065f\u0900-\u0dff\u0e31-\u0e4e]")
_DIGIT = re.compile(r"\d")
_RUN_WORDS = 10

_RULES: dict[str, Callable[[str, Any], bool]] = {
    "min_characters": lambda text, bound: len(text) < bound,
    "max_characters": lambda text, bound: len(text) > bound,
    "min_words": lambda text, bound: len(text.split()) < bound,
    "max_words": lambda text, bound: len(text.split()) > bound,
    "max_symbols": lambda text, bound: symbol_share(text) > bound,
    "max_digits": lambda text, bound: digit_share(text) > bound,
    "max_repeated_lines": lambda text, bound: repeated_line_share(text) > bound,
    "max_repeated_words": lambda text, bound: repeated_words_share(text) > bound,
    "pattern": lambda text, bound: re.search(bound, text) is None,
    "exclude_pattern": lambda text, bound: re.search(bound, text) is not None,
}
