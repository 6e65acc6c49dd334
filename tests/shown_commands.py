"""What the documents tell a reader to type: command lines and Python blocks, in the order of the page.

- Every line of a ```bash block, and every ```python block.
- Code in the prose that the command line would accept as it stands: `bam-lora schema` is a command, `bam-lora run` (no
  recipe) and `bam-lora status RUN` (a word in capitals stands for something) are names of commands.
- Lines of four spaces and more in the comment at the head of a recipe.
- The examples in the text of `--help`.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from recipe_hub import FULL, ROOT

from bam_lora.cli import app

DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "examples").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
]
_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_STANDS_FOR = re.compile(r"[A-Z]+(?:[/.\[_,=]?[A-Z]+)*\]?(?:\.\w+)?|.*(?:\.\.\.|…).*")  # RUN, ORG/NAME, RUN...
_WRONG_USAGE: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]  # typer brings its own click
_SETTING = re.compile(r"[A-Z_][A-Z0-9_]*=.*")


@dataclass(frozen=True)
class Shown:
    """Something to run: a command line, or Python (`kind`), where it stands."""

    page: str
    line: int
    text: str
    kind: str = "command"

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the command, without comments and without variables set for it; of Python none."""
        if self.kind == "python":
            return ()
        return tuple(itertools.dropwhile(_SETTING.fullmatch, shlex.split(self.text, comments=True)))

    @property
    def settings(self) -> dict[str, str]:
        """Environment variables that are set in front of the command."""
        if self.kind == "python":
            return {}
        words = itertools.takewhile(_SETTING.fullmatch, shlex.split(self.text, comments=True))
        return dict(word.split("=", 1) for word in words)

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page}:{self.line}"


def shown_in(page: Path) -> list[Shown]:
    """Everything to run on a page of Markdown, in its order."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    found = []
    for block in _BLOCK.finditer(text):
        first = _line(text, block.start()) + 1
        if block[2] == "bash":
            found += [Shown(name, first + offset, line) for offset, line in commands_in(block[3])]
        elif block[2] == "python":
            found.append(Shown(name, first, block[3], "python"))
    prose = _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for span in _SPAN.finditer(prose):
        command = " ".join(span[1].split())
        if is_whole(command):
            found.append(Shown(name, _line(prose, span.start()), command))
    return sorted(found, key=lambda one: one.line)


def shown_in_head(recipe: Path) -> list[Shown]:
    """The commands in the comment at the head of a recipe: indented lines, and those in its prose."""
    name = recipe.relative_to(ROOT).as_posix()
    comment = itertools.takewhile(lambda line: line.startswith("#"), recipe.read_text(encoding="utf-8").splitlines())
    lines = [line.removeprefix("#") for line in comment]
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if re.match(r" {4,}bam-lora ", line)]
    prose = "\n".join(lines)
    for span in _SPAN.finditer(prose):
        command = " ".join(span[1].split())
        if is_whole(command):
            numbered.append((_line(prose, span.start()), command))
    return [Shown(name, number, text) for number, text in sorted(numbered)]


def shown_in_help() -> list[Shown]:
    """The examples in the help of every command."""
    found = []
    for name, command in commands_of_app().items():
        for number, line in enumerate((command.help or "").splitlines(), 1):
            example = re.match(r"\s*(?:Example: )?(bam-lora .*)", line)
            if example:
                command_line = re.split(r"\s{2,}", example[1])[0]  # what follows says what it does
                found.append(Shown(f"bam-lora {name} --help", number, command_line))
    return found


def everything_shown() -> dict[str, list[Shown]]:
    """All of it by page, heads of recipes by the name of their file, help by its command."""
    pages = {page.relative_to(ROOT).as_posix(): shown_in(page) for page in DOCUMENTS}
    heads = {recipe.relative_to(ROOT).as_posix(): shown_in_head(recipe) for recipe in FULL}
    return {name: shown for name, shown in {**pages, **heads, "--help": shown_in_help()}.items() if shown}


def commands_of_app() -> dict[str, Any]:
    """The commands of `bam-lora` by name."""
    group = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in group.list_commands(None)}  # type: ignore[attr-defined,arg-type]


def is_whole(text: str) -> bool:
    """Whether this is a `bam-lora` command with all that it needs and nothing that stands for something else."""
    try:
        words = list(itertools.dropwhile(_SETTING.fullmatch, shlex.split(text)))
    except ValueError:
        return False
    if len(words) < 2 or words[0] != "bam-lora" or any(_STANDS_FOR.fullmatch(word) for word in words[1:]):
        return False
    command = commands_of_app().get(words[1])
    if command is None:
        return False
    try:
        command.make_context(words[1], words[2:])
    except (_WRONG_USAGE, typer.Exit):
        return False
    return True


def commands_in(block: str) -> Iterator[tuple[int, str]]:
    """The command lines of a block with their offsets in it: continued lines joined, `&&` taken apart."""
    joined, start = "", 0
    for offset, line in enumerate(block.splitlines()):
        start = start if joined else offset
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1].rstrip() + " "
            continue
        for part in joined.split(" && "):
            if shlex.split(part, comments=True):
                yield start, part.strip()
        joined = ""


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1
