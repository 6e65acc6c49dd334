"""The report's tables about texts: the training data and what was left out of it, the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bam_lora.report import format as fmt
from bam_lora.report.tables import Cell, Report, Table
from bam_lora.row_filter import Where


def data_table(reports: Sequence[Report]) -> Table:
    """One row a source of training text; which of its rows were chosen (`where`) only if some source says."""
    chosen = any(source.get("where") for report in reports for source in (report["data"] or {}).get("sources", []))
    rows = []
    for report in reports:
        for source in (report["data"] or {}).get("sources", []):
            numbers = [source.get(key) for key in ("documents", "tokens", "used_tokens", "bytes")]
            shown = [fmt.size(v) if i == 3 else fmt.count(v) for i, v in enumerate(numbers)]
            cells = [Cell(text, value, number=True) for text, value in zip(shown, numbers, strict=True)]
            names = [Cell(str(source.get(key) or fmt.MISSING)) for key in ("path", "role")]
            names[1:1] = [Cell(_chosen(source))] if chosen else []
            rows.append([*_run(report, reports), *names, *cells, Cell(_reasons(source.get("dropped") or {}))])
    columns = [
        "Source",
        *(["Rows chosen"] if chosen else []),
        "Role",
        "Documents",
        "Tokens",
        "Tokens used",
        "Text",
        "Rows left out",
    ]
    note = " ".join([*_totals(reports), *_contamination(reports)])
    return Table("Training data", [*_run_column(reports), *columns], rows, note)


def _chosen(source: Mapping[str, Any]) -> str:
    where = Where.of(source.get("where"))
    return fmt.MISSING if where is None else where.describe()


def _totals(reports: Sequence[Report]) -> list[str]:
    """How much of what was planned to be trained on, a sentence a run."""
    sentences = []
    for report in reports:
        total, target, replay = ((report["data"] or {}).get(f"{key}_tokens") for key in ("train", "target", "replay"))
        if total is not None:
            text = f"Planned: {fmt.count(total)} training tokens, {fmt.count(target)} of them target and "
            sentences.append(f"{_of(report, reports)}{text}{fmt.count(replay)} replay.")
    return sentences


def _reasons(dropped: Mapping[str, int]) -> str:
    words = (f"{fmt.count(rows)} {reason.replace('_', ' ')}" for reason, rows in dropped.items())
    return ", ".join(words) or fmt.MISSING


def _contamination(reports: Sequence[Report]) -> list[str]:
    return [
        f"{_of(report, reports)}{fmt.count(part['found'])} of {fmt.count(part['documents'])} documents of "
        f"{part['kind']} set {part['set']} were found in the training sources."
        for report in reports
        for part in (report["data"] or {}).get("contamination", [])
        if part["found"]
    ]


def tokenizer_table(reports: Sequence[Report]) -> Table:
    """One row a language: what its text costs in tokens."""
    rows, notes = [], []
    for report in reports:
        compared: Mapping[str, Any] = report.get("tokenizer") or {}
        for role in ("target", "source"):
            if one := compared.get(role):
                amounts = [one[key] for key in ("tokens_per_word", "bytes_per_token")]
                shares = [one[key] for key in ("fragment_share", "unknown_share")]
                cells = [Cell(fmt.MISSING if v is None else f"{v:.3g}", v, number=True) for v in amounts]
                cells += [Cell(fmt.percent(v), v, number=True) for v in shares]
                rows.append([*_run(report, reports), Cell(role), *cells])
        if compared.get("advice"):
            sentence = f"{_of(report, reports)}{compared['advice']}."
            notes.append(sentence[0].upper() + sentence[1:] if len(reports) == 1 else sentence)
    columns = ["Language", "Tokens a word", "Bytes a token", "Parts of characters", "Unknown"]
    return Table("Tokenizer", [*_run_column(reports), *columns], rows, " ".join(notes))


def _of(report: Report, reports: Sequence[Report]) -> str:
    return f"{report['name']}: " if len(reports) > 1 else ""


def _run(report: Report, reports: Sequence[Report]) -> list[Cell]:
    return [Cell(report["name"])] if len(reports) > 1 else []


def _run_column(reports: Sequence[Report]) -> list[str]:
    return ["Run"] if len(reports) > 1 else []
