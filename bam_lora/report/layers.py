"""Which layer and module a weight belongs to, and what that makes of numbers there is one of per weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# The words before a layer's number, as PEFT knows them (`layers_pattern`).
_LAYER = re.compile(r"(?:^|.*?\.)(?:layers|layer|h|blocks|block)\.(\d+)(?=\.)")


@dataclass(frozen=True, order=True)
class Place:
    """A weight's place: a layer of a stack such as "model.layers", or, with `layer` None, its own name as `stack`."""

    layerless: bool
    stack: str
    layer: int | None
    kind: str


def place(weight: str) -> Place:
    """Parses a weight's name.

    Args:
        weight: Such as "model.layers.3.self_attn.q_proj.weight".

    Returns:
        Such as stack "model.layers", layer 3, kind "q_proj". The first number counts, so experts are in their layer.
    """
    module = weight.removesuffix(".weight")
    kind = module.rpartition(".")[2]
    found = _LAYER.match(module)
    if found is None:
        return Place(True, module, None, kind)
    return Place(False, module[: found.start(1) - 1], int(found[1]), kind)


def row_names(places: Iterable[Place]) -> dict[tuple[str, int | None], str]:
    """A name for every layer, in order, and after them for every weight outside the layers.

    Args:
        places: Of all weights, in any order.

    Returns:
        {(stack, layer): name}: the layer's number, with the stack before it where there are several stacks.
    """
    rows = sorted({(item.layerless, item.stack, item.layer or 0) for item in places})
    several = len({stack for layerless, stack, _ in rows if not layerless}) > 1
    names: dict[tuple[str, int | None], str] = {}
    for layerless, stack, layer in rows:
        if layerless:
            names[stack, None] = stack
        else:
            names[stack, layer] = f"{stack}.{layer}" if several else str(layer)
    return names


def cosine_by_layer(tensors: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The branches' agreement layer by layer.

    Args:
        tensors: `tensors` of merge.json.

    Returns:
        {"layer": number or name, "cosine", "tensors": how many} a layer: the plain mean of its weights' cosines, those
        without one (a delta of zero) left out. Weights outside the layers stand under their own name. None where no
        weight has a cosine.
    """
    return [
        {"layer": layer, "cosine": sum(found) / len(found), "tensors": len(found)}
        for layer, found in _by_layer(tensors, "cosine")
    ] or None


def norm_by_layer(tensors: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The size of what a merge added, layer by layer.

    Args:
        tensors: `tensors` of merge.json.

    Returns:
        {"layer": as in `cosine_by_layer`, "merged_norm": Frobenius norm over its weights, "tensors": how many} a layer.
        None where no weight has a norm.
    """
    return [
        {"layer": layer, "merged_norm": math.hypot(*found), "tensors": len(found)}
        for layer, found in _by_layer(tensors, "merged_norm")
    ] or None


def _by_layer(tensors: Mapping[str, Mapping[str, Any]], key: str) -> Iterator[tuple[int | str, list[float]]]:
    """Every layer that has this number, in order: its number or name, and the numbers of its weights."""
    values: dict[tuple[str, int | None], list[float]] = {}
    for weight, numbers in tensors.items():
        if numbers.get(key) is not None:
            where = place(weight)
            values.setdefault((where.stack, where.layer), []).append(numbers[key])
    for row, name in row_names(place(weight) for weight in tensors).items():
        if row in values:
            yield int(name) if row[1] is not None and name.isdigit() else name, values[row]
