"""YAML with the place of every value, and back.

Plain scalars are read as YAML 1.2 reads them, because a recipe is about languages: `no` is Norwegian and not false,
`2e-4` is a number, `2024-10-01` is text. Keys that stand twice are errors; nothing but plain data is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bam_lora.errors import UserError
from bam_lora.recipe_values import Path as KeyPath

_MOST_VALUES = 20_000  # a recipe has hundreds; aliases of aliases can stand for billions
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_ONLY_PLAIN = "where only plain data may stand"
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text; in escapes where it holds line breaks of Unicode's own, which would come back as blanks."""
    style = '"' if any(mark in text for mark in _UNICODE_BREAKS) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_UNICODE_BREAKS = "\x85\u2028\u2029"
_Dumper.add_representer(str, _represent_text)

for _kind, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT), ("float", _SPECIAL_FLOAT)):
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(_TAG + _kind, _whole, None)
    _Dumper.add_implicit_resolver(_TAG + _kind, _whole, None)
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"<<\Z"), ["<"])


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or a word of the command line.

    Attributes:
        file: The file, or None for the command line.
        line: Its line, counted from 1.
    """

    file: Path | None
    line: int = 0


@dataclass
class Located:
    """Plain data and the place of every key and list item in it."""

    value: Any
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place | None:
        """The place of a key, or of the nearest thing around it that has one."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return None


def read_yaml(text: str, file: Path | None) -> Located:
    """Reads YAML text.

    Args:
        text: One YAML document.
        file: The file it is from, for places and errors; None for a value from the command line.

    Returns:
        The data with its places.

    Raises:
        UserError: If it is no YAML, has a key twice, or holds something other than plain data.
    """
    located = Located(None)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            located.value = _Builder(loader, file, located.places).build(node, ())
        return located
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise _bad_yaml(file, mark.line + 1 if mark else None, f"a mistake in its syntax ({problem})") from None
    except yaml.YAMLError as error:
        raise _bad_yaml(file, None, " ".join(str(error).split())) from None
    except RecursionError:
        raise _bad_yaml(file, None, "nesting without end") from None


def dump_yaml(value: Any) -> str:
    """Plain data as YAML that `read_yaml` reads back equal, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def _bad_yaml(file: Path | None, line: int | None, found: str) -> UserError:
    what = "--set" if file is None else str(file) if line is None else f"{file} line {line}"
    return UserError.of(what, expected="YAML", found=found, remedy="Correct it there")


class _Builder:
    """Turns the nodes of one document into data, noting places on the way."""

    def __init__(self, loader: _Loader, file: Path | None, places: dict[KeyPath, Place]) -> None:
        self.loader = loader
        self.file = file
        self.places = places
        self.count = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > _MOST_VALUES:
            raise _bad_yaml(self.file, _line(node), f"more than {_MOST_VALUES} values")
        if not isinstance(node, yaml.ScalarNode) and node.tag not in (_TAG + "map", _TAG + "seq"):
            raise _bad_yaml(self.file, _line(node), f"the tag {node.tag}, {_ONLY_PLAIN}")
        if isinstance(node, yaml.MappingNode):
            return {key: self._entry(key_node, value, (*path, key)) for key, key_node, value in self._entries(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self._entry(item, item, (*path, number)) for number, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def _entry(self, mark: yaml.Node, value: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = Place(self.file, _line(mark))
        return self.build(value, path)

    def _entries(self, node: yaml.MappingNode) -> Iterator[tuple[Any, yaml.Node, yaml.Node]]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self._key(key_node)
            if key in lines and key_node.tag != _TAG + "merge":
                raise UserError.of(
                    f"{self.file or '--set'} line {_line(key_node)}",
                    expected="every key once",
                    found=f"{key!r} again (first in line {lines[key]})",
                    remedy="Delete one of the two",
                )
            lines[key] = _line(key_node)
        self.loader.flatten_mapping(node)
        for key_node, value in node.value:
            yield self._key(key_node), key_node, value

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise _bad_yaml(self.file, _line(node), "a list or mapping as a key")
        return node.value

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text, kind = str(node.value), node.tag.removeprefix(_TAG)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            if kind == "float":
                return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1].isalpha() else text)
        except (ValueError, KeyError):
            raise _bad_yaml(self.file, _line(node), f"{text!r} tagged {kind}") from None
        if kind in ("str", "merge"):
            return text
        raise _bad_yaml(self.file, _line(node), f"the tag {node.tag}, {_ONLY_PLAIN}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
