"""The text of `--help`: whole at 80 columns, with an example of each command, and defaults and units of its numbers."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_type_hints

import pytest
from shown_commands import commands_of_app, is_whole, shown_in_help
from typer.testing import CliRunner

from bam_lora.cli import app

COLUMNS = 80
COMMANDS = commands_of_app()
# What a number can be of: a word of the option's own name, of its text, or of the letter that stands for it.
UNITS = (
    "bytes", "tokens", "gb", "hours", "seconds", "share", "rank", "factor", "weight", "λ", "μ", "documents", "examples",
    "seed", "port",
)  # fmt: skip


def shown(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": str(COLUMNS)})
    assert result.exit_code == 0, result.output
    return result.output


def options(name: str) -> list[Any]:
    return [one for one in COMMANDS[name].params if not getattr(one, "hidden", False)]


def joined(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_the_terminal(name: str) -> None:
    for line in shown(*name.split()).splitlines():
        assert len(line) <= COLUMNS, line


def test_the_list_of_commands_says_what_each_does() -> None:
    text = shown()
    listed = text[text.index("Commands:") :]
    for name in COMMANDS:
        said = re.search(rf"^  {name}  +(\S.*)$", listed, re.MULTILINE)
        assert said, name
        assert not said[1].endswith("..."), f"{name}: the first sentence of its help is too long for the list"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_to_copy(name: str) -> None:
    examples = [one.text for one in shown_in_help() if one.page == f"bam-lora {name} --help"]
    assert examples
    lines = [re.split(r"\s{3,}", line.strip())[0] for line in shown(name).splitlines()]
    for example in examples:
        assert is_whole(example), f"{example}: not a whole command"
        assert example in lines, f"{example}: broken over two lines at {COLUMNS} columns"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name: str) -> None:
    text = joined(shown(name))
    for option in options(name):
        said = joined(getattr(option, "help", "") or "")
        assert said, f"bam-lora {name} {option.name}"
        assert said.split("  ")[0].rstrip(".") in text, f"bam-lora {name} {option.name}: not shown"


def numbers(name: str) -> set[str]:
    """The parameters of a command that are numbers."""
    callback = next(one.callback for one in app.registered_commands if name in (one.name, one.callback.__name__))  # type: ignore[union-attr]
    hints = get_type_hints(inspect.unwrap(callback))  # type: ignore[arg-type]
    return {key for key, hint in hints.items() if {"int", "float"} & set(re.findall(r"\w+", str(hint)))}


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_have_defaults_and_units(name: str) -> None:
    for option in options(name):
        if option.name not in numbers(name) or option.required:
            continue
        place, said = f"bam-lora {name} {option.opts[0]}", option.help
        assert option.default is not None or "efault" in said, f"{place}: says no default"
        words = f"{option.opts[0]} {said}".lower()
        assert any(re.search(rf"(?<![a-z]){unit}", words) for unit in UNITS), f"{place}: says no unit"


def test_texts_of_options_have_their_defaults() -> None:
    """An option with a value of its own shows it, one without says what happens where it is not given."""
    checked = 0
    for name in COMMANDS:
        text = joined(shown(name))
        for option in options(name):
            plain = isinstance(option.default, str | int | float) and not isinstance(option.default, bool)
            if plain and not option.required and option.param_type_name == "option":
                assert f"[default: {option.default}]" in text, f"bam-lora {name} {option.opts[0]}"
                checked += 1
    assert checked > 10
