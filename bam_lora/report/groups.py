"""Which runs are one recipe at several seeds, and what to call them together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

# What may differ between runs of one group: it changes neither the data, nor the method, nor the settings.
_FREE_KEYS = ("seed", "output", "keep", "limits")


def grouped(recipes: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Sorts runs into groups whose resolved recipes are equal apart from `seed`, `output`, `keep` and `limits`.

    Args:
        recipes: One resolved recipe a run.

    Returns:
        The runs' numbers, group by group, in the order in which each first comes up.
    """
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for number, recipe in enumerate(recipes):
        shared = {key: value for key, value in recipe.items() if key not in _FREE_KEYS}
        members = next((numbers for known, numbers in groups if known == shared), None)
        if members is None:
            groups.append((shared, [number]))
        else:
            members.append(number)
    return [numbers for _, numbers in groups]


def group_names(members: Sequence[Sequence[str]]) -> list[str]:
    """A name for each group of runs: what its runs' names share, such as "bam" for "seed-0/bam" and "seed-1/bam".

    Args:
        members: The runs' names, group by group; all differ.
    """
    short = [_shared(names) for names in members]
    return [
        name if name and short.count(name) == 1 else _counted(names) for name, names in zip(short, members, strict=True)
    ]


def _shared(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [name.split("/") for name in names]
    if len({len(one) for one in parts}) == 1:
        common = [column[0] for column in zip(*parts, strict=True) if len(set(column)) == 1]
        if common:
            return "/".join(common)
    same = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*names, strict=False))
    return "".join(characters[0] for characters in same).rstrip("-_./ ")


def _counted(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
