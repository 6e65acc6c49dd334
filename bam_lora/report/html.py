"""The report as one HTML file that needs nothing else: no network, no script, light and dark, any width."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jinja2
from markupsafe import Markup

from bam_lora.report import tables
from bam_lora.report.card_front import is_local
from bam_lora.report.envelope_text import alone
from bam_lora.report.parts import parts, tiles
from bam_lora.report.verdict import verdict

Report = Mapping[str, Any]
TEMPLATE = "report.html.j2"


def render_html(reports: Sequence[Report], comparison: Mapping[str, Any] | None) -> str:
    """Draws the page.

    Args:
        reports: Reports of runs, from `collect` or `comparison["runs"]`.
        comparison: What `compare` returned for them, or None for a run on its own.

    Returns:
        The whole document. All text in it that comes from files is escaped; every number of a table is in a `<data>`
        element whose `value` is the one in report.json, that of a mark in a `data-` attribute.
    """
    return _template().render(
        title=", ".join(report["name"] for report in reports),
        verdict=verdict(reports, comparison),
        alone=alone(reports) if comparison is None else None,
        tiles=tiles(reports),
        facts=_facts(reports),
        parts=parts(reports, comparison),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bam_lora.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    environment.filters["codes"] = _codes
    return environment.get_template(TEMPLATE)


def _unbroken(text: str) -> str:
    """On a narrow screen a number may break before its error, but not before its unit."""
    return text.replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}±", " ±")


def _codes(text: str) -> Markup:
    """Escapes a text and sets what stands between backticks as code."""
    pieces = re.split(r"`([^`]+)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if place % 2 else piece for place, piece in enumerate(pieces)
    )


def _facts(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """What one wants to know before any number, as far as all runs share it; the tables show where they differ."""
    facts = [
        ("Base", [_named(report["base"]) for report in reports]),
        ("Strategy", [report["strategy"] for report in reports]),
        ("Seed", [report["seeds"]["run"] for report in reports]),
        ("Iterations", [tables.progress(report) for report in reports]),
    ]
    return [(label, str(values[0])) for label, values in facts if values.count(values[0]) == len(values)]


def _named(base: Any) -> str:
    """A Hub id, or the name of a folder: where that is stands in the recipe."""
    return PurePath(str(base)).name if is_local(str(base)) else str(base)
