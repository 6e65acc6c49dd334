"""The loom the three languages share: it turns a plot written as templates into text.

A template holds three kinds of marks, and a story is woven in this order:

- `(one|two|three)`: one of them; may be nested, and an empty part makes the rest optional;
- `<rule>`: a line of the language's rule of that name, a line not used before in the same story where there is one;
- `{phrase}`: words that must agree with somebody or something in the cast; the language's grammar says them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

_CHOICE = re.compile(r"\(([^()]*)\)")
_RULE = re.compile(r"<(\w+)>")
_PHRASE = re.compile(r"\{([^{}]*)\}")
_SENTENCE_START = re.compile(r"(^|[.!?][“\"]? |: (?=„))([„\"]?[^\W\d_])")
_QUESTION_TAG = re.compile(r"[!?]\" $")

Rules = Mapping[str, Sequence[str]]
Row = tuple[str, ...]


def table(text: str) -> list[Row]:
    """Reads a lexicon table: one entry a line, its forms separated by semicolons."""
    rows = [tuple(cell.strip() for cell in line.split(";")) for line in text.strip().splitlines()]
    assert len({len(row) for row in rows}) == 1, f"rows of unequal length near {rows[0]}"
    return rows


def words(text: str) -> list[str]:
    """Reads a lexicon list: entries separated by semicolons or new lines."""
    return [entry.strip() for entry in re.split(r"[;\n]", text) if entry.strip()]


def capitalise(text: str) -> str:
    """Makes every sentence begin with a capital letter; `?" asked Tom` stays as it is."""

    def start(match: re.Match[str]) -> str:
        return match[0] if _QUESTION_TAG.match(match[1]) else match[1] + match[2].upper()

    return _SENTENCE_START.sub(start, text)


class Weaver:
    """Weaves one story: draws from `rng`, never repeats a rule's line while another is left."""

    def __init__(self, rng: random.Random, rules: Rules, phrase: Callable[[str], str]) -> None:
        """Keeps the story's own memory of the lines already told.

        Args:
            rng: The story's random numbers.
            rules: Lines by rule name.
            phrase: The language's grammar: from the inside of `{...}` to words that agree.
        """
        self._rng = rng
        self._rules = rules
        self._phrase = phrase
        self._left: dict[str, list[str]] = {}

    def _line(self, rule: str) -> str:
        if not self._left.get(rule):
            self._left[rule] = list(self._rules[rule])
        lines = self._left[rule]
        return lines.pop(self._rng.randrange(len(lines)))

    def weave(self, template: str) -> str:
        """Expands a template into sentences."""
        text = template
        while match := _CHOICE.search(text) or _RULE.search(text):
            new = self._rng.choice(match[1].split("|")) if match[0][0] == "(" else self._line(match[1])
            text = text[: match.start()] + new + text[match.end() :]
        text = _PHRASE.sub(lambda match: self._phrase(match[1]), text)
        return capitalise(re.sub(r" +", " ", text).strip())
