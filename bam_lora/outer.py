"""The outer step of a run: merged deltas as the gradients of an optimizer with Nesterov momentum (DiLoCo).

DiLoCo (arXiv 2311.08105) takes what workers changed, on average, as the gradient of an outer optimizer, SGD with
Nesterov momentum. Here Δ_t is the merged delta of iteration t, v_0 = 0 at the run's start, and what is added is
    v_t = m · v_{t−1} + Δ_t,    U_t = lr · (Δ_t + m · v_t)    (torch.optim.SGD(nesterov=True) with gradients −Δ_t).
Written out over the iterations of the run,
    U_t = lr · (1 + m) · Δ_t + Σ_{s<t} lr · m^{t−s+1} · Δ_s,
so it stays in the span of the branches' factors: the ledger's entry of iteration t names the adapters of the earlier
iterations again, each with one number a weight. A learning rate of 1 without momentum is the plain merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.coefficients import Coefficients
from bam_lora.ledger import Ledger

Scalars = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class OuterStep:
    """Learning rate lr > 0 and momentum 0 ≤ m < 1."""

    learning_rate: float
    momentum: float

    @property
    def is_plain(self) -> bool:
        """Whether it adds merged deltas as they are."""
        return self.learning_rate == 1 and self.momentum == 0

    @property
    def own(self) -> float:
        """What multiplies Δ_t in U_t."""
        return self.learning_rate * (1 + self.momentum)

    def past(self, age: int) -> float:
        """What multiplies Δ_{t−age} in U_t, age from 1."""
        return float(self.learning_rate * self.momentum ** (age + 1))


@dataclass(frozen=True)
class PastMerge:
    """An earlier iteration of the run: its own branches' adapters, and Δ_s by weight, one number a branch."""

    age: int
    folders: Sequence[Path]
    delta: Scalars


def past_merges(ledger: Ledger, branches: Sequence[Sequence[Path]], step: OuterStep) -> list[PastMerge]:
    """The iterations that the next one's momentum comes from, the newest first; none without momentum.

    Args:
        ledger: Of the run, its entries those of the iterations before; all of them were made with this step, so an
            entry's numbers of its own branches are lr · (1 + m) times those of Δ_s.
        branches: The adapter folders of each of these iterations' own branches.
        step: The outer step.
    """
    if step.momentum == 0:
        return []
    pairs = list(zip(branches, ledger.iterations[: len(branches)], strict=True))
    return [
        PastMerge(age, folders, _delta(entry["coefficients"], len(folders), step))
        for age, (folders, entry) in enumerate(reversed(pairs), start=1)
    ]


def _delta(stored: Mapping[str, Mapping[str, Any]], own: int, step: OuterStep) -> Scalars:
    assert all(value["kind"] == "scalar" for value in stored.values()), "the recipe allows low-rank methods only"
    return {name: [number / step.own for number in value["values"][:own]] for name, value in stored.items()}


def outer_update(
    merged: Mapping[str, Coefficients], branches: int, past: Sequence[PastMerge], step: OuterStep
) -> dict[str, Coefficients]:
    """The coefficients of U_t: this iteration's branches, then those of `past` in its order.

    Args:
        merged: Scalar coefficients of Δ_t, by weight name.
        branches: K of this iteration.
        past: The earlier iterations.
        step: The outer step.
    """
    names = sorted(set(merged).union(*(one.delta for one in past)))
    return {name: _update(name, merged, branches, past, step) for name in names}


def _update(
    name: str, merged: Mapping[str, Coefficients], branches: int, past: Sequence[PastMerge], step: OuterStep
) -> Coefficients:
    own = merged[name].values.tolist() if name in merged else [0.0] * branches
    values = [step.own * value for value in own]
    for one in past:
        delta = one.delta.get(name, [0.0] * len(one.folders))
        values += [step.past(one.age) * value for value in delta]
    return Coefficients.scalar(values)
