"""The data sets that the recipes use: what columns they have, under which licence, where and when that was looked up.

`recipes/_shared/datasets/` holds one file per data set. The comments at the head of the recipes are written from it,
and the tests serve rows of its columns:

    python -m bam_lora.recipe_catalogue recipes/german/pretrain.yaml ...
"""

from __future__ import annotations

import itertools
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.recipe import EvaluationSource, Recipe, Source, load_recipe
from bam_lora.recipe_yaml import read_yaml

_KEYS = {"id", "licence", "gated", "size", "source", "looked_up", "files", "configs", "columns"}
_ANY = "*"
_TITLE = "# Data, with its columns:"
_WIDTH = 118


@dataclass(frozen=True)
class DataSet:
    """A data set of the Hub, as its page described it on a day.

    Attributes:
        id: Its id on the Hub.
        licence: Its licence in words.
        gated: Whether its terms must be accepted before it can be read.
        size: How much there is of it, in words.
        source: The page that says so.
        looked_up: The day, as YYYY-MM-DD.
        files: A file of it in the repository, with `{config}` and `{split}`.
        configs: Splits per configuration; "*" stands for every name not listed, "default" for the only one.
        columns: Type per column: a name of `datasets` such as "string" or "int64", a mapping of them, or a list with
            the one type of its items.
    """

    id: str
    licence: str
    gated: bool
    size: str
    source: str
    looked_up: str
    files: str
    configs: Mapping[str, Sequence[str]]
    columns: Mapping[str, Any]

    def splits(self, config: str | None) -> Sequence[str]:
        """The splits of a configuration; none if it has no such configuration."""
        return self.configs.get(config or "default", self.configs.get(_ANY, ()) if config else ())

    def describe(self, configs: Sequence[str]) -> str:
        """What the head of a recipe says of it, on one line."""
        named = f" ({', '.join(configs)})" if configs else ""
        gated = " Gated: accept its terms on that page." if self.gated else ""
        columns = describe_columns(self.columns)
        return f"{self.id}{named}: {columns}. Licence: {self.licence}. {self.source}, {self.looked_up}.{gated}"


def describe_columns(columns: Mapping[str, Any]) -> str:
    """Columns and their types, such as `id, text (string), messages (list of role, content (string))`."""
    groups = itertools.groupby(columns.items(), key=lambda column: _type_name(column[1]))
    return ", ".join(f"{', '.join(name for name, _ in group)} ({kind})" for kind, group in groups)


def _type_name(kind: Any) -> str:
    if isinstance(kind, Mapping):
        return describe_columns(kind)
    return f"list of {_type_name(kind[0])}" if isinstance(kind, list) else str(kind)


def read_catalogue(folder: Path) -> dict[str, DataSet]:
    """The data sets in `folder` by their ids.

    Args:
        folder: `_shared/datasets` of the recipes.

    Raises:
        UserError: If a file has other keys than those of a data set.
    """
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        values = read_yaml(path.read_text(encoding="utf-8"), path).value
        if not isinstance(values, dict) or set(values) != _KEYS:
            keys = sorted(values) if isinstance(values, dict) else values
            raise UserError.of(
                str(path), expected=f"keys {', '.join(sorted(_KEYS))}", found=str(keys), remedy="Write those"
            )
        found[values["id"]] = DataSet(**values)
    return found


def used_sources(recipe: Recipe) -> dict[str, dict[str, set[str]]]:
    """The Hub data sets of a recipe: per id the configurations ("default" for none), with their splits (no ranges)."""
    held = (recipe.evaluation, recipe.selection)
    every: list[Source | EvaluationSource] = [*recipe.data.target, *recipe.data.replay]
    every += [one for sets in held for one in (*sets.target, *sets.source)]
    found: dict[str, dict[str, set[str]]] = {}
    for one in every:
        if not Path(one.path).is_absolute():
            splits = found.setdefault(one.path, {}).setdefault(one.name or "default", set())
            splits.add(one.split.partition("[")[0])
    return found


def head_lines(recipe: Recipe, catalogue: Mapping[str, DataSet]) -> list[str]:
    """The comment on a recipe's data sets, in the order in which the recipe names them.

    Raises:
        UserError: If the recipe uses a data set, configuration or split that the catalogue does not have.
    """
    lines = [_TITLE]
    for name, configs in used_sources(recipe).items():
        if name not in catalogue:
            raise UserError.of(name, expected="a file in _shared/datasets", found="none", remedy="Write one")
        data = catalogue[name]
        for config, splits in configs.items():
            if unknown := splits - set(data.splits(None if config == "default" else config)):
                raise UserError.of(
                    f"{name} {config}",
                    expected=f"splits of the catalogue ({', '.join(data.splits(config)) or 'no such configuration'})",
                    found=", ".join(sorted(unknown)),
                    remedy="Look it up, and correct the recipe or _shared/datasets",
                )
        text = data.describe([config for config in configs if config != "default"])
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent="#   ", subsequent_indent="#     ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return lines


def with_head(text: str, lines: Sequence[str]) -> str:
    """A recipe's text with the comment on its data sets put in the place of the old one, or before `extends`."""
    block = "\n".join(lines) + "\n"
    old = re.compile(re.escape(_TITLE) + r"\n(?:#   .*\n)*")
    if old.search(text):
        return old.sub(lambda _: block, text, count=1)
    return re.sub(r"^(?=extends:)", lambda _: "#\n" + block, text, count=1, flags=re.MULTILINE)


def main(paths: Sequence[str]) -> None:
    """Writes the comment on the data sets into each of these recipes."""
    for path in map(Path, paths):
        shared = path.resolve().parents[1] / "_shared" / "datasets"
        lines = head_lines(load_recipe(path), read_catalogue(shared))
        path.write_text(with_head(path.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
