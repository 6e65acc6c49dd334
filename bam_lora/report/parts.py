"""What the page shows, in order: its parts, and the figures, tables and texts in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from bam_lora.report import format as fmt
from bam_lora.report import tables
from bam_lora.report.chain import chain_iterations_table, chain_scores_table
from bam_lora.report.cost_table import cost_table
from bam_lora.report.data_tables import data_table, tokenizer_table
from bam_lora.report.detail_tables import branches_table, sets_table
from bam_lora.report.envelope_text import envelope_sentences, envelope_table
from bam_lora.report.estimates import estimates_table
from bam_lora.report.figure import MANY_RUNS, Figure
from bam_lora.report.figures import figures
from bam_lora.report.learned import learned_sections
from bam_lora.report.searched import searched_sections
from bam_lora.report.tables import Cell, Report, Table
from bam_lora.report.tasks import task_pairs_table, tasks_table
from bam_lora.report.vocabulary import vocabulary_table

_MOST_BESIDE_A_FIGURE = 2
# Tables of scores, in the order of the page: functions of the reports; one without rows is left out.
SCORE_TABLES = (chain_scores_table, tables.scores_table, tasks_table, vocabulary_table, tables.shrink_table, sets_table)


@dataclass(frozen=True)
class Block:
    """Something to show; `kind` names the macro of the template that draws it, `titled` whether under a heading."""

    kind: str
    value: Any
    titled: bool = True


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Part:
    """A part of the page: its id, its name in the contents, its blocks."""

    ident: str
    name: str
    blocks: list[Block]


@dataclass(frozen=True)
class Tile:
    """A key figure, and a line of words and numbers under it."""

    label: str
    cell: Cell
    note: list[str | Cell]


def parts(reports: Sequence[Report], comparison: Mapping[str, Any] | None) -> list[Part]:
    """Every part of the page that has something in it.

    Args:
        reports: Reports of runs.
        comparison: What `compare` returned for them, or None.
    """
    drawn = figures(reports, comparison)
    learned = [*learned_sections(reports), *searched_sections(reports)]
    times, estimated = _tables([cost_table(reports)]), _tables([estimates_table(reports)])
    found = [
        Part("result", "Result", _result(reports, comparison, drawn["plane"])),
        Part(
            "course", "Course", [*_figures(drawn["course"]), *_of_runs(reports, drawn["losses"], "Losses of each run")]
        ),
        Part("samples", "Samples", [Block("samples", samples)] if (samples := _samples(reports)) else []),
        Part(
            "change",
            "Change",
            [
                *_figures(drawn["change"]),
                *_of_runs(reports, drawn["layers"], "Layers of each run"),
                *(Block("learned", section) for section in learned),
            ],
        ),
        Part("scores", "Scores", _scores(reports)),
        Part("iterations", "Iterations", _iterations(reports)),
        Part("data", "Data", [*_figures(drawn["data"]), *_tables([data_table(reports), tokenizer_table(reports)])]),
        Part("cost", "Cost", [*_side_by_side(reports, _figures(drawn["cost"]), times), *estimated]),
        Part("recipe", "Recipe", _recipe(reports)),
    ]
    return [part for part in found if part.blocks]


def tiles(reports: Sequence[Report]) -> list[Tile]:
    """The key figures of a run on its own; several runs have their table."""
    if len(reports) != 1:
        return []
    summary, cost = reports[0]["summary"], reports[0]["cost"]
    found = [
        Tile(name.capitalize(), _number(fmt.signless(summary[name]), summary[name]), _from_to(summary, role))
        for name, role in (("learned", "target"), ("forgotten", "source"))
        if summary[name] is not None
    ]
    relative, norm = summary["delta_relative"], summary["delta_norm"]
    if relative is not None:
        change = _number(f"{norm:,.4g}", norm)
        found.append(
            Tile("Change of the weights", _number(fmt.percent(relative), relative), ["|ΔW| ", change, " over |W|"])
        )
    if cost["wall_seconds"] is not None:
        tokens = _number(fmt.count(cost["train_tokens"]), cost["train_tokens"])
        wall = _number(fmt.duration(cost["wall_seconds"]), cost["wall_seconds"])
        found.append(Tile("Wall time", wall, [tokens, " training tokens"]))
    return found


def _from_to(summary: Mapping[str, Any], role: str) -> list[str | Cell]:
    ends = [_number(fmt.signless(summary[f"{role}_{when}"]), summary[f"{role}_{when}"]) for when in ("before", "after")]
    return [f"{role} ", ends[0], " → ", ends[1], " bits per byte"]


def _number(text: str, value: float | None) -> Cell:
    return Cell(text, value, number=True)


def _result(reports: Sequence[Report], comparison: Mapping[str, Any] | None, plane: Sequence[Figure]) -> list[Block]:
    summary = Block("table", tables.summary_table(reports))
    blocks = _side_by_side(reports, _figures(plane), [summary])
    if comparison is not None:
        blocks += _tables([tables.pairs_table(comparison), envelope_table(comparison), task_pairs_table(comparison)])
        blocks.append(Block("sentences", envelope_sentences(comparison)))
    return blocks


def _scores(reports: Sequence[Report]) -> list[Block]:
    blocks, branches = _tables(table(reports) for table in SCORE_TABLES), tables.branch_scores_table(reports)
    return [*blocks, Block("fold", Fold(branches.title, [Block("bare", branches)]))] if branches.rows else blocks


def _iterations(reports: Sequence[Report]) -> list[Block]:
    chain, own = chain_iterations_table(reports), tables.iterations_table(reports)
    blocks = [*_tables([chain]), *([Block("table", own, titled=bool(chain.rows))] if own.rows else [])]
    branches = branches_table(reports)
    return [*blocks, Block("fold", Fold(branches.title, [Block("bare", branches)]))] if branches.rows else blocks


def _side_by_side(reports: Sequence[Report], figure: list[Block], table: list[Block]) -> list[Block]:
    """A figure and a table with a column for every run, as long as there is room."""
    narrow = len(reports) <= _MOST_BESIDE_A_FIGURE
    return [Block("pair", [*figure, *table])] if figure and table and narrow else [*figure, *table]


def _figures(some: Iterable[Figure]) -> list[Block]:
    return [Block("figure", figure) for figure in some]


def _tables(some: Iterable[Table]) -> list[Block]:
    return [Block("table", table) for table in some if table.rows]


def _of_runs(reports: Sequence[Report], some: Sequence[Figure], title: str) -> list[Block]:
    """Figures of one run each: folded where there are many runs."""
    blocks = _figures(some)
    if len(blocks) > 1 and all(len(figure.plots) == 1 for figure in some):
        blocks = [Block("row", blocks)]
    return [Block("fold", Fold(title, blocks))] if len(reports) > MANY_RUNS and blocks else blocks


def _recipe(reports: Sequence[Report]) -> list[Block]:
    blocks = _tables([tables.recipe_differences_table(reports)]) if len(reports) > 1 else []
    for report in reports:
        blocks.append(Block("fold", Fold(f"Recipe of {report['name']}", [Block("code", _yaml(report["recipe"]))])))
    environment = tables.environment_table(reports)
    if environment.rows:
        blocks.append(Block("fold", Fold(environment.title, [Block("bare", environment)])))
    return blocks


def _yaml(recipe: Any) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


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
