"""Which of a recipe's texts are paths, and what they are relative to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bam_lora.recipe_values import Finding
from bam_lora.recipe_values import Path as KeyPath

_DATA_FILE = re.compile(r"\.(?:json|jsonl|parquet|txt)(?:\.(?:gz|zst|bz2|xz))?\Z", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[\w.-]+)?")
SOURCES = (
    ("data", "target"), ("data", "replay"),
    ("evaluation", "target"), ("evaluation", "source"),
    ("selection", "target"), ("selection", "source"),
)  # fmt: skip
"""Sections and roles of a recipe whose entries are sources."""
_TEMPLATE = ("data", "chat_template")
_TASKS = ("evaluation", "tasks")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def settle_paths(values: Mapping[str, Any], folder_of: Callable[[KeyPath], Path]) -> list[Finding]:
    """Makes the local paths in a raw recipe absolute, in place, and expands `${VARIABLE}` and `~` in them.

    What is not local afterwards is a Hub id. `output` keeps being relative to the current folder.

    Args:
        values: The recipe as read, right or wrong; only texts where paths belong are touched.
        folder_of: The folder that a path at this place of the recipe is relative to.

    Returns:
        What is wrong with them: variables that are not set, web addresses, names that are neither path nor Hub id.
    """
    findings: list[Finding] = []
    for place, holder, key in _path_places(values):
        text, missing = _expand(holder[key])
        if missing:
            findings.append((place, f"expected the environment variable {missing} to be set, found it unset"))
            continue
        if place == ("output",):
            holder[key] = os.path.expanduser(text)
            continue
        if place == _TEMPLATE or place[:2] == _TASKS:
            holder[key] = os.path.abspath(folder_of(place) / os.path.expanduser(text))
            continue
        settled, problem = _settle(text, folder_of(place), is_data=place != ("base",))
        holder[key] = settled
        if problem:
            findings.append((place, problem))
    return findings


def _path_places(values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Any, Any]]:
    """Places of the texts that are paths, each with the mapping that holds it."""
    for key in ("base", "output"):
        if isinstance(values.get(key), str):
            yield (key,), values, key
    data = values.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("chat_template"), str):
        yield _TEMPLATE, data, "chat_template"
    for section, role in SOURCES:
        held = values.get(section)
        sources = held.get(role) if isinstance(held, Mapping) else None
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, Mapping) and isinstance(source.get("path"), str):
                yield (section, role, number, "path"), source, "path"
    evaluation = values.get("evaluation")
    tasks = evaluation.get("tasks") if isinstance(evaluation, Mapping) else None
    for number, task in enumerate(tasks if isinstance(tasks, list) else []):
        named = task.get("task") if isinstance(task, Mapping) else task
        if isinstance(named, str) and is_task_file(named):  # any other is a name of the harness
            if isinstance(task, Mapping):
                yield (*_TASKS, number, "task"), task, "task"
            else:
                yield (*_TASKS, number), tasks, number


def is_task_file(text: str) -> bool:
    """Whether what a recipe calls a task is a file, by its ending."""
    return text.lower().endswith((".yaml", ".yml"))


def _expand(text: str) -> tuple[str, str | None]:
    """The text with its variables' values, and the first variable that is not set."""
    unset = [name for name in _VARIABLE.findall(text) if name not in os.environ]
    if unset:
        return text, str(unset[0])
    return _VARIABLE.sub(lambda match: os.environ[match[1]], text), None


def _settle(text: str, folder: Path, *, is_data: bool) -> tuple[str, str | None]:
    """The path as it is kept, and what is wrong with it."""
    if "://" in text:
        return text, f"expected a Hub id, a folder or files, found the address {text!r}; download it and name the files"
    expanded = os.path.expanduser(text)
    local = Path(os.path.abspath(folder / expanded))
    named_local = Path(expanded).is_absolute() or text in (".", "..") or text.startswith(("./", "../", "~"))
    file_like = is_data and ("*" in text or _DATA_FILE.search(text) is not None)
    if named_local or file_like or (text and _exists(local)):
        return str(local), None
    if text and not _HUB_ID.fullmatch(text):
        return text, f"expected a Hub id (owner/name), a folder or files, found {text!r}, which is not in {folder}"
    return text, None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
