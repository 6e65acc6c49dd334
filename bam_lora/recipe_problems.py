"""From what pydantic found wrong in a recipe to lines that a person can act on: place, expected, found, remedy."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bam_lora import recipe_rules, sft_arguments
from bam_lora.errors import UserError
from bam_lora.recipe_models import Recipe
from bam_lora.recipe_training import Training
from bam_lora.recipe_values import FINDINGS, WRONG_VALUE, Finding, Words
from bam_lora.recipe_values import Path as KeyPath
from bam_lora.recipe_yaml import Located, Place


def find_problems(values: Any, error: ValidationError) -> list[Finding]:
    """Everything wrong with a raw recipe.

    Args:
        values: The recipe as read.
        error: What `Recipe.model_validate(values)` raised.

    Returns:
        Places and sentences.
    """
    findings = [finding for item in error.errors() for finding in _translate(item)]
    if isinstance(values, Mapping):
        broken = {path[0] for path, _ in findings if path}
        if not any(item["type"] == FINDINGS and item["loc"] == () for item in error.errors()):
            findings += recipe_rules.check(_whole_sections(values, broken))
        findings += _training_keys(values, findings)
    return findings


def report(
    title: str, findings: Sequence[Finding], located: Located | None = None, main: Path | None = None
) -> UserError:
    """All findings as one error: one line for one, a list for several.

    Args:
        title: What was read.
        findings: Places and sentences.
        located: The recipe with its places, if it was read from a file.
        main: The file that lines without a file's name are in.
    """
    found = [(located.place(path) if located else None, path, message) for path, message in findings]
    lines = []
    for place, path, message in sorted(found, key=lambda item: _reading_order(item[0], main)):
        name = ".".join(map(str, path))
        lines.append((_where(place, main), f"{name}: {message}" if name else message))
    if len(lines) == 1:
        where, text = lines[0]
        separator = " " if where.startswith("line ") else ", " if where else ": "
        return UserError(f"{title}{separator}{where}{', ' if where else ''}{text}")
    listed = [f"  {where}{', ' if where else ''}{text}" for where, text in lines]
    return UserError("\n".join([f"{title}: {len(lines)} problems", *listed]))


def _reading_order(place: Place | None, main: Path | None) -> tuple[int, str, int]:
    """What has no place, the recipe itself, the files that it extends, the command line; each from top to bottom."""
    if place is None:
        return 0, "", 0
    if place.file is None:
        return 3, "", 0
    return 1 if place.file == main else 2, str(place.file), place.line


def _where(place: Place | None, main: Path | None) -> str:
    if place is None:
        return ""
    if place.file is None:
        return "--set"
    return f"line {place.line}" if place.file == main else f"{os.path.relpath(place.file)} line {place.line}"


def _whole_sections(values: Mapping[str, Any], broken: set[Any]) -> dict[str, Any]:
    """The validated values of the top-level keys that have no problem of their own."""
    sections: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if name in broken or (field.is_required() and name not in values):
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        annotation = field.annotation
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        given = values.get(name, default)
        sections[name] = annotation.model_validate(given) if is_section and annotation is not None else given
    return sections


def _training_keys(values: Mapping[str, Any], known: Sequence[Finding]) -> list[Finding]:
    """Problems of single training keys, which pydantic did not reach if another value there was wrong already."""
    training = values.get("training")
    if not isinstance(training, Mapping):
        return []
    seen = {path for path, _ in known}
    ours = {
        key: value
        for key, value in training.items()
        if key not in Training.model_fields or (key in sft_arguments.CHOICES and isinstance(value, str))
    }
    return [
        (("training", *path), message) for path, message in sft_arguments.check(ours) if ("training", *path) not in seen
    ]


def _translate(item: Any) -> Iterator[Finding]:
    path: KeyPath = tuple(item["loc"])
    kind, found = item["type"], item.get("input")
    if kind == FINDINGS:
        yield from (((*path, *inner), message) for inner, message in item["ctx"]["findings"])
    elif kind == "extra_forbidden":
        yield path, f"unknown key; {_nearest(path)}"
    elif kind == "invalid_key":
        yield path, f"expected text as a key, found {_show(path[-1])}"
    elif kind == "missing":
        yield path, f"expected {_expected(path)}, found nothing; the key is required"
    else:
        expected = item["ctx"]["expected"] if kind == WRONG_VALUE else _expected(path)
        yield path, f"expected {expected}, found {_show(found)}{_advice(kind, found)}"


def _advice(kind: str, found: Any) -> str:
    is_scalar = isinstance(found, int | float) and not isinstance(found, bool)
    return "; put it in quotes" if kind == "string_type" and is_scalar else ""


def _show(value: Any) -> str:
    """A value as the user wrote it, short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(path: KeyPath) -> str:
    """What to write instead of an unknown key."""
    name = str(path[-1])
    model = _model_at(path[:-1])
    assert model is not None, f"pydantic found an extra key outside a section: {path}"
    near = difflib.get_close_matches(name, model.model_fields, n=1)
    if near:
        return f"did you mean {near[0]}?"
    elsewhere = [key for key in _dotted(Recipe) if key.split(".")[-1] == name]
    if elsewhere:
        return f"did you mean {min(elsewhere, key=lambda key: key.count('.'))}?"
    return f"here can stand {', '.join(model.model_fields)}"


def _dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        yield prefix + name
        if inner is not None and typing.get_origin(field.annotation) is not list:
            yield from _dotted(inner, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation: `Lora`, or `Source` in `list[Source]`."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _model_at(path: KeyPath) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Recipe
    for name in path:
        if isinstance(name, str) and model is not None:
            field = model.model_fields.get(name)
            model = _section(field.annotation) if field else None
    return model


def _expected(path: KeyPath) -> str:
    """What may stand at a place, in words."""
    names = [name for name in path if isinstance(name, str)]
    if not names:
        return "a mapping of keys"
    parent = _model_at(tuple(names[:-1]))
    field = parent.model_fields.get(names[-1]) if parent else None
    if field is None:
        return "another value"
    return describe(field, item=bool(path) and isinstance(path[-1], int))


def describe(field: FieldInfo, *, item: bool = False) -> str:
    """What a field takes, in words, such as "an integer >= 1".

    Args:
        field: The field of a model.
        item: Whether it is about one item of the field's list.
    """
    annotation: Any = field.annotation
    if not item and (words := [extra.text for extra in field.metadata if isinstance(extra, Words)]):
        return words[0]
    if typing.get_origin(annotation) is list:
        inner = typing.get_args(annotation)[0]
        if item:
            return "a mapping of keys" if _section(inner) else "text"
        at_least = (
            "with at least one item" if any(isinstance(m, annotated_types.MinLen) for m in field.metadata) else ""
        )
        return f"a list {at_least}".strip()
    alternatives = _alternatives(annotation)
    kinds = " or ".join(_word(part) for part in alternatives if part is not type(None))
    limits = ", ".join(limit for limit in map(_limit, field.metadata) if limit)
    nothing = " or nothing" if type(None) in alternatives else ""
    return f"{kinds} {limits}".strip() + nothing


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def _word(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(_plain(value) for value in typing.get_args(annotation))
    if _section(annotation):
        return "a mapping of keys"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(annotation, "a list")


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _limit(limit: Any) -> str | None:
    for kind, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if isinstance(limit, getattr(annotated_types, kind.capitalize())):
            return f"{sign} {getattr(limit, kind)}"
    return None
