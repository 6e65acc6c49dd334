"""The options of `bam-lora eval` for benchmarks, and how their scores are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bam_lora.errors import UserError

if TYPE_CHECKING:
    from bam_lora.tasks import TaskSpec

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        help="Benchmarks of lm-evaluation-harness, or task files (.yaml); docs/evaluation.md. May be repeated.",
    ),
]
NumFewshot = Annotated[
    int | None, typer.Option(help="Solved examples before each question of --tasks. Default: as the task says.")
]
Limit = Annotated[int | None, typer.Option(help="Only the first so many documents of each of --tasks. Default: all.")]


def specs_of(tasks: Sequence[str] | None, num_fewshot: int | None, limit: int | None) -> list[TaskSpec]:
    """The tasks that the options name."""
    names = [name.strip() for listed in tasks or [] for name in listed.split(",") if name.strip()]
    for option, value, least in (("--num-fewshot", num_fewshot, 0), ("--limit", limit, 1)):
        if value is not None and value < least:
            raise UserError.of(option, expected=f"at least {least}", found=str(value), remedy="Raise it")
        if value is not None and not names:
            raise UserError.of(option, expected="--tasks that it is for", found="none", remedy="Name them")
    if not names:
        return []
    from bam_lora.tasks import TaskSpec

    return [TaskSpec(name, num_fewshot, limit) for name in names]


def tasks_text(tasks: Sequence[Mapping[str, Any]]) -> str:
    """The scores of several tasks as a table for a terminal."""
    from bam_lora.report.tasks import single_table
    from bam_lora.report.text import draw_table

    return draw_table(single_table(tasks))
