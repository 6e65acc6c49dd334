"""The report's tables as plain data: the page and the terminal draw the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bam_lora.report import format as fmt

Report = Mapping[str, Any]
_MANY_MODELS = 60  # rows that one still reads


@dataclass(frozen=True)
class Cell:
    """What is shown, and the exact number behind it as it stands in report.json (None for text)."""

    text: str
    value: float | None = None
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


def _text(value: Any) -> Cell:
    return Cell(fmt.MISSING if value is None or value == "" else str(value))


def _number(text: str, value: float | None) -> Cell:
    return Cell(text, value, number=True)


def _score(value: float | None, stderr: float | None) -> Cell:
    return _number(fmt.with_error(value, stderr), value)


def _norm(value: float | None) -> Cell:
    return _number(fmt.MISSING if value is None else f"{value:,.4g}", value)


def _seconds(value: float | None) -> Cell:
    return _number(fmt.duration(value), value)


def summary_table(reports: Sequence[Report]) -> Table:
    """One column a run: what it learned, what it forgot, how far it moved, what it cost."""
    measures = [
        (f"{role.capitalize()}, {when}", f"{role}_{when}")
        for role in ("target", "source")
        for when in ("before", "after")
    ]
    measures.insert(2, ("Learned", "learned"))
    measures.append(("Forgotten", "forgotten"))
    rows = [[Cell("Strategy"), *(Cell(str(r["strategy"]), number=True) for r in reports)]]
    rows.append([Cell("Iterations"), *(Cell(progress(r), number=True) for r in reports)])
    for label, key in measures:
        rows.append([Cell(label), *(_score(r["summary"][key], r["summary"][f"{key}_stderr"]) for r in reports)])
    rows.append([Cell("Change of the weights |ΔW|"), *(_norm(r["summary"]["delta_norm"]) for r in reports)])
    relative = [r["summary"]["delta_relative"] for r in reports]
    rows.append([Cell("|ΔW| relative to |W|"), *(_number(fmt.percent(value), value) for value in relative)])
    costs: list[tuple[str, str, Any]] = [
        ("Training tokens", "train_tokens", fmt.count),
        ("Wall time", "wall_seconds", fmt.duration),
        ("Peak memory", "peak_rss_bytes", fmt.size),
        ("Peak GPU memory", "peak_gpu_bytes", fmt.size),
        ("Disk", "disk_bytes", fmt.size),
    ]
    for label, key, show in costs:
        rows.append([Cell(label), *(_number(show(r["cost"][key]), r["cost"][key]) for r in reports)])
    note = (
        "Scores are bits per byte (fewer is better) ± one standard error over documents. "
        "Learned = target before − after; forgotten = source after − before."
    )
    note += _paired_note(all(report["summary"]["paired_stderr"] for report in reports))
    return Table("Summary", ["", *(r["name"] for r in reports)], rows, note)


def _paired_note(paired: bool) -> str:
    if paired:
        return " Errors of differences are taken document by document."
    return " Errors of differences count the two scores as independent, which makes them larger than they are."


def progress(report: Report) -> str:
    """How many iterations a run has, or how far it is."""
    status = report["status"]
    planned = status["iterations_planned"]
    if status["finished"] and status["iterations_done"] == planned:
        return str(planned)
    why = "ended by its limits" if status["finished"] else "unfinished"
    return f"{status['iterations_done']} of {planned or '?'}, {why}"


def pairs_table(comparison: Mapping[str, Any]) -> Table:
    """One row for every two runs: a minus b, a over b, and how to read it."""
    rows = []
    for pair in comparison["pairs"]:
        rows.append(
            [
                Cell(f"{pair['a']} against {pair['b']}"),
                *(_difference(pair, key) for key in ("learned_difference", "forgotten_difference")),
                _ratio(pair["delta_norm_ratio"]),
                _ratio(pair["wall_seconds_ratio"]),
                _winner(pair, "learned_more"),
                _winner(pair, "forgot_less"),
            ]
        )
    note = (
        "Differences are the first run minus the second, in bits per byte ± their standard error; "
        "ratios the first over the second. Less than two standard errors apart is a tie."
    )
    note += _paired_note(all(pair["paired_stderr"] for pair in comparison["pairs"]))
    columns = ["", "Learned", "Forgotten", "|ΔW| ratio", "Wall time ratio", "Learned more", "Forgot less"]
    return Table("Differences", columns, rows, note)


def _difference(pair: Mapping[str, Any], key: str) -> Cell:
    stderr = pair[f"{key}_stderr"]
    error = f" ± {stderr:.4f}" if pair[key] is not None and stderr is not None else ""
    return _number(fmt.signed(pair[key]) + error, pair[key])


def _ratio(value: float | None) -> Cell:
    return _number(fmt.MISSING if value is None else f"{value:.3g}", value)


def _winner(pair: Mapping[str, Any], key: str) -> Cell:
    if not pair["comparable"]:
        return Cell("not comparable")
    return Cell({"a": pair["a"], "b": pair["b"], "tie": "tie", "unknown": "unknown"}.get(pair[key], fmt.MISSING))


def scores_table(reports: Sequence[Report]) -> Table:
    """One row a model (base, branches, merged), one column an evaluation set; branches apart where there are many."""
    if not _many_models(reports):
        return _scores(reports, "Scores by set", lambda branch: True)
    table = _scores(reports, "Scores by set", lambda branch: branch is None)
    return replace(table, note=f"{table.note} The branches' are in report.html and report.json.")


def branch_scores_table(reports: Sequence[Report]) -> Table:
    """The branches' scores where there are too many for the table of all models; else no rows."""
    return _scores(reports, "Scores of the branches", lambda branch: branch is not None and _many_models(reports))


def _many_models(reports: Sequence[Report]) -> bool:
    return sum(len({(s["iteration"], s["branch"]) for s in report["scores"]}) for report in reports) > _MANY_MODELS


def _scores(reports: Sequence[Report], title: str, wanted: Callable[[int | None], bool]) -> Table:
    sets = list(dict.fromkeys((s["role"], s["set"]) for report in reports for s in report["scores"]))
    sets.sort(key=lambda item: item[0] != "target")
    rows = []
    for report in reports:
        models: dict[tuple[int, int | None], dict[tuple[str, str], Any]] = {}
        for s in report["scores"]:
            if wanted(s["branch"]):
                models.setdefault((s["iteration"], s["branch"]), {})[s["role"], s["set"]] = s
        groups = {(i["iteration"], b["branch"]): b.get("group") for i in report["iterations"] for b in i["branches"]}
        for (iteration, branch), found in models.items():
            cells = [_score(found[k]["bits_per_byte"], found[k]["stderr"]) if k in found else _text(None) for k in sets]
            name = _model(iteration, branch, groups.get((iteration, branch)))
            rows.append([*_run(report, reports), Cell(name), *cells])
    columns = [*_run_column(reports), "Model", *(f"{name} ({role})" for role, name in sets)]
    return Table(title, columns, rows, f"Bits per byte ± one standard error. {_settings(reports)}".rstrip())


def _settings(reports: Sequence[Report]) -> str:
    """How it was measured, in words; said once where all runs agree."""
    texts = []
    for report in reports:
        if report["evaluation"] is not None:
            window, overlap = (fmt.count(report["evaluation"][f"{key}_bytes"]) for key in ("window", "overlap"))
            precision = report["evaluation"]["precision"]
            texts.append((report["name"], f"{precision} weights, windows of {window} bytes, {overlap} of them context"))
    if len({text for _, text in texts}) <= 1:
        return f"Measured with {texts[0][1]}." if texts else ""
    return " ".join(f"{name}: {text}." for name, text in texts)


def _model(iteration: int, branch: int | None, group: str | None) -> str:
    if iteration == 0:
        return "base"
    name = f"branch {branch} ({group})" if group else f"branch {branch}"
    return f"iteration {iteration}, " + ("merged" if branch is None else name)


def _run(report: Report, reports: Sequence[Report]) -> list[Cell]:
    return [Cell(report["name"])] if len(reports) > 1 else []


def _run_column(reports: Sequence[Report]) -> list[str]:
    return ["Run"] if len(reports) > 1 else []


def iterations_table(reports: Sequence[Report]) -> Table:
    """One row an iteration: how the branches agreed, how large the step was, how long each stage took."""
    rows = []
    grouped = any(b.get("group") for report in reports for item in report["iterations"] for b in item["branches"])
    for report in reports:
        for item in report["iterations"]:
            groups = ", ".join(branch.get("group") or fmt.MISSING for branch in item["branches"])
            rows.append(
                [
                    *_run(report, reports),
                    _number(str(item["iteration"]), item["iteration"]),
                    *([Cell(groups)] if grouped else []),
                    _number(fmt.count(item["tokens"]), item["tokens"]),
                    Cell(_list(item["coefficients"]), number=True),
                    _number(fmt.signless(item["cosine"], 3), item["cosine"]),
                    Cell(_list(item["delta_norms"]), number=True),
                    _norm(item["merged_norm"]),
                    *(_seconds(item["seconds"][stage]) for stage in ("train", "merge", "fold", "evaluate")),
                ]
            )
    columns = [
        "Iteration",
        *(["Branches"] if grouped else []),
        "Tokens",
        "Merge weights",
        "Cosine",
        "|Δ| of branches",
        "|Δ| merged",
    ]
    columns += ["Training", "Merging", "Folding", "Evaluating"]
    note = "Cosine: between the branches' deltas, mean over pairs; 1 is full agreement. |Δ|: Frobenius norm of a delta."
    return Table("Iterations", [*_run_column(reports), *columns], rows, note)


def _list(values: Sequence[float] | None) -> str:
    return fmt.MISSING if not values else ", ".join(f"{value:.4g}".replace("-", fmt.MINUS) for value in values)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay values."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    result: dict[str, Any] = {}
    for key, item in value.items():
        result |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return result


def environment_table(reports: Sequence[Report]) -> Table:
    """One row a fact about the machine and the software."""
    return _by_key("Environment", [flat(report["environment"] or {}) for report in reports], reports)


def recipe_differences_table(reports: Sequence[Report]) -> Table:
    """The keys in which the runs' recipes differ."""
    recipes = [flat(report["recipe"]) for report in reports]
    keys = [
        k for k in dict.fromkeys(k for r in recipes for k in r) if any(r.get(k) != recipes[0].get(k) for r in recipes)
    ]
    chosen = [{key: recipe.get(key) for key in keys} for recipe in recipes]
    return _by_key("Where the recipes differ", chosen, reports)


def _by_key(title: str, values: Sequence[Mapping[str, Any]], reports: Sequence[Report]) -> Table:
    keys = dict.fromkeys(key for item in values for key in item)
    rows = [[Cell(key), *(_text(item.get(key)) for item in values)] for key in keys]
    return Table(title, ["", *(report["name"] for report in reports)], rows)


def shrink_table(reports: Sequence[Report]) -> Table:
    """One row a model of `shrink.json`: the change scaled by λ, checkpoints, averages, learned weights."""
    rows = []
    for report in reports:
        for point in report["shrink"] or []:
            kind = {"shrink": "λ", "ema": "EMA", "learned": "μ"}.get(point["kind"], point["kind"])
            scores = [_score(point[role], point[f"{role}_stderr"]) for role in ("target", "source")]
            changes = [_number(fmt.signless(point[key]), point[key]) for key in ("learned", "forgotten")]
            name = Cell(f"{kind} {point['label']}")
            rows.append([*_run(report, reports), name, *scores, *changes, _norm(point["delta_norm"])])
    columns = [*_run_column(reports), "Model", "Target", "Source", "Learned", "Forgotten", "|ΔW|"]
    note = "Bits per byte. λ: the newest model with its whole change since the original base multiplied by λ."
    if any(point["kind"] == "learned" for report in reports for point in report["shrink"] or []):
        note += " μ: the last merge with learned weights, at this weight of the source text."
    return Table("Models beside the run’s own", columns, rows, note)
