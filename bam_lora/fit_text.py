"""Settings that fit, as YAML, as options of the command line, and as a recipe of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.fit import Fit, left_free, nested
from bam_lora.recipe import Recipe
from bam_lora.recipe_yaml import dump_yaml, read_yaml
from bam_lora.store import write_text

_LABEL = 12
_HEAD = "# Settings that fit"  # how a file of this kind begins, which may be written again


def fit_lines(recipe: Recipe, fit: Fit) -> list[str]:
    """What was chosen, for the terminal."""
    training = recipe.training
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps * recipe.data.sequence_length
    card, free = (size / 2**30 for size in (fit.memory_bytes, left_free(fit.memory_bytes)))
    lines = [
        f"{'fit':{_LABEL}}into {card:.1f} GiB with {free:.1f} GiB left free, at the recipe's {step:,} tokens a step:"
    ]
    lines += [" " * _LABEL + line for line in yaml_text(fit.settings).splitlines()]
    lines += [f"{'note':{_LABEL}}{note}" for note in fit.notes]
    return [*lines, f"{'options':{_LABEL}}{options_text(fit.settings)}"]


def yaml_text(settings: dict[str, Any]) -> str:
    """The settings as YAML."""
    return dump_yaml(nested(settings))


def options_text(settings: dict[str, Any]) -> str:
    """The settings as options of `bam-lora run`."""
    return " ".join(f"--set {key}={json.dumps(value)}".replace('"', "") for key, value in settings.items())


def write_fitted(path: Path, recipe: Path, overrides: Sequence[str], fit: Fit) -> None:
    """Writes a recipe that extends another by what was chosen, and by what the command line has set.

    Raises:
        UserError: If it would be the recipe itself or another file that this did not write, or an override is one of
            a list's items.
    """
    require_writable(path, recipe)
    settings: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if any(part.isdigit() for part in key.split(".")):
            raise UserError.of(
                f"--write with --set {key}",
                expected="keys of sections",
                found="an item of a list",
                remedy="Write it into the recipe",
            )
        _put(settings, key.split("."), read_yaml(value, None).value)
    for key, value in fit.settings.items():
        _put(settings, key.split("."), value)
    extends = os.path.relpath(recipe.resolve(), path.resolve().parent)
    head = f"{_HEAD} {fit.memory_bytes / 2**30:.1f} GiB, chosen by `bam-lora check --fit`.\n"
    write_text(path, head + dump_yaml({"extends": extends, **settings}))


def require_writable(path: Path, recipe: Path) -> None:
    """Refuses a place for fitted settings where something else is.

    Raises:
        UserError: Naming what is there.
    """
    if path.resolve() == recipe.resolve():
        raise UserError.of("--write", expected="a new file", found="RECIPE itself", remedy="Choose another name")
    if not path.parent.is_dir():
        raise UserError.of(f"--write {path}", expected="a folder to write into", found="none", remedy="Make it first")
    if path.is_dir() or (path.exists() and not path.read_bytes().startswith(_HEAD.encode())):
        found = "a folder" if path.is_dir() else "a file that --write did not make"
        raise UserError.of(f"--write {path}", expected="a new file", found=found, remedy="Choose another name")


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value
