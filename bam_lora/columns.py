"""The columns of a data set: what kind of values they hold, and which of them the user may have meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bam_lora.terminal_text import escaped

_TEXT_NAMES = ("text", "content", "document", "body", "article", "raw_content", "markdown", "passage", "sentence")
_QUESTIONS = ("question", "query", "prompt", "instruction", "input", "user")
_ANSWERS = ("answer", "response", "completion", "output", "target", "assistant", "chosen")
_KINDS = ((bool, "true or false"), (int, "whole number"), (float, "number"), (str, "text"), (bytes, "bytes"))
_SHOWN, _KEYS = 24, 8


def describe_columns(rows: Iterable[Mapping[str, Any]]) -> str:
    """The columns of some rows, each with the kinds of values found in it: `text (text), id (whole number)`."""
    kinds: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, value in row.items():
            found = kinds.setdefault(str(name), {})
            if value is not None:
                found[kind(value)] = None
    named = [f"{escaped(name)} ({' or '.join(found) or 'nothing'})" for name, found in kinds.items()]
    more = len(named) - _SHOWN
    return ", ".join(named[:_SHOWN]) + (f" and {more} more" if more > 0 else "") or "none"


def names(row: Mapping[str, Any]) -> str:
    """The names of a row's columns for a message, sorted."""
    return escaped(", ".join(sorted(map(str, row)))) or "none"


def kind(value: Any) -> str:
    """What sort of value it is, in words: `list of text`."""
    if isinstance(value, Mapping):
        keys = list(map(str, value))
        more = f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else ""
        return f"mapping of {escaped(', '.join(keys[:_KEYS]))}{more}" if keys else "mapping"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        inner = next((one for one in value if one is not None), None)
        return "list" if inner is None else f"list of {kind(inner)}"
    return next((name for kind, name in _KINDS if isinstance(value, kind)), type(value).__name__)


def text_remedy(row: Mapping[str, Any]) -> str:
    """What to do about a source whose text column is not there, with a guess at what was meant."""
    if messages := _message_columns(row):
        return f"Column {messages[0]!r} holds conversations: set this source's `mode: chat`"
    advice = "Name the column with the text in this source's `text:`"
    guess = _text_column(row)
    return f"{advice}; it looks like {guess!r}" if guess is not None else advice


def chat_remedy(row: Mapping[str, Any]) -> str:
    """What to do about a row of chat data in none of the known shapes, with a guess at what was meant."""
    if messages := _message_columns(row):
        return f"Column {messages[0]!r} looks like messages: name it in this source's `text:`"
    question, answer = (_first(row, wanted) for wanted in (_QUESTIONS, _ANSWERS))
    if question is not None and answer is not None:
        return f"Rename {question!r} to 'instruction' and {answer!r} to 'output', which they look like"
    advice = "Rename the columns, or set `mode: text` for a source of plain text"
    guess = _text_column(row)
    return f"{advice} (`text: {guess}`)" if guess is not None and guess.isprintable() else advice


def _message_columns(row: Mapping[str, Any]) -> list[str]:
    """Columns that hold lists of messages."""
    return [
        str(name)
        for name, value in row.items()
        if isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and value
        and all(isinstance(one, Mapping) and {"role", "from"} & set(one) for one in value)
    ]


def _text_column(row: Mapping[str, Any]) -> str | None:
    """The column most likely to hold documents: by its name, else the one with the longest text of several words."""
    known = _first(row, _TEXT_NAMES)
    if known is not None:
        return known
    texts = {str(name): value for name, value in row.items() if isinstance(value, str) and len(value.split()) > 1}
    return max(texts, key=lambda name: len(texts[name]), default=None)


def _first(row: Mapping[str, Any], wanted: Sequence[str]) -> str | None:
    """The first of the wanted names that a column with text has, as the row writes it."""
    found = {str(name).lower(): str(name) for name, value in row.items() if isinstance(value, str)}
    return next((found[name] for name in wanted if name in found), None)
