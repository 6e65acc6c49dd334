"""The figures of a report as files: SVG, and PNG where resvg-py is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bam_lora.errors import UserError
from bam_lora.report.figure import Figure, Report
from bam_lora.report.figures import figures
from bam_lora.report.learned import learned_sections
from bam_lora.report.standalone import png, standalone, why_no_png
from bam_lora.store import write_bytes, write_text


def write_plots(folder: Path, reports: Sequence[Report], comparison: Mapping[str, Any] | None = None) -> str:
    """Writes every plot of the page as a file that stands for itself.

    Args:
        folder: Made if need be; files of the same names are replaced.
        reports: Reports of runs.
        comparison: What `compare` returned for them, or None.

    Returns:
        What to tell the user: how many files there are, of which kinds, and why there is no PNG where there is none.

    Raises:
        UserError: If there is a file in the folder's place.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError.of(str(folder), expected="a folder", found="a file", remedy="Choose another")
    documents = plot_documents(reports, comparison)
    without = why_no_png()
    for name, document in documents.items():
        write_text(folder / f"{name}.svg", document)
        if not without:
            write_bytes(folder / f"{name}.png", png(document))
    kinds = "SVG" if without else "SVG and PNG"
    return f"{folder}: {len(documents)} plots as {kinds}" + (f"\n{without}" if without else "")


def write_plane(folder: Path, report: Report) -> str | None:
    """Draws a run's plane of learning and forgetting for its model card, as PNG if that can be drawn, else as SVG.

    Args:
        folder: Of the card.
        report: Of the run.

    Returns:
        The picture's path in the folder; None where nothing was measured.
    """
    document = plot_documents([report], parts=("plane",)).get("plane")
    if document is None:
        return None
    name = f"figures/plane.{'svg' if why_no_png() else 'png'}"
    write_bytes(folder / name, document.encode("utf-8") if name.endswith("svg") else png(document))
    return name


def plot_documents(
    reports: Sequence[Report], comparison: Mapping[str, Any] | None = None, *, parts: Sequence[str] | None = None
) -> dict[str, str]:
    """{name of a file without its ending: SVG document} of every plot of the page.

    Args:
        reports: Reports of runs; with several, plots of one run have its name at the end of theirs.
        comparison: What `compare` returned for them, or None.
        parts: Of the page, as in `figures`; None: all.
    """
    documents: dict[str, str] = {}
    for figure in _all(reports, comparison, parts):
        ending = f"-{_slug(figure.run)}" if figure.run and len(reports) > 1 else ""
        for name, plot in figure.plots.items():
            title = figure.title if len(figure.plots) == 1 else _title_of(plot)
            documents[_free(f"{name}{ending}", documents)] = standalone(plot, title, figure.legend)
    return documents


def _all(
    reports: Sequence[Report], comparison: Mapping[str, Any] | None, parts: Sequence[str] | None
) -> Iterator[Figure]:
    for part, some in figures(reports, comparison).items():
        if parts is None or part in parts:
            yield from some
    for section in learned_sections(reports) if parts is None else []:
        for merge in section.merges:
            yield Figure(section.title, merge.plots, section.legend, section.caption, section.run)


def _title_of(plot: str) -> str:
    """What a plot of several calls itself, unescaped."""
    found = re.search(r"<title[^>]*>(.*?)</title>", plot, flags=re.DOTALL)
    assert found is not None, "every plot has a title"
    return str(Markup(found[1]).unescape())


def _slug(name: str) -> str:
    """A run's name as part of a file's name: letters of any script, digits, dots and hyphens."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def _free(name: str, taken: Mapping[str, str]) -> str:
    """The name, with a number where another run has it already."""
    number, free = 2, name
    while free in taken:
        number, free = number + 1, f"{name}-{number}"
    return free
