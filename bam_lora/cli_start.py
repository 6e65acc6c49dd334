"""The commands of the first hour: init, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bam_lora import cli_complete

Language_ = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Language to teach: Bulgarian, български, bg, bul or bul_Cyrl.",
        autocompletion=cli_complete.languages,
    ),
]
Base_ = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Model to start from: a name of the list, a Hub id, a folder, a finished run.",
        autocompletion=cli_complete.bases,
    ),
]
Goal_ = Annotated[
    str | None,
    typer.Option(
        metavar="GOAL",
        help="pretrain-approximate (default), pretrain-minimal, instruct or single.",
        autocompletion=cli_complete.goals,
    ),
]
Memory_ = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of the GPU: 12GB; of one before RTX 30 its name: T4, 'V100 32GB'; 0: train on the CPU. "
        "Default: the GPU here.",
    ),
]


def init(
    file: Annotated[
        Path | None, typer.Argument(help="The recipe to write. Default: LANGUAGE.yaml.", metavar="FILE")
    ] = None,
    language: Language_ = None,
    base: Base_ = None,
    goal: Goal_ = None,
    gpu_memory: Memory_ = None,
    hours: Annotated[float | None, typer.Option(min=0.01, help="Time there is. Default: no limit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: defaults for what no flag says.")] = False,
) -> None:
    """Writes a recipe: asks for language, goal, GPU, hours, base.

    What a flag says is not asked. Any language of FineWeb-2 (over a thousand), by its English name, its own name or a
    code; a name that is misspelled or means several says which there are. Batch, accumulation, checkpointing and length
    are chosen to fit the GPU, the amount of text by the hours. Nothing is downloaded but the base's config, if it can
    be had. The recipe stands alone: edit it, then `bam-lora check` it and `bam-lora run` it. No file is replaced
    without --force.

    Examples:
        bam-lora init                                          asks for all of it
        bam-lora init --language Bulgarian --gpu-memory 12GB   asks for the rest
        bam-lora init --language sr-Latn --gpu-memory 24GB --hours 8 --yes
        bam-lora init my.yaml --language Thai --gpu-memory 16GB --yes
    """
    from bam_lora.init import Flags, new_recipe

    flags = Flags(language, base, goal, gpu_memory, hours)
    typer.echo(new_recipe(flags, file, force=force, asking=not yes))


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Looks whether this machine can do it: GPU, packages, disk.

    Each line is OK, a note (it works, but is worth knowing) or a PROBLEM, with what to do. Exit status 1 if there is a
    problem. Nothing is downloaded; of a Hub token only whether there is one is shown.

    Examples:
        bam-lora doctor
    """
    from bam_lora.doctor import diagnose, has_problem, render_json, render_text

    findings = diagnose(Path.cwd())
    typer.echo(json.dumps(render_json(findings), indent=2) if as_json else render_text(findings))
    if has_problem(findings):
        raise typer.Exit(1)
