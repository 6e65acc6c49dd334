"""The command that looks at a recipe before anything is spent on it: check."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from bam_lora.cli_next import after_check
from bam_lora.marked_text import OPEN

_INDENT = 12
_ROW = " " * 14  # before a line of a row


def check(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML (docs/recipe.md).", metavar="RECIPE")],
    output: Annotated[Path | None, typer.Option(help="Run directory, if not the recipe's.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set bam.slices=4. May be repeated."),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for a GPU with so much memory: 12GB; or for an old one: T4."),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Choose batch, accumulation, checkpointing and, if need be, length.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --fit: write a recipe that extends RECIPE with them.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train a few real steps in a temporary folder, for the hours.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Validates a recipe and says what it will do and take.

    Base, data, iterations, memory of the GPU, RAM, disk, time. Reads the first rows of every source and the base's
    headers; trains nothing unless told to (--measure). Exit status 1 if it cannot work, or does not fit the GPU, the
    memory or the disk that are there.

    Examples:
        bam-lora check german.yaml
        bam-lora check german.yaml --fit --gpu-memory 12GB --write fitted.yaml
        bam-lora check fitted.yaml --measure
    """
    from bam_lora.check_report import check_everything
    from bam_lora.errors import UserError
    from bam_lora.marked_text import wants_colour
    from bam_lora.recipe import load_recipe

    if write is not None:
        from bam_lora.fit_text import require_writable

        if not fit:
            raise UserError.of("--write", expected="--fit with it", found="none", remedy="Add --fit")
        require_writable(write, recipe)
    wanted = load_recipe(recipe, overrides or [], str(output) if output else None)
    colour = wants_colour() and not as_json
    found = check_everything(wanted, gpu_memory=gpu_memory, fit=fit, measure=measure, colour=colour)
    typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False) if as_json else _laid_out(found.lines()))
    if write is not None and found.fit is not None:
        from bam_lora.fit_text import write_fitted

        write_fitted(write, recipe, overrides or [], found.fit)
        typer.echo(f"{write}: written; it extends {recipe}", err=as_json)
    for problem in found.problems[:1]:
        raise problem
    chosen = fit and found.fit is not None and bool(found.fit.settings)
    if not as_json:
        typer.echo(after_check(recipe, overrides or [], output, fit=chosen, written=write, measured=measure))


def _laid_out(lines: list[str]) -> str:
    """On a terminal long lines continue under their text; a file or a pipe gets them whole."""
    if not sys.stdout.isatty():
        return "\n".join(lines)
    width = max(40, shutil.get_terminal_size().columns)
    return "\n".join(_wrapped(line, width) for line in lines)


def _wrapped(line: str, width: int) -> str:
    if OPEN in line or "\x1b" in line or line.startswith(_ROW):  # a row of the data, laid out already
        return line
    options: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False, "drop_whitespace": True}
    return textwrap.fill(line, width, subsequent_indent=" " * _INDENT, **options) if len(line) > width else line
