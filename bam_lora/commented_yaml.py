"""YAML files as trees that keep their comments, so that several can be merged into one that a person can read.

What is kept of a file: the comment at its head, the comment lines above a key, the remark behind it, and each value as
it is written. Mappings are opened down to single keys; lists stay the text they are, comments inside them included.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from bam_lora.errors import UserError
from bam_lora.recipe_yaml import read_yaml

WIDTH = 118
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C where it is built: ten times as fast
_REMARK = re.compile(r"\s*#\s?(.*)")


@dataclass(frozen=True)
class Entry:
    """A key's value and what is said about it.

    Attributes:
        value: The keys below it, or the text of its value.
        remark: Comment behind it.
        above: Lines of comment above it, without their #.
        flow: Whether a mapping stands on one line in braces.
    """

    value: Tree | str
    remark: str = ""
    above: tuple[str, ...] = ()
    flow: bool = False


Tree = dict[str, Entry]


@dataclass
class Commented:
    """A file: the lines of comment at its head, without their #, and its keys."""

    head: list[str] = field(default_factory=list)
    tree: Tree = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The first line of its head."""
        return self.head[0] if self.head else ""

    @property
    def notes(self) -> str:
        """The rest of its head, as one paragraph."""
        return " ".join(" ".join(self.head[1:]).split())


def read_commented(path: Path) -> Commented:
    """Reads a file of keys, without what it extends.

    Raises:
        UserError: If it is no YAML mapping.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise UserError.of(str(path), expected="YAML", found=" ".join(str(error).split()), remedy="Mend it") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError.of(str(path), expected="a mapping of keys", found="none", remedy="Write a fragment of a recipe")
    lines = text.splitlines()
    first = node.value[0][0].start_mark.line if node.value else len(lines)
    head = [_bare(line) for line in lines[:first] if line.lstrip().startswith("#")]
    tree = _read_mapping(node, text, lines)
    for key in list(tree)[:1]:  # what stands above the first key is the head
        tree[key] = replace(tree[key], above=())
    return Commented(head, tree)


def merge_trees(onto: Tree, new: Mapping[str, Entry]) -> None:
    """Puts keys into a tree as `extends` does: mappings key by key, all else in the place of what was there."""
    for key, entry in new.items():
        there = onto.get(key)
        if there is not None and isinstance(there.value, dict) and isinstance(entry.value, dict):
            merge_trees(there.value, entry.value)
            above = (*there.above, *(line for line in entry.above if line not in there.above))
            onto[key] = Entry(there.value, entry.remark or there.remark, above, there.flow and entry.flow)
        else:
            value = entry.value
            onto[key] = replace(entry, value=_copied(value) if isinstance(value, dict) else value)


def put(tree: Tree, key: str, value: str, remark: str = "", above: Sequence[str] = ()) -> None:
    """Sets a dotted key to the text of a value, making the mappings on the way."""
    *sections, last = key.split(".")
    for section in sections:
        entry = tree.setdefault(section, Entry({}))
        assert isinstance(entry.value, dict), f"{section} of {key} holds no keys"
        tree = entry.value
    tree[last] = Entry(value, remark, tuple(above))


def scalar(text: str) -> str:
    """A text as YAML writes it on one line: in quotes where a recipe would read it as something else."""
    try:
        if read_yaml(f"key: {text}\n", None).value == {"key": text}:
            return text
    except UserError:  # no YAML at all
        pass
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf"))).rstrip("\n")


def look_up(tree: Tree, key: str) -> str | None:
    """The text of a dotted key's value, or None if there is no such key or it holds others."""
    *sections, last = key.split(".")
    for section in sections:
        entry = tree.get(section)
        if entry is None or not isinstance(entry.value, dict):
            return None
        tree = entry.value
    entry = tree.get(last)
    return entry.value if entry is not None and isinstance(entry.value, str) else None


def write_tree(tree: Tree, indent: int = 0) -> Iterator[str]:
    """The lines of a tree."""
    margin = " " * indent
    for key, entry in tree.items():
        yield from (f"{margin}# {line}".rstrip() for line in entry.above)
        remark = f" # {entry.remark}" if entry.remark else ""
        if isinstance(entry.value, str):
            first, *others = entry.value.split("\n")
            if others or first.startswith("- "):
                yield f"{margin}{key}:{remark}"
                yield from (f"{margin}  {line}".rstrip() for line in (first, *others))
            else:
                yield f"{margin}{key}: {first}{remark}"
            continue
        line = _in_braces(entry)
        if line is not None and len(margin) + len(key) + len(line) + len(remark) < WIDTH:
            yield f"{margin}{key}: {line}{remark}"
        else:
            yield f"{margin}{key}:{remark}"
            yield from write_tree(entry.value, indent + 2)


def comment_lines(text: str, width: int = WIDTH - 2) -> list[str]:
    """A paragraph as lines for a comment."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _in_braces(entry: Entry) -> str | None:
    """A mapping on one line, if it was written so and holds no comments."""
    assert isinstance(entry.value, dict)
    parts = []
    for key, inner in entry.value.items():
        if not entry.flow or inner.above or inner.remark:
            return None
        text = inner.value if isinstance(inner.value, str) else _in_braces(inner)
        if text is None or "\n" in text or text.startswith("- "):
            return None
        parts.append(f"{key}: {text}")
    return "{" + ", ".join(parts) + "}"


def _copied(tree: Mapping[str, Entry]) -> Tree:
    return {
        key: replace(entry, value=_copied(entry.value)) if isinstance(entry.value, dict) else entry
        for key, entry in tree.items()
    }


def _read_mapping(node: yaml.MappingNode, text: str, lines: Sequence[str]) -> Tree:
    tree: Tree = {}
    for key, value in node.value:
        name = text[key.start_mark.index : key.end_mark.index]  # as it is written, with its quotes
        above = () if node.flow_style else tuple(_above(lines, key.start_mark.line))
        if isinstance(value, yaml.MappingNode):
            remark = "" if value.flow_style and node.flow_style else _remark_of_mapping(key, value, text, lines)
            tree[name] = Entry(_read_mapping(value, text, lines), remark, above, bool(value.flow_style))
        elif isinstance(value, yaml.SequenceNode) and not value.flow_style:
            remark = _remark_after(text, key.end_mark.index + 1)
            tree[name] = Entry(_block(value, text), remark, above)
        else:
            raw = text[value.start_mark.index : value.end_mark.index].strip()
            remark = "" if node.flow_style else _remark_after(text, value.end_mark.index)
            tree[name] = Entry(_dedented(raw, value.start_mark.column), remark, above)
    return tree


def _remark_of_mapping(key: yaml.Node, value: yaml.MappingNode, text: str, lines: Sequence[str]) -> str:
    return _remark_after(text, value.end_mark.index if value.flow_style else key.end_mark.index + 1)


def _above(lines: Sequence[str], line: int) -> list[str]:
    """The lines of comment right above a line."""
    found: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        found.insert(0, _bare(lines[line]))
    return found


def _remark_after(text: str, index: int) -> str:
    """The comment on the rest of a line."""
    match = _REMARK.fullmatch(text[index:].split("\n", 1)[0])
    return match[1].strip() if match else ""


def _block(node: yaml.SequenceNode, text: str) -> str:
    """A list's lines, without the comments after it, which are about the next key."""
    lines = text[node.start_mark.index : node.end_mark.index].rstrip().split("\n")
    while lines[-1].lstrip().startswith("#") or not lines[-1].strip():
        lines.pop()
    return _dedented("\n".join(lines), node.start_mark.column)


def _dedented(raw: str, column: int) -> str:
    """Lines after the first moved left by the column that the first one stood in."""
    first, *others = raw.split("\n")
    return "\n".join([first, *(line[min(column, len(line) - len(line.lstrip())) :].rstrip() for line in others)])


def _bare(line: str) -> str:
    return line.lstrip().removeprefix("#").removeprefix(" ").rstrip()
