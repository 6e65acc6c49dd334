"""The recipe's own kinds of values: token counts, module lists, merge weights, and how a wrong one is reported."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

Path = tuple[str | int, ...]
"""Where a value stands in the recipe: `("data", "target", 0, "path")`."""
Finding = tuple[Path, str]
"""A problem that a check found, and where."""


@dataclass(frozen=True)
class Words:
    """What a value of a kind of its own may be, in words; stands in the annotation for errors and the reference."""

    text: str


WRONG_VALUE = "wrong_value"
FINDINGS = "findings"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_TOKENS = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*([kmbt]?)", re.IGNORECASE)
_TOKENS_WORDS = Words("a number of tokens >= 1, such as 500k, 200M, 1.5B or 1_000")
_MODULES_WORDS = Words("all-linear or a list of module names")
_TOKEN_ROWS_WORDS = Words("a list of different token numbers, or a mapping from modules to such lists")
_ROWS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True}
_SCALAR_SCHEMA = {"type": ["string", "number", "boolean"]}
_GIVEN_WEIGHTS_WORDS = Words("uniform, tokens or a list with one finite number per branch")
_PATTERN_WORDS = Words("a regular expression, such as self_attn or layers\\.(0|1)\\.")
_TEXT_PATTERN_WORDS = Words("a regular expression, such as (?i)cookie, or nothing")
_WHERE_WORDS = Words("a mapping from columns to a value, or a list of values: text, numbers, true or false; or nothing")
_SCALES_WORDS = Words("a list of numbers >= 0")
_WEIGHTS_WORDS = Words("uniform, tokens, learned, search or a list with one finite number per branch")


def wrong_value(expected: str) -> PydanticCustomError:
    """The error of a value that is not `expected`; the one found is added when it is reported."""
    return PydanticCustomError(WRONG_VALUE, "expected {expected}", {"expected": expected})


def findings_error(findings: Sequence[Finding]) -> PydanticCustomError:
    """The error of a model whose values are right one by one, but do not fit together."""
    text = "; ".join(f"{'.'.join(map(str, path))}: {message}" if path else message for path, message in findings)
    return PydanticCustomError(FINDINGS, "{text}", {"text": text, "findings": list(findings)})


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float; true and false are no numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tokens(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and (match := _TOKENS.fullmatch(value.strip())):
        number = Decimal(match[1].replace("_", "")) * _UNITS[match[2].lower()]
        if number == number.to_integral_value() and number >= 1:
            return int(number)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise wrong_value(_TOKENS_WORDS.text)


def _modules(value: Any) -> Any:
    if value == "all-linear":
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return value
    raise wrong_value(_MODULES_WORDS.text)


def _token_rows(value: Any) -> Any:
    for rows in value.values() if isinstance(value, dict) else [value]:
        numbers = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
        if not numbers or len(set(rows)) < len(rows) or (isinstance(value, dict) and not rows):
            raise wrong_value(_TOKEN_ROWS_WORDS.text)
    return value


def _weights(value: Any) -> Any:
    return value if value in ("learned", "search") else _given_weights(value, _WEIGHTS_WORDS)


def _given_weights(value: Any, words: Words = _GIVEN_WEIGHTS_WORDS) -> Any:
    if value in ("uniform", "tokens"):
        return value
    if not isinstance(value, list) or not value or not all(is_number(weight) for weight in value):
        raise wrong_value(words.text)
    if math.fsum(value) == 0.0:
        raise wrong_value("weights whose sum is not zero")
    return [float(weight) for weight in value]


def _scales(value: Any) -> Any:
    if not isinstance(value, list) or not value or not all(is_number(scale) and scale >= 0 for scale in value):
        raise wrong_value(_SCALES_WORDS.text)
    return [float(scale) for scale in value]


def _where(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict) or not value or not all(isinstance(column, str) and column for column in value):
        raise wrong_value(_WHERE_WORDS.text)
    listed = {column: wanted if isinstance(wanted, list) else [wanted] for column, wanted in value.items()}
    for wanted in listed.values():
        if not wanted or not all(isinstance(one, str | bool) or is_number(one) for one in wanted):
            raise wrong_value(_WHERE_WORDS.text)
    return listed


def _pattern(value: Any, words: Words = _PATTERN_WORDS) -> Any:
    try:
        re.compile(value)
    except (re.error, TypeError):
        raise wrong_value(words.text) from None
    return value


Tokens = Annotated[
    int | None,
    BeforeValidator(_tokens),
    _TOKENS_WORDS,
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}, {"type": "null"}]}),
]
Modules = Annotated[
    Literal["all-linear"] | list[str],
    BeforeValidator(_modules),
    _MODULES_WORDS,
    WithJsonSchema({"anyOf": [{"const": "all-linear"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
TokenRows = Annotated[
    list[int] | dict[str, list[int]],
    BeforeValidator(_token_rows),
    _TOKEN_ROWS_WORDS,
    WithJsonSchema({"anyOf": [_ROWS_SCHEMA, {"type": "object", "additionalProperties": _ROWS_SCHEMA}]}),
]
Weights = Annotated[
    Literal["uniform", "tokens", "learned", "search"] | list[float],
    BeforeValidator(_weights),
    _WEIGHTS_WORDS,
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["uniform", "tokens", "learned", "search"]},
                {"type": "array", "items": {"type": "number"}, "minItems": 1},
            ]
        }
    ),
]
Scales = Annotated[
    list[float],
    BeforeValidator(_scales),
    _SCALES_WORDS,
    WithJsonSchema({"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 1}),
]
RowsWhere = Annotated[
    dict[str, list[str | bool | int | float]] | None,
    BeforeValidator(_where),
    _WHERE_WORDS,
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": {
                        "anyOf": [_SCALAR_SCHEMA, {"type": "array", "items": _SCALAR_SCHEMA, "minItems": 1}]
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]
Pattern = Annotated[str, BeforeValidator(_pattern), _PATTERN_WORDS]
TextPattern = Annotated[
    str | None,
    BeforeValidator(lambda value: None if value is None else _pattern(value, _TEXT_PATTERN_WORDS)),
    _TEXT_PATTERN_WORDS,
]
GivenWeights = Annotated[
    Literal["uniform", "tokens"] | list[float],
    BeforeValidator(_given_weights),
    _GIVEN_WEIGHTS_WORDS,
    WithJsonSchema(
        {"anyOf": [{"enum": ["uniform", "tokens"]}, {"type": "array", "items": {"type": "number"}, "minItems": 1}]}
    ),
]
WeightsByModule = Annotated[
    dict[Pattern, GivenWeights], Words("a mapping from regular expressions to uniform, tokens or a list of weights")
]
