"""The documents are true where a program can tell: links, commands, targets, Python blocks."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import bam_lora
from bam_lora.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERYWHERE = {"--help", "-h", "--verbose", "--install-completion", "--show-completion"}

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_COMMAND = re.compile(r"(?<![\w/.-])bam-lora(?:[ ]+(?P<words>[^`\n]*))?$", re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [match[3] for match in _FENCE.finditer(text_of(page)) if match[2] == language]


def prose(page: Path) -> str:
    return _FENCE.sub("", text_of(page))


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `bam-lora` wherever it is shown: lines of blocks, and spans of code in the prose."""
    shown = [match[3].replace("\\\n", " ") for match in _FENCE.finditer(text_of(page))] + [
        " ".join(span.split()) for span in _SPAN.findall(prose(page))
    ]
    for text in shown:
        for line in text.splitlines():
            match = _COMMAND.search(re.split(r"\s#|&&|;|\|", line)[0].rstrip())
            if match and match["words"]:
                yield shlex.split(match["words"])


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options() -> dict[str, set[str]]:
    """Every command of the command line with its options."""
    group = typer.main.get_command(app)
    names = group.list_commands(None)  # type: ignore[attr-defined,arg-type]
    found = {}
    for name in names:
        command = group.get_command(None, name)  # type: ignore[attr-defined,arg-type]
        found[name] = {option for one in command.params for option in [*one.opts, *one.secondary_opts]}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    known = options()
    for first, *rest in commands(page):
        if first in EVERYWHERE:
            continue
        assert first in known, f"{page.name}: bam-lora {first}"
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert used <= known[first] | EVERYWHERE, f"{page.name}: bam-lora {first} {' '.join(rest)}"


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_options_named_alone_exist(page: Path) -> None:
    known = set().union(*options().values()) | EVERYWHERE
    named = {span.split()[0] for span in _SPAN.findall(prose(page)) if span.startswith("--")}
    assert named <= known, page.name


def test_the_readme_shows_the_main_commands() -> None:
    shown = {words[0] for words in commands(README)}
    assert {"quickstart", "check", "run", "status", "report", "compare", "merge", "fold", "eval"} <= shown


def test_the_two_commands_come_first_and_exist() -> None:
    first = blocks(README, "bash")[0]
    assert 0 <= first.find("make quickstart") < first.find("make test")
    assert text_of(README).find("bam-lora ") > text_of(README).find("make quickstart")
    assert "<!-- quickstart output -->" in text_of(README)
    assert "<!-- /quickstart output -->" in text_of(README)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_exist_in_the_makefile(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", text_of(ROOT / "Makefile"), re.MULTILINE))
    shown = "\n".join([*blocks(page, "bash"), *_SPAN.findall(prose(page))])
    named = set(re.findall(r"(?:^|[\s=]|\w )make ([a-z][\w-]*)", shown, re.MULTILINE))
    assert {"quickstart", "test"} <= targets
    assert named <= targets


def test_python_in_the_readme_compiles_and_its_names_exist() -> None:
    shown = blocks(README, "python")
    assert shown
    imported = set()
    for block in shown:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "bam_lora":
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert all(name and importlib.util.find_spec(name.split(".")[0]) for name in names)
    assert {"load_recipe", "run", "merge_adapters", "fold"} <= imported <= set(bam_lora.__all__)


def test_names_of_modules_and_files_exist() -> None:
    """Files of the repository that the documents name in code spans are there."""
    for page in PAGES:
        for span in _SPAN.findall(prose(page)):
            if re.fullmatch(r"(bam_lora|tests|recipes|benchmarks|docs)/[\w./-]+\.(py|yaml|md|json)", span):
                assert (ROOT / span).exists(), f"{page.name}: {span}"


def test_contributing_names_every_module() -> None:
    table = text_of(ROOT / "CONTRIBUTING.md").partition("| Room |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+\.py)`", row.split("|")[1])]
    assert sorted(named) == sorted(path.name for path in (ROOT / "bam_lora").glob("*.py"))


def test_the_index_names_every_page() -> None:
    linked = set(_LINK.findall(text_of(ROOT / "docs" / "README.md")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked
