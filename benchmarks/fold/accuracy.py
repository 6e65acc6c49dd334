"""How far a folded model is from float64: sampled rows of every changed weight, and all other tensors byte by byte.

Nothing here comes from bam_lora, so that it judges all contenders alike. Shapes: o output, i input, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

_SMALLEST_EXPONENT, _MANTISSA_BITS = -126, 7  # of bf16


def ulp(values: np.ndarray) -> np.ndarray:
    """The distance between neighbouring bf16 numbers at these float64 values."""
    _, exponent = np.frexp(values)  # |value| = m * 2**exponent with 0.5 <= m < 1
    return np.ldexp(1.0, np.maximum(exponent - 1, _SMALLEST_EXPONENT) - _MANTISSA_BITS)


def round_directly(values: np.ndarray) -> np.ndarray:
    """float64 to the nearest bf16 number, half to even, rounded once (torch's conversion goes through fp32)."""
    step = ulp(values)
    return np.rint(values / step) * step


class Folder:
    """The tensors of a model folder by name, of one shard or many."""

    def __init__(self, path: Path) -> None:
        self._files = {}
        for shard in sorted(path.glob("*.safetensors")):
            opened = safe_open(shard, framework="pt")
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def names(self) -> set[str]:
        """All of them."""
        return set(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self._files[name].get_tensor(name)

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, as stored."""
        part = self._files[name].get_slice(name)
        return torch.cat([part[row : row + 1] for row in rows])

    def row_count(self, name: str) -> int:
        """How many a matrix has."""
        return int(self._files[name].get_slice(name).get_shape()[0])


def deltas(adapters: Sequence[Path], weights: Sequence[float]) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """{weight: [(B_or, A_ri) of each adapter]} of plain LoRA of one rank; B in float64, times weight and scaling."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for folder, weight in zip(adapters, weights, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / config["r"]
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, A_ri in tensors.items():
            if name.endswith(".lora_A.weight"):
                B_or = tensors[name.replace(".lora_A.", ".lora_B.")]
                target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                found.setdefault(target, []).append((B_or.double() * (weight * scaling), A_ri))
    return found


def errors(
    base: Path, output: Path, adapters: Sequence[Path], weights: Sequence[float], *, rows: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Compares a bf16 output with W + Σ weight · scaling · B·A in float64, rounded directly.

    Args:
        base: The bf16 model that was folded into.
        output: What came of it.
        adapters: The adapters.
        weights: Their weights.
        rows: Sampled rows of each changed weight, its first and last among them.
        seed: Of the sample.

    Returns:
        {"elements", "identical", "largest_ulp", "kept", "relative_error", "untouched_identical", "missing", "other"}:
        the share of the elements that equal the rounded reference, the largest distance from it in units in
        the last place of the larger of base and reference, the projection of the achieved change on the wanted one and
        its relative error, and whether all other tensors are the base's; names that the output lacks or has besides.
    """
    before, after, changes = Folder(base), Folder(output), deltas(adapters, weights)
    lost = sorted(before.names() - after.names())
    sums = dict.fromkeys(("elements", "identical", "inner", "wanted", "missed"), 0.0)
    largest = 0.0
    for name in sorted(set(changes) - set(lost)):
        old, exact, got = _sample(before, after, name, changes[name], rows, seed)
        want = round_directly(exact)
        sums["elements"] += got.size
        sums["identical"] += np.count_nonzero(got == want)
        largest = max(largest, float((np.abs(got - want) / ulp(np.maximum(np.abs(old), np.abs(exact)))).max()))
        sums["inner"] += float(((got - old) * (exact - old)).sum())
        sums["wanted"] += float(((exact - old) ** 2).sum())
        sums["missed"] += float(((got - exact) ** 2).sum())
    untouched = [name for name in before.names() - set(changes) if name in after.names()]
    return {
        "elements": int(sums["elements"]),
        "identical": sums["identical"] / sums["elements"],
        "largest_ulp": largest,
        "kept": sums["inner"] / sums["wanted"],
        "relative_error": (sums["missed"] / sums["wanted"]) ** 0.5,
        "untouched_identical": all(torch.equal(before.tensor(name), after.tensor(name)) for name in untouched),
        "missing": lost,
        "other": sorted(after.names() - before.names()),
    }


def _sample(
    before: Folder,
    after: Folder,
    name: str,
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rows: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(base, exact result, output) of some rows of a weight, in float64."""
    chosen = list(_rows(before.row_count(name), rows, seed))
    old = before.rows(name, chosen).double()
    exact = old.clone()
    for B_or, A_ri in factors:
        exact += B_or[chosen] @ A_ri.double()
    return old.numpy(), exact.numpy(), after.rows(name, chosen).double().numpy()


def _rows(count: int, wanted: int, seed: int) -> Iterator[int]:
    inner = np.random.default_rng([seed, count]).permutation(max(count - 2, 0))[: max(wanted - 2, 0)] + 1
    yield from sorted({0, *(int(row) for row in inner), count - 1})
