"""The front matter of a model card: what the Hub reads of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

import yaml

from bam_lora.report.language_codes import hub_code
from bam_lora.report.licences import hub_licence
from bam_lora.report.tasks import model_index as task_index

Report = Mapping[str, Any]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILE = re.compile(r"\.(jsonl?|parquet|txt|csv|arrow)(\.\w+)?$", re.IGNORECASE)
_TAGS = ["bam_lora", "branch-and-merge", "lora", "language-adaptation"]
_UNKNOWN = "unknown"


def front_matter(report: Report, name: str, *, adapter: bool = False, scored: bool = True) -> str:
    """The YAML block at the top of a card, its dashes included.

    Args:
        report: What `collect` returned.
        name: What the card calls the model.
        adapter: Whether the card is of a LoRA adapter on the base.
        scored: Whether the run's scores are those of what the card is of.

    Returns:
        Only what is known: a base that is a folder is not named, and a licence that the base's card does not state is
        `unknown`.
    """
    base = original(report)["base"]
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if is_hub_id(base):
        front |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    front |= licence(report)
    codes = language_codes(report)
    if codes:
        front["language"] = codes
    sets = datasets(report)
    if sets:
        front["datasets"] = sets
    front["tags"] = [*_TAGS, *(["base_model:adapter:" + base] if adapter and is_hub_id(base) else [])]
    index = model_index(report, name) if scored else []
    if index:
        front["model-index"] = index
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---"


def original(report: Report) -> Report:
    """The first run of a chain: its base is the one that everything was added to."""
    chain = [*report.get("inherited", []), report]
    return dict(chain[0])


def licence(report: Report) -> dict[str, str]:
    """`license`, and `license_name` and `license_link` where the base's card has them; `unknown` where it has none."""
    said = report.get("base_card") or {}
    if not said.get("license"):
        return {"license": _UNKNOWN}
    found = {key: str(value) for key, value in said.items() if value}
    link, base = found.get("license_link"), original(report)["base"]
    if not is_hub_id(base):  # the Hub has seen no such card
        found = hub_licence(found)
    if link and not link.startswith(("http://", "https://")):
        # Relative to the base's repository, which this one is not.
        if is_hub_id(base):
            found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link.lstrip('./')}"
        else:
            del found["license_link"]
    return found


def language_codes(report: Report) -> list[str]:
    """The codes the Hub knows: ISO 639-1 where there is one, else ISO 639-3; the target's first."""
    known = [
        code for run in [*report.get("inherited", []), report] for role in run["languages"].values() for code in role
    ]
    return list(dict.fromkeys(hub_code(code) for code in known))


def datasets(report: Report) -> list[str]:
    """Hub ids of what was trained on; files and folders have none."""
    data = report["recipe"].get("data") or {}
    paths = [source.get("path") for role in ("target", "replay") for source in data.get(role) or []]
    return list(dict.fromkeys(path for path in paths if is_hub_id(path) and "/" in path and not _FILE.search(path)))


def model_index(report: Report, name: str) -> list[dict[str, Any]]:
    """The scores of the newest merged model, a result a set, and of the tasks, as the Hub shows them."""
    last = max((score["iteration"] for score in report["scores"] if score["branch"] is None), default=0)
    results = [
        _result(
            {"name": f"{score['set']} ({score['role']})", "type": _slug(score["set"])},
            {"type": "bits_per_byte", "name": "Bits per byte (fewer is better)", "value": score["bits_per_byte"]},
        )
        for score in report["scores"]
        if score["branch"] is None and score["iteration"] == last and last > 0
    ]
    for index in task_index(report, name):
        results += index["results"]
    return [{"name": name, "results": results}] if results else []


def _result(dataset: dict[str, str], metric: dict[str, Any]) -> dict[str, Any]:
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [metric]}


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "set"


def is_local(path: str) -> bool:
    """Whether a path is one of this machine, which nobody else can use."""
    return path.startswith(("/", "~", "./", "../")) or bool(PureWindowsPath(path).drive)


def is_hub_id(base: Any) -> bool:
    """Whether a name can be a repository of the Hub."""
    return isinstance(base, str) and not is_local(base) and bool(_HUB_ID.fullmatch(base))
