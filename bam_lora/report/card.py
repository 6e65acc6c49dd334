"""The model card: README.md of the resulting model or adapter, fit to be published as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from bam_lora.report import format as fmt
from bam_lora.report import tables
from bam_lora.report.card_front import front_matter, is_local, licence, original
from bam_lora.report.card_texts import ADAPTER_USE, CITATION, LIMITS, NOT_COMPARED, USE
from bam_lora.report.data_tables import data_table
from bam_lora.report.parts import SCORE_TABLES
from bam_lora.report.tables import Cell, Table
from bam_lora.report.verdict import verdict

_PICTURE = "![Learned against forgotten, after each iteration]({})"
# The picture in a card, with the empty line after it: for a copy that goes where the picture does not.
PLANE = re.compile(r"!\[Learned against forgotten[^\]]*\]\([^)]*\)\n*")
_RECIPE_KEYS = ("strategy", "mode", "data", "bam", "vocabulary", "lora", "quantization", "training", "seed")


def model_card(report: Mapping[str, Any], recipe: dict[str, Any], *, picture: str | None = None) -> str:
    """Writes the card of a run's model.

    Args:
        report: What `collect` returned.
        recipe: The resolved recipe.
        picture: Path of the plane of learning and forgetting beside the card, if there is one.

    Returns:
        Markdown with YAML front matter. Folders of this machine are left out: of a local path the last part is named.
    """
    title = f"{_base_name(report)}, adapted with bam_lora"
    how = _how([*report.get("inherited", []), report])
    return _card(report, recipe, front_matter(report, title), title, how, USE, picture)


def adapter_card(report: Mapping[str, Any], recipe: dict[str, Any], facts: Mapping[str, Any]) -> str:
    """Writes the card of a run exported as one adapter.

    Args:
        report: What `collect` returned.
        recipe: The resolved recipe.
        facts: `rank`, `rank_asked` (None: exact), `scale`, `error` of the export.
    """
    title = f"LoRA adapter for {_base_name(report)}, made with bam_lora"
    kind = f"All that the run has added to its base, as one LoRA adapter of rank {facts['rank']}"
    if facts["rank_asked"] is None:
        kind += ": exact, the factors of all branches stacked."
    else:
        kind += f", the largest singular directions; the delta is {fmt.percent(facts['error'])} off (Frobenius norm)."
    if facts["scale"] != 1.0:
        kind += f" Its delta is scaled by λ = {facts['scale']:g}; the scores below are those of λ = 1."
    elif facts["rank_asked"] is not None:
        kind += " The scores below are those of the exact model."
    how = f"{kind}\n\n{_how([*report.get('inherited', []), report])}"
    use = ADAPTER_USE.replace("BASE", _plain(_base_name(report)))
    scored = facts["rank_asked"] is None and facts["scale"] == 1.0
    front = front_matter(report, title, adapter=True, scored=scored)
    return _card(report, recipe, front, title, how, use, None)


def _card(
    report: Mapping[str, Any],
    recipe: dict[str, Any],
    front: str,
    title: str,
    how: str,
    use: str,
    picture: str | None,
) -> str:
    shared = {key: recipe[key] for key in _RECIPE_KEYS if key in recipe}
    scores = [table([report]) for table in SCORE_TABLES if table is not tables.shrink_table]
    compared = "" if (report.get("baseline") or {}).get("envelope") else f" {NOT_COMPARED}"
    parts = [
        front,
        f"# {_escaped(title)}".replace(r"bam\_lora", "bam_lora"),
        how,
        f"{_escaped(verdict([report], None))}{compared}",
        "## Results",
        _PICTURE.format(picture) if picture else "",
        _drawn(tables.summary_table([report])),
        *(_drawn(table) for table in scores),
        "## Use",
        use,
        "## Training data",
        _drawn(data_table([report]), public=True),
        "## Recipe",
        _fenced(yaml.safe_dump(_public(shared), sort_keys=False, allow_unicode=True, width=100)),
        "## Limits",
        LIMITS,
        "## Licence",
        _licence(report),
        "## Citation",
        CITATION,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base_name(report: Mapping[str, Any]) -> str:
    return str(_public(str(original(report)["base"])))


def _licence(report: Mapping[str, Any]) -> str:
    said = licence(report)
    if said["license"] == "unknown":
        text = "The licence of the base is not known: its folder has no model card that names one. Find out before you "
        text += "publish or use this model, and put it into `license` at the top of this card."
    else:
        name = f"{said['license']} ({said['license_name']})" if "license_name" in said else said["license"]
        text = f"The base's, carried over: {_escaped(name)}."
        if "license_link" in said:
            text += f" Its text: <{_plain(said['license_link'])}>."
    return f"{text} The terms of use of the training data apply as well."


def _plain(text: str) -> str:
    """Without what would end a link or a line of code."""
    return re.sub(r"[\s<>\"`]+", "", text)


def _how(chain: Sequence[Mapping[str, Any]]) -> str:
    base, revision = _escaped(_public(str(chain[0]["base"]))), chain[0]["revision"]
    named = f"Base: {base}" + (f" (revision {_escaped(str(revision))})" if revision else "")
    if len(chain) == 1:
        return f"{named}. Method: {_way(chain[0])}."
    steps = [f"{number}. {_escaped(run['name'])}: {_way(run)}." for number, run in enumerate(chain, start=1)]
    return f"{named}. Runs, each continuing the one before:\n\n" + "\n".join(steps)


def _way(report: Mapping[str, Any]) -> str:
    branches = max((len(item["branches"]) for item in report["iterations"]), default=1)
    count = len(report["iterations"])
    ways = {
        "bam": f"Branch-and-Merge ([arXiv:2407.08699](https://arxiv.org/abs/2407.08699)): {count} iterations of up to "
        f"{branches} LoRA branches, whose weight deltas were averaged and folded into the full-precision weights",
        "sequential": f"{count} LoRA adapters trained in turn, each folded into the weights before the next",
        "single": "one LoRA adapter, folded into the full-precision weights",
    }
    way = ways.get(str(report["strategy"]), _escaped(str(report["strategy"])))
    tokens = fmt.count(report["cost"]["train_tokens"])
    return f"{way}; trained on {tokens} tokens"


def _public(value: Any) -> Any:
    """The value with every local path cut down to its last part."""
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str) and is_local(value):
        return (PureWindowsPath(value) if PureWindowsPath(value).drive else PurePosixPath(value)).name
    return value


def _escaped(text: str) -> str:
    """Text as text in Markdown, tables and HTML included."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", " ".join(plain.split()))


def _drawn(table: Table, *, public: bool = False) -> str:
    if not table.rows:
        return ""
    head = [Cell(text) for text in table.columns]
    align = ["---:" if cell.number else "---" for cell in table.rows[0]]
    lines = [
        "| " + " | ".join(_escaped(str(_public(c.text)) if public else c.text) for c in row) + " |"
        for row in [head, *table.rows]
    ]
    lines.insert(1, "| " + " | ".join(align) + " |")
    return "\n".join(lines) + (f"\n\n{_escaped(table.note)}" if table.note else "")


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}{fence}"
