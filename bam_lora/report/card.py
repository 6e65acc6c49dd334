"""The model card: README.md of the resulting model, fit to be published as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from bam_lora.report import format as fmt
from bam_lora.report.chain import chain_scores_table
from bam_lora.report.data_tables import data_table
from bam_lora.report.tables import Cell, Table, scores_table, summary_table
from bam_lora.report.tasks import model_index, tasks_table
from bam_lora.report.verdict import verdict
from bam_lora.report.vocabulary import vocabulary_table

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_RECIPE_KEYS = ("strategy", "data", "bam", "vocabulary", "lora", "quantization", "training", "seed")
_NOT_COMPARED = (
    "Not compared with another way of training: "
    "this does not say whether one would have learned more or forgotten less."
)
_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/or/repository")
model = AutoModelForCausalLM.from_pretrained("path/or/repository", dtype="auto")
```"""


def model_card(report: Mapping[str, Any], recipe: dict[str, Any]) -> str:
    """Writes the card of a run's model.

    Args:
        report: What `collect` returned.
        recipe: The resolved recipe.

    Returns:
        Markdown with YAML front matter. Folders of this machine are left out: of a local path the last part is named.
    """
    chain = [*report.get("inherited", []), report]  # the card names the original base and every run since
    origin = chain[0]
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if _is_hub_id(origin["base"]):
        front["base_model"] = origin["base"]
    languages = sorted({code for codes in report["languages"].values() for code in codes})
    if languages:
        front["language"] = languages
    front["tags"] = ["bam_lora", "branch-and-merge", "lora", "language-adaptation"]
    if index := model_index(report, str(report["name"])):
        front["model-index"] = index
    shared = {key: recipe[key] for key in _RECIPE_KEYS if key in recipe}
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {_escaped(_public(str(origin['base'])))}, adapted with bam_lora",
        _how(chain),
        f"{_escaped(verdict([report], None))} {_NOT_COMPARED}",
        "## Results",
        _drawn(summary_table([report])),
        _drawn(scores_table([report])),
        _drawn(tasks_table([report])),
        _drawn(chain_scores_table([report])),
        _drawn(vocabulary_table([report])),
        "## Training data",
        _drawn(data_table([report]), public=True),
        "## Use",
        "The model is a plain Hugging Face checkpoint; it needs neither bam_lora nor PEFT.",
        _LOAD,
        "## Recipe",
        _fenced(yaml.safe_dump(_public(shared), sort_keys=False, allow_unicode=True, width=100)),
        "The licence and the terms of use of the base and of the training data apply to this model.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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


def _is_local(path: str) -> bool:
    return path.startswith(("/", "~", "./", "../")) or bool(PureWindowsPath(path).drive)


def _is_hub_id(base: Any) -> bool:
    return isinstance(base, str) and not _is_local(base) and bool(_HUB_ID.fullmatch(base))


def _public(value: Any) -> Any:
    """The value with every local path cut down to its last part."""
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str) and _is_local(value):
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
