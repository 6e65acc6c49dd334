"""The report for a terminal: the verdict and the tables, aligned, without colours."""

from __future__ import annotations

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from bam_lora.report.chain import chain_iterations_table, chain_scores_table
from bam_lora.report.cost_table import cost_table
from bam_lora.report.envelope_text import alone, envelope_sentences, envelope_table
from bam_lora.report.tables import Cell, Table, pairs_table, shrink_table, summary_table
from bam_lora.report.tasks import task_tables
from bam_lora.report.verdict import verdict
from bam_lora.report.vocabulary import vocabulary_table

_WIDTH = 88


def render_text(reports: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None) -> str:
    """The verdict, the summary and, for several runs, their differences and the envelope's verdicts, as plain text.

    Args:
        reports: Reports of runs, from `collect` or `comparison["runs"]`.
        comparison: What `compare` returned for them, or None.

    Returns:
        Lines that end in a newline; control characters in names are replaced, so that none reaches the terminal.
    """
    parts = [_wrapped(verdict(reports, comparison)), _drawn(summary_table(reports))]
    if comparison is None:
        parts.insert(1, _wrapped(alone(reports)))
        parts += [
            _drawn(table) for table in (chain_scores_table(reports), chain_iterations_table(reports)) if table.rows
        ]
        if any(report["shrink"] for report in reports):
            parts.append(_drawn(shrink_table(reports)))
    else:
        parts += [_drawn(pairs_table(comparison)), _drawn(envelope_table(comparison))]
        parts.append("\n".join(_wrapped(sentence) for sentence in envelope_sentences(comparison)))
    if (grown := vocabulary_table(reports)).rows:
        parts.append(_drawn(grown))
    parts += [_drawn(table) for table in task_tables(reports, comparison) if table.rows]
    parts.append(_drawn(cost_table(reports)))
    return "\n\n".join(parts) + "\n"


def _width() -> int:
    """Columns for sentences: no more than a terminal shows."""
    return min(_WIDTH, max(40, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else _WIDTH


def printable(text: str) -> str:
    """The text on one line, its control and direction characters replaced."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf") else c for c in text)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(printable(text), _width(), break_on_hyphens=False))


def _columns(text: str) -> int:
    """How many terminal columns a text takes: wide characters two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def draw_table(table: Table) -> str:
    """A table as lines for a terminal."""
    return _drawn(table)


def _drawn(table: Table) -> str:
    head = [Cell(text, number=i > 0) for i, text in enumerate(table.columns)]
    grid = [[Cell(printable(cell.text), number=cell.number) for cell in row] for row in [head, *table.rows]]
    widths = [max(_columns(row[i].text) for row in grid) for i in range(len(head))]
    lines = ["  ".join(_padded(row[i], widths[i], i > 0) for i in range(len(head))).rstrip() for row in grid]
    lines.insert(1, "  ".join("─" * width for width in widths))
    note = ["", _wrapped(table.note)] if table.note else []
    return "\n".join([table.title, "", *lines, *note])


def _padded(cell: Cell, width: int, right: bool) -> str:
    space = " " * (width - _columns(cell.text))
    return space + cell.text if right else cell.text + space
