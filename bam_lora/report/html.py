"""The report as one HTML file that needs nothing else: no network, no script, light and dark, any width."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import yaml

from bam_lora.report import tables
from bam_lora.report.chain import chain_iterations_table, chain_scores_table
from bam_lora.report.cost_table import cost_table
from bam_lora.report.data_tables import data_table, tokenizer_table
from bam_lora.report.envelope_text import alone, envelope_sentences, envelope_table
from bam_lora.report.figure import MANY_RUNS
from bam_lora.report.figures import figures, run_figures
from bam_lora.report.learned import learned_sections
from bam_lora.report.searched import searched_sections
from bam_lora.report.tasks import task_tables
from bam_lora.report.verdict import verdict
from bam_lora.report.vocabulary import vocabulary_table

Report = Mapping[str, Any]
TEMPLATE = "report.html.j2"


def render_html(reports: Sequence[Report], comparison: Mapping[str, Any] | None) -> str:
    """Draws the page.

    Args:
        reports: Reports of runs, from `collect` or `comparison["runs"]`.
        comparison: What `compare` returned for them, or None for a run on its own.

    Returns:
        The whole document. All text in it that comes from files is escaped; every number is in a `<data>` element
        whose `value` is the one in report.json.
    """
    return _template().render(
        reports=reports,
        title=", ".join(report["name"] for report in reports),
        verdict=verdict(reports, comparison),
        facts=_facts(reports),
        summary=tables.summary_table(reports),
        pairs=None if comparison is None else tables.pairs_table(comparison),
        alone=alone(reports) if comparison is None else None,
        envelope=None if comparison is None else envelope_table(comparison),
        envelope_sentences=[] if comparison is None else envelope_sentences(comparison),
        figures=figures(reports, comparison),
        run_figures=run_figures(reports),
        fold_runs=len(reports) > MANY_RUNS,
        learned=[*learned_sections(reports), *searched_sections(reports)],
        samples=_samples(reports),
        details=[
            chain_scores_table(reports),
            chain_iterations_table(reports),
            tables.scores_table(reports),
            *task_tables(reports, comparison),
            vocabulary_table(reports),
            tables.shrink_table(reports),
            tables.iterations_table(reports),
            cost_table(reports),
            data_table(reports),
            tokenizer_table(reports),
        ],
        recipe_differences=tables.recipe_differences_table(reports) if len(reports) > 1 else None,
        recipes=[(report["name"], _yaml(report["recipe"])) for report in reports],
        environment=tables.environment_table(reports),
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
    return environment.get_template(TEMPLATE)


def _unbroken(text: str) -> str:
    """On a narrow screen a number may break before its error, but not before its unit."""
    return text.replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}±", " ±")


def _yaml(recipe: Any) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def _facts(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """What one wants to know before any number, as far as all runs share it; the tables show where they differ."""
    facts = [
        ("Base", [report["base"] for report in reports]),
        ("Strategy", [report["strategy"] for report in reports]),
        ("Seed", [report["seeds"]["run"] for report in reports]),
        ("Iterations", [tables.progress(report) for report in reports]),
    ]
    return [(label, str(values[0])) for label, values in facts if values.count(values[0]) == len(values)]


def _samples(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """By prompt: how the base goes on, then how each run's newest model does."""
    prompts = dict.fromkeys(sample["prompt"] for report in reports for sample in report["samples"])
    result = []
    for prompt in prompts:
        texts: dict[str, str] = {}
        for report in reports:
            mine = [sample for sample in report["samples"] if sample["prompt"] == prompt]
            newest = max((sample["iteration"] for sample in mine), default=0)
            for sample in sorted(mine, key=lambda sample: int(sample["iteration"])):
                if sample["iteration"] == 0:
                    texts.setdefault("Before", _continuation(sample))
                elif sample["iteration"] == newest:
                    label = f"After, {report['name']}" if len(reports) > 1 else f"After iteration {newest}"
                    texts[label] = _continuation(sample)
        result.append({"prompt": prompt, "texts": texts})
    return result


def _continuation(sample: Mapping[str, Any]) -> str:
    return str(sample["text"]).removeprefix(sample["prompt"]).strip()
